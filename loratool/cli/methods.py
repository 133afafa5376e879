"""`loratool methods`."""

from __future__ import annotations

import click

from loratool.cli import options, render

EXAMPLES = """
\b
Examples:
  loratool methods
  loratool methods --json
"""
_SPACES = {"weights": "factors (a sum)", "factors": "factors", "dense": "each module's whole update"}


@click.command(epilog=EXAMPLES)
@options.plugin
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """List the methods of combining adapters, and the options (-O NAME=VALUE) of each."""
    from loratool.plugins import installed

    rows = []
    for method in installed().methods():
        told = {o.name: f"{o.wanted}: {o.help} [{o.default}]" for o in method.options.values()}
        shown = told if as_json else " ".join(o.listed for o in method.options.values())
        rows.append(
            {"method": method.name, "what": method.summary, "works_on": _SPACES[method.space], "options": shown}
        )
    render.listing(rows, as_json=as_json)
