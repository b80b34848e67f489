"""LoRA beside block layers."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraGAConfig,
    OFTConfig,
    OSFConfig,
    PeftMixedModel,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, SparsityConfig, from_pretrained, save_pretrained, sparsify_
from kronblocks.integrations.peft import BlockLora, with_block_layers
from kronblocks.surgery import lift_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("lifted", [False, True])
def test_only_the_update_is_trained_and_the_zeros_stay(lifted):
    model = Net()
    sparsify_(model, SparsityConfig(block_size=4, rank=2, method="two-phase", target_sparsity=0.5))
    mask = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    model.up.set_block_mask_(mask)
    if lifted:
        lift_(model)
    x = torch.randn(64, 16)
    before, weight = model(x).detach(), model.up.weight.detach().clone()
    adapted = get_peft_model(model, with_block_layers(LoraConfig(r=2, target_modules=["up", "down"])))
    assert isinstance(model.up, BlockLora) and torch.allclose(adapted(x), before, atol=1e-6)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (adapted(x) - x[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model.up.base_layer.weight, weight)
    with pytest.raises(KronblocksError, match="no zero blocks"):
        adapted.merge_and_unload()


X = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))


def sparse(method: str = "rigl", **settings) -> Net:
    model = Net()
    sparsify_(model, SparsityConfig(method=method, block_size=4, target_sparsity=0.5, **settings))
    return model


def trained(adapted: nn.Module) -> torch.Tensor:
    """Its outputs, after some steps of its adapters."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        adapted(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()(X).detach()


@pytest.mark.parametrize("method", ["rigl", "two-phase"])
@pytest.mark.parametrize("targets", ["all-linear", ["up", "down"], r".*(up|down)"])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_adapters_are_saved_and_loaded_by_pefts_own_calls(tmp_path, method, targets, options):
    model = sparse(method, exclude=("down",))  # one layer dense, one not
    base = save_pretrained(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    expected = trained(adapted)
    assert isinstance(model.up, BlockLora) and not isinstance(model.down, BlockLora) and hasattr(model.down, "lora_A")
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(from_pretrained(base, Net), tmp_path / "adapter", **options).eval()
    assert torch.allclose(again(X), expected, atol=1e-6) and not torch.allclose(
        from_pretrained(base, Net)(X), expected, atol=1e-3
    )
    again.load_adapter(tmp_path / "adapter", "second")
    again.set_adapter("second")
    assert torch.allclose(again(X), expected, atol=1e-6)
    with again.disable_adapter():
        assert torch.allclose(again(X), from_pretrained(base, Net)(X), atol=1e-6)
    assert isinstance(again.unload().up, BlockSparseLinear if method == "rigl" else nn.Module)


def test_all_linear_again_and_other_ways_in():
    model = sparse()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    assert set(model.up.lora_A) == set(model.down.lora_A) == {"default", "second"}
    assert isinstance(inject_adapter_in_model(LoraConfig(target_modules=["up"]), sparse()).up, BlockLora)
    mixed = PeftMixedModel(sparse(), LoraConfig(target_modules=["up"]), "default")
    assert isinstance(mixed.base_model.model.up, BlockLora)
    dense = get_peft_model(Net(), LoHaConfig(target_modules="all-linear"))  # models without block layers are as they were
    assert type(dense.base_model.model.up).__module__.startswith("peft.")


def test_convolutions_and_biases_of_updates():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    sparsify_(model, SparsityConfig(method="rigl", block_size=4, target_sparsity=0.5, convolutions=True))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_bias=True, use_rslora=True))
    x = torch.randn(2, 4, 3, 3)
    before = adapted(x).detach()
    assert sum("lora_B" in name for name, _ in adapted.named_parameters()) == 4
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(adapted(x), before)


def test_heads_of_transformers_models_are_left_out_of_all_linear():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))
    sparsify_(model, SparsityConfig(method="rigl", block_size=8, target_sparsity=0.5))
    assert isinstance(model.lm_head, BlockSparseLinear)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(isinstance(module, BlockLora) for module in adapted.modules()) == 7 and not isinstance(model.lm_head, BlockLora)
    with pytest.raises(KronblocksError, match="use_dora"):  # the targets are PEFT's own
        get_peft_model(adapted.unload(), LoraConfig(use_dora=True, task_type="CAUSAL_LM"))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model.model.layers[0].self_attn.q_proj, BlockLora)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga"])
def test_starts_that_change_the_base_weights_are_refused(start):
    model = sparse()
    before = model(X)
    more: dict[str, Any] = {"loftq": {"loftq_config": {"loftq_bits": 4}}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    settings = LoraConfig(target_modules=["up"], init_lora_weights=cast("Any", start), **more.get(start, {}))
    with pytest.raises(KronblocksError, match=f"{start}.* starts from the base weights, .* up are block"):
        get_peft_model(model, settings)
    assert isinstance(model.up, BlockSparseLinear) and torch.equal(model(X), before)
    get_peft_model(sparse(exclude=("down",)), LoraConfig(target_modules=["down"], init_lora_weights="olora"))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_them_alone_change_no_output(start):
    model = sparse()
    before = model(X)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=cast("Any", start)))
    assert torch.allclose(adapted(X), before, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["up"], total_step=10),
        LoHaConfig(target_modules=["up"]),
        LoKrConfig(target_modules="all-linear"),
        BOFTConfig(target_modules=["up"]),
        OFTConfig(target_modules=["up"]),
        IA3Config(target_modules=["up"], feedforward_modules=[]),
        VeraConfig(target_modules=["up"]),
        RandLoraConfig(target_modules=["up"]),
        FourierFTConfig(target_modules=["up"]),
        LNTuningConfig(target_modules=["up"]),
        OSFConfig(target_modules=["up"]),  # which would train nothing there, and say nothing
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_are_refused_by_name_and_work_on_dense_layers(config):
    model = sparse(exclude=("down",))
    with pytest.raises(
        KronblocksError, match=rf"^{config.peft_type.value} does not support block-sparse layers, such as up: use"
    ):
        get_peft_model(model, config)
    assert isinstance(model.up, BlockSparseLinear)
    adapted = get_peft_model(sparse(exclude=("down",)), LoraConfig(target_modules=["up"]))
    with pytest.raises((KronblocksError, ValueError)):
        adapted.add_adapter("other", config)


def test_dora_is_refused():
    with pytest.raises(KronblocksError, match=r"use_dora=True divides by the norm .* 0 in up, a block-sparse layer: leave"):
        get_peft_model(sparse(), LoraConfig(target_modules=["up"], use_dora=True))
