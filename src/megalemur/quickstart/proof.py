"""What the quickstart claims, computed from the files that the run left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import torch


def records(metrics: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl; events are left out."""
    lines = [orjson.loads(line) for line in metrics.read_bytes().splitlines()]
    return [line for line in lines if "event" not in line]


def validation_losses(lines: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """(source, first validation loss, last one) for every validation source."""
    names = sorted({key for line in lines for key in line if key.startswith("validation/")})
    for name in names:
        values = [line[name] for line in lines if name in line]
        yield name.removeprefix("validation/"), values[0], values[-1]


def logits_difference(checkpoint: Path, text: str) -> float:
    """Largest absolute difference of the logits of `text`, transformers against megalemur, both in fp32."""
    from transformers import AutoModelForCausalLM

    from megalemur.config.parallel import ParallelConfig
    from megalemur.config.precision import PrecisionConfig
    from megalemur.generate.run import load_model
    from megalemur.generate.tokenizer import load_tokenizer
    from megalemur.model.logits import true_logits
    from megalemur.parallel.groups import join, leave

    ids = torch.tensor([load_tokenizer(checkpoint).encode(text)[:128]])
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    place = join(ParallelConfig(), timeout_seconds=60)
    try:
        chunk, _ = load_model(checkpoint, PrecisionConfig(dtype="fp32"))
        with torch.no_grad():
            positions = torch.arange(ids.shape[1])[None].to(place.device)
            ours = true_logits(chunk, chunk(ids.to(place.device), positions, None)).cpu()
            return float((theirs(ids).logits - ours).abs().max())
    finally:
        leave()
