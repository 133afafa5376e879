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
  loratool compare style subject --target 'layer.{0-2}.**'
  loratool compare style subject small                    (matrices of all pairs)
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER ADAPTER [ADAPTER ...]")
@options.dry_run
@options.base
@options.selecting
@options.init_adapter
@options.reading
@options.running
def command(adapters: tuple[str, ...], **settings: Any) -> Report:
    """Tell whether adapters are the same update, or fight, module by module, across formats, kinds and ranks.

    By factor algebra in fp64, without the base. `equal yes` means the very same update, however it is spelled;
    `distance` is relative to the larger norm, and 0 where it is the same bit for bit. `overlap` is the share of the
    energy (squared norm) that lies where the other acts as well, in its outputs and its inputs: of the two adapters the
    smaller share. |cosine| is at most its square root. Of several adapters there are matrices. --json has the principal
    angles between the column and the row spaces too, in degrees.

    The verdict: opposed where the cosine is -0.1 or less (added up, they cancel a tenth or more), reinforcing from 0.1
    on, mixed where at least a tenth of the energy of both overlaps and is twice what chance would give, else
    orthogonal.

    Of DoRA the low-rank parts and the magnitudes are compared; of what was trained whole, the values; of OFT, BOFT and
    IA3, the parameters. What cannot be compared is named. Where one has q, k and v apart and the other together, by the
    number of heads, --base names the model; only its config.json is read.
    """
    from loratool import api

    return api.compare(*adapters, **settings)
