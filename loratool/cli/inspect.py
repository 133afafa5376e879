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
  loratool inspect my-adapter --curve
  loratool inspect my-adapter --check
  loratool inspect tuned --check --base base         (did anything change?)
  loratool inspect style.safetensors --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("adapter")
@click.option("--spectrum", is_flag=True, help="Singular values of every module, and the ranks that keep their energy.")
@click.option("--curve", is_flag=True, help="The trade of size against error at every size, for `resize --budget`.")
@click.option("--check", is_flag=True, help="Read the numbers, and look for what is broken or was never trained.")
@click.option("--hashes", is_flag=True, help="SHA-256 of the file and of its data, as image tools have them.")
@click.option("--base", default="", metavar="PATH", help="With --check, of a merged model: the base it was made from.")
@options.reading
@options.running
def command(adapter: str, **settings: Any) -> Report:
    """Show what is in an adapter: format, family, modules, ranks, alphas, defects.

    Reads the header alone, unless --spectrum asks for singular values, --check for defects or --hashes for SHA-256.
    Error findings are what stops other commands. Of an image tool's file it shows what the header says of base, title,
    author, licence, trigger words (the commonest tags) and training; --json has all of the header.

    --check finds, module by module: NaN and infinity; factors that are all zero (never trained), constant, garbage, or
    too large or small for fp16; tensors that sharded training left empty or cut; updates far larger or smaller than
    those of their siblings; copies of one another. With --base it says how many tensors of a merged model differ from
    its base. It exits with 3 where it finds an error; a plain inspect that shows errors exits with 0.
    """
    from loratool import api

    return api.inspect(adapter, **settings)
