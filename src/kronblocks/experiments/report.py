"""Reads finished trainings and writes one page about them, report.html, and the same without figures, report.md."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jinja2
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kronblocks.blocks import BlockSize
from kronblocks.errors import KronblocksError
from kronblocks.experiments import figures, search_figure
from kronblocks.experiments.figures import COSTS, Cost, number, short
from kronblocks.experiments.tasks import OF_SOME_METHODS, RESULT_VERSION, Recipe
from kronblocks.files import read_json, write_text
from kronblocks.methods import FACTORED, PENALISED, Method
from kronblocks.search.report import SearchReport

ADVICE = "train again, or leave this folder out"
_NUMBERS = """test_accuracy block_sparsity live_blocks total_blocks train_seconds peak_memory_bytes trainable_parameters_start
trainable_parameters_max trainable_parameters_end training_macs inference_macs_per_sample threads"""
_PARTS = {
    "config": "data model widths method block_size rank sparsity epochs seed batch_size",
    "bytes": " ".join(figures.BYTES),
    "surgery": "selected left_dense",
    "versions": "",
    "history": "epoch phase train_loss validation_loss validation_accuracy block_sparsity trainable_parameters",
    "layers": "name out_features in_features block_size live_blocks total_blocks sparsity",
}


def _fault(result: Any) -> str | None:
    """What is wrong with the content of a result.json, or None."""
    if not isinstance(result, dict) or result.get("version") != RESULT_VERSION:
        return f"is not a result of version {RESULT_VERSION}"
    for name in _NUMBERS.split():
        if not math.isfinite(number(result.get(name))):
            return f"has no number for {name}"
    for part, names in _PARTS.items():
        entries = result.get(part) if part in ("history", "layers") else [result.get(part)]
        if not isinstance(entries, list) or not all(isinstance(e, dict) and set(names.split()) <= e.keys() for e in entries):
            return f"lacks {part}, or some of what that should hold ({names})"
    if "search" in result:
        try:
            SearchReport.from_dict(result["search"])
        except KronblocksError as error:
            return f"has a search that cannot be read: {error}"
    return None if len(result["history"]) == result["config"]["epochs"] else "has a history of other epochs than its settings"


_PARTS_OF_DATA = ("image_size", "train_images", "test_images", "fold")  # unset mostly, and not in older results


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
        found = "auto " * (self.config["block_size"] == "auto")
        return self.method if self.method == "dense" else f"{self.method} {found}{self.block}"

    @property
    def task(self) -> str:
        """What has to be the same for trainings to be compared."""
        c = self.config
        widths = " " + "-".join(map(str, c["widths"])) if c["model"] == "mlp" else ""
        parts = [f"{c['data']}, {c['model']}{widths}", f"{c['epochs']} epochs", f"batches of {c['batch_size']}"]
        parts += [f"{name.replace('_', ' ')} {c[name]}" for name in _PARTS_OF_DATA if c.get(name) is not None]
        return ", ".join(parts)

    @property
    def settings(self) -> dict[str, str]:
        """Flat settings that mean something for the method; without the seed and what `recipe` repeats."""
        unused = ["method", "seed", "threads", *Recipe._fields] + ["widths"] * (self.config["model"] != "mlp")
        unused += ["block_size", "sparsity", "on_mismatch", "schedule."] * (self.method == "dense")
        unused += ["candidates", "goal"] * (self.config["block_size"] != "auto")
        foreign = [name for name, methods in OF_SOME_METHODS.items() if self.method not in methods]
        unused += [*foreign, *(f"recipe.{name}" for name in foreign)]
        unused += ["penalty."] * (self.method not in PENALISED)
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


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished trainings in these folders or below them, each once, sorted by path.

    Raises:
        KronblocksError: a folder holds none, or one cannot be read.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        results = [folder / "result.json"] if (folder / "result.json").exists() else list(folder.rglob("result.json"))
        if not results:
            raise KronblocksError(f"{folder} holds no result.json: name a folder that kronblocks train or compare wrote")
        found |= {path.parent.resolve(): path.parent for path in results}
    return [Run.read(found[place]) for place in sorted(found)]


class Row:
    """Trainings that differ in nothing but the seed; a seed that was run twice counts once, with its mean."""

    def __init__(self, name: str, runs: Sequence[Run]) -> None:
        self.name, self.runs, self.method = name, tuple(runs), runs[0].method
        self.seeds = sorted({run.seed for run in runs})
        accuracies = [statistics.fmean(run.result["test_accuracy"] for run in runs if run.seed == seed) for seed in self.seeds]
        self.accuracy = statistics.fmean(accuracies)
        self.spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None  # of a sample
        self.sparsity = statistics.fmean(run.result["block_sparsity"] for run in runs)
        self.live = statistics.median_low(run.result["live_blocks"] for run in runs)
        asked = runs[0].config["rank"]
        rank = f"rank {'by block size' if asked is None else asked}, " * (self.method in FACTORED)
        self.about = f"{rank}target {100 * runs[0].config['sparsity']:g} %" * (self.method != "dense")
        surgery = runs[0].result["surgery"]
        odd = [f"layer {e['name']} is left dense: {e['reason']}" for e in surgery["left_dense"]]
        odd += [f"layer {e['name']}: {e['note']}" for e in surgery["selected"] if e["note"]]
        self.odd_layers = "; ".join(odd) or "every layer is as it was asked for"
        self.percent = f"{100 * self.accuracy:.2f}" + ("" if self.spread is None else f" ± {100 * self.spread:.2f}")

    def values(self, cost: Cost) -> list[float]:
        """The cost of every run."""
        return [float(cost.get(run.result)) for run in self.runs]

    def median(self, cost: Cost) -> float:
        """The middle of the costs."""
        return statistics.median(self.values(cost))

    def points(self, dense: Row) -> str:
        """Accuracy above or below dense, in points."""
        return f"{100 * (self.accuracy - dense.accuracy):+.2f}".replace("-", "\N{MINUS SIGN}")

    def complaints(self, dense: Row | None) -> list[str]:
        """What a reader must not miss: worse than dense, target missed, losses that are not finite."""
        found = []
        if dense and self.method != "dense":
            if self.accuracy < dense.accuracy:
                points, remark = f"{self.points(dense)} points", "; with one seed the spread is not known"
                if self.spread is not None and dense.spread is not None:
                    remark = "; within the spread" * (dense.accuracy - self.accuracy <= self.spread + dense.spread)
                found.append(f"Lower test accuracy than dense: {self.percent} against {dense.percent} % ({points}{remark}).")
            for cost in COSTS:
                found += cost.complaint(self.values(cost), dense.values(cost))
        for run in self.runs * (self.method != "dense"):
            target, areas = run.config["sparsity"], [BlockSize.parse(e["block_size"]).area for e in run.result["layers"]]
            weights = sum(e["out_features"] * e["in_features"] for e in run.result["layers"])
            if not -1e-6 < run.result["block_sparsity"] - target < sum(areas) / max(weights, 1) + 1e-6:
                is_so = f"{100 * run.result['block_sparsity']:.2f} % of the weights in zero blocks, {100 * target:g} % wanted"
                found.append(f"Missed its target sparsity: {is_so} (seed {run.seed}).")
        return found + [f"Losses that are not finite: {r.bad_losses} (seed {r.seed})." for r in self.runs if r.bad_losses]


class Task:
    """Rows that may be compared: the same data, model, epochs and batch size."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows, self.looks = name, tuple(rows), figures.styles(rows)
        ranked = sorted(rows, key=lambda row: -row.accuracy)
        self.dense = next((row for row in ranked if row.method == "dense"), None)
        self.sparse = [row for row in ranked if row.method != "dense"]  # most accurate first
        self.best = ranked[0].percent.split()[0]

    @property
    def searches(self) -> list[tuple[Run, SearchReport]]:
        """The block-size searches of its trainings."""
        return [(run, run.search) for row in self.rows for run in row.runs if run.search]

    def ratio(self, row: Row, cost: Cost) -> float | None:
        """A row's cost relative to dense; None where there is nothing to compare."""
        base = self.dense.median(cost) if self.dense and row is not self.dense else 0
        return row.median(cost) / base if base else None

    @property
    def summary(self) -> str:
        """The task in one sentence."""
        row = self.sparse[0] if self.sparse else self.rows[0]
        text = f"{row.percent} % test accuracy" + " (1 seed)" * (row.spread is None)
        if not self.sparse:
            return f"dense: {text}; there is no sparse training to compare with it."
        choice = f"The most accurate of {len(self.sparse)} sparse settings on the test images is " * (len(self.sparse) > 1)
        text = f"{choice}{row.name}, {100 * row.sparsity:.1f} % of the weights in zero blocks: {text}"
        if not self.dense:
            return f"{text}; there is no dense training to compare it with."
        ratios = [(cost.name, r) for cost in figures.HEADLINE if (r := self.ratio(row, cost)) is not None]
        costs = [f"{short(r)} {'of' if r < 0.995 else 'times'} the {name}" for name, r in ratios]
        return f"{text} against {self.dense.percent} % dense ({row.points(self.dense)} points), {', '.join(costs)}."

    @property
    def notices(self) -> list[tuple[str, list[str]]]:
        """Warnings: whom or what they are about, and what they say."""
        found = [("No dense training", ["Nothing can be compared with dense: add one with --method dense."])] * (not self.dense)
        measured = conditions([run.result for row in self.rows for run in row.runs])
        if uneven := ", ".join(name for name, values in measured.items() if len(values) > 1):
            found.append(("Unequal conditions", [f"Seconds and memory may not be comparable: {uneven} differ, see the setup."]))
        return found + [(row.name, lines) for row in self.rows if (lines := row.complaints(self.dense))]


