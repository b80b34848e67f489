"""How weights are written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tests.helpers import STEPS, check_layers_agree
from tests.in_the_field.cases import refused, works
from tests.in_the_field.trial import Trial, config, mlp, same_output, trained
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    densify_,
    from_pretrained,
    parameter_groups,
    rebuild_on_load_,
    save_pretrained,
    sparsify_,
)
from kronblocks.surgery import apply_structure_, structure

LOADERS = "loaders"


@works(LOADERS, "kronblocks.save_pretrained, from_pretrained", "live blocks only; the same outputs")
def own(folder: Path) -> None:
    for method in ("two-phase", "kron-l1", "rigl", "magnitude"):
        trial = trained(config(method))
        again = from_pretrained(save_pretrained(trial.model, folder / method, sparsifier=trial.sparsifier), mlp)
        assert same_output(again, trial.model.eval())
        check_layers_agree(again)


@works(LOADERS, "the same: extra state of modules, dtypes, generation config", "plain values and tensors; never a pickle")
def extras(folder: Path) -> None:
    class Scaled(nn.Module):
        mean: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def get_extra_state(self) -> Any:
            return self.mean

        def set_extra_state(self, state: Any) -> None:
            self.mean = state

    model = Scaled()
    model.net, model.mean = trained().model, {"mean": 5.0, "steps": torch.arange(3)}
    again: Any = from_pretrained(save_pretrained(model, folder), Scaled)
    assert again.mean["mean"] == 5.0 and torch.equal(again.mean["steps"], torch.arange(3))
    assert same_output(again.net, model.net)


@refused(
    LOADERS, "the same: sparse and nested buffers, objects as extra state", "named before anything is written", "cannot hold"
)
def sparse_buffers(folder: Path) -> None:
    model = trained().model
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    save_pretrained(model, folder)


@works(LOADERS, "load_state_dict into a model of the same structure", "`apply_structure_(model, record)` first, in a new process")
def same_structure(folder: Path) -> None:
    model = trained().model
    torch.save({"structure": structure(model), "model": model.state_dict()}, folder / "file.pt")
    saved = torch.load(folder / "file.pt", weights_only=True)
    again = mlp()
    apply_structure_(again, saved["structure"])
    again.load_state_dict(saved["model"])
    assert same_output(again, model)
    check_layers_agree(again)


@works(LOADERS, "load_state_dict of block-sparse weights into a new plain model", "`rebuild_on_load_(model)` in the model's code")
def rebuilt(folder: Path) -> None:
    for settings in (config(), config("kron-l1"), config("rigl")):
        model = trained(settings).model
        torch.save(model.state_dict(), folder / "weights.pt")
        again = rebuild_on_load_(mlp())
        again.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        assert same_output(again, model)
        check_layers_agree(again)


@works(LOADERS, "load_state_dict of a dense model before `sparsify_`", "`init='nearest'` begins with these weights")
def dense_first() -> None:
    dense = mlp()
    model = mlp()
    model.load_state_dict(dense.state_dict())
    sparsify_(model, config("magnitude"))
    assert same_output(model, dense)


@refused(LOADERS, "load_state_dict(strict=False), a dense state after `sparsify_`", "load it before `sparsify_`", "0")
def dense_after() -> None:
    model = mlp()
    sparsify_(model, config())
    model.load_state_dict(mlp().state_dict(), strict=False)


@refused(
    LOADERS,
    "load_state_dict(strict=False), a lifted state into factors",
    "load the sparsifier's state or the structure first",
    "0",
)
def lifted_into_factors() -> None:
    state = trained().model.state_dict()
    model = mlp()
    sparsify_(model, config())
    model.load_state_dict(state, strict=False)


@works(LOADERS, "load_state_dict(strict=False) for another head", "what is not a block layer may be missing")
def another_head() -> None:
    model = trained().model
    again = nn.Sequential(*mlp(), nn.ReLU(), nn.Linear(16, 4))
    apply_structure_(again, structure(model))
    found = again.load_state_dict(model.state_dict(), strict=False)
    assert set(found.missing_keys) == {"4.weight", "4.bias"} and not found.unexpected_keys
    assert same_output(again[:3], model)


@works(LOADERS, "load_state_dict(assign=True)", "as it is")
def assigned() -> None:
    model = trained().model
    again = mlp()
    apply_structure_(again, structure(model))
    again.load_state_dict(model.state_dict(), assign=True)
    assert same_output(again, model)
    check_layers_agree(again)


@works(LOADERS, "a state copied tensor by tensor", "`own[name].copy_(other[name])`")
def by_hand() -> None:
    one, other = (trained(config(method)).model for method in ("static", "static"))
    with torch.no_grad():
        for name, value in one.state_dict().items():
            value.copy_(other.state_dict()[name])
    assert same_output(one, other)
    check_layers_agree(one)


@works(LOADERS, "the whole training in one state_dict", "`sparsifier.save_with_model()`")
def carried() -> None:
    trial = Trial()
    trial.sparsifier.save_with_model()
    optimizer = trial.adam()
    for _ in range(20):
        trial.step(optimizer)
    again = Trial()
    again.sparsifier.save_with_model()
    again.model.load_state_dict(trial.model.state_dict())
    assert again.sparsifier.step == 20 and isinstance(again.model[0], BlockSparseLinear)
    assert same_output(again.model, trial.model)
    again.train(again.adam(), falls=False)


def hub_model(weights: Path | None = None) -> nn.Module:
    """An entry point as in a hubconf.py."""
    return mlp() if weights is None else from_pretrained(weights, mlp)


@works(LOADERS, "torch.hub entry points", "call `from_pretrained` where they call `load_state_dict`")
def hub(folder: Path) -> None:
    model = trained().model
    entry = "from tests.in_the_field.loaders import hub_model\ndependencies = ['torch', 'kronblocks']\n"
    (folder / "hubconf.py").write_text(entry)
    saved = save_pretrained(model, folder / "saved")
    again: Any = torch.hub.load(str(folder), "hub_model", source="local", weights=saved)
    assert same_output(again, model.eval())


@works(LOADERS, "safetensors.torch.save_model, load_model", "`apply_structure_` first, as for load_state_dict")
def safetensors_model(folder: Path) -> None:
    model = trained().model
    safetensors.torch.save_model(model, str(folder / "model.safetensors"), {"structure": json.dumps(structure(model))})
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["structure"])
    again = mlp()
    apply_structure_(again, record)
    safetensors.torch.load_model(again, str(folder / "model.safetensors"))
    assert same_output(again, model)
    check_layers_agree(again)


@works(LOADERS, "torch.distributed.checkpoint", "model and optimiser, in place, after the structure")
def dcp(folder: Path) -> None:
    from torch.distributed import checkpoint

    trial = Trial()
    optimizer = trial.adam()
    for _ in range(20):
        trial.step(optimizer)
    state = {"model": trial.model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(state, checkpoint_id=str(folder / "dcp"), no_dist=True)
    again = Trial()
    again.sparsifier.load_state_dict(trial.sparsifier.state_dict())
    other = torch.optim.AdamW(parameter_groups(again.model, lr=1e-2))
    found = {"model": again.model.state_dict()}
    checkpoint.load(found, checkpoint_id=str(folder / "dcp"), no_dist=True)
    again.model.load_state_dict(found["model"])
    again.attach(other)
    assert same_output(again.model, trial.model)
    again.train(other, falls=False)


@works(LOADERS, "a dense file for whoever has no kronblocks", "`densify_`, then anything")
def dense_file(folder: Path) -> None:
    model = trained().model
    x_model = mlp()
    densify_(model)
    torch.save(model.state_dict(), folder / "dense.pt")
    x_model.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
    assert same_output(x_model, model)


@refused(LOADERS, "a state of another method or block size", "use the same SparsityConfig", "use the same block size")
def other_config() -> None:
    trial = Trial()
    other = mlp()
    sparsifier = sparsify_(other, config().from_dict({**config().to_dict(), "block_size": 4}))
    sparsifier.load_state_dict(trial.sparsifier.state_dict())


@refused(LOADERS, "a state of a training of other length, before `heal`", "write the same `total_steps`", "write total_steps=40")
def other_length() -> None:
    trial = trained(steps=10)
    again = Trial()
    again.sparsifier.load_state_dict(trial.sparsifier.state_dict())
    again.sparsifier.attach(torch.optim.SGD(again.model.parameters(), lr=0.1), total_steps=STEPS - 10)
