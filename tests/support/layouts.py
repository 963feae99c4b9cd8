"""A converter without an engine: opens a safetensors file as regions, writes a layout in the plainest way there is."""

import zlib
from pathlib import Path

import torch

from checkpoints_tools.layout import Layout, Stretch, Written
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import WEIGHT, Key, contiguous
from megalemur.checkpoint.tensor_file import DTYPES
from megalemur.checkpoint.tensor_header import read_header
from megalemur.model.hf_config import read_hf_config
from megalemur.model.names import hf_shapes
from megalemur.parallel.boxes import whole

FILE = "model.safetensors"


def open_llama(directory: Path) -> Opened:
    """A Hugging Face directory with one file, as transformers saves a small model."""
    entries = read_header(directory / FILE).tensors
    config = read_hf_config(directory)
    regions = {
        Key(WEIGHT, name): [contiguous(whole(entry.shape), FILE, entry.start, DTYPES[entry.dtype])]
        for name, entry in entries.items()
    }
    return Opened(format="hf", path=directory, model=config.model, regions=regions, config=config.original)


def write_layout(layout: Layout, weights: Weights, directory: Path) -> Path:
    """Every tensor whole, unit after unit; then what the layout adds at its end."""
    directory.mkdir()
    for file, size in layout.sizes.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            handle.truncate(size)
            for frame in layout.frames.get(file, ()):
                handle.seek(frame.offset)
                handle.write(frame.data)
    stretches: dict[str, list[Stretch]] = {file: [] for file in layout.sizes}
    for unit in layout.units:
        for key in unit:
            tensor = weights.read(key, 0, hf_shapes(weights.model)[key.name][0])
            for region in layout.regions[key]:
                part = tensor[region.box.slices].contiguous().to(region.dtype)
                data = part.view(-1).view(torch.uint8).numpy().tobytes()
                with open(directory / region.file, "r+b") as handle:
                    handle.seek(region.offset)
                    handle.write(data)
                stretches[region.file].append(Stretch(region.offset, len(data), zlib.crc32(data)))
    for file, data in layout.small_files.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    ordered = {file: sorted(found) for file, found in stretches.items()}
    layout.finish(directory, Written(stretches=ordered))
    return directory


def read_all(opened: Weights, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
    """Every tensor of a kind, whole, by its Hugging Face name."""
    shapes = hf_shapes(opened.model)
    return {key.name: opened.read(key, 0, shapes[key.name][0]) for key in opened.dtypes if key.kind == kind}
