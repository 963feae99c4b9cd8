"""What the ranks of the distributed tests do: each function runs in its own process."""

from pathlib import Path
from typing import Any

import torch

from megalemur.config.run import RunConfig
from megalemur.optim.schedule import learning_rate
from megalemur.parallel.groups import join
from megalemur.train.loop import advance
from megalemur.train.saving import save_run
from megalemur.train.setup import Run, build_run
from megalemur.train.step import train_step


def start(config: RunConfig) -> Run:
    """Join the groups and build the run."""
    return build_run(config, join(config.parallel, timeout_seconds=config.run.collective_timeout))


class Watching:
    """Keeps every report; does something after a step."""

    def __init__(self, then=lambda report: None):
        self.reports, self._then = [], then

    def after_step(self, report):
        self.reports.append(report)
        self._then(report)

    def at_save(self, step, path, seconds):
        pass

    def at_end(self):
        pass


def take_steps(run: Run, last_step: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step up to `last_step`."""
    results = []
    while run.state.step < last_step:
        rate = learning_rate(run.state.step, run.config.optim, run.config.schedule, run.config.run.steps)
        batches = run.data.training.micro_batches(run.state.samples, run.portion)
        result = train_step(run.engine, batches, rate)
        advance(run, result)
        results.append((result.loss, result.grad_norm))
    return results


def losses_and_norms(config: RunConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of a whole run."""
    return take_steps(start(config), config.run.steps)


def train_and_save(config: RunConfig) -> tuple[list[tuple[float, float]], Path]:
    """Train to config.last_step and save."""
    run = start(config)
    results = take_steps(run, config.last_step)
    return results, save_run(run)


def whole_state(path: Path) -> dict[str, torch.Tensor]:
    """Every master and moment of a checkpoint, whole, by `kind/name`."""
    from megalemur.checkpoint.read import CheckpointReader
    from megalemur.parallel.state import KINDS, whole

    reader = CheckpointReader(path)
    return {
        f"{kind}/{name}": reader.read(name, kind, whole(shape))
        for kind in KINDS
        for name, shape in reader.shapes.items()
    }


def logits_of(config: RunConfig, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [b, s, v] of `tokens` [b, s] in this layout; None on ranks without the last stage."""
    run = start(config)
    return forward_logits(run, tokens)


def forward_logits(run: Run, tokens: torch.Tensor) -> torch.Tensor | None:
    """The model's logits through megatron-core's own pipeline schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megalemur.model.logits import true_logits

    bare = [chunk.module for chunk in run.engine.chunks]

    here = tokens.to(run.place.device)

    def forward(_: Any, chunk: Any) -> Any:
        positions = torch.arange(tokens.shape[1], device=here.device)[None].expand_as(here)
        return chunk(here, positions, None), lambda out: (
            out.sum(),
            torch.tensor(1, dtype=torch.int, device=here.device),
            {"logits": true_logits(bare[-1], out).detach().cpu()},
        )

    several = len(bare) > 1
    for chunk in bare:
        chunk.eval()
    micro_batches = run.config.parallel.pipeline
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(()) for _ in bare] if several else iter(()),
        model=bare if several else bare[0],
        num_microbatches=micro_batches,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
    )
    return reports[0]["logits"] if reports else None
