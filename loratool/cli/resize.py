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
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@options.writing
@click.option("--rank", type=int, metavar="N", help="At most this rank in every module.")
@click.option(
    "--energy", type=float, metavar="X", help="The least rank that keeps this share of squared singular values."
)
@options.dtype("keep")
@options.selecting
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Give an adapter another rank: the best approximation at that rank, from its exact spectrum.

    Runs in factor space, in milliseconds a module, without the base. The result has scale 1 (alpha = rank), so that
    every reader applies it at the same strength.
    """
    from loratool import api

    return api.resize(adapter, **settings)
