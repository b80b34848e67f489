"""Which rate a sparse layer wants, relative to the dense layer's: equations 23 to 26 in docs/math.md."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from kronblocks.algorithms.moments import with_inner
from kronblocks.core.blocks import BlockGrid
from kronblocks.core.shards import rows_here, summed

Kind = Literal["adam", "sgd", "plain"]
"""How steps depend on gradients. "adam": on their signs, more or less. "sgd": linearly. "plain": nothing is scaled."""
Rates = Literal["auto", "adam", "sgd", "plain"]
"""What a group of an optimiser may ask for. "auto": `kind_of` the optimiser."""

_OWN_SCALE = frozenset(
    {
        *("lamb", "lars", "adafactor", "fromage", "nero", "madam"),  # steps in proportion to the parameter's norm
        *("muon", "shampoo", "spectral", "scion", "psgd", "kron"),  # steps of a fixed size as a matrix
        *("prodigy", "dadaptadam", "dadaptsgd", "dadaptlion", "dadaptadagrad", "dadaptadan", "rprop"),  # find their rate
    }
)
_SECOND_MOMENTS = ("betas", "beta2", "beta", "alpha", "rho", "eps")
"""Hyperparameters of optimisers that divide steps by the size of gradients."""
_SIGNS = ("ada", "rms", "lion", "sign", "soap", "adam")


def kind_of(optimizer: Optimizer) -> Kind:
    """How an optimiser's steps depend on gradients: by the names of its classes, or else by its hyperparameters.

    A name counts without words for how it is computed, such as Fused or 8bit. Of wrappers the inner optimiser counts.

    >>> import torch
    >>> from torch import nn
    >>> [kind_of(make([nn.Parameter(torch.zeros(1))])) for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor)]
    ['adam', 'sgd', 'plain']
    """
    optimizer = with_inner([optimizer])[-1]
    names = [_bare(each.__name__) for each in type(optimizer).__mro__ if each not in (Optimizer, object)]
    if any(name in _OWN_SCALE for name in names):
        return "adam" if optimizer.defaults.get("scale_parameter") is False else "plain"
    if any("sgd" in name and "sign" not in name for name in names):
        return "sgd"
    if any(word in name for name in names for word in _SIGNS) or any(key in optimizer.defaults for key in _SECOND_MOMENTS):
        return "adam"
    return "sgd"


def _bare(name: str) -> str:
    return re.sub(r"^(paged|fused|pytorch|distributed|deepspeed|cpu|single_?device)+|(_?\d+bit|_?fp8|_)$", "", name.lower())


@dataclass(frozen=True)
class Scales:
    """What a layer's rates follow from, as it was when its number of live blocks changed last.

    Args:
        live: live blocks.
        coeff: root mean square of the coefficients of live blocks, gates included; 0 where there are no factors.
        tiles: root mean square of the tiles' entries, gates apart; 0 where there are no factors.
    """

    live: int
    coeff: float = 0.0
    tiles: float = 0.0

    @classmethod
    def of(cls, layer: nn.Module, grid: BlockGrid, live: int) -> Scales:
        """Those of a layer with so many live blocks. Where factors are all zero, those that a new layer would have."""
        coeff, tiles = (layer._parameters.get(name) for name in ("coeff", "tiles"))
        if coeff is None or tiles is None or not live or coeff.is_meta:
            return cls(live)
        rank, area = coeff.shape[-1], grid.block.area
        gate = layer._parameters.get("gate")
        gated = rows_here(coeff).local.detach().double()
        if gate is not None:
            gated = gated * rows_here(gate).local.detach().double().unsqueeze(-1)
        squares = float(summed(gated.square().sum(), coeff)) / (live * rank)
        entries = float(summed(rows_here(tiles).local.detach().double().square().sum(), tiles)) / tiles.numel()
        return cls(live, math.sqrt(squares) or math.sqrt(area / rank / 3 / grid.in_features), math.sqrt(entries) or area**-0.5)

    def factor(self, name: str, kind: Kind, grid: BlockGrid, rank: int = 1, banks: int = 1) -> float:
        """The rate of a parameter, relative to the dense layer's.

        Args:
            name: the parameter's name in the layer: "weight", "values", "coeff", "gate" or "tiles".
            kind: of the optimiser.
            grid: the layer's.
            rank: its number of Kronecker terms.
            banks: its number of tile banks.
        """
        if kind == "plain" or not self.live:
            return 1.0
        density, for_a_bank = self.live / grid.blocks, max(self.live / banks, 1.0)
        match name:
            case "weight" | "values":
                return 1 / density
            case "coeff" | "gate" if kind == "adam":
                return 1 / (density * self.tiles * math.sqrt(rank))
            case "coeff" | "gate":
                return 1 / (density * grid.block.area * self.tiles**2)
            case "tiles" if kind == "adam":
                agreement = 1 + 2 / math.pi * (rank - 1) / for_a_bank
                return 1 / (density * self.coeff * math.sqrt(rank * agreement))
            case "tiles":
                return 1 / (density * (for_a_bank + rank - 1) * self.coeff**2)
            case _:  # of a layer that the library does not know
                return 1.0
