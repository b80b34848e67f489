"""Where a step's time goes: every phase, every part once, and bounds that follow from the sizes."""

import pytest

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks_lab.__main__ import main
from kronblocks_lab.bench.account import STEP, AccountSettings, Training
from kronblocks_lab.bench.measure.results import read

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def live_blocks_only():
    """At these sizes which plan is the fastest hangs on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockLayer, "choose_plan_", lambda layer, rows=None, *, measure=False: layer.use_plan_("packed"))
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("account")
    line = "account --quick --threads 1 --seconds 1e-3 --repeats 1 --rows 32 --widths 64 64 64 10 --block-size 8 --out"
    main(["bench", *line.split(), str(folder)])
    return read(folder / "bench-account.json")["rows"]


def test_every_phase_has_its_parts(rows):
    parts = {}
    for row in rows:
        parts.setdefault(row["phase"], []).append(row["part"])
    assert list(parts) == [phase.name for phase in AccountSettings().phases]
    for phase, names in parts.items():
        assert names[0] == STEP and len(names) == len(set(names))
        assert {"optimizer", "activations, loss, sums", "dense layers, forward", "dense layers, backward"} <= set(names), phase
    assert {"live blocks, forward", "live blocks, dx", "live blocks, dvalues"} <= set(parts["heal"])
    assert not any("live blocks" in name or "factors" in name for name in parts["dense"])


def test_times_are_shares_of_a_step(rows):
    for row in rows:
        step = next(each["ms"] for each in rows if each["phase"] == row["phase"] and each["part"] == STEP)
        assert row["share"] == pytest.approx(row["ms"] / step, rel=0.01, abs=1e-3)
        assert row["bound_ms"] is None or row["bound_ms"] > 0


def test_multiply_adds_are_those_of_live_blocks():
    settings = AccountSettings(widths=(64, 64, 10), rows=32, block_size="8", sparsity=0.9)
    dense, *_, heal = (Training(phase, settings).multiply_adds() for phase in settings.phases)
    layer, last = 32 * 64 * 64, 32 * 64 * 10
    assert dense["dense layers, forward"] == layer + last
    assert dense["dense layers, backward"] == layer + 2 * last, "the input wants no gradient"
    assert heal["live blocks, forward"] == heal["live blocks, dvalues"] == layer * 6 / 64
    assert heal["dense layers, forward"] == last


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"widths": (10,)}, "--widths"),
        ({"rows": 0}, "--rows"),
        ({"compiled": True}, "eager fp32"),
        ({"sparsity": 2.0}, "sparsity"),
    ],
)
def test_settings_that_cannot_be(wrong, says):
    with pytest.raises(KronblocksError, match=says):
        AccountSettings(**wrong)
