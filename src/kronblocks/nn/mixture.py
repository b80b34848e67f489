"""A layer with several candidate block sizes, for a search that removes all but one."""

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
    """y = sum over candidates c of x W_c^T, plus bias. Each W_c is a sum of Kronecker products, with its own block size.

    At the start every candidate has an equal share of the variance. `remove_` removes a candidate for good, and `collapse` makes
    an ordinary layer of the last one.

    Args:
        in_features: n.
        out_features: m.
        candidates: name to block size; each must divide (m, n).
        rank: number of Kronecker terms, for all candidates or by name; at most the area of a block.
        tile_groups: number of tile banks or "per-row", for all candidates or by name.
        bias: add a trained bias.
        variance_of: a dense weight, (m, n), with the variance to start from; None: that of nn.Linear's default.

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
        """The dense weight, (out_features, in_features), built at every use. Writing into it is an error."""
        sources = [parameter for layer in self._layers().values() for parameter in layer.block_parameters()]
        return weight_of(self.dense_weight, sources, (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """Build the dense weight, (out_features, in_features): the sum of the candidates. Differentiable."""
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
        """Remove a candidate for good.

        Returns:
            Its parameters, so that optimisers can forget them.

        Raises:
            KronblocksError: it is the last candidate, or there is none of this name.
        """
        if name not in self.candidates:
            raise KronblocksError(f"no candidate is called {name!r}: there are {', '.join(self.candidates)}")
        if len(self.candidates) == 1:
            raise KronblocksError(f"{name} is the last candidate: collapse() makes a layer of it")
        gone = list(self.candidates[name].parameters())
        del self.candidates[name]
        return gone

    def collapse(self) -> KroneckerBlockLinear:
        """The last candidate as an ordinary layer, with the bias. Parameters stay the same objects.

        Raises:
            KronblocksError: several candidates are left.
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
        """A mixture like a dense layer: with its sizes, device, dtype, variance and bias object. Frozen if that is frozen."""
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
