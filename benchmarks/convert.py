"""Conversion beside cp of the same bytes: time and memory, at the width of Llama-2-70B.

    python benchmarks/convert.py                         # 8 layers, about 14.8 GB; needs four times that on the disk
    python benchmarks/convert.py --layers 2 --rounds 5 --directory DIR
    python benchmarks/convert.py --only hf-megalemur,verify

A round is one conversion and one `cp --reflink=never` of its source with `sync`, in turns; a ratio is the median of the
rounds' ratios. A conversion's time ends when everything is on the disk; reading back for the certificate is a column of
its own. Memory is the largest sum of RssAnon and RssShmem over the process and its children, sampled.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megalemur.checkpoint.tensor_file import TensorFileWriter, TensorSpec
from megalemur.config.model import ModelConfig
from megalemur.model.hf_config import hf_config_json
from megalemur.model.names import hf_shapes

console = Console(width=150)
ROOT = Path(__file__).parents[1]
CONVERT, VERIFY = ROOT / "checkpoints_tools/convert.py", ROOT / "checkpoints_tools/verify.py"
_SAMPLE_SECONDS = 0.02

_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


class Took(NamedTuple):
    """A process that ended well."""

    seconds: float
    peak_gb: float
    """Largest sum of RssAnon and RssShmem over the process tree."""
    mapped_gb: float
    """Largest sum of RssFile."""
    said: str


def model(layers: int, vocab_size: int) -> ModelConfig:
    """Llama-2-70B with fewer layers."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        vocab_size=vocab_size,
    )


def write_source(directory: Path, config: ModelConfig) -> int:
    """A Hugging Face directory of random bits that are finite numbers; its bytes."""
    directory.mkdir(parents=True)
    shapes, names = hf_shapes(config), []
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        groups.setdefault(part, {})[name] = TensorSpec(shape, torch.bfloat16)
    for number, specs in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        with TensorFileWriter(directory / file, specs) as writer:
            for name, spec in specs.items():
                block = torch.randn(1 << 20, generator=generator).bfloat16()
                writer.write(name, _filled(block, spec.shape))
                weight_map[name] = file
                names.append(name)
            writer.finish()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_bytes(hf_config_json(config, dtype="bfloat16"))
    return sum(file.stat().st_size for file in directory.iterdir())


