"""Save, load and export trained models."""

from kronblocks.deploy.cards import note_scores
from kronblocks.deploy.exported import Exported
from kronblocks.deploy.exporting import export
from kronblocks.deploy.hub import push_to_hub
from kronblocks.deploy.loading import rebuild_on_load_
from kronblocks.deploy.saving import from_pretrained, save_pretrained

__all__ = [
    "Exported",
    "export",
    "from_pretrained",
    "note_scores",
    "push_to_hub",
    "rebuild_on_load_",
    "save_pretrained",
]
