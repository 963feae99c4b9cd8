"""What megatron-core does in silence, each with the cure taken away or the damage done on purpose."""

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import losses_and_norms, start, take_steps

P = "parallel."


def bits(run):
    return [piece.tensor.clone() for piece in run.pieces()] + [
        parameter.detach().clone() for chunk in run.engine.chunks for parameter in chunk.parameters()
    ]


def step_with_damage(config, value):
    """One good step, then one whose gradient is damaged on the last rank alone. (verdict, bits unchanged, next step)"""
    from megalemur.train.step import train_step

    run = start(config)
    take_steps(run, 1)
    before = bits(run)
    chunk = run.engine.chunks[0]
    parameter = next(chunk.parameters())

    def damage(gradient):
        return gradient * value

    hook = parameter.register_hook(damage) if run.place.rank == run.place.world_size - 1 else None
    batches = run.data.training.micro_batches(run.state.samples, run.portion)
    result = train_step(run.engine, batches, 1e-3)
    if hook:
        hook.remove()
    same = all(torch.equal(a, b) for a, b in zip(before, bits(run), strict=True))
    after = take_steps(run, 2)
    return result.verdict.name, same, after


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["true", "false"])
def test_a_gradient_that_is_not_finite_changes_no_bit_on_any_rank(tmp_path, value, precision, optimizer):
    layout = (f"{P}pipeline=2", f"{P}data=2", f"{P}distributed_optimizer={optimizer}", f"precision.dtype={precision}")
    config = tiny_run(tmp_path, *layout)
    for verdict, same, after in run_ranks(4, step_with_damage, config, value):
        assert (verdict, same) == ("SKIP", True)
        assert all(torch.tensor(after).isfinite().flatten())


def with_batched_messages(config):
    """The same run with the messages paired as megatron-core's default has them."""
    import megalemur.model.mcore_config as owner

    owner.batched_p2p = lambda *_: True
    return losses_and_norms(config)


def test_batched_messages_between_two_interleaved_stages_are_still_wrong(tmp_path):
    # when this fails, megatron-core or gloo has mended it, and parallel/device.py can be simpler
    model = write_llama(tmp_path / "hf")
    config = tiny_run(tmp_path, "run.steps=4", f"{P}pipeline=2", f"{P}chunks=2", start_from=model)
    right = torch.tensor(run_ranks(2, losses_and_norms, config)[0])
    wrong = torch.tensor(run_ranks(2, with_batched_messages, config)[0])
    assert not torch.allclose(right, wrong, rtol=1e-5, atol=0)


def without_redirect(config, name):
    """Whether a step still works with one redirect left out."""
    from megalemur.parallel import device, groups

    groups.open_seam = lambda: device.open_seam(tuple(r for r in device.REDIRECTS if r.name != name))
    try:
        losses_and_norms(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    "name", ["current_device", "device_literals", "cuda_copies", "type_names", "synchronize", "generator"]
)
def test_every_redirect_is_still_needed(tmp_path, name):
    from megalemur.parallel.device import REDIRECTS

    assert name in {redirect.name for redirect in REDIRECTS}
    short = ("run.steps=1", "schedule.warmup_steps=0", "run.collective_timeout=20")
    config = tiny_run(tmp_path, *short, f"{P}pipeline=2", tie_embeddings=True)
    assert all(run_ranks(2, without_redirect, config, name)), f"megatron-core works without {name}: remove it"


def test_the_seam_has_no_redirect_that_no_test_knows():
    from megalemur.parallel.device import REDIRECTS

    assert len(REDIRECTS) == 6


def intra_losses(config):
    """Summed loss of one replica's first micro-batches, with the batches themselves."""
    from megalemur.train.step import run_schedule

    run = start(config)
    batches = run.data.training.micro_batches(0, run.portion)
    loss, tokens = run_schedule(run.engine, batches, forward_only=True)
    return loss, tokens, [(b.tokens, b.labels, b.loss_mask, b.cu_seqlens) for b in batches]


def document_losses(directory, batches):
    """The same loss with transformers, one document at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    total, count = 0.0, 0.0
    for tokens, labels, mask, borders in batches:
        flat = [x.reshape(-1) for x in (tokens, labels, mask)]
        for first, last in zip(borders.tolist(), borders.tolist()[1:], strict=False):
            document, targets, counted = (x[first:last] for x in flat)
            with torch.no_grad():
                logits = model(document[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total, count = total + float((losses * counted).sum()), count + float(counted.sum())
    return total / count, count


@pytest.mark.parametrize("mask", ["none", "intra"])
@pytest.mark.parametrize("layout", [(f"{P}pipeline=4",), (f"{P}tensor=2", f"{P}pipeline=2")], ids=["pp4", "tp2 pp2"])
def test_documents_attend_as_transformers_has_them(tmp_path, mask, layout):
    model = write_llama(tmp_path / "hf")
    config = tiny_run(tmp_path, *layout, f"data.document_mask={mask}", start_from=model)
    loss, tokens, batches = run_ranks(4, intra_losses, config)[0]
    expected, counted = document_losses(model, batches)
    assert tokens == counted
    assert loss == pytest.approx(expected, rel=1e-6)
    if mask == "intra":
        assert counted < 8 * 32  # labels across a border do not count
