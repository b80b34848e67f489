"""The callback sparsifies, follows, adds the penalty, logs what is counted, and resumes to the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.integrations.small_lightning import Module, config, data, trainer
from tests.processes import code, group

from kronblocks import BlockSparseLinear, KronblocksError, PenaltyConfig, rebuild_on_load_
from kronblocks.algorithms.training.report import count_blocks
from kronblocks.core.errors import KronblocksWarning
from kronblocks.integrations.lightning import SparsityCallback


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [True, False])
def test_it_trains_to_the_target_and_logs_what_is_counted(tmp_path, groups):
    callback, module = SparsityCallback(config()), Module(groups)
    fit = trainer(tmp_path, callback)
    fit.fit(module, data())
    assert isinstance(module.net[0], BlockSparseLinear) and callback.sparsifier.step == 64
    counted = count_blocks(callback.sparsifier.targets).block_sparsity
    assert counted == pytest.approx(0.75) and fit.callback_metrics["block_sparsity"] == pytest.approx(counted)
    assert fit.callback_metrics["phase"] == 2
    assert module.losses[-1] < module.losses[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("stop", [2, 5])  # before the lift and after it
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, groups, stop):
    whole = Module(groups)
    trainer(tmp_path / "whole", SparsityCallback(config())).fit(whole, data())
    first = trainer(tmp_path / "parts", SparsityCallback(config(), total_steps=64), max_epochs=stop)
    first.fit(Module(groups), data())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Module(groups)
    fit = trainer(tmp_path / "parts", SparsityCallback(config()))
    fit.fit(resumed, data(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    tested = trainer(tmp_path / "test", SparsityCallback(config()))
    fresh = Module(groups)
    tested.test(fresh, data(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    assert torch.equal(fresh.net[0].weight, whole.net[0].weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output", [torch.Tensor, dict])
def test_the_penalty_is_in_the_loss(tmp_path, output):
    method = config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=0.1))
    norms = []
    for strength in (method, config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=0.0))):
        module = Module(output=output)
        trainer(tmp_path, SparsityCallback(strength), max_epochs=2).fit(module, data())
        norms.append(float(module.net[0].weight.norm()))
    assert norms[0] < norms[1]


@pytest.mark.filterwarnings("ignore")
def test_gradient_accumulation_counts_optimiser_steps(tmp_path):
    callback = SparsityCallback(config())
    trainer(tmp_path, callback, accumulate_grad_batches=4).fit(Module(), data())
    assert callback.sparsifier.step == 16 and callback.sparsifier.sparsity == pytest.approx(0.75)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(KronblocksError, match="has no end"):
        trainer(tmp_path, SparsityCallback(config()), max_epochs=-1).fit(Module(), data())
    plain = trainer(tmp_path, pl.Callback(), max_epochs=1)
    plain.fit(Module(), data())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(KronblocksError, match="without SparsityCallback"):
        trainer(tmp_path, SparsityCallback(config())).fit(Module(), data(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_a_penalty_and_manual_optimisation_do_not_go_together(tmp_path):
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(KronblocksError, match="manual optimisation"):
        trainer(tmp_path, SparsityCallback(config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient")))).fit(
            module, data()
        )


class Everything(Module):
    """Two optimisers, in turns, with manual optimisation and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in self.parameters() if parameter.dim() != 2]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_two_optimisers_by_hand(tmp_path):
    callback, module = SparsityCallback(config(method="magnitude", rank=None), total_steps=64), Everything()
    trainer(tmp_path, callback).fit(module, data())
    assert callback.sparsifier.step == 64 and callback.sparsifier.sparsity == pytest.approx(0.75)
    assert module.losses[-1] < module.losses[0]


class Scheduled(Module):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_end(self):
        self.log("loss", self.losses[-1])


