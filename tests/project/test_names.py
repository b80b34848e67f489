"""Names are where the design says: few at the top, all in their rooms, and none that hides a module."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest

import kronblocks
import kronblocks_lab

LEFT_THE_TOP = {
    "kronblocks.advice": ["Advice"],
    "kronblocks.algorithms": ["BlockTarget", "RuleContext", "SparsityReport", "SparsitySchedule"],
    "kronblocks.config": ["RankChoice"],
    "kronblocks.core": ["NativeFallbackWarning", "OpenMPConflictWarning", "PerformanceWarning"],
    "kronblocks.deploy": ["Exported"],
    "kronblocks.nn": ["BlockMixtureLinear"],
    "kronblocks.ops": [
        "BlockGrid",
        "BlockIndex",
        "BlockSize",
        "Cost",
        "PlanChoice",
        "Problem",
        "block_norms",
        "canonical_form",
        "choose_plan",
        "cost",
        "kron_linear",
        "kron_weight",
        "nearest_kronecker_sum",
        "packed_linear",
    ],
    "kronblocks.search": ["MixtureConfig", "SearchConfig", "SearchReport", "find_block_size_in_mixture_"],
    "kronblocks.surgery": ["SurgeryReport", "apply_structure_", "lift_", "rewind_", "select", "structure"],
}


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in LEFT_THE_TOP.items() for name in names])
def test_a_name_that_left_the_top_says_where_it_is(room, name):
    with pytest.warns(DeprecationWarning, match=f"write `from {room} import {name}`"):
        before = getattr(kronblocks, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scope: dict[str, object] = {}
        exec(f"from {room} import {name}", scope)
    assert scope[name] is before and name not in kronblocks.__all__
    assert name in importlib.import_module(room).__all__


def test_an_import_of_a_name_that_left_the_top_warns_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        exec("from kronblocks import BlockGrid, lift_", {})
    assert [str(each.message).split()[0] for each in said] == ["kronblocks.BlockGrid", "kronblocks.lift_"]


def test_no_name_left_without_a_word():
    assert set(kronblocks._ROOM_OF) == {name for names in LEFT_THE_TOP.values() for name in names}
    with pytest.raises(AttributeError, match="module 'kronblocks' has no attribute 'sparsity'"):
        kronblocks.sparsity  # noqa: B018


def test_the_top_has_each_of_its_names_from_a_room_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({id(getattr(kronblocks, name)) for name in kronblocks.__all__}) == len(kronblocks.__all__) <= 25


def _packages(top: ModuleType) -> Iterator[ModuleType]:
    yield top
    for each in pkgutil.walk_packages(top.__path__, f"{top.__name__}."):
        if each.ispkg:
            yield importlib.import_module(each.name)


PACKAGES = [package for top in (kronblocks, kronblocks_lab) for package in _packages(top)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_module_and_its_package_share_a_name(package):
    """`import a.b` and `from a import b` give the same thing."""
    modules = {each.name for each in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(getattr(package, "__all__", ()))
    for name in modules & vars(package).keys():
        assert getattr(vars(package)[name], "__name__", "") == f"{package.__name__}.{name}"


def test_all_packages_are_looked_at():
    assert {"kronblocks.surgery", "kronblocks.ops.backends.triton", "kronblocks_lab.commands"} <= {p.__name__ for p in PACKAGES}
