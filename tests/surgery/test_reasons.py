"""What cannot become sparse is told before anything is done: whole models, single layers, and weights outside linear layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tests.helpers import config, mlp
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from kronblocks import KronblocksError, SparsityConfig, sparsify_
from kronblocks.core.errors import KronblocksWarning
from kronblocks.surgery import select

CONFIG = SparsityConfig(block_size=8, target_sparsity=0.75)
MASKED = SparsityConfig(method="magnitude", block_size=8, target_sparsity=0.75)


def left(model: nn.Module, config: SparsityConfig = CONFIG) -> dict[str, str]:
    return {each.name: each.reason for each in select(model, config).left_dense}


def weight_of(make):
    """Put another weight into the middle layer."""

    def change(model: nn.Sequential) -> None:
        weight = make(model[2].weight.detach())
        model[2].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())

    return change


class Subclass(nn.Linear):
    """An attribute beside, such as quantised layers have."""


def replaced(model: nn.Sequential, layer: nn.Module) -> None:
    model[2] = layer


def forward_of_its_own(model: nn.Sequential) -> None:
    layer = model[2]
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight, layer.bias)


@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["two-phase", "magnitude"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (weight_of(lambda w: (100 * w).to(torch.int8)), "its weight is torch.int8"),
        (weight_of(lambda w: w.to(torch.float8_e4m3fn)), "its weight is torch.float8_e4m3fn"),
        (weight_of(lambda w: w.to(torch.complex64)), "its weight is torch.complex64"),
        (weight_of(lambda w: w.to_sparse()), "the layout torch.sparse_coo"),
        (weight_of(lambda w: w[:, :0]), "ZeRO-3"),
        (weight_of(lambda w: w[:16]), r"sizes \(16, 64\) and \(32,\), not those of a layer of 32x64"),
        (lambda model: setattr(model[2].bias, "data", torch.empty(0)), r"sizes \(32, 64\) and \(0,\)"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[2]), "computed from others"),
        (lambda model: nn.utils.prune.l1_unstructured(model[2], "weight", 0.5), "computed from others"),
        (lambda model: nn.utils.prune.l1_unstructured(model[2], "bias", 0.5), "computed from others"),
        (lambda model: replaced(model, Subclass(64, 32)), "Subclass is a subclass"),
        (lambda model: replaced(model, nn.LazyLinear(32)), "LazyLinear has no sizes yet"),
    ],
)
def test_a_layer_that_cannot_be_replaced_is_left_as_it_is(change, why, config):
    model = mlp(64, 64, 32, 16)
    change(model)
    kept = model[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kronblocks.surgery.sparsify.warn_of_missed", lambda report: None)
        report = sparsify_(model, config).surgery
    assert model[2] is kept and [each.name for each in report.selected] == ["0", "4"]
    (one,) = report.left_dense
    assert one.name == "2" and re.search(why, one.reason)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda model: model[2].register_parameter("scale", nn.Parameter(torch.ones(32))),
            r"more than a weight and a bias \(scale\)",
        ),
        (lambda model: model[2].register_buffer("zero_point", torch.ones(32)), r"more than a weight and a bias \(zero_point\)"),
        (forward_of_its_own, "its forward was replaced"),
        (lambda model: add_hook_to_module(model[2], AlignDevicesHook("cpu")), "its forward was replaced"),
    ],
)
def test_what_a_block_layer_would_drop_stays_and_may_be_masked(change, why):
    model = mlp(64, 64, 32, 16)
    change(model)
    x, kept = torch.randn(4, 64), model[2]
    (one,) = select(model, CONFIG).left_dense
    assert one.name == "2" and re.search(why, one.reason)
    before = model(x)
    assert len(sparsify_(model, MASKED).targets) == 3 and model[2] is kept and torch.equal(model(x), before)


def test_weights_that_share_memory_are_tied():
    """Two parameters over one memory, a transposed view, and parts of one memory that have nothing in common."""
    tied, parts = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight.data = tied[0].weight.data
    tied[2].weight = nn.Parameter(tied[0].weight.detach().t())
    with pytest.warns(KronblocksWarning, match="only 24.2% of the model's weights"):
        report = sparsify_(tied, CONFIG).surgery
    assert [each.name for each in report.selected] == ["3"]
    assert {each.name: each.reason for each in report.left_dense} == {
        "0": "its weight is tied to 1.weight, 2.weight",
        "1": "its weight is tied to 0.weight, 2.weight",
        "2": "its weight is tied to 0.weight, 1.weight",
    }
    flat = torch.randn(2, 32, 32)
    for layer, weight in zip(parts, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    assert left(parts) == {}


def test_memory_inside_a_larger_parameter_is_tied_to_it():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(96, 32))
            self.q, self.k, self.free = (nn.Linear(32, 32) for _ in range(3))
            self.q.weight, self.k.weight = nn.Parameter(self.qkv.data[:32]), nn.Parameter(self.qkv.data[32:64])

    reasons = left(nn.Sequential(Fused()))
    assert "0.qkv" in reasons["0.q"] and "0.qkv" in reasons["0.k"] and "0.free" not in reasons


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return mlp(64, 64, 32, 16)


@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["two-phase", "magnitude"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.jit.script(mlp(64, 64, 32, 16)), "TorchScript"),
        (in_inference_mode, r"0.weight was made under torch.inference_mode"),
        (lambda: nn.Linear(16, 16), r"the model itself is an nn.Linear.*nn.Sequential"),
        (lambda: nn.Conv2d(16, 16, 3), r"the model itself is a Conv2d.*nn.Sequential"),
        (lambda: nn.LSTM(8, 8), r"no nn.Linear layer.*\n.*LSTM computes with its weights itself"),
        (lambda: nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), "no layer was selected.*\n.*complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_cannot_be_changed_is_refused(make, says, config):
    model = make()
    with pytest.raises(KronblocksError, match=says):
        sparsify_(model, config)


@pytest.fixture
def one_process():
    """A process group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def wrapped(kind: str, mesh) -> Any:
    model = mlp(64, 64, 32, 16)
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "inside":
        return nn.ModuleDict({"net": DistributedDataParallel(model)})
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if kind == "fsdp2":
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@pytest.mark.parametrize(
    ("kind", "says", "masks"),
    [
        ("ddp", "wrapped in DistributedDataParallel, which would keep", True),
        ("inside", r"wrapped in DistributedDataParallel \(at 'net'\)", True),
        ("fsdp1", "wrapped in FullyShardedDataParallel, which flattens", False),
        ("fsdp2", "a part of the weight of 0", True),
        ("tensor", "a part of the weight of 0", False),
    ],
)
@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
def test_wrap_after_sparsify(kind, says, masks, one_process):
    """Else wrappers go on with the old weights. Plain layers with masks beside them may be wrapped, where rows stay whole."""
    for method in ("two-phase", "kron-l1", "rigl", "static"):
        with pytest.raises(KronblocksError, match=says):
            sparsify_(wrapped(kind, one_process), SparsityConfig(method=method, block_size=8))
    if masks:
        assert len(sparsify_(wrapped(kind, one_process), MASKED).targets) == 3
    else:
        with pytest.raises(KronblocksError, match="fully_shard"):
            sparsify_(wrapped(kind, one_process), MASKED)


