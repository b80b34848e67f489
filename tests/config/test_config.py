"""Configs: round trips, and one clear error for every wrong value."""

from __future__ import annotations

import json

import pytest
from torch import nn

from kronblocks import KronblocksError, LayerOverride, PenaltyConfig, ScheduleConfig, SparsityConfig
from kronblocks.config import RankChoice

FULL = SparsityConfig(
    method="kron-l1",
    block_size=(16, 4),
    rank=2,
    target_sparsity=0.8,
    layers=("encoder.*", "re:.*fc[12]"),
    exclude=("type:Head",),
    heads=("encoder.fc2",),
    overrides={"encoder.0": LayerOverride(block_size="8x2", rank=1, tile_groups=1)},
    frozen="sparsify",
    on_mismatch="nearest",
    tile_groups=2,
    init="nearest",
    gate=True,
    scope="layer",
    schedule=ScheduleConfig(start=0.1, end=0.6, shape="staircase", update_every=7, stages=3),
    penalty=PenaltyConfig(strength=0.3, growth=2.0),
    rows=64,
    measure_plans=False,
    convolutions=True,
)
OTHERS = (  # what kron-l1 in its gradient form has not got
    SparsityConfig(schedule=ScheduleConfig(lift_at=0.5)),
    SparsityConfig(method="kron-l1", penalty=PenaltyConfig(form="proximal")),
    SparsityConfig(method="elastic-group-lasso", penalty=PenaltyConfig(ridge=2.0)),
    SparsityConfig(method="rigl", regrow=0.2, storage="dense", distribution="uniform"),
    SparsityConfig(score="taylor"),
)


@pytest.mark.parametrize("config", [SparsityConfig(), FULL, *OTHERS])
def test_json_round_trip(config):
    assert SparsityConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["version"] == 1


def test_every_setting_of_the_full_configs_differs_from_the_default():
    """So that the round trip above cannot pass by losing one."""
    default, *full = (config.to_dict() for config in (SparsityConfig(), FULL, *OTHERS))
    assert [name for name in default if all(default[name] == each[name] for each in full)] == ["version"]
    for part in ("schedule", "penalty"):
        assert [name for name in default[part] if all(default[part][name] == each[part][name] for each in full)] == []


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(FULL.to_json())
    (tmp_path / "a.toml").write_text('block_size = "8x2"\nlayers = ["fc*"]\n[schedule]\nend = 0.7\n')
    assert SparsityConfig.from_file(tmp_path / "a.json") == FULL
    read = SparsityConfig.from_file(tmp_path / "a.toml")
    assert str(read.block) == "8x2" and read.layers == ("fc*",) and read.schedule.end == 0.7
    for name, text in (("b.json", "{"), ("b.toml", "= 3")):
        (tmp_path / name).write_text(text)
        with pytest.raises(KronblocksError, match="config"):
            SparsityConfig.from_file(tmp_path / name)
    with pytest.raises(KronblocksError, match="cannot read"):
        SparsityConfig.from_file(tmp_path / "missing.json")


