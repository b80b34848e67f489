"""What a model holds beside weights is saved and loaded too, or refused before anything is written; never pickled."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.helpers import attached, config, mlp, run
from torch import Tensor, nn

from kronblocks import BlockSparseLinear, KronblocksError, SparsityConfig, export, from_pretrained, save_pretrained, sparsify_
from kronblocks.deploy.saving import CARD
from kronblocks.nn.base import BlockLayer

STORED = Path(__file__).parents[1] / "data" / "saved-format-2"


class Keeps(nn.Module):
    """A module with extra state, and a weight."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.state, self.linear = state, nn.Linear(8, 8)

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def saved(state: Any, folder: Path) -> tuple[Keeps, Path]:
    model = Keeps(state)
    sparsify_(model, SparsityConfig(method="static", block_size=4, target_sparsity=0.5))
    return model, save_pretrained(model, folder)


@pytest.mark.parametrize(
    "state",
    [
        {"mean": 5.0, "steps": [1, 2], "done": True, "name": "a", "nothing": None, "nested": {"tensor": "b", "pair": (1, [2])}},
        [math.inf, -math.inf, 0, 2**70],
        None,
        "words",
        {},
    ],
    ids=str,
)
def test_plain_extra_state_comes_back_as_it_was(tmp_path, state):
    model, folder = saved(state, tmp_path)
    again = from_pretrained(folder, Keeps("other"))
    assert again.state == state and type(again.state) is type(state)
    assert torch.equal(again.linear.weight, model.linear.weight) and isinstance(again.linear, BlockSparseLinear)


def test_tensors_in_extra_state_are_stored_with_the_weights(tmp_path):
    shared = torch.arange(6.0).view(2, 3).t()
    _, folder = saved({"scales": [torch.ones(3), shared], "amax": torch.tensor(2.0)}, tmp_path)
    again = from_pretrained(folder, Keeps).state
    assert torch.equal(again["scales"][1], shared) and torch.equal(again["scales"][0], torch.ones(3)) and again["amax"] == 2
    _, folder = saved(torch.arange(3), tmp_path)  # as some libraries do: bytes in a tensor
    assert torch.equal(from_pretrained(folder, Keeps).state, torch.arange(3))
    _, folder = saved(math.nan, tmp_path)
    assert math.isnan(from_pretrained(folder, Keeps).state)


@pytest.mark.parametrize("state", [object(), {1: 2}, {"a": {1, 2}}, [b"bytes"], [1j], torch.float32])
def test_what_only_a_pickle_could_hold_is_refused_before_anything_is_written(tmp_path, state):
    _, folder = saved({"mean": 1.0}, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KronblocksError, match=r"_extra_state holds a \w+, which only a pickle could store: let get_extra_state"):
        saved(state, tmp_path)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("extras", "says"),
    [
        ({}, "_extra_state is not in the file"),
        ({"_extra_state": 1, "x": 2}, "x is in the file, but the model has no place for it"),
        ({"_extra_state": [1]}, "damaged: '\\[1\\]' is no extra state"),
        ({"_extra_state": {"set": [1]}}, "is no extra state"),
        ({"_extra_state": {"dict": {}, "list": []}}, "is no extra state"),
        ({"_extra_state": {"tensor": "nowhere"}}, "does not contain tensor nowhere"),
        ({"_extra_state": {"float": "1"}}, "is no extra state"),
    ],
)
def test_a_card_with_other_extra_state_is_an_error(tmp_path, extras, says):
    _, folder = saved(1.0, tmp_path)
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, "extras": extras}))
    model = Keeps("before")
    with pytest.raises(KronblocksError, match=says):
        from_pretrained(folder, model)
    assert model.state == "before" and isinstance(model.linear, nn.Linear)


