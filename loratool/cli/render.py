"""The only place that prints. Data goes to stdout; progress, findings and hints to stderr.

Names, metadata and config values come from strangers: `clean` makes control characters visible before a terminal
could obey them, and nothing foreign is ever read as markup.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import sys
import textwrap
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from loratool.adapter import Finding, gathered
from loratool.errors import LoratoolError, StorageError, UsageError
from loratool.plan import Report
from loratool.storage.hub_names import is_address

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHOWN_ROWS = 12
_USUAL = {"kind": "lora"}  # a column of nothing else says nothing
_DISPENSABLE = (
    "parts", "group", "shape", "parameters", "of", "down", "up", "norms", "role", "alpha", "ranks", "rank_before",
    "unchanged", "count", "bytes", "spectrum",
)  # fmt: skip
_DETAILS = ("shares", "column_angles", "row_angles", "pairs")  # only in --json
_UNSHOWN = ("sigma", "tensor", "scaling", "dtype", *_DETAILS)  # in the totals, or only in --json


_MATRICES = ("cosines", "overlaps", "distances")


def clean(value: object, limit: int = 500) -> str:
    """Return foreign text as a terminal may see it: control and invisible characters escaped, cut at `limit`."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in text)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    width = None if sys.stdout is not None and sys.stdout.isatty() else 10_000  # a pipe has no width
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def _lines(text: str) -> str:
    return "\n".join(clean(line) for line in text.split("\n"))


def error(problem: LoratoolError) -> int:
    """Print an error: what, where, and what to try next. Return its exit code."""
    _problem(_console(stderr=True), problem)
    return problem.exit_code


def _problem(console: Console, problem: LoratoolError) -> None:
    console.print("error:", style="bold red", end=" ")
    console.print(_lines(str(problem)))
    if problem.hint:
        console.print("try:", style="bold", end=" ")
        console.print(_lines(problem.hint))


def trace() -> None:
    """Print the traceback of the error being handled, cleaned like everything else."""
    sys.stderr.write(_lines(traceback.format_exc()) + "\n")


def note(text: str) -> None:
    """Say on stderr what was understood."""
    _console(stderr=True).print(clean(text))


def interrupted(*notes: str) -> None:
    """Say so, and what is known of the output."""
    _console(stderr=True).print(": ".join(["interrupted", *map(clean, notes)]))


def check_report_file(file: str) -> None:
    """Refuse to write a report over anything but a report (or to what is no file: a pipe, a repository)."""
    from loratool.storage.target import is_report

    if is_address(file):
        raise UsageError("a report is a file of this machine", where=file, hint="--report FILE")
    path = Path(file)
    if (path.is_file() or path.is_dir()) and not is_report(path):
        raise StorageError("this exists and is no report of loratool", where=file, hint="choose another --report")


def bug(file: str) -> int:
    """Say where the traceback is. Return the exit code of a bug."""
    _console(stderr=True).print(f"This is a bug in loratool. Please report it with {file}")
    return 70


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr for whatever takes more than a second, where someone is looking."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=_console(stderr=True), transient=True)
    task, start, shown = bar.add_task("working"), monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal shown
        if not shown and monotonic() - start > 1:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if shown:
            bar.stop()


def report(
    content: Report, *, as_json: bool, file: str | None, quiet: bool, verbose: bool, shown: int = _SHOWN_ROWS
) -> None:
    """Show a report: findings on stderr, then JSON or a table (`shown` rows, or all) and totals on stdout."""
    document = json.dumps(content.as_dict(), indent=2, sort_keys=True) + "\n"
    if file:
        try:
            Path(file).write_text(document, encoding="utf-8")
        except OSError as problem:
            raise StorageError(problem.strerror or str(problem), where=file) from None
    findings(content.findings, every=verbose)
    if as_json:
        sys.stdout.write(document)
    elif not quiet:
        console = _console()
        rows = content.rows if verbose or content.verb != "inspect" else _grouped(content.rows)
        table(console, [_drawn(row) for row in rows], limit=None if verbose else shown)
        _curve(console, content.totals.get("curve") or [])
        matrices = [name for name, value in content.totals.items() if name in _MATRICES and value]
        for name in matrices:
            _matrix(console, name, content.totals[name], list(content.sources.values()))
        for name, value in content.totals.items():
            if value not in ("", [], {}, None) and name not in ("curve", *_DETAILS, *matrices):
                console.print(f"{name.replace('_', ' '):<16}", style="bold", end=" ")
                console.print(_value(name, value))
        if content.out:
            done = "proposed to" if content.totals.get("pull_request") else "wrote"
            verb = "would write" if content.dry_run else done
            console.print(f"{verb:<16}", style="bold", end=" ")
            console.print(clean(content.out))


