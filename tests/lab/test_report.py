"""The report's parts: which folders are read, what makes a row, numbers, warnings on both sides of each limit, and pictures."""

import base64
import io
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tests.lab.made_up_runs import put

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.report import comparison, figures, results, styles
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs

TIMES, MINUS, TO = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"
HOSTILE = '<b onload="x">$\\frac$|*a*`</b>&amp;\n![x](y)'


@pytest.fixture
def drawn():
    """For tests that want the panels drawn; the others save the time."""


@pytest.fixture(autouse=True)
def _blank_panels(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "panel", lambda draw, alt: figures.Picture("data:image/svg+xml;base64,", alt, 1, 1))


def write(*folders: Path) -> tuple[str, str]:
    """Both pages of these trainings."""
    path = write_report(find_runs(folders), folders[0] / "out")
    return path.read_text(), path.with_suffix(".md").read_text()


def table(markdown: str) -> dict[str, dict[str, str]]:
    """The table of results: row -> column -> cell."""
    found = {}
    for part in markdown.split("## Results")[1].split("\n## ")[0].split("### ")[1:]:
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines() if line.startswith("|")]
        lines = [[line[0], *([""] * (len(lines[0]) - len(line))), *line[1:]] for line in lines]  # dense has no settings
        found |= {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    return found


def warnings(markdown: str) -> list[str]:
    """The sentences of the warnings."""
    part = re.search(r"## Warnings\n(.*?)\n## ", markdown, re.DOTALL)
    return re.findall(r"^  - (.*)$", part[1], re.MULTILINE) if part else []


def svgs(html: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", html)]


def test_runs_are_found_at_every_depth_each_once_in_order(tmp_path):
    for name in ("b/two", "a", "c/deep/down"):
        put(tmp_path / name)
    put(tmp_path / "a" / "not-a-run-of-its-own")
    runs = find_runs([tmp_path / "c", tmp_path / "b", tmp_path / "a", tmp_path / "b" / "two"])
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == ["a", "b/two", "c/deep/down"]
    run = find_runs([tmp_path / "a"])[0]
    assert (run.label, run.seed, run.result["test_accuracy"]) == ("two-phase 16x16", 0, 0.9)
    assert run.masks["1"].dtype == bool and run.masks["1"].sum() == 2
    assert find_runs([put(tmp_path / "d", "dense")])[0].label == "dense"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 1}, r"result\.json is not a result of version 2: train again"),
        ({"training_macs": float("nan")}, r"result\.json has no number for training_macs"),
        ({"config": {"method": "dense"}}, r"result\.json lacks config"),
        ({"layers": [{"name": "1"}]}, r"result\.json lacks layers"),
        ({"history": []}, r"result\.json has a history of other epochs"),
        ({"surgery": None}, r"result\.json lacks surgery"),
    ],
)
def test_results_that_cannot_be_read_say_which_and_why(tmp_path, changes, says):
    folder = put(tmp_path / "bad", "dense")
    result = json.loads((folder / "result.json").read_text()) | changes
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(KronblocksError, match=says):
        find_runs([put(tmp_path / "good"), folder])


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(KronblocksError, match=r"nowhere holds no result\.json: name a folder"):
        find_runs([put(tmp_path / "a"), tmp_path / "nowhere"])
    (tmp_path / "a" / "masks.safetensors").unlink()
    with pytest.raises(KronblocksError, match=r"cannot read .*masks\.safetensors"):
        find_runs([tmp_path])
    with pytest.raises(KronblocksError, match="nothing to report"):
        write_report([], tmp_path)


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    runs = find_runs([put(tmp_path / "a")])
    (tmp_path / "file").touch()
    with pytest.raises(KronblocksError, match="choose another --out"):
        write_report(runs, tmp_path / "file" / "out")


def test_the_version_is_that_of_train():
    from kronblocks_lab.training import train

    assert results.RESULT_VERSION == train.RESULT_VERSION


