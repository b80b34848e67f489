"""Texts: parts, vocabulary, windows, and files that cannot be used."""

from __future__ import annotations

import itertools

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks_lab.data import text as texts
from kronblocks_lab.data.text import UNKNOWN, WindowSampler, all_windows, decoded, encoded, load_text, random_windows

LETTERS = "".join(chr(ord("a") + number % 7) for number in range(900))


def put(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_parts_follow_each_other_and_lose_no_character(tmp_path):
    content = LETTERS + "x" * 50 + "\r\nß€😀" * 10
    text = load_text(put(tmp_path / "a.txt", content), 8)
    held_out = int(0.05 * len(content))
    parts = [text.train, text.validation, text.test]
    assert [len(part.codes) for part in parts] == [len(content) - 2 * held_out, held_out, held_out]
    known = set(content[: len(content) - 2 * held_out])
    expected = "".join(letter if letter in known else UNKNOWN for letter in content)
    assert "".join(decoded(part.codes, text.vocabulary) for part in parts) == expected and UNKNOWN in expected
    assert text.vocabulary == UNKNOWN + "".join(sorted(known))
    assert (text.source.title, text.source.characters, text.source.bytes) == ("a.txt", len(content), len(content.encode()))


def test_long_texts_hold_out_no_more_than_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_HELD_OUT", 20)
    text = load_text(put(tmp_path / "a.txt", LETTERS), 8)
    assert [len(part.codes) for part in (text.train, text.validation, text.test)] == [860, 20, 20]


def test_windows_of_a_training_are_pieces_of_the_training_part_drawn_from_seed_and_epoch(tmp_path):
    text = load_text(put(tmp_path / "a.txt", LETTERS), 8)
    train = decoded(text.train.codes, text.vocabulary)

    def batches(seed: int, epoch: int) -> list[str]:
        sampler = WindowSampler(text.train.starts, 4, 50, seed)
        sampler.set_epoch(epoch)
        found = []
        for x, following in random_windows(text.train, sampler):
            assert x.shape == following.shape == (4, 8) and x.dtype == following.dtype == torch.int64
            assert torch.equal(x[:, 1:], following[:, :-1])
            found += [decoded(torch.cat([a, b[-1:]]), text.vocabulary) for a, b in zip(x, following, strict=True)]
        return found

    first = batches(3, 1)
    torch.rand(5)
    assert first == batches(3, 1) and all(window in train for window in first)
    others = [batches(seed, epoch) for seed, epoch in ((3, 2), (2, 1), (4, 0))]
    assert all(one != other for one, other in itertools.combinations([first, *others], 2))


def test_every_place_of_the_training_part_can_begin_a_window(tmp_path):
    text = load_text(put(tmp_path / "a.txt", LETTERS), 8)
    sampler = WindowSampler(text.train.starts, 100, 100, 0)
    drawn = torch.cat(list(sampler))
    assert drawn.unique().tolist() == list(range(len(text.train.codes) - 8))


def test_an_evaluation_sees_each_window_once(tmp_path):
    text = load_text(put(tmp_path / "a.txt", LETTERS), 8)
    windows = list(all_windows(text.validation, characters=24))
    assert [len(x) for x, _ in windows] == [3, 2]  # 45 characters: 5 windows of 8, each with the next one
    x = torch.cat([x for x, _ in windows]).flatten()
    following = torch.cat([y for _, y in windows]).flatten()
    assert torch.equal(x, text.validation.codes[:40].long()) and torch.equal(following, text.validation.codes[1:41].long())


def test_a_character_that_training_lacks_is_unknown():
    vocabulary = UNKNOWN + "ab"
    assert encoded("ba€" + UNKNOWN, vocabulary).tolist() == [2, 1, 0, 0]


def test_the_standard_library_is_the_text_without_a_file():
    source, text = texts.library_text()
    assert len(text) <= texts.MOST_OF_LIBRARY and "import" in text and source.bytes == len(text.encode())
    assert texts.source_of(None) == source and "standard library of Python 3." in str(source)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"caf\xe9" * 200, r"a\.txt is not text in UTF-8 \(byte 0xe9 at place 3\): convert it"),
        (b"short", r"a\.txt has 5 characters, of which 0 would be for validation.*at least 180 characters, or less context"),
        (b"", r"a\.txt has 0 characters"),
        (None, r"cannot read .*a\.txt: No such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, says):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(KronblocksError, match=says):
        load_text(tmp_path / "a.txt", 8)


def test_the_least_text_that_an_error_names_is_enough(tmp_path):
    with pytest.raises(KronblocksError, match="at least 180 characters"):
        load_text(put(tmp_path / "a.txt", "x" * 179), 8)
    assert len(load_text(put(tmp_path / "a.txt", "x" * 180), 8).validation) == 1
