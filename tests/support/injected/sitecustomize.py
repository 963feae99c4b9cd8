"""Python imports this by itself where this folder is on PYTHONPATH: it lets a campaign reach into launched ranks.

Only a rank imports the training loop, so a supervisor stays as it is. What is done there: tests/support/injections.py.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _AfterImport(MetaPathFinder):
    """Steps in once, behind the import of the training loop."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, with a word of ours behind it."""
        if fullname != "megalemur.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            from tests.support.injections import install

            install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("MEGALEMUR_TEST_INJECTION"):
    sys.meta_path.insert(0, _AfterImport())
