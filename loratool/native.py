"""The original spelling of an image model's weights: rules between it and the canonical names, both ways.

Checkpoints in one file, ComfyUI and sd-scripts name a model's weights as its authors did; canonical names are those of
diffusers. A rule says `original = canonical`:

    double_blocks.{i}.(img|txt)_mlp.2    = transformer_blocks.{i}.(ff|ff_context).net.2         choices zip
    double_blocks.{i}.img_attn.qkv       = transformer_blocks.{i}.attn.(to_q|to_k|to_v)         rows of one weight
    layers.{i}.attention.qkv             = layers.{i}.attention.(to_q:in|to_k:*|to_v:*)         of these heights
    input_blocks.{1+3*b+j, j<2}.1.**     = down_blocks.{b}.attentions.{j}.**                    an affine index
    output_blocks.{2+3*b, b>=1}.2.conv   = up_blocks.{b}.upsamplers.0.conv                      a bound
    final_layer.adaLN_modulation.1       = norm_out.linear  @swap2                              halves exchanged
    text_projection                      = text_projection  @transpose                          stored (in, out)

Heights are expressions over `in` and `out` (the features of the whole weight) and config keys; `*` is an equal share
of the rest, and so are all where none is said. Names that no rule mentions are the same in both spellings.

Flat names (kohya's `.` -> `_`) are never taken apart: every rule is expanded over the layers of the family, and a flat
name is looked up among the flat spellings of those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from loratool import expressions
from loratool.errors import MismatchError, UsageError
from loratool.patterns import choices, flatten, numbers, outline, pick

_SWAP, _TURN = "@swap2", "@transpose"
_TERM = re.compile(r"(?:(\d+)\*)?([a-z]\w*)|(\d+)")
_BOUND = re.compile(r"([a-z]\w*)(<|>=)(\d+)")
_NAME = re.compile(r"[\w-]+")


DENOISER = "diffusion_model."
#: First elements of flat names by which some tool calls any denoiser: sd-scripts, OneTrainer, LyCORIS, sd-scripts' OFT.
ANY_DENOISER = ("lora_unet", "lora_transformer", "lycoris", "oft_unet")


@dataclass(frozen=True)
class Named:
    """How the files of image tools name one component.

    kohya       the first element of sd-scripts' flat names: lora_unet, lora_te1
    also        first elements that other tools write for it: read, never written
    comfy       the leading elements in ComfyUI's files: `diffusion_model.`, `text_encoders.clip_l.transformer.`
    checkpoint  the same in checkpoints of one file: `model.diffusion_model.`, `cond_stage_model.transformer.`
    native      rules between the original spelling and the canonical one, where they differ (see above)
    flat        which of the two kohya's flat names come from: canonical or native; or last: native, by the last of the
                rules for a weight, where the first is only ComfyUI's
    borrowed    it is a language model with a family of its own, which names without the component in front mean
    """

    kohya: str = ""
    also: tuple[str, ...] = ()
    comfy: str = ""
    checkpoint: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    flat: str = "canonical"
    borrowed: bool = False


@dataclass(frozen=True)
class Labels:
    """What is written into an adapter file to say which models it is for, in the words of the tools that read it.

    base  ss_base_model_version, as sd-scripts and musubi-tuner train: sdxl_base_v1-0
    spec  modelspec.architecture less its `/lora`: stable-diffusion-xl-v1-base; none where it would say more than the
          family does, such as the version
    v2    ss_v2: stable-diffusion-webui knows Stable Diffusion 2 by it
    """

    base: str = ""
    spec: str = ""
    v2: bool = False


class Index(NamedTuple):
    """An element that is a number: `offset` plus each variable times its factor, the largest factor first.

    A variable's bounds are (at least, below); without terms the element is the number `offset` itself.
    """

    offset: int
    terms: tuple[tuple[str, int], ...] = ()
    bounds: tuple[tuple[str, int, int], ...] = ()

    def fill(self, values: Mapping[str, int]) -> int | None:
        """Return the number, or None where a variable is out of its bounds."""
        if any(not low <= values[v] < high for v, low, high in self.bounds):
            return None
        return self.offset + sum(factor * values[v] for v, factor in self.terms)

    def solve(self, number: int) -> dict[str, int] | None:
        """Return the variables that make this `number`, or None."""
        rest, values = number - self.offset, {}
        for variable, factor in self.terms:
            if rest < 0:
                return None
            values[variable], rest = divmod(rest, factor)
        if rest or any(not low <= values[v] < high for v, low, high in self.bounds if v in values):
            return None
        return values

    def bound(self, to: Mapping[str, Index]) -> Index:
        """Return this with variables replaced: by a plain variable of another name, or by a number."""
        offset = self.offset + sum(f * to[v].offset for v, f in self.terms)
        names = {v: new.terms[0][0] for v, new in to.items() if new.terms}
        terms = tuple((names[v], f) for v, f in self.terms if v in names)
        return Index(offset, terms, tuple((names[v], low, high) for v, low, high in self.bounds if v in names))


Element = str | Index
Path = tuple[Element, ...]


class Rule(NamedTuple):
    """A choice-free rule: an original name and the canonical parts whose rows it holds, in that order."""

    name: Path
    parts: tuple[Path, ...]
    heights: tuple[str, ...] = ()
    swap: bool = False
    turned: bool = False


class Original(NamedTuple):
    """A weight of the original spelling: its name and the canonical paths that it holds, as in Rule."""

    name: str
    parts: tuple[str, ...]
    heights: tuple[str, ...] = ()
    swap: bool = False
    turned: bool = False


def heights(
    said: Sequence[str], out: int, inp: int, parts: Sequence[str], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the rows of each part of a weight (out, inp); MismatchError where they do not add up."""
    values = {**config, "out": out, "inp": inp}
    sizes = [0 if s == "*" else expressions.size(_without_keyword(s), values) for s in said or ["*"] * len(parts)]
    free = [n for n, s in enumerate(said or ["*"] * len(parts)) if s == "*"]
    share, rest = divmod(out - sum(sizes), len(free)) if free else (0, out - sum(sizes))
    for n in free:
        sizes[n] = share
    if rest or min(sizes) < 1:
        raise MismatchError(f"{out} rows do not divide into {', '.join(parts)}")
    return tuple(sizes)


