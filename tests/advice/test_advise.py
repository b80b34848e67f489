"""Advice from timings that the tests make up, and once from real ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError, SparsityConfig
from kronblocks.advice import advise, measuring
from kronblocks.ops import Problem
from kronblocks.ops.costs import timing
from kronblocks.ops.costs.timing import REFERENCE
from kronblocks.ops.plans import possible_plans
from kronblocks.surgery import select
from kronblocks_lab import commands


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.0)


def together(monkeypatch, seconds: Callable[[Problem], dict[str, float]], turns: int = 9) -> list[Problem]:
    """Let timings be made up: seconds by plan, F.linear among them, the same in every turn; returns what was asked."""
    problems: list[Problem] = []

    def measure(asked: Sequence[Problem]) -> tuple[list[float], list[dict[str, list[float]]]]:
        problems.extend(asked)
        times = [seconds(problem) for problem in asked]
        return [times[0][REFERENCE]] * turns, [
            {plan: [value] * turns for plan, value in each.items() if plan != REFERENCE} for each in times
        ]

    monkeypatch.setattr(measuring, "measure_together", measure)
    return problems


@pytest.fixture
def asked(monkeypatch) -> list[Problem]:
    """Dense takes 1 s; factors 0.5 s in training, 2 s in inference; packed 4 times the density, in inference twice."""

    def seconds(problem: Problem) -> dict[str, float]:
        times = dict.fromkeys(possible_plans(problem.rank), 3.0) | {REFERENCE: 1.0}
        if problem.rank:
            times["coeff_first"] = 0.5 if problem.training else 2.0
        times["packed"] = problem.density * (4 if problem.training else 2) if problem.rank is None else 3.0
        return times

    return together(monkeypatch, seconds)


def test_a_layer(asked):
    advice = advise("64x32*3", rows=10, sparsity=(0.95, 0.5, 0.75), block_size=4, rank=2)
    (layer,) = advice.layers
    assert (layer.count, layer.block_size, layer.left_dense, layer.names) == (3, "4x4", "", ("64x32",))
    assert layer.dense.training == (REFERENCE, 1.0, 1.0, 0.0)
    assert layer.factored.training == ("coeff_first", 0.5, 2.0, 0.0)
    assert layer.factored.inference == ("coeff_first", 2.0, 0.5, 0.0)
    assert [way.sparsity for way in layer.packed] == [0.5, 0.75, 0.95]
    assert [way.training.relative for way in layer.packed] == pytest.approx([0.5, 1.0, 5.0])
    assert [way.inference.relative for way in layer.packed] == pytest.approx([1.0, 2.0, 10.0])
    assert layer.what_to_do(training=True) == "factor at 50 % and 75 %; pack at 95 %"
    assert layer.what_to_do(training=False) == "keep dense at 50 %; pack at 75 % and 95 %"
    assert (layer.break_even_training, layer.break_even_inference) == (pytest.approx(0.75), pytest.approx(0.5))
    assert {problem.rows for problem in asked} == {10}
    assert {problem.tile_groups for problem in asked if problem.rank} == {16}, "a bank for each block row"


def test_bytes_of_weights():
    """By hand: 128 blocks of 16 fp32 values; half of them with 4 int32 a block; 16 rows and 8 columns begin somewhere."""
    (layer,) = advise("64x32", rows=2, sparsity=(0.5,), block_size=4, rank=2).layers
    assert layer.dense.weight_bytes == 64 * 32 * 4
    assert layer.factored.weight_bytes == 4 * 2 * (128 + 16 * 16)
    assert layer.packed[0].weight_bytes == 64 * 16 * 4 + 4 * (4 * 64 + 17 + 9)


def test_the_whole_model(asked):
    """3 layers of 1 s that are packed at 95 % in 0.2 s (inference 0.1 s), and 2 that stay dense."""
    advice = advise(["64x32*3", "63x65*2"], rows=10, sparsity=(0.95,), block_size=4, rank=2)
    (gain,) = advice.gains
    assert gain.training == pytest.approx(5 / (3 * 0.2 + 2)) and gain.inference == pytest.approx(5 / (3 * 0.1 + 2))
    packed = advice.layers[0].packed[0].weight_bytes
    assert gain.dense_bytes == 4 * (3 * 64 * 32 + 2 * 63 * 65)
    assert gain.weight_bytes == 3 * packed + 2 * 4 * 63 * 65
    stays = advice.layers[1]
    assert stays.left_dense.startswith("4x4 does not divide 63x65") and stays.packed == () and stays.factored is None
    assert stays.what_to_do(training=True).startswith("keep dense: 4x4 does not divide")


def test_a_model_is_read_as_sparsify_would_take_it(asked):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 10))
    left = advise(model, rows=4, block_size=4, rank=20).layers
    assert [(each.names, each.count, bool(each.left_dense)) for each in left] == [
        (("0", "3"), 2, False),
        (("2",), 1, False),
        (("4",), 1, True),
    ]
    assert {problem.rank for problem in asked} == {None, 16}, "no more terms than a block has weights"
    nearest = advise(model, rows=4, block_size=4, rank=2, on_mismatch="nearest").layers
    assert [each.block_size for each in nearest] == ["4x4", "4x4", "2x4"]


def test_layers_of_gpt2_are_timed_as_what_they_become_and_the_rest_is_listed(asked):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    advice = advise(model, rows=4, block_size=8)
    found = {(each.out_features, each.in_features): (each.count, bool(each.left_dense)) for each in advice.layers}
    assert found == {
        (96, 32): (2, False),
        (32, 32): (2, False),
        (128, 32): (2, False),
        (32, 128): (2, False),
        (60, 32): (1, True),
    }
    selected = [each.name for each in select(model, SparsityConfig(block_size=8)).selected]
    assert sorted(selected) == sorted(name for each in advice.layers if not each.left_dense for name in each.names)
    weights = sum(p.numel() for p in model.parameters())
    assert any("wte: Embedding: rows of a table" in line and f"({6000 * 32 / weights:.1f}%" in line for line in advice.not_timed)
    assert f"not timed: {advice.not_timed[-1]}" in str(advice).splitlines() and advice.to_dict()["not_timed"] == advice.not_timed
    nearest = advise(model, rows=4, block_size=16, on_mismatch="nearest").layers
    assert {(each.out_features, each.block_size) for each in nearest} == {(size, "16x16") for size in (96, 32, 128)} | {
        (60, "")
    }  # the head is tied to the embedding


def test_convolutions_are_listed_and_not_timed_as_what_they_are_not(asked):
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32, 64), nn.LSTM(64, 8))
    advice = advise(model, rows=4, block_size=8)
    assert [each.names for each in advice.layers] == [("2",)]
    assert [line[:25] for line in advice.not_timed] == ["dense:  0: a convolution:", "dense:  3: LSTM computes "]


@pytest.mark.parametrize(("slope", "even"), [(0.9, 0.0), (1.1, 1 - 1 / 1.1), (3.0, 2 / 3), (100.0, 0.99), (1000.0, None)])
def test_break_even_is_where_packed_meets_dense(slope, even, monkeypatch):
    together(monkeypatch, lambda problem: {REFERENCE: 1.0, "dense": 2.0, "packed": slope * problem.density})
    layer = advise("256x256", rows=4, block_size=4, sparsity=(0.9,)).layers[0]
    assert layer.break_even_training == (None if even is None else pytest.approx(even, abs=1e-3))


def test_a_plan_too_slow_to_be_timed_is_above_the_break_even(monkeypatch):
    packed = {0.25: 0.5, 0.1: 0.4}
    together(
        monkeypatch, lambda p: {REFERENCE: 1.0, "dense": 2.0, **({"packed": packed[p.density]} if p.density in packed else {})}
    )
    layer = advise("256x256", rows=4, block_size=4, sparsity=(0.9,)).layers[0]
    assert layer.break_even_training == 0.75, "the densest that was seen to pay"


def test_a_lead_within_the_noise_is_no_advice(monkeypatch):
    together(monkeypatch, lambda problem: {REFERENCE: 1.0, "dense": 1.0, "packed": 0.98, "coeff_first": 0.99})
    layer = advise("64x64", rows=4).layers[0]
    assert layer.what_to_do(training=True) == "keep dense"


@pytest.mark.parametrize(("middle", "spread", "says"), [(1.0, 0.25 / 2.25, "pack"), (2.0, 0.75 / 1.75, "keep dense")])
def test_a_lead_within_its_own_noise_is_no_advice(middle, spread, says, monkeypatch):
    """Two thirds of the turns say 1.25 times dense's speed, the third one says less."""

    def measure(asked):
        plans = [{"packed": [0.8, middle, 0.8]} if problem.rank is None else {"dense": [2.0] * 3} for problem in asked]
        return [1.0] * 3, plans

    monkeypatch.setattr(measuring, "measure_together", measure)
    layer = advise("64x64", rows=4).layers[0]
    assert layer.packed[0].training == ("packed", 0.8, 1.25, pytest.approx(spread))
    assert layer.what_to_do(training=True) == says


