"""Training scripts as people write them, on models of transformers built from a config: each thing that a script may do goes on
working when its layers are block-sparse, over the lift too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import helpers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from kronblocks import SparsityConfig, parameter_groups, save_pretrained, sparsify_
from kronblocks.algorithms.training.report import count_blocks
from kronblocks.deploy.saving import from_pretrained

pytestmark = pytest.mark.slow

STEPS = 20


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=48, max_position_embeddings=16, **sizes))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16))


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "bert": bert, "t5": t5, "gpt2": gpt2}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch(name: str, step: int, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if name == "vit":
        images = torch.randn(rows, 3, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": (images.mean((1, 2, 3)) > 0).long()}
    tokens = torch.randint(1, 48, (rows, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def config(**settings: Any) -> SparsityConfig:
    return helpers.config(**{"block_size": 4, "rank": 2, **settings})


def check(sparsifier: Any, sparsity: float = 0.75) -> None:
    """The target is met, in exact zeros, and everything is finite."""
    assert count_blocks(sparsifier.targets).block_sparsity == pytest.approx(sparsity, abs=0.01) == sparsifier.sparsity
    assert all(parameter.isfinite().all() for parameter in sparsifier.model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_three_lines_of_change(name, tmp_path):
    model = made(name)
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(name, step % 4)).loss + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    check(sparsifier)
    assert losses[-1] < losses[0]
    save_pretrained(model.eval(), tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch(name, 0)).logits, model(**batch(name, 0)).logits)


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_clipping_and_a_schedule_of_rates(name):
    model = made(name)
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for step in range(2 * STEPS):
        (model(**batch(name, step)).loss / 2).backward()
        if step % 2:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert norm.isfinite()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert sparsifier.step == STEPS and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    check(sparsifier)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_half_precision_with_a_gradient_scaler(name, fused):
    model = made(name)
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2), fused=fused)
    sparsifier.attach(optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)  # the first steps overflow
    made_steps = 0
    while sparsifier.step < STEPS:
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch(name, made_steps)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        made_steps += 1
        assert made_steps < 4 * STEPS
    assert made_steps > STEPS  # steps that were skipped do not count
    check(sparsifier)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_bfloat16_autocast_and_a_whole_model_in_it(name):
    for whole in (False, True):
        model = made(name)
        model = model.bfloat16() if whole else model
        sparsifier = sparsify_(model, config())
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
        sparsifier.attach(optimizer, total_steps=STEPS)
        for step in range(STEPS):
            inputs = {
                key: value.bfloat16() if whole and value.is_floating_point() else value
                for key, value in batch(name, step).items()
            }
            with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
                loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check(sparsifier)


def test_an_average_of_weights():
    """torch's AveragedModel copies the model, so it begins when the structure is final: after the lift."""
    model = made("vit")
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    average = None
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch("vit", step)).loss.backward()
        optimizer.step()
        if sparsifier.phase == "heal":
            average = average or torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            )
            average.update_parameters(model)
    check(sparsifier)
    layer, own = (m.get_submodule(sparsifier.targets[0].name) for m in (average.module, model))
    assert torch.equal(layer.block_mask, own.block_mask) and float((layer.weight == 0).float().mean()) >= 0.5
    assert not torch.equal(layer.weight, own.weight)


def test_two_optimisers_muon_for_matrices_and_adamw_for_the_rest():
    model = made("vit")
    sparsifier = sparsify_(model, config(method="rigl", rank=None, storage="dense"))
    matrices = [target.module.weight for target in sparsifier.targets]
    rest = [p for p in model.parameters() if all(p is not other for other in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]
    sparsifier.attach(optimizers, total_steps=STEPS)
    for step in range(STEPS):
        model(**batch("vit", step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step == STEPS
    check(sparsifier)


def test_early_stopping_keeps_the_best_state_after_pruning():
    """The best state is looked for once the zeros are in place; a state and the sparsifier's belong together."""
    model = made("vit")
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    best, kept, waited = float("inf"), None, 0
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch("vit", step)).loss.backward()
        optimizer.step()
        if sparsifier.phase != "heal":
            continue
        with torch.no_grad():
            held_out = float(model(**batch("vit", 10_000, rows=32)).loss)
        waited = 0 if held_out < best else waited + 1
        if held_out < best:
            best, kept = held_out, copy.deepcopy((sparsifier.state_dict(), model.state_dict()))
        if waited == 4:
            break
    state, weights = kept
    other = made("vit")
    restored = sparsify_(other, config())
    restored.load_state_dict(state)
    other.load_state_dict(weights)
    with torch.no_grad():
        assert float(other(**batch("vit", 10_000, rows=32)).loss) == pytest.approx(best)
    check(restored)


def test_accelerate():
    from accelerate import Accelerator

    model = made("bert")
    sparsifier = sparsify_(model, config())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for step in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch("bert", step)).loss + sparsifier.penalty())
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step == STEPS
    check(sparsifier)


@pytest.mark.parametrize("stop", [4, 15])  # before the lift and after it
def test_accelerate_goes_on_from_its_own_checkpoint(tmp_path, stop):
    from accelerate import Accelerator

    def run(first: int, last: int, load: bool) -> nn.Module:
        model = made("bert")
        sparsifier = sparsify_(model, config())
        sparsifier.save_with_model()
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)))
        sparsifier.attach(optimizer, total_steps=STEPS)  # before the state is loaded: the optimisers get the lifted values then
        if load:
            accelerator.load_state(tmp_path)
        for step in range(first, last):
            torch.manual_seed(step)  # dropout
            optimizer.zero_grad()
            accelerator.backward(model(**batch("bert", step)).loss)
            optimizer.step()
            if step == stop - 1 and not load:
                accelerator.save_state(tmp_path)
        check(sparsifier)
        return model

    whole, resumed = run(0, STEPS, load=False), run(stop, STEPS, load=True)
    for (key, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), key
