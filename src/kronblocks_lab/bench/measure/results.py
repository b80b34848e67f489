"""The JSON file of a benchmark: settings, versions, the machine, and one row for each case. Later runs add to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json, write_text
from kronblocks_lab.training.versions import versions

FORMAT = 1
TIMED = ("torch", "kronblocks", "processor")
"""Versions that rows of a file must share where they hold times."""

Row = dict[str, Any]


def significant(value: float | None, digits: int = 4) -> float | None:
    """A number with a few digits, for a short file."""
    return None if value is None else float(f"{value:.{digits}g}")


class Results:
    """Rows that are kept in a file, each written as a list under `columns`.

    Args:
        path: the file.
        kind: which benchmark.
        columns: names of a row's values.
        key: the columns that say which measurement a row is.
        settings: plain values that all rows of the file share.
    """

    def __init__(self, path: Path, kind: str, columns: Sequence[str], key: Sequence[str], settings: dict[str, Any]) -> None:
        self.path, self.columns, self._key = path, tuple(columns), tuple(key)
        self.head: dict[str, Any] = {"version": FORMAT, "kind": kind, "settings": settings, "versions": versions()}
        self.rows: list[Row] = []

    @classmethod
    def open(
        cls,
        path: Path,
        kind: str,
        columns: Sequence[str],
        key: Sequence[str],
        settings: dict[str, Any],
        *,
        fresh: bool = False,
        must_agree: Sequence[str] = TIMED,
    ) -> Self:
        """Go on with a file, or begin a new one; `must_agree` names the versions without which its numbers may not be joined.

        Rows of an older file, which had fewer columns, have nothing in the others.

        Raises:
            KronblocksError: the file holds something else, or numbers that may not stand beside new ones.
        """
        results = cls(path, kind, columns, key, settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KronblocksError(f"cannot write into {path.parent}: {error.strerror}; choose another --out") from error
        if fresh or not path.exists():
            return results
        known = read(path)
        new = results.head
        if known["kind"] != kind or not set(key) <= set(known["columns"]) <= set(columns):
            raise KronblocksError(f"{path} holds other measurements: remove it, or choose another --out")
        changed = [name for name, value in json.loads(json.dumps(settings)).items() if known["settings"].get(name) != value]
        changed += [name for name in must_agree if known["versions"].get(name) != new["versions"][name]]
        if changed:
            raise KronblocksError(
                f"{path} was measured with other settings ({', '.join(changed)}): remove it to measure everything again, or "
                "choose another --out"
            )
        results.head = {name: value for name, value in known.items() if name not in ("columns", "rows")}
        results.rows = [{name: row.get(name) for name in columns} for row in known["rows"]]
        return results

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def missing(self, wanted: Iterable[Row]) -> list[Row]:
        """Those of some keys, as incomplete rows, for which there is no row yet."""
        known = {self._identity(row) for row in self.rows}
        return [row for row in wanted if self._identity(row) not in known]

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows and write the file; a row takes the place of an older one with the same key."""
        merged = {self._identity(row): row for row in self.rows}
        merged.update((self._identity(row), {name: row.get(name) for name in self.columns}) for row in rows)
        self.rows = list(merged.values())
        self.save()

    def drop(self, unwanted: Callable[[Row], bool]) -> None:
        """Remove rows that no longer belong to the measurement."""
        kept = [row for row in self.rows if not unwanted(row)]
        if len(kept) < len(self.rows):
            self.rows = kept
            self.save()

    def save(self) -> None:
        """Write the file, atomically."""
        lines = ",\n".join(json.dumps([row[name] for name in self.columns], allow_nan=False) for row in self.rows)
        head = json.dumps({**self.head, "columns": self.columns, "rows": []}, indent=1, allow_nan=False)
        write_text(self.path, head.removesuffix("[]\n}") + f"[\n{lines}\n]\n}}\n")


def read(path: Path) -> dict[str, Any]:
    """A file as plain values, its rows as dicts.

    Raises:
        KronblocksError: the file is missing, damaged, or no benchmark's.
    """
    data = read_json(path)
    try:
        if data["version"] != FORMAT:
            raise KronblocksError(f"{path} has version {data['version']!r}, and this kronblocks reads version {FORMAT}")
        return {**data, "rows": [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, KronblocksError):
            raise
        raise KronblocksError(f"{path} is not a file of kronblocks bench: {error!r}") from error