def test_rows_agree_with_themselves_whatever_the_machine_does(monkeypatch):
    """Every measuring is on a machine of another speed: numbers of several would make ratios that no row bears out."""
    slow = itertools.count(1)

    def once(run, synchronize, calls=1):
        run()
        return float(next(slow))

    monkeypatch.setattr(timing, "_once", once)
    for layer in advise(["64x32", "32x64"], rows=8, sparsity=(0.5, 0.75), block_size=4, rank=2).layers:
        for training in (True, False):
            dense = layer.dense.speed(training)
            for way in (layer.factored, *layer.packed):
                speed = way.speed(training)
                assert speed.relative == dense.seconds / speed.seconds
                assert 0 < speed.spread < 1


def test_text_and_json(asked):
    told = []
    advice = advise(["64x32*3", "10x64"], rows=10, block_size=4, rank=2, progress=lambda *args: told.append(args))
    assert told == [("64x32", 0, 2), ("10x64", 1, 2)]
    text = str(advice)
    for part in (
        "64x32 * 3 in 4x4 blocks",
        "packed, 95 %",
        "coeff_first",
        "whole model at 80 % zeros: training",
        "keep dense: 4x4",
    ):
        assert part in text
    assert "packed beats dense: in training from 75 % zeros on, in inference from 50 % zeros on" in text
    data = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert data["version"] == 2 and data["layers"][0]["packed"][2]["sparsity"] == 0.95


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rows": 0}, "rows"),
        ({"rows": 2.5}, "rows"),
        ({"sparsity": ()}, "list of shares"),
        ({"sparsity": 0.9}, "list of shares"),
        ({"sparsity": (0.9, 90)}, "0.9 means 90%"),
        ({"rank": 0}, "rank"),
        ({"block_size": "x"}, "block size"),
        ({"tile_groups": 0}, "tile_groups"),
        ({"tile_groups": 7}, "no layer was selected"),
        ({"device": "meta"}, "write cpu, or cuda"),
        ({"device": "toaster"}, "write cpu, or cuda"),
        ({"dtype": torch.int8}, "torch.float32"),
        ({"layers": "100000x100000"}, "10,000,000,000 weights"),
        ({"layers": "63x65"}, "no layer was selected"),
    ],
)
def test_what_cannot_be_measured_says_why(settings, says):
    with pytest.raises(KronblocksError, match=says):
        advise(**{"layers": "64x64", "rows": 4, **settings})


def test_the_command(asked, tmp_path, capsys):
    out = tmp_path / "advice.json"
    commands.run(
        ["advise", "64x32*3", "--rows", "10", "--sparsity", "0.9", "--block-size", "4", "--rank", "2", "--json", str(out)]
    )
    printed = capsys.readouterr().out
    assert "64x32 * 3 in 4x4 blocks" in printed and "what to do" in printed.replace("in training:", "what to do")
    assert "90 % zeros" in printed and "10 rows, rank 2" in printed
    assert json.loads(out.read_text())["layers"][0]["count"] == 3
    for wrong, says in ((["--json", str(tmp_path / "no" / "x")], "no folder"), (["--threads", "0"], "--threads")):
        with pytest.raises(KronblocksError, match=says):
            commands.run(["advise", "64x32", "--rows", "10", *wrong])


def test_with_real_timings():
    advice = advise("64x32", rows=8, sparsity=(0.75,), block_size=4, rank=2)
    assert all(gain.training >= 1 and gain.inference >= 1 for gain in advice.gains), "what does not pay is kept dense"
    assert "64x32" in str(advice)
