"""Damaged and hostile folders of transformers models: refused, no code run and no memory taken; or the values of the files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import check_layers_agree
from tests.reliability.fuzzing import QUIET, VALUES, Tally, at_most, bits, cases
from tests.reliability.test_fuzz_files import DAMAGE, damaged

pytest.importorskip("accelerate")
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification

from kronblocks import KronblocksError, SparsityConfig, from_pretrained, sparsify_
from kronblocks.nn.base import BlockLayer

pytestmark = pytest.mark.slow

KINDS = ["packed", "factored", "sharded"]
TOKENS = torch.arange(6).view(1, 6)


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Folders of one model with live blocks, with factors, and with live blocks in several files."""
    root = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        model = bert()
        method: Any = {"method": "kron-l1", "rank": 2} if kind == "factored" else {"method": "static", "target_sparsity": 0.5}
        sparsify_(model, SparsityConfig(block_size=4, measure_plans=False, exclude=("classifier",), **method))
        model.save_pretrained(root / kind, **({"max_shard_size": "4KB"} if kind == "sharded" else {}))
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """One thread, whose stacks and heaps take no address space beside the tensors."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:  # one that the index does not name
            continue
    return found


def check_holds(model: Any, folder: Path) -> None:
    """Block layers have the values of the files, and compute with them."""
    there, layers = tensors(folder), [(n, layer) for n, layer in model.named_modules() if isinstance(layer, BlockLayer)]
    assert layers
    for name, layer in layers:
        mask = layer.block_mask
        for key, value in layer.state_dict().items():
            wanted = there[f"{name}.{key}"].to(value.dtype)
            if key in ("values", "coeff", "gate"):  # dead blocks have zeros, whatever the file says
                live = mask.flatten()[layer.positions()] if key == "values" else mask
                value, wanted = value[live], wanted[live]
            assert bits(value) == bits(wanted), (name, key)
    check_layers_agree(model)


def one_sentence(error: Exception) -> None:
    text = str(error)
    assert text and not isinstance(error, MemoryError) and "allocate" not in text, repr(error)
    if isinstance(error, KronblocksError):
        assert "\n" not in text and len(text) < 1000, text


def attempt(folder: Path, tally: Tally) -> None:
    """Through both doors. transformers' own checks, which come before ours, may raise anything but for want of memory."""
    accepted = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for load in (AutoModelForSequenceClassification.from_pretrained, from_pretrained):
            try:
                accepted.append(load(folder))
            except KronblocksError as error:
                one_sentence(error)
            except Exception as error:
                assert load is not from_pretrained, repr(error)
                one_sentence(error)
    for model in accepted:
        check_holds(model, folder)
    tally.accepted += bool(accepted)
    tally.refused += not accepted


def copied(saved: dict[str, Path], kind: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(saved[kind], folder))


def test_damaged_files(saved, tmp_path, record):
    tally = Tally()

    @settings(max_examples=cases(30, 700), **QUIET)
    @given(st.sampled_from(KINDS), st.sampled_from(["json", "weights"]), DAMAGE, st.integers(1, 999), st.integers(0, 255))
    def run(kind, which, how, where, value):
        folder = copied(saved, kind, tmp_path / "copy")
        paths = sorted(folder.glob("*.json" if which == "json" else "*.safetensors"))
        path = paths[where % len(paths)]
        path.write_bytes(damaged(path.read_bytes(), how, where / 1000, value))
        attempt(folder, tally)

    with at_most(512):
        run()
    tally.check(1 / 20)
    record(
        "damaged transformers folders",
        f"{tally.tried:,} folders with bytes cut off, flipped, zeroed, inserted or foreign in config, index or weights",
        f"{tally.refused:,} refused by AutoModel and by kronblocks.from_pretrained; the other {tally.accepted:,} gave the values "
        "that are in the files; never more than 512 MiB of memory",
    )


PLACES = [(), ("quantization_config",), ("quantization_config", "layers"), ("quantization_config", "layers", 0)]


