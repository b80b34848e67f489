"""What stands around a model, or changes how it is called."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, check_layers_agree
from tests.in_the_field.cases import limited, refused, works
from tests.in_the_field.trial import Trial, batch, config, loss_of, mlp, same_output, trained
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from kronblocks import BlockSparseLinear, KronblocksError, densify_, export, sparsify_
from kronblocks.nn.base import BlockLayer

WRAPPERS = "wrappers"


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, as `torchrun --nproc-per-node 1` makes."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@works(WRAPPERS, "DataParallel", "as it is, where it has no GPU to copy to")
def data_parallel() -> None:
    trial = Trial()
    trial.train(trial.adam(), model=nn.DataParallel(trial.model))


@refused(
    WRAPPERS, "DistributedDataParallel before `sparsify_`", "call `sparsify_` first, then wrap", "sparsify_ first, then wrap"
)
def distributed_before() -> None:
    with one_process():
        sparsify_(nn.parallel.DistributedDataParallel(mlp()), config())


@works(WRAPPERS, "DistributedDataParallel", "`sparsify_`, wrap, make the optimiser, `attach`; one process or several")
def distributed_data_parallel() -> None:
    with one_process():
        for settings in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
            trial = Trial()
            wrapped = DistributedDataParallel(trial.model, **settings)
            trial.train(trial.adam(), model=wrapped)


@refused(
    WRAPPERS,
    "ZeroRedundancyOptimizer, before a lift",
    "the plain optimiser under DistributedDataParallel, or `fully_shard`; it works with methods without a lift",
    "ZeroRedundancyOptimizer",
)
def zero() -> None:
    with one_process():
        trial = Trial(settings=config("magnitude"))
        optimizer = ZeroRedundancyOptimizer(trial.model.parameters(), torch.optim.AdamW, lr=1e-2)
        trial.attach(optimizer)
        while trial.sparsifier.step < STEPS:
            trial.step(optimizer)
        trial.check()
        trial = Trial()
        trial.attach(ZeroRedundancyOptimizer(trial.model.parameters(), torch.optim.AdamW, lr=1e-2))


@works(WRAPPERS, "checkpoint_wrapper (activation checkpointing)", "before or after `sparsify_`")
def checkpointed() -> None:
    trial = Trial(nn.Sequential(checkpoint_wrapper(nn.Linear(32, 64)), nn.ReLU(), checkpoint_wrapper(nn.Linear(64, 16))))
    trial.train(trial.adam())
    trial = Trial()
    trial.model[0] = checkpoint_wrapper(trial.model[0])  # pyright: ignore[reportIndexIssue]
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
    assert trial.sparsifier.sparsity == 0.75 and isinstance(trial.sparsifier.targets[0].module, BlockSparseLinear)


@limited(WRAPPERS, "weight_norm, spectral_norm and other parametrizations", "such layers are left dense, with a reason")
def parametrized() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, 64), spectral_norm(nn.Linear(64, 16)))
    trial = Trial(model)
    assert {each.name for each in trial.sparsifier.surgery.left_dense} == {"0", "3"}
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
    trial.check(0.75)
    assert isinstance(model[2], BlockLayer)


@refused(
    WRAPPERS,
    "torch.nn.utils.prune on a block layer",
    "`layer.set_block_mask_(mask)` kills blocks, `sparsify_` goes on pruning; `densify_` first for masks of single weights",
    "torch.nn.utils.prune cannot mask",
)
def pruned_by_torch() -> None:
    prune.l1_unstructured(Trial().model[0], "weight", amount=0.5)


@works(WRAPPERS, "nn.TransformerEncoder in eval with a padding mask", "between training steps too")
def encoder() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    trial = Trial(nn.TransformerEncoder(layer, 1))
    optimizer = trial.adam()
    x, padding = torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool)
    padding[:2, 4:] = True
    while trial.sparsifier.step < STEPS:
        with torch.no_grad():
            found = trial.model.eval()(x, src_key_padding_mask=padding)
        dense = copy.deepcopy(trial.model)
        densify_(dense)
        with torch.no_grad():
            assert torch.allclose(found[~padding], dense(x, src_key_padding_mask=padding)[~padding], atol=1e-5)
        loss = trial.model.train()(x, src_key_padding_mask=padding)[~padding].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
    trial.check(falls=False)


@works(WRAPPERS, "functional_call with another model's state", "masks and positions of that state are used")
def functional() -> None:
    models = [trained(config(method)).model for method in ("static", "static", "rigl", "rigl")]
    for one, other in (models[:2], models[2:]):
        x = batch()[0]
        assert torch.allclose(functional_call(one, dict(other.state_dict()), (x,)), other(x), atol=1e-5)
        check_layers_agree(one)


@works(WRAPPERS, "ensembles by vmap over stacked states", "of models with layers of the same sizes; the skeleton may be on meta")
def ensemble() -> None:
    models = [trained(config("static")).model for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = batch()[0]

    def call(parameters: Any, buffers: Any) -> Any:
        return functional_call(skeleton, (parameters, buffers), (x,))

    found = vmap(call)(parameters, buffers)
    for each, model in zip(found, models, strict=True):
        assert torch.allclose(each, model(x), atol=1e-5)


@works(WRAPPERS, "copy.deepcopy of the model", "in mid-training: the copy computes the same, and trains alone")
def copied() -> None:
    trial = trained(steps=14)
    again = copy.deepcopy(trial.model)
    assert same_output(again, trial.model)
    loss_of(again).backward()
    assert all(p.grad is not None for p in again.parameters())
    (optimizer,) = trial.sparsifier._optimizers
    trial.train(optimizer)


@works(
    WRAPPERS,
    "pickle and torch.save of a model that holds its sparsifier",
    "the copy is not attached: attach it to its own optimiser",
)
def pickled() -> None:
    trial = Trial()
    trial.model.sparsifier = trial.sparsifier  # as many modules keep their helpers
    optimizer = trial.adam()
    for _ in range(5):
        trial.step(optimizer)
    file = io.BytesIO()
    torch.save(trial.model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(trial.model)):
        assert same_output(again, trial.model)
        other = torch.optim.AdamW(again.parameters(), lr=1e-2)
        again.sparsifier.attach(other, total_steps=STEPS)
        while again.sparsifier.step < STEPS:
            loss = loss_of(again)
            other.zero_grad()
            loss.backward()
            other.step()
        assert again.sparsifier.sparsity == 0.75
    assert trial.sparsifier.step == 5
    trial.train(optimizer)


@limited(WRAPPERS, "quantize_dynamic", "quantises dense layers; block layers stay as they are: `export(..., form='packed-int8')`")
def quantised() -> None:
    model = nn.Sequential(*trained().model, nn.ReLU(), nn.Linear(16, 4))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert isinstance(quantized[0], BlockLayer) and not isinstance(quantized[4], nn.Linear)
    x = batch()[0]
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()
    small = export(model, x, form="packed-int8").model
    assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
    densify_(model)
    whole = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert (whole(x) - model(x)).norm() < 0.05 * model(x).norm()


@works(
    WRAPPERS,
    "LoRA (PEFT)",
    "`import kronblocks.integrations.peft`, then by PEFT's own calls; the block layers stay as they are",
    "peft",
)
def lora() -> None:
    from peft import LoraConfig, get_peft_model

    import kronblocks.integrations.peft  # noqa: F401

    model = trained().model
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    x = batch()[0]
    assert torch.allclose(adapted(x), base(x), atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(adapted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base(x))


@refused(
    WRAPPERS, "LoRA starts that change base weights (PiSSA, OLoRA, LoftQ), DoRA", "leave them out", "leave it at True", "peft"
)
def other_starts() -> None:
    from peft import LoraConfig, get_peft_model

    import kronblocks.integrations.peft  # noqa: F401

    get_peft_model(trained().model, LoraConfig(target_modules=["0"], init_lora_weights="pissa"))


@refused(WRAPPERS, "LoHa, LoKr, IA3, VeRA and the other methods of PEFT", "use LoRA, or `densify_` first", "use LoRA", "peft")
def other_adapters() -> None:
    from peft import IA3Config, get_peft_model

    import kronblocks.integrations.peft  # noqa: F401

    get_peft_model(trained().model, IA3Config(target_modules=["0"], feedforward_modules=[]))


@limited(
    WRAPPERS,
    "LoRA (PEFT) before `sparsify_`",
    "the layers under it are frozen and stay dense: `frozen='sparsify'` prunes them, best with `magnitude`",
    "peft",
)
def lora_before() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        return get_peft_model(mlp(), LoraConfig(r=8, target_modules=["0", "2"]))  # pyright: ignore[reportArgumentType]

    with pytest.raises(KronblocksError, match="every layer that could become sparse is frozen"):
        sparsify_(adapted(), config())
    trial = Trial(adapted(), config("magnitude", frozen="sparsify"))
    assert [target.name.rpartition(".")[2] for target in trial.sparsifier.targets] == ["base_layer", "base_layer"]
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        optimizer.zero_grad()
        loss_of(trial.model).backward()
        optimizer.step()
    trial.check()


@works(WRAPPERS, "casts and moves of a model in mid-training", "to float64 and back to float32")
def cast() -> None:
    trial = trained(steps=14)
    (optimizer,) = trial.sparsifier._optimizers
    trial.model.double()
    check_layers_agree(trial.model)
    trial.model.float()
    trial.train(optimizer)


@refused(WRAPPERS, "tensors on two devices", "move the model and its input to one", "device")
def two_devices() -> None:
    model = mlp()
    sparsify_(model, config("static"))
    model(torch.randn(4, 32, device="meta"))


@refused(WRAPPERS, "a model on the meta device, called", "load its weights first", "meta|device")
def on_meta() -> None:
    with torch.device("meta"):
        model = mlp()
    sparsify_(model, config())
    model(torch.randn(4, 32))
