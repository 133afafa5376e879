"""`loratool formats`."""

from __future__ import annotations

import click

from loratool.cli import options, render

EXAMPLES = """
\b
Examples:
  loratool formats
  loratool formats --json
"""


@click.command(epilog=EXAMPLES)
@options.plugin
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """List the adapter formats that can be read and written."""
    from loratool.plugins import installed

    rows = [{"format": f.name, "what": f.summary} for f in installed().formats()]
    render.listing(rows, as_json=as_json)
