"""Settings of any kind: refused with one sentence, or kept as they were given, and a training with them ends as they say."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import check_layers_agree
from tests.reliability.fuzzing import (
    QUIET,
    VALUES,
    Tally,
    cases,
    check_sparsity,
    everything,
    refused,
    small,
)

from kronblocks import SparsityConfig, densify_, parameter_groups, sparsify_
from kronblocks.core.errors import Diverged
from kronblocks.nn.base import BlockLayer
from kronblocks.ops import BlockSize

pytestmark = pytest.mark.slow

STEPS = 8
METHODS = ("two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "magnitude", "iterative", "rigl", "static", "dense")
SIZES = st.sampled_from([4, 8, "4x4", "2x8", [4, 2], "16x4", 3, "auto"])


def table(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A dict of some of these names, with values that could be right, and now and then with any."""
    entry = st.sampled_from(sorted(fields)).flatmap(lambda name: st.tuples(st.just(name), fields[name] | fields[name] | VALUES))
    return st.lists(entry, max_size=3).map(dict)


OVERRIDE = table(block_size=SIZES, rank=st.sampled_from([None, 1, 3]), tile_groups=st.sampled_from([None, 1, "per-row"]))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "version": st.just(1),
    "method": st.sampled_from(METHODS),
    "block_size": SIZES,
    "rank": st.sampled_from([None, 1, 2, 5]) | table(max_error=st.floats(0.05, 0.9), max_parameters=st.floats(0.1, 2)),
    "target_sparsity": st.floats(0, 0.95),
    "layers": st.sampled_from(["*", ["0"], ["re:[02]"], ["type:Linear"], ["0", "2"], ["missing"]]),
    "exclude": st.sampled_from([[], ["2"], ["re:0"], ["type:ReLU"], ["*"]]),
    "heads": st.sampled_from([None, [], ["2"], ["0", "2"], ["re:.*"], ["type:Linear"], ["missing"]]),
    "overrides": st.dictionaries(st.sampled_from(["0", "2", "re:.*", "missing"]), OVERRIDE, max_size=2),
    "frozen": st.sampled_from(["keep", "sparsify"]),
    "convolutions": st.booleans(),
    "on_mismatch": st.sampled_from(["dense", "nearest"]),
    "tile_groups": st.sampled_from([None, "per-row", 1, 2, 5]),
    "gate": st.sampled_from([None, True, False]),
    "init": st.sampled_from([None, "random", "spectral", "nearest"]),
    "score": st.sampled_from([None, "norm", "relative", "gate", "taylor"]),
    "regrow": st.sampled_from([None, 0.0, 0.3]),
    "scope": st.sampled_from(["global", "layer"]),
    "distribution": st.sampled_from([None, "erk", "uniform"]),
    "storage": st.sampled_from([None, "dense", "packed"]),
    "schedule": table(
        start=st.floats(0, 0.6),
        end=st.floats(0.3, 1),
        lift_at=st.floats(0, 1),
        shape=st.sampled_from([None, "cubic", "linear", "staircase"]),
        update_every=st.integers(1, 9),
        stages=st.integers(1, 4),
    ),
    "penalty": table(
        strength=st.floats(0, 3), growth=st.floats(0, 3), form=st.sampled_from(["gradient", "proximal"]), ridge=st.floats(0, 3)
    ),
    "rows": st.sampled_from([None, 1, 32]),
    "measure_plans": st.booleans(),
}
CHANGES = table(**FIELDS)


def test_every_setting_is_tried():
    assert FIELDS.keys() == SparsityConfig().to_dict().keys()


def test_config(record):
    configs, ended = Tally(), Counter()

    @settings(max_examples=cases(150, 4000), **QUIET)
    @given(st.sampled_from(METHODS), st.sampled_from([4, 4, 4, 3, 16]), CHANGES, st.sampled_from(["text", "table", "call"]))
    def run(method, block, changes, given_as):
        changes = {"method": method, "block_size": block, "target_sparsity": 0.5, **changes}
        data = {**SparsityConfig().to_dict(), **changes}
        if given_as == "call":
            data = {name: value for name, value in changes.items() if name != "version"}
        makers = {"text": lambda: SparsityConfig.from_json(json.dumps(data)), "table": lambda: SparsityConfig.from_dict(data)}
        made = []
        if refused(lambda: made.append(makers.get(given_as, lambda: SparsityConfig(**data))())):
            configs.refused += 1
            return
        configs.accepted += 1
        check_kept(made[0], data)
        ended[trains_as_it_says(made[0])] += 1

    run()
    configs.check(1 / 6)
    assert min(ended["trained"], 3 * ended["refused"]) >= configs.accepted / 4, ended
    diverged = f"; {ended['diverged']:,} with enormous penalties were told that they diverge" if ended["diverged"] else ""
    record(
        "wrong settings",
        f"{configs.tried:,} configs with right values and values of any kind",
        f"{configs.refused:,} refused with one sentence; the others hold what was given, and the same after a trip through "
        f"JSON. Of these {ended['refused']:,} did not suit the model and left it as it was, bit for bit; {ended['trained']:,} "
        f"trained it to the sparsity asked for, to the block{diverged}",
    )


def check_kept(config: SparsityConfig, given_: dict[str, Any]) -> None:
    """The config holds what was given, and is the same after a trip through JSON."""
    assert SparsityConfig.from_json(config.to_json()) == config == SparsityConfig.from_dict(config.to_dict())
    kept = config.to_dict()
    for name, value in given_.items():
        assert holds(kept[name], value, name), (name, value, kept[name])


def holds(kept: Any, value: Any, name: str) -> bool:
    """Whether a plain value is what was given for it: the whole of it, or of a table each entry."""
    if isinstance(value, dict):
        return all(holds(kept[key], each, key) for key, each in value.items())
    if name == "block_size" and value not in (None, "auto"):
        return kept == str(BlockSize.parse(tuple(value) if isinstance(value, list) else value))
    if name in ("layers", "exclude", "heads") and isinstance(value, str):
        return kept == [value]
    return kept == (list(value) if isinstance(value, tuple) else value)


def trains_as_it_says(config: SparsityConfig) -> Literal["refused", "trained", "diverged"]:
    """Train with a config, which may not suit the model: that is then as it was."""
    model = small()
    before = everything(model)
    made = []
    if refused(lambda: made.append(sparsify_(model, config))):
        assert everything(model) == before
        return "refused"
    (sparsifier,) = made
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-3, weight_decay=0.0))
    before = everything(model, optimizer.state_dict())
    if refused(sparsifier.attach, optimizer, total_steps=STEPS):  # a schedule that is too short for these steps
        assert everything(model, optimizer.state_dict()) == before
        return "refused"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in range(STEPS):
                loss = model(torch.randn(16, 16)).square().mean() + sparsifier.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        except Diverged:
            assert max(config.penalty.strength or 0, config.penalty.growth, config.penalty.ridge) > 1e3
            return "diverged"
    check_sparsity(model, sparsifier, config.target_sparsity, config.scope)
    check_layers_agree(model)
    x, dense = torch.randn(4, 16), model
    wanted = model(x)
    densify_(dense)
    assert not any(isinstance(layer, BlockLayer) for layer in dense.modules())
    assert torch.allclose(dense(x), wanted, rtol=1e-4, atol=1e-5)
    return "trained"
