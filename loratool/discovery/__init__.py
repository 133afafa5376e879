"""Architectures of models that no family describes: from config.json, or from the headers of the tensors alone.

`from_config` lets transformers or diffusers build the model on the meta device (no weights, no remote code, no network)
and reads off what each parameter is; transformers' own conversion tables say how the names on disk become names in
memory. `from_headers` has only names and shapes. Each says in findings what it does not know.

    library      asks the libraries, and returns plain data
    conversions  that data, and what converting weights means for their names
    names        what names say: roles, groups, towers
    patterns     from many weights to few patterns and rules
    assembly     the architecture
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.discovery.assembly import Assembly, about_fused, about_names
from loratool.discovery.conversions import Live
from loratool.discovery.library import SECONDS, TooLongError, UnknownError, ask
from loratool.discovery.names import Shape, from_header, guess_targets, vocabulary_of
from loratool.discovery.patterns import claim
from loratool.errors import MismatchError
from loratool.layers import Experts


def from_config(
    config: Mapping[str, Any], names: Iterable[str] | Mapping[str, Shape] = ()
) -> tuple[Architecture | None, tuple[Finding, ...]]:
    """Return the architecture of the model that a config.json describes, and what is not known of it.

    `names` are the tensors of the base, best with their shapes: they are the canonical names. Without any, the names in
    memory are. None where neither library can say; the finding says why.
    """
    shapes = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, ())
    live = _asked(config, shapes)
    return (None, (live,)) if isinstance(live, Finding) else Assembly(live, shapes).result()


def shapes_from_config(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of the model that a config.json describes, by the names that its parameters have in memory.

    Parameters of two or more dimensions, of tied ones the first. MismatchError where neither library can say.
    """
    live = _asked(config, {})
    if isinstance(live, Finding):
        raise MismatchError(live.what, where=live.where, hint="give the folder with the weights: headers are enough")
    copies = {name for name, _ in live.tied}
    return {name: p.shape for name, p in live.parameters.items() if name not in copies}


def _asked(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Live | Finding:
    """Let the libraries build the model; a finding says why they cannot."""
    kinds = (config.get("model_type"), config.get("_class_name"))
    kind = next((k for k in kinds if isinstance(k, str) and k), "")
    try:
        return ask(kind, config, dict(shapes))
    except TooLongError:
        return _unbuilt(kind, f"building the model takes more than {SECONDS} s")
    except UnknownError as problem:
        return _unbuilt(kind, str(problem))
    except Exception as problem:  # whatever a library makes of a stranger's config
        first = (str(problem).strip().splitlines() or [""])[0][:200]
        return _unbuilt(kind, f"{type(problem).__name__}: {first}")


def from_headers(tensors: Mapping[str, Shape]) -> tuple[Architecture, tuple[Finding, ...]]:
    """Return what names and shapes alone say of a model: which weights are matrices, nothing of how they are used."""
    shapes = {name: shape for name, shape in tensors.items() if len(shape) > 1}
    vocabulary = vocabulary_of(shapes)
    weights = {w.path: w for w in (from_header(name, shape, vocabulary) for name, shape in shapes.items())}
    claimed = claim(weights.values())
    architecture = Architecture("unknown", layers=claimed.layers, default_targets=guess_targets(weights.values()))
    unknown = "whether a weight is stored (out, in) or (in, out), which are tied, and their names in memory"
    findings = [Finding("warning", "unknown", f"read from names and shapes alone: {unknown} are not known")]
    if any(isinstance(layer, Experts) for layer in claimed.layers):
        findings.append(Finding("warning", "unknown", "stacks of experts are taken to be (experts, out, in)"))
    return architecture, (*findings, *about_fused(architecture), *about_names(architecture, claimed))


def _unbuilt(kind: str, why: str) -> Finding:
    return Finding("info", kind[:100] or "config.json", f"its layers cannot be read off its config: {why}")
