"""What all tests share: one thread, seeds, and comparison within the rounding errors that arithmetic allows."""

import gc
import os
import sys

import pytest
import torch
from hypothesis import settings

# in the processes that tests start, too: plans by counts, so that no test depends on the clock; nothing in the user's cache
os.environ["KRONBLOCKS_MEASURE"] = os.environ["KRONBLOCKS_CACHE"] = "off"
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU; it must be known before triton is imported

pytest_plugins = ["tests.interpreter", "tests.needs", "tests.processes", "pytester"]

# no deadline: nothing here is a timed assertion; derandomised: a failure is the same on every machine
settings.register_profile("kronblocks", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kronblocks")


@pytest.hookimpl(trylast=True)  # after tests/processes.py, whose processes begin as any others do
def pytest_collection_finish():
    """Searches for garbage, which tests ask for, leave out the million objects that are there for good."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads waiting for each other take longer than these small products (and pytest-xdist has its own)."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nobody_holds_compilation():
    """A training that a test has dropped before its next step keeps torch.compile eager until it is collected."""
    growth = sys.modules.get("kronblocks.algorithms.growth")
    if growth is not None and growth._STANCE._users:
        gc.collect()


def with_gradients(function, tensors, dy, *, unused: bool = False):
    """[y, gradient of each tensor] of a function for the output gradient dy; leaves keep the tensors' strides."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=unused)]


class Rounding:
    """What an oracle in float64 says about an output and its gradients, and how far rounding may lead from it.

    A sum of N products, in any order, is within about N*u of the exact one, times the same sum over absolute values (Higham,
    "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1; u is the unit roundoff). All outputs and gradients here
    are such sums, so the oracle run on absolute values gives each element's own bound. Where that is 0 (dead blocks), only an
    exact 0 passes. bf16 products accumulate in fp32, so N counts fp32 roundings; what is stored between stages, and the
    result, is rounded to bf16: at most 4 of those on the way to any result (packed from factors: values, dvalues, the sum,
    autograd's sum).

    Args:
        oracle: the formula, as a function of the tensors.
        tensors: its arguments, in the dtype under test.
        dy: gradient of the output.
        terms: products in the longest sum among the output and the gradients.
    """

    STORED = 4

    def __init__(self, oracle, tensors, dy, *, terms: int) -> None:
        self.exact = with_gradients(oracle, [t.double() for t in tensors], dy.double(), unused=True)
        size = with_gradients(oracle, [t.double().abs() for t in tensors], dy.double().abs(), unused=True)
        unit, unit_stored = (torch.finfo(d).eps / 2 for d in (torch.promote_types(dy.dtype, torch.float32), dy.dtype))
        self.bounds = [((terms + 4) * unit + self.STORED * unit_stored) * t for t in size]

    def check(self, actual) -> None:
        """Assert that [output, gradients] are the oracle's up to rounding."""
        for number, (got, want, bound) in enumerate(zip(actual, self.exact, self.bounds, strict=True)):
            name = "output" if number == 0 else f"gradient of input {number - 1}"
            assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
            assert torch.isfinite(got).all(), f"{name} is not finite"
            excess = ((got.double() - want).abs() - bound).flatten()
            if excess.numel():
                worst = int(excess.argmax())
                values = [float(t.flatten()[worst]) for t in (got, want, bound)]
                assert excess[worst] <= 0, f"{name}[{worst}] is {values[0]:.6g}, expected {values[1]:.6g} within {values[2]:.2g}"


@pytest.fixture(scope="session")
def rounding() -> type[Rounding]:
    return Rounding


@pytest.fixture(scope="session", name="with_gradients")
def with_gradients_fixture():
    return with_gradients
