"""Block-sparse models through transformers' own doors: the same outputs in a new process, to the bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import helpers
from torch import Tensor, nn

pytest.importorskip("accelerate")
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    KroneckerBlockLinear,
    densify_,
    export,
    from_pretrained,
    save_pretrained,
    sparsify_,
)
from kronblocks.deploy.cards import MARK
from kronblocks.deploy.entry import check_sizes
from kronblocks.integrations.automodel import GUARD
from kronblocks.integrations.transformers import SparsityCallback
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear

pytestmark = pytest.mark.slow

TOKENS = torch.arange(12).view(2, 6) % 40
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "max_position_embeddings": 16}
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pictures = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **pictures)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def sparse(model: Any, method: str = "static", **settings: Any) -> Any:
    """The model with block layers, of which half of the blocks are dead."""
    sparsify_(model, helpers.config(method, **{"block_size": 4, "target_sparsity": 0.5, **settings}))
    for layer in model.modules():
        if isinstance(layer, KroneckerBlockLinear):
            layer.set_block_mask_(torch.rand(layer.grid.shape) < 0.5)
    return model


def masked(model: Any) -> Any:
    sparsifier = sparsify_(model, helpers.config("magnitude", block_size=4))
    for target in sparsifier.targets:
        target.layer.set_block_mask_(torch.rand(target.grid.shape) < 0.5)
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of a dtype, as from_pretrained gives it: buffers such as those of the positions stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def exported(model: Any, form: str) -> Any:
    return export(sparse(model), TOKENS, form=form, slim=False).model


MODELS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "live blocks, tied head": ("AutoModelForCausalLM", lambda: sparse(llama()), {}),
    "factors, sharded": ("AutoModelForCausalLM", lambda: sparse(llama(False), "two-phase", rank=2), {"max_shard_size": "20KB"}),
    "Conv1D": ("AutoModelForCausalLM", lambda: sparse(gpt2()), {}),
    "convolution": ("AutoModelForImageClassification", lambda: sparse(vit(), convolutions=True), {}),
    "factors with a gate": ("AutoModelForSequenceClassification", lambda: sparse(bert(), "kron-l1", rank=2), {}),
    "masked": ("AutoModelForSequenceClassification", lambda: masked(bert()), {}),
    "int8": ("AutoModelForCausalLM", lambda: exported(llama(), "packed-int8"), {}),
    "exported factors": ("AutoModelForCausalLM", lambda: exported(llama(), "factored"), {}),
    "bf16": ("AutoModelForCausalLM", lambda: cast(sparse(llama()), torch.bfloat16), {}),
}


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IMAGES if hasattr(model, "vit") else TOKENS).logits


def load(folder: str, named: dict[str, str]) -> None:
    """In a new process: write down what the models of these folders give."""
    found = {name: output(getattr(transformers, kind).from_pretrained(Path(folder) / name)) for name, kind in named.items()}
    save_file(found, Path(folder) / "found.safetensors")


def test_round_trips_in_a_new_process(tmp_path, processes):
    expected = {}
    for name, (_, make, settings) in MODELS.items():
        model = make()
        model.save_pretrained(tmp_path / name, **settings)
        expected[name] = output(model)
        assert ("quantization_config" in json.loads((tmp_path / name / "config.json").read_text())) == (name != "masked")
        assert not hasattr(model.config, "quantization_config")
    assert len(list((tmp_path / "factors, sharded").glob("model-*-of-*.safetensors"))) > 1
    processes.run(load, str(tmp_path), {name: kind for name, (kind, _, _) in MODELS.items()})
    found = load_file(tmp_path / "found.safetensors")
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), name


def test_a_trainers_checkpoints(tmp_path, processes):
    tokens = torch.randint(1, 40, (16, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row[0] % 3} for row in tokens]
    own = helpers.config(block_size=4, rank=2, exclude=("classifier",))
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    steps = {"max_steps": 16, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
    trainer = Trainer(
        bert(),
        TrainingArguments(output_dir=str(tmp_path), **quiet, **steps),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[SparsityCallback(own)],
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    names = ["final", "checkpoint-16", "checkpoint-2"]
    processes.run(load, str(tmp_path), dict.fromkeys(names, "AutoModelForSequenceClassification"))
    found = load_file(tmp_path / "found.safetensors")
    expected = output(trainer.model.eval())
    assert torch.equal(found["final"], expected) and torch.equal(found["checkpoint-16"], expected)
    assert not torch.equal(found["checkpoint-2"], expected)
    assert "kronblocks_state" in load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    card = (tmp_path / "final" / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card and "| loss |" in card and "| 75" in card and "| 4x4 |" in card


def test_it_is_an_ordinary_model_once_it_is_loaded(tmp_path):
    model = sparse(llama())
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert not again.is_quantized and not hasattr(again.config, "quantization_config")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(again.generate(TOKENS[:1], max_new_tokens=3), model.generate(TOKENS[:1], max_new_tokens=3))
    assert copy.deepcopy(again).half().float().dtype == torch.float32
    helpers.check_layers_agree(again)
    densify_(again)
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.bfloat16},
        {"torch_dtype": "float64"},
        {"low_cpu_mem_usage": True},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
    ],
)
@pytest.mark.parametrize("form", ["packed", "packed-int8"])
def test_settings_of_from_pretrained(tmp_path, settings, form):
    model = exported(llama(), form)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    dtype = {"torch_dtype": torch.float64}.get(next(iter(settings)), settings.get("dtype", torch.float32))
    assert again.dtype == dtype and torch.equal(output(again), output(cast(model, dtype)))
    layers = [layer for layer in again.modules() if isinstance(layer, QuantizedBlockLinear)]
    assert len(layers) == 14 * (form == "packed-int8") and all(layer.scales.dtype == torch.float32 for layer in layers)


def test_layers_on_the_disk(tmp_path):
    model = sparse(llama(False))
    model.save_pretrained(tmp_path / "saved")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places = {**where, "model.rotary_emb": "cpu", "lm_head": "disk"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "disk")
    assert again.model.layers[1].mlp.up_proj.values.is_meta
    assert torch.equal(output(again), output(model))


def test_the_base_and_another_head(tmp_path):
    model = sparse(bert(), exclude=("classifier",))
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(TOKENS).pooler_output, model.bert(TOKENS).pooler_output)
    base.save_pretrained(tmp_path / "base")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    assert isinstance(other.bert.encoder.layer[0].intermediate.dense, BlockSparseLinear) and output(other).shape == (2, 5)
    with torch.no_grad():
        assert torch.equal(other.bert(TOKENS).pooler_output, model.bert(TOKENS).pooler_output)


def test_kronblocks_reads_both(tmp_path):
    for name in ("live blocks, tied head", "factors, sharded", "int8", "convolution"):
        model = MODELS[name][1]()
        model.save_pretrained(tmp_path / name, **MODELS[name][2])
        assert torch.equal(output(from_pretrained(tmp_path / name)), output(model))
        make = {"convolution": vit, "factors, sharded": lambda: llama(False)}.get(name, llama)
        into = make()
        assert from_pretrained(tmp_path / name, into) is into and torch.equal(output(into), output(model)), name
    model = sparse(bert())
    save_pretrained(model, tmp_path / "one")
    sparse(bert(), "two-phase", rank=2).save_pretrained(tmp_path / "one")  # the later one counts
    assert any(isinstance(layer, KroneckerBlockLinear) for layer in from_pretrained(tmp_path / "one").modules())
    save_pretrained(model, tmp_path / "one")
    assert torch.equal(output(from_pretrained(tmp_path / "one")), output(model))
    with pytest.raises(ValueError, match="kronblocks.from_pretrained"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")


def test_what_a_model_computes_itself_may_be_missing(tmp_path):
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    words = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    model = sparse(transformers.MarianMTModel(transformers.MarianConfig(**sizes, **heads, **words)).eval())
    model.save_pretrained(tmp_path)
    assert "model.encoder.embed_positions.weight" not in load_file(tmp_path / "model.safetensors")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(*(each(TOKENS, decoder_input_ids=TOKENS).logits for each in (again, model)))


def test_a_dense_model_of_the_same_config_is_saved_as_a_dense_one(tmp_path):
    sparse(llama()).save_pretrained(tmp_path / "sparse")
    dense = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "sparse")).eval()
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), output(dense))


def test_missing_tensors_are_one_sentence_and_no_table(tmp_path, capfd):
    sparse(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.values"
    for changed in ({**tensors, name: tensors[name][1:]}, {key: each for key, each in tensors.items() if key != name}):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        capfd.readouterr()
        with pytest.raises(KronblocksError, match=f"is damaged: {name} is"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "MISSING" not in (said := capfd.readouterr().err) and "MISMATCH" not in said


def test_only_counts_are_limited():
    check_sizes({"text_config": {"vocab_size_per_layer_input": 262144, "num_hidden_layers": 99, "pad_token_id": 10**6}}, "it")
    with pytest.raises(KronblocksError, match="it asks for num_hidden_layers=1000000, more than 10,000"):
        check_sizes({"text_config": {"num_hidden_layers": 10**6}}, "it")


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = sparse(llama())
    model.save_pretrained(tmp_path)
    assert MARK in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


ORDER = """
import sys
import torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(12).view(2, 6) % 40
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(str(error))
assert "kronblocks" not in sys.modules
import kronblocks
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("sum", repr(float(model(tokens).logits.double().sum())))
"""


def test_without_kronblocks_the_error_says_it_and_transformers_may_come_first(tmp_path):
    model = sparse(llama())
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", ORDER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert GUARD in done.stdout and f"sum {float(output(model).double().sum())!r}" in done.stdout


def test_what_cannot_be_saved_is_said(tmp_path):
    model = llama()
    sparsify_(model, helpers.config("static", block_size=4))
    with pytest.raises(KronblocksError, match="BSR form, which has no file format"):
        export(model, TOKENS, form="bsr", slim=False).model.save_pretrained(tmp_path)


def test_a_class_without_the_saved_layers_is_refused(tmp_path):
    sparse(llama()).save_pretrained(tmp_path)
    with pytest.raises(KronblocksError, match=r"is on the meta device, .* call model.to_empty"):
        from_pretrained(tmp_path, llama().to("meta"))
    with pytest.raises(KronblocksError, match="which the model lacks"):
        from_pretrained(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    assert sum(isinstance(layer, BlockLayer) for layer in from_pretrained(tmp_path).modules()) == 14


@pytest.mark.parametrize(("form", "dtype", "share"), [("packed-int8", torch.float32, 0.04), ("packed", torch.bfloat16, 0.06)])
def test_sizes_on_disk(tmp_path, form, dtype, share):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    dense = 4 * sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, nn.Linear))
    sparsify_(model, helpers.config("static", block_size=16, target_sparsity=0.9, exclude=("lm_head",)))
    small = export(model, TOKENS % 8, form=form, slim=False)
    small.model.save_pretrained(tmp_path / "theirs")
    small.save(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        total = sum(path.stat().st_size for path in (tmp_path / folder).iterdir())
        assert total - 4 * 2 * 8 * 512 < share * dense, (folder, total / dense)  # without the embedding and the head
