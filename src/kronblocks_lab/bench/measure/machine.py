"""The machine's roofline, measured in the same run: a large dense product, and plain copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks_lab.bench.measure.results import Results
from kronblocks_lab.bench.measure.timing import Budget, measure

if TYPE_CHECKING:
    from kronblocks_lab.bench.settings import TimedSettings

_ROWS, _FEATURES = 4096, 2048
_COPIES = (1, 8, 64, 256)  # MiB read, and as many written


def use(settings: TimedSettings) -> None:
    """Set the threads and the precision of products, and check the device.

    Raises:
        KronblocksError: there is no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise KronblocksError("--device cuda: torch sees no GPU here; write --device cpu")
    if settings.compiled:
        import torch._dynamo.config as dynamo

        # all models of a class share one code object, and beyond the limit they would run uncompiled under a compiled one's name
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 100_000
        dynamo.fail_on_recompile_limit_hit = True
    torch.set_float32_matmul_precision("high" if settings.dtype == "tf32" else "highest")
    torch.set_num_threads(settings.threads)


def begin(settings: TimedSettings, columns: Sequence[str], key: Sequence[str]) -> Results:
    """Set the machine up for a benchmark, and open its file, with the roofline in a new one's head.

    Raises:
        KronblocksError: there is no such device, or the file holds something else, or another machine's times.
    """
    use(settings)
    results = Results.open(settings.path, settings.kind, columns, key, settings.shared(), fresh=settings.fresh)
    if "machine" not in results.head:
        results.head.update(machine=roofline(settings))
    elif (known := results.head["machine"]["kind"]) != (own := kind_of(settings.device)["kind"]):
        raise KronblocksError(
            f"{results.path} was measured on {known}, but this machine has {own}: write --label {own.replace(' ', '-')} "
            "for another file, or --fresh to measure everything again"
        )
    return results


def kind_of(device: str) -> dict[str, Any]:
    """The GPU's name, or the vector instructions that torch uses, since processors' names do not tell them."""
    if device == "cuda":
        return {"kind": torch.cuda.get_device_name()}
    held = {"held": True} if "ATEN_CPU_CAPABILITY" in os.environ else {}  # to fewer instructions than the processor has
    return {"kind": torch.backends.cpu.get_cpu_capability(), **held}


def roofline(settings: TimedSettings) -> dict[str, Any]:
    """GFLOP/s of a dense product in the settings' precision, GB/s of copies by their size, and who computes."""
    device, dtype, quick = settings.device, settings.torch_dtype, settings.quick
    rows, features = (512, 1024) if quick else (_ROWS, _FEATURES)
    x, weight = (torch.randn(n, features, device=device).to(dtype) for n in (rows, features))
    sources = {size: torch.zeros(size * 2**18, device=device) for size in (_COPIES[:2] if quick else _COPIES)}
    cases: dict[str, Any] = {"product": lambda: torch.nn.functional.linear(x, weight)}
    for size, source in sources.items():
        target = torch.empty_like(source)
        cases[str(size)] = lambda source=source, target=target: target.copy_(source)
    times = measure(cases, Budget(0.05 if quick else 0.5), device=device)
    product = times.pop("product")
    return {
        "product": f"{rows} rows, {features}x{features}",
        "product_gflops": round(2 * rows * features**2 / product.ms / 1e6, 1),
        "copy_mib": list(sources),
        "copy_gb_per_s": [round(2 * size * 2**20 / times[str(size)].ms / 1e6, 1) for size in sources],
        **kind_of(device),
        "backend": backends.backend_key(device, dtype),
    }


@contextmanager
def told() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is measured now."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text)


def copy_rate(machine: Mapping[str, Any], moved: float) -> float:
    """Bytes per second of the measured copy that is nearest to this many bytes, from above where there is one."""
    sizes = [2 * 2**20 * size for size in machine["copy_mib"]]
    rates = machine["copy_gb_per_s"]
    return 1e9 * next((rate for size, rate in zip(sizes, rates, strict=True) if size >= moved), rates[-1])
