"""The native library is found, loaded once, bound to torch's OpenMP, and missed with one warning that says why."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from kronblocks.core.errors import KronblocksWarning, NativeFallbackWarning, OpenMPConflictWarning
from kronblocks.ops.backends import library

TORCH = Path(torch.__file__).resolve().parent
needs_library = pytest.mark.needs("native")
on_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")

MAPS = """\
55d0c0000000-55d0c0001000 r--p 00000000 08:01 131 /usr/bin/python3.11
7f0000000000-7f0000010000 r--p 00000000 08:01 132 /opt/my env/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0
7f0000010000-7f0000020000 r-xp 00010000 08:01 132 /opt/my env/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0
7f0000030000-7f0000040000 rw-p 00000000 00:00 0
7f0000040000-7f0000050000 r-xp 00000000 08:01 133 /opt/my env/torch/lib/libgomp.so.1
7f0000050000-7f0000060000 r-xp 00000000 08:01 134 /opt/my env/scipy/linalg/_decomp_lu_cython.so
7f0000060000-7f0000070000 r-xp 00000000 08:01 135 /usr/lib/libomptarget.so.16
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has not asked for the library yet."""
    monkeypatch.setattr(library, "_loader", library._Loader())


@pytest.fixture
def installed(monkeypatch, tmp_path) -> Path:
    """Where the library is looked for, and is not."""
    path = tmp_path / "_native.so"
    monkeypatch.delenv("KRONBLOCKS_NATIVE", raising=False)
    monkeypatch.setattr(library, "installed_files", lambda: [path])
    return path


def run(code: str, **environment: str) -> str:
    """What a Python process of its own prints, in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning", "-c", code]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_not_built(installed):
    with pytest.warns(NativeFallbackWarning, match=rf"not built.*{installed}.*Install a C\+\+ compiler"):
        assert library.load() is None
    assert "not built" in library.unavailable_reason()


@pytest.mark.usefixtures("installed")
def test_warns_once_and_never_for_the_reason_alone():
    assert library.unavailable_reason()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [library.load() for _ in range(3)] == [None, None, None]
    assert [w.category for w in caught] == [NativeFallbackWarning]
    assert caught[0].filename == __file__


def test_switched_off(monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load() is None
    assert library.unavailable_reason() == "switched off by KRONBLOCKS_NATIVE=0"


@pytest.mark.parametrize("content", [b"", b"this is no library"])
def test_does_not_load(installed, content):
    installed.write_bytes(content)
    with pytest.warns(NativeFallbackWarning, match=f"{installed} failed to load"):
        assert library.load() is None


def test_a_library_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KRONBLOCKS_NATIVE", str(tmp_path / "mine.so"))
    assert f"there is no {tmp_path / 'mine.so'}" in library.unavailable_reason()


@on_linux
def test_another_library(monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_NATIVE", str(TORCH / "lib" / "libc10.so"))
    assert "is another library" in library.unavailable_reason()


@needs_library
def test_another_abi(monkeypatch):
    monkeypatch.setattr(library, "ABI", -1)
    with pytest.warns(NativeFallbackWarning, match=r"another version \(its ABI is \d+, this one needs -1\)"):
        assert library.load() is None


@needs_library
def test_two_threads_load_it_once(monkeypatch):
    barrier, tried, got = threading.Barrier(2), [], []
    attempt = library._Loader._try

    def counted(self):
        tried.append(threading.get_ident())
        return attempt(self)

    def ask():
        barrier.wait()
        got.append(library.load())

    monkeypatch.setattr(library._Loader, "_try", counted)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 1
    assert got[0] is got[1] is not None


def test_runtimes_are_read_from_the_maps():
    sklearns, torchs = "/opt/my env/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0", "/opt/my env/torch/lib/libgomp.so.1"
    assert library.openmp_runtimes(MAPS) == [sklearns, torchs]
    assert library.openmp_runtimes("") == []
    assert library.torch_runtime([sklearns, torchs], Path("/opt/my env/torch")) == torchs
    assert library.torch_runtime([sklearns, torchs], Path("/usr/lib/torch")) == sklearns
    assert library.torch_runtime([], Path("/opt/my env/torch")) is None


@pytest.mark.parametrize(
    "name", ["libgomp.so.1", "libgomp-a34b3233.so.1.0.0", "libiomp5.so", "libomp.so", "libomp-14.so.5", "libomp.dylib"]
)
def test_names_of_runtimes(name):
    path = f"/usr/lib/{name}"
    assert library.openmp_runtimes(f"7f0000000000-7f0000010000 r-xp 00000000 08:01 132   {path}\n") == [path]


@on_linux
@needs_library
def test_two_runtimes_that_compete(monkeypatch):
    both = [*library.openmp_runtimes(Path("/proc/self/maps").read_text())[:1], "/opt/lib/libiomp5.so"]
    monkeypatch.setattr(library, "openmp_runtimes", lambda maps: both)
    monkeypatch.setattr(library, "_torch_follows", lambda process: False)
    with pytest.warns(OpenMPConflictWarning, match=rf"{both[0]} and {both[1]}.*LD_PRELOAD={both[0]}") as caught:
        assert library.load() is not None
        assert library.load() is not None
    assert len(caught) == 1
    assert issubclass(OpenMPConflictWarning, KronblocksWarning)


@on_linux
def test_torch_follows_its_own_runtime_and_keeps_its_threads():
    threads = torch.get_num_threads()
    runtime = library.torch_runtime(library.openmp_runtimes(Path("/proc/self/maps").read_text()), TORCH)
    if runtime is None:
        pytest.skip("this torch has no OpenMP")
    assert library._torch_follows(ctypes.CDLL(runtime))
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_import_neither_loads_nor_warns():
    code = "import kronblocks; from kronblocks.ops.backends import library; print(library._loader._tried)"
    assert run(code, KRONBLOCKS_NATIVE="/nowhere/_native.so") == "False"


SHARED = """
import ctypes
{before}
from kronblocks.ops.backends import library
loaded = library.load()
with open("/proc/self/maps") as file:
    maps = file.read()
lines = [line.split(maxsplit=5) for line in maps.splitlines()]
address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
for line in lines:
    start, end = (int(number, 16) for number in line[0].split("-"))
    if start <= address < end:
        print(line[5])
print(*library.openmp_runtimes(maps), sep="\\n")
"""


@pytest.mark.slow
@on_linux
@needs_library
def test_its_openmp_is_torchs():
    provider, *runtimes = run(SHARED.format(before="")).splitlines()
    assert runtimes == [provider]
    assert TORCH in Path(provider).parents or TORCH.with_suffix(".libs") in Path(provider).parents


@pytest.mark.slow
@on_linux
@needs_library
def test_a_runtime_that_another_package_keeps_to_itself_is_no_conflict():
    pytest.importorskip("sklearn")
    provider, *runtimes = run(SHARED.format(before="import sklearn.datasets")).splitlines()
    assert provider in runtimes
    assert TORCH in Path(provider).parents or TORCH.with_suffix(".libs") in Path(provider).parents
