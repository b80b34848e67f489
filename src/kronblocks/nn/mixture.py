"""Several candidate block sizes in one layer, for a search that leaves one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor, nn

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import reset_bias_
from kronblocks.nn.built import weight_of
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.loading import WholeWeights


class BlockMixtureLinear(WholeWeights):
    """y = sum over candidates c of x W_c^T, plus bias: each W_c a sum of Kronecker products with blocks of its own size.

    At the start every candidate has an equal share of the variance. `remove_` takes a candidate out for good, `collapse` makes an
    ordinary layer of the last one.

    Args:
        in_features: n.
        out_features: m.
        candidates: name to block size; each must divide (m, n).
        rank: Kronecker terms of every candidate, or of each by name; at most the area of its blocks.
        tile_groups: "per-row", tiles for each block row; or the number of tile banks, of every candidate or of each by name.
        bias: add a trained bias.
        variance_of: a dense weight, (m, n), whose variance is shared out; None: that of nn.Linear's default.

    Source:
        Zhu, Zuo, Khalili, TMLR 2025, section 4.

    >>> layer = BlockMixtureLinear(8, 4, {"2x2": BlockSize(2, 2), "4x4": BlockSize(4, 4)}, rank=2)
    >>> gone = layer.remove_("4x4")
    >>> type(layer.collapse()).__name__
    'KroneckerBlockLinear'
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        candidates: Mapping[str, BlockSize],
        rank: int | Mapping[str, int],
        *,
        tile_groups: int | Literal["per-row"] | Mapping[str, int] = "per-row",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variance_of: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not candidates:
            raise KronblocksError("name at least one candidate block size")
        self.in_features, self.out_features = in_features, out_features
        layers = {}
        for name, block in candidates.items():
            terms = rank if isinstance(rank, int) else rank[name]
            groups = tile_groups[name] if isinstance(tile_groups, Mapping) else tile_groups
            layers[name] = KroneckerBlockLinear(
                in_features,
                out_features,
                block,
                min(terms, block.area),
                tile_groups=out_features // block.rows if groups == "per-row" else groups,
                bias=False,
                device=device,
                dtype=dtype,
            )
        self.candidates = nn.ModuleDict(layers)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        with torch.no_grad():
            for layer in layers.values():
                layer.match_variance_(variance_of)
                layer.coeff.div_(len(layers) ** 0.5)
            reset_bias_(self.bias, in_features)

    def _layers(self) -> dict[str, KroneckerBlockLinear]:
        found = {}
        for name, layer in self.candidates.items():
            assert isinstance(layer, KroneckerBlockLinear)
            found[name] = layer
        return found

    def forward(self, input: Tensor) -> Tensor:
        first, *others = self.candidates.values()
        y = first(input)
        for layer in others:
            y = y + layer(input)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out_features, in_features), built at every use; writing into it is an error."""
        sources = [parameter for layer in self._layers().values() for parameter in layer.block_parameters()]
        return weight_of(self.dense_weight, sources, (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """Build the dense weight, (out_features, in_features), the candidates' sum; differentiable."""
        first, *others = (layer.dense_weight() for layer in self._layers().values())
        return sum(others, first)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Frobenius norm of every candidate's weight."""
        return {name: float(layer.block_norms().norm()) for name, layer in self._layers().items()}

    @torch.no_grad()
    def scale_(self, name: str, factor: float) -> None:
        """Multiply a candidate's weight by a number."""
        self._layers()[name].coeff.mul_(factor)

    def remove_(self, name: str) -> list[nn.Parameter]:
        """Take a candidate out for good.

        Returns:
            Its parameters, for whoever holds state for them (an optimiser).

        Raises:
            KronblocksError: it is the last one, or there is none of this name.
        """
        if name not in self.candidates:
            raise KronblocksError(f"no candidate is called {name!r}: there are {', '.join(self.candidates)}")
        if len(self.candidates) == 1:
            raise KronblocksError(f"{name} is the last candidate: collapse() makes a layer of it")
        gone = list(self.candidates[name].parameters())
        del self.candidates[name]
        return gone

    def collapse(self) -> KroneckerBlockLinear:
        """The last candidate as an ordinary layer, with the bias; parameters keep their objects.

        Raises:
            KronblocksError: there are several left.
        """
        if len(self.candidates) > 1:
            raise KronblocksError(
                f"{len(self.candidates)} candidates are left ({', '.join(self.candidates)}): remove_ all but one"
            )
        (layer,) = self._layers().values()
        layer.bias = self.bias
        return layer

    @classmethod
    def like(
        cls,
        linear: nn.Linear,
        candidates: Mapping[str, BlockSize],
        rank: int | Mapping[str, int],
        *,
        tile_groups: int | Literal["per-row"] | Mapping[str, int] = "per-row",
    ) -> Self:
        """A mixture of the sizes, device, dtype and variance of a dense layer, with its bias object, frozen where that is."""
        weight = linear.weight
        new = cls(
            linear.in_features,
            linear.out_features,
            candidates,
            rank,
            tile_groups=tile_groups,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            variance_of=weight,
        )
        new.bias = linear.bias
        for parameter in new.candidates.parameters():
            parameter.requires_grad_(weight.requires_grad)
        return new.train(linear.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
