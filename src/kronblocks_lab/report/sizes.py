"""What became of the sizes that `kronblocks compare --try-sizes` tried: the best on validation data, for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json

FILE = "sizes.json"


class Tried(NamedTuple):
    """A size that was tried.

    Args:
        method: that was trained.
        size: as it was written.
        folder: name of the training's folder.
        validation: its quality on validation data at the end.
        steps: that fitted the budget.
        chosen: whether it is the method's best.
    """

    method: str
    size: str
    folder: str
    validation: float | None
    steps: int
    chosen: bool


class Sizes(NamedTuple):
    """All sizes of a comparison, and the seed that they were tried with."""

    seed: int
    measure: str
    tried: tuple[Tried, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `sizes.json`."""
        return {"seed": self.seed, "measure": self.measure, "tried": [each._asdict() for each in self.tried]}


def read_sizes(folder: Path) -> Sizes | None:
    """What a comparison's folder says; None where no sizes were tried.

    Raises:
        KronblocksError: its file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    content = read_json(folder / FILE)
    try:
        return Sizes(content["seed"], str(content["measure"]), tuple(Tried(**each) for each in content["tried"]))
    except (KeyError, TypeError) as error:
        raise KronblocksError(
            f"{folder / FILE} cannot be read ({error!r}): run kronblocks compare with --resume again"
        ) from error


def not_chosen(folder: Path) -> set[Path]:
    """Folders of the trainings in a comparison's folder that a report leaves out: sizes that were not the best."""
    sizes = read_sizes(folder)
    return set() if sizes is None else {folder / each.folder for each in sizes.tried if not each.chosen}


def sizes_of(folders: Sequence[Path]) -> list[Sizes]:
    """The sizes that were tried for trainings in these folders."""
    found = [read_sizes(parent) for parent in dict.fromkeys(folder.parent for folder in folders)]
    return [each for each in found if each is not None]