@pytest.mark.filterwarnings("ignore")
def test_half_precision_clipping_schedules_and_early_stopping(tmp_path):
    callback, module = SparsityCallback(config()), Scheduled()
    stopping = pl.callbacks.EarlyStopping("loss", patience=8)
    fit = trainer(tmp_path, callback, precision="bf16-mixed", gradient_clip_val=0.5)
    fit.callbacks.append(stopping)
    fit.fit(module, data())
    assert callback.sparsifier.step == 64 and callback.sparsifier.sparsity == pytest.approx(0.75)
    assert isinstance(module.net[0], BlockSparseLinear) and module.losses[-1] < module.losses[0]


@pytest.mark.filterwarnings("ignore")
def test_stopping_before_the_target_is_said(tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    fit = trainer(tmp_path, SparsityCallback(config()))
    fit.callbacks.append(Stop())
    with pytest.warns(KronblocksWarning, match="it ended early; pruning ends at step"):
        fit.fit(Module(), data())


TWO = """
import hashlib
import sys
import warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tests.integrations.small_lightning import Module, config, data
from kronblocks.integrations.lightning import SparsityCallback
from kronblocks.core.shards import whole


class Sharded(Module):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
for case in sys.argv[2:]:
    strategy, method = case.split("+")
    module = Module() if strategy == "ddp" else Sharded(groups=False)
    callback = SparsityCallback(config(method=method, rank=2 if method == "two-phase" else None))
    shards = "ddp" if strategy == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = pl.Trainer(max_epochs=8, accelerator="cpu", devices=2, strategy=shards, callbacks=[callback], **quiet)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data())
    state = b"".join(whole(tensor.detach()).contiguous().numpy().tobytes() for tensor in module.state_dict().values())
    told = any("the lift is due, but the parameters are sharded" in str(each.message) for each in said)
    kind, sparsity = type(module.net[0]).__name__, callback.sparsifier.sparsity
    with open(f"{sys.argv[1]}/{case}-{trainer.global_rank}", "w") as file:
        file.write(f"{kind} {sparsity} {told} {hashlib.sha256(state).hexdigest()}")
"""
CASES = {"ddp+two-phase": "BlockSparse", "shards+rigl": "FSDPBlockSparse", "shards+two-phase": "FSDPKroneckerBlock"}


@pytest.fixture(scope="module")
def two_processes(processes, tmp_path_factory) -> Path:
    """The folder with what each process of each case has found."""
    folder = tmp_path_factory.mktemp("two")
    started = [processes.start(code, TWO, str(folder), *CASES, **rank) for rank in group(2)]
    ended = [each.end() for each in started]
    assert [status for status, _ in ended] == [0, 0], ended
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_same_weights(case, two_processes):
    """Sharded parameters cannot be replaced, so that factors stay factors there, which is said."""
    first, second = ((two_processes / f"{case}-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(f"{CASES[case]}Linear 0.75 {CASES[case].startswith('FSDPKron')} ")


class Loadable(Module):
    """As the docs say: whatever loads a checkpoint of a block-sparse training builds its layers first."""

    def __init__(self) -> None:
        super().__init__()
        rebuild_on_load_(self)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 5, 8])  # factors, values with dead slots, values
@pytest.mark.parametrize("save_weights_only", [False, True])
def test_checkpoints_load_without_the_callback(tmp_path, stop, save_weights_only):
    module = Loadable()
    fit = trainer(tmp_path, SparsityCallback(config(), total_steps=64), max_epochs=stop)
    fit.fit(module, data())
    path = tmp_path / "stopped.ckpt"
    fit.save_checkpoint(path, weights_only=save_weights_only)
    expected = [module.eval().net(x) for (x,) in data()]
    loaded = Loadable.load_from_checkpoint(path, weights_only=True).eval()
    assert type(loaded.net[0]) is type(module.net[0]) and torch.equal(loaded.net[0].block_mask, module.net[0].block_mask)
    assert all(torch.allclose(loaded.net(x), y, atol=1e-6) for (x,), y in zip(data(), expected, strict=True))
    predicted = trainer(tmp_path, pl.Callback()).predict(Loadable(), data(), ckpt_path=path, weights_only=True)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(predicted, expected, strict=True))
    with_callback = trainer(tmp_path, SparsityCallback()).predict(Loadable(), data(), ckpt_path=path, weights_only=True)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(with_callback, expected, strict=True))
    with pytest.raises(RuntimeError, match=r"call kronblocks\.rebuild_on_load_\(model\) first"):
        Module.load_from_checkpoint(path, weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_each_model_of_a_cross_validation_is_made_sparse(tmp_path):
    callback, modules, states = SparsityCallback(config()), [], []
    for _ in range(2):
        module, fit = Module(), trainer(tmp_path, callback)
        fit.fit(module, data())
        modules.append(module)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        assert callback.sparsifier.model is module and callback.sparsifier.step == 64
        assert callback.sparsifier.sparsity == pytest.approx(0.75)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "the folds are the same here"
    before = callback.sparsifier.step
    trainer(tmp_path, callback).test(modules[0], data(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert callback.sparsifier.step == before, "loading into another model leaves the sparsifier alone"


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"max_steps": 1}])
@pytest.mark.parametrize("method", ["two-phase", "group-lasso", "magnitude"])
def test_a_trial_of_one_step(tmp_path, settings, method):
    module, callback = Module(), SparsityCallback(config(method=method, rank=2 if method == "two-phase" else None))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, **settings).fit(module, data())
    said = [str(each.message) for each in found if issubclass(each.category, KronblocksWarning)]
    assert (
        len(said) == 1 and said[0].startswith("1 step is too few to prune") and said[0].endswith("nothing is pruned in this run")
    )
    assert callback.sparsifier.step == 1 and len(module.losses) == 1


