"""Models on the Hugging Face Hub, through huggingface_hub: `push_to_hub`, and the names that `from_pretrained` accepts."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from kronblocks.core.errors import KronblocksError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.safetensors", "README.md", "*.model", "*.txt", "*.jinja"]  # never a pickle, never code


def looks_remote(name: object) -> bool:
    """Whether a name given as text is one of a repository, "user/name", and no folder of that name exists."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and not Path(name).exists()


def downloaded(name: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder with the files of a repository, downloaded unless they are there.

    Raises:
        KronblocksError: huggingface_hub is not installed, or there is no such repository or connection.
    """
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, token=token, allow_patterns=_FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise KronblocksError(
            f"there is no folder {name!r}, and the Hub's repository of that name cannot be read: {_first(error)}"
        ) from error


def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a block-sparse model",
    **settings: Any,
) -> str:
    """Save a model and upload the folder. transformers' models have a method of this name, which works too.

    Args:
        model: as for `save_pretrained`.
        name: of the repository, "user/name"; it is made if it does not exist.
        private: make the repository private; None: as its owner's settings say.
        token: of the Hub; None: the one that `hf auth login` stored.
        revision: the branch; None: main.
        message: of the commit.
        settings: arguments of `save_pretrained`.

    Returns:
        The commit's address.

    Raises:
        KronblocksError: the model cannot be saved, or the Hub refuses the upload.
    """
    from kronblocks.deploy.saving import save_pretrained

    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder), **settings)
        try:
            api = hub.HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message))
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            raise KronblocksError(f"cannot upload to {name!r}: {_first(error)}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise KronblocksError("the Hub needs huggingface_hub: pip install huggingface_hub, or name a folder") from error
    return huggingface_hub


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
