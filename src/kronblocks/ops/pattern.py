"""What follows from a mask and the positions of slots, for as long as nobody writes into those two tensors."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronblocks.core.errors import KronblocksError
from kronblocks.ops.index import BlockIndex

_BY_MEMORY: dict[int, weakref.ref[Pattern]] = {}  # by the addresses of what a pattern keeps alive


class Watcher(Protocol):
    """Kernels that look by themselves whether an index is still true, by what stands in memory."""

    def watch(self, index: Tensor, sources: list[tuple[Tensor, Tensor | None]]) -> None:
        """`index` is true as long as each source is equal to the second tensor of its pair; with None it is not now."""
        ...

    def forget(self, index: int) -> None:
        """The index at this address is watched no more; its sources may leave memory."""
        ...


_WATCHERS: list[Watcher] = []


def add_watcher(watcher: Watcher) -> None:
    """Tell it of every pattern that there is and will be."""
    _WATCHERS.append(watcher)
    for pattern in {ref() for ref in _BY_MEMORY.values()}:
        if pattern is not None:
            pattern._register()


class Pattern:
    """Which blocks of a layer live and in which slots, and what follows from that.

    It holds the two tensors that it was made from and their version numbers, which grow with every write in place. So it is
    known at any time, at the price of comparing two numbers, whether the rest is still true. Compiled code cannot look at
    versions: there the operators find the pattern by the memory of the index that they get, and look (`up_to_date`).

    Attributes:
        mask: (m1, n1) bool, as it was followed last.
        position: (capacity,) int64, or None where every block has its place.
        index: of the live blocks, where asked for.
        slots: the positions as they were valid last: a copy, or None.
        all_live: whether no block is dead.
        in_order: whether no block is dead and slots have the order of the blocks, so that the values are all of the weight.
        keeps_size: whether an index without positions stays as long as it is when blocks die.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.position: Tensor | None = None
        self.index: BlockIndex | None = None
        self.slots: Tensor | None = None
        self.all_live = self.in_order = self.keeps_size = False
        self._mask_then: Tensor | None = None
        self._versions: tuple[int, int] | None = None
        self._addresses: list[int] = []
        self._ref: weakref.ref[Pattern] | None = None
        self._size = 0  # of the index made last

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose tensors count versions of their own."""
        return {**self.__dict__, "_versions": None, "_addresses": [], "_ref": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def is_of(self, mask: Tensor, position: Tensor | None) -> bool:
        """Whether these tensors are the ones that it follows, unchanged."""
        return self.mask is mask and self.position is position and self.is_fresh()

    def is_fresh(self) -> bool:
        """Whether nothing has been written into the two tensors since."""
        seen, mask, position = self._versions, self.mask, self.position
        return seen is not None and mask is not None and seen == (mask._version, 0 if position is None else position._version)

    def moved_(self, fn: Any, mask: Tensor, position: Tensor | None) -> None:
        """The tensors went through `fn`, as a module's do, which may not have kept what they hold."""
        _watched = self.mask, self.position, self._mask_then, self.slots  # in memory until others are watched
        self.mask, self.position, self._mask_then, self._versions = mask, position, None, None
        if self.index is not None:
            self.index = BlockIndex(*map(fn, self.index))
        if self.slots is not None:
            self.slots = fn(self.slots)
        self._register()

    @torch.no_grad()
    @torch.inference_mode(False)  # what is made here must serve in training too
    def follow_(self, mask: Tensor, position: Tensor | None = None, values: Tensor | None = None, *, index: bool) -> None:
        """Make everything agree with the two tensors.

        Args:
            mask: (m1, n1) bool, True = live.
            position: (capacity,) row-major block number of each slot.
            values: (capacity, bm, bn), where the positions may have been damaged by an average; None: they are meant as they are.
            index: whether an index is needed.

        Raises:
            KronblocksError: the positions do not give a slot to every live block.
        """
        made, _watched = self.index, (self._mask_then, self.slots)  # in memory until others are watched
        if not self._says(mask, position):
            if position is not None:
                self._settle_(mask, position, values)
            made, self.all_live = None, not mask.is_meta and bool(mask.all())
            self.in_order = self.all_live and (position is None or bool((position.diff() > 0).all()))
            self._mask_then = mask.clone()
        self.index = self._make_index(mask, position) if index and made is None else made
        self.mask, self.position = mask, position
        counted = not mask.is_inference() and (position is None or not position.is_inference())
        self._versions = (mask._version, 0 if position is None else position._version) if counted else None
        self._register()

    def refresh_(self, values: Tensor | None = None) -> None:
        """Follow the same tensors again, and write into the index that compiled code holds.

        Raises:
            KronblocksError: more blocks live than the index has room for.
        """
        assert self.mask is not None
        held = self.index
        self.follow_(self.mask, self.position, values, index=held is not None)
        new = self.index
        if held is None or new is None or new is held:
            return
        room = len(held.slot)
        if len(new.slot) > room:
            raise KronblocksError(
                f"block_mask was written into: it has {len(new.slot)} live blocks now, and this compiled code was made for "
                f"{room}. They are known from now on: call the model again, or call layer.refresh_index_() after writing"
            )
        with torch.no_grad():
            for old, tensor in zip(held, new, strict=True):
                old.copy_(pad(tensor, (0, len(old) - len(tensor))))
        self.index = held
        self._register()

    def _make_index(self, mask: Tensor, position: Tensor | None) -> BlockIndex:
        if mask.is_meta:
            return BlockIndex.blank(mask.shape, position)
        if position is None and self.keeps_size:
            live = mask.flatten()
            size = max(self._size, int(live.sum()))
            position = live.byte().argsort(descending=True, stable=True)[:size]
        made = BlockIndex.from_mask(mask, position)
        self._size = len(made.slot)
        return made

    def _says(self, mask: Tensor, position: Tensor | None) -> bool:
        """Whether what was followed last held the same numbers: writes often change nothing, as broadcasts."""
        then, slots = self._mask_then, self.slots
        if then is None or then.device != mask.device or mask.is_meta or not torch.equal(then, mask):
            return False
        if position is None or slots is None:
            return position is None and slots is None
        return slots.shape == position.shape and torch.equal(slots, position)

    def _settle_(self, mask: Tensor, position: Tensor, values: Tensor | None) -> None:
        """Find out which block each slot holds: what `position` says, or what it said before an average rounded it."""
        known = self.slots
        if mask.is_meta or (_give_a_slot(position, mask) and not _hold_more(values, position, mask)):
            self.slots = position.clone()
        elif known is not None and _rounds_to(known, position) and _give_a_slot(known, mask):
            with torch.inference_mode(position.is_inference()):
                position.copy_(known)
        elif _give_a_slot(position, mask):
            self.slots = position.clone()
        else:
            raise KronblocksError(
                "block_position does not give a slot to every live block of block_mask: layers with different live blocks were "
                'averaged, or one of the two was overwritten. Begin the average when `phase` is "heal", or average with '
                "use_buffers=False"
            )

    def _register(self) -> None:
        _drop(self._ref, self._addresses)
        kept = [self.mask, self.slots, None if self.index is None else self.index.crow]
        addresses = [t.data_ptr() for t in kept if t is not None and type(t) is Tensor and not t.is_meta and t.numel()]
        self._addresses, self._ref = addresses, weakref.ref(self, partial(_drop, addresses=addresses))
        _BY_MEMORY.update(dict.fromkeys(addresses, self._ref))
        if self.index is not None and self.mask is not None and self.index.crow.data_ptr() in addresses:
            sources = [(self.mask, self._mask_then)]
            if self.position is not None:
                sources.append((self.position, self.slots))
            for watcher in _WATCHERS:
                watcher.watch(self.index.crow, sources)


