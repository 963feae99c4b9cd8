"""Every import of our own code finds what it names, inside functions and in tests too, where only a run would tell."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPS = {"megalemur": ROOT / "src", **dict.fromkeys(("tests", "data_prep", "checkpoints_tools", "benchmarks"), ROOT)}
FILES = [
    file
    for top in ("src", "tests", "data_prep", "checkpoints_tools", "benchmarks")
    for file in (ROOT / top).rglob("*.py")
]


def file_of(module: str) -> Path | None:
    path = TOPS[module.split(".")[0]] / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def names_of(file: Path) -> frozenset[str]:
    """Everything that is assigned, defined or imported anywhere in the file: more than it has, never less."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return frozenset(found)


def is_there(module: str, name: str | None = None) -> bool:
    """Whether the module exists, and the name in it."""
    file = file_of(module)
    if name is None or (file and name in names_of(file)) or file_of(f"{module}.{name}"):
        return file is not None or (TOPS[module.split(".")[0]] / module.replace(".", "/")).is_dir()
    return (TOPS[module.split(".")[0]] / module.replace(".", "/") / name).is_dir()


def lost_imports(text: str, path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in TOPS:
            wanted = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names if alias.name.split(".")[0] in TOPS]
        else:
            continue
        yield from (f"{path}:{node.lineno}: {m}.{n or ''} is not there" for m, n in wanted if not is_there(m, n))


def test_what_is_imported_is_there():
    lost = [one for file in FILES for one in lost_imports(file.read_text(), str(file.relative_to(ROOT)))]
    assert not lost, "\n".join(lost)
    assert len(FILES) > 200


@pytest.mark.parametrize(
    "line",
    [
        "def f():\n    from tests.unit.test_imports import no_such_name",
        "from megalemur.no_such_room import anything",
        "import megalemur.config.no_such_file",
        "from tests.no_such_folder import anything",
    ],
)
def test_an_import_of_nothing_is_found(line):
    assert list(lost_imports(line, "here"))
    assert not list(lost_imports("from tests.unit.test_imports import lost_imports, FILES", "here"))
