"""The house rule: a module imports only floors below its own, and packages on one floor do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ("errors", "dtypes", "patterns", "native", "expressions", "layouts", "strictjson", "fieldtypes"),
    (
        *("encodings", "tensors", "deltas", "adapter", "factors", "layers", "readings", "architecture", "combining"),
        *("plan", "hookspecs", "ledger"),
    ),
    ("algebra",),
    ("methods",),
    ("formats", "storage"),
    ("operations", "engine"),
    ("plugins", "discovery"),
    ("detection", "testing", "logits", "settings"),
    ("opening",),
    ("publishing",),
    ("api", "live", "initialising"),
    ("demo",),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
# Rooms on one floor that may build on each other (nouns; the engine is what runs what operations plan).
SIBLINGS = {room for floor in FLOORS[:2] for room in floor}
LIGHT = ("torch", "transformers", "huggingface_hub", "peft", "diffusers", "numpy", "rich")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "loratool").with_suffix("").parts
    return parts[0]


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """The modules that a file imports anywhere, or only those that importing it loads."""
    tree = ast.parse(path.read_text())
    found = set()
    nodes = list(ast.walk(tree))
    if module_level:
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [p for p in sources("loratool") if p != ROOT / "loratool/__init__.py"], ids=str)
def test_a_module_imports_only_lower_floors(path: Path):
    here = room(path)
    assert here in FLOOR, f"{here} stands on no floor: add it to the table and to the design"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "loratool" or parts[1].startswith("__"):
            continue
        there = parts[1]
        inside = there == here or (there in SIBLINGS and here in SIBLINGS and FLOOR[there] <= FLOOR[here])
        assert inside or FLOOR.get(there, -1) < FLOOR[here], f"{path.name} ({here}) imports {name}"


def test_the_nouns_have_no_import_cycle():
    files = {n: [ROOT / f"loratool/{n}.py", *sources(f"loratool/{n}")] for n in SIBLINGS}
    graph = {
        n: {i.split(".")[1] for path in paths if path.exists() for i in imports(path) if i.startswith("loratool.")}
        - {n}
        for n, paths in files.items()
    }
    while graph:
        leaves = {n for n, below in graph.items() if not below & graph.keys() - {n}}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {n: below for n, below in graph.items() if n not in leaves}


@pytest.mark.parametrize("path", sources("plugins/loratool_families"), ids=str)
def test_a_family_uses_public_names_and_its_siblings_only(path: Path):
    import loratool

    for name in imports(path):
        if name.startswith("loratool."):
            assert name.removeprefix("loratool.") in loratool.__all__, name
        elif name.startswith("loratool"):
            assert (ROOT / "plugins" / name.replace(".", "/")).parent.with_suffix(".py").is_file(), name


def test_nothing_imports_the_plugins():
    assert not [p for p in sources("loratool") if any(i.startswith("loratool_families") for i in imports(p))]


@pytest.mark.parametrize("path", sources("loratool"), ids=str)
def test_heavy_modules_are_imported_at_the_top_only_where_tensors_are(path: Path):
    heavy = {i.split(".")[0] for i in imports(path, module_level=True)} & set(LIGHT)
    tensors_here = room(path) == "algebra" or path.name in ("load.py", "torchfile.py")
    assert not heavy or (tensors_here and heavy <= {"torch"}), f"{path}: {heavy}"


@pytest.mark.parametrize("path", [p for p in sources("loratool") if p.name != "render.py"], ids=str)
def test_only_render_prints(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("print", "click.echo", "click.secho", "sys.stdout.write"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", [*sources("loratool"), *sources("plugins")], ids=str)
def test_files_and_functions_stay_small_enough_to_hold_in_mind(path: Path):
    text = path.read_text()
    limit = 150 if path.parent.name == "cli" and path.name not in ("render.py", "options.py") else 450
    assert text.count("\n") <= limit, f"{path} has {text.count(chr(10))} lines: cut where the idea ends"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{path}:{node.name} has {length} lines"


def test_no_room_is_called_utils():
    vague = {"utils", "helpers", "common", "core", "misc"}
    assert not [p for p in sources("loratool") if p.stem in vague]
