"""The register of what the table in docs/limits.md says: each row is a case, and each case is tried.

A function that tries something is given its row by `works`, `limited`, `refused` or `not_yet`. It gets a fresh folder if it has a
parameter `folder`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kronblocks import KronblocksError, KronblocksWarning

Outcome = Literal["works", "limited", "refused", "does not work yet"]
Try = Callable[..., None]
GROUPS = ("loops", "averages", "wrappers", "optimisers", "loaders", "compilers and exporters")


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        group: one of GROUPS.
        name: the thing, as its users call it.
        outcome: "works"; "limited": as `why` says; "refused": a `KronblocksError`, before work is lost; "does not work yet": a
            fault that is known.
        why: one short line: how, or what to do instead.
        run: tries it, and checks that what comes out is right.
        words: what the refusal says, a regular expression.
        needs: packages that it cannot be tried without.
    """

    group: str
    name: str
    outcome: Outcome
    why: str
    run: Try
    words: str = ""
    needs: tuple[str, ...] = ()

    def try_(self, folder: Path) -> None:
        """Run it; a refusal must come, and nothing but a refusal. Warnings of this library are errors."""
        for package in self.needs:
            pytest.importorskip(package)
        given: dict[str, Any] = {"folder": folder} if "folder" in inspect.signature(self.run).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the frameworks' own
            warnings.simplefilter("error", KronblocksWarning)
            if self.outcome == "refused":
                with pytest.raises(KronblocksError, match=self.words):
                    self.run(**given)
            else:
                self.run(**given)


CASES: list[Case] = []


def _registered(group: str, name: str, outcome: Outcome, why: str, words: str, needs: tuple[str, ...]) -> Callable[[Try], Try]:
    def register(run: Try) -> Try:
        CASES.append(Case(group, name, outcome, why, run, words, needs))
        return run

    return register


def works(group: str, name: str, why: str, *needs: str) -> Callable[[Try], Try]:
    """The function runs to its end, and what it asserts holds."""
    return _registered(group, name, "works", why, "", needs)


def limited(group: str, name: str, why: str, *needs: str) -> Callable[[Try], Try]:
    """The same; the function asserts the limit, too."""
    return _registered(group, name, "limited", why, "", needs)


def refused(group: str, name: str, why: str, words: str, *needs: str) -> Callable[[Try], Try]:
    """The function ends in a `KronblocksError`. It trains nothing before that."""
    return _registered(group, name, "refused", why, words, needs)


def not_yet(group: str, name: str, why: str, *needs: str) -> Callable[[Try], Try]:
    """The function asserts what is right, and fails today; once it passes, the test says so."""
    return _registered(group, name, "does not work yet", why, "", needs)
