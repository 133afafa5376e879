"""What `loratool arch` answers about a model or an adapter, as Reports: open, find the family, ask it."""

from __future__ import annotations

from collections.abc import Sequence

from loratool import opening, testing
from loratool.adapter import Finding
from loratool.cli import subjects
from loratool.errors import AmbiguityError, MismatchError
from loratool.operations import survey as operation
from loratool.operations import targets as for_peft
from loratool.operations.survey import Survey
from loratool.plan import Report
from loratool.plugins import installed


def about_model(path: str, arch: str, ranks: Sequence[int]) -> Report:
    """Return the layers of a model, its totals, and under `adapters` what adapters on it weigh."""
    subjects.require_path(path)
    model = subjects.model(path, arch)
    report = _report("show", model)
    report.findings += operation.strangers(model.survey)
    report.rows = operation.layers(model.survey)
    report.totals |= operation.totals(model.survey)
    report.totals["adapters"] = operation.sizes(model.survey, ranks or operation.RANKS)
    return report


def families_of(path: str) -> Report:
    """Return the family of a model, or the families that know an adapter's names, and which others would fit."""
    subjects.require_path(path)
    if subjects.is_adapter(path):
        adapter = opening.open_adapter(path)
        report = Report("arch detect", {"adapter": path}, findings=_with_plugins(adapter.findings))
        report.totals = {"format": adapter.origin.format, "base_model": adapter.base_model}
        report.totals["families"] = list(adapter.families)
        report.rows = [{"family": name, "knows_every_module": True} for name in adapter.families]
        if not report.rows:
            hint = "-p FILE adds a family (docs/plugins.md); inspect works without one"
            report.findings.append(Finding("error", path, "no family knows every module of this adapter", hint))
        return report
    try:
        model = subjects.model(path)
    except AmbiguityError as problem:
        opened = subjects.source(path)
        finding = Finding("error", path, problem.what, problem.hint)
        return Report("arch detect", {"model": path}, rows=subjects.candidates(opened, None), findings=[finding])
    report = _report("detect", model)
    report.rows = subjects.candidates(model.source, model.family.architecture)
    return report


def summed_up(report: Report) -> Report:
    """Return a report of families_of with the families that were not chosen in two lists."""
    others = [row for row in report.rows if not row.get("chosen", True)]
    for name, alike in (("reading_it_alike", True), ("reading_it_otherwise", False)):
        report.totals[name] = [row["family"] for row in others if row["reads_them_alike"] is alike]
    report.rows = []
    return report


def checked(what: str, arch: str, *, strict: bool) -> Report:
    """Return what is wrong with a family, alone or with a model at hand, as error findings."""
    architecture = subjects.family(what)
    if architecture is not None:
        totals = {"family": architecture.name}
        report = Report("arch check", {"family": what}, totals=totals, findings=_with_plugins(()))
        found = testing.problems(architecture, {})
    else:
        subjects.require_path(what)
        model = subjects.model(what, arch, described=True)
        report = _report("check", model)
        shapes = model.survey.shapes
        report.totals["tensors"] = len(shapes)
        found = testing.problems(model.family.architecture, shapes, model.survey.config)
        unmatched = testing.unmatched(model.family.architecture, shapes)
        found += [f._replace(level="error") if strict else f for f in unmatched]
    wrong = sum(f.level == "error" for f in found)
    report.findings += found
    report.totals["result"] = f"{wrong} problem{'s' * (wrong > 1)}" if wrong else "everything fits"
    return report


def selected(path: str, arch: str, preset: str) -> tuple[Survey, list[Finding]]:
    """Return a model in which the preset has layers, and what should be known about training them."""
    subjects.require_path(path)
    model = subjects.model(path, arch)
    if not model.survey.selected(preset):
        others = ", ".join(p for p in operation.PRESETS if model.survey.selected(p))
        hint = f"there is --preset {others}" if others else "see loratool arch show"
        raise MismatchError(f"this model has no layer of the preset {preset}", where=path, hint=hint)
    return model.survey, _with_plugins([*model.family.findings, *for_peft.shared(model.survey, preset)])


def counted(survey: Survey, preset: str) -> str:
    """Return how many modules a preset has, and what each rank of an adapter on them adds."""
    chosen = survey.selected(preset)
    count = sum(module.parameters(1) for module in chosen)
    return f"{survey.architecture.name}, {preset}: {len(chosen):,} modules, {count:,} parameters a rank"


def _with_plugins(findings: Sequence[Finding]) -> list[Finding]:
    return [*findings, *installed().findings]


def _report(verb: str, model: subjects.Model) -> Report:
    totals = {"family": model.family.architecture.name, "found_by": model.family.by}
    findings = _with_plugins(model.family.findings)
    return Report(f"arch {verb}", {"model": model.source.path}, totals=totals, findings=findings)
