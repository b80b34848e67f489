"""The native library is found, loaded once, bound to torch's OpenMP, and missed with one warning that says why."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "name", ["libgomp.so.1", "libgomp-a34b3233.so.1.0.0", "libiomp5.so", "libomp.so", "libomp-14.so.5", "libomp.dylib"]
)
def test_names_of_runtimes(name):
    path = f"/usr/lib/{name}"
    assert library.openmp_runtimes(f"7f0000000000-7f0000010000 r-xp 00000000 08:01 132   {path}\n") == [path]


@needs_library
def test_two_runtimes_that_compete(monkeypatch):
    monkeypatch.setattr(library.Library, "shares_threads", lambda self: False)
    with pytest.warns(OpenMPConflictWarning, match="found another OpenMP runtime than torch.*LD_PRELOAD") as caught:
        assert library.load() is not None
        assert library.load() is not None
    assert len(caught) == 1
    assert issubclass(OpenMPConflictWarning, KronblocksWarning)


@needs_library
def test_it_follows_torchs_number_of_threads_and_keeps_it():
    threads = torch.get_num_threads()
    loaded = library.load()
    assert loaded is not None and loaded.shares_threads()
    assert torch.get_num_threads() == threads


@needs_library
def test_python_and_the_library_define_the_same_operators():
    loaded = library.load()
    assert loaded is not None
    schemas = loaded.schemas()
    assert len(schemas) == 11
    for schema in schemas:
        name = schema.split("(")[0].split("::")[1]
        assert str(getattr(torch.ops.kronblocks, name).default._schema) == schema


@needs_library
def test_set_aside_and_back():
    loaded = library.load()
    assert loaded is not None
    operator = torch.ops.kronblocks.packed_linear.default
    assert operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
    with loaded.aside():
        assert not operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
        assert not library.is_loaded()
    assert operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)


@pytest.mark.slow
def test_import_neither_loads_nor_warns():
    code = "import kronblocks; from kronblocks.ops.backends import library; print(library._loader._tried)"
    assert run(code, KRONBLOCKS_NATIVE="/nowhere/_native.so") == "False"


SHARED = """
{before}
from kronblocks.ops.backends import library
with open("/proc/self/maps") as file:
    print(library.load().shares_threads(), *library.openmp_runtimes(file.read()), sep="\\n")
"""


@pytest.mark.slow
@on_linux
@needs_library
@pytest.mark.parametrize("before", ["", "import sklearn.datasets"])
def test_its_openmp_is_torchs(before):
    """Also beside a runtime that another package keeps to itself."""
    if before:
        pytest.importorskip("sklearn")
    shares, *runtimes = run(SHARED.format(before=before)).splitlines()
    assert shares == "True"
    assert len(runtimes) == (2 if before else 1)


WITHOUT_PYTHON = """
import ctypes, torch
library = ctypes.CDLL({path!r})
assert library.kb_register(1) == 0
x, values, index = torch.ones(2, 4), torch.ones(2, 3, 2), [torch.tensor(i, dtype=torch.int32) for i in {index}]
print(torch.ops.kronblocks.packed_linear(x, values, None, *index).tolist())
"""


@pytest.mark.slow
@needs_library
def test_it_defines_its_operators_where_no_python_has():
    loaded = library.load()
    assert loaded is not None
    index = [[0, 1, 2], [0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1]]
    assert run(WITHOUT_PYTHON.format(path=str(loaded.path), index=index)) == str([[2.0] * 6] * 2)
