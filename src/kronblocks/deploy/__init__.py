"""Save, load and export trained models."""

from kronblocks.deploy.exported import Exported
from kronblocks.deploy.exporting import export
from kronblocks.deploy.loading import rebuild_on_load_
from kronblocks.deploy.saving import from_pretrained, save_pretrained

__all__ = [
    "Exported",
    "export",
    "from_pretrained",
    "rebuild_on_load_",
    "save_pretrained",
]
