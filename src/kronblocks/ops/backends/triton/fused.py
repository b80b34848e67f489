"""Products with factors. The factored plans are fused: their intermediate never reaches the device's memory.

"coeff_first" mixes input blocks and then applies tiles, "tile_first" the other way round. A backward has two forms as well, one
along each plan, and takes the one with fewer multiply-adds: both are the exact gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.triton import tuning
from kronblocks.ops.backends.triton.launch import arithmetic, cells, launch, padded, sum_dtype
from kronblocks.ops.backends.triton.tuning import Sizes
from kronblocks.ops.backends.triton.weights import weight, weight_backward
from kronblocks.ops.precision import float32_products

Result = TypeVar("Result")

LARGEST_TILE = 128  # side of a tile that fits on chip
_ENOUGH = 256  # programs that keep a GPU busy; sums over rows are split into about as many


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: str) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    if plan == "dense":
        return linear(x, weight(coeff, tiles, live), bias)
    if max(tiles.shape[2:]) > LARGEST_TILE:
        return plain.kron_linear(x, coeff, tiles, bias, live, plan)
    factors, bias = _Factors.of(coeff, tiles, live), None if bias is None else bias.contiguous()
    return factors.mix_then_tile(x, bias) if plan == "coeff_first" else factors.tile_then_mix(x, bias)


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: str, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles; nothing is kept from the forward."""
    if plan == "dense":
        dx = dy @ weight(coeff, tiles, live) if input_grad else None
        return dx, *weight_backward(dy.t() @ x, coeff, tiles, live)
    if max(tiles.shape[2:]) > LARGEST_TILE:
        return plain.kron_backward(dy, x, coeff, tiles, live, plan, input_grad)
    forward = _Factors.of(coeff, tiles, live)
    adjoint = forward.adjoint()
    if _backward_macs(forward, input_grad) < _backward_macs(adjoint, input_grad):
        dx = adjoint.tile_then_mix(dy, None) if input_grad else None
        dtiles = forward.tiles_gradient(x, dy)
        dcoeff = adjoint.coeff_gradient(dy, x)
    else:
        dx, dtiles = adjoint.mix_then_tile_with_gradient(dy, x, input_grad)
        dcoeff = forward.coeff_gradient(x, dy)
    dcoeff = dcoeff if live is None else dcoeff.where(live, 0)
    return dx, dcoeff.permute(1, 2, 0).to(coeff.dtype), dtiles.to(tiles.dtype)


def _backward_macs(roles: _Factors, input_grad: bool) -> int:
    """Multiply-adds a row of the backward that mixes the sources of these roles to get the tiles' gradient."""
    mixtures = roles.outputs * (roles.banks if not roles.bank_of_output else 1)  # of a term
    mixing, tiling = roles.outputs * roles.sources * roles.tile_in, mixtures * roles.tile_in * roles.tile_out
    return (2 + (input_grad and roles.bank_of_output)) * mixing + (2 + input_grad) * tiling


def _split(rows: int, step: int, programs: int) -> tuple[int, int]:
    """Into how many parts a sum over rows is split where there are so many programs without that, and rows of a part."""
    splits = max(1, min(cells(rows, step), cells(_ENOUGH, programs)))
    share = max(1, cells(cells(rows, step), splits)) * step
    return cells(rows, share), share


