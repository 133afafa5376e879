"""What a method of combining adapters is: one annotated function, and the options that its signature declares.

A method makes one update of the updates that several adapters make to one weight. What it is given depends on the
`space` that it works in:

    weights   Share a share of each adapter -> one coefficient an adapter; the result is the sum of coefficient * delta
    factors   Pair a pair of factors of each -> one pair (up, down) in which the scale is 1
    dense     Matrix the update of each as a matrix -> one matrix; it is then truncated to a rank

In the first two nothing of size out x in is ever formed. Options are the keyword-only parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from math import isfinite
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from loratool.errors import MismatchError, PluginError, UsageError

if TYPE_CHECKING:
    import torch

SPACES = ("weights", "factors", "dense")
#: Which rank a result gets where nobody asks for one: all of what it has, or the largest that the adapters have.
RANKS = ("all", "largest")
#: The option of methods that use random numbers: a unit gives each module a seed of its own, made from it.
SEED = "seed"


class Share(NamedTuple):
    """An adapter's weight in a module, and the step of training that it is from (its place, where nothing says it)."""

    weight: float
    step: int


class Pair(NamedTuple):
    """An adapter's update of a module, scaling * up @ down, to be applied with `weight`.

    up (out, rank) and down (rank, in x kernel), in the order of the file and at least fp32. An adapter that does not
    have the module has rank 0.
    """

    weight: float
    step: int
    scaling: float
    up: torch.Tensor
    down: torch.Tensor


class Matrix(NamedTuple):
    """An adapter's update of a module as a matrix (out, in x kernel) in fp32, to be applied with `weight`.

    Adapters that do not have the module are not there.
    """

    weight: float
    step: int
    delta: torch.Tensor


class Bounds(NamedTuple):
    """What an option's number may be: `low` to `high`, both included unless `open_low`."""

    low: float
    high: float
    open_low: bool = False

    def __str__(self) -> str:
        return f"{'above' if self.open_low else 'from'} {self.low:g} to {self.high:g}"

    def hold(self, value: float) -> bool:
        """Whether a number is within."""
        return self.low <= value <= self.high and not (self.open_low and value == self.low)


# Options that several methods have.
Density = Annotated[float, "share of the entries that is kept", Bounds(0, 1, open_low=True)]
Sign = Annotated[Literal["total", "frequency"], "how signs are elected: by sum or by number"]
Seed = Annotated[int, "of the masks"]


@dataclass(frozen=True)
class Option:
    """One option of a method: its name, type, default, and what it may be."""

    name: str
    kind: type
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    bounds: Bounds | None = None

    def parse(self, text: object) -> Any:
        """Return the value that a text (or a value of an API call) stands for; UsageError says what is wanted."""
        try:
            value = self._converted(text)
        except ValueError:
            raise UsageError(f"{self.name}={text} is no {self.wanted}", hint=f"-O {self.name}={self.shown}") from None
        fits = value in self.choices if self.choices else self.bounds is None or self.bounds.hold(value)
        if not fits:
            raise UsageError(f"{self.name}={text} is impossible: {self.wanted}", hint=f"-O {self.name}={self.shown}")
        return value

    def _converted(self, value: object) -> Any:
        if self.kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if str(value).lower() not in words:
                raise ValueError
            return words[str(value).lower()]
        number = self.kind(str(value))
        if self.kind is float and not isfinite(number):
            raise ValueError
        return number

    @property
    def wanted(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return " or ".join(self.choices)
        word = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}[self.kind]
        return f"{word} {self.bounds}" if self.bounds else word

    @property
    def listed(self) -> str:
        """Its name with its default, if it has one."""
        return self.name if self.default is None else f"{self.name}={self.shown}"

    @property
    def shown(self) -> str:
        """An example of its value."""
        if self.default is not None:
            return str(self.default).lower() if self.kind is bool else str(self.default)
        return self.choices[0] if self.choices else f"{self.bounds.high:g}" if self.bounds else "..."