class Rebuilds(nn.Module):
    """Keeps something that follows from its weights, and makes it again when these are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.register_load_state_dict_post_hook(lambda module, _: module.derive())
        self.derive()

    def derive(self) -> None:
        self.doubled = 2 * self.scale.detach()


def test_modules_that_make_something_anew_when_weights_are_loaded(tmp_path):
    model = Rebuilds()
    again = from_pretrained(save_pretrained(model, tmp_path), Rebuilds)
    assert torch.equal(again.doubled, model.doubled)


def test_types_of_buffers(tmp_path):
    def make() -> nn.Module:
        model = nn.Linear(8, 8)
        model.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        model.register_buffer("flags", torch.tensor([True, False]))
        model.register_buffer("phase", torch.tensor([1 + 2j, 3 - 1j]).conj())
        model.register_buffer("eighths", torch.tensor([0.5, 1.5]).to(torch.float8_e4m3fn))
        model.register_buffer("large", torch.tensor([2**62]))
        return nn.Sequential(model)

    expected, wiped = make().state_dict(), make()
    for buffer in wiped.buffers():
        buffer.copy_(torch.zeros_like(buffer))
    found = from_pretrained(save_pretrained(make(), tmp_path), wiped).state_dict()
    for name in ("scalar", "flags", "phase", "eighths", "large"):
        a, b = expected[f"0.{name}"], found[f"0.{name}"]
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(torch.complex64), b.to(torch.complex64)), name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: torch.eye(4).to_sparse(),
            "graph.adjacency is a sparse_coo Tensor, which a safetensors file cannot hold: keep its parts",
        ),
        (lambda: torch.eye(4).to_sparse_csr(), "is a sparse_csr Tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "is a jagged NestedTensor"),
        (lambda: torch.ones(2, dtype=torch.complex128), "has dtype torch.complex128, which a safetensors file cannot hold"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_tensors_that_the_file_cannot_hold_are_named_before_anything_is_written(tmp_path, make, says):
    model, buffer = nn.ModuleDict({"graph": nn.Linear(4, 4)}), make()
    model["graph"].register_buffer("adjacency", buffer)
    with pytest.raises(KronblocksError, match=says):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model["graph"].register_buffer("adjacency", buffer, persistent=False)
    save_pretrained(model, tmp_path / "model")


def llama(**settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, pad_token_id=0, **sizes, **settings))
    sparsify_(model, SparsityConfig(method="static", block_size=8, target_sparsity=0.5, exclude=("lm_head",)))
    return model.eval()


def test_how_a_model_generates_is_saved(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens, model.generation_config.num_beams = 5, 3
    folder = save_pretrained(model, tmp_path)
    again = from_pretrained(folder)
    assert again.generation_config.to_dict() == model.generation_config.to_dict() and (folder / "generation_config.json").exists()
    prompt = torch.tensor([[3, 4, 5]])
    assert torch.equal(again.generate(prompt), model.generate(prompt))
    card = json.loads((folder / CARD).read_text())
    card["generation"]["cache_implementation"] = 7
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(KronblocksError, match="how to build LlamaForCausalLM, but that fails"):
        from_pretrained(folder)


def test_every_tensor_of_a_transformers_model_keeps_its_type(tmp_path):
    """As after `prepare_model_for_kbit_training`; and rotary frequencies, which are not stored, are not rounded."""
    model, frequencies = llama(), llama().model.rotary_emb.inv_freq
    model.bfloat16()
    model.model.norm.float()
    model.model.layers[0].mlp.up_proj.float()
    model.model.rotary_emb.inv_freq = frequencies.clone()
    again = from_pretrained(save_pretrained(model, tmp_path))
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name].float(), found[name].float()) for name in found if "block_position" not in name)
    assert [each.dtype for each in found.values()] == [each.dtype for each in expected.values()]
    assert torch.equal(again.model.rotary_emb.inv_freq, frequencies)
    model.bfloat16()
    assert from_pretrained(save_pretrained(model, tmp_path)).model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_what_was_tied_by_hand_is_tied_again(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    again = from_pretrained(save_pretrained(model, tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_what_format_2_wrote_is_read_for_ever():
    model = from_pretrained(STORED, Keeps)
    expected = safetensors.torch.load_file(STORED / "expected.safetensors")
    torch.testing.assert_close(model.linear(expected["x"]), expected["y"])
    assert model.state["mean"] == 5.0 and model.state["pair"] == (1, [2]) and torch.equal(model.state["scale"], expected["scale"])


def test_folders_of_format_1_hold_no_extra_state():
    older = nn.Sequential(nn.Linear(24, 18), nn.BatchNorm1d(18), nn.Linear(18, 12, bias=False), Keeps("mine"), nn.Linear(12, 5))
    older[3].linear = nn.Identity()
    assert from_pretrained(STORED.with_name("saved-format-1"), older)[3].state == "mine"


def test_a_part_of_a_model_is_saved_and_exported_in_its_place(tmp_path):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(32, 32))  # the same name as the first layer of the part has there
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.get_submodule("0")(x))

    torch.manual_seed(1)
    model = Around()
    sparsifier = sparsify_(model.inner, config("magnitude"))
    run(model, sparsifier, attached(model, sparsifier))
    x = torch.randn(4, 32)
    again = from_pretrained(save_pretrained(model, tmp_path / "saved", sparsifier=sparsifier), Around)
    assert torch.allclose(again(x), model(x), atol=1e-6)
    assert isinstance(again.get_submodule("inner.0"), BlockLayer) and type(again.get_submodule("0")) is nn.Linear
    assert export(model, x, form="packed", sparsifier=sparsifier).error < 1e-5
    average = copy.deepcopy(model)  # a copy has other layers of the same names
    assert save_pretrained(average.inner, tmp_path / "average", sparsifier=sparsifier)
    with pytest.raises(KronblocksError, match="is not a layer of this model"):
        save_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path / "other", sparsifier=sparsifier)