@dataclass(frozen=True)
class _Factors:
    """Coefficients and tiles in their roles: forward, or adjoint, where inputs are outputs and tiles are transposed."""

    planes: Tensor  # coefficients, (r, m1, n1)
    tiles: Tensor  # (g, r, bm, bn)
    live: Tensor | None  # (m1, n1), uint8
    outputs: int  # blocks
    sources: int
    tile_out: int  # sides of a tile
    tile_in: int
    bank_of_output: bool  # which side of the grid the groups of tiles divide

    @classmethod
    def of(cls, coeff: Tensor, tiles: Tensor, live: Tensor | None) -> _Factors:
        (m1, n1, _), (bm, bn) = coeff.shape, tiles.shape[2:]
        planes = coeff.permute(2, 0, 1)
        planes = (planes if live is None else planes.where(live, 0)).contiguous()
        mask = None if live is None else live.contiguous().view(torch.uint8)
        return cls(planes, tiles.contiguous(), mask, m1, n1, bm, bn, bank_of_output=True)

    def adjoint(self) -> _Factors:
        """The roles in which x W^T is dy W."""
        return replace(
            self, outputs=self.sources, sources=self.outputs, tile_out=self.tile_in, tile_in=self.tile_out, bank_of_output=False
        )

    @property
    def banks(self) -> int:
        return self.tiles.shape[0]

    @property
    def rank(self) -> int:
        return self.planes.shape[0]

    @property
    def _outputs_per_bank(self) -> int:
        return self.outputs // self.banks if self.bank_of_output else self.outputs

    @property
    def _sources_per_bank(self) -> int:
        return self.sources if self.bank_of_output else self.sources // self.banks

    @property
    def _own_banks(self) -> int:
        """Banks that one program goes through."""
        return 1 if self.bank_of_output else self.banks

    def _strides(self) -> tuple[int, int]:
        """Of output and input blocks in a grid."""
        n1 = self.planes.shape[2]
        return (n1, 1) if self.bank_of_output else (1, n1)

    def _chunks_per_bank(self, sizes: Sizes) -> int:
        return cells(self._outputs_per_bank, sizes.outputs)

    def _chunks(self, sizes: Sizes) -> int:
        return self._chunks_per_bank(sizes) * (self.banks if self.bank_of_output else 1)

    def _run(self, kernel: str, x: Tensor, default: Sizes, run: Callable[[Sizes], Result], *, any_terms: bool = False) -> Result:
        """Launch with the sizes that suit, or are known to be quickest; whether they may take any number of terms."""
        if not tuning.wanted(self.planes.device):
            return tuning.within_resources(kernel, default, run)
        about = {
            **{"rank": self.rank, "groups": self.banks, "grid": list(self.planes.shape[1:]), "tile": list(self.tiles.shape[2:])},
            **{"adjoint": not self.bank_of_output, "live": self.live is not None, "dtype": str(self.tiles.dtype)},
            "precision": float32_products(),
        }
        others = self._others(default, self.rank if any_terms else 1)
        return tuning.tuned(kernel, about, x, default, others, run)

    def _is_half(self) -> bool:
        return self.tiles.element_size() == 2

    def _mixing(self, rows: int, *, gradient: bool) -> Sizes:
        """What a program of mix_then_tile takes.

        Its mixtures, terms times outputs by rows of tiles, are as tall as the products of its warps, 16 each: lower ones would be
        computed twice, since a product with tiles follows. Halves take all input blocks at once if that fits on chip: then their
        coefficients are loaded once for all rows.
        """
        terms = self._terms(4, self._tiles_sums(narrow=True) if gradient else 1)
        height = 64 if not self._is_half() else 256 if terms == 4 else 128
        least = max(self._side(), self._spread(terms) if gradient else 1)
        wide = 2**14 // height if self._is_half() and not gradient else 64
        outputs = max(16, min(height // terms, padded(self._outputs_per_bank)))
        sizes = Sizes(outputs, max(least, wide // padded(self.tile_in)), 32, 4, 3 if self._is_half() else 2, terms)
        sizes = sizes if gradient else self._enough(sizes, rows, least)
        sources = padded(self._sources_per_bank, 16)
        fits = sources * max(terms * sizes.outputs, sizes.rows * padded(self.tile_in)) <= 2**14
        sources = sources if self._is_half() and self._own_banks == 1 and fits else min(32, sources)
        return replace(sizes, sources=sources, warps=8 if terms * sizes.outputs >= 128 else 4)

    def _tiling(self, rows: int) -> Sizes:
        """What a program of tile_then_mix takes: sums of 64 outputs by rows of tiles, and about as many tiled inputs."""
        width, wide = padded(self.tile_out), 256 if self._is_half() else 64
        outputs = max(16, min(64, padded(self._outputs_per_bank)))
        sizes = Sizes(outputs, max(self._side(), wide // width), 32, 4, 3 if self._is_half() else 2)
        sizes = self._enough(sizes, rows, self._side())
        sources = (2**13 if self._is_half() else 2**12) // (width * sizes.rows)
        return replace(sizes, sources=max(16, min(64, sources, padded(self._sources_per_bank))))

    def _enough(self, sizes: Sizes, rows: int, least: int) -> Sizes:
        """The same, or less at a time where that leaves too few programs."""
        while self._chunks(sizes) * cells(rows, sizes.rows) < _ENOUGH // 2:
            if sizes.rows > least:
                sizes = replace(sizes, rows=sizes.rows // 2)
            elif sizes.outputs > 16:
                sizes = replace(sizes, outputs=sizes.outputs // 2)
            else:
                break
        return sizes

    def _pairing(self) -> Sizes:
        """What a program of mix_gradient takes: sums of 64 outputs by terms of inputs, tiled inputs of as many numbers."""
        wide = 128 if self._is_half() else 64
        terms = self._terms(2, 1)
        rows = max(self._side(), 64 // padded(self.tile_out))
        sources = wide * 64 // (terms * rows * padded(self.tile_out))
        sources = max(16, min(sources, wide // terms, padded(self._sources_per_bank)))
        outputs = max(16, min(64, padded(self._outputs_per_bank)))
        return Sizes(outputs, rows, sources, warps=4, stages=3 if self._is_half() else 2, terms=terms)

    def _others(self, sizes: Sizes, most_terms: int) -> Iterator[Sizes]:
        """What else to try: half or twice as much of one thing, or other warps and loads ahead."""
        bounds = {
            "outputs": (16, padded(self._outputs_per_bank, 16)),
            "rows": (self._side(), 128),
            "sources": (16, padded(self._sources_per_bank, 16)),
            "terms": (1, padded(most_terms)),
        }
        for name, (least, most) in bounds.items():
            for size in (getattr(sizes, name) // 2, getattr(sizes, name) * 2):
                if least <= size <= most:
                    yield replace(sizes, **{name: size})
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if (warps, stages) != (sizes.warps, sizes.stages):
                yield replace(sizes, warps=warps, stages=stages)

    def _side(self) -> int:
        """How many rows stand side by side, so that products on tensor cores sum over 16 terms."""
        return max(1, 16 // min(padded(self.tile_in), padded(self.tile_out)))

    def _room(self) -> int:
        """How many values of one kind a program keeps on chip: float32 is multiplied in two parts, which take more."""
        return 2**14 if self._is_half() else 2**13

    def _terms(self, most: int, sums: int) -> int:
        """Of how many terms a program takes the tiles at a time, keeping so many sums of each."""
        tile = padded(self.tile_out) * padded(self.tile_in) * self._side() ** 2
        return max(1, min(padded(self.rank), most, self._room() // max(tile, sums)))

    def _tiles_sums(self, *, narrow: bool) -> int:
        """Sums of one term, with as many rows side by side as tensor cores want, or as they need at least."""
        side = self._least_spread(16 if narrow else 64)
        return padded(self.tile_out) * padded(self.tile_in) * side**2

    def _least_spread(self, height: int) -> int:
        return max(1, height // padded(self.tile_out), 16 // padded(self.tile_in))

    def _spread(self, terms: int) -> int:
        """How many rows stand side by side where small tiles' gradients are summed."""
        return self._least_spread(64 if terms * self._tiles_sums(narrow=False) <= self._room() else 16)

    def _listed(self, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
        """The input blocks that each chunk of output blocks is alive with, and how many."""
        if self.live is None:
            return None, None
        places = self._chunks(sizes), self._own_banks
        sources = self.live.new_empty(*places, self._sources_per_bank, dtype=torch.int32)
        counts = self.live.new_empty(places, dtype=torch.int32)
        launch(
            "list_live", places, self.live, sources, counts, *self._strides(),
            self._outputs_per_bank, self._chunks_per_bank(sizes), self._sources_per_bank,
            BANK_OF_OUTPUT=self.bank_of_output, BO=sizes.outputs, BK=64, num_warps=4,
        )  # fmt: skip
        return sources, counts

    def _known(self, sizes: Sizes) -> dict[str, Any]:
        """What is known when compiling."""
        names = {"RANK": self.rank, "BANKS": self._own_banks, "C": self.tile_out, "D": self.tile_in}
        names |= {"BC": padded(self.tile_out), "BD": padded(self.tile_in), "SIDE": self._side()}
        names |= {"FLIPPED": not self.bank_of_output, "LISTED": self.live is not None, "BANK_OF_OUTPUT": self.bank_of_output}
        return {**names, **sizes.settings(), **arithmetic(self.tiles.dtype)}

    def _places(self, sizes: Sizes) -> tuple[int, ...]:
        """Strides of terms, output and input blocks among the coefficients, and how chunks and banks are made."""
        grid = self.planes.shape[1] * self.planes.shape[2]
        return grid, *self._strides(), self._outputs_per_bank, self._chunks_per_bank(sizes), self._sources_per_bank

    def mix_then_tile(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y (rows, outputs) of x (rows, inputs)."""

        def run(sizes: Sizes) -> Tensor:
            y = x.new_empty(x.shape[0], self.outputs * self.tile_out)
            self._mix(x, bias, None, y, None, sizes, share=self._rows_of_a_program(x.shape[0], sizes))
            return y

        return self._run("mix_then_tile", x, self._mixing(x.shape[0], gradient=False), run, any_terms=True)

    def mix_then_tile_with_gradient(self, x: Tensor, other: Tensor, product: bool) -> tuple[Tensor | None, Tensor]:
        """y if wanted, and the tiles' gradient, if x is the gradient of their output and `other` their input, or the other way
        round. In one launch where a program keeps all terms.
        """
        sizes = self._mixing(x.shape[0], gradient=True)
        if not product or self._parts(sizes) > 1:
            return self.mix_then_tile(x, None) if product else None, self.tiles_gradient(x, other)
        y = x.new_empty(x.shape[0], self.outputs * self.tile_out)
        return y, self._run("mix_then_tile, both", x, sizes, lambda sizes: self._tiles_gradient(x, other, y, sizes))

    def tiles_gradient(self, x: Tensor, other: Tensor) -> Tensor:
        """That gradient alone, in float32."""
        sizes = self._mixing(x.shape[0], gradient=True)
        return self._run(
            "mix_then_tile, gradient", x, sizes, lambda sizes: self._tiles_gradient(x, other, None, sizes), any_terms=True
        )

    def _parts(self, sizes: Sizes) -> int:
        """Parts of a sum over banks and terms."""
        return self._own_banks * cells(self.rank, sizes.terms)

    def _keeps_factors(self, sizes: Sizes, parts: int) -> bool:
        """Whether a program that sums so many parts loads its coefficients and tiles once."""
        return parts == 1 and sizes.sources >= self._sources_per_bank

    def _rows_of_a_program(self, rows: int, sizes: Sizes) -> int:
        """Of a product."""
        return _split(rows, sizes.rows, self._chunks(sizes))[1] if self._keeps_factors(sizes, self._parts(sizes)) else sizes.rows

    def _tiles_gradient(self, x: Tensor, other: Tensor, y: Tensor | None, sizes: Sizes) -> Tensor:
        rows, chunks, per_bank = x.shape[0], self._chunks(sizes), self._chunks_per_bank(sizes)
        splits, share = _split(rows, sizes.rows, chunks * self._parts(sizes))
        spread, height, width = min(self._spread(sizes.terms), sizes.rows), padded(self.tile_out), padded(self.tile_in)
        shape = splits, chunks // per_bank, per_bank, self._own_banks, self.rank, spread, height, spread, width
        dtiles = x.new_empty(shape, dtype=sum_dtype(x))
        self._mix(x, None, other.contiguous(), y, dtiles, sizes, share)
        sums = dtiles.sum((0, 2)).flatten(0, 1).diagonal(0, 2, 4).sum(-1)[..., : self.tile_out, : self.tile_in]
        return sums if self.bank_of_output else sums.transpose(2, 3)

    def _mix(
        self,
        x: Tensor,
        bias: Tensor | None,
        other: Tensor | None,
        y: Tensor | None,
        dtiles: Tensor | None,
        sizes: Sizes,
        share: int,
    ) -> None:
        x, rows, chunks, features = x.contiguous(), x.shape[0], self._chunks(sizes), self.outputs * self.tile_out
        parts = self._parts(sizes)
        programs, parts = (1, parts) if dtiles is None else (parts, 1)
        launch(
            "mix_then_tile", (chunks * cells(rows, share), programs),
            x, self.planes, self.tiles, bias, other, y, dtiles, *self._listed(sizes), rows, share,
            x.shape[1], features, features, *self._places(sizes), chunks,
            HAS_BIAS=bias is not None, PRODUCT=y is not None, GRADIENT=dtiles is not None,
            PARTS=parts, WHOLE=self._keeps_factors(sizes, parts), SPREAD=min(self._spread(sizes.terms), sizes.rows),
            TERMS=sizes.terms, **self._known(sizes),
        )  # fmt: skip

    def tile_then_mix(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y (rows, outputs) of x (rows, inputs)."""
        x, rows = x.contiguous(), x.shape[0]

        def run(sizes: Sizes) -> Tensor:
            y, chunks = x.new_empty(rows, self.outputs * self.tile_out), self._chunks(sizes)
            launch(
                "tile_then_mix", (chunks * cells(rows, sizes.rows),),
                x, self.planes, self.tiles, bias, y, *self._listed(sizes), rows, x.shape[1], y.shape[1],
                *self._places(sizes), chunks, HAS_BIAS=bias is not None, **self._known(sizes),
            )  # fmt: skip
            return y

        return self._run("tile_then_mix", x, self._tiling(rows), run)

    def coeff_gradient(self, x: Tensor, other: Tensor) -> Tensor:
        """(r, m1, n1) in float32: <other, tile x> of every output and input block; anything where a block is dead."""
        x, other, rows = x.contiguous(), other.contiguous(), x.shape[0]

        def run(sizes: Sizes) -> Tensor:
            chunks, parts = self._chunks(sizes), self._parts(sizes) * cells(self._sources_per_bank, sizes.sources)
            splits, share = _split(rows, sizes.rows, chunks * parts)
            out = x.new_empty(splits, *self.planes.shape, dtype=sum_dtype(x))
            launch(
                "mix_gradient", (splits, chunks, parts),
                x, self.tiles, other, out, *self._listed(sizes), rows, share, x.shape[1], other.shape[1],
                self.planes.numel(), *self._places(sizes), TERMS=sizes.terms, **self._known(sizes),
            )  # fmt: skip
            return out.sum(0)

        return self._run("mix_gradient", x, self._pairing(), run, any_terms=True)
