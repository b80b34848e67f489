"""The Triton kernels compiled for a GPU that need not be there: that they do, and to what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.needs("triton")]

COMPILE = """
import re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kronblocks.ops import BlockIndex
from kronblocks.ops.backends import triton as backend
from kronblocks.ops.backends.triton import fused, packed, tuning, weights
from kronblocks.ops.plans import PLANS

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8"}


def compiled(kernel, programs, *arguments, **settings):
    assert all(isinstance(count, int) and count > 0 for count in programs), programs
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages") if option in settings}
    given = {**dict(zip(kernel.arg_names, arguments)), **settings}
    assert set(given) == set(kernel.arg_names)
    signature = {
        name: f"*{NAMES[value.dtype]}" if isinstance(value, torch.Tensor)
        else "constexpr" if name in settings or value is None else "i32"
        for name, value in given.items()
    }
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and given[name] % 16 == 0)
    }
    constants = {name: given[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    room = {80: 163, 90: 227}[capability] * 1024  # of an A100 and an H100; others take fewer loads ahead if they have to
    assert result.metadata.shared <= room, (kernel.__name__, constants, result.metadata.shared)
    stack = stack_of(result.asm["cubin"]) if (capability, part) == (90, "some") else 0
    print(capability, part, kernel.__name__, "wgmma" in result.asm["ptx"], stack)


def stack_of(code):
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return re.search("STACK:([0-9]+)", usage)[1]


for module in (fused, packed, weights):
    module.launch = compiled
single, half = torch.float32, torch.bfloat16
index = BlockIndex.from_mask(torch.ones(64, 48, dtype=torch.bool))
suited = packed._product_sizes


def launches(dtype, bm, bn, groups):
    with torch.device("meta"):  # without memory, and cuBLAS' products, which are not compiled here, take no time
        x, dy = torch.empty(4096, 48 * bn, dtype=dtype), torch.empty(4096, 64 * bm, dtype=dtype)
        values, coeff = torch.empty(64 * 48, bm, bn, dtype=dtype), torch.empty(64, 48, 4, dtype=dtype)
        tiles, bias = torch.empty(groups, 4, bm, bn, dtype=dtype), torch.empty(64 * bm, dtype=dtype)
        live = torch.ones(64, 48, dtype=torch.bool) if groups > 1 else None
    backend.packed_linear(x, values, index, bias)
    backend.packed_grad_input(dy, values, index)
    backend.packed_grad_values(dy, x, index)
    backend.live_blocks(coeff, tiles, index)
    backend.live_blocks_backward(values, coeff, tiles, index)
    backend.kron_backward(dy, x, coeff, tiles, live, PLANS["dense"], True)
    for plan in ("coeff_first", "tile_first"):
        backend.kron_linear(x, coeff, tiles, bias, live, PLANS[plan])
        backend.kron_backward(dy, x, coeff, tiles, live, PLANS[plan], True)


some = [(dtype, *shape) for dtype in (single, half) for shape in ((16, 16, 1), (64, 64, 2), (8, 8, 1))]
others = [(single, 128, 128, 1), (half, 24, 48, 1), (single, 4, 4, 2), (half, 16, 64, 1)]
for capability, part, cases in ((90, "some", some), (90, "others", others), (80, "some", some[::2])):
    for case in cases:
        launches(*case)
    packed._product_sizes = lambda *args: tuning.Sizes(32, 32, 16, 4, 3, terms=8)  # block rows in pieces
    backend.packed_linear(torch.empty(64, 48 * 32, device="meta"), torch.empty(64 * 48, 32, 32, device="meta"), index, None)
    packed._product_sizes = suited
"""


def test_kernels_compile_for_a_gpu(pytestconfig):
    """To machine code: a kernel that the interpreter runs may still be none that a GPU can. Triton keeps what it has compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled: dict[str, list[tuple[str, bool, int]]] = defaultdict(list)
    for capability, part, kernel, uses, stack in map(str.split, done.stdout.splitlines()):
        compiled[f"{capability} {part}"].append((kernel, uses == "True", int(stack)))
    on_warp_groups = {"product", "mix_then_tile", "tile_then_mix", "mix_gradient"}  # large products
    assert compiled.keys() == {"90 some", "90 others", "80 some"}
    for launches in compiled.values():
        assert {kernel for kernel, *_ in launches} >= {*on_warp_groups, "grad_values", "tiles_gradient", "join"}
    launches = compiled["90 some"]
    assert all(uses for kernel, uses, _ in launches[:-2] if kernel in on_warp_groups), done.stdout
    assert max(stack for *_, stack in launches) <= 128, done.stdout  # bytes a thread that did not fit its registers
