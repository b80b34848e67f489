"""Read finished trainings from their folders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks.search.report import SearchReport
from kronblocks_lab.data.text import Source
from kronblocks_lab.report.costs import BYTES, number
from kronblocks_lab.report.samples import are_samples
from kronblocks_lab.report.sizes import FILE as SIZES
from kronblocks_lab.report.sizes import not_chosen
from kronblocks_lab.training.recipes import OF_SOME_METHODS, Course, Recipe, has_setting
from kronblocks_lab.training.settings import RESULT_VERSION

ADVICE = "train again, or leave this folder out"

_NUMBERS = (
    "test_accuracy", "block_sparsity", "live_blocks", "total_blocks", "train_seconds", "peak_memory_bytes",
    "trainable_parameters_start", "trainable_parameters_max", "trainable_parameters_end",
    "training_macs", "inference_macs_per_sample", "threads",
)  # fmt: skip
_PARTS = {
    "config": ("data", "model", "widths", "method", "block_size", "rank", "sparsity", "epochs", "seed", "batch_size"),
    "bytes": BYTES,
    "surgery": ("selected", "left_dense"),
    "versions": (),
    "history": (
        "epoch", "phase", "train_loss", "validation_loss", "validation_accuracy", "block_sparsity", "trainable_parameters",
    ),
    "layers": ("name", "out_features", "in_features", "block_size", "live_blocks", "total_blocks", "sparsity"),
}  # fmt: skip


def _fault(result: Any) -> str | None:
    """What is wrong with the content of a result.json, or None."""
    if not isinstance(result, dict) or result.get("version") != RESULT_VERSION:
        return f"is not a result of version {RESULT_VERSION}"
    for name in _NUMBERS:
        if not math.isfinite(number(result.get(name))):
            return f"has no number for {name}"
    for part, names in _PARTS.items():
        entries = result.get(part) if part in ("history", "layers") else [result.get(part)]
        if not isinstance(entries, list) or not all(isinstance(e, dict) and set(names) <= e.keys() for e in entries):
            return f"lacks {part}, or some of what that should hold ({', '.join(names)})"
    if "search" in result:
        try:
            SearchReport.from_dict(result["search"])
        except KronblocksError as error:
            return f"has a search that cannot be read: {error}"
    if result["config"]["data"] == "text" and not _is_whole_text(result):
        return "does not say which text it is of"
    if "samples" in result and not are_samples(result["samples"]):
        return "has samples of text that cannot be shown"
    if (budget := result.get("budget")) is not None and not _is_budget(budget):
        return "has a budget of time that cannot be read"
    epochs = result["config"]["epochs"] if budget is None else budget["epochs"]
    return None if len(result["history"]) == epochs else "has a history of other epochs than its settings"


def _is_budget(budget: Any) -> bool:
    """Whether it says how long a training was to be, and was."""
    names = ("seconds", "epochs", "steps", "estimated_seconds")
    return isinstance(budget, dict) and all(math.isfinite(number(budget.get(name))) for name in names) and "clock" in budget


def _is_whole_text(result: dict[str, Any]) -> bool:
    """Whether a training on text says on which, and with which sizes."""
    source, config = result.get("source"), result["config"]
    numbers = [config.get(name) for name in ("width", "depth", "heads", "context")]
    numbers += [config.get("steps")] if result.get("budget") is None else []
    if not isinstance(source, dict) or not set(Source._fields) <= source.keys():
        return False
    return all(isinstance(each, int) for each in (*numbers, source["bytes"])) and isinstance(source["sha256"], str)


_SIZES = ("width", "depth", "heads", "context", "patch", "data_label")  # stand in the task's name
_OF_TEXT = ("steps", "text")
_OF_IMAGES = ("image_size", "train_images", "test_images", "fold")  # unset mostly, and not in older results


@dataclass(frozen=True)
class Run:
    """One finished training: its folder, what its result.json holds, and its masks, bool (m1, n1) with True = live."""

    folder: Path
    result: dict[str, Any]
    masks: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read and check a folder; a file that is missing, damaged or of another version is a `KronblocksError`."""
        result, masks = folder / "result.json", folder / "masks.safetensors"
        content = read_json(result)
        if fault := _fault(content):
            raise KronblocksError(f"{result} {fault}: {ADVICE}")
        try:
            return cls(folder, content, {name: mask.astype(bool) for name, mask in load_file(masks).items()})
        except (OSError, SafetensorError) as error:
            raise KronblocksError(f"cannot read {masks} ({error}): {ADVICE}") from error

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the training."""
        return self.result["config"]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def seed(self) -> int:
        """Of the initial weights and the order of the images."""
        return self.config["seed"]

    @property
    def block(self) -> BlockSize:
        """The block size that was asked for, or found."""
        asked = self.config["block_size"]
        return BlockSize.parse(self.result["search"]["winner"] if asked == "auto" else asked)

    @property
    def search(self) -> SearchReport | None:
        """The block-size search that it began with."""
        return SearchReport.from_dict(self.result["search"]) if "search" in self.result else None

    @property
    def label(self) -> str:
        """Method and block size."""
        found = "auto " if self.config["block_size"] == "auto" else ""
        return self.method if self.method == "dense" else f"{self.method} {found}{self.block}"

    @property
    def size(self) -> str:
        """The model's, where it can be chosen."""
        width, depth = self.config.get("width"), self.config.get("depth")
        if width is not None and depth is not None:
            return f"{depth}x{width}"
        return "-".join(map(str, self.config["widths"])) if self.config["model"] == "mlp" else ""

    @property
    def task(self) -> str:
        """What has to be the same for trainings to be compared."""
        c, budget = self.config, self.result.get("budget")
        text = Source(**{name: self.result["source"][name] for name in Source._fields}) if c["data"] == "text" else None
        data = self.result.get("source", {}).get("title", c["data"])
        if budget is not None:  # sizes may differ: what counts is the time
            seconds = f"{budget['seconds']:g} {'CPU s' if budget['clock'] == 'cpu' else 's'} of training"
            given = f", context {c['context']}" if text else f", patches of {c['patch']}" if c["model"] == "vit" else ""
            parts = [f"{text or data}, {c['model']}{given}", seconds, f"batches of {c['batch_size']}"]
            return ", ".join(parts + self._parts_of_images)
        if text:
            model = f"decoder {c['depth']}x{c['width']}, {c['heads']} heads, context {c['context']}"
            return f"{text}, {model}, {c['steps']:,} steps, batches of {c['batch_size']}"
        sizes = " " + "-".join(map(str, c["widths"])) if c["model"] == "mlp" else ""
        if c["model"] == "vit":
            sizes = f" {c['depth']}x{c['width']}, {c['heads']} heads, patches of {c['patch']}"
        parts = [f"{data}, {c['model']}{sizes}", f"{c['epochs']} epochs", f"batches of {c['batch_size']}"]
        return ", ".join(parts + self._parts_of_images)

    @property
    def _parts_of_images(self) -> list[str]:
        return [f"{name.replace('_', ' ')} {self.config[name]}" for name in _OF_IMAGES if self.config.get(name) is not None]

    @property
    def settings(self) -> dict[str, str]:
        """Flat settings that mean something for the method; without the seed and what `recipe` repeats."""
        foreign = [name for name in OF_SOME_METHODS if not has_setting(self.method, name)]
        unused = [
            "method",
            "seed",
            "threads",
            *Recipe._fields,
            *Course._fields,
            *foreign,
            *(f"recipe.{name}" for name in foreign),
        ]
        if self.config["model"] != "mlp":
            unused += ["widths"]
        unused += _OF_IMAGES if self.config["data"] == "text" else _OF_TEXT
        if self.result.get("budget") is None:
            unused += _SIZES
        else:  # the task's name leaves the sizes open
            unused += [name for name in _SIZES if name not in ("width", "depth", "heads")]
            unused += ["steps"] if self.config["data"] == "text" else ["epochs"]
        if self.method == "dense":
            unused += ["block_size", "sparsity", "on_mismatch", "schedule."]
        if self.config["block_size"] != "auto":
            unused += ["candidates", "goal"]
        if not has_setting(self.method, "penalty"):
            unused += ["penalty."]
        flat = _flat({**self.config, "block_size": str(self.block)})
        return {name: value for name, value in flat if name not in unused and f"{name.split('.')[0]}." not in unused}

    def history(self, what: str) -> list[float]:
        """A number after every epoch, NaN where there is none."""
        return [number(epoch[what]) for epoch in self.result["history"]]

    @property
    def bad_losses(self) -> str:
        """Where losses are not finite."""
        losses = zip(self.history("train_loss"), self.history("validation_loss"), strict=True)
        where = {f"epoch {epoch}": sum(pair) for epoch, pair in enumerate(losses, 1)}
        where["the test"] = number(self.result.get("test_loss"))
        return ", ".join(name for name, loss in where.items() if not math.isfinite(loss))


def _flat(data: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value).strip("[]")
            yield before + name, "the method's own" if value is None else text


def _chosen(folder: Path) -> list[Path]:
    """The results below a folder, but for sizes that were tried and not chosen."""
    left_out = {each for file in folder.rglob(SIZES) for each in not_chosen(file.parent)}
    return [path for path in folder.rglob("result.json") if path.parent not in left_out]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished trainings in these folders or below them, each once, sorted by path.

    Raises:
        KronblocksError: a folder holds none, or one cannot be read.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        results = [folder / "result.json"] if (folder / "result.json").exists() else _chosen(folder)
        if not results:
            raise KronblocksError(f"{folder} holds no result.json: name a folder that kronblocks train or compare wrote")
        found |= {path.parent.resolve(): path.parent for path in results}
    return [Run.read(found[place]) for place in sorted(found)]
