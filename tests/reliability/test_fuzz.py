"""Broken, truncated, hostile and foreign input: one clear error each time, and no memory taken for what a file claims."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kronblocks import (
    KronblocksError,
    SparsityConfig,
    apply_structure_,
    export,
    from_pretrained,
    save_pretrained,
    sparsify_,
    structure,
)

FULL = os.environ.get("KRONBLOCKS_RELIABILITY") == "full"
QUIET: Any = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def cases(few: int, many: int) -> int:
    return many if FULL else few


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "4x4", "16", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(SparsityConfig().to_dict())


def refused(run, *args: Any, **kwargs: Any) -> bool:
    """Whether it was refused in the way that it should be; any other error goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(*args, **kwargs)
    except KronblocksError as error:
        assert str(error)
        return True
    return False


def test_config(record):
    count = cases(100, 4000)
    seen = {"refused": 0}

    @settings(max_examples=count, **QUIET)
    @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.sampled_from(["text", "table", "call"]))
    def run(changes, given_as):
        data = {**SparsityConfig().to_dict(), **changes}
        if given_as == "text":
            seen["refused"] += refused(SparsityConfig.from_json, json.dumps(data))
        elif given_as == "call":
            changes.pop("version", None)
            seen["refused"] += refused(SparsityConfig, **changes)
        else:
            seen["refused"] += refused(SparsityConfig.from_dict, data)

    run()
    assert seen["refused"] > count / 4
    record(
        "wrong settings",
        f"{count:,} configs with values of any kind",
        f"{seen['refused']:,} refused with one sentence, the others were right",
    )


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model = small()
    sparsify_(model, SparsityConfig(block_size=4, method="static", target_sparsity=0.5))
    return save_pretrained(model, tmp_path_factory.mktemp("saved") / "model")


def damaged(data: bytes, kind: str, where: float, value: int) -> bytes:
    place = int(where * (len(data) - 1))
    return {
        "truncated": data[:place],
        "flipped": data[:place] + bytes([data[place] ^ (value or 1)]) + data[place + 1 :],
        "zeros": data[:place] + bytes(len(data) - place),
        "inserted": data[:place] + bytes([value]) * 8 + data[place:],
        "foreign": pickle.dumps({"hello": value}),
        "empty": b"",
    }[kind]


DAMAGE = st.sampled_from(["truncated", "flipped", "zeros", "inserted", "foreign", "empty"])


def test_saved_models(saved, tmp_path, record):
    count = cases(100, 4000)
    seen = {"refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=count, **QUIET)
    @given(st.sampled_from(["kronblocks.json", "weights"]), DAMAGE, st.floats(0, 1), st.integers(0, 255))
    def run(file, kind, where, value):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        path = folder / file if file != "weights" else next(folder.glob("*.safetensors"))
        path.write_bytes(damaged(path.read_bytes(), kind, where, value))
        model = small()
        if refused(from_pretrained, folder, model):
            seen["refused"] += 1
            assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]

    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200
    assert seen["refused"] > count / 4
    record(
        "damaged model folders",
        f"{count:,} folders with bytes cut off, flipped, zeroed, inserted or foreign",
        f"{seen['refused']:,} refused, the model left as it was; the others hold other values in the right places",
    )


def test_hostile_cards(saved, tmp_path, record):
    count = cases(100, 4000)
    seen = {"refused": 0}
    card = json.loads((saved / "kronblocks.json").read_text())
    places = [(), ("structure",), ("structure", "layers"), ("structure", "layers", "0"), ("structure", "layers", "2")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=count, **QUIET)
    @given(st.sampled_from(places), st.integers(0, 20), VALUES)
    def run(place, which, value):
        changed = json.loads(json.dumps(card))
        inner = changed
        for step in place:
            inner = inner[step]
        inner[sorted(inner)[which % len(inner)] if inner else "new"] = value
        folder = tmp_path / "copy"
        if not folder.exists():
            shutil.copytree(saved, folder)
        (folder / "kronblocks.json").write_text(json.dumps(changed))
        seen["refused"] += refused(from_pretrained, folder, small())

    run()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
    assert seen["refused"] > count / 4
    record(
        "hostile cards",
        f"{count:,} kronblocks.json with values of any kind, sizes of 2^63 among them",
        f"{seen['refused']:,} refused, no memory taken",
    )


