"""The plugin manager, the registries of families and formats, and the rule for conflicts.

Every plugin of the entry-point group `loratool` is loaded on its own: one that fails is reported by name and the rest
load. LORATOOL_PLUGINS=a,b restricts loading to those names; `-p FILE` registers one file for one call.

The rule, when two architectures or formats have one name: a third-party distribution beats a built-in, and the choice
is reported; two third parties are an error that names both. Two families that both fit a model are candidates, and a
command fails only where they would give different output.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from loratool import hookspecs
from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.errors import LoratoolError, PluginError, UsageError
from loratool.hookspecs import Format
from loratool.tensors import TensorSource

if TYPE_CHECKING:
    import click

GROUP = "loratool"
BUILT_IN = "loratool"
#: Built-in formats: name, summary, where the class is. Listed here so that `loratool formats` imports none of them.
FORMATS = (
    ("kohya", "loratool.formats.kohya:Kohya"),
    ("peft", "loratool.formats.peft:Peft"),
)


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
        self.loaded.append(Loaded(name, module, distribution, version, hooks))

    def add_file(self, path: Path) -> None:
        """Register one Python file as a plugin for this process (`-p FILE`)."""
        if not path.is_file():
            raise UsageError("no such plugin file", where=path)
        if self.manager.has_plugin(f"{path}:{path.stem}"):  # -p twice, before and after the verb
            return
        spec = importlib.util.spec_from_file_location(f"loratool_plugin_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{type(error).__name__}: {error}", where=path) from error
        self.register(module, path.stem, str(path), str(path), "")

    def architectures(self) -> tuple[Architecture, ...]:
        """Every family, after conflicts are resolved, in order of their names."""
        return tuple(self._collect("register_architectures", Architecture).values())

    def architecture(self, name: str) -> Architecture:
        """The family of that name; UsageError lists what exists."""
        families = {a.name: a for a in self.architectures()}
        if name not in families:
            raise UsageError(f"no family is called {name!r}", hint=f"there are {', '.join(families)}; -p FILE adds one")
        return families[name]

    def formats(self) -> tuple[Format, ...]:
        """Every adapter format."""
        built_in: dict[str, tuple[str, Any]] = {}
        for name, place in FORMATS:
            module, _, attribute = place.partition(":")
            built_in[name] = BUILT_IN, getattr(import_module(module), attribute)()
        return tuple(self._collect("register_formats", object, built_in).values())

    def format(self, name: str) -> Format:
        """The format of that name; UsageError lists what exists."""
        formats = {f.name: f for f in self.formats()}
        if name not in formats:
            raise UsageError(f"no format is called {name!r}", hint=f"there are {', '.join(formats)}")
        return formats[name]

    def add_commands(self, group: click.Group) -> list[Finding]:
        """Let every plugin add its commands to `group`; return a finding for each that fails, and go on."""
        failed = []
        for implementation in self.manager.hook.register_commands.get_hookimpls():
            try:
                implementation.function(**({"cli": group} if implementation.argnames else {}))
            except Exception as error:
                what = f"register_commands failed: {type(error).__name__}: {error}"
                failed.append(Finding("warning", f"plugin {implementation.plugin_name}", what))
        return failed

    def _collect(self, hook: str, kind: type, start: Mapping[str, tuple[str, Any]] | None = None) -> dict[str, Any]:
        """Call a hook plugin by plugin and resolve names that occur twice by the rule above."""
        chosen = dict(start or {})
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            owner = implementation.plugin_name.rpartition(":")[0]
            for item in _checked(implementation, kind, hook):
                other = chosen.get(item.name)
                if other is None or other[0] == BUILT_IN:
                    chosen[item.name] = owner, item
                    if other and owner != BUILT_IN:
                        self._note(Finding("warning", item.name, f"{owner} replaces the built-in of this name"))
                elif owner != BUILT_IN:
                    raise PluginError(
                        f"both {other[0]} and {owner} define {item.name!r}",
                        hint="uninstall one, or restrict loading with LORATOOL_PLUGINS",
                    )
                else:
                    self._note(Finding("warning", item.name, f"{other[0]} replaces the built-in of this name"))
        return {name: item for name, (_, item) in sorted(chosen.items())}

    def _note(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)


def _checked(implementation: Any, kind: type, hook: str) -> Iterable[Any]:
    """Call one plugin's hook and check what it returns."""
    name = implementation.plugin_name
    try:
        items = implementation.function()
        if not isinstance(items, list) or not all(isinstance(i, kind) and hasattr(i, "name") for i in items):
            raise PluginError(f"{hook} must return a list of {kind.__name__}s", where=name, hint="see docs/plugins.md")
        for item in items:
            if isinstance(item, Architecture):
                item.validate()
    except PluginError:
        raise
    except LoratoolError as error:  # such as a malformed pattern
        raise PluginError(str(error), where=name, hint=error.hint) from None
    except Exception as error:
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
    for point in sorted(points, key=lambda p: (p.dist.name if p.dist else "", p.name)):
        distribution = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else ""
        try:
            plugins.register(point.load(), point.name, point.value, distribution, version)
        except Exception as error:
            what = f"not loaded: {type(error).__name__}: {error}"
            plugins.findings.append(Finding("warning", f"plugin {point.name} ({distribution})", what))
    return plugins


class Family(NamedTuple):
    """The architecture of a base, and how it was found."""

    architecture: Architecture
    by: str


def family_of(base: TensorSource, plugins: Plugins, name: str = "") -> Family | None:
    """Return the family of a base checkpoint: by `--arch`, by its config, or by its tensor names; None if unknown.

    By names a family must explain every tensor of two or more dimensions.
    """
    if name:
        return Family(plugins.architecture(name), "--arch")
    config = base.config or {}
    families = plugins.architectures()
    for architecture in families:
        if config.get("model_type") in architecture.match.model_types and config.get("model_type"):
            return Family(architecture, f"model_type {config['model_type']}")
        if config.get("_class_name") in architecture.match.classes:
            return Family(architecture, f"class {config['_class_name']}")
    weights = [n[: -len(".weight")] for n, r in base.tensors.items() if n.endswith(".weight") and len(r.shape) > 1]
    fitting = [a for a in families if weights and a.explains(weights)]
    if len(fitting) == 1:
        return Family(fitting[0], "tensor names")
    return None