def test_hostile_configs(saved, tmp_path, record):
    tally = Tally()
    folders = {kind: copied(saved, kind, tmp_path / kind) for kind in KINDS}
    configs = {kind: json.loads((path / "config.json").read_text()) for kind, path in saved.items()}
    large = st.integers(1, 2**63) | st.sampled_from([10**6, 10**9, 2**31, 2**40])

    @settings(max_examples=cases(30, 900), **QUIET)
    @given(st.sampled_from(KINDS), st.sampled_from(PLACES), st.integers(0, 40), VALUES | large, st.sampled_from([0, 0, 0, 1]))
    def run(kind, place, which, value, new):
        changed = json.loads(json.dumps(configs[kind]))
        inner = changed
        for step in place:
            inner = inner[sorted(inner)[which % len(inner)] if step == 0 else step]
        inner["new" if new else sorted(inner)[which % len(inner)]] = value
        (folders[kind] / "config.json").write_text(json.dumps(changed))
        attempt(folders[kind], tally)

    with at_most(512):
        run()
    tally.check(1 / 20)
    record(
        "hostile transformers configs",
        f"{tally.tried:,} config.json with values of any kind, sizes up to 2^63 among them",
        f"{tally.refused:,} refused; the other {tally.accepted:,} gave the values that are in the files; never more than 512 MiB",
    )


def test_hostile_indices(saved, tmp_path, record):
    tally, folder = Tally(), copied(saved, "sharded", tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards, names = sorted(set(index["weight_map"].values())), sorted(index["weight_map"])
    (tmp_path / "outside.safetensors").write_bytes((folder / shards[0]).read_bytes())
    targets = st.sampled_from([*shards, "../outside.safetensors", "/etc/passwd", "config.json", "", "model.safetensors"])

    @settings(max_examples=cases(20, 400), **QUIET)
    @given(st.sampled_from([(), ("metadata",), ("weight_map",)]), st.sampled_from(names), VALUES | targets, st.integers(0, 3))
    def run(place, name, value, new):
        changed = json.loads(json.dumps(index))
        inner = changed
        for step in place:
            inner = inner[step]
        inner[name if place == ("weight_map",) else sorted(inner)[new % len(inner)]] = value
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        attempt(folder, tally)

    with at_most(512):
        run()
    tally.check(1 / 20)
    record(
        "hostile transformers indices",
        f"{tally.tried:,} model.safetensors.index.json with values of any kind and files outside of the folder",
        f"{tally.refused:,} refused; the other {tally.accepted:,} gave the values that are in the files; never more than 512 MiB",
    )


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_and_code_are_refused_without_a_look(saved, tmp_path):
    folder = copied(saved, "packed", tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "there.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(KronblocksError, match="no safetensors file, and kronblocks unpickles nothing"):
        AutoModelForSequenceClassification.from_pretrained(folder, weights_only=False)
    (folder / "there.safetensors").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernels"}))
    with pytest.raises(KronblocksError, match="names code to download"):
        from_pretrained(folder)
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Mine: pass\n")
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "mine.Mine"}}))
    from_pretrained(folder)
    assert not (tmp_path / "canary").exists()


def test_sizes_that_would_fill_the_memory(saved, tmp_path):
    folder, tally = copied(saved, "packed", tmp_path / "copy"), Tally()
    config = json.loads((folder / "config.json").read_text())
    names = ["num_hidden_layers", "num_labels", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size"]
    with at_most(512):
        for name in names:
            for size in (10**8, 2**40):
                (folder / "config.json").write_text(json.dumps({**config, name: size}))
                attempt(folder, tally)
        layers = config["quantization_config"]["layers"]
        for layer in layers.values():
            layer.update(in_features=2**20, out_features=2**20, block_size="1x1", capacity=2**39)
        sizes = {"hidden_size": 2**20, "intermediate_size": 2**20}
        (folder / "config.json").write_text(json.dumps({**config, **sizes}))
        with pytest.raises(KronblocksError, match="blocks, more than the files of weights can hold"):
            AutoModelForSequenceClassification.from_pretrained(folder)
    assert tally.accepted == 0
