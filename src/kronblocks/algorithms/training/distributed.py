"""Find the DistributedDataParallel around a model, and make it follow when layers are replaced."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kronblocks.core.errors import KronblocksError


def around(model: nn.Module, given: nn.Module | None = None) -> list[ref[Any]]:
    """Weak references to every DistributedDataParallel that contains a model.

    Args:
        model: the model that `sparsify_` got.
        given: the wrapper, or a module around it. None: it is looked for among all objects of the process.

    Raises:
        KronblocksError: `given` has no DistributedDataParallel with the model in it.
    """
    if given is not None and not isinstance(given, nn.Module):
        raise KronblocksError(f"ddp= is the wrapper, as in ddp=DistributedDataParallel(model), not {given!r}: or leave it out")
    if given is None and not (distributed.is_available() and distributed.is_initialized()):
        return []
    among = _all_objects() if given is None else given.modules()
    # of hundreds of thousands of objects: issubclass asks an abstract class, which takes ten times as long
    wrappers: list[Any] = [each for each in among if DistributedDataParallel in type(each).__mro__]
    found = [ref(wrapper) for wrapper in wrappers if any(module is model for module in wrapper.module.modules())]
    if given is not None and not found:
        raise KronblocksError(
            f"ddp= is a {type(given).__name__} without a DistributedDataParallel around the model that sparsify_ got: write "
            "ddp=DistributedDataParallel(model), the one that the training loop calls, or leave it out"
        )
    return found


def _all_objects() -> list[Any]:
    if gc.get_freeze_count() == 0:
        return gc.get_objects()
    gc.unfreeze()  # gc.freeze() hides objects from gc.get_objects()
    found = gc.get_objects()
    gc.freeze()
    return found


def follow_replaced_parameters(model: nn.Module, wrappers: list[ref[Any]]) -> None:
    """Make the DistributedDataParallel around a model average the gradients of its present parameters.

    Args:
        model: the model whose layers were replaced.
        wrappers: what `around` found. If it is empty, as for a model that was wrapped later, this fills it.
    """
    if all(reference() is None for reference in wrappers):
        wrappers[:] = around(model)
    for wrapper in (reference() for reference in wrappers):
        if wrapper is None:
            continue
        wrapper._static_graph_delay_allreduce_enqueued = False  # a static graph begins again with its first iteration
        parameters, sparse = wrapper._build_params_for_reducer()  # from here on as in unpickling: make a new reducer
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
        if wrapper.static_graph:
            wrapper.reducer._set_static_graph()
            wrapper.logger._set_static_graph()
        for hook, state in wrapper._comm_hooks:
            distributed._register_comm_hook(wrapper.reducer, state, hook)
