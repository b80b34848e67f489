"""How blocks of different layers are compared, tried on an MLP and a small decoder: `python -m kronblocks_lab.pages.scores mlp`.

`python -m kronblocks_lab.pages.scores decoder --text FILE` wants any English text of a megabyte. Both go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronblocks import Rule, ScheduleConfig, Sparsifier, SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms import RuleContext
from kronblocks.algorithms.budget import FLOOR, choose_dead, layer_adaptive
from kronblocks.core.files import read_json, write_json
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.pages import ROOT
from kronblocks_lab.training.module import learning_rate_factor
from kronblocks_lab.training.versions import versions

RESULTS = ROOT / "benchmarks" / "results" / "scores.json"

Compare = Callable[[Sequence[Tensor]], list[Tensor]]


def _absolute(norms: Sequence[Tensor]) -> list[Tensor]:
    return list(norms)


def _relative(norms: Sequence[Tensor]) -> list[Tensor]:
    return [norm / norm.clamp_min(0).square().mean().sqrt() for norm in norms]


def _lamp(norms: Sequence[Tensor]) -> list[Tensor]:
    """As published: layer_adaptive without its constant of the layer."""
    return [score / sum(score.shape) for score in layer_adaptive(norms)]


CANDIDATES: dict[str, tuple[Compare, float]] = {  # how norms are compared, and the floor
    "norm": (_absolute, 0.0),
    "norm / root mean square of the layer": (_relative, FLOOR),
    "LAMP": (_lamp, FLOOR),
    "LAMP x (m1 + n1)": (layer_adaptive, FLOOR),
}


class Compared(Rule):
    """Magnitude pruning that compares norms in one of the ways of `CANDIDATES`, or by the loss ("taylor")."""

    def __init__(self, name: str) -> None:
        self._name = name
        if name == "taylor":
            self.score = "taylor"

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: dict[str, Any], ctx: RuleContext
    ) -> tuple[list[Tensor], dict[str, Any]]:
        live = [score.double().masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
        compare, floor = CANDIDATES.get(self._name, (_absolute, 0.0))
        dead = choose_dead(compare(live), ctx.areas, ctx.sparsity, ctx.scope, heads=ctx.heads, floor=floor)
        return [mask & ~each for mask, each in zip(ctx.masks, dead, strict=True)], state


WAYS = (*CANDIDATES, "taylor", "a budget for each layer")


def _sparsified(model: nn.Module, way: str, **settings: Any) -> Sparsifier:
    scope = "layer" if way == "a budget for each layer" else "global"
    return sparsify_(model, SparsityConfig(scope=scope, measure_plans=False, **settings), rule=Compared(way))


def _densities(sparsifier: Sparsifier) -> dict[str, float]:
    return {layer.name: round(layer.live_blocks / layer.total_blocks, 4) for layer in sparsifier.report().layers}


MLP: dict[str, Any] = {"epochs": 8, "batch_size": 256, "target_sparsity": 0.9, "widths": (784, 512, 256, 10)}
MLP_RATES = {"two-phase": 4e-3, "magnitude": 8e-3}  # chosen on validation in docs/experiments.md, as the end of pruning


def train_mlp(method: str, block: int, way: str, seed: int) -> dict[str, Any]:
    """One training of the MLP of docs/experiments.md; its accuracy on validation images."""
    data = load_data("fashion-mnist")
    images, labels = data.train.images.flatten(1), data.train.labels
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for size, following in zip(MLP["widths"], MLP["widths"][1:], strict=False):
        layers += [nn.Linear(size, following), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    settings = {"method": method, "block_size": block, "target_sparsity": MLP["target_sparsity"], "on_mismatch": "nearest"}
    sparsifier = _sparsified(model, way, schedule=ScheduleConfig(end=0.4), **settings)
    batch, epochs = MLP["batch_size"], MLP["epochs"]
    total = epochs * math.ceil(len(images) / batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=MLP_RATES[method]))
    sparsifier.attach(optimizer, total_steps=total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for places in torch.randperm(len(images), generator=generator).split(batch):
            loss = functional.cross_entropy(model(images[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = model(data.validation.images.flatten(1)).argmax(1) == data.validation.labels
    return {"accuracy": float(right.float().mean()), "densities": _densities(sparsifier)}


DECODER: dict[str, Any] = {
    **{"layers": 4, "width": 256, "heads": 4, "context": 128, "batch_size": 16},
    **{"weight_decay": 0.1, "target_sparsity": 0.8, "block_size": 16},
}


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """A GPT over characters, with GPT-2's start: what writes into the residual stream begins smaller."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        layers, width, context = (DECODER[name] for name in ("layers", "width", "context"))
        self.tokens, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, DECODER["heads"]) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if name.endswith((".o", ".down")) else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.places(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train_decoder(text: Tensor, method: str, way: str, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """One training of the decoder; its loss on the last tenth of the text, in nats a character."""
    torch.manual_seed(seed)
    train, held_out = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = Decoder(int(text.max()) + 1)
    settings = {name: DECODER[name] for name in ("block_size", "target_sparsity")}
    sparsifier = None if method == "dense" else _sparsified(model, way, method=method, exclude=("head",), **settings)
    groups = parameter_groups(model, lr=lr, weight_decay=DECODER["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    if sparsifier is not None:
        sparsifier.attach(optimizer, total_steps=steps)

    def factor(step: int) -> float:
        warm = 0.1 * steps
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0.0, step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    context, batch = DECODER["context"], DECODER["batch_size"]

    def loss_at(source: Tensor, starts: Tensor) -> Tensor:
        windows = source[starts.unsqueeze(1) + torch.arange(context + 1)]
        return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    for _ in range(steps):
        loss = loss_at(train, torch.randint(len(train) - context, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        windows = torch.arange(0, len(held_out) - context - 1, context).split(batch)
        found = sum(float(loss_at(held_out, starts)) * len(starts) for starts in windows) / sum(map(len, windows))
    return {"loss": found, "densities": {} if sparsifier is None else _densities(sparsifier)}


def characters(path: Path) -> Tensor:
    """A text as numbers from 0 on."""
    text = path.read_text()
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text])


def main() -> None:
    """Train what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("mlp", "decoder"))
    parser.add_argument("--text", type=Path, help="of the decoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--methods", nargs="+", default=["two-phase", "magnitude"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 4], help="of the MLP")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="of the decoder")
    parser.add_argument("--steps", type=int, default=1000, help="of the decoder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads(json.dumps({"mlp": {**MLP, "rates": MLP_RATES}, "decoder": DECODER}))
    found = read_json(given.results) if given.results.exists() else {"settings": settings, "versions": versions(), "rows": []}
    if found["settings"] != settings:
        raise SystemExit(f"{given.results} is of other settings: remove it")
    keys: list[dict[str, Any]] = []
    for seed in given.seeds:
        for method in given.methods:
            for way in given.ways if method != "dense" else [""]:
                common = {"part": given.part, "seed": seed, "method": method, "way": way}
                if given.part == "mlp":
                    keys += [{**common, "block": block} for block in given.blocks]
                else:
                    keys += [{**common, "lr": rate, "steps": given.steps} for rate in given.rates]
    if given.part == "decoder" and given.text is None:
        parser.error("decoder wants --text FILE")
    text = None if given.text is None else characters(given.text)
    for key in keys:
        if any(key.items() <= row.items() for row in found["rows"]):
            continue
        wanted = {name: value for name, value in key.items() if name != "part"}
        row = {**key, **(train_mlp(**wanted) if text is None else train_decoder(text, **wanted))}
        found["rows"].append(row)
        write_json(given.results, found)
        print(row, flush=True)


if __name__ == "__main__":
    main()
