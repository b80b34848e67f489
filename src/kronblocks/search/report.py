"""What a search found: every candidate's path, and why it lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kronblocks.blocks import BlockSize
from kronblocks.config import LayerOverride, SparsityConfig
from kronblocks.errors import KronblocksError

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
    """A candidate's way through the search."""

    block: BlockSize
    sizes: dict[str, str]
    estimated_seconds: float
    energy: float
    rungs: list[Rung] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)  # norm of its weights over the steps of each round
    why: str = ""  # lost, or won


@dataclass
class SearchReport:
    """All candidates of a search and the winner. Print it for a table.

    Args:
        criterion: how they were judged.
        goal: what counted beside the held-out loss.
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
        rows = [("block", "held-out loss", "gap to the best", "ms a step", "steps", "")]
        for path in self.paths:
            last = path.rungs[-1] if path.rungs else None
            rows.append(
                (
                    str(path.block),
                    f"{last.loss:.4f}" if last else "",
                    f"{last.gap:+.4f} ± {last.gap_error:.4f}" if last else "",
                    f"{1e3 * last.seconds_per_step:.2f}" if last else "",
                    " + ".join(str(rung.steps) for rung in path.rungs),
                    path.why,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
