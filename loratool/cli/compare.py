"""`loratool compare`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool compare my-adapter small
  loratool compare my-adapter my-adapter.safetensors -v
"""


@click.command(epilog=EXAMPLES)
@click.argument("first")
@click.argument("second")
@options.dry_run
@options.base
@options.arch
@options.alpha
@options.allow_pickle
@options.running
def command(first: str, second: str, **settings: Any) -> Report:
    """Tell whether two adapters are the same update, module by module, across formats and ranks.

    By factor algebra in fp64, without the base. `distance` is relative to the larger norm;
    `equal yes` means the very same update. Where one has q, k and v apart and the other together, by the number of
    heads, --base names the model; only its config.json is read.
    """
    from loratool import api

    return api.compare(first, second, **settings)
