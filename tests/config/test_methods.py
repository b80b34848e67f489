"""The table of methods: every default is filled in, and a new method is one rule and one entry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.helpers import mlp, trained

from kronblocks import KronblocksError, PenaltyConfig, Rule, ScheduleConfig, SparsityConfig
from kronblocks.algorithms.rules.base import cut
from kronblocks.config import RankChoice
from kronblocks.config.methods import METHODS, Choices, MethodSpec, register_method, spec_of
from kronblocks_lab.training.recipes import OF_SOME_METHODS, RECIPES, has_setting, recipe_of
from kronblocks_lab.training.settings import TrainConfig


class Reversed(Rule):
    """Kills the strongest blocks first."""

    def propose(self, scores, growth_scores, state, ctx):
        return cut([score.max() - score for score in scores], ctx, ctx.sparsity), state


@pytest.fixture
def reversed_method():
    name = "reversed"
    register_method(name, MethodSpec(lambda choices: Reversed(), frozenset({"scope", "schedule.shape"}), Choices(end=0.8)))
    yield name
    del METHODS[name]


def test_a_registered_method_trains_and_is_saved_by_its_name(reversed_method):
    config = SparsityConfig(method=reversed_method, block_size=4, target_sparsity=0.5, schedule=ScheduleConfig(update_every=2))
    config = SparsityConfig.from_json(config.to_json())
    sparsifier = trained(mlp(32, 32, 8), config)
    assert isinstance(sparsifier.rule, Reversed)
    assert sparsifier.schedule is not None and sparsifier.schedule.end_step == 32  # its own default
    assert sparsifier.sparsity == 0.5
    assert recipe_of(reversed_method).factor_lr_scale == 1.0


def test_a_registered_method_refuses_settings_that_it_has_not_got(reversed_method):
    for setting in ({"rank": 2}, {"score": "taylor"}, {"storage": "packed"}, {"penalty": PenaltyConfig(strength=2.0)}):
        with pytest.raises(KronblocksError, match=reversed_method):
            SparsityConfig(method=reversed_method, **setting)


def test_names_are_registered_once():
    with pytest.raises(KronblocksError, match="'rigl' is a method already"):
        register_method("rigl", METHODS["rigl"])
    with pytest.raises(KronblocksError, match="is a MethodSpec"):
        register_method("mine", Reversed)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KronblocksError, match="write one of 'two-phase'"):
        spec_of("mine")


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_config_has_no_none_and_its_defaults_are_the_methods(method):
    resolved, own = SparsityConfig(method=method).resolved(), spec_of(method).defaults
    assert None not in dataclasses.asdict(resolved).values()
    derived = {"strength": "scheduled" if own.form == "proximal" else 1.0}
    derived["score"] = "gate" if method == "kron-l1" else own.score  # which the rule decides
    assert resolved == dataclasses.replace(own, **derived)


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        (SparsityConfig(rank=3, tile_groups=2, gate=True, init="nearest", score="gate", regrow=0.1), {"rank": 3, "gate": True}),
        (SparsityConfig(rank=RankChoice(max_error=0.5), init="nearest"), {"rank": RankChoice(max_error=0.5), "init": "nearest"}),
        (SparsityConfig(method="rigl", distribution="uniform", storage="dense"), {"distribution": "uniform", "storage": "dense"}),
        (SparsityConfig(schedule=ScheduleConfig(end=0.9, shape="linear")), {"end": 0.9, "shape": "linear", "storage": "factors"}),
        (
            SparsityConfig(method="group-lasso", penalty=PenaltyConfig(form="gradient", growth=2.0)),
            {"strength": 1.0, "growth": 2.0},
        ),
        (SparsityConfig(method="kron-l1", penalty=PenaltyConfig(form="proximal")), {"strength": "scheduled", "score": "gate"}),
        (SparsityConfig(method="kron-l1", penalty=PenaltyConfig(strength=0.0)), {"strength": 0.0}),
    ],
)
def test_what_is_set_counts(config, chosen):
    resolved = dataclasses.asdict(config.resolved())
    assert {name: getattr(config.resolved(), name) for name in chosen} == chosen
    assert None not in resolved.values()


def test_the_score_of_a_config_is_that_of_its_rule():
    for method in METHODS:
        config = SparsityConfig(method=method)
        rule = config.rule()
        assert (rule is None) == (method == "dense")
        assert rule is None or rule.score == config.resolved().score


def test_command_lines_have_the_settings_of_a_config_under_the_same_names_and_defaults():
    line, config = ({f.name: f for f in dataclasses.fields(kind)} for kind in (TrainConfig, SparsityConfig))
    assert config.keys() - line.keys() == {  # what no command line can give, but target_sparsity, which is --sparsity there
        *("target_sparsity", "layers", "overrides", "convolutions", "frozen", "rows")
    }
    other = {name for name in config.keys() & line.keys() if config[name].default != line[name].default}
    # digits of 10 outputs have no blocks of 16 rows; the default depends on the model; heads are of attention there
    assert other == {"on_mismatch", "exclude", "heads"}
    assert TrainConfig(out=Path("x")).sparsity_config() == SparsityConfig(on_mismatch="nearest")


def test_the_laboratory_knows_recipes_of_methods_that_there_are():
    assert set(RECIPES) <= set(METHODS)
    assert {name for name in OF_SOME_METHODS if not any(has_setting(method, name) for method in METHODS)} == set()


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("static", MethodSpec(lambda choices: Reversed()), "use another one"),
        (3, MethodSpec(lambda choices: Reversed()), "use another one"),
        ("new", MethodSpec(Reversed), "rule=Reversed is a class"),
        ("new", MethodSpec(lambda choices: None), "NoneType has no propose"),
        ("new", MethodSpec(lambda choices: Reversed(), frozenset({"scopes"})), "no setting 'scopes'"),
        ("new", MethodSpec(lambda choices: Reversed(), defaults=Choices(storage="sparse")), "storage"),
        ("new", MethodSpec(lambda choices: Reversed(), frozenset({"schedule.lift_at"})), "for factors"),
    ],
)
def test_a_method_that_no_training_could_use_is_refused(name, spec, words):
    before = set(METHODS)
    with pytest.raises(KronblocksError, match=words):
        register_method(name, spec)
    assert set(METHODS) == before
