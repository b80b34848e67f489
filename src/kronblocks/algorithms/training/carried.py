"""Keep a sparsifier's state in its model's state_dict, for trainers that save and load nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import OwnHook

KEY = "kronblocks_state"


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def pack(state: Mapping[str, Any]) -> Tensor:
    """Encode plain values and tensors as one uint8 tensor."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Any) -> dict[str, Any]:
    """Decode what `pack` made. Only plain values and tensors are read, nothing is executed.

    Raises:
        KronblocksError: the tensor holds something else.
    """
    try:
        return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), weights_only=True)
    except Exception as error:
        raise KronblocksError(f"{KEY} in the state_dict holds no state of a Sparsifier: {str(error).splitlines()[0]}") from error


def is_carried(model: nn.Module) -> bool:
    """Whether a sparsifier reads its state from the state_dicts that this model loads."""
    hooks = [getattr(each, "hook", None) for each in model._load_state_dict_pre_hooks.values()]
    return any(isinstance(hook, OwnHook) and isinstance(hook.owner, CarriedState) for hook in hooks)


class CarriedState:
    """Adds the state to every state_dict of the model, and removes and loads it first when the model loads one."""

    def __init__(self, model: nn.Module, sparsifier: _Stateful) -> None:
        self._model, self._sparsifier = model, sparsifier
        self._saving = model.register_state_dict_post_hook(OwnHook(self._add))
        self._loading = model.register_load_state_dict_pre_hook(OwnHook(self._take))

    def stop_saving(self) -> None:
        """Add no state to later state_dicts. Those that hold one can still be loaded."""
        self._saving.remove()

    def remove(self) -> None:
        """Neither add states nor load them any more."""
        self._saving.remove()
        self._loading.remove()

    def _add(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if model is self._model:  # copies, such as averages of weights, have the hook too
            state_dict[prefix + KEY] = pack(self._sparsifier.state_dict())

    def _take(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        packed = state_dict.pop(prefix + KEY, None)
        if packed is not None and model is self._model:
            self._sparsifier.load_state_dict(unpack(packed))
