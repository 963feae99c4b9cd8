"""Log lines of all ranks: one formatter that prefixes the coordinates, and the rank filter in the handler."""

import logging
import sys
import warnings

import rich
from rich.logging import RichHandler

_HANDLER = "megalemur"


def setup_logging(label: str, rank: int) -> None:
    """Log to the terminal or to stderr: everything from rank 0, warnings and worse from the others.

    Info is megalemur's own; libraries are heard from warnings on. May be called again: the newest coordinates count.

    Args:
        label: coordinates of this process, as `tp1 pp0 dp3`.
        rank: global.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.name == _HANDLER]:
        root.removeHandler(old)
    handler = _handler(rank)
    handler.name = _HANDLER
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(coordinate_formatter(label))
    root.addHandler(handler)
    logging.getLogger("megalemur").setLevel(logging.INFO)
    _silence_libraries()


def _silence_libraries() -> None:
    """What megatron-core calls of torch that torch would rather see called otherwise is no user's business."""
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf", category=UserWarning
    )


def coordinate_formatter(label: str) -> logging.Formatter:
    """`21:04:05 [tp1 pp0 dp3] WARNING megalemur.train.guard: …`."""
    prefix = label.replace("%", "%%")
    return logging.Formatter(f"%(asctime)s [{prefix}] %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")


def _handler(rank: int) -> logging.Handler:
    """rich's on rank 0's terminal, because the progress bar is there too; plain stderr everywhere else."""
    console = rich.get_console()
    if rank == 0 and console.is_terminal:
        return RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    return logging.StreamHandler(sys.stderr)
