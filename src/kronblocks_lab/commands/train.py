"""`kronblocks train`: run one training, and show the result."""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from kronblocks.core.tables import listed, rows_of, span, starred
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.train import train


def main(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train one model and show the result.

    In large models like layers share a row; result.json in the folder lists each of them.
    """
    Console().print(_summary(config, train(config)))


def _summary(config: TrainConfig, result: dict[str, Any]) -> Table:
    data = result.get("source", {}).get("title", config.data)
    table = Table(title=f"{config.method} on {data}: {config.out}", show_header=False, title_justify="left")
    rows = {
        "test loss": _loss(result),
        "test accuracy": f"{100 * result['test_accuracy']:.2f} %",
        "weights in zero blocks": f"{100 * result['block_sparsity']:.2f} %",
        "live blocks": f"{result['live_blocks']:,} of {result['total_blocks']:,}",
        "trained parameters": f"{result['trainable_parameters_max']:,} at most, {result['trainable_parameters_end']:,} at last",
        "training": f"{result['train_seconds']:.1f} s, {result['training_macs'] / 1e9:,.1f} G multiply-adds",
        "peak memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB above the loaded data",
        "block sizes": _sizes(result) if config.method != "dense" else "",
        "left dense": _left_dense(result["surgery"]["left_dense"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _loss(result: dict[str, Any]) -> str:
    """Of a language model, whose measure it is."""
    if "test_perplexity" not in result or result["test_loss"] is None:
        return ""
    others = f"perplexity {result['test_perplexity']:.3f}, {result['test_bits_per_character']:.3f} bits"
    return f"{result['test_loss']:.4f} nats per character ({others})"


def _left_dense(layers: list[dict[str, str]]) -> str:
    """The layers that stay dense, with reasons."""
    groups, _ = rows_of(layers, lambda each: each["name"], lambda each: starred(each["reason"]), every_layer=False)
    return "; ".join(f"{span([each['name'] for each in alike])}: {alike[0]['reason']}" for alike in groups)


def _sizes(result: dict[str, Any]) -> str:
    """The block sizes that the layers have."""
    layers: dict[str, list[str]] = {}
    for layer in result["layers"]:
        layers.setdefault(layer["block_size"], []).append(layer["name"])
    return (
        "; ".join(f"{size} in {listed(names)}" for size, names in layers.items()) if len(layers) > 1 else next(iter(layers), "")
    )
