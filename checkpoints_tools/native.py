"""Our own checkpoints (docs/checkpoint-format.md): weights in Hugging Face files, the trainer's state in rank files.

Of another checkpoint of ours the trainer's part is taken along; of anything else there is none, and the manifest says
what it says of a checkpoint whose trainer's part was dropped: weights to start a new run from.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints_tools import hf
from checkpoints_tools.draft import replace_file
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.layout import Frame, Layout, Options, Written
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import WEIGHT, Key, Region, contiguous
from megalemur.checkpoint import disk
from megalemur.checkpoint.digests import entry_of
from megalemur.checkpoint.manifest import (
    MANIFEST,
    STATE,
    TRAINER,
    Manifest,
    Stored,
    dump_manifest,
    rank_file,
    tensor_key,
    without_trainer,
)
from megalemur.checkpoint.opening import TENSORS, OpenedCheckpoint, open_checkpoint
from megalemur.checkpoint.read import HuggingFaceReader
from megalemur.checkpoint.tensor_file import TensorSpec, header_bytes, offsets
from megalemur.model.hf_config import CARRIED_FILES, CONFIG_FILE, parse_hf_config
from megalemur.model.names import hf_shapes
from megalemur.parallel.boxes import whole

NAME = "megalemur"
_RUN = "run.yaml"


def recognises(path: Path) -> bool:
    """Whether the directory has a manifest."""
    return (path / MANIFEST).exists()


def open_native(path: Path) -> Opened:
    """A checkpoint; every byte that is read of it is compared with the manifest.

    Raises:
        ConversionError, DamagedCheckpoint: its manifest does not verify, or its files are not what it says.
    """
    checkpoint = open_checkpoint(path)
    try:
        config = parse_hf_config(checkpoint.file(CONFIG_FILE), path / CONFIG_FILE)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    reader = HuggingFaceReader(path)
    hf.refuse_dtypes(reader)
    manifest = checkpoint.manifest
    small = [name for name in (*CARRIED_FILES, _RUN, STATE) if name in manifest.files]
    return Opened(
        NAME,
        path,
        config.model,
        {**hf.regions_of(path, reader.stored_files()), **_trainer_regions(checkpoint)},
        follow_links=False,
        entries={name: entry for name, entry in manifest.files.items() if name.endswith(TENSORS)},
        config=config.original,
        small_files={name: checkpoint.file(name) for name in small},
        facts={"step": manifest.step, "record": dict(manifest.record)},
        notes=["the trainer's part was dropped"] if manifest.dropped else [],
    )


def _trainer_regions(checkpoint: OpenedCheckpoint) -> dict[Key, list[Region]]:
    return {
        Key(kind, name): [contiguous(part.box, part.file, part.offset, torch.float32) for part in found]
        for kind, tensors in checkpoint.manifest.state.items()
        for name, found in tensors.items()
    }


def lay_out(weights: Weights, source: Opened, options: Options) -> Layout:
    """The same model, and its trainer's part where the source has one, as a checkpoint of ours."""
    plain = hf.lay_out(weights, source, options)
    kinds = sorted({key.kind for key in weights.dtypes} - {WEIGHT})
    files = _rank_files(weights, kinds, options.max_shard_bytes) if kinds else {}
    state = {key: region for found in files.values() for key, region in found.items()}
    small = dict(plain.small_files)
    if kinds:  # a run goes on from it
        small |= {name: source.small_files[name] for name in (_RUN, STATE)}
    headers = {name: header_bytes(_specs(found)) for name, found in files.items()}

    def finish(directory: Path, written: Written) -> None:
        manifest = Manifest(
            step=int(source.facts.get("step") or 0),
            record=dict(source.facts.get("record") or {}),
            files={**written.entries, **{name: entry_of(data) for name, data in small.items()}},
            shapes=hf_shapes(weights.model),
            state=_stored(state),
        )
        disk.make_directories(directory / TRAINER)
        replace_file(directory / MANIFEST, dump_manifest(manifest if kinds else without_trainer(manifest)))

    return replace(
        plain,
        format=NAME,
        regions={**plain.regions, **{key: [region] for key, region in state.items()}},
        sizes={**plain.sizes, **{name: max(r.stop for r in found.values()) for name, found in files.items()}},
        units=[*plain.units, *(list(found) for found in files.values())],
        frames={**plain.frames, **{name: [Frame(0, header)] for name, header in headers.items()}},
        small_files=small,
        finish=finish,
    )


def _rank_files(weights: Weights, kinds: list[str], max_bytes: int) -> dict[str, dict[Key, Region]]:
    """File to what lies in it; a tensor's master and moments lie in one file."""
    groups: list[list[Key]] = [[]]
    size = 0
    for name, shape in hf_shapes(weights.model).items():
        wanted = torch.Size(shape).numel() * 4 * len(kinds)
        if groups[-1] and size + wanted > max_bytes:
            groups.append([])
            size = 0
        groups[-1] += [Key(kind, name) for kind in kinds]
        size += wanted
    shapes, found = hf_shapes(weights.model), {}
    for rank, group in enumerate(groups):
        specs = {_tensor_name(key, shapes): TensorSpec(shapes[key.name], torch.float32) for key in group}
        at, file = offsets(specs), rank_file(rank)
        found[file] = {
            key: contiguous(whole(shapes[key.name]), file, at[_tensor_name(key, shapes)], torch.float32)
            for key in group
        }
    return found


def _tensor_name(key: Key, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return tensor_key(key.name, key.kind, whole(shapes[key.name]))


def _specs(found: Mapping[Key, Region]) -> dict[str, TensorSpec]:
    return {
        tensor_key(key.name, key.kind, region.box): TensorSpec(region.box.shape, torch.float32)
        for key, region in found.items()
    }


def _stored(state: Mapping[Key, Region]) -> dict[str, dict[str, tuple[Stored, ...]]]:
    found: dict[str, dict[str, tuple[Stored, ...]]] = {}
    for key, region in state.items():
        found.setdefault(key.kind, {})[key.name] = (Stored(region.box, region.file, region.offset),)
    return found
