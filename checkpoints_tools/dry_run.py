"""What a conversion would do, tensor by tensor, and whether there is room."""

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints_tools.conversion import Request, lay_out, left_out, tensor_bytes
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import Region
from megalemur.model.names import hf_shapes


def show(console: Console, weights: Weights, source: Opened, request: Request) -> None:
    """Print the table; writes nothing."""
    layout, shapes, sizes = lay_out(weights, source, request), hf_shapes(weights.model), tensor_bytes(weights)
    table = Table(title=f"{source.path} ({source.format}) to {request.destination} ({layout.format})")
    for title in ("tensor", "from", "to", "shape", "dtype"):
        table.add_column(title, overflow="fold")
    table.add_column("MB", justify="right")
    for unit in layout.units:
        for key in unit:
            old, new = _dtype(source.dtypes.get(key)), _dtype(weights.dtypes[key])
            table.add_row(
                key.name if key.kind == "weight" else f"{key.name} ({key.kind})",
                _places(list(source.regions.get(key, ()))),
                _places(list(layout.regions[key])),
                " x ".join(map(str, shapes[key.name])),
                new if old == new else f"{old} to {new}",
                f"{sizes[key] / 1e6:,.2f}",
            )
    console.print(table)
    wanted = sum(layout.sizes.values()) + sum(map(len, layout.small_files.values()))
    free = shutil.disk_usage(_there(request.destination)).free
    files = len(layout.sizes) + len(layout.small_files)
    left = left_out(source, layout)
    if left:
        console.print(f"the optimizer's state ({', '.join(left)}) is not taken along", highlight=False)
    console.print(
        f"{wanted / 1e9:,.2f} GB in {files} files; {free / 1e9:,.1f} GB are free"
        + ("" if wanted < free else ": too little"),
        highlight=False,
    )


def _places(regions: list[Region]) -> str:
    files = dict.fromkeys(region.file for region in regions)
    shown = ", ".join(list(files)[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")
    return shown + (f" ({len(regions)} parts)" if len(regions) > len(files) else "")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _there(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())