@pytest.mark.filterwarnings("ignore")
def test_more_epochs_are_allowed_once_the_mask_is_frozen(tmp_path):
    def fit(epochs, ckpt=None, stop=None):
        module, callback = Module(), SparsityCallback(config())
        run = trainer(tmp_path, callback, max_epochs=epochs, limit_train_batches=8)
        if stop is not None:
            run.callbacks.append(StopAfter(stop))
        run.fit(module, data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return run, module, callback

    run, module, _ = fit(8)
    run.save_checkpoint(tmp_path / "end.ckpt")
    longer, again, other = fit(12, tmp_path / "end.ckpt")
    assert other.sparsifier.step == 96 and len(again.losses) == 32
    assert torch.equal(again.net[0].block_mask, module.net[0].block_mask) and other.sparsifier.phase == "heal"
    longer.save_checkpoint(tmp_path / "longer.ckpt")
    assert fit(13, tmp_path / "longer.ckpt")[2].sparsifier.step == 104
    early, _, _ = fit(8, stop=2)
    early.save_checkpoint(tmp_path / "early.ckpt")
    with pytest.raises(KronblocksError, match=r"step 16 of 64, and pruning ends at step 26.*max_steps=64, or the max_epochs"):
        fit(12, tmp_path / "early.ckpt")


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_was_broken_off_can_be_begun_again(tmp_path):
    class Breaks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("out of memory")

    callback, module = SparsityCallback(config()), Module()
    broken = trainer(tmp_path, callback)
    broken.callbacks.append(Breaks())
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.fit(module, data())
    trainer(tmp_path, callback).fit(module, data())
    assert callback.sparsifier.sparsity == pytest.approx(0.75)


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("validation", self.training_step(batch, batch_idx))


@pytest.mark.filterwarnings("ignore")
def test_the_penalty_is_no_part_of_a_validation_loss(tmp_path):
    module = Validated()
    method = config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=100.0))
    fit = trainer(tmp_path, SparsityCallback(method), max_epochs=1)
    fit.fit(module, data(), data())
    assert float(fit.callback_metrics["validation"]) == pytest.approx(sum(module.losses[-8:]) / 8)
    assert float(fit.validate(module, data(), verbose=False)[0]["validation"]) == pytest.approx(sum(module.losses[-8:]) / 8)
