"""Write docs/commands.md from the commands' own help, and what the commands of docs/combine.md print, into that page.

Run it after changing an option or what a report says; tests compare: python docs/generate.py
What an example prints goes into its page, which takes a minute or two: python docs/generate.py --examples [NAME ...]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

PAGE = Path(__file__).parent / "commands.md"
COMBINE = Path(__file__).parent / "combine.md"
ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"^```(?:json file=(?P<file>\S+)\n(?P<content>.*?)|\n\$ (?P<line>loratool [^\n]*)\n(?P<told>.*?))^```$", re.M | re.S
)


def page() -> str:
    """Return the page: the help of every built-in command, as a terminal of 100 columns shows it."""
    from loratool.cli.main import COMMANDS, cli

    parts = ["# Commands\n\nWritten by `docs/generate.py` from `loratool COMMAND --help`.", _exit_codes()]
    for name in COMMANDS:
        context = click.Context(cli, info_name="loratool", **cli.context_settings)
        command = cli.get_command(context, name)
        assert command is not None
        parts += [f"## loratool {name}\n\n```\n{_help(command, name, context)}\n```"]
        if isinstance(command, click.Group):
            inner = click.Context(command, info_name=name, parent=context)
            parts += [f"```\n{_help(sub, sub_name, inner)}\n```" for sub_name, sub in sorted(command.commands.items())]
    return "\n\n".join(parts) + "\n"


def _exit_codes() -> str:
    """Return the exit codes as the tree of errors gives them."""
    from loratool import errors

    codes = {2: "usage", 70: "a bug; 130 and 143: interrupted"}
    codes[0] = "done (inspect: also where it found errors, but not with --check)"
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.LoratoolError) and error.exit_code > 3:
            codes[error.exit_code] = (error.__doc__ or "").splitlines()[0].rstrip(".")
    codes[3] = "an input is refused, or did not pass its --check; nothing was written"
    return "Exit codes: " + "; ".join(f"{code} {what}" for code, what in sorted(codes.items())) + "."


def _help(command: click.Command, name: str, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _run(arguments: list[str]) -> int:
    """Run the command line in this process, which stays as it was."""
    from loratool.cli.main import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        main(arguments)
    except SystemExit as ending:
        return int(ending.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)


def worked(text: str, folder: Path) -> str:
    """Return a page with what its commands print when they run one after the other in `folder`, findings included."""

    def shown(block: re.Match[str]) -> str:
        if block["file"]:
            (folder / block["file"]).write_text(block["content"])
            return block[0]
        told = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = _run(shlex.split(block["line"])[1:])
        if code:
            raise RuntimeError(f"{block['line']}\n{told.getvalue()}")
        printed = "\n".join(line.rstrip() for line in told.getvalue().strip("\n").splitlines())
        return f"```\n$ {block['line']}\n{printed}\n```"

    runpy.run_path(str(Path(__file__).parent / "examples/adapters_to_combine.py"))["main"](folder)
    return _BLOCK.sub(shown, text)


def with_output(text: str) -> str:
    """Return the page of an example with what its script prints."""

    def shown(block: re.Match[str]) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        command = [sys.executable, *shlex.split(block["line"])[1:]]
        told = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        printed = "\n".join(line.rstrip() for line in told.strip("\n").splitlines())
        return f"```\n$ {block['line']}\n{printed}\n```"

    return re.sub(r"^```\n\$ (?P<line>python examples/[^\n]*)\n.*?^```$", shown, text, flags=re.M | re.S)


if __name__ == "__main__" and sys.argv[1:2] == ["--examples"]:
    for recipe in sorted((ROOT / "docs/recipes").glob("*.md")):
        if recipe.stem in sys.argv[2:] or not sys.argv[2:]:
            recipe.write_text(with_output(recipe.read_text()))
elif __name__ == "__main__":
    PAGE.write_text(page())
    with tempfile.TemporaryDirectory() as temporary:
        COMBINE.write_text(worked(COMBINE.read_text(), Path(temporary)))
