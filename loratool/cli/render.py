"""The only place that prints. Data goes to stdout; progress, findings and hints to stderr.

Names, metadata and config values come from strangers: `clean` makes control characters visible before a terminal
could obey them, and nothing foreign is ever read as markup.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from loratool.adapter import Finding
from loratool.errors import LoratoolError, StorageError
from loratool.plan import Report

if TYPE_CHECKING:
    from rich.console import Console

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHOWN_ROWS = 12


def clean(value: object, limit: int = 500) -> str:
    """Return foreign text as a terminal may see it: control and invisible characters escaped, cut at `limit`."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in text)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def _lines(text: str) -> str:
    return "\n".join(clean(line) for line in text.split("\n"))


def error(problem: LoratoolError) -> int:
    """Print an error: what, where, and what to try next. Return its exit code."""
    console = _console(stderr=True)
    console.print("error:", style="bold red", end=" ")
    console.print(_lines(str(problem)))
    if problem.hint:
        console.print("try:", style="bold", end=" ")
        console.print(_lines(problem.hint))
    return problem.exit_code


def interrupted() -> None:
    """Say that nothing was written."""
    _console(stderr=True).print("interrupted: nothing was written")


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


def report(content: Report, *, as_json: bool, file: str | None, quiet: bool, verbose: bool) -> None:
    """Show a report: findings on stderr, then JSON or a table and totals on stdout."""
    document = json.dumps(content.as_dict(), indent=2, sort_keys=True) + "\n"
    if file:
        try:
            Path(file).write_text(document, encoding="utf-8")
        except OSError as problem:
            raise StorageError(problem.strerror or str(problem), where=file) from None
    findings(content.findings)
    if as_json:
        sys.stdout.write(document)
    elif not quiet:
        console = _console()
        table(console, content.rows, limit=None if verbose else _SHOWN_ROWS)
        for name, value in content.totals.items():
            if value not in ("", [], {}, None):
                console.print(f"{name.replace('_', ' '):<14}", style="bold", end=" ")
                console.print(_value(name, value))
        if content.out:
            verb = "would write" if content.dry_run else "wrote"
            console.print(f"{verb:<14}", style="bold", end=" ")
            console.print(clean(content.out))


def findings(found: Sequence[Finding]) -> None:
    """Print findings on stderr, and each hint once."""
    console = _console(stderr=True)
    styles = {"error": "bold red", "warning": "yellow", "info": "dim"}
    for finding in found[:50]:
        console.print(f"{finding.level}:", style=styles.get(finding.level, ""), end=" ")
        console.print(f"{clean(finding.where)}: {clean(finding.what)}")
    if len(found) > 50:
        console.print(f"... and {len(found) - 50} more findings (--json lists them all)")
    for hint in dict.fromkeys(f.hint for f in found if f.hint):
        console.print("try:", style="bold", end=" ")
        console.print(clean(hint))


def table(console: Console, rows: list[dict[str, Any]], limit: int | None = None) -> None:
    """Print rows of equal meaning as a table, at most `limit` of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    names = [n for n in dict.fromkeys(name for row in rows for name in row) if n not in ("sigma", "tensor")]
    names = [n for n in names if any(row.get(n) not in ("", None) for row in rows)]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        number = any(isinstance(row.get(name), (int, float)) for row in rows)
        grid.add_column(name.replace("_", " "), justify="right" if number else "left", overflow="fold")
    for row in rows[:limit]:
        grid.add_row(*(Text(_value(name, row.get(name, ""))) for name in names))
    console.print(grid, soft_wrap=False)
    if limit is not None and len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more (-v shows them all)\n", style="dim")


def _value(name: str, value: Any) -> str:
    """One value as a person reads it: sizes in binary units, shares in percent, numbers short."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(("bytes", "bytes_before")):
        return _size(value)
    if isinstance(value, (list, tuple)):
        shown = [_value("", v) for v in value[:8]]
        joiner = " x " if name in ("shape", "down", "up") else ", "
        return joiner.join(shown) + (f" ... ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, dict):
        return ", ".join(f"{clean(k, 60)}={clean(v, 60)}" for k, v in list(value.items())[:6])
    if isinstance(value, float):
        if name in ("retained", "left_out"):
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
