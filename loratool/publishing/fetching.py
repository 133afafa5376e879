"""Fetching a repository: a plan of copies, so that an output appears as every other one does."""

from __future__ import annotations

from pathlib import Path

from loratool import engine
from loratool.adapter import Finding
from loratool.engine import EVERYTHING
from loratool.errors import HubError
from loratool.plan import RECORD, CopiedFile, Plan, Report, Settled
from loratool.storage import location, remote
from loratool.storage.target import check_target


def pull(repo: str, out: Path, *, dry_run: bool, force: bool) -> Report:
    """Write the files of a repository to a folder, or one file of it to a file."""
    place = location.place(repo)
    single = place.is_file()
    if not single and location.is_from_cache(repo):
        what = "the Hub cannot be asked what is in it, and the cache may hold a part of it only"
        raise HubError(what, where=location.called(repo), hint="run it with a connection, without HF_HUB_OFFLINE")
    every = [place] if single else sorted(p for p in place.rglob("*") if p.is_file())
    names = {path: out.name if single else path.relative_to(place).as_posix() for path in every}
    left = [] if single else [name for name in names.values() if _stays(name)]
    taken = {name: path for path, name in names.items() if name not in left}
    report = Report("pull", {"repository": location.called(repo)}, out=str(out), dry_run=dry_run)
    report.rows = [{"file": name, "bytes": remote.size(path)} for name, path in taken.items()]
    report.totals = {"files": len(taken), "bytes": sum(row["bytes"] for row in report.rows)}
    if not taken:
        raise HubError("there are no files in it", where=location.called(repo), hint="is it the right branch?")
    if left:
        report.findings.append(Finding("info", repo, f"not fetched: {', '.join(left)}"))
    check_target(out, (), single_file=single, force=force, names=list(taken))
    if dry_run:
        return report
    files = tuple(CopiedFile(name, str(path)) for name, path in taken.items())
    plan = Plan((), report, lambda facts, spooled: Settled(report), files, single)
    return engine.execute(plan, out, EVERYTHING, force=force, progress=None)


def _stays(name: str) -> bool:
    """Whether a file is the repository's own business, or would be replaced by the report of this run."""
    return name == RECORD or any(part.startswith(".") for part in name.split("/"))