def _drawn(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its singular values as a sparkline, and the bound on a rank only until the rank is known."""
    row = {name: value for name, value in row.items() if name != "rank_at_most" or "rank" not in row}
    return {**row, "spectrum": _sparkline(row["sigma"])} if row.get("sigma") else row


def _sparkline(values: Sequence[float], width: int = 12) -> str:
    """Draw values, each the largest of its stretch, as blocks whose height is in proportion to the largest."""
    width, most = min(width, len(values)), max(values) or 1.0
    cuts = [len(values) * n // width for n in range(width + 1)]
    tops = [max(values[a:b]) for a, b in itertools.pairwise(cuts)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * top / most))] for top in tops)


def _curve(console: Console, points: list[dict[str, Any]]) -> None:
    """Show the trade of size against error: a line of blocks, and eight of its points."""
    if not points:
        return
    last = len(points) - 1
    console.print(f"{'error by size':<16}", style="bold", end=" ")
    console.print(_sparkline([p["error"] for p in points], 64))
    some = [points[n] for n in sorted({round(last * n / 7) for n in range(8)})]
    console.print(_grid(["bytes", "error"], some))


def _matrix(console: Console, name: str, values: Sequence[Sequence[float | None]], sources: Sequence[str]) -> None:
    """Show a number for each pair of sources; these are numbered."""
    console.print(_spaced(name), style="bold")
    rows = [
        {"": f"{n} {Path(source).name}", **{str(m + 1): value for m, value in enumerate(line)}}
        for n, (source, line) in enumerate(zip(sources, values, strict=True), 1)
    ]
    names = list(dict.fromkeys(key for row in rows for key in row))
    console.print(_grid(names, [{k: _value(name, v) for k, v in row.items()} for row in rows]))


def findings(found: Sequence[Finding], *, every: bool = False) -> None:
    """Print findings on stderr, those that are alike together unless `every` is wanted, and each hint once."""
    console = _console(stderr=True)
    styles = {"error": "bold red", "warning": "yellow", "info": "dim"}
    shown, more = (found, 0) if every else gathered(found)
    for finding in shown:
        console.print(f"{finding.level}:", style=styles.get(finding.level, ""), end=" ")
        console.print(f"{clean(finding.where)}: {clean(finding.what)}")
    if more:
        console.print(f"... and {more} more findings (-v lists them all)")
    for hint in dict.fromkeys(f.hint for f in found if f.hint):
        console.print("try:", style="bold", end=" ")
        console.print(clean(hint))


def table(console: Console, rows: list[dict[str, Any]], limit: int | None = None) -> None:
    """Print rows of equal meaning as a table, at most `limit` of them.

    A number is never cut and a name never broken: where the terminal is too narrow whole columns are left out, those of
    one word first, then the dispensable, and named below, with what is in all of their rows.
    """
    if not rows:
        return
    rows = sorted(
        rows, key=lambda row: ("defects" not in row, "unchanged" in row)
    )  # these come first, what changed too
    names = [n for n in dict.fromkeys(name for row in rows[:limit] for name in row) if n not in _UNSHOWN]
    names = [n for n in names if any(row.get(n) not in ("", None, _USUAL.get(n)) for row in rows[:limit])]
    left_out: list[str] = []
    wide = console.options.update(width=10_000)
    grid = _grid(names, rows[:limit])
    alike = _alike(rows, names[1:])
    words = [name for name in alike if isinstance(rows[0].get(name), str)]
    for name in ("", *words, *_DISPENSABLE, *reversed(names[1:])):
        if console.measure(grid, options=wide).maximum <= console.width or len(names) == 1:
            break
        if name in names:
            names.remove(name)
            left_out.append(f'"{_spaced(name)}"' + (f" ({alike[name]} in all)" if name in alike else ""))
        grid = _grid(names, rows[:limit], narrow=True)
    console.print(grid)
    if left_out:
        console.print(textwrap.fill(f"too narrow for: {', '.join(left_out)}", console.width), style="dim")
    if limit is not None and len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more (-v shows them all)", style="dim")
    if left_out or (limit is not None and len(rows) > limit):
        console.print()


def _alike(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Return the columns of several rows that have one short value in all of them, and that value."""
    found = {name: {_value(name, row.get(name)) for row in rows} for name in names} if len(rows) > 1 else {}
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1 and len(*values) <= 24}


