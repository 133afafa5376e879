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
  loratool extract tuned --base base -o delta --energy 0.9 --max-rank 64
  loratool extract tuned --base base -o delta --rank auto --rest save
  loratool extract tuned --base base -o delta --rank 16 --target query --target value --rest skip
"""


@click.command(epilog=EXAMPLES)
@click.argument("tuned")
@click.option("--base", required=True, metavar="PATH", help="The model that the fine-tune started from.")
@options.writing
@options.ranks
@options.relative_to
@click.option(
    "--quality",
    type=click.Choice(("fast", "balanced", "exact")),
    default="balanced",
    show_default=True,
    help="How near to the best factors: within an estimated 2 %, 0.5 %, or exactly.",
)
@options.to
@options.dtype("float32")
@click.option(
    "--rest",
    type=click.Choice(("error", "skip", "save")),
    default="error",
    show_default=True,
    help="When norms, biases or unselected modules changed too: save keeps all but inner matrices whole.",
)
@click.option(
    "--split",
    is_flag=True,
    help="A delta for each part of a fused weight (q, k, v of a qkv_proj); a format that fuses them adds the ranks.",
)
@click.option("--allow-noop", is_flag=True, help="Write an adapter of zeros where nothing changed.")
@options.selecting
@options.arch
@options.allow_pickle
@options.running
def command(tuned: str, base: str, **settings: Any) -> Report:
    """Extract the low-rank difference of a fine-tuned model and its base as an adapter.

    A truncated SVD of each layer's difference, on a block Krylov basis. `retained` is the share of the squared change
    that the adapter keeps, `error` the relative distance that remains; both are measured. `noise floor` is the part of
    the change that the rounding of the two checkpoints alone can make: no rank is worth more than that.

    Each rule is a bound from above; of several the least counts. --rank auto stops where singular values meet the noise
    floor. --budget shares a file size out so that the total error is the least.

    --rest save writes changed norms and biases, new heads and embeddings of another vocabulary as they are (PEFT:
    modules_to_save and trained biases); so it does with embedding and head where they are one weight in one of the two
    models only. A retrained head or embedding that both models have is extracted at the rank, like any layer: to keep
    it whole, leave it to the rest, by --exclude lm_head --rest save.
    """
    from loratool import api

    return api.extract(tuned, base, **settings)
