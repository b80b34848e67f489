"""SearchReport: the result of a search, with every candidate's path and why it lost."""

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
    """The result of a candidate in one round."""

    steps: int
    loss: float  # held-out, mean over examples
    gap: float  # to the best of the round, mean over examples
    gap_error: float  # standard error of the gap
    seconds_per_step: float
    cost: float  # by the goal, in seconds

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON; an infinite loss (diverged) is None."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rung:
        """Read what `to_dict` gave."""
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in data.items()}
        return cls(**values)


@dataclass
class Path:
    """A candidate's results in all rounds.

    Args:
        block: its size.
        sizes: the nearest size in each layer.
        estimated_seconds: of a step, by the counts.
        energy: see `kronblocks.search.candidates.Candidate`.
        rungs: the result of each round.
        history: norm of its weights over the steps of each round.
        why: why it lost or won.
        gap: to the best over its rounds, as a share of the best held-out loss; None: not compared.
        gap_error: standard error of the gap.
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
        """Mean of a field of its rungs, weighted by the steps of the rounds."""
        return sum(rung.steps * getattr(rung, name) for rung in self.rungs) / sum(rung.steps for rung in self.rungs)

    def cells(self) -> list[str]:
        """Cells for a table: mean held-out loss, gap to the best, milliseconds per step, and the steps of each round."""
        if not self.rungs:
            return [""] * 4
        gap = "" if self.gap is None or self.gap_error is None else percent(self.gap, self.gap_error)
        steps = " + ".join(str(rung.steps) for rung in self.rungs)
        return [f"{self.mean('loss'):.4f}", gap, f"{1e3 * self.mean('seconds_per_step'):.2f}", steps]


@dataclass
class SearchReport:
    """All candidates of a search and the winner. Print it for a table.

    Args:
        criterion: how candidates were judged.
        goal: what was minimised.
        paths: the candidates, by area.
        chosen: the block size of each layer.
        winner: the winning size; None if layers got different ones.
        seconds: duration of the search.
        steps: training steps of all candidates.
    """

    criterion: str
    goal: str
    paths: list[Path]
    chosen: dict[str, str]
    winner: BlockSize | None
    seconds: float
    steps: int

    def config(self, config: SparsityConfig) -> SparsityConfig:
        """The config with the block sizes that were found."""
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
    """A gap and its standard error in percent, both given as shares."""
    return f"{100 * gap:+.1f} ± {100 * error:.1f}%"


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
