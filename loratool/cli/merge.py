"""`loratool merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratool.cli import adapter_config_file, options, render
from loratool.errors import UsageError
from loratool.plan import Report
from loratool.storage import checkpoint, location

EXAMPLES = """
\b
Examples:
  loratool merge base my-adapter -o merged
  loratool merge my-adapter -o merged                (the base that the adapter names)
  loratool merge base style:0.7 subject -o merged
"""


@click.command(epilog=EXAMPLES)
@click.argument("sources", nargs=-1, metavar="[BASE] ADAPTER...")
@options.weighting
@options.writing
@options.dtype("keep")
@click.option(
    "--compute-dtype",
    type=click.Choice(("float32", "float64")),
    default="float32",
    show_default=True,
    help="Of the sums; there is one rounding, to the output's dtype.",
)
@click.option(
    "--base-as-trained",
    type=click.Choice(("nf4", "nf4-double")),
    default=None,
    help="For QLoRA: merge into dequant(quant(W)), which the adapter was trained on (-double: double quantisation).",
)
@options.selecting
@click.option("--allow-noop", is_flag=True, help="Write the model even where the adapters change nothing.")
@click.option("--verify", is_flag=True, help="Compute samples of the output anew, in fp64; compare logits.")
@options.reading
@options.running
def command(
    sources: tuple[str, ...],
    weight: tuple[float, ...],
    adapter_config: str | None,
    **settings: Any,
) -> Report:
    """Merge adapters into the weights of a base model, streaming: any size, in bounded memory.

    Every touched weight is W + sum of weight * scaling * up @ down, in fp32, rounded once. Everything else is copied
    byte for byte, with config, tokenizer and licence.

    An --adapter-config goes with BASE alone. It is {"adapters": [{"path": PATH, "weight": 0.7, "target": [...],
    "exclude": [...], "scales": {PATTERN: 0.5}, "init_adapter": PATH}, ...]}, where only the paths are needed; they are
    as seen from that file.
    """
    from loratool import api

    settings["base_as_trained"] = settings["base_as_trained"] or ""
    if adapter_config:
        hint = f"loratool merge BASE --adapter-config {adapter_config} -o {settings['out']}"
        if not sources:
            raise UsageError("which base model do the adapters in --adapter-config go into?", hint=hint)
        if len(sources) != 1 or weight:
            raise UsageError("with --adapter-config, adapters and their weights stand in that file", hint=hint)
        return api.merge(sources[0], adapter_config_file.read(Path(adapter_config)), **settings)
    if not sources:
        raise UsageError("an adapter is needed", hint=f"loratool merge BASE ADAPTER -o {settings['out']}")
    base, adapters, weights = _understand(sources, weight, settings["out"], settings)
    return api.merge(base, adapters, weights=weights, **settings)


def _understand(
    sources: tuple[str, ...], given: tuple[float, ...], out: str, settings: dict[str, Any]
) -> tuple[str, list[str], list[float]]:
    """Tell base and adapters apart; a base that is not given is the one that the adapter names."""
    parts = [options.split_weight(s) for s in sources]
    for source, (path, _) in zip(sources, parts, strict=True):
        before, colon, suffix = path.rpartition(":")
        if colon and not checkpoint.exists(path) and checkpoint.exists(before):
            raise UsageError(f"{suffix!r} is not a weight", where=source, hint=f"{before}:0.7")
    paths = [path for path, _ in parts]
    adapters = [_is_adapter(p, allow_pickle=settings["allow_pickle"]) for p in paths]
    if len(paths) == 1 and not adapters[0]:
        raise UsageError(
            f"{paths[0]} is a base model: which adapter?", hint=f"loratool merge {paths[0]} ADAPTER -o {out}"
        )
    if len(paths) > 1 and adapters[0] and not all(adapters):
        base = paths[adapters.index(False)]
        others = " ".join(s for s, p in zip(sources, paths, strict=True) if p != base)
        raise UsageError("the base comes first", hint=f"loratool merge {base} {others} -o {out}")
    if len(paths) > 1 and all(adapters):
        raise UsageError(
            "all of these are adapters, and merge puts adapters into a base model",
            hint=f"loratool combine {' '.join(sources)} -o {out}, or loratool merge BASE {' '.join(sources)} -o {out}",
        )
    if adapters[0]:
        paths.insert(0, _named_base(paths[0], settings))
        parts.insert(0, (paths[0], None))
    elif parts[0][1] is not None:
        raise UsageError("a base has no weight", where=sources[0])
    inline = [weight for _, weight in parts[1:]]
    if given and any(w is not None for w in inline):
        raise UsageError("give weights by -w or by ADAPTER:W, not both")
    return paths[0], paths[1:], list(given) or [1.0 if w is None else w for w in inline]


def _is_adapter(path: str, *, allow_pickle: bool) -> bool:
    """Whether a source is an adapter rather than a model. A pickle that may not be opened is what it is called."""
    from loratool.plugins import installed

    if checkpoint.is_adapter_folder(path):
        return True
    if not path.endswith((".safetensors", ".bin")):
        return False
    if path.endswith(".bin") and not allow_pickle:
        return not Path(path).name.startswith("pytorch_model")
    source = checkpoint.open_adapter(path, allow_pickle=allow_pickle)
    return any(f.detect(source) for f in installed().formats())


def _named_base(adapter: str, settings: dict[str, Any]) -> str:
    from loratool import opening

    names = ("arch", "format", "alpha", "allow_pickle")
    named = opening.open_adapter(adapter, **{n: settings[n] for n in names}).base_model
    if not named or not (checkpoint.exists(named) or location.is_remote(named)):
        what = f"names {named!r}, which is not here" if named else "names no base model"
        raise UsageError(
            f"the adapter {what}", where=adapter, hint=f"loratool merge BASE {adapter} -o {settings['out']}"
        )
    render.note(f"base: {named} (named by the adapter)")
    return named
