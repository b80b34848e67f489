"""The decoder of the experiments: a causal language model of Llama's form, and text that it writes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.surgery.replace import evaluating

HEAD = "model.lm_head"
"""Name of the decoder's output layer."""

_STD = 0.02  # of GPT-2's first weights


class DecoderSize(NamedTuple):
    """Sizes of a decoder."""

    width: int = 256  # features of the residual stream
    depth: int = 4
    heads: int = 4
    context: int = 128  # characters that it sees

    @property
    def hidden(self) -> int:
        """Width inside the MLPs: 8/3 of the other, since they have three matrices, rounded up to a multiple of 64.

        >>> DecoderSize(width=256).hidden
        704
        """
        return -(-8 * self.width // (3 * 64)) * 64

    def check(self) -> None:
        """Raise KronblocksError for sizes that fit no decoder."""
        if self.width % (2 * self.heads):
            raise KronblocksError(
                f"--heads {self.heads} must divide --width {self.width} into even parts, since positions turn pairs of features: "
                f"for example --heads {next(n for n in range(self.heads, 0, -1) if not self.width % (2 * n))}"
                if not self.width % 2
                else f"--width {self.width} must be even: positions turn pairs of features"
            )


class Decoder(nn.Module):
    """Numbers of characters (N, T) to logits of the characters that follow, (N, T, vocabulary).

    Pre-norm blocks with RMSNorm, rotary positions and SwiGLU, without biases; attention is causal. The output layer has weights
    of its own, apart from the embedding. First weights are as in GPT-2: normal with a standard deviation of 0.02, that of layers
    which write into the residual stream divided by sqrt(2 * depth).

    Args:
        vocabulary: number of characters.
        size: see `DecoderSize`.

    Source:
        Touvron et al., "LLaMA: open and efficient foundation language models", 2023, section 2.2. Radford et al., "Language
        models are unsupervised multitask learners", 2019, section 2.3.
    """

    def __init__(self, vocabulary: int, size: DecoderSize) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        size.check()
        nothing: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
            initializer_range=_STD,
            tie_word_embeddings=False,
            use_cache=False,
            **nothing,
        )
        self.model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.div_(math.sqrt(2 * size.depth))

    def forward(self, characters: Tensor) -> Tensor:
        return self.model(input_ids=characters).logits


@torch.no_grad()
def written(model: nn.Module, prompts: Tensor, length: int, context: int, temperature: float, seed: int) -> Tensor:
    """What a model writes after some prompts, one character after the other.

    Args:
        model: gives logits (N, T, vocabulary).
        prompts: numbers of characters, int64 (N, T), T >= 1.
        length: characters to write.
        context: characters that the model sees at most.
        temperature: logits are divided by it; 0 takes the likeliest.
        seed: of the draws.

    Returns:
        int64 (N, length).
    """
    generator, text = torch.Generator().manual_seed(seed), prompts
    with evaluating(model):
        for _ in range(length):
            logits = model(text[:, -context:])[:, -1].float().cpu()
            if temperature > 0:
                chances = torch.softmax(logits / temperature, -1)
                following = torch.multinomial(chances, 1, generator=generator)
            else:
                following = logits.argmax(-1, keepdim=True)
            text = torch.cat([text, following.to(text.device)], 1)
    return text[:, prompts.shape[1] :]
