"""`loratool inspect`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool inspect my-adapter
  loratool inspect my-adapter --spectrum -v
  loratool inspect style.safetensors --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@click.option("--spectrum", is_flag=True, help="Singular values of every module, and the ranks that keep their energy.")
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Show what is in an adapter: format, family, modules, ranks, alphas, defects.

    Reads the header alone, unless --spectrum asks for singular values. Error findings are what stops other commands.
    """
    from loratool import api

    return api.inspect(adapter, **settings)
