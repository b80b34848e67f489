"""Runs a study: every method's trials, the choice on validation, then the comparison. What is done stays done."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kronblocks.config.methods import spec_of
from kronblocks.core.errors import Diverged, KronblocksError
from kronblocks_lab.bench.measure.results import Results, Row
from kronblocks_lab.report.costs import BYTES
from kronblocks_lab.report.measures import ACCURACY, Measure
from kronblocks_lab.reproduce.studies import Cell, Study
from kronblocks_lab.training.runs import clear_if_changed
from kronblocks_lab.training.settings import TrainConfig

KEY = ("part", "method", "block", "sparsity", "trial", "seed")
MEASURED = (
    "test_accuracy",
    "test_loss",
    "validation_accuracy",
    "validation_loss",
    "block_sparsity",
    "live_blocks",
    "total_blocks",
    "trainable_parameters_start",
    "trainable_parameters_max",
    "trainable_parameters_end",
    "training_macs",
    "inference_macs_per_sample",
    "train_seconds",
)
COLUMNS = (*KEY, "settings", "revision", *MEASURED, *BYTES, "blocks")


class Job(NamedTuple):
    """One training of a study; `part` is "tune" or "compare"."""

    part: str
    cell: Cell
    trial: int
    seed: int

    def key(self) -> Row:
        """What its row is known by."""
        cell = self.cell
        values = (self.part, cell.method, cell.block, cell.sparsity, self.trial, self.seed)
        return dict(zip(KEY, values, strict=True))

    @property
    def name(self) -> str:
        """Of its folder."""
        cell = self.cell
        place = f"{cell.method}-{cell.block or 'dense'}-{cell.sparsity:g}"
        revision = spec_of(cell.method).revision  # what is left of an earlier one stays apart
        return f"{place}-t{self.trial}-s{self.seed}-r{revision}"


class Campaign:
    """A study with its results file and its working folder.

    Args:
        study: what to run.
        out: folder of the results file.
        work: folder of the trainings; a finished one keeps its settings and its result there.
        jobs: trainings at a time, each with one thread.
    """

    def __init__(self, study: Study, out: Path, work: Path, jobs: int) -> None:
        self.study, self.jobs = study, jobs
        self._work = work / study.name
        kind = f"reproduce-{study.name}"
        agree = ("torch", "kronblocks")  # another processor rounds otherwise, which is less than what seeds do
        self.results = Results.open(out / f"{kind}.json", kind, COLUMNS, KEY, study.shared(), must_agree=agree)
        self.results.drop(self._is_outdated)

    def _is_outdated(self, row: Row) -> bool:
        """Whether a row is of an earlier revision of its method, or of other settings than its number stands for now."""
        if row["revision"] != spec_of(row["method"]).revision:
            return True
        try:
            return row["settings"] != self.study.words(row["method"], row["trial"])
        except IndexError:  # there are fewer by now
            return True

    def run(self) -> Results:
        """Run what is missing.

        Raises:
            KronblocksError: a training failed. What is done stays.
        """
        study = self.study
        if study.variants is not None:
            numbers = range(len(study.variants))
            self._run([Job("compare", c, n, seed) for c in study.table() for n in numbers for seed in study.seeds], "variants")
            return self.results
        best = self._tune()
        chosen = {cell: best.get(study.tuned_for(cell), 0) for cell in study.table()}

        def is_of_another_trial(row: Row) -> bool:
            cell = Cell(row["method"], row["block"], row["sparsity"])  # what this study does not ask for stays
            return row["part"] == "compare" and row["trial"] != chosen.get(cell, row["trial"])

        self.results.drop(is_of_another_trial)
        self._run([Job("compare", cell, trial, seed) for cell, trial in chosen.items() for seed in study.seeds], "comparison")
        return self.results

    def _tune(self) -> dict[Cell, int]:
        """The best trial of every tuned cell: of the first grid, then of the best one's neighbours while some are untried."""
        study = self.study
        tried = {cell: set(range(study.space(cell.method).first)) for cell in study.tuned()}
        while True:
            numbers = [(cell, number) for cell, numbers in tried.items() for number in sorted(numbers)]
            self._run([Job("tune", cell, number, seed) for cell, number in numbers for seed in study.tuning_seeds], "trials")
            best = {cell: best_trial(self.results.rows, cell, study.tuning_seeds, study.measure) for cell in tried}
            further = {cell: tried[cell].union([best[cell]], study.space(cell.method).neighbours(best[cell])) for cell in tried}
            if further == tried:
                return best
            tried = further

    def _training(self, job: Job) -> TrainConfig:
        settings = self.study.settings(job.cell.method, job.trial)
        return self.study.training(job.cell, settings, job.seed, self._work / job.name)

    def _run(self, jobs: Sequence[Job], title: str) -> None:
        wanted = {tuple(job.key().values()): job for job in jobs}
        missing = [wanted[tuple(row.values())] for row in self.results.missing(job.key() for job in jobs)]
        pending = {job: self._training(job) for job in missing}  # settings that cannot be are refused before anything runs
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"{self.study.name}: {title}", total=len(jobs), completed=len(jobs) - len(missing))
            for job, row in _finished(pending, self.jobs):
                method = job.cell.method
                own = {"settings": self.study.words(method, job.trial), "revision": spec_of(method).revision}
                self.results.add([{**job.key(), **own, **row}])
                progress.advance(task)
                if not console.is_terminal:
                    measure = self.study.measure
                    found = f"{measure.found(row, 'validation'):.{measure.digits}f} {measure.unit}"
                    console.print(f"{job.part} {job.name}: validation {found}", highlight=False, soft_wrap=True)


