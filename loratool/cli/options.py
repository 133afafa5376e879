"""Options that mean the same in every verb, and the words of the command line: `-w`, `adapter:0.7`, sizes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from loratool.dtypes import OUTPUT_DTYPES
from loratool.engine import Resources
from loratool.errors import InputError, UsageError
from loratool.storage import checkpoint
from loratool.storage.hub_names import is_address

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _add_plugins(context: click.Context, parameter: click.Parameter, files: tuple[str, ...]) -> None:
    if files:
        from loratool.plugins import installed

        for file in files:
            installed().add_file(Path(file))


plugin = click.option(
    "-p",
    "--plugin",
    multiple=True,
    metavar="FILE",
    expose_value=False,
    is_eager=True,
    callback=_add_plugins,
    help="Register a Python file as a plugin, for this call.",
)
out = click.option(
    "-o",
    "--out",
    required=True,
    metavar="PATH",
    help="Where to write: a folder, a .safetensors file, or hf://org/name[@branch] on the Hub.",
)
force = click.option("--force", is_flag=True, help="Replace an existing output, a folder as a whole, in one step.")
dry_run = click.option("-n", "--dry-run", is_flag=True, help="Plan everything, write nothing.")
arch = click.option("--arch", default="", metavar="NAME", help="The model family, instead of detecting it.")
format_ = click.option("--format", default="", metavar="NAME", help="The input's format, instead of detecting it.")
alpha = click.option("--alpha", type=float, help="The alpha of an adapter whose files do not say it.")
allow_pickle = click.option(
    "--allow-pickle", is_flag=True, help="Open .bin files (weights_only); pickles can be hostile."
)
to = click.option("--to", metavar="FORMAT", default="peft", show_default=True, help="The format to write.")
target = click.option(
    "--target", multiple=True, metavar="PATTERN", help="Only these modules: q_proj, layers.{i}.mlp.**, unet:** ..."
)
exclude = click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these modules.")
device = click.option(
    "--device", default="auto", show_default=True, metavar="cpu|cuda[:N]|auto", help="Where to compute."
)
workers = click.option(
    "--workers", type=click.IntRange(0), default=0, metavar="N", help="Threads; default: one a core."
)


def _use_token(context: click.Context, parameter: click.Parameter, file: str | None) -> None:
    if file:
        from loratool.storage import hub

        hub.use_token_of(Path(file))


token_file = click.option(
    "--token-file",
    metavar="FILE",
    expose_value=False,
    is_eager=True,
    callback=_use_token,
    help="A file with the Hub's token; else HF_TOKEN, or that of `hf auth login`.",
)


def _stream(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from loratool.storage import remote

        context.with_resource(remote.streaming())


stream = click.option(
    "--stream",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_stream,
    help="Read weights on the Hub piece by piece, past the cache: room is needed for the output alone.",
)


def dtype(default: str, *, keep: bool = True) -> Decorator:
    """`--dtype`, with the verb's default; `keep`: whether there is a dtype to keep."""
    choices = click.Choice(("keep", *OUTPUT_DTYPES) if keep else OUTPUT_DTYPES)
    return click.option("--dtype", type=choices, default=default, show_default=True, help="The output's dtype.")


