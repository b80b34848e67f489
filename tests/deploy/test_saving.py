"""What is saved is what is loaded, live blocks only; what is damaged, foreign or hostile is one clear error."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.processes import code
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    KroneckerBlockLinear,
    SparsityConfig,
    from_pretrained,
    save_pretrained,
    sparsify_,
)
from kronblocks.deploy import saving as module
from kronblocks.deploy.saving import CARD
from kronblocks.deploy.stored import mask_as_bits, mask_from_bits

STORED = Path(__file__).parents[1] / "data" / "saved-format-1"


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 18), nn.BatchNorm1d(18), nn.Linear(18, 12, bias=False), nn.ReLU(), nn.Linear(12, 5))


def sparse(seed: int = 0) -> nn.Sequential:
    """A Kronecker layer with gates, a packed layer with dead slots, and the rest dense."""
    torch.manual_seed(seed)
    model = dense()
    model[0] = KroneckerBlockLinear(24, 18, "3x4", rank=2, tile_groups=3, gate=True)
    model[0].set_block_mask_(torch.rand(6, 6) < 0.4)
    model[2] = BlockSparseLinear(18, 12, 3, mask=torch.rand(4, 6) < 0.7, bias=False)
    model[2].set_block_mask_(model[2].block_mask & (torch.rand(4, 6) < 0.7))
    model[1](torch.randn(9, 18))  # running statistics
    return model.eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Of every layer, whatever it is stored as, and of everything else."""
    pairs = zip(a, b, strict=True)
    linear = [(p, q) for p, q in pairs if hasattr(p, "weight") and hasattr(p, "in_features")]
    return all(torch.equal(p.weight, q.weight) for p, q in linear) and torch.equal(a[1].running_var, b[1].running_var)


