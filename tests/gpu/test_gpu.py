"""What one GPU can prove. Each test skips without one."""

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import logits_of, losses_and_norms, train_and_save, whole_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none here")


def no_redirects(config):
    from tests.support.training import start

    before = torch.cuda.current_device
    run = start(config)
    return torch.cuda.current_device is before and run.place.device.type == "cuda"


def test_no_redirect_is_installed(tmp_path):
    assert run_ranks(1, no_redirects, tiny_run(tmp_path)) == [True]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 2e-2)])
def test_logits_agree_with_transformers(tmp_path, precision, bound):
    from transformers import AutoModelForCausalLM

    directory = write_llama(tmp_path / "hf")
    tokens = torch.randint(0, 251, (2, 64), generator=torch.Generator().manual_seed(1)).cuda()
    config = tiny_run(tmp_path, f"precision.dtype={precision}", start_from=directory)
    (found,) = run_ranks(1, logits_of, config, tokens.cpu())
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).cuda()
    with torch.no_grad():
        assert float((found.float().cpu() - model(tokens).logits.cpu()).abs().max()) < bound


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run_learns(tmp_path, precision):
    config = tiny_run(tmp_path, f"precision.dtype={precision}", "run.steps=60", "optim.learning_rate=3e-3")
    (results,) = run_ranks(1, losses_and_norms, config)
    assert results[-1][0] < results[0][0] - 0.02


def test_save_and_resume_keep_every_bit(tmp_path):
    config = tiny_run(tmp_path, "precision.dtype=bf16", "run.stop_at=5", "run.deterministic=true")
    ((_, path),) = run_ranks(1, train_and_save, config)
    from tests.distributed.test_resume import load_and_save

    again = run_ranks(1, load_and_save, config, tmp_path / "again")[0]
    one, other = whole_state(path), whole_state(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
