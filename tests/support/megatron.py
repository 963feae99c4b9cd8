"""megatron-core's own saving and loading of torch_dist checkpoints: each function runs in its own process."""

import argparse
import multiprocessing
import queue
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalemur.config.run import RunConfig
from megalemur.parallel.state import Piece
from megalemur.train.setup import Run
from tests.support.training import forward_logits, start, take_steps


def _write_in_this_process() -> None:
    """megatron-core's writer forks its writers from this rank, and asks a server process of its own what they did; that
    server would outlive the rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # ranks are daemons, which may have no children
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    results: Any = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results


def _model_state(run: Run, metadata: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The chunks' sharded state, by the keys of Megatron-LM."""
    chunks = [chunk.module for chunk in run.engine.chunks]
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(prefix, metadata=dict(metadata))
        for name, chunk in zip(names, chunks, strict=True)
    }


def save_by_megatron(
    directory: Path,
    config: RunConfig,
    args: dict[str, Any] | None,
    metadata: dict[str, Any] | None = None,
    steps: int = 0,
    prefix: str = "",
) -> list[Piece]:
    """Train some steps from where `config` starts, and save as Megatron-LM does at step 10, with the optimizer if there
    were steps. This rank's part of the state, in Hugging Face coordinates."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    _write_in_this_process()
    run = start(config)
    take_steps(run, steps)
    model = _model_state(run, metadata or {}, prefix)
    state: dict[str, Any] = {"args": argparse.Namespace(**args) if args else None, "checkpoint_version": 3.0}
    state |= {"iteration": 10, **model}
    if steps:
        # without Transformer Engine megatron-core looks for the step where torch's AdamW keeps it, beside the moments
        for part in run.engine.optimizer._parts:
            for moments in part.optimizer.state.values():
                moments["step"] = torch.tensor(float(steps))
        groups = {"dp_cp_group": run.place.dp_cp_group}
        state["optimizer"] = run.engine.optimizer._wrapper.sharded_state_dict(
            model, metadata={**(metadata or {}), **groups}
        )
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(directory))
    return [replace(piece, tensor=piece.tensor.clone()) for piece in run.pieces()]


class Loaded(NamedTuple):
    """What a rank got."""

    logits: torch.Tensor | None
    compared: dict[str, int]
    """Hugging Face name: elements that equal the file's, bit for bit."""
    padding: float
    """Largest absolute value of a padding row."""


def load_by_megatron(
    directory: Path, config: RunConfig, expected: Path, tokens: torch.Tensor, also: tuple[str, ...] = ()
) -> Loaded:
    """Load with megatron-core, as strictly as it can, and compare every parameter with a safetensors file.

    Args:
        directory: the checkpoint.
        config: model and layout.
        expected: what the parameters must equal.
        tokens: for the logits, [b, s].
        also: keys of objects that are asked for besides.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.dist_checkpointing.validation import StrictHandling

    run = start(config)
    with torch.no_grad():
        for parameter in run.segments:
            parameter.fill_(float("nan"))
    wanted = {**_model_state(run, {}), **{key: ShardedObject(key, None, (1,), (0,)) for key in also}}
    loaded = dist_checkpointing.load(wanted, str(directory), strict=StrictHandling.RAISE_ALL)
    assert all(loaded[key] is None for key in also)
    for number, chunk in enumerate(run.engine.chunks):
        chunk.module.load_state_dict(loaded["model" if len(run.engine.chunks) == 1 else f"model{number}"])
    compared, padding = _compare(run, expected)
    return Loaded(forward_logits(run, tokens), compared, padding)


def _compare(run: Run, expected: Path) -> tuple[dict[str, int], float]:
    from safetensors.torch import load_file

    weights = load_file(expected)
    compared: dict[str, int] = {}
    padding = 0.0
    for parameter, segments in run.segments.items():
        rows = 0
        for segment in segments:
            here = parameter.detach()[segment.first_row : segment.first_row + segment.box.shape[0]]
            wanted = weights[segment.name][segment.box.slices]
            assert torch.equal(here, wanted), f"{segment.name} {segment.box}"
            compared[segment.name] = compared.get(segment.name, 0) + here.numel()
            rows = max(rows, segment.first_row + segment.box.shape[0])
        if rows < len(parameter):
            padding = max(padding, float(parameter.detach()[rows:].abs().max()))
    return compared, padding
