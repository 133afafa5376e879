"""`loratool resize`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool resize my-adapter -o small --rank 4
  loratool resize my-adapter -o small --energy 0.95
  loratool resize my-adapter -o small --energy 0.99 --rank 8     (never above 8)
  loratool resize my-adapter -o small --budget 20KB --curve
  loratool resize my-adapter -o small --rank auto --pad-rank engine
  loratool resize my-adapter -o small --ratio 3162 --relative-to base
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@options.writing
@options.ranks
@options.relative_to
@click.option("--curve", is_flag=True, help="Report the whole trade of size against error.")
@options.dtype("keep")
@options.selecting
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave these modules out: the same as --exclude.")
@options.init_adapter
@options.strip_metadata
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Give an adapter another rank: the best approximation at that rank, from its exact spectrum.

    Runs in factor space, in milliseconds a module, without the base. The result has scale 1 (alpha = rank), so that
    every reader applies it at the same strength. Each rule is a bound from above; of several the least counts, and no
    module gets less than one rank. A rank above what is there changes nothing, and says so.

    --rank auto keeps what the factors' dtype can tell from sigma_1, up to the bend of the spectrum; a flat spectrum has
    none, and a warning says what that loses. --budget shares a file size out so that the total error is the least.
    With --relative-to MODEL, --ratio 10^t is elias-gaeros' recipe fro_ckpt=1,thr=-t.

    AdaLoRA, LoHa, LoKr and Tucker cores become plain LoRA. Of DoRA the low-rank part is resized and the magnitude kept:
    as the norm that the magnitude is divided by is that of the base plus the low-rank part, the direction changes by
    the error that is reported, and the strength of each output does not. What was trained whole is kept as it is.
    """
    from loratool import api

    return api.resize(adapter, **settings)
