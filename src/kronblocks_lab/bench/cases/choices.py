"""`--choices`: choose again what "auto" means, by the present rule and new timings. Measurements stay."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import track

from kronblocks_lab.bench.cases.grid import KEY, Ways, columns_of
from kronblocks_lab.bench.cases.grids import GridSettings, Group
from kronblocks_lab.bench.measure.machine import use
from kronblocks_lab.bench.measure.results import Results, Row


def choose_again(settings: GridSettings, ways_of: Callable[[Group], Ways]) -> Results:
    """Give every "auto" of finished groups the row of the case that it chooses now, and write the file.

    A choice stays if its new case was not measured.

    Args:
        settings: the grid.
        ways_of: the cases and the choices of a group.
    """
    use(settings)
    results = Results.open(settings.path, settings.kind, columns_of(settings), KEY, settings.shared())
    known = {tuple(row[name] for name in KEY): row for row in results.rows}
    finished = {key[:4] for key in known}
    todo = [group for group in settings.groups() if not group.second_pass and tuple(group.key.values()) in finished]
    console, changed = Console(stderr=True), list[Row]()
    for group in track(todo, "choosing again", console=console, transient=True):
        for auto in ways_of(group).autos:
            before, chosen = (known.get((*group.key.values(), name, auto.direction)) for name in (auto.name, auto.case))
            if before is not None and chosen is not None and {**chosen, "case": auto.name} != before:
                changed.append({**chosen, "case": auto.name})
    results.add(changed)
    console.print(f"{len(changed)} choices changed, in {len(todo)} groups", highlight=False)
    return results
