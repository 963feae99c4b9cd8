"""What the source itself says: imports, sizes and calls, read with `ast` and never run."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ENTRIES = ("train", "plan", "generate", "quickstart")
STRANGERS = ("model", "data", "optim", "checkpoint")
BELOW = ("parallel", "observe", "supervise", "config")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cli": (*ENTRIES, *STRANGERS, *BELOW),
    **{room: (*STRANGERS, *BELOW) for room in ENTRIES},
    # its dry run runs the step that training runs
    "plan": ("train", *STRANGERS, *BELOW),
    # it proves what was trained by loading it as any reader would
    "quickstart": ("generate", *STRANGERS, *BELOW),
    **{room: BELOW for room in STRANGERS},
    "parallel": ("config",),
    "observe": ("config",),
    "supervise": ("config",),
    "config": (),
    "data_prep": ("config", "data"),
    "checkpoints_tools": ("config", "checkpoint", "model", "parallel"),
}
"""Room to the other rooms of megalemur that it may import."""

OWNERS: dict[str, tuple[str, ...]] = {
    "parallel_state": ("parallel",),
    "tensor_parallel.random": ("parallel",),
    "models": ("model",),
    "transformer": ("model",),
    "tensor_parallel": ("model",),
    "extensions": ("model",),
    "inference": ("model",),
    "optimizer": ("optim",),
    "distributed": ("optim",),
    "pipeline_parallel": ("train",),
    "packed_seq_params": ("model", "train"),
    "dist_checkpointing": ("checkpoints_tools",),
}
"""Part of megatron.core to its owners; of several that fit the longest counts. Every other part is nobody's."""

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_PARAMETERS = 60, 500, 8
VAGUE_NAMES = ("utils", "util", "helpers", "helper", "common", "misc", "manager")


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


class Source(NamedTuple):
    """One file: the room that it belongs to, its path for messages, and its text."""

    room: str
    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.text)


def sources(root: Path) -> list[Source]:
    """Every module of megalemur and of the tools beside it."""
    found = []
    for top in ("src/megalemur", "data_prep", "checkpoints_tools"):
        for file in sorted((root / top).rglob("*.py")):
            inside = file.relative_to(root / top).parts
            room = (inside[0] if len(inside) > 1 else "megalemur") if top == "src/megalemur" else top
            found.append(Source(room, str(file.relative_to(root)), file.read_text()))
    return found


def imported(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported, at any depth; `from a import b` counts as a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def wrong_rooms(source: Source) -> Iterator[str]:
    """Imports against the order of the rooms, of the tools, or relative ones (which would hide from this check)."""
    for line, name in imported(source):
        here, parts = f"{source.path}:{line}: {source.room} imports {name}", name.split(".")
        if name.startswith("."):
            yield f"{here}: imports are absolute"
        elif parts[0] in ("data_prep", "checkpoints_tools") and parts[0] != source.room:
            yield f"{here}: nobody imports the tools"
        elif parts[0] == "megalemur" and len(parts) > 1:
            room = parts[1]
            if room not in MAY_IMPORT:
                continue  # a name of the package itself, such as __version__
            if room != source.room and room not in MAY_IMPORT.get(source.room, ()):
                yield here


def wrong_owners(source: Source) -> Iterator[str]:
    """Imports of megatron outside the room that owns the part, and of torch or megatron in config."""
    for line, name in imported(source):
        here, parts = f"{source.path}:{line}: {source.room} imports {name}", name.split(".")
        if source.room in ("config", "supervise") and parts[0] in ("torch", "megatron", "transformer_engine"):
            yield f"{here}: config is read where there is no torch, and a supervisor stays small"
        elif name.startswith(("megatron.training", "megatron.legacy")):
            yield f"{here}: it reads global arguments"
        elif name.startswith("megatron.core."):
            part = ".".join(parts[2:])
            fitting = [owned for owned in OWNERS if f"{part}.".startswith(f"{owned}.")]
            owners = OWNERS[max(fitting, key=len)] if fitting else ()
            if source.room not in owners:
                yield f"{here}: owned by {' and '.join(owners) or 'nobody yet'}"
        elif parts[0] == "megatron" and name not in ("megatron.core", "megatron"):
            yield here


def _functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def _is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer makes a command of it: its parameters are the command's options, and most of its lines."""
    return any(ast.unparse(decorator).endswith(".command()") for decorator in function.decorator_list)


def many_parameters(source: Source, limit: int) -> Iterator[str]:
    """Functions with more than `limit` parameters, self not counted; commands have as many as they have options."""
    for function in _functions(source):
        if _is_command(function):
            continue
        count = len(_parameters(function))
        if count > limit:
            yield f"{source.path}:{function.lineno}: {function.name} has {count} parameters"


def oversized(source: Source) -> Iterator[str]:
    """Files and functions that are too long, and functions that ask for too much."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path}: {lines} lines"
    for function in _functions(source):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES and not _is_command(function):
            yield f"{source.path}:{function.lineno}: {function.name} has {length} lines"
    yield from many_parameters(source, MAX_PARAMETERS)


def badly_named(source: Source) -> Iterator[str]:
    """Files whose name says nothing, or hides a module of the standard library where they are run by path."""
    name = Path(source.path).stem
    if name in VAGUE_NAMES:
        yield f"{source.path}: the name says nothing"
    if name in sys.stdlib_module_names and name != "__init__":
        yield f"{source.path}: hides the standard library's {name} where it is run by path"


def undocumented(source: Source) -> Iterator[str]:
    """Modules that do not say what they own."""
    if not ast.get_docstring(source.tree):
        yield f"{source.path}: opens without a docstring"
