"""megatron-core's optimizer wrapper with the AdamW that the run file names, and what it holds on this rank."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megalemur.config.optim import OptimConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig
from megalemur.optim.adamw import make_adamw, set_moments_to_zero, set_step_count
from megalemur.optim.gradients import gather_parameters
from megalemur.parallel.state import EXP_AVG, EXP_AVG_SQ, MASTER, Owned


class Optimizer:
    """The optimizer of this rank: prepare, ask for the norm, then apply or leave everything as it was."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
    ):
        bf16 = precision.dtype == "bf16"
        self._chunks, self._clip = list(chunks), optim.clip_grad_norm
        self._wrapper = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.learning_rate,
                weight_decay=optim.weight_decay,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                clip_grad=optim.clip_grad_norm,
                use_distributed_optimizer=parallel.distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            self._chunks,
            use_gloo_process_groups=False,
        )
        self._weight_decay = optim.weight_decay
        for part in self._parts:
            part.optimizer = make_adamw(
                optim.kind,
                part.optimizer.param_groups,
                lr=optim.learning_rate,
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                weight_decay=optim.weight_decay,
            )
            set_moments_to_zero(part.optimizer)

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        parts = getattr(self._wrapper, "chained_optimizers", [self._wrapper])
        return [part for part in parts if part.optimizer is not None]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._wrapper.zero_grad()

    def prepare(self) -> float:
        """Copy the reduced gradients to where the update reads them; their global norm, equal on all ranks."""
        self._wrapper.prepare_grads()
        return float(self._wrapper.get_grad_norm())

    def apply(self, learning_rate: float, grad_norm: float) -> None:
        """Clip and update. megatron-core writes only multipliers into the groups, so both are applied here: without
        that, norms and biases would be decayed too."""
        for group in self._groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)
        if self._clip > 0:
            for part in self._parts:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=self._clip, total_norm=grad_norm)
        self._wrapper.step_with_ready_grads()

    def owned(self) -> list[Owned]:
        """fp32 masters and moments that this rank holds, each with its place in a local parameter."""
        found = []
        for part in self._parts:
            for parameter, start, main in _masters(part):
                state = part.optimizer.state[main]
                tensors = {MASTER: main.data, EXP_AVG: state["exp_avg"], EXP_AVG_SQ: state["exp_avg_sq"]}
                found.append(Owned(parameter, start, start + main.numel(), tensors))
        return found

    def publish(self, updates: int) -> None:
        """After masters and moments were written from outside: cast to the parameters, gather, set the step count."""
        for part in self._parts:
            set_step_count(part.optimizer, updates)
            if isinstance(part, DistributedOptimizer | Float16OptimizerWithFloat16Params):
                part._copy_main_params_to_model_params()
        gather_parameters(self._chunks)


def _masters(part: MegatronOptimizer) -> list[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """(local parameter, first flat element owned, fp32 master) for everything this part updates."""
    if isinstance(part, DistributedOptimizer):
        found = []
        for parameter in part.model_param_group_index_map:  # parameters without an owned element are absent
            group, order = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][order]
            found.append((parameter, part._get_model_param_range_map(parameter)["param"].start, main))
        return found
    if isinstance(part, Float16OptimizerWithFloat16Params):
        halves = [p for group in part.float16_groups for p in group]
        mains = [p for group in part.fp32_from_float16_groups for p in group]
        singles = [p for group in part.fp32_from_fp32_groups for p in group]
        return [(p, 0, main) for p, main in zip(halves, mains, strict=True)] + [(p, 0, p) for p in singles]
    return [(p, 0, p) for group in part.optimizer.param_groups for p in group["params"]]
