"""`loratool combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import adapter_config_file, options
from loratool.errors import UsageError
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool combine style subject -w 0.7 -w 0.4 -o both
  loratool combine style:0.7 subject:0.4 -o both --method svd --rank 16
  loratool combine style subject -o both --scale 'layer.{0-5}.**=0.5' --normalize
  loratool combine style subject my-adapter -o both --method ties_svd -O density=0.3 --energy 0.95
  loratool combine style subject -o both --method dare_linear_svd -O density=0.5 -O seed=1
"""


def _option(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r}: NAME=VALUE, such as density=0.5")
        found[name.strip().replace("-", "_")] = text.strip()
    return found


@click.command(epilog=EXAMPLES)
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option("-m", "--method", default="cat", show_default=True, metavar="NAME", help="Of `loratool methods`.")
@click.option(
    "-O",
    "--option",
    "method_options",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_option,
    help="An option of the method, such as density=0.5.",
)
@options.weighting
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@options.writing
@click.option("--to", default="", metavar="FORMAT", help="The format to write; default: that of the adapters.")
@options.ranks
@options.dtype("keep")
@options.selecting
@options.base
@options.strip_metadata
@click.option("--allow-different-bases", is_flag=True, help="Even where the adapters name different base models.")
@click.option("--allow-disjoint", is_flag=True, help="Even where an adapter shares no module with the others.")
@options.reading
@options.running
def command(
    adapters: tuple[str, ...],
    weight: tuple[float, ...],
    method_options: dict[str, str],
    adapter_config: str | None,
    **settings: Any,
) -> Report:
    """Combine adapters into one: their weighted sum, exactly, or by another method. No base model is needed.

    Ranks, formats, dtypes and modules may differ: a module that an adapter does not have counts as zero; q, k and v
    apart meet what is fused. The order of the adapters does not matter. Without a rank rule `cat` keeps everything
    (ranks add up), and most other methods keep the largest rank that the adapters have; the error of that is in the
    report. The rules, --rank auto too, are those of resize. The result has scale 1; one adapter with weight 1 comes out
    as it is.

    DoRA is carried where it is alone in a module, at weight 1. Biases of LoRA are added. Modules to save, trained
    biases and tokens are carried where one adapter has them, at weight 1, where all agree, or where the weights add up
    to 1 (--normalize). What cannot be combined is refused by name.

    An --adapter-config is that of merge: there every adapter can have weights and modules of its own.
    """
    from loratool import api

    settings["options"] = method_options
    if adapter_config:
        if adapters or weight:
            raise UsageError("with --adapter-config, adapters and their weights stand in that file")
        return api.combine(adapter_config_file.read(Path(adapter_config)), **settings)
    if not adapters:
        raise UsageError("which adapters?", hint=f"loratool combine ONE TWO -o {settings['out']}")
    parts = [options.split_weight(source) for source in adapters]
    inline = [number for _, number in parts]
    if weight and any(number is not None for number in inline):
        raise UsageError("give weights by -w or by ADAPTER:W, not both")
    weights = list(weight) or [1.0 if number is None else number for number in inline]
    return api.combine([path for path, _ in parts], weights=weights, **settings)
