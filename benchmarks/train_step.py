"""A training step of megalemur, of a bare megatron-core loop on the same layers, and of transformers, in turns.

    python benchmarks/train_step.py                 # a small model, on CPU: megalemur's overhead over the bare loop
    python benchmarks/train_step.py --width 70b     # two layers of Llama-2-70B at 4096 tokens, on a GPU

Prints medians over the rounds, and the ratio megalemur / bare round by round: machines drift, pairs do not.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megalemur.config.load import parse_run
from megalemur.config.run import RunConfig
from megalemur.data.writer import IndexedWriter
from megalemur.observe.throughput import flops_per_token, known_peak_teraflops, utilisation
from megalemur.parallel.groups import join, leave
from megalemur.train.setup import Run, build_run
from megalemur.train.step import train_step

WIDTHS = {
    "small": "{num_layers: 4, hidden_size: 256, ffn_hidden_size: 688, num_attention_heads: 8, num_query_groups: 4, "
    "vocab_size: 4096, max_position_embeddings: 512}",
    "70b": "{preset: llama2_70b, num_layers: LAYERS}",
}


def run_config(directory: Path, width: str, layers: int) -> RunConfig:
    """The run that all three train."""
    length, batch, dtype = (256, 4, "fp32") if width == "small" else (4096, 2, "bf16")
    model = WIDTHS[width].replace("LAYERS", str(layers))
    vocab = 4096 if width == "small" else 32000
    with IndexedWriter(directory / "data", vocab_size=vocab) as writer:
        writer.add(np.random.default_rng(0).integers(0, vocab, 64 * length))
        writer.commit()
    return parse_run(f"""
run: {{name: bench, steps: 100000}}
model: {model}
precision: {{dtype: {dtype}}}
optim: {{learning_rate: 1e-5}}
data: {{sequence_length: {length}, micro_batch_size: 1, global_batch_size: {batch},
        sources: [{{name: a, path: {directory}/data}}]}}
checkpoint: {{directory: {directory}/none}}
log: {{directory: {directory}/log}}
""")


def megalemur_step(run: Run) -> Callable[[], None]:
    """One step as the loop takes it: batches, schedule, guard, update."""

    def step() -> None:
        batches = run.data.training.micro_batches(run.state.samples, run.portion)
        train_step(run.engine, batches, 1e-5)
        run.state.samples += run.config.data.global_batch_size

    return step


def bare_step(config: RunConfig) -> Callable[[], None]:
    """One step of megatron-core alone: the same layers, seam and kernels, its own optimizer step, one fixed batch."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megalemur.model.llama import build_chunks
    from megalemur.optim.adamw import make_adamw, set_moments_to_zero

    (chunk,) = build_chunks(config.model, config.parallel, config.precision)
    chunk.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(chunk.config, settings, chunk)
    bf16 = config.precision.dtype == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-5,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:  # the same kernel: otherwise two optimizers would be compared
        groups = part.optimizer.param_groups
        part.optimizer = make_adamw("fused_adamw", groups, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        set_moments_to_zero(part.optimizer)
    data = config.data
    device = next(chunk.parameters()).device
    window = torch.randint(0, config.model.vocab_size, (data.micro_batch_size, data.sequence_length + 1), device=device)
    tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    positions = torch.arange(data.sequence_length, device=device)[None]

    def loss(losses: torch.Tensor):
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=device), {"loss": total.detach()}

    def forward(_, chunk):
        return chunk(tokens, positions, None, labels=labels), loss

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=model,
            num_microbatches=config.micro_batches,
            seq_length=data.sequence_length,
            micro_batch_size=data.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()

    return step


def transformers_step(config: RunConfig) -> Callable[[], None]:
    """One step of transformers' Llama with torch's fused AdamW, gradients added up over the micro-batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, data = config.model, config.data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            max_position_embeddings=shape.max_position_embeddings,
        )
    ).to(device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    window = torch.randint(0, shape.vocab_size, (data.micro_batch_size, data.sequence_length), device=device)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(config.micro_batches):
            (model(window, labels=window).loss / config.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds_of(step: Callable[[], None], steps: int) -> float:
    """Seconds a step over a few of them."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def measure(contestants: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each, round by round; who goes first alternates."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        seconds_of(step, 2)
    for number in range(rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            times[name].append(seconds_of(contestants[name], steps))
    return times


def report(config: RunConfig, times: dict[str, list[float]]) -> None:
    """Print medians and the paired ratio."""
    gpu = torch.cuda.is_available()
    peak = known_peak_teraflops(torch.cuda.get_device_name()) if gpu else None
    flops = flops_per_token(config.model, config.data.sequence_length)
    table = Table(title=f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}")
    for column in ("", "ms a step", "tokens/s", "MFU full attention", "MFU causal"):
        table.add_column(column)
    for name, seconds in times.items():
        rate = config.tokens_per_step / statistics.median(seconds)
        shares = [
            f"{utilisation(rate, per_token, devices=1, peak_teraflops=peak):.1%}" if peak else "no known peak"
            for per_token in (flops.full_attention, flops.causal_attention)
        ]
        table.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", f"{rate:,.0f}", *shares)
    ratios = [ours / bare for ours, bare in zip(times["megalemur"], times["bare megatron-core"], strict=True)]
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    console = Console()
    console.print(table)
    console.print(
        f"megalemur / bare megatron-core, {len(ratios)} pairs: median {statistics.median(ratios):.3f}, "
        f"quartiles {' to '.join(f'{q:.3f}' for q in statistics.quantiles(ratios, n=4)[::2])} (bar: 1.02)"
    )
    console.print(f"peak memory of the process with all of them: {memory / 2**30:.2f} GiB")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=sorted(WIDTHS), default="small")
    parser.add_argument("--layers", type=int, default=2, help="layers at the width of Llama-2-70B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = run_config(Path(scratch), args.width, args.layers)
        run = build_run(config, join(config.parallel, timeout_seconds=600))
        contestants = {
            "megalemur": megalemur_step(run),
            "bare megatron-core": bare_step(config),
            "transformers": transformers_step(config),
        }
        report(config, measure(contestants, args.rounds, args.steps))
        leave()


if __name__ == "__main__":
    main()
