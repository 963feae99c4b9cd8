"""Saves, loads and resumes a small run while the interpreter tells of everything that could run code. A script:

    python -m tests.support.audited DIRECTORY

Prints one JSON line: what was seen while the run did its work, and what was seen of two deliberate offences after it.
RANK and WORLD_SIZE may be set, as for any rank.
"""

import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

_ALWAYS = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "code.__new__",
)


class Watcher:
    """An audit hook that can be switched on; it can never be taken away again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _ALWAYS:
            self.seen.append(f"{event} {args[:2]}")
        elif event in ("exec", "compile"):
            # a module that is imported late is executed too; text that was read or made up has no file
            name = args[0].co_filename if event == "exec" else args[1]
            if event == "exec" or args[0] is not None:
                file = name.decode() if isinstance(name, bytes) else str(name)
                if not (file.startswith("<frozen") or os.path.isfile(file)):
                    self.seen.append(f"{event} {file}")


def do_everything(directory: Path, world: int, name: str) -> None:
    """Start from Hugging Face files, save, resume, go back, look inside, start from the masters."""
    from megalemur.train.saving import save_run
    from megalemur.train.setup import restore
    from tests.support.tiny import tiny_run
    from tests.support.training import start, take_steps, whole_state

    def config(*more: str, start_from: Path | None = None) -> Any:
        layout = f"parallel.tensor={world}"
        return tiny_run(directory, layout, *more, start_from=start_from, num_layers=2)

    here = f"checkpoint.directory={directory}/{name}"
    run = start(config(here, start_from=directory / "hf"))
    take_steps(run, 2)
    path = save_run(run)
    again = start(config(here))
    assert again.state.step == 2
    take_steps(again, 3)
    restore(again)
    take_steps(again, 4)
    save_run(again)
    assert whole_state(path)
    more = (f"checkpoint.directory={directory}/{name}-new", "checkpoint.load=weights")
    assert start(config(*more, start_from=path)).state.step == 0


def main() -> None:
    """Warm up, watch, offend, print."""
    warnings.filterwarnings("ignore")
    directory, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    watcher = Watcher()
    do_everything(directory, world, "first")  # what torch imports and makes up when it is first used is over then
    watcher.on = True
    do_everything(directory, world, "second")
    during, watcher.seen = watcher.seen, []
    pickle.loads(pickle.dumps(Path("x")))
    eval("1 + 1")
    watcher.on = False
    sys.stdout.write(json.dumps({"during": during, "offences": watcher.seen}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # groups need no farewell


if __name__ == "__main__":
    main()
