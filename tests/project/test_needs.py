"""A run that must have native kernels, Triton's interpreter or ONNX fails where their tests were skipped."""

from __future__ import annotations

import pytest
from tests import needs

SUITE = """
import pytest

@pytest.mark.needs("native")
@pytest.mark.parametrize("n", (1, 2))
def test_kernels(n):
    pass

@pytest.mark.needs("onnx")
@pytest.mark.skipif(True, reason="not for this machine")
def test_file():
    pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Exit status and output of a small suite, for a value of KRONBLOCKS_MUST_RUN."""
    pytester.makepyfile(SUITE)

    def runs(must_run: str):
        monkeypatch.setenv(needs.MUST_RUN, must_run)
        return pytester.runpytest_inprocess("-p", "tests.needs", "-p", "no:cacheprovider")

    return runs


@pytest.mark.parametrize(
    ("must_run", "absent", "status", "lines"),
    [
        ("", "native", pytest.ExitCode.OK, ["*3 skipped*"]),
        ("native", "", pytest.ExitCode.OK, ["native: 2 tests ran, 0 skipped"]),
        (
            "native",
            "native",
            pytest.ExitCode.TESTS_FAILED,
            ["native: 0 tests ran, 2 skipped", "FAILED native: *1* was skipped"],
        ),
        ("onnx", "", pytest.ExitCode.TESTS_FAILED, ["onnx: 0 tests ran, 0 skipped", "FAILED onnx: no test ran"]),
        ("nativ", "", pytest.ExitCode.USAGE_ERROR, ["*KRONBLOCKS_MUST_RUN has nativ: write some of native triton onnx"]),
    ],
)
def test_what_must_run(run, monkeypatch, must_run, absent, status, lines):
    monkeypatch.setattr(needs, "missing", lambda need: "not here" if need == absent else None)
    result = run(must_run)
    assert result.ret == status
    (result.stderr if status == pytest.ExitCode.USAGE_ERROR else result.stdout).fnmatch_lines(lines)


def test_missing(monkeypatch):
    with pytest.raises(ValueError, match="unknown need 'cuda': write one of native, triton, onnx"):
        needs.missing("cuda")
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    assert needs.missing("onnx") == "not installed: onnx, onnxscript, onnxruntime"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert needs.missing("triton") in ("not installed: triton", "Triton's interpreter is off: TRITON_INTERPRET is not 1")
