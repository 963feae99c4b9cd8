"""The yardstick of all others: ten steps equal a loop written by hand with transformers and torch."""

import math

import pytest
import torch

from megalemur.parallel.state import MASTER
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import losses_and_norms, train_and_save, whole_state


def plain_loop(config, directory):
    """Losses, gradient norms and weights after ten steps of transformers' Llama with torch's AdamW."""
    from transformers import AutoModelForCausalLM

    from megalemur.data.batches import Portion
    from megalemur.data.feed import build_data

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    data = build_data(config.data, seed=config.run.seed, vocab_size=config.model.vocab_size, total_samples=80).training
    results = []
    for step in range(10):
        # linear warm-up that ends at the peak with the third update, then a cosine to a tenth with the tenth
        progress = (step + 1 - 3) / (10 - 3)
        scale = (step + 1) / 3 if step < 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        (batch,) = data.micro_batches(step * 8, Portion(0, 1, 8, 8))
        logits = model(batch.tokens).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append((float(loss), float(norm)))
    return results, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["fused_adamw", "adamw"])
def test_ten_steps_equal_a_plain_loop(tmp_path, kind):
    model = write_llama(tmp_path / "hf")
    config = tiny_run(tmp_path, f"optim.kind={kind}", start_from=model)
    ((results, path),) = run_ranks(1, train_and_save, config)
    expected, weights = plain_loop(config, model)
    assert torch.tensor(results) == pytest.approx(torch.tensor(expected), rel=1e-5, abs=0)
    state = whole_state(path)
    for name, value in weights.items():
        torch.testing.assert_close(state[f"{MASTER}/{name}"], value, rtol=0, atol=1e-5)


def test_eight_processes_equal_a_plain_loop(tmp_path):
    model = write_llama(tmp_path / "hf")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.chunks=2", "parallel.data=2")
    config = tiny_run(tmp_path, *layout, start_from=model)
    expected, _ = plain_loop(config, model)
    for results in run_ranks(8, losses_and_norms, config):
        assert torch.tensor(results) == pytest.approx(torch.tensor(expected), rel=1e-5, abs=0)