@dataclass(frozen=True)
class Method:
    """A method: its name, the function, the space that it works in, and the rank of its result where none is asked for.

    `only` is how many adapters it is for (0: any number); `ordered` says that their order has a meaning, `one_rank`
    that in a module all must have one rank.
    """

    name: str
    run: Callable[..., Any] = field(repr=False, compare=False)
    space: str
    rank: str = "largest"
    only: int = 0
    ordered: bool = False
    one_rank: bool = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        return self.run(*arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self.run.__module__, self.run.__qualname__)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Option]:
        """The options that the signature declares, by name."""
        given = {p.name: p for p in inspect.signature(self.run).parameters.values() if p.kind is p.KEYWORD_ONLY}
        hints = {name: p.annotation for name, p in given.items()}
        scope = getattr(inspect.unwrap(self.run), "__globals__", {})
        try:  # of these parameters alone: what is annotated with tensors need not be imported
            found = get_type_hints(SimpleNamespace(__annotations__=hints), scope, include_extras=True)
            return {name: _option(name, found[name], p.default) for name, p in given.items()}
        except (NameError, TypeError, KeyError) as problem:
            raise PluginError(f"its signature is no schema of options: {problem}", where=self.name) from None

    def bind(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Return the value of every option, from what was given and the defaults; UsageError lists what exists."""
        options = self.options
        for name in given:
            if name not in options:
                near = get_close_matches(name, options, 1)
                told = ", ".join(o.listed for o in options.values()) or "none"
                hint = f"did you mean {near[0]}? " if near else ""
                raise UsageError(f"{self.name} has no option {name!r}", hint=f"{hint}its options: {told}")
        return {n: o.parse(given[n]) if given.get(n) is not None else o.default for n, o in options.items()}

    def require_valid(self) -> None:
        """Raise PluginError where a declaration makes no sense."""
        if self.space not in SPACES or self.rank not in RANKS:
            raise PluginError(f"space is one of {', '.join(SPACES)}, rank of {', '.join(RANKS)}", where=self.name)
        if not callable(self.run) or not self.summary:
            raise PluginError("a method is a function with a docstring", where=self.name)
        _ = self.options


def method(
    space: str, *, rank: str = "largest", only: int = 0, ordered: bool = False, one_rank: bool = False
) -> Callable[[Callable[..., Any]], Method]:
    """Make a method of a function, which gives it its name: the decorator of the files in loratool/methods."""

    def of(run: Callable[..., Any]) -> Method:
        return Method(run.__name__, run, space, rank, only, ordered, one_rank)

    return of


def require_one_rank(ranks: Sequence[int], where: str = "") -> None:
    """Raise MismatchError where adapters have different ranks in a module, and a method adds their factors."""
    if len(set(ranks)) > 1:
        what = f"the ranks {', '.join(map(str, ranks))} differ, and factors can only be added at one rank"
        hint = "a method that works on the deltas: cat, svd, ties_svd, dare_linear_svd ..."
        raise MismatchError(what, where=where, hint=hint)


def _find(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _option(name: str, annotation: Any, default: Any) -> Option:
    """Read `Annotated[float, "help", Bounds(0, 1)]`, `Literal["a", "b"]`, `int | None` ..."""
    if default is inspect.Parameter.empty:
        raise TypeError(f"{name} has no default")
    extras: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        extras = tuple(more)
    if get_origin(annotation) in (Union, UnionType):
        kinds = [k for k in get_args(annotation) if k is not NoneType]
        annotation = kinds[0] if len(kinds) == 1 else annotation
    choices: tuple[str, ...] = ()
    if get_origin(annotation) is Literal:
        choices, annotation = get_args(annotation), str
    if annotation not in (int, float, bool, str):
        raise TypeError(f"{name} is {annotation}, and must be an int, float, bool, str or Literal")
    text = next((e for e in extras if isinstance(e, str)), "")
    return Option(name, annotation, default, text, choices, next((e for e in extras if isinstance(e, Bounds)), None))
