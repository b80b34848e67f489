"""`kronblocks bench conv`: convolutions with live blocks and with factors, beside torch's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks_lab.bench.cases.ways import BOTH, DENSE, FORWARD, auto_plan_, factors_layer, random_mask, values_layer
from kronblocks_lab.bench.measure.machine import begin, told
from kronblocks_lab.bench.measure.results import Results, Row
from kronblocks_lab.bench.measure.timing import TIMES, measure
from kronblocks_lab.bench.settings import TimedSettings

COLUMNS = ("shape", "density", "case", "direction", "plan", *TIMES)
KEY = ("shape", "density", "case", "direction")
BLOCKS, FACTORS = "live blocks", "factors"
_RANK = 8  # the default of two-phase, with tiles for each block row
_TOLERANCE = 1e-4  # of the largest output or gradient, in fp32 against float64


class ConvShape(NamedTuple):
    """A convolution of as many channels in as out, on square images, padded so that sizes stay."""

    channels: int
    side: int
    kernel: int
    stride: int = 1

    @classmethod
    def parse(cls, text: str) -> ConvShape:
        """Read "256x14x3", channels x side of an image x side of the kernel, or "256x14x3/2" with a stride."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,4})x(\d{1,3})(?:/(\d{1,2}))?", text)
        shape = cls(*(int(each) for each in found.groups("1"))) if found else None
        if shape is None or 0 in shape:
            raise KronblocksError(
                f"--shapes are written channels x side of the images x side of the kernel, with /stride if it is not 1, such as "
                f"256x14x3 or 256x14x3/2, not {text!r}"
            )
        return shape

    def conv(self) -> nn.Conv2d:
        """Torch's own."""
        return nn.Conv2d(self.channels, self.channels, self.kernel, self.stride, padding=self.kernel // 2)

    def __str__(self) -> str:
        stride = "" if self.stride == 1 else f", stride {self.stride}"
        return f"{self.channels} channels, {self.side}x{self.side}, kernel {self.kernel}x{self.kernel}{stride}"


SHAPES = ("64x56x3", "256x56x1", "256x14x3", "512x7x3", "128x28x3/2", "256x14x3/2")


@dataclass(frozen=True, kw_only=True)
class ConvSettings(TimedSettings):
    """Time convolutions with live blocks and with factors, plan "auto", beside torch's own."""

    shapes: tuple[str, ...] = SHAPES
    """Channels x side of the images x side of the kernel, /stride if it is not 1: 256x14x3 128x28x3/2."""
    block_size: str = "16"
    densities: tuple[float, ...] | None = None
    """Shares of live blocks; unset: 0.1 0.5 1, and 0.1 with --quick."""
    images: int = 8
    """Images a call."""

    kind = "conv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu" or self.dtype != "fp32" or self.compiled:
            raise KronblocksError("bench conv measures on a CPU in fp32: leave --device, --dtype and --compiled out")
        if not self.shapes or self.images < 1:
            raise KronblocksError("--shapes are at least one, and --images a number from 1 on")
        for density in self.shares or (0.0,):
            if not 0 < density <= 1:
                raise KronblocksError(f"--densities are shares of live blocks, above 0 and up to 1, not {density}")
        for shape in self.shapes:
            grid_of(ConvShape.parse(shape), self.block_size)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of live blocks."""
        return self.densities if self.densities is not None else ((0.1,) if self.quick else (0.1, 0.5, 1.0))

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return {**super().shared(), "block_size": self.block_size, "images": self.images}


def grid_of(shape: ConvShape, block_size: str) -> BlockGrid:
    """Of the weight as a linear layer over patches.

    Raises:
        KronblocksError: blocks that do not divide the channels.
    """
    block = BlockSize.parse(block_size)
    if shape.channels % block.rows or shape.channels % block.cols:
        raise KronblocksError(f"blocks of {block} do not divide the channels of {shape}: choose another --block-size")
    return BlockGrid(shape.channels, shape.channels * shape.kernel**2, block)


class _Convolution:
    """One shape at one density: images, and the layers that convolve them."""

    def __init__(self, shape: ConvShape, density: float, settings: ConvSettings) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self._x = torch.randn(settings.images, shape.channels, shape.side, shape.side, generator=generator)
        self._leaf = self._x.clone().requires_grad_()
        self.dense = shape.conv()
        size = self.dense(self._x[:1]).shape[2:]
        self._dy = torch.randn(settings.images, shape.channels, *size, generator=generator)
        self.rows = settings.images * size[0] * size[1]
        grid = grid_of(shape, settings.block_size)
        mask = random_mask(grid, density, generator)
        self.sparse = {BLOCKS: values_layer(grid, mask, "cpu"), FACTORS: factors_layer(grid, mask, _RANK, True, "cpu")}
        self._size = (size[0], size[1])

    def layer(self, case: str, *, training: bool) -> tuple[nn.Module, str | None]:
        """A case, its plan chosen by timings of the whole convolution."""
        if case == DENSE:
            return self.dense, None
        conv, inside = UnfoldedConv(self.shape.conv()), self.sparse[case]
        conv.linear = inside
        assert isinstance(inside, BlockLayer) and inside.convolution is not None
        inside.convolution = inside.convolution._replace(size=self._size)
        return conv, auto_plan_(inside, self.rows, training=training)

    def call(self, layer: nn.Module, direction: str) -> Callable[[], Any]:
        """The function to time."""
        if direction == BOTH:
            inputs = [self._leaf, *layer.parameters()]
            return lambda: torch.autograd.grad(layer(self._leaf), inputs, self._dy)

        def forward() -> Tensor:
            with torch.inference_mode():
                return layer(self._x)

        return forward

    def check(self, name: str, layer: nn.Module) -> None:
        """Output and the images' gradient, beside torch's convolution in float64.

        Raises:
            KronblocksError: they are wrong.
        """
        exact: Any = layer.folded() if isinstance(layer, UnfoldedConv) else layer
        images = self._x.double().requires_grad_()
        weight, bias = exact.weight.detach().double(), exact.bias.detach().double()
        wanted = nn.functional.conv2d(images, weight, bias, self.shape.stride, self.shape.kernel // 2)
        (wanted_gradient,) = torch.autograd.grad(wanted, images, self._dy.double())
        gradient, *_ = self.call(layer, BOTH)()
        for what, got, right in (("output", layer(self._x), wanted), ("gradient of the input", gradient, wanted_gradient)):
            error = float((got - right).detach().abs().max() / right.detach().abs().max())
            if not error <= _TOLERANCE:
                raise KronblocksError(
                    f"{name}, {self.shape}: the {what} is wrong by {error:.1e} of the largest: nothing was timed"
                )


def measure_shape(settings: ConvSettings, text: str, density: float, progress: Callable[[str], None]) -> list[Row]:
    """All cases of one shape at one density: checked, then timed in turns."""
    found: list[Row] = []
    convolution = _Convolution(ConvShape.parse(text), density, settings)
    for direction in (FORWARD, BOTH):
        progress(f"{convolution.shape}, density {density:g}, {direction}")
        layers: dict[str, tuple[nn.Module, str | None]] = {}
        for case in (DENSE, BLOCKS, FACTORS):
            layers[case] = convolution.layer(case, training=direction == BOTH)
            convolution.check(case, layers[case][0])
        times = measure({case: convolution.call(layers[case][0], direction) for case in layers}, settings.budget)
        place = {"shape": text, "density": density, "direction": direction}
        found += [{**place, "case": case, "plan": layers[case][1], **timing.row(times[DENSE])} for case, timing in times.items()]
    return found


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"convolutions: {results.path}", title_justify="left")
    for name in ("shape", "density", "direction", "case", "ms", "speed to torch's", "repeats"):
        table.add_column(name, justify="left" if name in ("shape", "direction", "case") else "right")
    for row in results.rows:
        spread = f"{row['speed_low']:.2f}-{row['speed_high']:.2f}"
        case = f"{row['case']} ({row['plan']})" if row["plan"] else row["case"]
        place = [str(ConvShape.parse(row["shape"])), f"{row['density']:g}", row["direction"], case]
        table.add_row(*place, f"{row['ms']:.3f}", f"{row['speed']:.2f}", spread)
    return table


def run(settings: ConvSettings) -> Results:
    """Measure what is missing, and write it; the rows of a shape at one density are written all at once."""
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        for shape in settings.shapes:
            for density in settings.shares:
                if results.missing([{"shape": shape, "density": density, "case": BLOCKS, "direction": BOTH}]):
                    results.add(measure_shape(settings, shape, density, show))
    return results
