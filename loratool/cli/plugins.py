"""`loratool plugins`."""

from __future__ import annotations

import click

from loratool.cli import options, render

EXAMPLES = """
\b
Examples:
  loratool plugins
  loratool -p my_family.py plugins
"""


@click.command(epilog=EXAMPLES)
@options.plugin
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """List the plugins of this installation, and those that failed to load."""
    from loratool.plugins import installed

    plugins = installed()
    plugins.architectures()  # conflicts between families are found when they are collected
    rows = [{**p._asdict(), "hooks": ", ".join(p.hooks)} for p in plugins.loaded]
    render.findings(plugins.findings)
    render.listing(rows, as_json=as_json)
