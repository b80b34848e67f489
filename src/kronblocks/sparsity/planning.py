"""Which plan each layer computes with during a training: chosen anew when masks change, seldom switched, never timed twice."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from kronblocks.errors import KronblocksError
from kronblocks.hooks import forward_input
from kronblocks.ops.choice import plan_seconds
from kronblocks.ops.timing import candidates
from kronblocks.ops.timing_cache import Tables, load_tables
from kronblocks.sparsity.targets import BlockTarget, LayerTarget

MARGIN = 1.1
"""How many times slower than the best plan the present one must be before a layer switches."""


class Traffic(NamedTuple):
    """What reaches a layer in a training step, as far as its speed depends on it."""

    rows: int
    input_grad: bool
    dtype: str  # of the products: of autocast, where that is on


class _Watch:
    """A forward pre-hook that notes the last training forward; no branches on what it saw, which would compile models anew."""

    def __init__(self) -> None:
        self.seen: tuple[int, bool, torch.dtype] | None = None
        self.compiled = False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = forward_input(args, kwargs)
        if module.training and torch.is_grad_enabled():
            self.seen, self.compiled = (x.shape[:-1].numel(), x.requires_grad, _product_dtype(x)), torch.compiler.is_compiling()


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts and x.dtype != torch.float64 else x.dtype


def measuring_allowed() -> bool:
    """Whether trainings may time plans: `KRONBLOCKS_MEASURE=0` (or off) leaves it to the counts, everywhere."""
    return os.environ.get("KRONBLOCKS_MEASURE", "").lower() not in ("0", "off")


class Planner:
    """Chooses the plans of the layers that leave it to the library (`plan="auto"`).

    Args:
        measure: by timings of this machine; False: by estimates from the counts.
        rows: rows of x per step; None: those of each layer's first training step.
    """

    def __init__(self, *, measure: bool = True, rows: int | None = None) -> None:
        self._measure, self._rows = measure, rows
        self._traffic: dict[str, Traffic] = {}
        self._chosen: set[str] = set()  # layers whose present plan was chosen here, and is only given up for a clearly better one
        self._tables: Tables = {}  # the timings that decisions rested on
        self._watches: dict[str, tuple[_Watch, RemovableHandle]] = {}

    def watch(self, targets: Sequence[BlockTarget]) -> list[RemovableHandle]:
        """Look, in the next training steps, what reaches the layers; returns the hooks' handles."""
        unknown = [target for target in _choosers(targets) if target.name not in self._traffic]
        for target in unknown:
            watch = _Watch()
            handle = target.module.register_forward_pre_hook(watch, with_kwargs=True)
            self._watches[target.name] = (watch, handle)
        return [handle for _, handle in self._watches.values()]

    def forget_choices(self) -> None:
        """The layers have been replaced: their plans are the constructors' choice now."""
        self._chosen.clear()

    def decide(self, targets: Sequence[BlockTarget]) -> None:
        """Choose every layer's plan for its present density, and let it compute so from now on.

        In distributed training rank 0 decides for all, since timings differ and plans must not.
        """
        layers = _choosers(targets)
        self._note_traffic()
        if not layers:
            return
        shared = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        plans = [self._best(layer) for layer in layers] if not shared or distributed.get_rank() == 0 else []
        if shared:
            box = [plans]
            distributed.broadcast_object_list(box, src=0)
            plans = box[0]
        for layer, plan in zip(layers, plans, strict=True):
            if plan != layer.plan:
                layer.set_plan_(plan)

    def _note_traffic(self) -> None:
        for name, (watch, handle) in list(self._watches.items()):
            if watch.seen is not None:
                rows, input_grad, dtype = watch.seen
                self._traffic.setdefault(name, Traffic(int(rows), bool(input_grad), str(dtype).removeprefix("torch.")))
                if not watch.compiled:  # a hook less would be another model, compiled anew
                    handle.remove()
                del self._watches[name]

    def _best(self, layer: LayerTarget) -> str:
        traffic = self._traffic.get(layer.name)
        if traffic is None and self._rows is None:
            return layer.plan  # nobody knows yet what it has to do
        rows, input_grad, dtype = traffic or (None, True, None)
        problem = layer.problem(self._rows or rows, input_grad, dtype)
        running = candidates(problem)
        measure = self._measure and measuring_allowed() and len(running) > 1
        seconds = plan_seconds(problem, measure=True, record=self._tables) if measure else {}
        if not seconds:
            estimated = plan_seconds(problem, measure=False)
            seconds = {plan: estimated[plan] for plan in running}
        best = min(seconds, key=seconds.__getitem__)
        if layer.name in self._chosen and seconds.get(layer.plan, float("inf")) < MARGIN * seconds[best]:
            return layer.plan
        self._chosen.add(layer.name)
        return best

    def state_dict(self) -> dict[str, Any]:
        """What later decisions rest on: plain values."""
        return {
            "traffic": {name: list(traffic) for name, traffic in self._traffic.items()},
            "chosen": sorted(self._chosen),
            "tables": {key: dict(table) for key, table in self._tables.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if this process had made the saved decisions: the same timings serve the same questions.

        Raises:
            KronblocksError: it is no state of a planner. Nothing has been changed then.
        """
        self._traffic, self._chosen, self._tables = parsed(state)
        load_tables(self._tables)


def parsed(state: Mapping[str, Any]) -> tuple[dict[str, Traffic], set[str], Tables]:
    """What `Planner.state_dict` gave: traffic by layer, the layers with chosen plans, and timings.

    Raises:
        KronblocksError: it is something else.
    """
    try:
        traffic = {str(name): _traffic(*values) for name, values in state["traffic"].items()}
        chosen = {str(name) for name in state["chosen"]}
        tables = {str(key): dict(table) for key, table in state["tables"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise KronblocksError(f"the state's part on plans is damaged ({error!r}): save sparsifier.state_dict() again") from error
    return traffic, chosen, tables


def _traffic(rows: int, input_grad: bool, dtype: str) -> Traffic:
    """One layer's, checked.

    Raises:
        ValueError: it is something else.
    """
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (known and type(rows) is int and 0 <= rows < 2**63 and isinstance(input_grad, bool)):
        raise ValueError(f"{rows!r} rows, {input_grad!r}, {dtype!r}")
    return Traffic(rows, input_grad, dtype)


def _choosers(targets: Sequence[BlockTarget]) -> list[LayerTarget]:
    return [target for target in targets if isinstance(target, LayerTarget) and target.plan_is_free]
