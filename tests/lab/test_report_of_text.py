"""The report of language models: losses are compared instead of accuracies, and what they write is shown."""

from __future__ import annotations

import pytest
from tests.lab.made_up_runs import put
from tests.lab.test_report import _blank_panels, table, warnings, write  # noqa: F401

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.report.comparison import compared
from kronblocks_lab.report.results import find_runs
from kronblocks_lab.report.samples import samples, visible

MINUS = "\N{MINUS SIGN}"
SOURCE = {"title": "a book", "characters": 900, "bytes": 1000, "sha256": "0123456789abcdef" * 4}
SIZES = {"data": "text", "model": "decoder", "width": 64, "depth": 2, "heads": 2, "context": 32, "steps": 90}


def text(folder, method="two-phase", seed=0, loss=1.5, accuracy=0.5, written="So it\n  goes <on>\r", **changes):
    said = {"temperature": 0.8, "seed": 0, "texts": [{"prompt": "Once\n\n* upon", "text": written}]}
    changes = {"source": SOURCE, "samples": said, **changes}
    return put(folder, method, seed, settings=SIZES, test_loss=loss, test_accuracy=accuracy, **changes)


def test_losses_decide_and_less_is_better(tmp_path):
    runs = [text(tmp_path / "dense", "dense", loss=1.25, accuracy=0.3)]
    runs += [text(tmp_path / f"ours{seed}", seed=seed, loss=loss, accuracy=0.9) for seed, loss in enumerate((1.5, 1.6))]
    runs += [text(tmp_path / "rigl", "rigl", loss=1.2, accuracy=0.1)]
    html, markdown = write(*runs)
    column = "Test loss, nats per character"
    rows = {name: row[column] for name, row in table(markdown).items()}
    assert rows == {
        "dense": "1.2500 (1 seed), perplexity 3.49",
        "two-phase 16x16": "1.5500 ± 0.0707, perplexity 4.71",
        "rigl 16x16": "**1.2000** (1 seed), perplexity 3.32",
    }
    assert (
        f"The best of 2 sparse settings on the test part is rigl 16x16, with 75.0 % of the weights in zero blocks: test loss "
        f"1.2000 nats per character (1 seed) against 1.2500 dense ({MINUS}0.0500 nats)" in html
    )
    higher = [line for line in warnings(markdown) if "test" in line]
    assert higher == [
        "Higher test loss than dense: 1.5500 ± 0.0707 against 1.2500 nats per character (+0.3000 nats; with one seed the "
        "spread is not known)."
    ]
    assert "a book, 1,000 bytes, SHA-256 0123456789ab, decoder 2x64, 2 heads, context 32, 90 steps, batches of 32" in html


def test_a_loss_that_is_not_finite_is_the_worst(tmp_path):
    _, markdown = write(text(tmp_path / "a", "dense", loss=2.0), text(tmp_path / "b", "static", loss=None), text(tmp_path / "c"))
    assert "The best of 2 sparse settings on the test part is two-phase" in markdown
    assert "Higher test loss than dense: inf against 2.0000" in markdown


def test_what_models_write_stands_beside_each_other_as_it_is(tmp_path):
    runs = [
        text(tmp_path / "dense", "dense", written="a\n  b"),
        text(tmp_path / "ours"),
        text(tmp_path / "again", seed=1, written="no"),
    ]
    html, markdown = write(*runs)
    assert html.count("Once\n\n* upon") == 1 and ">a\n  b</p>" in html and "So it\n  goes &lt;on&gt;\\r</p>" in html
    assert "\n    Once\n    \n    * upon\n" in markdown and "\n    So it\n      goes <on>\\r\n" in markdown
    assert ">no</p>" not in html  # of the first seed only
    assert "temperature 0.8" in html and "temperature 0.8" in markdown
    (task,) = compared(find_runs(runs))
    assert [row.name for row, _ in samples(task)[0].texts] == ["dense", "two-phase 16x16"]


def test_classifiers_write_nothing(tmp_path):
    html, markdown = write(put(tmp_path / "a"))
    assert "What the models write" not in html + markdown


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": {"temperature": 1, "texts": [{"prompt": "x"}]}}, "samples of text that cannot be shown"),
        ({"samples": 3}, "samples of text that cannot be shown"),
        ({"source": {"title": "x"}}, "does not say which text"),
        ({"source": {**SOURCE, "bytes": None}}, "does not say which text"),
    ],
)
def test_damaged_results_are_refused(tmp_path, changes, says):
    with pytest.raises(KronblocksError, match=says):
        find_runs([text(tmp_path / "a", **changes)])


def test_characters_that_cannot_be_shown_are_written_as_escapes():
    assert visible("\x07 \u2028 ä\n") == "\\x07 \\u2028 ä\n"
