"""`loratool arch`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options, render
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool arch list
  loratool arch show llama
  loratool arch show base --rank 16
  loratool arch detect base
  loratool arch check base
  loratool arch targets base --preset all-linear --for axolotl
  loratool arch list -p my_family.py
"""
PRESETS = ("default", "attention", "mlp", "all-linear")
TRAINERS = ("peft", "llama-factory", "axolotl", "kohya", "sd-scripts")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_taking = options.stack(options.plugin, options.token_file, _json)
_reading = options.stack(options.arch, options.plugin, options.token_file, _json)


@click.group(epilog=EXAMPLES)
@options.plugin
def command() -> None:
    """The model families, and what they say of a model: layers, adapter sizes, targets for trainers.

    A family is one short file; docs/plugins.md shows how to add one, and -p FILE tries it out.
    """


@command.command("list")
@_taking
def list_(as_json: bool) -> None:
    """List every family that this installation knows."""
    from loratool.cli.subjects import fitted
    from loratool.plugins import installed

    rows: list[dict[str, Any]] = [
        {
            "family": a.name,
            "model_types": [*a.match.model_types, *a.match.classes],
            "layer_patterns": len(a.layers),
            "default_targets": list(a.default_targets),
        }
        for a in installed().architectures()
    ]
    for row in () if as_json else rows:
        row |= {"model_types": fitted(row["model_types"], 26), "default_targets": fitted(row["default_targets"], 24)}
    render.findings(installed().findings)
    render.listing(rows, as_json=as_json)


@command.command()
@click.argument("what", metavar="NAME|PATH")
@click.option("--rank", "ranks", type=click.IntRange(1), multiple=True, help="Sizes of these ranks, of a PATH.")
@_reading
def show(what: str, ranks: tuple[int, ...], arch: str, as_json: bool) -> None:
    """Show the layers of a family; or of a model, and what adapters on them weigh.

    NAME is a family or a model_type. PATH is a model's folder or weights file, of which only headers are read; write
    ./NAME for a folder that is called like a family. Sizes are those of an adapter that PEFT makes.
    """
    from loratool.cli import answers, subjects
    from loratool.operations.survey import brief, family_layers
    from loratool.plugins import installed

    family = subjects.family_alone(what, ranks)
    if family is not None:
        render.findings(installed().findings)
        if family.name != what:
            render.note(f"{what} is a model_type of the {family.name} family")
        rows = family_layers(family)
        return render.listing(rows if as_json else brief(rows), as_json=as_json)
    report = answers.about_model(what, arch, ranks)
    if as_json:
        return _print(report, as_json=True)
    sizes, report.rows = report.totals.pop("adapters"), brief(report.rows)
    _print(report)
    render.heading("Adapters on it, by preset and rank")
    return render.listing(sizes, as_json=False)


@command.command()
@click.argument("path")
@_taking
def detect(path: str, as_json: bool) -> int:
    """Say which family a model or an adapter is of.

    And how, and which others would fit. Exit code 3 where none fits, or several that read the weights differently.
    """
    from loratool.cli import answers

    report = answers.families_of(path)
    failed = any(f.level == "error" for f in report.findings)
    _print(report if as_json or failed else answers.summed_up(report), as_json=as_json)
    return 3 if failed else 0


@command.command()
@click.argument("what", metavar="NAME|PATH")
@click.option("--strict", is_flag=True, help="Patterns that match nothing fail too: for a family of your own.")
@_reading
def check(what: str, strict: bool, arch: str, as_json: bool) -> int:
    """Check a family against a model, or by itself.

    Exit code 3 where something does not fit: weights that no layer explains, names that mean one layer, sizes that do
    not divide, rules that lead nowhere. Patterns that match nothing are only noted, as one model lacks layers that
    others of its family have.
    """
    from loratool.cli import answers

    report = answers.checked(what, arch, strict=strict)
    _print(report, as_json=as_json)
    return 3 if any(f.level == "error" for f in report.findings) else 0


@command.command()
@click.argument("path")
@click.option("--preset", type=click.Choice(PRESETS), default="default", show_default=True, help="Which layers.")
@click.option("--for", "trainer", type=click.Choice(TRAINERS), default="peft", show_default=True, help="What trains.")
@_reading
def targets(path: str, preset: str, trainer: str, arch: str, as_json: bool) -> None:
    """Print what tells a trainer to adapt exactly the layers of a preset, or refuse where it cannot be told.

    A LoraConfig for PEFT, YAML for LLaMA-Factory and axolotl; for kohya's sd-scripts their arguments, or the preset
    file of LyCORIS that they need. Presets: attention, mlp (experts too), or all linear layers but heads and routers,
    each of the main model without its towers; default is what the family's adapters train.
    """
    from loratool.cli import answers
    from loratool.operations.trainers import FORMS

    survey, findings = answers.selected(path, arch, preset)
    found = FORMS[trainer].arguments(survey, preset)
    render.findings(findings)
    if as_json:
        return render.document(found)
    render.note(answers.counted(survey, preset))
    return render.snippet(FORMS[trainer].lines(found))


def _print(report: Report, *, as_json: bool = False) -> None:
    render.report(report, as_json=as_json, file=None, quiet=False, verbose=True)
