"""What some tests cannot do without, and what a run of all tests must not have skipped.

A test that needs native kernels, Triton's interpreter or ONNX says so with a mark, `@pytest.mark.needs("native")`.
It is skipped where that is missing. KRONBLOCKS_MUST_RUN="native triton onnx", which `make test` sets, lists what a run must have:
the run then ends with a line for each need, and fails if tests of the listed ones were skipped, or if none came up.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Sequence

import pytest

from kronblocks.ops.backends import library

NEEDS = ("native", "triton", "onnx")
MUST_RUN = "KRONBLOCKS_MUST_RUN"


def missing(need: str) -> str | None:
    """Why tests that need it cannot run here, or None."""
    match need:
        case "native":
            reason = library.unavailable_reason()
            return f"no native kernels: {reason}" if reason else None
        case "triton":
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            return _not_installed("triton") or (None if interpreted else "Triton's interpreter is off: TRITON_INTERPRET is not 1")
        case "onnx":
            return _not_installed("onnx", "onnxscript", "onnxruntime")
    raise ValueError(f"unknown need {need!r}: write one of {', '.join(NEEDS)}")


def _not_installed(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Needs:
    """A plugin of pytest that skips tests for what is missing and counts them, in the main process under pytest-xdist too."""

    def __init__(self, must_run: Sequence[str]) -> None:
        if unknown := set(must_run) - set(NEEDS):
            raise pytest.UsageError(f"{MUST_RUN} has {', '.join(sorted(unknown))}: write some of {' '.join(NEEDS)}")
        self._must_run = must_run
        self._ran: Counter[str] = Counter()
        self._skipped: dict[str, list[str]] = {need: [] for need in NEEDS}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:  # after skipif: what is not for this machine does not count
        needs = [need for mark in item.iter_markers("needs") for need in mark.args]
        item.user_properties += [("needs", need) for need in needs]  # which reports carry from process to process
        for need in needs:
            if reason := missing(need):
                pytest.skip(reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for need in {str(value) for name, value in report.user_properties if name == "needs"}:
            if report.skipped:
                self._skipped[need].append(report.nodeid)
            elif report.when == "call":
                self._ran[need] += 1

    def _faults(self) -> list[str]:
        """What was asked for in vain."""
        skipped = [f"{need}: {nodeid} was skipped" for need in self._must_run for nodeid in self._skipped[need]]
        return skipped + [f"{need}: no test ran" for need in self._must_run if not self._ran[need]]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        is_main = not hasattr(session.config, "workerinput")
        if is_main and session.exitstatus == pytest.ExitCode.OK and self._faults():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._must_run:
            return
        terminalreporter.section(f"{MUST_RUN}={' '.join(self._must_run)}")
        for need in NEEDS:
            terminalreporter.line(f"{need}: {self._ran[need]} tests ran, {len(self._skipped[need])} skipped")
        faults = self._faults()
        for fault in faults[:20]:
            terminalreporter.line(f"FAILED {fault}", red=True)
        if faults:
            terminalreporter.line(f"make what is missing available, or leave it out of {MUST_RUN}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Needs(os.environ.get(MUST_RUN, "").split()), "needs")