def input_of(said: Sequence[str], out: int) -> int:
    """Return the inputs of a weight whose parts have `out` rows in all, from their sizes; 0 where these do not say."""
    try:
        if not said or "*" in said:
            return 0
        one, two = (sum(expressions.size(_without_keyword(s), {"out": out, "inp": n}) for s in said) for n in (1, 2))
    except MismatchError:
        return 0
    each = two - one  # sizes are linear in it
    found, rest = divmod(out - one + each, each) if each > 0 else (0, 0)
    return 0 if rest else found


def height_alone(said: str, inp: int, config: Mapping[str, Any]) -> int | None:
    """Return the rows of one part where they do not depend on the others, else None."""
    try:
        return None if said == "*" else expressions.size(_without_keyword(said), {**config, "inp": inp})
    except MismatchError:
        return None


def _without_keyword(expression: str) -> str:
    return re.sub(r"\bin\b", "inp", expression)


def parse(text: str) -> tuple[Rule, ...]:
    """Expand the choices of one rule; raises UsageError where it is malformed."""
    sides = re.split(r"\s+=\s+", text.strip().removesuffix(_SWAP).removesuffix(_TURN).rstrip())
    if len(sides) != 2:
        raise _malformed(text)
    left, right = map(choices, sides)
    shared, extra = len(left) // 2, len(right) // 2 - len(left) // 2
    zipped = zip(left[1::2], right[1::2], strict=False)
    if extra not in (0, 1) or any(len(a) != len(b) for a, b in zipped):
        raise _malformed(text)
    rules = []
    for picked in product(*(range(len(c)) for c in left[1::2])):
        every = [(*picked, n) for n in range(len(right[2 * shared + 1]))] if extra else [picked]
        parts = [pick(right, p).partition(":") for p in every]
        said = tuple(height for _, _, height in parts)
        rule = Rule(
            _path(pick(left, picked), text),
            tuple(_path(path, text) for path, _, _ in parts),
            said if any(said) else (),
            text.rstrip().endswith(_SWAP),
            text.rstrip().endswith(_TURN),
        )
        _require_sound(rule, text)
        rules.append(rule)
    return tuple(rules)


