"""`kronblocks reproduce tables`: the page of the experiments, wholly from the JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kronblocks.blocks import BlockSize
from kronblocks.errors import KronblocksError
from kronblocks.experiments.bench.results import read
from kronblocks.experiments.bench.tables import table
from kronblocks.experiments.reproduce import searches
from kronblocks.experiments.reproduce.figures import draw
from kronblocks.experiments.reproduce.published import FOOTNOTE, PUBLISHED
from kronblocks.experiments.reproduce.statistics import CellResult, cells
from kronblocks.experiments.reproduce.studies import has_cell
from kronblocks.experiments.reproduce.trials import words
from kronblocks.files import write_text

OURS = "two-phase"
BYTES = ("parameters", "gradients", "optimizer_state", "saved_tensors")
_INTRO = """# Experiments

<!-- written by `kronblocks reproduce tables` from benchmarks/results: do not edit -->

Every method has the same number of trials on the same task (three learning rates times two values of its own second setting,
with other seeds than those below), and the trial with the best mean **validation** accuracy is the one that is compared. Test
images decide nothing. Accuracies are of the last epoch. Zeros are counted exactly, in blocks. Differences are paired by seed,
with their 95% interval (Student's t). The best sparse method of a comparison is bold, whoever it is. Multiply-adds are those of
products in forward and backward, as each layer computed at that density, growth scores included; "parameters" are those trained
at the most and at the end; "bytes" are parameters, gradients, optimiser state and tensors kept for backward at their largest;
all relative to dense. How long trainings take is not told here, since several ran at a time on a machine that had other work too:
see [benchmarks](benchmarks.md). Where a study names another way of choosing settings, that holds.

What these comparisons do not settle: `kron-l1` and both lassos always choose the largest rate that was tried, and on the linear
model and LeNet-5 every method does, so more might be better (at twice the rate `kron-l1` with 16x16 blocks gains about a point
on the MLP, one seed). Blocks that `rigl` grows start with zero moments at a late step of Adam and move too fast at first; that
costs it some tenths of a point (two seeds). The strength of penalties is left to the controller and not tuned.
"""


_REPRODUCE = """## How to reproduce

```sh
pip install 'kronblocks[experiments]'
kronblocks reproduce mlp       # the first table of the README; two trainings at a time, one thread each: about two hours
kronblocks reproduce linear    # also: lenet5, vit-tiny, swin-tiny, ablation, search, or all
kronblocks reproduce tables    # this page
```

What is done is not run again, so an interrupted command goes on where it was. The paper's own trainings of transformers, on
CIFAR-100 with images of 224 pixels, 100 epochs and three seeds, want a GPU, and have **not been run** here:

```sh
kronblocks reproduce vit-tiny --full
kronblocks reproduce vit-base --full
kronblocks reproduce swin-tiny --full
```"""


def write(results: Path, page: Path) -> Path:
    """Make the page; returns its path.

    Raises:
        KronblocksError: there are no results.
    """
    files, searched = sorted(results.glob("reproduce-*.json")), results / f"{searches.NAME}.json"
    if not files and not searched.exists():
        raise KronblocksError(f"{results} holds no reproduce-*.json: run kronblocks reproduce mlp first, or name another folder")
    parts = [_INTRO]
    for file in files:
        name, data = file.stem.removeprefix("reproduce-"), read(file)
        parts += _study(name, data)
        if picture := _picture(name, data, page):
            parts += [f"![Test accuracy over sparsity]({picture})", ""]
    if searched.exists():
        parts += searches.page(read(searched))
    write_text(page, "\n".join([*parts, _REPRODUCE]) + "\n")
    return page


def _picture(name: str, data: dict[str, Any], page: Path) -> str | None:
    """The figure of a study with several sparsities, beside the page; its address there."""
    found = cells(data["rows"])
    if data["settings"]["variants"] or len({cell.sparsity for cell in found if cell.block}) < 3:
        return None
    about = f"{data['settings']['data']}, {data['settings']['model']}, {len(found[0].rows)} seeds"
    draw(found, page.parent / "figures" / f"experiments-{name}.png", about)
    return f"figures/experiments-{name}.png"


def summary(results: Path, study: str = "mlp", blocks: Sequence[str] = ("4", "16"), sparsity: float = 0.9) -> list[str]:
    """The lines of a short table: every method of a study at some block sizes and one sparsity."""
    data = read(results / f"reproduce-{study}.json")
    found, settings = cells(data["rows"]), data["settings"]
    columns = ["method"]
    for block in blocks:
        size = BlockSize.parse(block)
        columns += [f"{size}: test accuracy %", f"{OURS} minus it", "parameters, most", "multiply-adds"]
    rows = []
    for method in dict.fromkeys(cell.method for cell in found):
        row = [method]
        for block in blocks:
            own, ours = (_at(found, name, block, sparsity) for name in (method, OURS))
            best = max(cell.accuracy for cell in found if (cell.block, cell.sparsity) == (block, sparsity))
            accuracy = own.spread_of("test_accuracy")
            row += [f"**{accuracy}**" if own.block and own.accuracy == best else accuracy]
            row += ["" if own is ours else str(ours.against(own))]
            row += [f"{own.to_dense(name):.2f}" for name in ("trainable_parameters_max", "training_macs")]
        rows.append(row)
    widths = "-".join(map(str, settings["widths"]))
    about = (
        f"{settings['data']}, MLP with hidden layers {widths}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{100 * sparsity:g}% of the weights in zero blocks, mean ± standard deviation of {len(found[0].rows)} seeds; differences"
        " in points with their 95% interval over pairs of the same seed. Parameters that are trained at the most and "
        f"multiply-adds of training are relative to dense. Every method had six trials on validation (so {OURS} has rank 8 here, "
        f"by default 4 at 4x4); torch {data['versions']['torch']}."
    )
    return [*table(columns, rows), "", about]


def _at(found: Sequence[CellResult], method: str, block: str, sparsity: float) -> CellResult:
    place = ("", 0.0) if method == "dense" else (block, sparsity)
    for cell in found:
        if (cell.method, cell.block, cell.sparsity) == (method, *place):
            return cell
    raise KronblocksError(f"{method} was not run with blocks of {block} at {100 * sparsity:g}%: run kronblocks reproduce mlp")


def _study(name: str, data: dict[str, Any]) -> list[str]:
    found = cells(data["rows"])
    if not found:
        return []
    settings = data["settings"]
    widths = f" {'-'.join(map(str, settings['widths']))}" if settings["widths"] else ""
    images = f" ({settings['train_images']:,} training images)" if settings.get("train_images") else ""
    lines = [
        f"## {name}",
        "",
        f"{settings['data']}{images}, {settings['model']}{widths}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{len(found[0].rows)} seeds; {data['versions']['processor']}, torch {data['versions']['torch']}.",
        "",
    ]
    dense = [cell for cell in found if cell.method == "dense"]
    groups = dict.fromkeys((cell.block, cell.sparsity) for cell in found if cell.block)
    if settings["variants"]:
        return lines + _variants(name, found, settings)
    for block, sparsity in sorted(groups, key=lambda key: (key[1], BlockSize.parse(key[0]).area)):
        here = [cell for cell in found if (cell.block, cell.sparsity) == (block, sparsity)]
        lines += [f"### {100 * sparsity:g}% zeros, {BlockSize.parse(block)} blocks", ""]
        seeds = max(len(cell.rows) for cell in found)
        expected = sum(has_cell(method, block) for method in settings["methods"])
        missing = expected * seeds - sum(len(cell.rows) for cell in [*dense, *here])
        if missing:
            lines += [f"Not finished: {missing} trainings are missing.", ""]
            continue
        lines += [*_comparison([*dense, *here], settings), "", *_sizes(here)]
    return lines + ([_WHERE_BASELINES_WIN[name], ""] if name in _WHERE_BASELINES_WIN else []) + _trials(data)


_WHERE_BASELINES_WIN = {
    "mlp": """Where a baseline wins: at 50% with 16x16 blocks `magnitude`, by 0.19 points: half of the blocks carry the
weight, and `two-phase` trains their free values only from the lift on, after about a quarter of the training.
At 2x2 `kron-l1`, with more parameters than dense. `static` is level at 80% with 16x16 blocks: random
live blocks are enough there, and train from the first step; at 95% they are not.""",
    "linear-mnist5k": """Where baselines
win: at 50% both lassos, `iterative`, `magnitude`, `rigl` and `kron-l1`, by 0.2 to 0.7 points. A
few hundred steps are few for one layer: every method takes the largest rate that is tried, and what trains free
values from the first step gets further. At 90%, where the choice of blocks matters more, `two-phase` is the
best.""",
    "linear-fashion": """Where a baseline
wins: at 90% `kron-l1` and `magnitude`, by about 0.1 point, with intervals that include 0.""",
    "vit-tiny-fashion": """What this shows, and what it does not: all methods train at one learning rate, untuned, for some 300
steps, after which dense has only begun to learn (52%). Factors learn faster at that rate, hence the lead of `two-phase` and
`kron-l1`; a longer training, or a rate of its own for each method, may order them otherwise.""",
    "swin-tiny-fashion": """Where baselines win: `iterative`, `static`, `magnitude` and `rigl` are ahead by 1.4 to 2.2 points, two
of them clearly. A training of some 300 steps is too short to tell good blocks from bad ones (random ones are as good as any),
and what counts is how long free values train: `two-phase` trains them only from the lift on. All methods train at one
learning rate here, untuned.""",
    "lenet5-mnist5k": """Where a baseline wins: at 50% `rigl`, at 90% `iterative` and `magnitude`, by 0.1 to 0.2 points, with
intervals that include 0; the two train the whole dense network for most of the time.""",
    "lenet5-fashion": """Where a baseline wins: at 90% `magnitude` and `iterative`, by about 0.2 points, with intervals that
include 0; they train all weights of the linear layers until half of the training is over. Nothing comes within a point of dense,
though: the linear layers are left with some six thousand of 59 thousand weights behind convolutions of 2,572, and that is too
few for this task, whichever blocks they are: see lenet5-fashion-finer, where single weights do not do it either. Tried for
`two-phase` on validation, one seed each, 10 to 30 epochs, and within half a point of it as it is: higher rank, rate or smaller
batches, other moments of the lift and ends of pruning, regrowth, gradient times weight as the score, shares of the layers by
Erdos-Renyi or by LAMP (Lee et al. 2021), features flattened the other way round, and a dense teacher (half a point better).""",
    "lenet5-fashion-finer": """What the size of blocks costs here, with twice the epochs. With blocks of one weight
`magnitude` prunes single weights, as freely as zeros can be chosen, and still loses 0.6 points to dense: a tenth of these
layers is too little, and being within 0.3 points, as on the MLP, is out of reach of any blocks. Blocks of 2x2 cost nothing
beyond that, blocks of 4x4 0.4 points. `two-phase` stays 0.2 points behind `magnitude`, which trains all weights until 70% of
the training; what would beat both is more weights: fewer zeros in these layers, or wider convolutions before them.""",
}
"""What the tables show against the default method, and why."""


_DECIDED = """Few intervals leave 0 out: one bank of tiles and the staircase lose at 16x16, three times the rate for factors at
both sizes; the rest is within the noise of three seeds. So the base stayed but for three settings: factors train at the rate of
the dense weights (no worse, and further from where it gets worse), pruning ends at 0.4 of the training (no worse, and cheaper),
and the rank is a quarter of a block's weights from 2 to 8 (the trials of the comparison of methods say the same: 8 at 16x16).
Rows that begin with A combine several."""


_VARIED = {
    "ablation": (f"What the defaults of {OURS} were chosen by, one setting changed at a time", _DECIDED),
    "group-lasso-forms": ("Group LASSO as a proximal step whose strength a controller sets, and as published, in the loss", ""),
    "kron-l1-forms": ("The paper's L1 on S in the loss, with several strengths, and as a proximal step", ""),
}
"""What a study of variants is for, and what came of it."""


def _variants(name: str, found: Sequence[CellResult], settings: dict[str, Any]) -> list[str]:
    """The paired difference of every variant to the first one, for each block size."""
    measure = "validation_accuracy"  # test images decide nothing
    base = words(settings["base"])
    about, decided = _VARIED.get(name, (f"Variants of {', '.join(settings['methods'])}", ""))
    lines = [
        f"{about}: paired differences of **validation** accuracy in points to the first row, and training multiply-adds relative "
        f"to it. In common: {base}.",
        "",
        *([decided, ""] if decided else []),
    ]
    places = sorted({(cell.block, cell.sparsity) for cell in found}, key=lambda place: (place[1], BlockSize.parse(place[0]).area))
    columns = ["changed"]
    for block, sparsity in places:
        columns += [f"{BlockSize.parse(block)}, {100 * sparsity:g}%", "multiply-adds"]
    rows = []
    for number, variant in enumerate(settings["variants"]):
        row = [variant]
        for place in places:
            here = {cell.trial: cell for cell in found if (cell.block, cell.sparsity) == place}
            own, first = here.get(number), here.get(0)
            if own is None or first is None:
                row += ["", ""]
                continue
            row.append(own.spread_of(measure) if number == 0 else str(own.against(first, measure)))
            row.append(f"{own.mean('training_macs') / first.mean('training_macs'):.2f}")
        rows.append(row)
    return [*lines, *table(columns, rows), ""]


def _comparison(here: Sequence[CellResult], settings: dict[str, Any]) -> list[str]:
    ours = next((cell for cell in here if cell.method == OURS), None)
    sparse = [cell for cell in here if cell.block]
    best = max(sparse, key=lambda cell: cell.accuracy)
    published = [(settings["model"], cell.method) in PUBLISHED for cell in here]
    columns = ["method", "test accuracy %", f"{OURS} minus it", "zeros %", "parameters, most", "at the end"]
    columns += ["training multiply-adds", "inference multiply-adds", "bytes"]
    columns += ["published % (zeros)"] * any(published)
    lines = []
    for cell in here:
        name = f"**{cell.method}**" if cell is best else cell.method
        difference = "" if ours is None or cell is ours else str(ours.against(cell))
        line = [
            name,
            cell.spread_of("test_accuracy"),
            difference,
            f"{100 * cell.mean('block_sparsity'):.2f}",
            f"{cell.to_dense('trainable_parameters_max'):.2f}",
            f"{cell.to_dense('trainable_parameters_end'):.2f}",
            f"{cell.to_dense('training_macs'):.2f}",
            f"{cell.to_dense('inference_macs_per_sample'):.2f}",
            f"{cell.to_dense(*BYTES):.2f}",
        ]
        value = PUBLISHED.get((settings["model"], cell.method))
        lines.append(line + [str(value or "")] * any(published))
    return table(columns, lines) + (["", FOOTNOTE] if any(published) else [])


def _sizes(here: Iterable[CellResult]) -> list[str]:
    """The block sizes that layers really had, where one does not divide."""
    sizes = {cell.rows[0]["blocks"] for cell in here}
    return [f"Effective block sizes: {', '.join(sorted(sizes))}.", ""] if any(" " in each for each in sizes) else []


def _trials(data: dict[str, Any]) -> list[str]:
    """Which trial was chosen for each method and block size, and of how many."""
    chosen: dict[tuple[str, str], str] = {}
    tried: dict[tuple[str, str], set[int]] = {}
    for row in data["rows"]:
        place = (row["block"], row["method"])
        if row["part"] == "compare":
            chosen[place] = row["settings"]
        else:
            tried.setdefault(place, set()).add(row["trial"])
    settings, methods = data["settings"], data["settings"]["methods"]
    if not tried:
        texts = {method: text for (_, method), text in chosen.items()}
        chosen_as = "; ".join(f"{method} {texts[method]}" for method in methods if method in texts)
        return [f"Settings, not tuned in this study: {chosen_as}.", ""]
    lines = []
    for block, method in sorted(chosen, key=lambda key: (BlockSize.parse(key[0]).area if key[0] else 0, methods.index(key[1]))):
        number = tried.get((settings["tuned_as"].get(block, block), method), ())
        lines.append([method, str(BlockSize.parse(block)) if block else "", chosen[block, method], str(len(number))])
    seeds = len({row["seed"] for row in data["rows"] if row["part"] == "tune"})
    title = f"### Settings chosen on validation, {seeds} seed{'s' * (seeds != 1)} a trial"
    where = f"Tried at {100 * settings['tuned_at']:g}% zeros, and taken for the other sparsities too."
    borrowed = ", ".join(f"{block}x{block} those of {other}x{other}" for block, other in settings["tuned_as"].items())
    taken = f" Not tried but taken from another size: {borrowed}." if borrowed else ""
    small = (
        " A rank above the block's area counts as that area." if any(BlockSize.parse(b).area < 8 for b, _ in chosen if b) else ""
    )
    return [title, "", where + taken + small, "", *table(["method", "block", "settings", "trials"], lines, left=3), ""]
