"""What a search found: every candidate's path, and why it lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kronblocks.config.sparsity import LayerOverride, SparsityConfig
from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.tables import text_table

REPORT_VERSION = 1


@dataclass
class Rung:
    """A candidate's training in one round."""

    steps: int
    loss: float  # held-out, mean over examples
    gap: float  # to the best of the round, mean over examples
    gap_error: float  # standard error of that mean
    seconds_per_step: float
    cost: float  # what the goal counts, in seconds

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON: None for the infinite loss of a candidate that diverged."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rung:
        """Read what `to_dict` gave."""
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in data.items()}
        return cls(**values)


@dataclass
class Path:
    """A candidate's way through the search.

    Args:
        block: its size.
        sizes: what each layer takes of it.
        estimated_seconds: of a step, by the counts.
        energy: see `kronblocks.search.candidates.Candidate`.
        rungs: a round each.
        history: norm of its weights over the steps of each round.
        why: lost, or won.
        gap: to the best over all rounds it was in, as a share of the best one's held-out loss; None where it was not compared.
        gap_error: standard error of that.
    """

    block: BlockSize
    sizes: dict[str, str]
    estimated_seconds: float
    energy: float
    rungs: list[Rung] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    why: str = ""
    gap: float | None = None
    gap_error: float | None = None

    def mean(self, name: str) -> float:
        """Mean over its rounds, which count by their steps, of what a rung has under a name."""
        return sum(rung.steps * getattr(rung, name) for rung in self.rungs) / sum(rung.steps for rung in self.rungs)

    def cells(self) -> list[str]:
        """What decided, for a table: held-out loss and gap to the best, milliseconds a step, means over rounds; steps of each."""
        if not self.rungs:
            return [""] * 4
        gap = "" if self.gap is None or self.gap_error is None else percent(self.gap, self.gap_error)
        steps = " + ".join(str(rung.steps) for rung in self.rungs)
        return [f"{self.mean('loss'):.4f}", gap, f"{1e3 * self.mean('seconds_per_step'):.2f}", steps]


@dataclass
class SearchReport:
    """All candidates of a search and the winner. Print it for a table.

    Args:
        criterion: how they were judged.
        goal: what counted; by halving, among candidates that lose nothing.
        paths: the candidates, by area.
        chosen: the block size of each layer.
        winner: the winning candidate's size; None where layers got different ones.
        seconds: that the search took.
        steps: training steps that were made, over all candidates.
    """

    criterion: str
    goal: str
    paths: list[Path]
    chosen: dict[str, str]
    winner: BlockSize | None
    seconds: float
    steps: int

    def config(self, config: SparsityConfig) -> SparsityConfig:
        """A config with the block sizes that were found."""
        if self.winner is not None:
            return dataclasses.replace(config, block_size=self.winner, on_mismatch="nearest")
        overrides = {f"re:{_escaped(name)}": LayerOverride(block_size=size) for name, size in self.chosen.items()}
        return dataclasses.replace(config, overrides={**config.overrides, **overrides}, on_mismatch="nearest")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        paths = [
            {**dataclasses.asdict(path), "block": str(path.block), "rungs": [rung.to_dict() for rung in path.rungs]}
            for path in self.paths
        ]
        winner = None if self.winner is None else str(self.winner)
        return {"version": REPORT_VERSION, **dataclasses.asdict(self), "paths": paths, "winner": winner}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchReport:
        """Read what `to_dict` gave.

        Raises:
            KronblocksError: it is of another version, or no report.
        """
        values = dict(data)
        if values.pop("version", None) != REPORT_VERSION:
            raise KronblocksError(f"this is no search report of version {REPORT_VERSION}: search again")
        try:
            paths = [
                Path(
                    **{**each, "block": BlockSize.parse(each["block"]), "rungs": [Rung.from_dict(rung) for rung in each["rungs"]]}
                )
                for each in values.pop("paths")
            ]
            winner = values.pop("winner")
            return cls(**values, paths=paths, winner=None if winner is None else BlockSize.parse(winner))
        except (KeyError, TypeError, AttributeError) as error:
            raise KronblocksError(f"the search report is damaged ({error!r}): search again") from error

    def __str__(self) -> str:
        rows = [["block", "mean held-out loss", "gap to the best", "ms a step", "steps", ""]]
        rows += [[str(path.block), *path.cells(), path.why] for path in self.paths]
        return text_table(rows)


def percent(gap: float, error: float) -> str:
    """A gap to the best with its standard error, both given as shares."""
    return f"{100 * gap:+.1f} ± {100 * error:.1f}%"


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
