"""Refuse to load the weights of another kind of layer, which `load_state_dict(strict=False)` would ignore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.built import HasBuiltWeight

_DENSE = "load weights of a dense model before sparsify_, or densify_ the model first"
_OTHER = (
    "give the model the layers that the saved one had before you load its weights, with sparsifier.load_state_dict(state) or "
    "apply_structure_(model, record)"
)


class WholeWeights(HasBuiltWeight):
    """Base of layers whose weight is made of several tensors: a state_dict must hold all of them, or none.

    If it holds none, `strict` decides as usual: parts of a model may be loaded.
    """

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_whole(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_whole(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise if the state_dict has tensors of another kind of layer, of other sizes, or only a part of the weight."""
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        tensors = (*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False))
        own = {key: tensor for key, tensor in tensors if key not in {"bias", *self._non_persistent_buffers_set}}
        needed = {key.partition(".")[0] for key in own}  # children only have to be mentioned: they check themselves
        mentioned = {key.partition(".")[0] for key in given} - {"bias"}
        kind = getattr(self, "kind", type(self).__name__)  # fully_shard makes another class of it
        where = f"of {prefix.rstrip('.') or 'the layer'}, a {kind}"
        if mentioned and not needed <= mentioned:
            raise KronblocksError(
                f"the state_dict holds {', '.join(sorted(given))} {where} made of {', '.join(sorted(needed))}: "
                + (_DENSE if "weight" in mentioned else _OTHER)
            )
        for key in sorted(needed & given.keys()):
            sizes, wanted = tuple(getattr(given[key], "shape", ())), tuple(own[key].shape)
            if sizes != wanted:
                raise KronblocksError(f"the state_dict holds {key} of sizes {sizes} {where} with {wanted}: {_OTHER}")