def test_structure_records_and_states(record):
    count = cases(100, 3000)
    seen = {"refused": 0}
    model = small()
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5, measure_plans=False))
    known, state = structure(model), sparsifier.state_dict()

    @settings(max_examples=count, **QUIET)
    @given(st.booleans(), st.integers(0, 20), VALUES, st.booleans())
    def run(of_state, which, value, inside):
        if of_state:
            fresh = sparsify_(small(), SparsityConfig(block_size=4, rank=2, target_sparsity=0.5, measure_plans=False))
            seen["refused"] += refused(fresh.load_state_dict, {**state, sorted(state)[which % len(state)]: value})
            return
        changed = json.loads(json.dumps(known))
        inner = changed["layers"]["0"] if inside else changed
        inner[sorted(inner)[which % len(inner)]] = value
        seen["refused"] += refused(apply_structure_, small(), changed)

    run()
    assert seen["refused"] > count / 4
    record("wrong states and structure records", f"{count:,} with one value of any kind", f"{seen['refused']:,} refused")


class Odd(nn.Module):
    """A model of odd parts."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def part(kind: str, out: int, into: int) -> nn.Module:
    if kind == "nan":
        layer = nn.Linear(into, out)
        nn.init.constant_(layer.weight, float("nan"))
        return layer
    makers = {
        "linear": lambda: nn.Linear(into, out),
        "meta": lambda: nn.Linear(into, out, device="meta"),
        "lazy": lambda: nn.LazyLinear(out),
        "conv": lambda: nn.Conv2d(into, out, 3),
        "grouped": lambda: nn.Conv1d(into, into * out, 3, groups=into),
        "attention": lambda: nn.MultiheadAttention(4 * out, 4),
        "embedding": lambda: nn.Embedding(into, out),
        "subclass": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(into, out),
        "half": lambda: nn.Linear(into, out).half(),
        "nested": lambda: nn.Sequential(nn.Linear(into, out), nn.ReLU()),
        "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(into, out)),
    }
    return makers[kind]()


KINDS = ["linear", "nan", "meta", "lazy", "conv", "grouped", "attention", "embedding", "subclass", "half", "nested", "spectral"]
METHODS = ["two-phase", "kron-l1", "group-lasso", "magnitude", "rigl", "static"]


def test_sparsify_odd_models(record):
    count = cases(100, 3000)
    seen = {"refused": 0}

    @settings(max_examples=count, **QUIET)
    @given(
        st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 24), st.integers(1, 24)), max_size=4),
        st.sampled_from(METHODS),
        st.sampled_from(["1", "2x3", "4", "16", "64"]),
        st.floats(0, 0.99),
        st.booleans(),
        st.sampled_from(["dense", "nearest"]),
        st.sampled_from([(), ("parts.0",), ("re:parts.*",), ("re:(",), ("type:Linear",)]),
    )
    def run(parts, method, block, sparsity, tied, mismatch, exclude):
        model = Odd([part(*each) for each in parts])
        if tied and len(parts) > 1:
            model.parts.append(model.parts[0])
        before = dict(model.named_modules())

        def attempt() -> None:
            chosen = SparsityConfig(
                method=method,
                block_size=block,
                target_sparsity=sparsity,
                on_mismatch=mismatch,
                exclude=exclude,
                convolutions=True,
            )
            sparsify_(model, chosen)

        if refused(attempt):
            seen["refused"] += 1
            assert dict(model.named_modules()) == before

    run()
    record(
        "odd models",
        f"{count:,} of random layers, some tied, lazy, on no device or not finite",
        f"{seen['refused']:,} refused, the model left as it was",
    )


def test_export_with_any_example(record):
    count = cases(60, 1500)
    seen = {"refused": 0}
    model = small()
    sparsify_(model, SparsityConfig(block_size=4, method="static", target_sparsity=0.5))
    shapes = st.lists(st.integers(0, 20), max_size=4)
    tensors = st.builds(
        lambda shape, kind: torch.zeros(shape, dtype=kind), shapes, st.sampled_from([torch.float32, torch.int64, torch.bool])
    )
    examples = st.one_of(
        tensors, VALUES, st.tuples(tensors), st.dictionaries(st.sampled_from(["input", "x"]), tensors, max_size=2)
    )

    @settings(max_examples=count, **QUIET)
    @given(examples, st.sampled_from(["auto", "dense", "packed", "bsr", "factored", "none"]))
    def run(example, form):
        seen["refused"] += refused(export, model, example, form=form, slim=False)

    run()
    assert seen["refused"] > count / 4
    record(
        "export with any example",
        f"{count:,} tensors and values of any shape and kind",
        f"{seen['refused']:,} refused with one sentence",
    )