def test_the_table_holds_means_spreads_medians_ranges_and_ratios(tmp_path):
    accuracies, seconds = [0.91, 0.93, 0.98], [4.0, 40.0, 5.0]
    for seed, (accuracy, time) in enumerate(zip(accuracies, seconds, strict=True)):
        put(tmp_path / f"s{seed}", seed=seed, test_accuracy=accuracy, train_seconds=time)
        put(tmp_path / f"d{seed}", "dense", seed=seed, training_macs=4 * 10**9, train_seconds=20.0)
    rows = table(write(tmp_path)[1])
    assert list(rows) == ["dense", "two-phase 16x16"]
    row, mean = rows["two-phase 16x16"], sum(accuracies) / 3
    spread = (sum((a - mean) ** 2 for a in accuracies) / 2) ** 0.5
    assert row["Test accuracy, %"] == f"**{100 * mean:.2f} ± {100 * spread:.2f}**"
    assert rows["dense"]["Test accuracy, %"] == "90.00 ± 0.00"
    assert row["Seeds"] == "3"
    assert row["Settings"] == "rank 4, target 75 %"
    assert row["Weights in zero blocks, %"] == "75.00"
    assert row["Live / all blocks"] == "2 / 8"
    assert row["Trained parameters, at most"] == f"1,500, 0.75{TIMES}"
    assert row["Training multiply-adds, G"] == f"1.00, 0.25{TIMES}"
    assert row["Inference multiply-adds per sample, M"] == f"1.00, 1.00{TIMES}"
    assert row["Training seconds, s"] == f"5.00 (4.00{TO}40.0), 0.25{TIMES}"
    assert row["Peak memory, MiB"] == f"64.0 (64.0), 1.00{TIMES}"
    assert row["Counted bytes, MiB"] == f"5.00, 1.00{TIMES}"


def test_where_dense_wins_it_shows(tmp_path):
    put(tmp_path / "a", test_accuracy=0.9)
    put(tmp_path / "b", "dense", test_accuracy=0.95)
    html, markdown = write(tmp_path)
    rows = table(markdown)
    assert rows["dense"]["Test accuracy, %"] == "**95.00** (1 seed)"
    assert rows["two-phase 16x16"]["Test accuracy, %"] == "90.00 (1 seed)"
    assert "<strong>95.00</strong>" in html and "<strong>90.00</strong>" not in html
    assert f"90.00 % test accuracy (1 seed) against 95.00 % dense ({MINUS}5.00 points), 0.75 of the trained parameters" in html


def test_a_seed_that_was_run_twice_counts_once(tmp_path):
    for name, seed, accuracy in (("a", 0, 0.9), ("b", 0, 0.92), ("c", 1, 0.95)):
        put(tmp_path / name, seed=seed, test_accuracy=accuracy)
    row = table(write(tmp_path)[1])["two-phase 16x16"]
    assert row["Test accuracy, %"] == f"**93.00 ± {100 * statistics.stdev([0.91, 0.95]):.2f}**"
    assert row["Seeds"] == "2 (3 runs)"


def test_rows_are_told_apart_by_what_differs_and_dense_by_nothing_that_it_ignores(tmp_path):
    put(tmp_path / "a", settings={"rank": 2})
    put(tmp_path / "b", settings={"rank": 4})
    put(tmp_path / "c", settings={"block_size": "16x4"})
    put(tmp_path / "d", "magnitude", settings={"rank": 2})
    put(tmp_path / "e", "magnitude", seed=1, settings={"rank": 4, "penalty": {"strength": 3.0}})
    put(tmp_path / "f", "dense", settings={"block_size": "8", "sparsity": 0.5, "schedule": {"start": 0.1}})
    put(tmp_path / "g", "dense", seed=1)
    rows = table(write(tmp_path)[1])
    names = ["dense", "two-phase 16x4", "two-phase 16x16, rank 2", "two-phase 16x16, rank 4", "magnitude 16x16"]
    assert list(rows) == names
    assert rows["dense"]["Seeds"] == rows["magnitude 16x16"]["Seeds"] == "2"


def test_tasks_are_compared_within_themselves_only(tmp_path, drawn):
    put(tmp_path / "a", test_accuracy=0.8, train_seconds=30.0)
    put(tmp_path / "b", "dense", test_accuracy=0.7, train_seconds=40.0)
    put(tmp_path / "c", test_accuracy=0.9, train_seconds=30.0, settings={"data": "mnist5k"})
    html, markdown = write(tmp_path)
    assert "### digits, mlp 64, 3 epochs, batches of 32" in markdown and "### mnist5k, mlp 64" in markdown
    assert warnings(markdown) == ["Nothing can be compared with dense: add one with --method dense."]
    assert "No dense training** (mnist5k, mlp 64, 3 epochs, batches of 32)" in markdown
    assert html.count("<strong>") == 2
    assert "0.75 of the training seconds" in markdown and "there is no dense training to compare it with" in markdown


def test_without_sparse_trainings_there_is_still_a_report(tmp_path):
    html, markdown = write(put(tmp_path / "a", "dense"))
    assert "there is no sparse training to compare with it" in html
    assert not warnings(markdown) and "Warnings" not in html