def _finished(pending: dict[Job, TrainConfig], jobs: int) -> Iterable[tuple[Job, Row]]:
    """Rows of trainings as they end, several running at a time, each process doing one after the other."""
    if not pending:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(pending)), context, initializer=_keep_freed_memory) as pool:
        futures = {pool.submit(_train, config): job for job, config in pending.items()}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    yield job, future.result()
                except KronblocksError as error:
                    if job.part != "tune" or not isinstance(error, Diverged):
                        raise KronblocksError(f"{job.name}: {error}") from error
                    yield job, {"validation_accuracy": 0.0, "validation_loss": None}  # settings that diverge are never the best
        except BrokenProcessPool as error:
            raise KronblocksError("a training's process died: is there enough memory? Run fewer at a time with --jobs") from error
        finally:
            pool.shutdown(cancel_futures=True)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors: to get it from the kernel anew at every step can take half of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(option, value)


def _train(config: TrainConfig) -> Row:
    """One training, in a process of the pool; keeps its settings and result, and drops the rest of its folder."""
    from kronblocks_lab.training.train import train

    clear_if_changed(config)  # of an earlier form of the study, whose results are gone
    result = train(config)
    for path in config.out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix == ".safetensors":
            path.unlink()
    return row_of(result)


def row_of(result: dict[str, Any]) -> Row:
    """What is kept of a training's result."""
    blocks = sorted({layer["block_size"] for layer in result["layers"]}) if result["config"]["method"] != "dense" else []
    measured = {name: result[name] for name in MEASURED}
    return {**measured, **{name: result["bytes"].get(name) for name in BYTES}, "blocks": " ".join(blocks)}


def best_trial(rows: Sequence[Row], cell: Cell, seeds: Sequence[int], measure: Measure = ACCURACY) -> int:
    """The trial with the best mean on validation data over some seeds, the earlier one if two are equal."""
    wanted = ("tune", cell.method, cell.block, cell.sparsity)
    found: dict[int, list[float]] = {}
    for row in rows:
        if tuple(row[name] for name in KEY[:4]) == wanted and row["seed"] in seeds:
            found.setdefault(row["trial"], []).append(measure.badness(measure.found(row, "validation")))
    return min(sorted(found), key=lambda trial: statistics.fmean(found[trial]))
