"""The plugin manager, the registries of families, formats and methods, and the rule for conflicts.

Every plugin of the entry-point group `loratool` is loaded on its own: one that fails is reported by name and the rest
load. LORATOOL_PLUGINS=a,b restricts loading to those names; `-p FILE` registers one file for one call.

The rule, when two architectures, formats or methods have one name: a file given by hand beats a third-party
distribution, that beats a built-in, and the choice is reported; of two third parties neither is used, and asking for
that name is an error that names both. Which family a model is of is decided in loratool.detection.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from loratool import hookspecs
from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.combining import Method
from loratool.errors import LoratoolError, PluginError, UsageError
from loratool.hookspecs import Format

if TYPE_CHECKING:
    import click

GROUP = "loratool"
BUILT_IN = "loratool"
#: Built-in formats: name, summary, where the class is. Listed here so that `loratool formats` imports none of them.
FORMATS = (
    ("kohya", "loratool.formats.image:ImageFormat"),
    ("comfy", "loratool.formats.image:ImageFormat"),
    ("diffusers", "loratool.formats.image:ImageFormat"),
    ("ai-toolkit", "loratool.formats.image:ImageFormat"),
    ("bfl", "loratool.formats.image:ImageFormat"),
    ("xlabs", "loratool.formats.image:ImageFormat"),
    ("onetrainer", "loratool.formats.image:ImageFormat"),
    ("onetrainer-legacy", "loratool.formats.image:ImageFormat"),
    ("lycoris", "loratool.formats.image:ImageFormat"),
    ("peft", "loratool.formats.peft:Peft"),
)
#: Built-in methods of combining: each is the function of that name in loratool.methods.<name>.
METHODS = (
    "average", "cat", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "ema", "knots", "linear",
    "peft_linear_factors", "slerp", "svd", "ties", "ties_svd",
)  # fmt: skip


class Loaded(NamedTuple):
    """One plugin: its entry-point name, the module or file, and the distribution that ships it."""

    name: str
    module: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()


@dataclass
class Plugins:
    """What is installed: the pluggy manager, what loaded, and what did not."""

    manager: pluggy.PluginManager
    loaded: list[Loaded] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)  # family -> the distribution or file that defines it
    contested: dict[str, PluginError] = field(default_factory=dict)  # names that two third parties define
    _defined: dict[tuple[str, str], Any] = field(default_factory=dict)
    _files: set[str] = field(default_factory=set)
    _families: dict[str, Architecture] = field(default_factory=dict)
    _known: int = -1

    def register(self, plugin: Any, name: str, module: str, distribution: str, version: str) -> None:
        """Register one module; a hook that does not exist, or takes what the hook does not give, is an error."""
        key = f"{distribution}:{name}"
        if self.manager.has_plugin(key):
            raise PluginError("registered twice", where=f"{name} ({module})")
        try:
            self.manager.register(plugin, key)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:  # ValueError: the module is there by another name
            if self.manager.has_plugin(key):
                self.manager.unregister(name=key)
            raise PluginError(str(error), where=f"{name} ({module})", hint="see docs/plugins.md") from None
        hooks = tuple(sorted(c.name for c in self.manager.get_hookcallers(plugin) or ()))
        if not hooks:
            what = "registers nothing"
            self._note(
                Finding("warning", f"plugin {name} ({distribution})", what, "is @hookimpl missing? docs/plugins.md")
            )
        self.loaded.append(Loaded(name, module, distribution, version, hooks))

    def add_file(self, path: Path) -> None:
        """Register one Python file as a plugin for this process (`-p FILE`)."""
        if not path.is_file():
            what = "this is a folder, and a plugin is one Python file" if path.is_dir() else "no such plugin file"
            raise UsageError(what, where=path, hint="-p my_family.py: see docs/plugins.md")
        if self.manager.has_plugin(f"{path}:{path.stem}"):  # -p twice, before and after the verb
            return
        spec = importlib.util.spec_from_file_location(f"loratool_plugin_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise PluginError(what, where=path, hint="--debug shows where; see docs/plugins.md") from error
        self._files.add(str(path))
        self.register(module, path.stem, str(path), str(path), "")

    def architectures(self) -> tuple[Architecture, ...]:
        """Every family, conflicts resolved and likenesses completed, in order of their names."""
        if self._known != len(self.loaded):  # a plugin came since
            declared = self._collect("register_architectures", Architecture)
            self._families = {}
            for name, (owner, family) in declared.items():
                own = {
                    n: f for (o, n), f in self._defined.items() if o == owner
                }  # a namesake elsewhere is another family
                try:
                    others = {n: f for n, (_, f) in declared.items()} | own
                    self._families[name] = _complete(family, others, check=self._standing(owner) > 0)
                    self._require_clear_rules(owner, self._families[name])
                    self.owners[name] = owner
                except LoratoolError as problem:  # such as a malformed pattern
                    self._families.pop(name, None)
                    self._leave_out(owner, PluginError(problem.what, where=name, hint=problem.hint))
                except Exception as error:  # such as a field of the wrong type
                    self._families.pop(name, None)
                    self._leave_out(owner, PluginError(f"{type(error).__name__}: {error}", where=name))
            self._known = len(self.loaded)
        return tuple(self._families.values())

    def architecture(self, name: str) -> Architecture:
        """The family of that name; UsageError lists what exists."""
        families = {a.name: a for a in self.architectures()}
        if name in self.contested:
            raise self.contested[name]
        if name not in families:
            near = ", ".join(get_close_matches(name, families, cutoff=0.5))
            hint = f"did you mean {near}? " if near else ""
            raise UsageError(
                f"no family is called {name!r}", hint=f"{hint}`loratool arch list` shows all; -p FILE adds one"
            )
        return families[name]

    def formats(self) -> tuple[Format, ...]:
        """Every adapter format."""
        built_in: dict[str, tuple[str, Any]] = {}
        for name, place in FORMATS:
            module, _, attribute = place.partition(":")
            made = getattr(import_module(module), attribute)
            built_in[name] = BUILT_IN, made(name) if attribute == "ImageFormat" else made()
        return tuple(format for _, format in self._collect("register_formats", object, built_in).values())

    def format(self, name: str) -> Format:
        """The format of that name; UsageError lists what exists."""
        formats = {f.name: f for f in self.formats()}
        if name not in formats:
            raise UsageError(f"no format is called {name!r}", hint=f"there are {', '.join(formats)}")
        return formats[name]

    def methods(self) -> tuple[Method, ...]:
        """Every method of combining adapters."""
        built_in = {n: (BUILT_IN, getattr(import_module(f"loratool.methods.{n}"), n)) for n in METHODS}
        sound = []
        for owner, found in self._collect("register_methods", Method, built_in).values():
            try:
                found.require_valid()
                sound.append(found)
            except PluginError as problem:
                self._leave_out(owner, problem)
        return tuple(sound)

    def method(self, name: str) -> Method:
        """The method of that name; UsageError lists what exists."""
        methods = {m.name: m for m in self.methods()}
        if name in self.contested:
            raise self.contested[name]
        if name not in methods:
            near = ", ".join(get_close_matches(name, methods, cutoff=0.5))
            hint = f"did you mean {near}? " if near else ""
            raise UsageError(f"no method is called {name!r}", hint=f"{hint}there are {', '.join(methods)}")
        return methods[name]

    def add_commands(self, group: click.Group) -> list[Finding]:
        """Let every plugin add its commands to `group`; return a finding for each that fails, and go on."""
        failed = []
        for implementation in self.manager.hook.register_commands.get_hookimpls():
            try:
                implementation.function(**({"cli": group} if implementation.argnames else {}))
            except (Exception, SystemExit) as error:
                what = f"register_commands failed: {type(error).__name__}: {error}"
                failed.append(Finding("warning", f"plugin {implementation.plugin_name}", what))
        return failed

    def _collect(
        self, hook: str, kind: type, start: Mapping[str, tuple[str, Any]] | None = None
    ) -> dict[str, tuple[str, Any]]:
        """Call a hook plugin by plugin and resolve names that occur twice by the rule above: name -> owner and item."""
        chosen = dict(start or {})
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            owner = implementation.plugin_name.rpartition(":")[0]
            try:
                items = _checked(implementation, kind, hook)
            except PluginError as problem:
                self._leave_out(owner, problem)
                continue
            for item in items:
                self._defined[owner, item.name] = item
                other = chosen.get(item.name)
                if other is None or self._beats(owner, other[0]):
                    chosen[item.name] = owner, item
                if other is not None:
                    self._report_conflict(item.name, owner, other[0])
        return {n: chosen[n] for n in sorted(chosen) if n not in self.contested}

    def _beats(self, one: str, other: str) -> bool:
        """Whether a plugin's definition replaces another's: files given by hand, then third parties, then built-ins."""
        return self._standing(one) > self._standing(other)

    def _standing(self, owner: str) -> int:
        return 2 if owner in self._files else 0 if owner == BUILT_IN else 1

    def beats(self, one: str, other: str) -> bool:
        """Whether the definer of one family goes before the definer of another."""
        return self._beats(self.owners.get(one, BUILT_IN), self.owners.get(other, BUILT_IN))

    def _report_conflict(self, name: str, one: str, other: str) -> None:
        if one == other:
            problem = PluginError(f"defines {name!r} twice, so neither is used", where=one)
            self.contested[name] = problem
            self._leave_out(one, problem)
            return
        if self._beats(one, other) or self._beats(other, one):
            winner, loser = (one, other) if self._beats(one, other) else (other, one)
            what = "replaces the built-in of this name" if loser == BUILT_IN else f"replaces the one of {loser}"
            self._note(Finding("warning", name, f"{winner} {what}"))
            return
        hint = "uninstall one, or restrict loading with LORATOOL_PLUGINS"
        self.contested[name] = PluginError(f"both {other} and {one} define {name!r}", hint=hint)
        self._note(Finding("warning", name, f"both {other} and {one} define it, so neither is used", hint))

    def _leave_out(self, owner: str, problem: PluginError) -> None:
        """Go on without what a plugin got wrong; but a file that was given by hand must work."""
        if owner in self._files:
            where = problem.where if owner in problem.where else f"{owner}: {problem.where}"
            raise PluginError(problem.what, where=where, hint=problem.hint or "see docs/plugins.md") from problem
        hint = "; ".join(filter(None, (problem.hint, _way_out(owner))))
        self._note(Finding("warning", f"plugin {problem.where or owner}", f"left out: {problem.what}", hint))

    def _require_clear_rules(self, owner: str, family: Architecture) -> None:
        """Raise PluginError where two rules disagree about a name; the built-in families' are checked by tests."""
        if self._standing(owner) and (family.memory or family.aliases):
            from loratool.operations.rules import rule_problems

            for finding in rule_problems(family):
                raise PluginError(f"{finding.what} ({finding.where})", where=family.name, hint=finding.hint)

    def _note(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)