def _drop(ref: weakref.ref[Pattern] | None, addresses: list[int]) -> None:
    for address in addresses:
        if _BY_MEMORY.get(address) is ref:
            del _BY_MEMORY[address]
            for watcher in _WATCHERS:
                watcher.forget(address)


def _by_memory(tensor: Tensor) -> Pattern | None:
    found = _BY_MEMORY.get(tensor.data_ptr())
    return found and found()


def _give_a_slot(position: Tensor, mask: Tensor) -> bool:
    """Whether the positions are different blocks of the grid, every live one among them."""
    inside = bool(((position >= 0) & (position < mask.numel())).all())
    if not inside or len(position.unique()) < len(position):
        return False
    return not bool(mask.flatten().index_fill(0, position, False).any())


def _hold_more(values: Tensor | None, position: Tensor, mask: Tensor) -> bool:
    """Whether a slot of a dead block holds something other than zeros, as no layer leaves it: then positions are suspect."""
    return values is not None and bool(values[~mask.flatten()[position]].any())


def _rounds_to(known: Tensor, position: Tensor) -> bool:
    """Whether averages of `known` with itself can have come to this: each is cut to a whole number, so they only fall.

    One step after another loses 1, and then as much as float32 loses: known * 2^-23 / (1 - decay), 1/64 of it at 0.99999.
    """
    if known.shape != position.shape or known.device != position.device:
        return False
    lost = known - position
    return bool(((lost >= 0) & (lost <= 1 + known // 64)).all())


@torch.library.custom_op("kronblocks::refresh_index", mutates_args=())
def refresh_index(crow: Tensor, values: Tensor | None) -> None:
    """Write an index again, in its place, if a pattern holds it and its mask or positions have changed since.

    Compiled code cannot look, so operators that are told to do it for that. Kernels in C++ call this only after a change.

    Args:
        crow: of the index, which is known by its memory.
        values: as for `Pattern.follow_`.
    """
    pattern = _by_memory(crow)
    if pattern is not None and not pattern.is_fresh():
        pattern.refresh_(values)


def without_dead(mask: Tensor | None) -> bool:
    """Whether all blocks of this mask are known to live, so that nobody has to look at it."""
    if mask is None:
        return True
    pattern = _by_memory(mask)
    return pattern is not None and pattern.mask is not None and pattern.is_fresh() and pattern.all_live


@torch.library.custom_op("kronblocks::current_slots", mutates_args=())
def current_slots(slots: Tensor, values: Tensor) -> Tensor:
    """A pattern's `slots`, true to its positions as they are now; for compiled code."""
    pattern = _by_memory(slots)
    if pattern is None or pattern.is_fresh():
        return slots.clone()
    pattern.refresh_(values)
    assert pattern.slots is not None
    return pattern.slots.clone()


@current_slots.register_fake
def _(slots, values):
    return torch.empty_like(slots)
