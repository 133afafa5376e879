"""Which modules of a live model a new adapter trains, at which rank and alpha, and the factors that PEFT gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod, sqrt

from loratool.adapter import Adapter, Target
from loratool.deltas import LowRank
from loratool.errors import MismatchError, UnsupportedError, UsageError
from loratool.formats.peft_config import Module as Told
from loratool.formats.peft_names import WRAPPER
from loratool.formats.peft_stacks import nested
from loratool.layers import Experts
from loratool.operations.survey import Module, Survey
from loratool.operations.targets import as_told
from loratool.patterns import selects

_SHOWN = 8


@dataclass(frozen=True)
class Wish:
    """What is to be trained: modules of a preset, less what globs leave out; ranks and alphas, the last match counts.

    Without a preset, `target` chooses among all modules. `like`: an adapter whose modules, ranks, alphas and kind of
    scaling are taken instead.
    """

    preset: str = ""
    target: Sequence[str] = ()
    exclude: Sequence[str] = ()
    rank: int = 8
    alpha: float = 16.0
    rank_for: tuple[tuple[str, int], ...] = ()
    alpha_for: tuple[tuple[str, float], ...] = ()
    rslora: bool = False
    like: Adapter | None = None

    def __post_init__(self) -> None:
        for rank in (self.rank, *(n for _, n in self.rank_for)):
            if rank < 1:
                raise UsageError(f"a rank of {rank} is impossible", hint="the smallest rank is 1")
        for alpha in (self.alpha, *(x for _, x in self.alpha_for)):
            if not (isfinite(alpha) and alpha > 0):
                raise UsageError(f"an alpha of {alpha:g} is impossible", hint="a number above 0, usually 4 to 64")

    @property
    def is_preset(self) -> bool:
        """Whether all modules of a preset are meant, and no others."""
        return not (self.target or self.exclude or self.like)


@dataclass(frozen=True)
class Trained:
    """A module that is to be trained: as PEFT is told of it, its name in the file, rank, alpha, shapes of its factors.

    `down` (A) is (rank, in, *kernel), of a stack of experts (experts x rank, in); `up` (B) is (out, rank, 1, ...), of a
    stack (out, rank x experts).
    """

    module: Module
    name: str
    rank: int
    alpha: float
    rslora: bool
    down: tuple[int, ...]
    up: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The kind of layer."""
        return self.module.weights[0].layer.kind

    @property
    def is_embedding(self) -> bool:
        """Whether PEFT has its embedding's layer for it."""
        return self.kind == "embedding" and not self.module.is_parameter

    @property
    def scaling(self) -> float:
        """What PEFT multiplies the product of the factors by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def full_rank(self) -> int:
        """The rank that an update of the weight has at most; in a stack, of each expert."""
        copies = self.module.copies if self.module.is_parameter else 1
        return min(prod(self.down[1:]), self.up[0]) if copies == 1 else min(self.module.out, self.module.inputs)

    @property
    def names(self) -> tuple[str, str]:
        """The names of down and up in the file."""
        if self.is_embedding:
            return f"{self.name}.lora_embedding_A", f"{self.name}.lora_embedding_B"
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"

    @property
    def told(self) -> Told:
        """What the config says of it."""
        return Told(self.module.name, self.rank, self.alpha, self.scaling, is_parameter=self.module.is_parameter)


def trained(survey: Survey, wish: Wish, where: str) -> list[Trained]:
    """Return the modules to train, in the order of the base; raise by name where one cannot be, or nothing matches."""
    chosen = _chosen(survey, wish, where)
    modules = [as_told(survey, m) for m in chosen]
    _require_possible(survey, modules, where)
    inside = nested(m.name for m in modules if m.is_parameter)
    shapes = _Shapes(wish, survey, where)
    by = "these are" if wish.target or wish.exclude else _by(wish)
    _Chosen(chosen, survey.modules, by, where).require_used(p for p, _ in (*wish.rank_for, *wish.alpha_for))
    return [shapes.of(m, WRAPPER + inside.get(m.name, m.name)) for m in modules]


def _chosen(survey: Survey, wish: Wish, where: str) -> list[Module]:
    if wish.like is not None:
        candidates = _of_adapter(survey, wish.like, where)
    elif wish.preset or not wish.target:
        candidates = survey.selected(wish.preset or "default")
    else:
        candidates = list(survey.modules)
    if not candidates:
        raise MismatchError(
            f"this model has no layer of the preset {wish.preset or 'default'}", where=where, hint=_SHOW
        )
    _Chosen(candidates, survey.modules, _by(wish), where).require_used((*wish.target, *wish.exclude))
    chosen = [m for m in candidates if (not wish.target or _any(wish.target, m)) and not _any(wish.exclude, m)]
    if not chosen:
        raise MismatchError("no module is left to train", where=where, hint=_SHOW)
    return chosen


def _by(wish: Wish) -> str:
    """Say what chose the modules, before --target and --exclude."""
    return f"{wish.like.origin.path} has" if wish.like else f"preset {wish.preset or 'default'} is"


_SHOW = "loratool arch show lists the layers; patterns match whole names or their ends"


def _hits(pattern: str, module: Module) -> bool:
    """Whether a glob selects a module, by its name or by those of its weights; all of them, or it is refused."""
    component = module.weights[0].component
    bare = module.name.removesuffix(".weight")
    if selects(pattern, bare, component):
        return True
    hit = [selects(pattern, w.path, w.component) for w in module.weights]
    if any(hit) and not all(hit):
        one, other = (module.weights[hit.index(yes)].path for yes in (True, False))
        raise UnsupportedError(
            f"PEFT trains {bare} as a whole, and {pattern!r} selects {one} and not {other}",
            where=bare,
            hint=f"choose all that is in it, in every layer or in this one: '{_below_numbers(bare)}' or '{bare}'",
        )
    return all(hit)


def _below_numbers(path: str) -> str:
    """The end of a path that its counterparts in other layers share."""
    names = path.split(".")
    last = max((n for n, name in enumerate(names) if name.isdecimal()), default=-1)
    return ".".join(names[last + 1 :]) or path


def _any(patterns: Sequence[str], module: Module) -> bool:
    return any(_hits(p, module) for p in patterns)


@dataclass(frozen=True)
class _Chosen:
    """Modules that patterns are to match, those of the whole model, and by what they were chosen."""

    modules: Sequence[Module]
    every: Sequence[Module]
    by: str
    where: str

    def require_used(self, patterns: Iterable[str]) -> None:
        """Raise MismatchError where a pattern matches none of them: as it matches others, or nothing."""
        for pattern in patterns:
            if any(_hits(pattern, m) for m in self.modules):
                continue
            if not any(_hits(pattern, m) for m in self.every):
                raise MismatchError(f"no module matches {pattern!r}", where=self.where, hint=_SHOW)
            names = list(dict.fromkeys(m.name.removesuffix(".weight").rpartition(".")[2] for m in self.modules))
            told = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")
            what = f"{pattern!r} is not among the modules chosen: {self.by} {told}"
            raise MismatchError(what, where=self.where, hint="leave it out; or choose more with --preset or --target")


def _require_possible(survey: Survey, modules: Sequence[Module], where: str) -> None:
    """Raise, by name, where the factors of a module are not known, or PEFT adapts no such layer."""
    components = sorted({w.component for m in modules for w in m.weights})
    if len(components) > 1:
        raise UsageError(
            f"a PEFT adapter is for one model, and this would train {', '.join(components)}",
            where=where,
            hint=f"name the folder of one of them, or choose: --target '{components[0]}:**'",
        )
    problems = [f"{m.name}: {why}" for m in modules if (why := _why_not(survey, m))]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UnsupportedError(
            "\n  ".join([f"{len(problems)} modules cannot be given factors", *problems[:_SHOWN], *more]),
            where=where,
            hint="leave them out with --exclude",
        )


def _why_not(survey: Survey, module: Module) -> str:
    first = module.weights[0]
    if survey.is_refused(module):
        return "PEFT does not adapt it, as this model's kernels read its weight past any adapter"
    if first.layer.kind == "matrix":
        return "which of its two sizes is that of the inputs is not known: no family describes this model"
    if first.layer.kind.startswith("conv") and first.inputs == 1 and first.out > 1:
        return "a convolution of each channel by itself"
    if module.is_parameter and module.kernel > 1:
        return "a parameter of more than three dimensions"
    if not module.is_parameter and module.copies > 1:
        return "a stack of matrices that is no parameter in memory"
    return ""


@dataclass(frozen=True)
class _Shapes:
    """The rank and alpha of each module by what was asked for, and the shapes that follow."""

    wish: Wish
    survey: Survey
    where: str

    @cached_property
    def _like(self) -> dict[tuple[str, str], tuple[int, float]]:
        return _ranks_of(self.wish.like) if self.wish.like else {}

    def of(self, module: Module, name: str) -> Trained:
        rank, alpha, rslora = self._rank(module)
        first, count = module.weights[0], module.copies
        out, inputs = module.out, module.inputs
        if module.is_parameter:
            bare = not isinstance(first.layer, Experts) and not first.tensor.endswith(".weight")
            flat = bare and first.layer.transposed and len(self.survey.shapes[first.tensor]) == 2
            unmarked = isinstance(first.layer, Experts) and first.layer.unmarked
            if flat or unmarked:  # PEFT takes 2-D parameters as (out, in), and so those of stacks that nothing marks
                out, inputs = inputs, out
            return Trained(module, name, rank, alpha, rslora, (count * rank, inputs), (out, rank * count))
        kernel = self.survey.shapes[first.tensor][2:] if first.layer.kind.startswith("conv") else ()
        ones = (1,) * len(kernel)
        return Trained(module, name, rank, alpha, rslora, (rank, inputs, *kernel), (out, rank, *ones))

    def _rank(self, module: Module) -> tuple[int, float, bool]:
        """Return rank, alpha, and whether the scaling is by the root of the rank."""
        wish = self.wish
        if wish.like is not None:
            return *max(self._like[w.component, w.path] for w in module.weights), _is_rslora(wish.like)
        ranks = [n for pattern, n in wish.rank_for if _hits(pattern, module)]
        alphas = [x for pattern, x in wish.alpha_for if _hits(pattern, module)]
        return [wish.rank, *ranks][-1], [wish.alpha, *alphas][-1], wish.rslora


# -- Like another adapter ---------------------------------------------------------------------------------------------


def _places(adapter: Adapter) -> dict[tuple[str, str], Target]:
    """Return the target of each canonical path, but for those of which AdaLoRA has left no rank."""
    left = [t for t, deltas in adapter.deltas.items() if any(d.rank or not isinstance(d, LowRank) for d in deltas)]
    return {(target.component, part): target for target in left for part in target.parts}


def _whole(path: str) -> str:
    """The weight that a path is, or is a part of."""
    return path.partition("[")[0]


def _of_adapter(survey: Survey, adapter: Adapter, where: str) -> list[Module]:
    """Return the modules that an adapter trains; raise where the model has not all of them, or trains more at once."""
    where = f"{where}, like {adapter.origin.path}"
    wanted = {(c, _whole(p)): p for c, p in _places(adapter)}
    held = {(w.component, w.path) for m in survey.modules for w in m.weights}
    strangers = sorted(p for place, p in wanted.items() if place not in held)
    if strangers:
        more = f" and {len(strangers) - 4} more" if len(strangers) > 4 else ""
        raise MismatchError(f"the model has no {', '.join(strangers[:4])}{more}", where=where, hint=_SHOW)
    chosen = []
    for module in survey.modules:
        hit = [(w.component, w.path) in wanted for w in module.weights]
        if any(hit) and not all(hit):
            what = f"PEFT trains {module.name} as a whole, and the adapter updates only a part of it"
            raise UnsupportedError(what, where=where, hint="--preset, --target and --rank-for say the same by hand")
        if any(hit):
            chosen.append(module)
    return chosen


def _ranks_of(adapter: Adapter) -> dict[tuple[str, str], tuple[int, float]]:
    """Return the largest rank that an adapter gives any part of each weight, and its alpha; of AdaLoRA what is left."""
    others = sorted({d.kind for deltas in adapter.deltas.values() for d in deltas if not isinstance(d, LowRank)})
    if others:
        what = f"--like takes ranks and alphas of LoRA, and this is {', '.join(others)}"
        hint = "--preset, --target and --rank-for say by hand which modules and ranks"
        raise UnsupportedError(what, where=adapter.origin.path, hint=hint)
    rslora = _is_rslora(adapter)
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for (component, path), target in _places(adapter).items():
        delta = max((d for d in adapter.deltas[target] if isinstance(d, LowRank)), key=lambda d: d.rank)
        alpha = float(f"{delta.scaling * sqrt(delta.rank):.12g}") if rslora else delta.alpha
        place = component, _whole(path)
        found[place] = max(found.get(place, (0, 0.0)), (delta.rank, alpha))
    return found


def _is_rslora(adapter: Adapter) -> bool:
    """Whether alpha is divided by the root of the rank: formats but PEFT's have no word for it."""
    return adapter.origin.format == "peft" and bool(adapter.origin.config.get("use_rslora"))