def _way_out(owner: str) -> str:
    return f"mend or uninstall {owner}; LORATOOL_PLUGINS=a,b loads only those named"


def _complete(family: Architecture, declared: Mapping[str, Architecture], *, check: bool) -> Architecture:
    """Return a family with all that it shares with the one it is like; the built-in ones are checked by tests."""
    if check:
        family.validate_types()
    trail, parent_name = [family.name], family.like
    while family.like:
        if family.like not in declared:
            raise PluginError(f"is like {family.like!r}, which is not loaded", where=family.name)
        if family.like in trail:
            raise PluginError(f"is like itself: {' -> '.join([*trail, family.like])}", where=family.name)
        trail.append(family.like)
        parent = declared[family.like]
        family = replace(family.completed(parent), like=parent.like)
    if not family.layers:
        raise PluginError("has no layers", where=family.name, hint="see docs/plugins.md")
    if check:
        family.validate()
    return replace(family, like=parent_name)


def _checked(implementation: Any, kind: type, hook: str) -> Iterable[Any]:
    """Call one plugin's hook and check what it returns."""
    name = implementation.plugin_name
    try:
        items = implementation.function()
        if not isinstance(items, list) or not all(isinstance(i, kind) and hasattr(i, "name") for i in items):
            raise PluginError(f"{hook} must return a list of {kind.__name__}s", where=name, hint="see docs/plugins.md")
        if nameless := [i for i in items if not isinstance(i.name, str) or not i.name]:
            raise PluginError(
                f"a name must be a text, not {nameless[0].name!r}", where=name, hint="see docs/plugins.md"
            )
    except PluginError:
        raise
    except LoratoolError as error:  # such as a malformed pattern
        raise PluginError(str(error), where=name, hint=error.hint) from None
    except (Exception, SystemExit) as error:
        raise PluginError(f"{hook} failed: {type(error).__name__}: {error}", where=name) from error
    return items


