"""The public names: listed, sorted, documented, and all that there is."""

import inspect
import types

import loratool


def test_all_is_sorted_and_complete():
    assert sorted(loratool.__all__) == loratool.__all__
    assert len(set(loratool.__all__)) == len(loratool.__all__)
    public = {
        name
        for name, value in vars(loratool).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name not in ("annotations", "Any")
    }
    assert public - {"TYPE_CHECKING", "import_module"} <= set(loratool.__all__)


def test_every_public_name_exists_and_is_documented():
    for name in loratool.__all__:
        value = getattr(loratool, name)
        if name not in ("__version__", "hookimpl"):
            assert inspect.getdoc(value), name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(loratool, "no_such_verb")


def test_every_error_is_documented_and_has_an_exit_code():
    from loratool import errors

    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.LoratoolError)]
    assert len(classes) > 5
    for error in classes:
        assert error.__doc__
        assert error.__name__ in (errors.__doc__ or "") + "LoratoolError"
        assert error.exit_code in (2, 3, 4, 5, 6, 7)


def test_every_hook_is_documented_in_the_plugin_guide():
    from pathlib import Path

    from loratool import hookspecs

    guide = (Path(__file__).parents[1] / "docs/plugins.md").read_text()
    hooks = [name for name, value in vars(hookspecs).items() if getattr(value, "loratool_spec", None) is not None]
    assert len(hooks) == 4
    for hook in hooks:
        assert f"### `{hook}" in guide, hook
