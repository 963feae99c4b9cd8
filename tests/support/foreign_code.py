"""Ways in which a file that is read, a message or a setting could run code, found in the source with `ast`."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.architecture import Source, imported

PICKLES = ("pickle", "_pickle", "cPickle", "pickle5", "dill", "cloudpickle", "joblib", "shelve", "marshal", "dbm")
"""Modules whose loaders run what they read."""
LIBRARIES_THAT_SPREAD_PICKLES = ("multiprocessing", "torch.multiprocessing")
"""Their queues and connections unpickle what arrives."""
CALLS = (
    "torch.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.hub.load",
    "numpy.lib.format.open_memmap",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "runpy.run_path",
    "runpy.run_module",
    "importlib.util.spec_from_file_location",
    "yaml.load",
    "yaml.load_all",
    "yaml.safe_load",
    "yaml.safe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
)
"""By the name under which they are defined, whatever they are imported as."""
BUILTINS = ("eval", "exec", "compile", "__import__", "execfile")
OBJECT_COLLECTIVES = (
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)
"""torch.distributed pickles what these carry."""

_STRICT_YAML = ("src/megalemur/config/load.py", "_StrictLoader")
_OWN_PROCESSES = "between a process and those that it forked itself, through pipes that nobody else holds"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "src/megalemur/observe/doctor.py": {"import_module": "imports what a table in that file names"},
    "checkpoints_tools/foreign/pickles.py": {"pickle": "writes those of other programs; none is loaded"},
    "data_prep/workers.py": {"multiprocessing": _OWN_PROCESSES},
    "benchmarks/data_prep.py": {"multiprocessing": "the pool that is measured against"},
    "benchmarks/replica_check.py": {"multiprocessing": _OWN_PROCESSES},
    "tests/faults/campaign.py": {"import_module": "the campaigns that its table names"},
    "tests/support/launched.py": {"import_module": "the function that a test names"},
    "tests/unit/checkpoints_tools/test_foreign.py": {"torch.load": "reads what that test wrote, as torch's users do"},
    "tests/unit/checkpoints_tools/test_meta.py": {"torch.load": "reads what that test wrote, to change it"},
    "tests/unit/config/test_resume.py": {"yaml.safe_load": "reads values that are written in that test"},
    "tests/support/rank_files.py": {"torch.load": "as Megatron-LM loads what the tests have written"},
    "tests/support/ranks.py": {"pickle": _OWN_PROCESSES, "multiprocessing": _OWN_PROCESSES},
    "tests/unit/test_ranks.py": {"multiprocessing": _OWN_PROCESSES},
    "tests/support/megatron.py": {"multiprocessing": "tells megatron-core's writer that this rank may have children"},
    "tests/support/malice.py": {word: "makes the pickles that must not be opened" for word in ("pickle", "os.system")},
    "tests/support/audited.py": {word: "shows that the watcher sees it" for word in ("pickle", "eval")},
    "tests/unit/config/test_checks.py": {"yaml.safe_load": "reads values that are written in that test"},
}
"""File to the words that it may use, each with the reason. Nothing else may."""


def all_sources(root: Path) -> list[Source]:
    """Every Python file of the project: the package, the tools, the tests, the benchmarks."""
    tops = ("src", "data_prep", "checkpoints_tools", "launch", "benchmarks", "tests")
    files = [root / "setup.py", *(file for top in tops for file in sorted((root / top).rglob("*.py")))]
    return [Source("", str(file.relative_to(root)), file.read_text()) for file in files]


def running_what_it_reads(source: Source) -> Iterator[str]:
    """Each way that is not excepted, with its line."""
    allowed = EXCEPTIONS.get(source.path, {})
    for line, what in _found(source):
        if what not in allowed:
            yield f"{source.path}:{line}: {what}"


def unused_exceptions(root: Path) -> list[str]:
    """Exceptions whose file no longer needs them."""
    known = {source.path: {what for _, what in _found(source)} for source in all_sources(root)}
    return [
        f"{path}: {what}" for path, words in EXCEPTIONS.items() for what in words if what not in known.get(path, ())
    ]


def _found(source: Source) -> Iterator[tuple[int, str]]:
    tree, aliases = source.tree, _aliases(source.tree)
    for line, name in imported(source):
        for module in (*PICKLES, *LIBRARIES_THAT_SPREAD_PICKLES):
            if f"{name}.".startswith(f"{module}."):
                yield line, module.split(".")[-1]
        if name in CALLS:
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _wrong_call(source, node, aliases))
        # named without being called counts too: it could be called under another name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
            yield node.lineno, node.id
        if isinstance(node, ast.Attribute):
            name = _full_name(node, aliases)
            if name in CALLS and not _loads_strictly(source, tree, node):
                yield node.lineno, name
            if node.attr in OBJECT_COLLECTIVES:
                yield node.lineno, node.attr


def _wrong_call(source: Source, call: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    for keyword in call.keywords:
        said_no = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not said_no:
            yield keyword.arg
    name = _full_name(call.func, aliases)
    if name == "getattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        word = call.args[1].value
        if word in BUILTINS or f"{_full_name(call.args[0], aliases)}.{word}" in CALLS:
            yield f"getattr {word}"
    if name.endswith("import_module") and call.args and not isinstance(call.args[0], ast.Constant):
        yield "import_module"
    if name.split(".")[-1] in OBJECT_COLLECTIVES and isinstance(call.func, ast.Name):
        yield name.split(".")[-1]


def _loads_strictly(source: Source, tree: ast.Module, attribute: ast.Attribute) -> bool:
    """Whether this is the one place where YAML is read, with the loader that knows no tags and no aliases."""
    path, loader = _STRICT_YAML
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func is attribute]
    return (
        source.path == path
        and attribute.attr == "load"
        and all(len(call.args) == 2 and ast.unparse(call.args[1]) == loader for call in calls)
        and bool(calls)
    )


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local name to what it was imported as."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id).removeprefix("builtins.") if isinstance(node, ast.Name) else "?"