def test_types_become_patterns():
    assert SparsityConfig(layers=(nn.TransformerEncoderLayer, "fc")).layers == ("type:TransformerEncoderLayer", "fc")
    assert SparsityConfig(exclude=nn.Bilinear).exclude == ("type:Bilinear",)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "two_phase"}, "'two-phase'"),
        ({"block_size": "16y4"}, "16x4"),
        ({"block_size": 0}, "at least 1"),
        ({"rank": 0}, "whole number from 1"),
        ({"rank": 2.5}, "whole number from 1"),
        ({"rank": True}, "whole number from 1"),
        ({"target_sparsity": 1.0}, "0.9 means 90%"),
        ({"target_sparsity": -0.1}, "0.9 means 90%"),
        ({"target_sparsity": 90}, "0.9 means 90%"),
        ({"target_sparsity": float("nan")}, "0.9 means 90%"),
        ({"layers": 7}, "patterns"),
        ({"on_mismatch": "pad"}, "'nearest'"),
        ({"tile_groups": "rows"}, "per-row"),
        ({"tile_groups": 0}, "per-row"),
        ({"init": "zeros"}, "'spectral'"),
        ({"scope": "model"}, "'layer'"),
        ({"rows": 0}, "rows"),
        ({"overrides": {"fc": {"rank": 2}}}, "LayerOverride"),
        ({"method": "magnitude", "init": "random"}, "has no init"),
        ({"penalty": PenaltyConfig(strength=1.0)}, "has no penalty"),
        ({"method": "magnitude", "rank": 2}, "has no rank: leave rank=None"),
        ({"method": "static", "overrides": {"fc": LayerOverride(rank=2)}}, r"overrides\['fc'\] can set block_size only"),
        ({"method": "kron-l1", "schedule": ScheduleConfig(lift_at=0.5)}, "never lifted"),
        ({"method": "group-lasso", "penalty": PenaltyConfig(growth=2.0)}, "does not grow"),
        ({"method": "kron-l1", "penalty": PenaltyConfig(form="proximal", growth=2.0)}, "does not grow"),
        ({"measure_plans": "yes"}, "True or False"),
        ({"gate": 1}, "True, False or None"),
        ({"regrow": 1.0}, "share of the live blocks"),
        ({"score": "norms"}, "'taylor'"),
        ({"score": "gate"}, "set gate=True"),
        ({"schedule": ScheduleConfig(stages=3)}, "for a staircase"),
        ({"method": "magnitude", "schedule": ScheduleConfig(shape="linear", stages=3)}, "for a staircase, but .* linear here"),
        ({"method": "kron-l1", "regrow": 0.1}, "brings no dead blocks back"),
        ({"method": "group-lasso", "score": "norm"}, "no choice of score"),
        ({"method": "group-lasso", "penalty": PenaltyConfig(ridge=2.0)}, "'elastic-group-lasso'"),
        ({"method": "iterative", "schedule": ScheduleConfig(shape="cubic")}, "use method 'magnitude'"),
        ({"method": "rigl", "schedule": ScheduleConfig(shape="cubic")}, "sparse from the first step"),
        ({"method": "rigl", "scope": "layer"}, "has a distribution="),
        ({"method": "magnitude", "distribution": "erk"}, "has no distribution"),
        ({"method": "group-lasso", "storage": "packed"}, "no choice of storage"),
        ({"method": "magnitude", "init": "nearest"}, "starts from the weights that are there"),
        ({"method": "rigl", "init": "spectral"}, "is for factors"),
        ({"rank": RankChoice(max_error=0.1)}, "set init='nearest'"),
        ({"method": "dense", "regrow": 0.1}, "brings no dead blocks back"),
    ],
)
def test_wrong_values_say_what_to_write(settings, says):
    with pytest.raises(KronblocksError, match=says):
        SparsityConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (ScheduleConfig, {"start": 1.0}, "schedule.start"),
        (ScheduleConfig, {"end": 1.5}, "schedule.end"),
        (ScheduleConfig, {"start": 0.5, "end": 0.5}, "above"),
        (ScheduleConfig, {"lift_at": -0.1}, "schedule.lift_at"),
        (ScheduleConfig, {"shape": "square"}, "'cubic'"),
        (ScheduleConfig, {"update_every": 0}, "update_every"),
        (ScheduleConfig, {"stages": 0}, "stages"),
        (PenaltyConfig, {"ridge": -1.0}, "penalty.ridge"),
        (PenaltyConfig, {"strength": -1.0}, "penalty.strength"),
        (PenaltyConfig, {"growth": float("inf")}, "penalty.growth"),
        (PenaltyConfig, {"form": "prox"}, "'proximal'"),
        (LayerOverride, {"rank": 0}, "rank"),
        (LayerOverride, {"block_size": "x"}, "block size"),
    ],
)
def test_wrong_parts_say_what_to_write(kind, settings, says):
    with pytest.raises(KronblocksError, match=says):
        kind(**settings)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"block": 16}, "no setting 'block'"),
        ({"schedule": {"finish": 1}}, "no setting 'finish'"),
        ({"schedule": 3}, "table"),
        ({"overrides": {"a": {"size": 1}}}, "no setting 'size'"),
        ([1], "table"),
    ],
)
def test_foreign_dictionaries_are_refused(data, says):
    with pytest.raises(KronblocksError, match=says):
        SparsityConfig.from_dict(data)


@pytest.mark.parametrize("settings", [{"schedule": {"end": 0.3}}, {"penalty": None}, {"overrides": [1]}])
def test_wrong_kinds_of_parts_are_one_sentence(settings):
    with pytest.raises(KronblocksError, match=f"{next(iter(settings))} is a"):
        SparsityConfig(**settings)
