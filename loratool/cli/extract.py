"""`loratool extract`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool extract tuned --base base -o delta --rank 16
  loratool extract tuned --base base -o delta --rank 16 --target query --target value --rest skip
"""


@click.command(epilog=EXAMPLES)
@click.argument("tuned")
@click.option("--base", required=True, metavar="PATH", help="The model that the fine-tune started from.")
@options.writing
@click.option("--rank", type=int, required=True, metavar="N", help="Rank of every module.")
@options.to
@options.dtype("float32")
@click.option(
    "--rest",
    type=click.Choice(("error", "skip")),
    default="error",
    show_default=True,
    help="When norms, biases or unselected modules changed too.",
)
@options.selecting
@options.arch
@options.allow_pickle
@options.running
def command(tuned: str, base: str, **settings: Any) -> Report:
    """Extract the low-rank difference of a fine-tuned model and its base as an adapter.

    A truncated SVD of each layer's difference, by randomised subspace iteration. `retained` is the share of the
    squared change that the adapter keeps, `error` the relative distance that remains; both are measured.
    """
    from loratool import api

    return api.extract(tuned, base, **settings)