def _require_sound(rule: Rule, text: str) -> None:
    paths = (rule.name, *rule.parts)
    subtree = any("**" in p for p in paths)
    one_to_one = len({frozenset(_variables(p)) for p in paths}) == 1
    numbered = [e for part in rule.parts for e in part if isinstance(e, Index)]
    plain = all(not e.terms or (e.offset, [f for _, f in e.terms]) == (0, [1]) for e in numbered)
    tails = all("**" not in p[:-1] and (p[-1] == "**") == subtree for p in paths)
    if not (one_to_one and plain and tails) or (subtree and len(rule.parts) > 1) or ("" in rule.heights):
        raise _malformed(text)


def _malformed(text: str) -> UsageError:
    hint = "original = canonical: both sides have the same choices and the same {i}; parts come last on the right"
    return UsageError(f"the rule {text!r} is malformed", hint=hint)


def _path(text: str, rule: str) -> Path:
    return tuple(_element(e, rule) for e in re.split(r"\.(?![^{]*\})", text))


def _element(text: str, rule: str) -> Element:
    if text == "**" or (_NAME.fullmatch(text) and not text.isdecimal()):
        return text
    if text.isdecimal():
        return Index(int(text))
    sum_of, *bounds = (part.strip() for part in text.strip("{}").split(","))
    terms = [_TERM.fullmatch(term.strip()) for term in sum_of.split("+")]
    limits = [_BOUND.fullmatch(bound) for bound in bounds]
    alone = _BOUND.fullmatch(sum_of)  # {b>=1} is short for {b, b>=1}
    if alone:
        terms, limits = [_TERM.fullmatch(alone[1])], [alone, *limits]
    if text[:1] + text[-1:] != "{}" or None in terms or None in limits:
        raise _malformed(rule)
    found = sorted(((t[2], int(t[1] or 1)) for t in terms if t and t[2]), key=lambda term: -term[1])
    bound = tuple((b[1], int(b[3]) if b[2] == ">=" else 0, int(b[3]) if b[2] == "<" else 1 << 31) for b in limits if b)
    return Index(sum(int(t[3]) for t in terms if t and t[3]), tuple(found), bound)


def _variables(path: Path) -> list[str]:
    return [v for e in path if isinstance(e, Index) for v, _ in e.terms]


class Names:
    """All that the rules of one component say of its layers, indexed so that a look-up is a dictionary access.

    `layers` are the paths of the family's layers, choice-free, with `{i}` for indices.
    """

    def __init__(self, rules: Iterable[str], layers: Iterable[Sequence[str]]) -> None:
        self.rules = tuple(rule for text in rules for rule in parse(text))
        known = [_layer(path) for path in layers]
        self._by_name: dict[str, list[Rule]] = {}
        self._by_part: dict[str, list[Rule]] = {}
        for rule in _expanded(self.rules, known):
            self._by_name.setdefault(_key(rule.name), []).append(rule)
            for part in rule.parts:
                self._by_part.setdefault(_key(part), []).append(rule)

    def __iter__(self) -> Iterator[Rule]:
        """The rules as they were expanded over the layers."""
        return (rule for rules in self._by_name.values() for rule in rules)

    def find(self, path: str) -> Original | None:
        """Return what an original name stands for, or None where no rule mentions it."""
        flat = (o for o in self._of(flatten(path)) if o.name == path)
        return next(flat, None) or self._of_subtree(path)

    def unflatten(self, flat: str) -> list[Original]:
        """Return every weight whose flat original name this is: none, one, or an ambiguity."""
        return list(self._of(flat))

    def _of(self, flat: str) -> Iterator[Original]:
        for rule in self._by_name.get(outline(flat), ()):
            values = _solved(rule.name, numbers(flat))
            name = values is not None and _filled(rule.name, values)
            if name and flatten(name) == flat:
                yield _original(rule, name, values or {})

    def _of_subtree(self, path: str) -> Original | None:
        """A name below a rule with `**` that is no layer, such as a norm."""
        elements = path.split(".")
        for rule in self.rules:
            values = _match(rule.name, elements)
            if values is not None:
                tail = elements[len(rule.name) - 1 :] if rule.name[-1] == "**" else []
                parts = tuple(p for part in rule.parts if (p := _filled(part, values, tail)))
                if len(parts) == len(rule.parts):
                    return Original(path, parts, *rule[2:])
        return None

    def original(self, path: str, *, last: bool = False) -> Original | None:
        """Return the weight of the original spelling that a canonical path lies in, or None where no rule says so.

        Where several rules do, the first is taken, or the `last`.
        """
        rules = self._by_part.get(outline(flatten(path)), [])
        for rule in reversed(rules) if last else rules:
            for part in rule.parts:
                values = _solved(part, numbers(flatten(path)))
                if values is None or _filled(part, values) != path:
                    continue
                name = _filled(rule.name, values)
                if name:
                    return _original(rule, name, values)
        elements = path.split(".")
        for rule in self.rules:
            values = _match(rule.parts[0], elements) if rule.name[-1] == "**" else None
            name = _filled(rule.name, values, elements[len(rule.parts[0]) - 1 :]) if values is not None else None
            if name:
                return Original(name, (path,), (), *rule[3:])
        return None


