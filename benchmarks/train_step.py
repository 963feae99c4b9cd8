"""A training step of megalemur, of a bare megatron-core loop on the same layers, and of transformers, in turns.

    python benchmarks/train_step.py                 # a small model, on CPU: megalemur's overhead over the bare loop
    python benchmarks/train_step.py --width 70b     # two layers of Llama-2-70B at 4096 tokens, on a GPU

Prints medians over the rounds, and the ratio megalemur / bare round by round: machines drift, pairs do not. A pair is
two single steps in turns, so that many pairs fit into a minute; the median's confidence interval says how much they
settle. Peak memory is that of a process of its own for each.
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
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
from megalemur.parallel.groups import Place, join, leave
from megalemur.parallel.seeds import seed_step
from megalemur.train.setup import Run, build_run
from megalemur.train.step import train_step

NAMES = ("megalemur", "bare megatron-core", "transformers")
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


def contestant(name: str, config: RunConfig, place: Place) -> Callable[[], None]:
    """The step of one of NAMES, ready to be taken."""
    if name == "megalemur":
        return megalemur_step(build_run(config, place))
    return bare_step(config) if name == "bare megatron-core" else transformers_step(config)


def seconds_of(step: Callable[[], None]) -> float:
    """Seconds of one step, the device's work included."""
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each, round by round; who goes first alternates."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        for _ in range(3):
            step()
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_of(contestants[name]))
    return times


def peak_bytes(place: Place, step: Callable[[], None]) -> int:
    """Peak memory after a few steps: allocated on the GPU, or resident of this process."""
    for _ in range(3):
        step()
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_process(name: str, args: argparse.Namespace) -> int:
    """`peak_bytes` of one contestant in a process that holds no other."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--width",
        args.width,
        "--layers",
        str(args.layers),
        "--memory-of",
        name,
    ]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from the order statistics (binomial, normal approximation)."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = math.floor(len(values) / 2 - half), math.ceil(len(values) / 2 + half)
    return ordered[max(low - 1, 0)], ordered[min(high, len(values) - 1)]


def report(config: RunConfig, times: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print medians, memory and the paired ratio."""
    gpu = torch.cuda.is_available()
    peak = known_peak_teraflops(torch.cuda.get_device_name()) if gpu else None
    flops = flops_per_token(config.model, config.data.sequence_length)
    table = Table(title=f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}")
    for column in ("", "ms a step", "tokens/s", "MFU full attention", "MFU causal", "peak GiB"):
        table.add_column(column)
    for name, seconds in times.items():
        rate = config.tokens_per_step / statistics.median(seconds)
        shares = [
            f"{utilisation(rate, per_token, devices=1, peak_teraflops=peak):.1%}" if peak else "no known peak"
            for per_token in (flops.full_attention, flops.causal_attention)
        ]
        size = f"{memory[name] / 2**30:.2f}"
        table.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", f"{rate:,.0f}", *shares, size)
    ratios = [ours / bare for ours, bare in zip(times["megalemur"], times["bare megatron-core"], strict=True)]
    low, high = median_interval(ratios)
    console = Console()
    console.print(table)
    console.print(
        f"megalemur / bare megatron-core, {len(ratios)} pairs: median {statistics.median(ratios):.4f}, "
        f"95 % interval {low:.4f} to {high:.4f}, "
        f"quartiles {' to '.join(f'{q:.3f}' for q in statistics.quantiles(ratios, n=4)[::2])} (bar: 1.02)"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=sorted(WIDTHS), default="small")
    parser.add_argument("--layers", type=int, default=2, help="layers at the width of Llama-2-70B")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--memory-of", choices=NAMES, help="print the peak bytes of this one and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = {} if args.memory_of else {name: peak_of_process(name, args) for name in NAMES}
    with tempfile.TemporaryDirectory() as scratch:
        config = run_config(Path(scratch), args.width, args.layers)
        place = join(config.parallel, timeout_seconds=600)
        seed_step(0, 0, 0, 0)
        if args.memory_of:
            print(peak_bytes(place, contestant(args.memory_of, config, place)))
        else:
            steps = {name: contestant(name, config, place) for name in NAMES}
            report(config, measure(steps, args.rounds), memory)
        leave()


if __name__ == "__main__":
    main()
