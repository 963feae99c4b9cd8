"""The planned memory beside what tensors take: of megatron-core's modules on fake tensors, and of real training."""

from dataclasses import replace

import pytest
import torch

from megalemur.plan.dry_result import Order, compared, dry_run
from megalemur.plan.job import Job
from megalemur.plan.memory import UPDATE, memory_of
from tests.support.planned import all_stages, differing, peak_of_tensors, planned_run, random_runs, trace_runs
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run

P, R = "parallel.", "precision.recompute"
# one in ten of benchmarks/plan_memory.py's, the small ones
SMALL = [run for run in random_runs(40, seed=7) if run.model.num_layers <= 8 and run.micro_batches <= 8][:4]
# three gradients of a tied table at once: more than the one layer needs
SMALL.append(planned_run("model.tie_embeddings=true", "model.num_layers=1", f"{R}=full", "data.document_mask=intra"))


def test_the_plan_is_within_five_per_cent_of_the_trace():
    found = run_ranks(1, trace_runs, [(run, number % 2 == 0) for number, run in enumerate(SMALL)])[0]
    assert len(found) >= len(SMALL) == 5
    assert differing(found, 0.05) == []


def test_a_wrong_plan_is_found():
    """Negative control: a trace with other kernels, and one of another job."""
    run = planned_run(f"{P}pipeline=2")
    found = run_ranks(1, all_stages, run, False)[0]
    assert differing(found, 0.05) == []
    wrong = compared(Order(run, fused_norm=True), [one.compared.trace for one in found])
    assert differing([one._replace(compared=other) for one, other in zip(found, wrong.ranks, strict=True)], 0.05)


def test_a_dry_run_in_its_own_process():
    run = planned_run(f"{P}tensor=2", f"{P}pipeline=4", f"{P}data=2", "model.num_layers=8", "data.global_batch_size=16")
    found = dry_run(Order(run), [0, 1, 2, 15], processes=1)
    assert [one.trace.rank for one in found.ranks] == [1, 13]  # ranks 0 to 2 are of one class, which is run once
    assert all(abs(one.total_error) < 0.01 and one.flops_error == 0 for one in found.ranks)
    first, last = (one.trace for one in found.ranks)
    assert first.parameter_count < last.parameter_count  # the last norm
    kinds = {(row.kind, row.group) for row in first.collectives}
    assert {("_allgather_base_", "tensor"), ("_reduce_scatter_base_", "tensor")} <= kinds
    assert any(group.startswith("data") for _, group in kinds)
    assert {row.kind for row in first.messages} == {"send", "recv_"}
    assert found.as_json()["ranks"][0]["trace"]["rank"] == 1


def test_modules_that_are_not_installed_are_named():
    run = planned_run("model.backend=transformer_engine")
    with pytest.raises(AssertionError, match="Transformer Engine is not installed"):  # of the forked process
        run_ranks(1, all_stages, run, True)


LAYOUTS = {
    "one process": (),
    "tensor 2": (f"{P}tensor=2",),
    "tensor 4": (f"{P}tensor=4",),
    "pipeline 2": (f"{P}pipeline=2",),
    "pipeline 4": (f"{P}pipeline=4",),
    "tensor 2, pipeline 2": (f"{P}tensor=2", f"{P}pipeline=2"),
    "feed-forward again": (f"{R}=selective", f"{R}_modules=[mlp]"),
    "full again": (f"{R}=full",),
}


def test_eight_layouts_rank_as_planned_in_real_training(tmp_path):
    batch = ("data.sequence_length=128", "data.micro_batch_size=4", "data.global_batch_size=16")
    # comparing replicas takes a buffer of some megabytes in its step: nothing beside a GPU's memory, much beside this
    batch += ("run.check_replicas_every=0",)
    planned, measured = {}, {}
    for name, layout in LAYOUTS.items():
        run = tiny_run(tmp_path, *layout, *batch)
        job = Job.of(run)
        job = replace(job, kernels=replace(job.kernels, fused_norm=False))  # a CPU has no such kernel
        planned[name] = max(stage.traced for stage in memory_of(job))
        measured[name] = max(run_ranks(run.parallel.world_size, peak_of_tensors, run, 2))
    assert sorted(planned, key=planned.__getitem__) == sorted(measured, key=measured.__getitem__), (planned, measured)
    off = {name: planned[name] / measured[name] - 1 for name in LAYOUTS}
    assert max(map(abs, off.values())) < 0.05, off


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_narrow_gradients_are_widened_for_the_update_when_it_is_the_fullest_moment(tmp_path, distributed):
    small = ("data.sequence_length=16", "data.micro_batch_size=1", "data.global_batch_size=2", f"{R}=full")
    widths = ("precision.dtype=bf16", "precision.reduce_grads_in_fp32=false", f"{P}distributed_optimizer={distributed}")
    run = tiny_run(tmp_path, *small, *widths, "run.check_replicas_every=0", "model.hidden_size=128")
    job = Job.of(run)
    job = replace(job, kernels=replace(job.kernels, fused_norm=False))
    (planned,), (silent,) = memory_of(job), memory_of(replace(job, update_bytes=0))
    measured = max(run_ranks(1, peak_of_tensors, run, 2))
    assert planned.peak_unit == UPDATE and planned.traced == pytest.approx(measured, rel=0.05)
    assert silent.traced < 0.9 * measured  # negative control: the activations alone are less


@pytest.mark.parametrize("kind", ["fused_adamw", "adamw"])
def test_what_the_update_allocates_beside_its_gradients(kind):
    from megalemur.optim.adamw import make_adamw, set_moments_to_zero
    from megalemur.plan.traced import Tracer

    weight = torch.nn.Parameter(torch.zeros(1 << 16))
    weight.grad = torch.zeros_like(weight)
    optimizer = make_adamw(kind, [{"params": [weight]}], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer.param_groups[0]["foreach"] = True  # torch's own choice for torch.optim.AdamW on CUDA
    set_moments_to_zero(optimizer)
    with Tracer() as tracer:
        for tensor in (weight, weight.grad, *optimizer.state[weight].values()):
            tracer.follow(torch.as_tensor(tensor))
        tracer.restart()
        before = tracer.now
        optimizer.step()
    planned = Job.of(planned_run(f"optim.kind={kind}")).update_bytes * weight.numel()
    assert tracer.peak - before == pytest.approx(planned, abs=64)
