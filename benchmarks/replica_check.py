"""What the replica check costs beside a training step, on replicas that share this machine (CPU, gloo).

    python benchmarks/replica_check.py              # 2 replicas; masters and moments compared too, the dearest case
    python benchmarks/replica_check.py --norms      # what is looked at in every step: norms, 2 tensor-parallel ranks
    python benchmarks/replica_check.py --digest     # bytes a second of the digest alone, on the GPU where there is one

Steps and comparisons are taken in turns; the cost at every k-th step is the median comparison over k median steps.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing

from megalemur.config.load import parse_run
from megalemur.config.run import RunConfig
from megalemur.data.writer import IndexedWriter
from megalemur.parallel.groups import join, leave
from megalemur.train.replicas import Digester, ReplicaCheck, circles_of, norms_of
from megalemur.train.setup import build_run
from megalemur.train.step import train_step

_DIGEST_BYTES = 1 << 30


def run_config(directory: Path, replicas: int, distributed: bool) -> RunConfig:
    """A small model, one micro-batch of 1,024 tokens a replica and step."""
    with IndexedWriter(directory / "data", vocab_size=4096) as writer:
        writer.add(np.random.default_rng(0).integers(0, 4096, 200_000))
        writer.commit()
    return parse_run(f"""
run: {{name: bench, steps: 100000, check_replicas_every: 0}}
model: {{num_layers: 4, hidden_size: 256, ffn_hidden_size: 688, num_attention_heads: 8, num_query_groups: 4,
         vocab_size: 4096, max_position_embeddings: 512}}
parallel: {{data: {replicas}, distributed_optimizer: {str(distributed).lower()}}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-5}}
data: {{sequence_length: 256, micro_batch_size: 4, global_batch_size: {4 * replicas},
        sources: [{{name: a, path: {directory}/data}}]}}
checkpoint: {{directory: {directory}/none}}
log: {{directory: {directory}/log}}
""")


def measure(rank: int, config: RunConfig, port: int, rounds: int, every: int) -> None:
    """One replica; the first one prints."""
    world = config.parallel.world_size
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    run = build_run(config, join(config.parallel, timeout_seconds=600))
    engine = run.engine
    check = ReplicaCheck(
        run.place,
        lambda: circles_of(config, run.place, engine.chunks, engine.optimizer, run.segments),
        every=1,
        steps_taken=0,
    )
    steps, checks = [], []
    for number in range(rounds + 3):
        batches = run.data.training.micro_batches(number * config.data.global_batch_size, run.portion)
        begun = time.perf_counter()
        train_step(engine, batches, 1e-5)
        between = time.perf_counter()
        assert check.compare() == []
        if number >= 3:
            steps.append(between - begun)
            checks.append(time.perf_counter() - between)
    if rank == 0:
        circles = circles_of(config, run.place, engine.chunks, engine.optimizer, run.segments)
        size = sum(held.tensor.nbytes for circle in circles for held in circle.held)
        step, compared = statistics.median(steps), statistics.median(checks)
        print(
            f"{world} replicas, distributed_optimizer={config.parallel.distributed_optimizer}, {size / 1e6:.0f} MB "
            f"compared: step {step * 1e3:.0f} ms, comparison {compared * 1e3:.1f} ms ({compared / step:.1%} of it); "
            f"at k = {every}: {compared / step / every:.3%} (bar: 1 %), {rounds} rounds"
        )
    leave()


def measure_norms(rank: int, config: RunConfig, port: int, rounds: int, _: int) -> None:
    """One tensor-parallel rank; the first one prints what looking at the norms costs in every step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    run = build_run(config, join(config.parallel, timeout_seconds=600))
    norms = norms_of(config, run.engine.chunks)
    check = ReplicaCheck(run.place, lambda: (), norms, every=1 << 30, steps_taken=0)
    steps, looks = [], []
    for number in range(rounds + 3):
        batches = run.data.training.micro_batches(number * config.data.global_batch_size, run.portion)
        begun = time.perf_counter()
        train_step(run.engine, batches, 1e-5)
        between = time.perf_counter()
        assert check.when_due() == []
        steps.append(between - begun)
        looks.append(time.perf_counter() - between)
    if rank == 0:
        step, looked = statistics.median(steps[3:]), statistics.median(looks[3:])
        count = sum(norm.numel() for norm in norms)
        print(
            f"norms over 2 tensor-parallel ranks, {count:,} numbers: step {step * 1e3:.0f} ms, looking "
            f"{looked * 1e3:.2f} ms, {looked / step:.3%} of every step, {rounds} rounds"
        )
    leave()


def digest_rate() -> None:
    """Bytes a second of the digest, bf16 and fp32 words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digest = Digester(device)
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.zeros(_DIGEST_BYTES // dtype.itemsize, dtype=dtype, device=device)
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            int(digest(tensor))  # waits for the device
            seconds.append(time.perf_counter() - begun)
        print(f"digest of 1 GiB of {dtype} on {device}: {_DIGEST_BYTES / 1e9 / statistics.median(seconds):.2f} GB/s")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=100, help="k: steps between comparisons")
    parser.add_argument("--digest", action="store_true")
    parser.add_argument("--norms", action="store_true")
    args = parser.parse_args()
    if args.digest:
        digest_rate()
        return
    work = measure_norms if args.norms else measure
    for distributed in (True,) if args.norms else (False, True):
        with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            config = run_config(Path(scratch), args.replicas, distributed)
            if args.norms:
                parallel = config.parallel.model_copy(update={"data": 1, "tensor": 2})
                config = config.model_copy(update={"parallel": parallel})
            torch.multiprocessing.spawn(work, (config, port, args.rounds, args.every), nprocs=args.replicas)


if __name__ == "__main__":
    main()
