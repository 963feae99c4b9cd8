"""AdamW in one kernel a group: torch's fused step on CPU and CUDA, moments a parameter, one step count a group."""

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) through torch._fused_adamw_, without Apex or Transformer Engine.

    The state layout is that of the fused Adams: exp_avg and exp_avg_sq a parameter, `step` a group. A subclass of
    torch.optim.AdamW because megatron-core's distributed optimizer asks for one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; all of them fp32."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not parameters:
                continue
            states = [self.state[p] for p in parameters]
            count = torch.tensor(float(group["step"]), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [count] * len(parameters),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


_CLASSES: dict[str, type[torch.optim.AdamW]] = {"fused_adamw": FusedAdamW, "adamw": torch.optim.AdamW}


def class_name(kind: str) -> str:
    """Name of the optimizer class of a kind, as checkpoints record it."""
    return _CLASSES[kind].__name__


def make_adamw(kind: str, groups: list[dict[str, Any]], **defaults: Any) -> torch.optim.AdamW:
    """An AdamW of the given kind over existing parameter groups (their dicts are kept, so that others see changes).

    Args:
        kind: `fused_adamw` or `adamw`, as in the run file.
        groups: parameter groups of another optimizer.
        defaults: lr, betas, eps, weight_decay.
    """
    optimizer = _CLASSES[kind]([torch.nn.Parameter(torch.zeros(1))], **defaults)
    for group in groups:
        group.update(optimizer.defaults)  # the groups carry the other optimizer's betas and eps
    optimizer.param_groups = groups
    optimizer.state.clear()
    return optimizer


def set_moments_to_zero(optimizer: torch.optim.AdamW) -> None:
    """Create the moments before the first step, so that a checkpoint can be loaded into them or written from them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["exp_avg"] = torch.zeros_like(parameter.data)
            state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    set_step_count(optimizer, 0)


def set_step_count(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Tell the bias correction how many updates were made."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, FusedAdamW):
            group["step"] = steps
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = torch.tensor(float(steps))