@pytest.mark.parametrize(
    ("name", "better", "worse", "says"),
    [
        (
            "train_seconds",
            10.0,
            10.1,
            "Slower than dense: 10.1 against 10.0 s (1.01 times; with one run the spread is not known).",
        ),
        ("peak_memory_bytes", 2**26, 2**27, "More peak memory than dense: 128 against 64.0 MiB (2.00 times; with one run the"),
        ("training_macs", 10**9, 2 * 10**9, "More multiply-adds in training than dense: 2.00 against 1.00 G (2.00 times)."),
        ("inference_macs_per_sample", 10**6, 3 * 10**6, "More multiply-adds in inference than dense: 3.00 against 1.00 M"),
        (
            "test_accuracy",
            0.9,
            0.899,
            f"Lower test accuracy than dense: 89.90 against 90.00 % ({MINUS}0.10 points; with one seed the",
        ),
        (
            "block_sparsity",
            0.75,
            0.74,
            "Missed its target sparsity: 74.00 % of the weights in zero blocks, 75 % wanted (seed 0).",
        ),
        ("block_sparsity", 0.874, 0.88, "Missed its target sparsity: 88.00 % of the weights"),
        ("test_loss", 5.0, None, "Losses that are not finite: the test (seed 0)."),
    ],
)
def test_each_warning_on_both_sides_of_its_limit(tmp_path, name, better, worse, says):
    dense = put(tmp_path / "dense", "dense")
    assert warnings(write(dense, put(tmp_path / "a", **{name: better}))[1]) == []
    (found,) = warnings(write(dense, put(tmp_path / "b", **{name: worse}))[1])
    assert found.startswith(says)


@pytest.mark.parametrize(("lowest", "remark"), [(0.89, "; within the spread"), (0.80, "")])
def test_a_difference_within_the_spread_is_called_that(tmp_path, lowest, remark):
    for seed in (0, 1):
        put(tmp_path / f"d{seed}", "dense", seed=seed, test_accuracy=0.90 + 0.01 * seed, train_seconds=10.0 + 5 * seed)
        seconds = 12.0 + 5 * seed if remark else 20.0 + seed
        put(tmp_path / f"s{seed}", seed=seed, test_accuracy=lowest + 0.01 * seed, train_seconds=seconds)
    accuracy, slower = warnings(write(tmp_path)[1])
    assert re.search(rf"points{remark}\)\.$", accuracy)
    ranges = f", 12.0{TO}17.0 and 10.0{TO}15.0" if remark else ""
    assert re.search(rf"times{remark}{ranges}\)\.$", slower)


def test_losses_that_are_not_finite_are_named_for_dense_too(tmp_path, drawn):
    put(tmp_path / "a", losses=[1.0, None, float("nan")], test_loss=float("nan"))
    put(tmp_path / "b", "dense", seed=3, losses=[1.0, 0.5, float("inf")])
    assert set(warnings(write(tmp_path)[1])) == {
        "Losses that are not finite: epoch 2, epoch 3, the test (seed 0).",
        "Losses that are not finite: epoch 3 (seed 3).",
    }


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"threads": 1}, "threads"),
        ({"versions": {"torch": "2.14.0", "processor": "another"}}, "torch, processor"),
        ({"peak_memory_exact": False}, "memory since"),
    ],
)
def test_unequal_conditions_are_said(tmp_path, changes, names):
    html, markdown = write(put(tmp_path / "a"), put(tmp_path / "b", "dense", **changes))
    assert warnings(markdown) == [f"Seconds and memory may not be comparable: {names} differ, see the setup."]
    assert " / " in markdown.split("Software and machine")[1] and "<dd><strong>" in html


def test_layers_left_dense_and_other_block_sizes_are_said_once(tmp_path):
    surgery = {
        "selected": [{"name": "5", "block_size": "2x16", "note": "16x16 does not divide, 2x16 does"}],
        "left_dense": [{"name": "head", "reason": "excluded"}],
    }
    put(tmp_path / "a", surgery=surgery)
    put(tmp_path / "b", "magnitude", surgery=surgery)
    put(tmp_path / "c", "static")
    line = "**two-phase 16x16, magnitude 16x16**: layer head is left dense: excluded; layer 5: 16x16 does not divide, 2x16 does."
    markdown = write(tmp_path)[1]
    assert markdown.count(line) == 1
    assert "**static 16x16**: every layer is as it was asked for." in markdown