def stack(*decorators: Decorator) -> Decorator:
    """Apply options in the order that the help shows them."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


base = click.option(
    "--base", default="", metavar="PATH", help="The model it is for: its config.json tells family, class and sizes."
)
init_adapter = click.option(
    "--init-adapter",
    default="",
    metavar="PATH",
    help="What a PiSSA-like adapter was before training: makes it one of the original base.",
)


def _scales(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for value in values:
        pattern, _, number = value.rpartition("=")
        try:
            found[pattern] = float(number)
        except ValueError:
            raise UsageError(f"{value!r} is no PATTERN=W", hint="--scale 'layers.{0-7}.**=0.5'") from None
    return found


weighting = stack(
    click.option("-w", "--weight", type=float, multiple=True, metavar="W", help="One for each adapter; or ADAPTER:W."),
    click.option(
        "--scale",
        "scales",
        multiple=True,
        metavar="PATTERN=W",
        callback=_scales,
        help="A further weight for some modules: 'layers.{0-7}.**=0.5'.",
    ),
    click.option("--adapter-config", metavar="FILE", help="Adapters with weights and modules of their own, as JSON."),
    click.option("--init-adapter", default="", metavar="PATH", help="What a PiSSA, OLoRA ... adapter started from."),
)
strip_metadata = click.option(
    "--strip-metadata",
    is_flag=True,
    help="Leave out what the header says of the training: captions, paths, data, seeds.",
)
reading = stack(arch, format_, alpha, allow_pickle)
selecting = stack(target, exclude)
on_the_hub = stack(
    click.option("--private", is_flag=True, help="On the Hub: a new repository is one that only you can see."),
    click.option("--create-pr", is_flag=True, help="On the Hub: propose the commit as a pull request."),
    click.option("--message", default="", metavar="TEXT", help="On the Hub: what the commit says of itself."),
    click.option(
        "--license", "licence", default="", metavar="NAME", help="On the Hub: the licence that the card says."
    ),
)
writing = stack(out, force, dry_run, on_the_hub)


def _size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", value, re.IGNORECASE)
    if not match:
        raise click.BadParameter("a size such as 500MB or 2GB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _rank(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """A number, or the one word that the option knows."""
    word = "engine" if parameter.name == "pad_rank" else "auto"
    if value is None or value == word:
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"a number, or {word}") from None


def _by_pattern(kind: Callable[[str], float], example: str) -> Callable[..., dict[str, Any]]:
    """Return a callback that reads PATTERN=NUMBER, given any number of times."""

    def read(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for value in values:
            pattern, _, number = value.rpartition("=")
            try:
                found[pattern] = kind(number)
            except ValueError:
                pattern = ""
            if not pattern:
                raise click.BadParameter(f"{value!r}: {example}, such as q_proj=32")
        return found

    return read


def rank_for(text: str) -> Decorator:
    """`--rank-for`, with what it means to the verb."""
    return click.option(
        "--rank-for", multiple=True, metavar="PATTERN=N", callback=_by_pattern(int, "PATTERN=N"), help=text
    )


alpha_for = click.option(
    "--alpha-for",
    multiple=True,
    metavar="PATTERN=X",
    callback=_by_pattern(float, "PATTERN=X"),
    help="Another alpha for these modules; the last that matches counts.",
)


def _budget(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else _size(context, parameter, value)


def _bound(name: str, what: str) -> Decorator:
    return click.option(name, type=float, metavar="X", help=what)


ranks = stack(
    click.option(
        "--rank", metavar="N|auto", callback=_rank, help="At most this rank in every module; auto: see above."
    ),
    _bound("--energy", "The least rank that keeps this share of the squared singular values."),
    _bound("--error", "The least rank with at most this relative (Frobenius) error."),
    _bound("--ratio", "Keep singular values of at least sigma_1 / X."),
    _bound("--cumulative", "The least rank that keeps this share of the sum of singular values."),
    _bound("--sv-ratio", "kohya's rule: one more than those above sigma_1 / X."),
    _bound("--sv-fro", "kohya's rule: one more than keep this share of the Frobenius norm."),
    _bound("--sv-cumulative", "kohya's rule: one more than keep this share of the sum."),
    click.option("--max-rank", type=int, metavar="N", help="No rank above this one, whatever the rules say."),
    rank_for(
        "The rank of these modules, instead of the rules; at most, with --budget or --max-rank. The last that matches "
        "counts, and the others need a rule."
    ),
    click.option(
        "--budget", metavar="SIZE", callback=_budget, help="Size of the whole adapter, such as 50MB: ranks share it."
    ),
    click.option(
        "--pad-rank",
        metavar="N|engine",
        callback=_rank,
        help="Fill all modules up to one rank with zeros; engine: the next that vLLM takes.",
    ),
)
relative_to = click.option(
    "--relative-to",
    default="",
    metavar="MODEL",
    help="Measure updates against the weights W of this model that they change: --error is then relative to |W|, "
    "--ratio keeps singular values of at least |W| / X, --budget and --curve weigh squared errors by 1 / |W|^2. The "
    "other rules do not change.",
)
memory = click.option(
    "--max-memory",
    "memory",
    default="2GB",
    show_default=True,
    metavar="SIZE",
    callback=_size,
    help="For work in flight.",
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_report = click.option("--report", metavar="FILE", help="Write the report there too, as JSON.")


def _without_bars(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    if quiet:
        from loratool.storage import hub

        context.with_resource(hub.without_bars())
    return quiet


_quiet = click.option("-q", "--quiet", is_flag=True, callback=_without_bars, help="No table, no progress.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="Every module and finding, not the first few.")
_debug = click.option("--debug", is_flag=True, help="Tracebacks.")


def running(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every verb that runs units takes, and pass it on as `resources` and `progress`; show the Report."""

    @wraps(command)
    def run(*args: Any, device: str, workers: int, memory: int, **kwargs: Any) -> int:
        from loratool.cli import render

        if "private" in kwargs:
            kwargs["publish"] = _publishing(kwargs)
        style = {name: kwargs.pop(name) for name in ("as_json", "report", "quiet", "verbose", "debug")}
        if style["report"]:
            render.check_report_file(style["report"])
        with render.progress(quiet=style["quiet"] or style["as_json"]) as progress:
            report = command(*args, resources=Resources(device, workers, memory), progress=progress, **kwargs)
        render.report(
            report, as_json=style["as_json"], file=style["report"], quiet=style["quiet"], verbose=style["verbose"]
        )
        checked = report.verb == "inspect" and (kwargs["check"] or kwargs["base"])
        failed = checked and any(f.level == "error" for f in report.findings)
        return InputError.exit_code if failed else 0

    return stack(device, workers, memory, plugin, token_file, stream, _json, _report, _quiet, _verbose, _debug)(run)


