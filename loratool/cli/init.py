"""`loratool init`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.cli.arch import PRESETS
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool init base -o new
  loratool init base -o new --preset all-linear --rank 16 --alpha 32
  loratool init base -o new --target query --target value --rank-for 'layer.{0-1}.**=4'
  loratool init base -o new --like my-adapter
  loratool init base -o new --init pissa --residual new-base
  loratool init base -o new --init loftq --loftq-iterations 5 --residual new-base
"""


@click.command(epilog=EXAMPLES)
@click.argument("base")
@options.writing
@click.option(
    "--preset", type=click.Choice(PRESETS), help="Which layers, as in `arch targets`; default, without a --target."
)
@options.selecting
@click.option("--rank", type=int, metavar="N", help="The rank of every module (8); 4 to 64 are usual.")
@options.rank_for("Another rank for these modules: q_proj=32, 'layers.{0-7}.**=4'; the last that matches counts.")
@click.option(
    "--alpha", type=float, metavar="X", help="The strength (16): updates count alpha / rank times; 4 to 64 are usual."
)
@options.alpha_for
@click.option("--rslora", is_flag=True, help="Updates count alpha / sqrt(rank) times.")
@click.option("--like", default="", metavar="ADAPTER", help="The modules, ranks and alphas of another adapter.")
@click.option(
    "--init",
    metavar="[kaiming|gaussian|pissa|loftq]",
    default="kaiming",
    show_default=True,
    help="What the factors are at first.",
)
@click.option(
    "--residual",
    default="",
    metavar="PATH",
    help="pissa, loftq: where to write the base to train on: DIR, or FILE.safetensors where BASE is one file.",
)
@click.option(
    "--loftq-iterations",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="How often loftq quantises and factorises; the paper has 5.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random numbers.")
@options.dtype("float32", keep=False)
@options.arch
@options.allow_pickle
@options.running
def command(base: str, **settings: Any) -> Report:
    """Make a new LoRA adapter for a model, ready to be trained in PEFT, from the headers of its files.

    PeftModel.from_pretrained(model, DIR, is_trainable=True) goes on from there; config and tensors name exactly the
    modules of the live model, stacks of experts as target_parameters. Without --target and --exclude they are those of
    the preset; --target alone chooses among all layers.

    kaiming and gaussian are PEFT's: the update is zero at first. pissa starts from the principal part of each weight,
    and trains on the rest of the base, which --residual gets. loftq is for training in 4 bits: --residual gets what nf4
    makes of the base, in its own dtype, and the adapter starts from the principal part of what that loses.

    Merged into the residual base, a trained adapter is what training saw. `loratool merge BASE TRAINED --init-adapter
    DIR/initial` adds what was learnt to the original base instead: of pissa the same model; of loftq the base without
    the quantisation's error, part of which no adapter holds (docs/init.md). PEFT itself makes the starts that need
    data: eva, lora-ga, corda.
    """
    from loratool.initialising import init

    return init(base, **settings)