def test_hostile_names_stay_text_everywhere(tmp_path, drawn):
    layer = {"name": HOSTILE, "out_features": 64, "in_features": 32, "block_size": "16x16"}
    layers = [{**layer, "live_blocks": 2, "total_blocks": 8, "sparsity": 0.75}]
    surgery = {"selected": [], "left_dense": [{"name": HOSTILE, "reason": HOSTILE}]}
    changes = {"layers": layers, "surgery": surgery, "versions": {HOSTILE: HOSTILE}}
    put(tmp_path / "a", HOSTILE, settings={"data": HOSTILE, "other": HOSTILE}, **changes)
    path = write_report(find_runs([tmp_path]), tmp_path / "out", title=HOSTILE)
    html, markdown = path.read_text(), path.with_suffix(".md").read_text()
    assert "<b onload" not in html and "&lt;b onload=&#34;x&#34;&gt;$\\frac$|" in html
    assert not re.search(r"(?<!\\)<b onload|(?<!\\)!?(?<!\\)\[x", markdown)
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (14, 3)
    for svg in svgs(html):
        ElementTree.fromstring(svg)


def test_the_page_holds_all_it_shows(tmp_path, drawn):
    put(tmp_path / "a")
    put(tmp_path / "b", "dense")
    html = write(tmp_path)[0]
    assert "<script" not in html and "http://" not in html and "https://" not in html and "@import" not in html
    assert all(source.startswith("data:image/") for source in re.findall(r"<img src=\"([^\"]*)", html))
    pictures = svgs(html)
    assert len(pictures) == 6
    for svg in pictures:
        assert not re.search(r"<(script|image)|href=\"(?!#)|<dc:date", svg)
    assert html.count("data:image/png") == 1


def test_the_same_runs_make_the_same_bytes(tmp_path, drawn):
    put(tmp_path / "x" / "a")
    put(tmp_path / "x" / "b", "dense")
    put(tmp_path / "x" / "c", seed=1, test_accuracy=0.8)
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    runs = find_runs([tmp_path / "x"])
    first = write_report(runs, tmp_path / "one")
    second = write_report(find_runs([tmp_path / "y"])[::-1], tmp_path / "two" / "deeper")
    for suffix in (".html", ".md"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()
    assert str(tmp_path) not in first.read_text()


@pytest.mark.parametrize(
    ("shape", "block", "cell"),
    [((4, 2), "16x16", (16, 16)), ((256, 196), "4x4", (1, 1)), ((16, 49), "16x16", (7, 7)), ((5, 16), "2x16", (4, 16))],
)
def test_every_block_is_a_whole_number_of_pixels(shape, block, cell):
    mask = np.random.default_rng(0).random(shape) < 0.3
    picture = figures.block_map("1", mask, block)
    assert (picture.height, picture.width) == (shape[0] * cell[0], shape[1] * cell[1])
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
    assert pixels.shape[:2] == (picture.height, picture.width)
    dark = pixels[..., :3].mean(axis=2) < 0.5
    inside = dark.reshape(shape[0], cell[0], shape[1], cell[1])[:, : max(1, cell[0] - 1), :, : max(1, cell[1] - 1)]
    np.testing.assert_array_equal(inside, np.broadcast_to(mask[:, None, :, None], inside.shape))


def test_phases_are_shaded_only_where_all_runs_agree(tmp_path, drawn):
    put(tmp_path / "a", phases="discover refine heal")
    put(tmp_path / "b", seed=1, phases="discover refine heal")
    put(tmp_path / "c", "kron-l1", phases="discover discover heal")
    assert "Shaded: the phase" in write(tmp_path)[0]
    put(tmp_path / "d", seed=2, phases="discover heal heal")
    assert "Shaded: the phase" not in write(tmp_path)[0]


def test_accuracies_far_apart_are_drawn_by_their_error(tmp_path, drawn):
    put(tmp_path / "a", test_accuracy=0.10)
    put(tmp_path / "b", "dense", test_accuracy=0.95)
    assert "log scale of the error" in svgs(write(tmp_path)[0])[0]
    near = [put(tmp_path / "c", test_accuracy=0.94), put(tmp_path / "d", "dense", test_accuracy=1.0)]
    assert "log scale" not in svgs(write(*near)[0])[0]


def test_one_method_has_one_colour_and_several_markers(tmp_path):
    for number, block in enumerate(("4", "8", "16", "16x4", "2")):
        put(tmp_path / f"{number}", settings={"block_size": block})
    put(tmp_path / "dense", "dense")
    put(tmp_path / "unknown", "invented")
    looks = figures.looks(comparison.compared(find_runs([tmp_path]))[0])
    assert len({look.colour for look in looks[1:6]}) == 1 and len(set(looks)) == 6
    assert looks[0].colour != looks[1].colour != looks[6].colour == styles.OTHER_COLOUR