def conditions(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What measurements depend on, and every value that it had."""
    since = {True: "the start of the training", False: "the start of the process"}
    each = [{"threads": r["threads"], "memory since": since[bool(r.get("peak_memory_exact"))], **r["versions"]} for r in results]
    return {name: sorted({str(other.get(name)) for other in each}) for one in each for name in one}


def _tasks(runs: Sequence[Run]) -> list[Task]:
    methods = ("dense", *get_args(Method))
    tasks: dict[str, dict[tuple[Any, ...], list[Run]]] = {}
    for run in runs:
        area = run.block.area if run.method != "dense" else 0
        key = ([*methods, run.method].index(run.method), area, run.label, tuple(sorted(run.settings.items())))
        tasks.setdefault(run.task, {}).setdefault(key, []).append(run)
    return [Task(name, list(_rows([groups[key] for key in sorted(groups)]))) for name, groups in sorted(tasks.items())]


def _rows(groups: Sequence[Sequence[Run]]) -> Iterator[Row]:
    """Rows with names that tell them apart: what differs between rows of one label is added."""
    for group in groups:
        others = [other[0].settings for other in groups if other[0].label == group[0].label]
        differ = [f"{name} {v}" for name, v in group[0].settings.items() if any(other.get(name) != v for other in others)]
        yield Row(", ".join([group[0].label, *differ]), sorted(group, key=lambda run: (run.seed, run.folder)))


def write_report(runs: Sequence[Run], out: Path, *, title: str = "Block-sparse training, compared") -> Path:
    """Write report.html, one file that needs no other, and report.md into a folder; returns the path of the former.

    Raises:
        KronblocksError: there are no runs, or the folder cannot be written to.
    """
    if not runs:
        raise KronblocksError("there is nothing to report: name at least one finished training")
    tasks, pages = _tasks(runs), {}
    settings = [row.runs[0].settings for task in tasks for row in task.rows]
    content = {
        "title": title,
        "tasks": tasks,
        "figures": figures,
        "search_pictures": search_figure.pictures,
        "conditions": conditions([run.result for run in runs]),
    }
    content["settings"] = {name: [each.get(name, "") for each in settings] for each in settings for name in each}
    options: dict[str, dict[str, Any]] = {"report.md": {"finalize": _plain}, "report.html": {"autoescape": True}}
    for name, own in options.items():
        own |= {"loader": jinja2.FileSystemLoader(Path(__file__).parent), "undefined": jinja2.StrictUndefined}
        templates = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **own)
        pages[name] = templates.get_template(f"{name}.jinja").render(content)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            write_text(out / name, text)
    except OSError as error:
        raise KronblocksError(f"cannot write the report into {out}: {error.strerror}; choose another --out") from error
    return out / "report.html"


def _plain(value: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s", " ", str(value)))
