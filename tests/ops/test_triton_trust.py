"""No kernel serves before it has agreed with float64: in Triton's interpreter, with kernels that are wrong or do not run."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.core import PerformanceWarning
from kronblocks.ops import BlockIndex, backends, packed_linear, reference
from kronblocks.ops.backends import library
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends import triton as backend
from kronblocks.ops.backends.triton import fused, packed, trials, trust, tuning, weights
from kronblocks.ops.plans import PLANS

pytestmark = [pytest.mark.slow, pytest.mark.needs("triton")]

CPU, MASK = torch.device("cpu"), torch.tensor([[True, False, True], [False, False, False]])


@pytest.fixture(autouse=True)
def checked(monkeypatch, tmp_path):
    """Kernels serve the CPU here, where they are interpreted, and have to be trusted as on a GPU."""
    monkeypatch.setattr(trust, "applies", lambda device: True)
    monkeypatch.setattr(trials, "ROWS", (20, 5))
    monkeypatch.setattr(trials, "_GRIDS", ((4, 3), (2, 3)))
    monkeypatch.setattr(backends, "pick", lambda tensor: backend)
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    monkeypatch.delenv("KRONBLOCKS_TRITON", raising=False)
    trust.forget()
    loaded = None if library.unavailable_reason() else library.load()
    with nullcontext() if loaded is None else loaded.aside():
        yield
    trust.forget()


def product_unit(**change) -> trust.Unit:
    sizes = tuning.Sizes(16, 32, 16, 4, 3, terms=0)
    return trust.Unit("product", torch.float32, (16, 16), sizes=sizes)._replace(**change)


def wrong(module, kernel: str, argument: int, monkeypatch, dtype: torch.dtype | None = None) -> list[str]:
    """Let a kernel get one tile of one of its results wrong; the names of all that are launched."""
    launched: list[str] = []
    launch = module.launch

    def run(function, programs, *arguments, **settings):
        launch(function, programs, *arguments, **settings)
        launched.append(function.__name__)
        result = arguments[argument] if function.__name__ == kernel else None
        if result is not None and result.numel() and dtype in (None, arguments[0].dtype):
            result.view(-1)[: min(16, result.numel())] += 0.5

    monkeypatch.setattr(module, "launch", run)
    return launched


def step(layer, rounding, with_gradients, dtype=torch.float32) -> None:
    """A step of a layer is right: y and all gradients beside the formulas in float64."""
    x, dy = torch.randn(7, layer.in_features).to(dtype), torch.randn(7, layer.out_features).to(dtype)
    leaves = [p.detach().clone() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def own(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    def oracle(x, *given):
        by_name = dict(zip(names, given, strict=True))
        if isinstance(layer, BlockSparseLinear):
            places = [divmod(int(k), layer.grid.shape[1]) for k in layer.positions()]
            return x @ reference.packed_weight(by_name["values"], places, layer.grid.shape).T + by_name["bias"]
        return reference.kron_linear(x, by_name["coeff"], by_name["tiles"], by_name["bias"], live=layer.block_mask)

    rounding(oracle, [x, *leaves], dy, terms=1000).check(with_gradients(own, [x, *leaves], dy))


def values_layer(dtype: torch.dtype = torch.float32) -> BlockSparseLinear:
    return BlockSparseLinear(48, 32, (16, 16), mask=MASK, plan="packed").to(dtype)


def refusals(caught) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, PerformanceWarning)]


@pytest.mark.parametrize(
    ("kernel", "argument", "differs"), [("product", 3, "y differs"), ("grad_values", 2, "dvalues differs")], ids=str
)
def test_a_wrong_tile_or_gradient_is_refused_and_all_is_right(kernel, argument, differs, monkeypatch, rounding, with_gradients):
    launched, layer = wrong(packed, kernel, argument, monkeypatch), values_layer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(layer, rounding, with_gradients)
    found = refusals(caught)
    assert any(differs in each and f"{kernel!r} for float32 blocks of 16x16" in each for each in found), found
    other = {"product": "grad_values", "grad_values": "product"}[kernel]
    launched.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, rounding, with_gradients)
    assert other in launched, "the other one serves, and nothing is said again"


def test_a_wrong_dtype_is_refused_and_the_other_serves(monkeypatch, rounding, with_gradients):
    wrong(packed, "product", 3, monkeypatch, dtype=torch.float16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(values_layer(torch.float16), rounding, with_gradients, torch.float16)
    assert "'product' for float16 blocks of 16x16 is refused on cpu: y differs from float64 by 0" in refusals(caught)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(values_layer(), rounding, with_gradients)
    assert {(unit.dtype, bool(reason)) for (unit, _), reason in trust._verdicts.items() if unit.kernel == "product"} == {
        (torch.float16, True), (torch.float32, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "kernel", "argument", "plan", "differs"),
    [
        (weights, "blocks_from_factors", 2, "packed", "blocks differs"),
        (weights, "tiles_gradient", 2, "packed", "dtiles differs"),
        (fused, "mix_gradient", 3, "coeff_first", "dcoeff differs"),
    ],
)
def test_wrong_kernels_of_factors(module, kernel, argument, plan, differs, monkeypatch, rounding, with_gradients):
    wrong(module, kernel, argument, monkeypatch)
    layer = KroneckerBlockLinear(48, 32, (16, 16), rank=2, plan=plan)
    layer.set_block_mask_(MASK)
    with pytest.warns(PerformanceWarning, match=differs):
        step(layer, rounding, with_gradients)


def test_a_refused_plan_keeps_no_intermediate(monkeypatch):
    """Its kernels would have kept none: then nobody has counted what an einsum keeps."""
    plans = []
    monkeypatch.setattr(trials, "differences", lambda unit, device: ("y differs", True))
    monkeypatch.setattr(plain, "kron_linear", lambda *given: plans.append(given[-1].name))
    monkeypatch.setattr(plain, "kron_backward", lambda *given: plans.append(given[-2].name))
    x, coeff, tiles = torch.ones(5, 48), torch.ones(2, 3, 1), torch.ones(1, 1, 16, 16)
    with pytest.warns(PerformanceWarning, match="y differs"):
        backend.kron_linear(x, coeff, tiles, None, None, PLANS["coeff_first"])
        backend.kron_backward(torch.ones(5, 32), x, coeff, tiles, None, PLANS["tile_first"], True)
    assert plans == ["dense", "dense"]


def test_a_kernel_that_does_not_compile_or_fit(monkeypatch, rounding, with_gradients):
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources

    for failure, said in (
        (CompileTimeAssertionFailure(None, None, "no such instruction"), "it failed with CompileTimeAssertionFailure"),
        (OutOfResources(300_000, 101_376, "shared memory"), "it does not fit: .*shared memory"),
    ):
        trust.forget()
        monkeypatch.setenv("KRONBLOCKS_TRITON", "check")

        def launch(*_, failure=failure, **__):
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(packed, "launch", launch)
            with pytest.warns(PerformanceWarning, match=said):
                step(values_layer(), rounding, with_gradients)


def test_a_verdict_is_kept_and_a_damaged_one_found_again(monkeypatch, tmp_path):
    asked: list[trust.Unit] = []
    differences = trials.differences

    def counted(unit, device):
        asked.append(unit)
        return differences(unit, device)

    monkeypatch.setattr(trials, "differences", counted)
    unit = product_unit()
    for known in (False, True):
        trust.forget()
        assert trust.agrees(unit, CPU) and trust.agrees(unit, CPU)
        assert len(asked) == 1, f"known: {known}"
    (file,) = (tmp_path / "verdicts").iterdir()
    for damage in ("", "{", file.read_text().replace('"differed": ""', '"differed": 3')):
        file.write_text(damage)
        trust.forget()
        asked.clear()
        assert trust.agrees(unit, CPU) and asked == [unit]
    trust.forget()
    monkeypatch.setenv("KRONBLOCKS_TRITON", "check")
    assert trust.agrees(unit, CPU) and asked == [unit, unit], "check: what is kept does not count"
    trust.forget()
    monkeypatch.delenv("KRONBLOCKS_TRITON")
    monkeypatch.setattr(trust, "sources", lambda: "others")
    trust.machine.cache_clear()
    assert trust.agrees(unit, CPU) and len(asked) == 3, "other sources have verdicts of their own"
    trust.machine.cache_clear()


def test_what_is_refused_stays_refused_in_the_next_process(monkeypatch):
    with monkeypatch.context() as patched:
        wrong(packed, "product", 3, patched)
        with pytest.warns(PerformanceWarning, match="y differs"):
            assert not trust.agrees(product_unit(), CPU)
    trust.forget()
    with pytest.warns(PerformanceWarning, match="y differs"):
        assert not trust.agrees(product_unit(), CPU)


def test_memory_that_is_too_full_decides_nothing_for_others(monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(packed, "launch", full)
        with pytest.warns(PerformanceWarning, match="memory was too full"):
            assert not trust.agrees(product_unit(), CPU)
    assert not (tmp_path / "verdicts").exists()
    trust.forget()
    assert trust.agrees(product_unit(), CPU)


def test_an_unknown_kernel_waits_while_a_graph_is_recorded(monkeypatch):
    index = BlockIndex.from_mask(MASK)
    x, values = torch.randn(5, 48), torch.randn(2, 16, 16)
    wanted = packed_linear(x.double(), values.double(), index).float()
    launched = wrong(packed, "none", 0, monkeypatch)
    with monkeypatch.context() as recording:
        recording.setattr(trust, "_is_recorded", lambda device: True)
        with pytest.warns(PerformanceWarning, match="a CUDA graph is being recorded: call the model once before"):
            y = packed_linear(x, values, index)
    assert not launched
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(packed_linear(x, values, index), wanted)
    assert launched, "it is checked later, and serves"


def test_tuned_sizes_that_are_wrong_are_not_used(monkeypatch):
    default, quick = tuning.Sizes(16, 32, 16, 4, 3, terms=0), tuning.Sizes(16, 64, 16, 4, 3, terms=0)
    monkeypatch.setattr(tuning, "_quickest", lambda *_: quick)
    monkeypatch.setattr(trials, "differences", lambda unit, device: ("y differs" if unit.sizes == quick else "", True))
    about = {"grid": (2, 3), "block": (16, 16), "capacity": 2}
    tuning.forget()
    with pytest.warns(PerformanceWarning, match="y differs"):
        assert tuning.tuned("product", about, torch.empty(5, 48), default, [quick], lambda sizes: sizes) == default
    tuning.forget()


def test_trials_leave_random_numbers_and_modes_alone():
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert trust.agrees(product_unit(), CPU)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


def check_in_a_process(folder: str) -> None:
    import os

    os.environ["KRONBLOCKS_CACHE"] = folder
    trust.applies = lambda device: True
    trials.ROWS = (20, 5)
    for block in ((16, 16), (16, 32), (32, 16)):
        assert trust.agrees(product_unit(block=block), CPU)


def test_several_processes_check_at_once(processes, tmp_path):
    ended = [each.end() for each in [processes.start(check_in_a_process, str(tmp_path)) for _ in range(3)]]
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert sorted(file.suffix for file in (tmp_path / "verdicts").iterdir()) == [".json"] * 3