def _publishing(kwargs: dict[str, Any]) -> Any:
    """Return how an output appears on the Hub, with the command as a card may show it, less folders."""
    from loratool.settings import Publishing

    words = click.get_current_context().obj or []
    names = ("private", "create_pr", "message", "licence")
    command = f"loratool {shlex.join(map(_less_folders, words))}" if is_address(str(kwargs["out"])) else ""
    return Publishing(**{name: kwargs.pop(name) for name in names}, command=command)


def _less_folders(word: str) -> str:
    """Return a word of the command; a path that is here or can only be one, with a weight or without, less folders."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    source = re.sub(r":[-+.\de]+$", "", value)
    is_path = source.startswith(("/", "~", "..")) or checkpoint.exists(source)
    return option + equals + (Path(value).name if is_path else value)


def shown(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what shows the Report of a command that runs no units."""

    @wraps(command)
    def run(
        *args: Any, as_json: bool, report: str | None, quiet: bool, verbose: bool, debug: bool, **kwargs: Any
    ) -> None:
        from loratool.cli import render

        if report:
            render.check_report_file(report)
        done = command(*args, **kwargs)
        render.report(done, as_json=as_json, file=report, quiet=quiet, verbose=verbose)

    return stack(_json, _report, _quiet, _verbose, _debug)(run)


def split_weight(text: str) -> tuple[str, float | None]:
    """Return (path, weight) of `adapter:0.7`; the suffix counts where it is a number and no file has the whole name."""
    path, _, suffix = text.rpartition(":")
    if path and not checkpoint.exists(text):
        try:
            return path, float(suffix)
        except ValueError:
            pass
    return text, None
