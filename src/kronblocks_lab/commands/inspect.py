"""`kronblocks inspect`: show what a saved model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open

from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.saving import CARD, read_card


def main(path: tyro.conf.Positional[Path]) -> None:
    """Show what a saved model holds: layers, blocks, tensors and bytes.

    Args:
        path: a folder of save_pretrained, export or train, or a .safetensors file.
    """
    console = Console(soft_wrap=True, highlight=False)
    if (path / "model" / CARD).exists():
        path = path / "model"
    if path.is_dir():
        card = read_card(path)
        console.print(_layers(card))
        for name, value in {"model": card.get("model"), **card["metadata"]}.items():
            console.print(f"{name}: {value}", markup=False)
        path = path / card["weights"]
    console.print(_tensors(path))


def _layers(card: dict[str, Any]) -> Table:
    table = Table(title="block layers", title_justify="left")
    for name in ("layer", "kind", "shape", "blocks", "live", "rank"):
        table.add_column(name, justify="left" if name in ("layer", "kind") else "right")
    layers = card["structure"].get("layers")
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise KronblocksError(f"the {CARD} is damaged: its structure holds no layers")
    for name, layer in layers.items():
        shape = f"{layer.get('out_features')}x{layer.get('in_features')}"
        cells = (name, layer.get("kind"), shape, layer.get("block_size"), layer.get("capacity", ""), layer.get("rank", ""))
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def _tensors(path: Path) -> Table:
    table = Table(title=escape(str(path)), title_justify="left")
    for name in ("tensor", "type", "shape", "KiB", "zeros %"):
        table.add_column(name, justify="left" if name == "tensor" else "right")
    total = 0
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            for name in names:
                tensor = file.get_tensor(name)
                size, zeros = tensor.numel() * tensor.element_size(), int((tensor == 0).sum()) / max(1, tensor.numel())
                shape, total = "x".join(map(str, tensor.shape)), total + size
                table.add_row(
                    escape(name), str(tensor.dtype).removeprefix("torch."), shape, f"{size / 1024:,.1f}", f"{100 * zeros:.1f}"
                )
    except (OSError, SafetensorError) as error:
        raise KronblocksError(f"cannot read {path}: {error}") from error
    table.add_section()
    table.add_row("together", "", "", f"{total / 1024:,.1f}", "")
    return table
