"""Commands that need no package of the laboratory import none, and neither does the library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "matplotlib", "jinja2", "sklearn")

MAKE = """
import json, pathlib, torch
import kronblocks
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.trained import CLASSES, SHAPE
model = build_model("mlp", (1, 4, 4), 4, (8,))
kronblocks.sparsify_(model, kronblocks.SparsityConfig("static", 4, target_sparsity=0.5))
run = pathlib.Path(folder) / "run"
kronblocks.save_pretrained(model, run / "model", metadata={SHAPE: "1x4x4", CLASSES: "4"})
(run / "config.json").write_text(json.dumps({"model": "mlp", "widths": [8], "image_size": None}))
"""

SCRIPT = f"""
import sys
folder = sys.argv[1]
from kronblocks_lab.__main__ import main
{MAKE}
found = {{}}
for line in (
    ["--help"],
    ["advise", "8x8", "--rows", "2", "--sparsity", "0.5", "--block-size", "4"],
    ["export", str(run), "--out", folder + "/out", "--form", "packed", "--rows", "2"],
    ["inspect", folder + "/out"],
    ["doctor"],
):
    main(line)
    for name in {HEAVY}:
        if name in sys.modules:
            found.setdefault(name, line[0])
print("heavy:", found)
"""


@pytest.mark.slow
def test_commands_beside_trainings_import_nothing_heavy(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout for word in ("usage: kronblocks", "whole model", "exported: ", "values", "agrees with float64")
    )
    assert done.stdout.splitlines()[-1] == "heavy: {}"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_wait_for_neither_torch_nor_tyro(word):
    script = (
        f"import sys; from kronblocks_lab.__main__ import main; main([{word!r}]); print({{'torch', 'tyro'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
