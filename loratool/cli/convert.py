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
  loratool convert my-adapter -o my-adapter.safetensors --to kohya --base base --verify
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@options.writing
@click.option("--to", required=True, metavar="FORMAT", help="The format to write (see `loratool formats`).")
@options.selecting
@click.option("--drop-unmapped", is_flag=True, help="Leave out what the format cannot hold, and say what.")
@click.option("--rank", type=click.IntRange(1), help="Resize what has a higher rank as the format has it.")
@click.option("--verify", is_flag=True, help="Open the result again, and compare it with the source by its factors.")
@options.base
@options.init_adapter
@options.strip_metadata
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Write an adapter in another format. Names and metadata change; the factors' bytes do not.

    What is no plain pair of factors (AdaLoRA, LoHa, LoKr, a PiSSA adapter less its --init-adapter) becomes one,
    exactly.

    What the target cannot hold is listed before anything is written, and needs --drop-unmapped. Where q, k and v must
    be cut or joined by the number of heads, --base names the model; its config.json and its headers are read.
    A fused layer has the ranks of its parts added up, unless they share a factor: --rank brings it down again, and the
    report says at what error.
    --verify says that the result is bit-exact, or the largest error of a module relative to its update.
    """
    from loratool import api

    return api.convert(adapter, **settings)
