"""Let transformers load and save block-sparse models from the moment it is imported. Nothing here imports it."""

from __future__ import annotations

import importlib
import warnings

from kronblocks.core.errors import KronblocksWarning
from kronblocks.core.later import when_imported


def open_doors() -> None:
    """Import `kronblocks.integrations.automodel` as soon as transformers' models are imported, or now if they are."""
    when_imported("transformers.modeling_utils", _open)


def _open() -> None:
    try:
        importlib.import_module("kronblocks.integrations.automodel")
    except (ImportError, AttributeError, KeyError, TypeError) as error:  # another transformers than those that it was made for
        import transformers

        warnings.warn(
            f"transformers {transformers.__version__} does not let kronblocks register its method ({error}), so AutoModel cannot "
            "load block-sparse models: use kronblocks.save_pretrained and kronblocks.from_pretrained, or another transformers",
            KronblocksWarning,
        )
