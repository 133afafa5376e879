"""`loratool arch`."""

from __future__ import annotations

import click

from loratool.cli import options, render

EXAMPLES = """
\b
Examples:
  loratool arch list
  loratool arch show llama
"""
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


@click.group(epilog=EXAMPLES)
@options.plugin
def command() -> None:
    """List the model families, and the layers of each that can carry an adapter."""


@command.command("list")
@options.plugin
@_JSON
def list_(as_json: bool) -> None:
    """List every family that this installation knows."""
    from loratool.plugins import installed

    rows = [
        {
            "family": a.name,
            "model_types": [*a.match.model_types, *a.match.classes],
            "layer_patterns": len(a.layers),
            "default_targets": list(a.default_targets),
        }
        for a in installed().architectures()
    ]
    render.findings(installed().findings)
    render.listing(rows, as_json=as_json)


@command.command()
@click.argument("family")
@options.plugin
@_JSON
def show(family: str, as_json: bool) -> None:
    """Show the layers of one family: pattern, kind, role, group."""
    from loratool.plugins import installed

    architecture = installed().architecture(family)
    rows = [
        {
            "component": layer.component,
            "layer": skeleton.text,
            "kind": layer.kind,
            "role": layer.role(skeleton),
            "group": layer.group,
            "default": skeleton.text.endswith(tuple("." + t for t in architecture.default_targets)),
        }
        for skeleton, layer in architecture.skeletons()
    ]
    render.listing(rows, as_json=as_json)
