"""Default sizes for the fused kernels, and other sizes to try.

They follow from the machine code for compute capability 9.0; nothing was measured on a GPU. There four warps compute 64 rows of a
product together. If another product follows in the loop, Triton stacks all warps along the rows, so eight warps would compute 64
rows twice. Hence there are only as many warps as rows allow. float32 is multiplied in two parts, which need more registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from kronblocks.ops.backends.triton.launch import cells, padded
from kronblocks.ops.backends.triton.roles import Roles
from kronblocks.ops.backends.triton.tuning import Sizes

ENOUGH = 256  # programs that keep a GPU busy; sums over rows are split into about as many


def fit_on_chip(tile: Iterable[int]) -> bool:
    """Whether tiles of these sides do, side by side as tensor cores want them; others go through PyTorch's operators."""
    small, large = sorted(map(padded, tile))
    return large <= 128 and large * max(1, 16 // small) <= 512


def side(roles: Roles) -> int:
    """How many rows stand side by side, so that products with tiles sum over 16 terms, the least that tensor cores take."""
    return max(1, 16 // _smaller(roles))


def spread(roles: Roles, sizes: Sizes) -> int:
    """The same where the gradient of tiles is summed, of as many rows as there are."""
    return min(_wanted_spread(roles, sizes.terms), sizes.rows)


def _wanted_spread(roles: Roles, terms: int) -> int:
    """For sums that are 64 high, or 16 where a program would keep too many then."""
    return _spread(roles, 64 if terms * _tile_sums(roles, 64) <= room(roles.is_half) else 16)


def _spread(roles: Roles, height: int) -> int:
    """Rows side by side that make sums so high, of tiles that are no wider."""
    return max(1, 16 // _smaller(roles), height // _larger(roles))


def _smaller(roles: Roles) -> int:
    return min(padded(roles.tile_in), padded(roles.tile_out))


def _larger(roles: Roles) -> int:
    return max(padded(roles.tile_in), padded(roles.tile_out))


def _tile(roles: Roles) -> int:
    return padded(roles.tile_out) * padded(roles.tile_in)


def _tile_sums(roles: Roles, height: int) -> int:
    """Sums of the gradient of one tile."""
    return _tile(roles) * _spread(roles, height) ** 2


def room(half: bool) -> int:
    """How many values of one kind a program keeps on chip."""
    return 2**14 if half else 2**13


def _terms(roles: Roles, most: int, values: int) -> int:
    """Of how many terms a program takes the tiles at a time, if each asks for so many values."""
    stacked = side(roles) * _larger(roles)
    fitting = min(room(roles.is_half) // max(values, _tile(roles) * side(roles) ** 2), room(roles.is_half) // (32 * stacked))
    return max(1, min(padded(roles.rank), most, fitting))


def _stages(roles: Roles) -> int:
    return 3 if roles.is_half else 2


def mixed_terms(roles: Roles, *, gradient: bool) -> int:
    """Terms that a program of mix_then_tile takes at a time."""
    return _terms(roles, 4, _tile_sums(roles, 16) if gradient else 1)


def mixing(roles: Roles, rows: int, *, gradient: bool) -> Sizes:
    """What a program of mix_then_tile takes: mixtures of terms times outputs by rows of tiles, and as many sums of y at most.

    In half precision all input blocks at once if that fits on chip: then their coefficients are loaded once for all rows.
    """
    terms = mixed_terms(roles, gradient=gradient)
    height = 64 if not roles.is_half else 256 if terms == 4 else 128
    width = 2**14 // height if roles.is_half and not gradient else 64
    outputs = max(16, min(height // terms, padded(roles.outputs_per_bank)))
    wider = max(padded(roles.tile_in), padded(roles.tile_out) // terms)
    sizes = Sizes(outputs, max(side(roles), width // wider), 32, 4, _stages(roles), terms)
    spread_out = replace(sizes, rows=max(sizes.rows, _wanted_spread(roles, terms)))
    sizes = spread_out if gradient else _enough(roles, sizes, rows)
    sizes = replace(sizes, outputs=max(16, min(sizes.outputs, height * width // (terms * sizes.rows * wider))))
    sources = padded(roles.sources_per_bank, 16)
    fits = sources * max(terms * sizes.outputs, sizes.rows * padded(roles.tile_in)) <= 2**14
    sources = sources if roles.is_half and roles.own_banks == 1 and fits else min(32, sources)
    many = terms * sizes.outputs >= 128 or (gradient and terms * _tile_sums(roles, 16) > room(roles.is_half))
    return replace(sizes, sources=sources, warps=8 if many else 4)


def tiling(roles: Roles, rows: int) -> Sizes:
    """What a program of tile_then_mix takes: sums of 64 outputs by rows of tiles, and about as many tiled inputs."""
    width, wide = _larger(roles), 256 if roles.is_half else 64
    taken = max(side(roles), wide // width)
    outputs = max(16, min(64, wide * 64 // (taken * width), padded(roles.outputs_per_bank)))
    sizes = _enough(roles, Sizes(outputs, taken, 32, 4, _stages(roles)), rows)
    sources = room(roles.is_half) // 2 // (width * sizes.rows)
    return replace(sizes, sources=max(16, min(64, sources, padded(roles.sources_per_bank))))


def _enough(roles: Roles, sizes: Sizes, rows: int) -> Sizes:
    """The same, or less at a time where that leaves too few programs."""
    while roles.chunks(sizes) * cells(rows, sizes.rows) < ENOUGH // 2:
        if sizes.rows > side(roles):
            sizes = replace(sizes, rows=sizes.rows // 2)
        elif sizes.outputs > 16:
            sizes = replace(sizes, outputs=sizes.outputs // 2)
        else:
            break
    return sizes


def pairing(roles: Roles) -> Sizes:
    """What a program of mix_gradient takes: sums of 64 outputs by terms of inputs, and about as many tiled inputs."""
    width, wide, terms = _larger(roles), room(roles.is_half) // 128, _terms(roles, 2, 1)
    rows = max(side(roles), 64 // width)
    sources = max(16, min(min(wide, wide * 64 // (rows * width)) // terms, padded(roles.sources_per_bank)))
    outputs = max(16, min(64, padded(roles.outputs_per_bank)))
    return Sizes(outputs, rows, sources, warps=4, stages=_stages(roles), terms=terms)


def others(roles: Roles, sizes: Sizes, *, any_terms: bool) -> Iterator[Sizes]:
    """What else to try: half or twice as much of one thing, or other warps and loads ahead."""
    bounds = {
        "outputs": (16, padded(roles.outputs_per_bank, 16)),
        "rows": (side(roles), 128),
        "sources": (16, padded(roles.sources_per_bank, 16)),
        **({"terms": (1, padded(roles.rank))} if any_terms else {}),
    }
    for name, (least, most) in bounds.items():
        for size in (getattr(sizes, name) // 2, getattr(sizes, name) * 2):
            if least <= size <= most:
                yield replace(sizes, **{name: size})
    for warps, stages in itertools.product((4, 8), (2, 3, 4)):
        if (warps, stages) != (sizes.warps, sizes.stages):
            yield replace(sizes, warps=warps, stages=stages)
