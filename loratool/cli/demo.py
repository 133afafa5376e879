"""`loratool demo`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options, render

EXAMPLES = """
\b
Examples:
  loratool demo
  loratool demo -o /tmp/demo --json
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "-o",
    "--out",
    default="demo-output",
    show_default=True,
    metavar="FOLDER",
    help="Where its files stay; what an earlier demo left there is replaced.",
)
@options.plugin
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(out: str, as_json: bool) -> int:
    """Train, inspect, merge, extract, resize and convert real adapters, and measure every promise.

    Takes about half a minute on a CPU and 300 MB of disk, downloads nothing, and shows each loratool command so that
    you can repeat it on the files it leaves. Exit code 1 means that a promise was broken.
    """
    from loratool.demo import stage, story

    narrator: stage.Narrator = stage.Silent() if as_json else render
    outcome = story.run(Path(out), narrator)
    if as_json:
        render.document({**outcome._asdict(), "promises": outcome.rows(), "ok": outcome.kept})
    else:
        render.ending(outcome.rows(), kept=outcome.kept, seconds=outcome.seconds, out=out)
    return 0 if outcome.kept else 1
