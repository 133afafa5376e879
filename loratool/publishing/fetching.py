"""Fetching a repository: a plan of copies, so that an output appears as every other one does."""

from __future__ import annotations

from pathlib import Path

from loratool import engine
from loratool.adapter import Finding
from loratool.engine import EVERYTHING
from loratool.plan import CopiedFile, Plan, Report, Settled
from loratool.storage import location
from loratool.storage.target import check_target

_HIDDEN = (".gitattributes", ".gitignore")


def pull(repo: str, out: Path, *, dry_run: bool, force: bool) -> Report:
    """Write the files of a repository to a folder, or one file of it to a file."""
    place = location.place(repo)
    single = place.is_file()
    found = [place] if single else sorted(p for p in place.rglob("*") if p.is_file() and not _is_hidden(p, place))
    names = {path: out.name if single else path.relative_to(place).as_posix() for path in found}
    report = Report("pull", {"repository": location.called(repo)}, out=str(out), dry_run=dry_run)
    report.rows = [{"file": name, "bytes": location.size(path)} for path, name in names.items()]
    report.totals = {"files": len(found), "bytes": sum(row["bytes"] for row in report.rows)}
    if not found:
        report.findings.append(Finding("warning", repo, "there are no files in it"))
    files = tuple(CopiedFile(name, str(path)) for path, name in names.items() if name != "loratool.report.json")
    check_target(out, (), single_file=single, force=force, names=list(names.values()))
    if dry_run:
        return report
    plan = Plan((), report, lambda facts, spooled: Settled(report), files, single)
    return engine.execute(plan, out, EVERYTHING, force=force, progress=None)


def _is_hidden(path: Path, root: Path) -> bool:
    return path.name in _HIDDEN or any(part.startswith(".") for part in path.relative_to(root).parts)