def _original(rule: Rule, name: str, values: Mapping[str, int]) -> Original:
    return Original(name, tuple(str(_filled(p, values)) for p in rule.parts), *rule[2:])


def _layer(path: Sequence[str]) -> Path:
    """A layer's skeleton as a path; its variables get names that no rule has."""
    return tuple(
        Index(0, ((f"layer.{e[1:-1]}", 1),)) if e.startswith("{") else Index(int(e)) if e.isdecimal() else e
        for e in path
    )


def _expanded(rules: Iterable[Rule], layers: Sequence[Path]) -> Iterator[Rule]:
    """Yield the rules, those with `**` once for each layer that they cover."""
    for rule in rules:
        if rule.name[-1] != "**":
            yield rule
            continue
        (part,) = rule.parts
        for layer in layers:
            bound = _unify(part[:-1], layer)
            if bound is not None:
                tail = layer[len(part) - 1 :]
                head = tuple(e.bound(bound) if isinstance(e, Index) else e for e in rule.name[:-1])
                start = tuple(e.bound(bound) if isinstance(e, Index) else e for e in part[:-1])
                yield Rule((*head, *tail), ((*start, *tail),), (), *rule[3:])


def _unify(part: Path, layer: Path) -> dict[str, Index] | None:
    """Return what the variables of a rule are in a layer (a number, or the layer's variable), or None if it is none."""
    if len(layer) <= len(part):
        return None
    found: dict[str, Index] = {}
    for mine, theirs in zip(part, layer, strict=False):
        if not isinstance(mine, Index) or not isinstance(theirs, Index):
            if mine != theirs:
                return None
        elif mine.terms:
            found[mine.terms[0][0]] = theirs
        # a rule for block 0 covers the layer of all blocks, and not the reverse
        number = theirs.offset if isinstance(theirs, Index) and not theirs.terms else None
        if isinstance(mine, Index) and number is not None and mine.solve(number) is None:
            return None
    return found


def _key(path: Path) -> str:
    return outline("_".join("0" if isinstance(e, Index) else flatten(e) for e in path))


def _solved(path: Path, found: Sequence[int]) -> dict[str, int] | None:
    """Return the variables of a path whose flat spelling has these numbers, or None."""
    rest, values = iter(found), dict[str, int]()
    for element in path:
        if not isinstance(element, Index):
            for literal in numbers(flatten(element)):
                if next(rest, None) != literal:
                    return None
            continue
        solved = element.solve(next(rest, -1))
        if solved is None or any(values.get(v, n) != n for v, n in solved.items()):
            return None
        values |= solved
    return values


def _match(path: Path, elements: Sequence[str]) -> dict[str, int] | None:
    subtree = path[-1] == "**"
    if len(elements) < len(path) if subtree else len(elements) != len(path):
        return None
    values: dict[str, int] = {}
    for mine, theirs in zip(path, elements, strict=False):
        if isinstance(mine, Index):
            solved = mine.solve(int(theirs)) if re.fullmatch("0|[1-9][0-9]{0,8}", theirs) else None
            if solved is None or any(values.get(v, n) != n for v, n in solved.items()):
                return None
            values |= solved
        elif mine not in (theirs, "**"):
            return None
    return values


def _filled(path: Path, values: Mapping[str, int], tail: Sequence[str] = ()) -> str | None:
    """Return a path with its variables filled in, or None where one is out of its bounds."""
    out: list[str] = []
    for element in path:
        if element == "**":
            out += tail
        elif isinstance(element, Index):
            number = element.fill(values)
            if number is None:
                return None
            out.append(str(number))
        else:
            out.append(str(element))
    return ".".join(out)
