"""How a verb ends: its plan runs, and the output appears, at a path or as one commit on the Hub. And push and pull."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from loratool import engine, ledger
from loratool.engine import EVERYTHING, Progress, Resources
from loratool.errors import LoratoolError, UsageError
from loratool.plan import Plan, Report
from loratool.plugins import Plugins, installed
from loratool.publishing import sending
from loratool.settings import Publishing, StrPath
from loratool.storage import hub, location
from loratool.storage.hub_names import is_address, parse
from loratool.storage.target import check_target

_AS_TYPED = Publishing()


def finish(
    plan: Plan,
    inputs: Sequence[StrPath],
    out: StrPath | None,
    *,
    dry_run: bool = False,
    force: bool = False,
    resources: Resources = EVERYTHING,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
    publish: Publishing = _AS_TYPED,
) -> Report:
    """Run the plan and publish what it writes, or return its preview."""
    report = plan.preview
    report.findings += (plugins or installed()).findings
    report.sources = {role: location.called(source) for role, source in report.sources.items()}
    if plan.inputs:
        report.ledger = ledger.close(plan.inputs, plan.units, plan.files, plan.later)
    location.forget()  # what follows is about the commits that were opened
    if out is None:
        report.dry_run = dry_run
        return report if dry_run else engine.measure(plan, resources, progress)
    report.out = str(out)
    if is_address(str(out)):
        return _on_the_hub(plan, str(out), resources, progress, publish._replace(dry_run=dry_run))
    if publish._replace(command="") != _AS_TYPED:
        raise UsageError("--private, --create-pr, --message and --license are for an output on the Hub", where=out)
    local = [str(path) for path in inputs if Path(path).exists()]
    names = [file.name for file in plan.files]
    check_target(Path(out), local, single_file=plan.single_file, force=force, names=names)
    if dry_run:
        report.dry_run = True
        return report
    return engine.execute(plan, Path(out), resources, force=force, progress=progress)


def _on_the_hub(
    plan: Plan, out: str, resources: Resources, progress: Progress | None, publishing: Publishing
) -> Report:
    """Write the output beside the cache, push it, and remove it; where the push fails it stays, to be pushed again."""
    to = sending.target(out, publishing)  # before hours of work: is it a name, and may it be asked?
    if plan.single_file and not to.name.path.endswith(".safetensors"):
        raise UsageError("this output is one file", where=out, hint=f"-o hf://{to.name.repo}/NAME.safetensors")
    if publishing.dry_run:
        plan.preview.dry_run = True
        return plan.preview
    folder = hub.own_folder(to.name) / "outgoing"
    last = to.name.path.rpartition("/")[2] or to.name.repo.rpartition("/")[2]
    staged = folder / re.sub(r"[^\w.-]", "_", last)
    report = engine.execute(plan, staged, resources, force=True, progress=progress)
    report.out = out
    try:
        sent = _pushed([str(staged)], to, publishing, report)
    except LoratoolError as problem:
        problem.hint += f"; what was made is kept: {sending.command(staged, to, publishing)}"
        raise
    shutil.rmtree(staged) if staged.is_dir() else staged.unlink()
    report.totals |= {
        name: value for name, value in sent.totals.items() if name in ("commit", "pull_request", "result")
    }
    report.findings += sent.findings
    return report


def push(
    *paths: StrPath,
    to: str,
    publish: Publishing = _AS_TYPED,
    plugins: Plugins | None = None,
) -> Report:
    """Send an adapter or a model (folders, files) to the repository `to` on the Hub, in one commit, with its card.

    `publish` says to which branch, whether as a pull request, with what message, and whether anything is sent at all.
    """
    if not paths:
        raise UsageError("what is to be sent?", hint="loratool push PATH org/name")
    first = str(paths[0])
    if Path(to).exists() and not Path(first).exists() and parse(first):
        raise UsageError(
            "there is no such path", where=first, hint=f"the repository comes last: loratool push {to} {first}?"
        )
    return _pushed([str(path) for path in paths], sending.target(to, publish), publish, None, plugins)


def _pushed(
    paths: list[str],
    to: sending.Target,
    publishing: Publishing,
    of_run: Report | None,
    plugins: Plugins | None = None,
) -> Report:
    from loratool.publishing import cards

    files, findings = sending.files_in(paths)
    if of_run is None or Path(paths[0]).is_file():
        to, files = sending.as_named(to, files)
    content = cards.opened(sorted(paths, key=lambda path: path.endswith(".json")), plugins)
    report = Report("push", {"path": ", ".join(paths)}, findings=findings)
    made = of_run.as_dict() if of_run else None
    text, notes = cards.composed(content, files, paths, to, publishing, report=made)
    report.findings += [*cards.bases_of_here(files), *notes]
    verb = of_run or report
    return sending.send(to, {**files, "README.md": text.encode()}, publishing, report, verb.verb)


def pull(repo: str, out: StrPath, *, dry_run: bool = False, force: bool = False) -> Report:
    """Fetch the files of a repository, or of a folder in it, into the folder `out`; all appear, or nothing."""
    name = parse(repo)
    if name is None or Path(repo).exists():
        raise UsageError(f"{repo!r} is {'a local path' if name else 'no name of a repository'}", hint="hf://org/name")
    if is_address(str(out)):
        raise UsageError("pull writes to this machine", where=out, hint="-o FOLDER; what is here goes there by push")
    from loratool.publishing import fetching

    return fetching.pull(repo, Path(out), dry_run=dry_run, force=force)
