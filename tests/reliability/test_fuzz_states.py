"""Damaged states of a training: refused, model, optimiser and sparsifier as they were; or the training goes on and ends right."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import check_layers_agree
from tests.reliability.fuzzing import QUIET, VALUES, Tally, at_most, bits, cases, everything, refused, small
from torch import nn

from kronblocks import SparsityConfig, parameter_groups, sparsify_
from kronblocks.nn.base import BlockLayer
from kronblocks.ops import BlockSize
from kronblocks.surgery import apply_structure_, structure

pytestmark = pytest.mark.slow

STEPS = 24
TRAININGS = {
    "two-phase before the lift": ("two-phase", 3),
    "two-phase after the lift": ("two-phase", 9),
    "magnitude": ("magnitude", 6),
    "rigl": ("rigl", 6),
}


class Training:
    """A small model, its sparsifier and its optimiser, attached or not yet."""

    def __init__(self, method: str, attached: bool = True) -> None:
        self.model = small()
        self.sparsifier = sparsify_(self.model, SparsityConfig(method=method, block_size=4, target_sparsity=0.5))
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, lr=1e-2))
        if attached:
            self.attach()

    def attach(self) -> None:
        self.sparsifier.attach(self.optimizer, total_steps=STEPS)

    def steps(self, number: int) -> None:
        for _ in range(number):
            loss = self.model(torch.randn(8, 16)).square().mean() + self.sparsifier.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def all(self) -> Any:
        """Whatever a refused load may not change."""
        return everything(self.model, self.sparsifier.state_dict(), self.optimizer.state_dict(), self.optimizer.param_groups)

    def go_on(self, from_: Training) -> None:
        """Load the rest of another training, and train to the end."""
        self.model.load_state_dict(from_.model.state_dict())
        if not self.sparsifier.schedule:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model, lr=1e-2))
            self.attach()
        self.optimizer.load_state_dict(from_.optimizer.state_dict())
        self.steps(STEPS - from_.sparsifier.step)


@pytest.fixture(scope="module")
def halves() -> dict[str, Training]:
    """Trainings that have come some way."""
    made = {name: Training(method) for name, (method, _) in TRAININGS.items()}
    for name, training in made.items():
        training.steps(TRAININGS[name][1])
    return made


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each entry of nested tables and lists."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [place for key, each in inner for place in ((*above, key), *places(each, (*above, key)))]


def changed(state: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return state


def check_structure(taken: Any, given_record: Any) -> None:
    """A model has just the structure that a record gives, with a layer's own default where that says None."""
    assert {**taken, "layers": None} == {**given_record, "layers": None}
    assert taken["layers"].keys() == given_record["layers"].keys()
    for name, entry in given_record["layers"].items():
        for key, value in entry.items():
            wanted = str(BlockSize.parse(value)) if key == "block_size" else value
            assert wanted is None or taken["layers"][name][key] == wanted, (name, key, value)


def test_states(halves, record):
    tally, seen = Tally(), Counter()

    @settings(max_examples=cases(120, 3000), **QUIET)
    @given(st.sampled_from(list(TRAININGS)), st.integers(0, 200), VALUES | st.integers(0, 32), st.booleans())
    def run(name, which, value, attached):
        half = halves[name]
        state = half.sparsifier.state_dict()
        where = places(state)
        place = where[which % len(where)]
        given_state = changed(state, place, value)
        again = Training(TRAININGS[name][0], attached)
        before = again.all()
        if refused(again.sparsifier.load_state_dict, given_state):
            tally.refused += 1
            assert again.all() == before, place
            return
        tally.accepted += 1
        taken = again.sparsifier.state_dict()
        for part in ("rule", "step", "plans", "masks"):
            assert bits(taken[part]) == bits(given_state[part]), (part, place, value)
        check_structure(taken["structure"], given_state["structure"])
        check_layers_agree(again.model)
        if place[0] not in ("structure", "step", "total_steps"):  # right in themselves, but not of the weights that follow
            seen["went on"] += 1
            again.go_on(half)
            assert again.sparsifier.sparsity == 0.5, place
            check_layers_agree(again.model)

    with at_most(256):
        run()
    tally.check(1 / 20)
    assert seen["went on"] >= tally.accepted / 4
    record(
        "damaged states of a training",
        f"{tally.tried:,} with one value of any kind in any place, of methods with and without a lift",
        f"{tally.refused:,} refused, with model, optimiser and sparsifier as they were, bit for bit; the others were loaded as "
        f"they are, and from {seen['went on']:,} of these, which name the same steps and layers, training went on to exactly the "
        "sparsity asked for",
    )


def test_structure_records(halves, record):
    tally = Tally()

    @settings(max_examples=cases(120, 3000), **QUIET)
    @given(st.sampled_from(["two-phase before the lift", "rigl"]), st.integers(0, 200), VALUES | st.integers(0, 64))
    def run(name, which, value):
        known = structure(halves[name].model)
        where = places(known)
        place = where[which % len(where)]
        given_record = json.loads(json.dumps(changed(known, place, value)))
        model = small()
        before = everything(model)
        if refused(apply_structure_, model, given_record):
            tally.refused += 1
            assert everything(model) == before, place
            return
        tally.accepted += 1
        check_structure(structure(model), given_record)
        check_layers_agree(model)
        check_untouched(model, given_record["layers"])

    with at_most(256):
        run()
    tally.check(1 / 50)
    record(
        "damaged structure records",
        f"{tally.tried:,} with one value of any kind in any place",
        f"{tally.refused:,} refused, the model as it was, bit for bit; the other {tally.accepted:,} gave layers of just that "
        "structure, and left the rest as it was",
    )


def check_untouched(model: nn.Sequential, layers: Any) -> None:
    """Biases stay the model's own, and so does each layer that the record does not name."""
    for name, old in small().named_children():
        new = model.get_submodule(name)
        assert isinstance(new, BlockLayer) is (name in layers)
        if name not in layers:
            assert bits(new.state_dict()) == bits(old.state_dict())
        elif isinstance(new.bias, torch.Tensor):
            assert bits(new.bias) == bits(old.bias)
