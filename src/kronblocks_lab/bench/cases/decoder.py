"""A decoder as large language models have it: training steps, dense and with live blocks as after the lift."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.sparsify import sparsify_
from kronblocks_lab.bench.measure.memory import PeakBytes
from kronblocks_lab.bench.measure.results import Row, significant
from kronblocks_lab.bench.measure.timing import Budget, measure

DENSE, BLOCKS = "dense", "live blocks"
SPARSITY = 0.8
_STEPS, _MANY = 3, 10**6  # steps that show memory and loss, and those that a sparsifier is told of


class Decoder(NamedTuple):
    """Its sizes, and those of a batch."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    sequences: int
    tokens: int
    block: int


def make(sizes: Decoder) -> nn.Module:
    """Transformers' Llama of these sizes, untrained.

    Source:
        Touvron et al., "LLaMA: open and efficient foundation language models", 2023.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocabulary,
        num_attention_heads=max(1, sizes.hidden // 64),
        num_key_value_heads=max(1, sizes.hidden // 64),
        max_position_embeddings=sizes.tokens,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Training:
    """A decoder in bf16 and its AdamW; called, it makes one step and returns the loss."""

    def __init__(self, case: str, sizes: Decoder, device: str) -> None:
        torch.manual_seed(0)
        model = make(sizes).to(device, torch.bfloat16)
        if case == BLOCKS:
            config = SparsityConfig("static", str(sizes.block), target_sparsity=SPARSITY, exclude=("lm_head",))
            sparsifier = sparsify_(model, config)
            self._optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))
            sparsifier.attach(self._optimizer, total_steps=_MANY)
        else:
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(sizes.vocabulary, (sizes.sequences, sizes.tokens + 1), generator=generator).to(device)

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        logits = self.model(self._tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), self._tokens[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def decoder_rows(sizes: Decoder, device: str, budget: Budget, tell: Callable[[str], None]) -> list[Row]:
    """Each model alone for its memory (on a GPU) and loss, then both in turns for their time."""
    trainings, alone = {}, {}
    for case in (DENSE, BLOCKS):
        tell(f"making {case}")
        gc.collect()
        memory = PeakBytes("cuda") if device == "cuda" else None
        training = Training(case, sizes, device)
        losses = [float(training()) for _ in range(_STEPS)]
        alone[case] = {
            "peak_bytes": None if memory is None else memory.bytes(),
            "first_loss": significant(losses[0]),
            "last_loss": significant(losses[-1]),
        }
        trainings[case] = training
    tell("timing")
    times = measure(trainings, budget, device=device)
    about = {"direction": "training step"}
    return [{**about, "case": case, **timing.row(times[DENSE]), **alone[case]} for case, timing in times.items()]