def write_release(directory: Path, config: ModelConfig, parts: int = 8) -> None:
    """The same model as Meta releases it: every matrix cut for as many tensor-parallel ranks."""
    directory.mkdir(parents=True)
    h, f, v = config.hidden_size, config.ffn_hidden_size // parts, config.vocab_size
    kv = config.num_query_groups * config.head_dim // parts
    shapes = {"tok_embeddings.weight": (v, h // parts), "norm.weight": (h,), "output.weight": (v // parts, h)}
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        shapes |= {
            f"{at}attention.{name}.weight": (rows, h) for name, rows in (("wq", h // parts), ("wk", kv), ("wv", kv))
        }
        shapes |= {f"{at}attention.wo.weight": (h, h // parts), f"{at}feed_forward.w2.weight": (h, f)}
        shapes |= {f"{at}feed_forward.{name}.weight": (f, h) for name in ("w1", "w3")}
        shapes |= {f"{at}{name}.weight": (h,) for name in ("attention_norm", "ffn_norm")}
    for part in range(parts):
        generator = torch.Generator().manual_seed(part)
        block = torch.randn(1 << 20, generator=generator).bfloat16()
        tensors = {name: _filled(block, shape) for name, shape in shapes.items()}
        torch.save(tensors, directory / f"consolidated.{part:02d}.pth")
    params = {"dim": h, "n_layers": config.num_layers, "n_heads": config.num_attention_heads, "vocab_size": -1}
    params |= {"n_kv_heads": config.num_query_groups, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
    (directory / "params.json").write_text(json.dumps(params))


def _filled(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return block.repeat(-(-count // len(block)))[:count].view(shape).contiguous()


def run(*command: str) -> Took:
    """A process from its start to its end, watched."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    peaks = [0.0, 0.0]

    def watch() -> None:
        while process.poll() is None:
            for number, size in enumerate(_memory(process.pid)):
                peaks[number] = max(peaks[number], size)
            time.sleep(_SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    return Took(time.monotonic() - began, peaks[0] / 1e9, peaks[1] / 1e9, said)


def _memory(pid: int) -> tuple[float, float]:
    """(RssAnon + RssShmem, RssFile) in bytes over a process and everything below it."""
    own, mapped = 0.0, 0.0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return own, mapped
    for process in tree:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        except OSError:
            continue
        sizes = {name: 1024 * int(lines.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem", "RssFile")}
        own, mapped = own + sizes["RssAnon"] + sizes["RssShmem"], mapped + sizes["RssFile"]
    return own, mapped


def copy_seconds(source: Path, target: Path) -> float:
    """cp and sync of a directory."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    return time.monotonic() - began


def verify_seconds(said: str) -> float:
    """How long the command itself says that it read back."""
    match = re.search(r"found equal in ([\d.]+) s", said.replace("\n", " "))
    assert match, said
    return float(match[1])


def pairs(name: str, source: Path, scratch: Path, rounds: int, options: list[str]) -> None:
    """One direction beside cp, in turns."""
    ratios, writes, verifies, peaks, mapped = [], [], [], [], []
    target, copied = scratch / "converted", scratch / "copied"
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) / 1e9
    for _ in range(rounds):
        copy = copy_seconds(source, copied)
        shutil.rmtree(copied)
        took = run(sys.executable, str(CONVERT), str(source), str(target), *options)
        shutil.rmtree(target)
        subprocess.run(["sync"], check=True)
        verify = verify_seconds(took.said)
        # imports and headers count: cp has its start inside too
        ratios.append((took.seconds - verify) / copy)
        writes.append(took.seconds - verify)
        verifies.append(verify)
        peaks.append(took.peak_gb)
        mapped.append(took.mapped_gb)
    table = Table(title=f"{name}: {size:.2f} GB, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for title in ("", "median", "range", "bar"):
        table.add_column(title)
    _row(table, "time / cp + sync", ratios, "", "at most 1.6")
    _row(table, "seconds to write", writes, " s", "")
    _row(table, "read back", [size / seconds for seconds in verifies], " GB/s", "at least 0.8")
    _row(table, "RssAnon + RssShmem", peaks, " GB", "at most 1.5")
    _row(table, "RssFile", mapped, " GB", "")
    console.print(table)


def _row(table: Table, name: str, values: list[float], unit: str, bar: str) -> None:
    low, high = min(values), max(values)
    table.add_row(name, f"{statistics.median(values):.2f}{unit}", f"{low:.2f} to {high:.2f}", bar)


def transformers_beside(source: Path, scratch: Path) -> None:
    """from_pretrained and save_pretrained, once."""
    took = run(sys.executable, "-c", _TRANSFORMERS, str(source), str(scratch / "saved"))
    shutil.rmtree(scratch / "saved")
    console.print(
        f"transformers from_pretrained + save_pretrained: {took.seconds:.1f} s, RssAnon + RssShmem {took.peak_gb:.2f} "
        f"GB, RssFile {took.mapped_gb:.2f} GB; not synced, nothing proven"
    )


def verify_beside(source: Path, scratch: Path, rounds: int) -> None:
    """verify.py of two equal directories."""
    other = scratch / "other"
    copy_seconds(source, other)
    size = sum(file.stat().st_size for file in source.rglob("*.safetensors")) / 1e9
    rates, peaks = [], []
    for _ in range(rounds):
        took = run(sys.executable, str(VERIFY), str(source), str(other))
        rates.append(size / took.seconds)
        peaks.append(took.peak_gb)
    shutil.rmtree(other)
    table = Table(title=f"verify: two of {size:.2f} GB, {rounds} rounds")
    for title in ("", "median", "range", "bar"):
        table.add_column(title)
    _row(table, "GB/s of one of them, imports counted", rates, " GB/s", "at least 0.8")
    _row(table, "RssAnon + RssShmem", peaks, " GB", "at most 1.5")
    console.print(table)


def directions(scratch: Path, config: ModelConfig, rounds: int) -> dict[str, Callable[[], None]]:
    """Every comparison by name."""
    source, release, megatron = scratch / "hf", scratch / "meta", scratch / "megatron"

    def out_of_megatron() -> None:
        run(sys.executable, str(CONVERT), str(source), str(megatron), "--to", "megatron")
        pairs("megatron to hf", megatron, scratch, rounds, ["--to", "hf"])
        shutil.rmtree(megatron)

    def out_of_meta() -> None:
        write_release(release, config)
        pairs("Meta's release (8 parts) to hf", release, scratch, rounds, ["--to", "hf"])
        shutil.rmtree(release)

    return {
        "hf-megalemur": lambda: pairs("hf to megalemur", source, scratch, rounds, ["--to", "megalemur"]),
        "hf-megatron": lambda: pairs("hf to megatron", source, scratch, rounds, ["--to", "megatron"]),
        "megatron-hf": out_of_megatron,
        "meta-hf": out_of_meta,
        "verify": lambda: verify_beside(source, scratch, rounds),
        "transformers": lambda: transformers_beside(source, scratch),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk that is measured; unset: the temporary folder")
    parser.add_argument("--only", default="", help="comparisons, with commas between them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megalemur-convert-", dir=args.directory) as folder:
        scratch = Path(folder)
        config = model(args.layers, args.vocab_size)
        write_source(scratch / "hf", config)
        all_of_them = directions(scratch, config, args.rounds)
        for name in args.only.split(",") if args.only else all_of_them:
            all_of_them[name]()


if __name__ == "__main__":
    main()
