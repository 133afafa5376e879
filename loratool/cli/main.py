"""The `loratool` group: commands are imported when they are used, plugins when a command may be theirs.

Every error leaves here, as one message and an exit code (loratool.errors); a traceback only under --debug or for a
bug, and then to a file.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from loratool import __version__
from loratool.adapter import Finding
from loratool.cli import options, render
from loratool.errors import LoratoolError, StorageError
from loratool.storage import location

COMMANDS = (
    "inspect", "merge", "combine", "extract", "resize", "convert", "compare", "init",
    "push", "pull", "arch", "formats", "methods", "plugins", "demo",
)  # fmt: skip


class LazyGroup(click.Group):
    """A group whose commands live in loratool.cli.<name>, plus those that plugins register."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Built-in commands in the order of a newcomer's day, then the plugins'."""
        _plugin_commands(self)
        return [*COMMANDS, *sorted(set(self.commands) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name in COMMANDS:
            command: click.Command = import_module(f"loratool.cli.{name}").command
            return command
        _plugin_commands(self)
        return super().get_command(ctx, name)


def _plugin_commands(group: click.Group) -> None:
    from loratool.plugins import installed

    if not getattr(group, "asked_plugins", False):
        group.asked_plugins = True  # type: ignore[attr-defined]
        render.findings(installed().add_commands(group))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `loratool demo`, or `loratool inspect ADAPTER`.",
)
@click.version_option(__version__, prog_name="loratool")
@options.plugin
def cli(**_: Any) -> None:
    """Everything that happens to a LoRA adapter after training: exact, in bounded memory, nothing lost silently."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    location.announce = _announcing(arguments)
    for library in ("OMP", "MKL", "OPENBLAS"):  # workers are the parallelism: pools of idle threads only spin
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code = _run(arguments, debug="--debug" in arguments)
    if code in (130, 143):
        _leave_at_once(code)
    sys.exit(code)


def _announcing(arguments: list[str]) -> Callable[[str, str], None]:
    """Return what says how sources were understood: what is on the Hub; typed local paths, without --quiet."""

    def say(source: str, text: str) -> None:
        typed = any(word == source or word.startswith(f"{source}:") for word in arguments)
        quiet = getattr(click.get_current_context(silent=True), "params", {}).get("quiet")
        if (typed and not quiet) or not Path(source).exists():
            render.note(text)

    return say


def _leave_at_once(code: int) -> NoReturn:
    """Exit without waiting for workers, one of which may be in a decomposition that takes a minute."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _interrupted(cause: BaseException, code: int) -> int:
    """Say what became of the output where a run left word of it; click wraps a KeyboardInterrupt into its own."""
    render.interrupted(*getattr(cause.__cause__ or cause, "__notes__", ()))
    return code


def _stopped(ending: SystemExit) -> int:
    """Return the exit code where something below asked to exit: our own handler of SIGTERM, or a broken pipe."""
    if ending.code == 143:
        return _interrupted(ending, 143)
    return 141  # click and rich exit with 1 when the reader has seen enough


def _of_plugins() -> list[Finding]:
    """Return what is wrong with the plugins that were loaded: a family that is missed may be in one left out."""
    plugins = sys.modules.get("loratool.plugins")
    return list(plugins.installed().findings) if plugins and plugins.installed.cache_info().currsize else []


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        result = cli.main(arguments, prog_name="loratool", standalone_mode=False, obj=arguments)
        return result if isinstance(result, int) else 0
    except LoratoolError as error:
        if debug:
            render.trace()
        render.findings(_of_plugins())
        return render.error(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as cause:
        return _interrupted(cause, 130)
    except SystemExit as ending:
        return _stopped(ending)
    except BrokenPipeError:
        return 141
    except OSError as error:
        if debug:
            render.trace()
        return render.error(StorageError(error.strerror or str(error), where=error.filename or ""))
    except Exception:  # the one place where a traceback is right: this is our bug
        if debug:
            render.trace()
        with tempfile.NamedTemporaryFile("w", prefix="loratool-bug-", suffix=".txt", delete=False) as file:
            file.write(f"loratool {__version__}: {' '.join(arguments)}\n{traceback.format_exc()}")
        return render.bug(file.name)