def _in_two_lines(module: str) -> str:
    """Return the path of a fused weight with its parts, `(to_q|to_k|to_v)`, on a line of their own."""
    start, choice, parts = module.partition(".(")
    return f"{start}.\n  ({parts}" if choice else module


def _grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join modules that differ only in the numbers in their names, such as the layer; measured ones stay apart."""
    if any("norm" in row for row in rows):
        return [{n: v for n, v in row.items() if n not in ("group", "role", "alpha", "down", "up")} for row in rows]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        joined = {**row, "module": re.sub(r"(?<=\.)\d+(?=\.)", "*", row["module"])}
        groups.setdefault(json.dumps(joined, sort_keys=True), []).append(joined)
    return [{"module": group[0]["module"], "count": len(group), **group[0]} for group in groups.values()]


def _grid(names: list[str], rows: list[dict[str, Any]], *, narrow: bool = False) -> Table:
    """Build a table in which nothing is folded; in a `narrow` one the parts of a fused weight have their own line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        number = any(isinstance(row.get(name), (int, float)) for row in rows)
        grid.add_column(_spaced(name), justify="right" if number else "left", no_wrap=True, overflow="fold")
    for row in rows:
        values = {name: _value(name, row.get(name, "")) for name in names}
        if narrow and "module" in values:
            values["module"] = _in_two_lines(values["module"])
        grid.add_row(*map(Text, values.values()))
    return grid


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _value(name: str, value: Any) -> str:
    """One value as a person reads it: sizes in binary units, shares in percent, numbers short."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("bytes", "bytes_before", "bytes_to_send")):
        return _size(value)
    if isinstance(value, (list, tuple)):
        most = 2 if len(value) > 8 and isinstance(value[0], str) else 8
        shown = [_value(name, v) for v in value[:most]]
        joiner = " x " if name in ("shape", "down", "up") else ", "
        return joiner.join(shown) + (f" ... ({len(value)})" if len(value) > most else "")
    if isinstance(value, dict):
        return ", ".join(f"{clean(k, 60)}={clean(v, 60)}" for k, v in list(value.items())[:6])
    if isinstance(value, float):
        if name in ("retained", "left_out", "rounding", "overlap", "overlaps", "highest_overlap"):
            return f"{100 * value:.4g} %"
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else clean(value)


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"


def listing(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Show a plain list of things, such as plugins."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        table(_console(), rows)


def heading(text: str) -> None:
    """Begin a scene of a story, such as the demo's."""
    _console().print(f"\n{text}", style="bold magenta")


def prose(text: str) -> None:
    """Say something in sentences, wrapped to the terminal."""
    _console().print("\n" + text, soft_wrap=False)


def command_line(line: str) -> None:
    """Show a command that a reader can repeat."""
    _console().print(f"\n$ {line}", style="bold cyan")


def excerpt(content: Report) -> None:
    """Show a report, and of its table the first rows only."""
    report(content, as_json=False, file=None, quiet=False, verbose=False, shown=3)


def refusal(problem: LoratoolError) -> None:
    """Show an error that a story wants."""
    console = _console()
    _problem(console, problem)
    console.print(f"(exit code {problem.exit_code})", style="dim")


def fact(name: str, value: object, at_most: float | None = None) -> None:
    """Show something measured, and the bound that was promised."""
    console = _console()
    console.print(f"  {name.removesuffix(', in bytes'):<62}", end=" ")
    console.print(_value(name, value), style="bold", end="\n" if at_most is None else " ")
    if at_most is not None:
        console.print(f"(at most {_value(name, at_most)})", style="dim")


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for steps that may take more than a second, where someone is looking."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", style="dim"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def ending(rows: list[dict[str, Any]], *, kept: bool, seconds: float, out: str) -> None:
    """Show what was promised and measured, and how a reader goes on."""
    heading("What was promised, and what was measured")
    console = _console()
    table(console, rows)
    if kept:
        console.print(f"Every promise was kept, in {seconds:.0f} seconds.", style="bold green")
    else:
        console.print("A promise was broken: please report it.", style="bold red")
    prose("Every line after a $ can be repeated where its files are; --force replaces what is already there:\n")
    if not shutil.which("loratool"):
        console.print(f'  export PATH="{Path(sys.executable).parent}:$PATH"', style="cyan")
    console.print(f"  cd {shlex.quote(out)}", style="cyan")


def snippet(lines: Sequence[str]) -> None:
    """Show lines of code on stdout, to copy."""
    console = _console()
    for line in lines:
        console.print(clean(line, limit=100_000))


def document(content: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
