"""`loratool convert`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool convert my-adapter -o my-adapter.safetensors --to kohya
  loratool convert style.safetensors -o style --to peft
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@options.writing
@click.option("--to", required=True, metavar="FORMAT", help="The format to write (see `loratool formats`).")
@options.selecting
@click.option("--drop-unmapped", is_flag=True, help="Leave out what the format cannot hold, and say what.")
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Write an adapter in another format. Names and metadata change; the factors' bytes do not.

    What the target cannot hold is listed before anything is written, and needs --drop-unmapped.
    """
    from loratool import api

    return api.convert(adapter, **settings)