def test_a_bias_that_is_not_finite_is_named_before_the_training():
    model = mlp(64, 64, 32, 16)
    with torch.no_grad():
        model[2].bias[3] = torch.inf
    with pytest.raises(KronblocksError, match=r"the bias of 2 has values that are not finite"):
        sparsify_(model, CONFIG)


def mixtral() -> MixtralForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False)
    )


class Bare(nn.Module):
    """Weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.scale = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.ones(32))


def test_weights_outside_linear_layers_are_listed_with_their_share():
    modules = {
        "lstm": nn.LSTM(8, 16),
        "cell": nn.GRUCell(8, 8),
        "bilinear": nn.Bilinear(8, 8, 8),
        "back": nn.ConvTranspose2d(4, 8, 3),
        "volume": nn.Conv3d(4, 8, 3),
        "picture": nn.Conv2d(4, 8, 3),
        "bag": nn.EmbeddingBag(32, 8),
        "bare": Bare(),
        "attention": nn.MultiheadAttention(16, 2),
        "norm": nn.LayerNorm(16),
        "fc": nn.Linear(64, 64),
    }
    model = nn.ModuleDict(modules)
    report = select(model, CONFIG)
    found = {each.name: each for each in report.left_dense}
    assert set(found) == (set(modules) - {"fc", "norm", "attention"}) | {"attention.out_proj", "attention.in_proj"}
    says = {"lstm": "LSTM computes", "bilinear": "Bilinear computes", "bag": "looked up", "bare": "(mixing)"}
    says |= {"back": "is not nn.Conv1d", "volume": "is not nn.Conv1d", "picture": "convolutions=True", "cell": "GRUCell"}
    assert all(part in found[name].reason for name, part in says.items())
    total = sum(p.numel() for p in model.parameters())
    assert report.weights == total and report.targeted == 64 * 64
    assert found["bare"].share == 32 * 32 / total and found["lstm"].share == 64 * (8 + 16) / total
    assert sum(each.share for each in found.values()) < 1 - report.targeted / total
    missed = total * sum(each.share for name, each in found.items() if name != "bag")
    assert report.missed == pytest.approx(missed)
    assert f"{100 * 64 * 64 / total:.1f}% of the model's {total:,} weights are targeted" in str(report)


def test_experts_are_listed_and_one_warning_says_that_most_is_not_reached():
    model = mixtral()
    with pytest.warns(KronblocksWarning) as warned:
        report = sparsify_(model, SparsityConfig(method="static", block_size=8)).surgery
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    total = sum(p.numel() for p in mixtral().parameters())
    assert sum(each.share for each in report.left_dense if each.name.endswith("experts")) == pytest.approx(experts / total)
    (one,) = warned
    assert f"model.layers.0-3.mlp.experts (4 layers): {100 * experts / total:.0f}%" in str(one.message)
    assert one.filename == __file__
    assert len(str(report).splitlines()) < len(report.selected)  # layers that are alike share a line
    assert "sparse: model.layers.0-3.self_attn.q_proj (4 layers): 32x32 in 8x8 blocks" in str(report)


def test_what_is_named_is_not_warned_of():
    """By exclude, which may name them, and by layers, which does not; embeddings and what is tied to them never count."""
    for chosen in ({"exclude": ("*.experts",)}, {"layers": ("*.q_proj",)}):
        report = sparsify_(mixtral(), SparsityConfig(method="static", block_size=8, **chosen)).surgery
        assert report.targeted > report.missed
    with pytest.raises(KronblocksError, match="exclude pattern 'expert' matches no"):
        select(mixtral(), SparsityConfig(block_size=8, exclude=("expert",)))
    model = nn.ModuleDict({"embedding": nn.Embedding(1000, 16), "fc": nn.Linear(16, 16), "head": nn.Linear(16, 1000)})
    model["head"].weight = model["embedding"].weight
    report = sparsify_(model, CONFIG).surgery
    assert report.missed == 0 and len(report.left_dense) == 2


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=3, n_head=2))


class Nets(nn.Module):
    """A convolution, one that cannot be taken, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.Conv1d(16, 32, 2))
        self.fc = nn.Linear(32, 16)


