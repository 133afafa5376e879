"""`loratool push`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.errors import UsageError
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool push my-adapter org/my-adapter -n          (what would be sent?)
  loratool push my-adapter org/my-adapter --private
  loratool push my-adapter my-adapter.safetensors org/my-adapter --create-pr
"""


@click.command(epilog=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, metavar="PATH... REPO")
@click.option("--revision", default="", metavar="BRANCH", help="The branch to write to; default: main.")
@options.on_the_hub
@options.dry_run
@options.plugin
@options.token_file
@options.shown
def command(sources: tuple[str, ...], dry_run: bool, **settings: Any) -> Report:
    """Send an adapter or a model to a repository on the Hugging Face Hub, in one commit, with a model card.

    REPO is org/name, or hf://org/name[@branch][/folder]; it is created where it does not exist. The commit goes on top
    of the state that was looked at: where somebody else was faster it is refused, and the branch stays as it is. What
    is there already is not sent, so the same command again goes on after a failure, or says that nothing is to do.
    Nothing on the Hub is deleted. Several PATHs, such as an adapter in two formats, become one commit.

    The card: one on the Hub, or beside the files, keeps what it says, and gets the fields that it lacks: base_model,
    its relation, library_name, pipeline_tag, tags, and the licence of the base; how it was made is in a block of its
    own. loratool.report.json, which names your paths, and what a trainer left stay here.
    """
    from loratool import publishing
    from loratool.settings import Publishing

    if len(sources) < 2:
        raise UsageError("what is sent, and where to?", hint=f"loratool push {sources[0]} ORG/NAME")
    publish = Publishing(dry_run=dry_run, **settings)
    return publishing.push(*sources[:-1], to=sources[-1], publish=publish)