def weights_of(folder: Path) -> Path:
    return folder / json.loads((folder / CARD).read_text())["weights"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_pretrained(sparse(), tmp_path / "model", config=SparsityConfig(block_size=3), metadata={"data": "none"})


@pytest.mark.parametrize("make", [dense, sparse, lambda: sparse(seed=1)], ids=["dense", "same", "other masks"])
def test_what_is_saved_is_what_is_loaded(folder, make):
    model = from_pretrained(folder, make)
    assert same_weights(model, sparse()) and not model.training
    assert torch.equal(model[0].block_mask, sparse()[0].block_mask) and torch.equal(model[0].gate, sparse()[0].gate)
    x = torch.randn(7, 24)
    torch.testing.assert_close(model(x), sparse()(x))
    assert model[2].capacity == int(model[2].block_mask.sum()) < sparse()[2].capacity


def test_a_loaded_model_trains_on(folder):
    model = from_pretrained(folder, dense).train()
    model(torch.randn(7, 24)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_the_models_own_are_kept(tmp_path, dtype):
    saved = sparse().to(dtype)
    folder = save_pretrained(saved, tmp_path)
    assert same_weights(from_pretrained(folder, dense().to(dtype)), saved)
    assert from_pretrained(folder, dense)[2].values.dtype == torch.float32


def test_only_live_blocks_are_on_disk(tmp_path):
    """At most the density and 3% of the dense weight's bytes."""
    mask = torch.rand(64, 64) < 0.1
    for block, bound in ((16, 0.03), (4, 0.03)):
        model = nn.Sequential(BlockSparseLinear(64 * block, 64 * block, block, mask=mask, bias=False))
        size = sum(path.stat().st_size for path in save_pretrained(model, tmp_path / str(block)).iterdir())
        assert size <= (float(mask.float().mean()) + bound) * (64 * block) ** 2 * 4


def test_tied_layers_are_stored_once_and_stay_tied(tmp_path):
    def make(kind=nn.Linear):
        model = nn.ModuleDict({"a": kind(8, 8), "c": nn.Linear(8, 8, bias=False), "d": nn.Linear(8, 8)})
        model["b"], model["d"].weight = model["a"], model["c"].weight
        return model

    model = make(lambda n, m: BlockSparseLinear(n, m, 2, mask=torch.eye(4).bool()))
    folder = save_pretrained(model, tmp_path)
    assert set(safetensors.torch.load_file(weights_of(folder))) == {"a.values", "a.bias", "a.block_mask", "c.weight", "d.bias"}
    again = from_pretrained(folder, make)
    assert again["a"] is again["b"] and again["c"].weight is again["d"].weight
    assert torch.equal(again["b"].weight, model["a"].weight) and torch.equal(again["d"].weight, model["c"].weight)


def test_parameters_that_are_parts_of_one_tensor(tmp_path):
    whole, model = torch.randn(6, 4), nn.ModuleDict({"a": nn.Linear(4, 2, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["a"].weight, model["b"].weight = nn.Parameter(whole[:2]), nn.Parameter(whole[2:])
    new = nn.ModuleDict({"a": nn.Linear(4, 2, bias=False), "b": nn.Linear(4, 4, bias=False)})
    again = from_pretrained(save_pretrained(model, tmp_path), new)
    assert torch.equal(torch.cat([again["a"].weight, again["b"].weight]), whole)


def test_saving_again_replaces_all_of_it_and_leaves_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    before = weights_of(folder)
    other = sparse(seed=5)
    save_pretrained(other, folder)
    assert not before.exists() and (folder / "notes.txt").exists()
    assert same_weights(from_pretrained(folder, dense), other)
    name = weights_of(folder).name
    save_pretrained(other, folder)  # the same content has the same name
    assert weights_of(folder).name == name and len(list(folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("where", ["save_file", "write_json"])
def test_a_full_disk_leaves_the_old_model(folder, monkeypatch, where):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch if where == "save_file" else module, where, fail)
    with pytest.raises(KronblocksError, match="No space left on device"):
        save_pretrained(sparse(seed=5), folder)
    monkeypatch.undo()
    assert same_weights(from_pretrained(folder, dense), sparse())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_model_that_does_not_fit_is_left_as_it_was(folder):
    def check(model: nn.Module, says: str) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(KronblocksError, match=says):
            from_pretrained(folder, model)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    check(nn.Sequential(*dense(), nn.Linear(5, 2)), "5.weight is not in the file")
    check(dense()[:4], "4.bias is in the file, but the model has no place for it")
    check(nn.Sequential(*dense()[:4], nn.Linear(12, 6)), r"4.weight is \(5, 12\) in the file, and \(6, 12\) in the model")
    check(nn.Sequential(nn.Linear(24, 20), *dense()[1:]), "'0' has other sizes")
    check(nn.Sequential(nn.ReLU(), *dense()[1:]), "the model has ReLU there")


def edit(**changes):
    return lambda card: card.update(changes)


def edit_layer(name, **changes):
    return lambda card: card["structure"]["layers"][name].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit(format=3), "format 3, and this kronblocks reads formats 1 to 2"),
        (edit(extras=[]), "extras is not a dict"),
        (edit(extras={"1._extra_state": 3}), "1._extra_state is in the file, but the model has no place for it"),
        (edit(dtypes=3), "dtypes is not a dict"),
        (edit(weights="../../etc/passwd"), "no name of a weights' file"),
        (edit(weights=3), "weights is not a str"),
        (edit(weights="model-0123456789abcdef.safetensors"), "cannot read"),
        (edit(resized=[]), "resized is not a dict"),
        (edit(resized={"4": [5, 0, 1]}), "no sizes of layer"),
        (edit(resized={"4": [5, 10**15, 1]}), "4.weight"),
        (edit(resized={"4": [2**31 - 1, 2**31 - 1, 1]}), "no sizes of layer"),
        (edit(resized={"4": [5, 10**30, 1]}), "no sizes of layer"),
        (edit(resized={"4": [5, 10**9, 1]}), r"4.weight is \(5, 12\) in the file, and \(5, 1000000000\) in the model"),
        (edit(resized={"9": [5, 12, 1]}), "the model has NoneType there"),
        (edit(structure={}), "no structure record"),
        (edit(structure={"version": 9, "layers": {}}), "version 9"),
        (edit(structure={"version": 1, "layers": {"0": 3}}), "unknown kind"),
        (edit_layer("0", kind="os.system"), "unknown kind"),
        (edit_layer("0", extra=1), "does not know"),
        (edit_layer("0", rank=10**12), r"0.coeff is \(\d+, 2\) in the file, and \(\d+, 1000000000000\) in the model"),
        (edit_layer("0", rank="4"), "rank"),
        (edit_layer("0", block_size="5"), "does not fit"),
        (edit_layer("0", block_size=None), "as a block size"),
        (edit_layer("2", capacity=3), "live blocks, but the card says 3"),
        (edit_layer("2", capacity=10**12), "capacity must be"),
        (edit_layer("2", capacity=-1), "capacity must be"),
        (edit_layer("2", capacity="x"), "does not know|capacity"),
        (edit_layer("2", in_features=10**9), "other sizes"),
        (edit_layer("2", plan="fast"), "plan"),
    ],
)
def test_a_card_that_was_changed_is_an_error(folder, change, says):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(KronblocksError, match=says):
        from_pretrained(folder, dense)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\x00\xff", '{"format": 1}'])
def test_a_damaged_card_is_an_error(folder, text):
    (folder / CARD).write_text(text)
    with pytest.raises(KronblocksError, match="kronblocks.json"):
        from_pretrained(folder, dense)


@given(st.integers(0, 400), st.integers(0, 255), st.booleans())
def test_damaged_weights_are_an_error_or_other_numbers(tmp_path_factory, place, byte, truncate):
    """Whatever a byte of the header is changed to, or wherever the file ends."""
    folder = save_pretrained(sparse(), tmp_path_factory.mktemp("damaged"))
    path = weights_of(folder)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:place] if truncate else content[:place] + bytes([byte]) + content[place + 1 :])
    model = dense()
    try:
        from_pretrained(folder, model)
    except KronblocksError:
        assert isinstance(model[0], nn.Linear)


def test_folders_that_hold_no_model_say_so(tmp_path, folder):
    with pytest.raises(KronblocksError, match=r"holds no kronblocks\.json: name a folder"):
        from_pretrained(tmp_path / "none", dense)
    with pytest.raises(KronblocksError, match=r"does not say how to build the model: write"):
        from_pretrained(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(KronblocksError, match="cannot save the model"):
        save_pretrained(dense(), tmp_path / "file")
    with pytest.raises(KronblocksError, match="meta device"):
        save_pretrained(dense().to("meta"), tmp_path / "meta")


@given(st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_masks_as_bits(rows, cols, random):
    mask = torch.tensor([[random.random() < 0.5 for _ in range(cols)] for _ in range(rows)])
    assert torch.equal(mask_from_bits(mask_as_bits(mask), (rows, cols)), mask) and len(mask_as_bits(mask)) == -(-rows * cols // 8)


TRANSFORMER = """
import sys, torch
import kronblocks
model = kronblocks.from_pretrained(sys.argv[1])
print(type(model).__name__, sum(isinstance(m, kronblocks.BlockSparseLinear) for m in model.modules()))
torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits.detach(), sys.argv[3])
"""


@pytest.mark.slow
def test_a_transformers_model_loads_in_a_new_process_without_the_code_that_made_it(tmp_path, processes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear.out_features % 8 == 0:
            mask = torch.rand(linear.out_features // 8, linear.in_features // 8) < 0.5
            model.set_submodule(name, BlockSparseLinear.from_dense(linear, block_size=8, mask=mask))
    count = sum(isinstance(each, BlockSparseLinear) for each in model.modules())
    x = torch.randn(2, 3, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    save_pretrained(model, tmp_path / "vit")
    said = processes.run(code, TRANSFORMER, *(str(tmp_path / name) for name in ("vit", "x.pt", "y.pt")))
    assert said.split() == ["ViTForImageClassification", str(count)]
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), model(x).logits)


def test_what_format_1_wrote_is_read_for_ever():
    model = from_pretrained(STORED, dense)
    expected = safetensors.torch.load_file(STORED / "expected.safetensors")
    torch.testing.assert_close(model(expected["x"]), expected["y"])
    assert [int(model[i].block_mask.sum()) for i in (0, 2)] == expected["live"].tolist()


def test_two_writers_and_a_reader_in_one_folder(tmp_path):
    """Each is whole, whoever comes last: nobody reads a card whose weights are gone."""
    folder = save_pretrained(sparse(), tmp_path / "model")
    stop, models = threading.Event(), [sparse(seed) for seed in (1, 2)]

    def write(model: nn.Module) -> None:
        while not stop.is_set():
            save_pretrained(model, folder)

    writers = [threading.Thread(target=write, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    try:
        found = [from_pretrained(folder, dense) for _ in range(40)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert len(found) == 40
    assert any(same_weights(from_pretrained(folder, dense), model) for model in models)


def vit(**settings):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**{**sizes, "image_size": 8, "patch_size": 4, "num_labels": 3, **settings})
    return transformers.ViTForImageClassification(config).eval()


def test_a_transformers_model_keeps_its_dtype_and_the_old_one_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    old = vit().bfloat16()
    folder = save_pretrained(old, tmp_path / "vit")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(KronblocksError, match="No space left on device"):
        save_pretrained(vit(hidden_size=48), folder)
    again = from_pretrained(folder)
    assert again.dtype == torch.bfloat16 and again.config.hidden_size == 32
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert torch.equal(again(x).logits, old(x).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "evil"},
        {"patch_size": 0},
        {"architectures": ["BertModel"]},
        {"architectures": ["os"]},
        {"architectures": None},
        {"intermediate_size": 2_000_000_000},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "many"},
        {"model_type": "nothing"},
        {"dtype": "evil"},
    ],
    ids=str,
)
def test_a_hostile_config_is_an_error_before_anything_is_allocated(tmp_path, change):
    folder = save_pretrained(vit(), tmp_path / "vit")
    card = json.loads((folder / CARD).read_text())
    card["transformers"].update(change)
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(KronblocksError):
        from_pretrained(folder)


def test_what_cannot_be_loaded_into(folder):
    with pytest.raises(KronblocksError, match="on the meta device"), torch.device("meta"):
        from_pretrained(folder, dense())
    for wrong in ("model", lambda: None):
        with pytest.raises(KronblocksError, match="needs a model"):
            from_pretrained(folder, wrong)


def test_methods_on_plain_layers_store_live_blocks_too(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 128, bias=False))
    sparsifier = sparsify_(model, SparsityConfig(method="magnitude", storage="dense", block_size=16, target_sparsity=0.75))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 256)).square().mean().backward()
        optimizer.step()
    saved = save_pretrained(model, tmp_path / "magnitude", sparsifier=sparsifier)
    assert isinstance(model[0], nn.Linear), "the model itself stays as it is"
    assert weights_of(saved).stat().st_size < (0.25 + 0.03) * 4 * 256 * (256 + 128)
    again = from_pretrained(saved, nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 128, bias=False)))
    torch.testing.assert_close(again[0].weight, model[0].weight, rtol=0, atol=0)


def test_of_wrapped_models_the_one_inside_is_saved_without_what_it_carries(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsifier = sparsify_(model, SparsityConfig(block_size=8, rank=2, target_sparsity=0.5))
    sparsifier.save_with_model()
    folder = save_pretrained(torch.compile(model), tmp_path / "model")
    again = from_pretrained(folder, nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)))
    assert torch.equal(again[0].weight, model[0].weight)


def test_weights_that_are_not_those_of_the_files_name_are_refused(folder):
    path = weights_of(folder)
    tensors = safetensors.torch.load_file(path)
    tensors["4.weight"].view(torch.uint8)[2, 3] ^= 1  # the file is as well-formed as before
    safetensors.torch.save_file(tensors, path)
    model = sparse(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KronblocksError, match=rf"{path.name} is damaged.*hash.*verify=False"):
        from_pretrained(folder, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not same_weights(from_pretrained(folder, dense, verify=False), sparse())