@pytest.mark.parametrize("make", [gpt2, Nets])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"convolutions": True, "exclude": ("re:.*(c_proj|conv.0)",)},
        {"method": "magnitude", "convolutions": True, "layers": ("type:Conv1D", "type:Conv2d", "type:Linear")},
        {"method": "kron-l1", "convolutions": True, "on_mismatch": "nearest"},
    ],
)
@pytest.mark.filterwarnings("ignore:only")
def test_select_says_what_sparsify_does(make, settings):
    """With convolutions and transformers' Conv1D too, and changes nothing."""
    config = SparsityConfig(**{"block_size": 8, "target_sparsity": 0.5, **settings})
    model = make()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    try:
        promised = select(model, config)
    except KronblocksError as error:
        with pytest.raises(KronblocksError) as raised:
            sparsify_(model, config)
        assert str(raised.value) == str(error)
        return
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    sparsifier = sparsify_(model, config)
    done = sparsifier.surgery
    assert done.left_dense == promised.left_dense
    assert [(each.name, each.grid, each.rank) for each in done.selected] == [
        (each.name, each.grid, each.rank) for each in promised.selected
    ]
    assert [(target.name, target.grid) for target in sparsifier.targets] == [(each.name, each.grid) for each in promised.selected]


def test_what_select_finds_in_gpt2_and_in_convolutions():
    found = select(gpt2(), SparsityConfig(block_size=8))
    assert [(each.name, str(each.grid)) for each in found.selected[:4]] == [
        ("transformer.h.0.attn.c_attn.linear", "96x32 in 8x8 blocks"),
        ("transformer.h.0.attn.c_proj.linear", "32x32 in 8x8 blocks"),
        ("transformer.h.0.mlp.c_fc.linear", "128x32 in 8x8 blocks"),
        ("transformer.h.0.mlp.c_proj.linear", "32x128 in 8x8 blocks"),
    ]
    assert len(found.selected) == 12 and {each.name for each in found.left_dense} == {
        "transformer.wte",
        "transformer.wpe",
        "lm_head",
    }
    found = select(Nets(), SparsityConfig(block_size=8, convolutions=True))
    assert [(each.name, str(each.grid)) for each in found.selected] == [
        ("conv.0.linear", "16x72 in 8x8 blocks"),
        ("conv.3.linear", "32x32 in 8x8 blocks"),
        ("fc", "16x32 in 8x8 blocks"),
    ]
    (grouped,) = found.left_dense
    assert grouped.name == "conv.2" and "groups" in grouped.reason
    (only,) = select(Nets(), SparsityConfig(block_size=8)).selected
    assert only.name == "fc"


def test_computed_weights_are_left_dense():
    model = mlp()
    nn.utils.spectral_norm(model[4])
    report = sparsify_(model, config()).surgery
    assert [(each.name, "spectral_norm" in each.reason) for each in report.left_dense] == [("4", True)]