@cache
def installed() -> Plugins:
    """Return the plugins of this installation, loaded once."""
    return load(os.environ.get("LORATOOL_PLUGINS"))


def load(only: str | None = None) -> Plugins:
    """Load the entry points of the group, each on its own; `only` is a comma-separated list of names."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager)
    wanted = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    points = [p for p in metadata.entry_points(group=GROUP) if wanted is None or p.name in wanted]
    for missing in sorted((wanted or set()) - {p.name for p in points}):
        plugins.findings.append(Finding("warning", missing, "LORATOOL_PLUGINS names a plugin that is not installed"))
    shipped: dict[int, tuple[str, str]] = {}  # a distribution parses its METADATA whenever it is asked
    for point in points:
        if point.dist and id(point.dist) not in shipped:
            told = point.dist.metadata
            shipped[id(point.dist)] = str(told["Name"]), str(told["Version"])
    for point in sorted(points, key=lambda p: (*shipped.get(id(p.dist), ("", "")), p.name)):
        distribution, version = shipped.get(id(point.dist), ("unknown", ""))
        try:
            plugins.register(point.load(), point.name, point.value, distribution, version)
        except (Exception, SystemExit) as error:
            what = f"not loaded: {error.what if isinstance(error, PluginError) else f'{type(error).__name__}: {error}'}"
            where = f"plugin {point.name} ({distribution})"
            plugins.findings.append(Finding("warning", where, what, _way_out(distribution)))
    return plugins
