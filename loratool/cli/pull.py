"""`loratool pull`."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli import options
from loratool.plan import Report

EXAMPLES = """
\b
Examples:
  loratool pull org/my-adapter -o my-adapter-2
  loratool pull hf://org/my-adapter@v1/folder -o folder -n
"""


@click.command(epilog=EXAMPLES)
@click.argument("repo")
@click.option("-o", "--out", required=True, metavar="PATH", help="The folder to write; of a single file, a file.")
@options.force
@options.dry_run
@options.plugin
@options.token_file
@options.shown
def command(repo: str, **settings: Any) -> Report:
    """Fetch a repository from the Hugging Face Hub into a folder.

    REPO is org/name[@revision], hf://org/name[@revision][/path], or the address of its page. The folder appears whole
    or not at all. Other commands need no pull: they take the same names, and fetch only what they read.
    """
    from loratool import publishing

    return publishing.pull(repo, **settings)
