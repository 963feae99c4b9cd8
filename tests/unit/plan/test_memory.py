"""Memory follows from the replayed schedule, falls with what is meant to save it, and is fast enough for a search."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.config.load import load_run
from megalemur.config.model import ModelConfig
from megalemur.config.presets import PRESETS
from megalemur.plan.activations import chunk_of, standing_buffers
from megalemur.plan.conventions import korthikanti_2022
from megalemur.plan.job import Job, Kernels
from megalemur.plan.memory import (
    UPDATE,
    communicators,
    enough_micro_batches,
    fullest_moments,
    memory_of,
    memory_timeline,
    moments,
    peak_memory,
    stage_parameters,
)
from tests.unit.plan.jobs import job_of

ROOT = Path(__file__).parents[3]
PAPER = {"recompute-gpt-22b": (48, 6144, 64), "recompute-gpt-530b": (105, 20480, 128)}
"""Layers, hidden size and heads: Korthikanti et al. 2022, table 3."""


def paper_job(row: dict[str, str]) -> Job:
    layers, hidden, heads = PAPER[row["model"]]
    pipeline, chunks = int(row["pp"]), int(row["virtual_chunks"])
    return Job(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=51200,
        gated=False,
        sequence_length=int(row["sequence"]),
        micro_batch_size=int(row["micro_batch"]),
        global_batch_size=280,
        tensor=int(row["tp"]),
        pipeline=pipeline,
        chunks=chunks,
        layers=((layers // pipeline // chunks,) * chunks,) * pipeline,
        kernels=Kernels(flash_attention=False, dropout=True, biases=True),
    )


with open(ROOT / "benchmarks/published/published_memory.csv") as file:
    ROWS = list(csv.DictReader(file))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_the_papers_figures_under_the_papers_convention(row):
    job = paper_job(row)
    unfused = korthikanti_2022(job)
    saved = korthikanti_2022(replace(job, sequence_parallel=True, recompute="selective"))
    gib = 2**30
    assert unfused.parameters_and_optimizer / gib == pytest.approx(float(row["params_and_optimizer_gib"]), rel=0.01)
    assert unfused.activations / gib == pytest.approx(float(row["activations_none_gib"]), rel=0.01)
    assert saved.activations / gib == pytest.approx(float(row["activations_sp_selective_gib"]), rel=0.01)
    # negative control: the terms that the convention leaves out are more than the tolerance
    assert 18 * stage_parameters(job, 0) / gib != pytest.approx(float(row["params_and_optimizer_gib"]), rel=0.01)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 8, "pipeline": 4, "chunks": 2}, {"pipeline": 2}], ids=str)
def test_parameters_of_all_ranks_are_the_model(preset, layout):
    job, model = job_of(preset, **layout), ModelConfig(preset=preset)
    norms = model.hidden_size * (2 * model.num_layers + 1)
    split = sum(stage_parameters(job, stage) * job.tensor for stage in range(job.pipeline)) - norms * (job.tensor - 1)
    padding = 2 * (job.vocab_size - model.vocab_size) * model.hidden_size
    assert split - padding == model.parameters


def test_llama2_70b_has_as_many_parameters_as_its_checkpoint():
    assert stage_parameters(job_of("llama2_70b"), 0) == 68_976_648_192


def test_the_distributed_optimizer_splits_masters_and_moments():
    whole = memory_of(job_of(data=8, context=1, distributed_optimizer=False))[0]
    split = memory_of(job_of(data=8, context=1))[0]
    assert whole.optimizer == 12 * whole.parameter_count == 8 * split.optimizer
    assert (whole.parameters, whole.gradients) == (2 * whole.parameter_count, 4 * whole.parameter_count)
    assert (split.parameters, split.gradients) == (whole.parameters, whole.gradients)
    over_context = memory_of(job_of(data=4, context=2, sequence_length=8192))[0]
    assert over_context.optimizer == split.optimizer


LAYOUTS = st.builds(
    lambda p, v, t, mb, m, recompute: job_of(
        num_layers=p * v * 2,
        tensor=t,
        pipeline=p,
        chunks=v if p > 1 else 1,
        micro_batch_size=mb,
        global_batch_size=m * p * mb,
        **recompute,
    ),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 6),
    st.sampled_from(
        [
            {},
            {"recompute": "selective"},
            {"recompute": "selective", "recompute_modules": ("mlp",)},
            {"recompute": "full"},
            {"recompute": "full", "recompute_layers": 2},
            {"recompute": "full", "recompute_method": "block"},
            {"precision": "fp32"},
            {"kernels": Kernels(fused_norm=False)},
        ]
    ),
)


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_the_peak_is_that_of_the_whole_replay(job):
    """The search looks at a few moments of each stage, the replay at every operation."""
    for stage in memory_of(job):
        points = memory_timeline(job, stage.stage)
        assert stage.activations_peak == max(point.peak for point in points)
        assert [p.after for p in points[:-1]] == [p.before for p in points[1:]]
        assert points[0].before == points[-1].after == 0
    assert peak_memory(job) == max(stage.total for stage in memory_of(job))


def test_a_long_step_has_no_moment_that_a_short_one_lacks():
    for p, v in ((2, 1), (4, 1), (2, 2), (4, 3), (3, 4)):
        for stage in range(p):
            kinds = tuple(range(v))
            enough = enough_micro_batches(p, v, 10**6)
            short, long = (fullest_moments(stage, p, v, m, kinds) for m in (enough, 8 * p))
            assert short == long
            for one in moments(stage, pipeline=p, chunks=v, micro_batches=8 * p):
                same = [m for m in long if (m.op.backward, m.op.chunk) == (one.op.backward, one.op.chunk)]
                # none of all moments is above those that were kept
                assert any(all(a >= b for a, b in zip(m.held, one.held, strict=True)) for m in same)


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, st.sampled_from(["distributed", "replicated"]))
def test_memory_falls_with_tensor_parallelism(job, optimizer):
    """With sequence parallelism, on the fullest stage, as long as every rank has key and value heads of its own."""
    job = replace(job, distributed_optimizer=optimizer == "distributed", vocab_padding=0)
    if job.tensor == 8:
        return
    twice = replace(job, tensor=2 * job.tensor, sequence_parallel=True)
    # a first split brings the buffer into which the sequence is gathered; it is counted, but no tensor grows
    assert peak_memory(twice) - standing_buffers(twice) < peak_memory(job) - standing_buffers(job)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 8]), st.sampled_from([1, 2]))
def test_memory_falls_with_pipeline_parallelism(pipeline, tensor, micro_batch):
    """For 1F1B with a model's worth of micro-batches: a stage holds p of them, of 1/p of the layers each, but only its
    own parameters. The whole is compared: what the last stage's logits take stays as it is."""
    before, after = (
        job_of(pipeline=p, tensor=tensor, micro_batch_size=micro_batch, global_batch_size=64 * micro_batch)
        for p in (pipeline, 2 * pipeline)
    )
    assert peak_memory(after) < peak_memory(before)
    state = [sum((s.parameters, s.gradients, s.optimizer)) for job in (before, after) for s in (memory_of(job)[0],)]
    assert state[1] < state[0]


@settings(max_examples=80, deadline=None)
@given(LAYOUTS)
def test_memory_falls_with_recompute(job):
    """What is kept a micro-batch: full below the feed-forward's alone, that below attention's, that below nothing. The
    peak too, as long as a checkpoint is one layer: with more, it computes all of them again at once."""
    job = replace(job, recompute_method="uniform", recompute_layers=1)
    kinds = [
        replace(job, recompute="full"),
        replace(job, recompute="selective", recompute_modules=("core_attn", "mlp")),
        replace(job, recompute="selective", recompute_modules=("core_attn",)),
        replace(job, recompute="none"),
    ]
    kept = [chunk_of(kind, job.layers[0][0], False, False).kept for kind in kinds]
    assert kept == sorted(set(kept))
    if job.num_layers // job.pipeline >= 4:
        peaks = [peak_memory(kind) for kind in kinds]
        assert peaks[0] <= peaks[2] <= peaks[3]


def test_more_layers_recomputed_keep_less():
    kept = [
        chunk_of(job_of(recompute="full", recompute_method="block", recompute_layers=n), 8, False, False).kept
        for n in range(1, 9)
    ]
    assert kept == sorted(set(kept), reverse=True)


def test_the_fullest_stage_and_its_moment():
    job = job_of("llama2_70b", tensor=4, pipeline=8, chunks=5, data=2, global_batch_size=1024)
    plan = memory_of(job, cluster_memory=80 * 10**9)
    assert [stage.in_flight for stage in plan] == [47, 45, 43, 41, 39, 37, 35, 33]
    assert plan[0].total == peak_memory(job) == max(stage.total for stage in plan)
    assert plan[0].peak_op.backward and plan[0].fits
    assert plan[-1].peak_unit == "output layer" and plan[-1].logits > 0 == plan[0].logits
    assert not memory_of(job, cluster_memory=40 * 10**9)[0].fits
    assert memory_of(job)[0].fits is None


@pytest.mark.parametrize(
    ("layout", "count"),
    [({}, 0), ({"tensor": 2}, 2), ({"data": 2}, 2), ({"tensor": 4, "pipeline": 8}, 3),
     ({"tensor": 4, "pipeline": 8, "data": 2}, 4),
     ({"tensor": 2, "context": 2, "data": 2, "sequence_length": 8192}, 4)],
)  # fmt: skip
def test_every_communicator_takes_memory_that_torch_does_not_count(layout, count):
    job = job_of("llama2_70b", **layout)
    assert communicators(job) == count
    stage = memory_of(job)[0]
    assert stage.slack == int(0.05 * stage.activations_peak) + (512 << 20) + count * (688 << 20)
    assert peak_memory(job) == max(one.total for one in memory_of(job))


def test_8_bit_copies_are_of_the_layers_matrices_and_of_no_table():
    wide, narrow = (memory_of(job_of("llama3_8b", tensor=2, precision=p))[0] for p in ("bf16", "fp8"))
    model = ModelConfig(preset="llama3_8b")
    matrices = model.num_layers * (model.parameters_per_layer - 2 * model.hidden_size)
    assert narrow.buffers - wide.buffers == 2 * matrices // 2
    assert narrow.parameters == wide.parameters and narrow.activations_peak == wide.activations_peak


def test_the_update_is_the_peak_where_it_allocates_more_than_a_micro_batch():
    small = {"recompute": "full", "sequence_length": 512, "global_batch_size": 4}
    quiet, loud = (memory_of(job_of(**small, update_bytes=size))[0] for size in (0, 8))
    assert loud.peak_unit == UPDATE and loud.activations_peak == 8 * loud.parameter_count > quiet.activations_peak
    assert (loud.activations, loud.logits, loud.in_flight) == (0, 0, 0)
    assert peak_memory(job_of(**small, update_bytes=8)) == loud.total
    # split over the replicas it is less than a micro-batch
    shared = {**small, "data": 64, "global_batch_size": 256, "sequence_length": 4096}
    assert memory_of(job_of(**shared, update_bytes=8)) == memory_of(job_of(**shared))
    whole = memory_of(job_of(**shared, update_bytes=8, distributed_optimizer=False))[0]
    assert whole.peak_unit == UPDATE


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ([], 0),
        (["optim.kind=adamw"], 4),
        (["precision.reduce_grads_in_fp32=false"], 4),
        (["precision.reduce_grads_in_fp32=false", "optim.kind=adamw"], 8),
        (["precision.reduce_grads_in_fp32=false", "precision.dtype=fp32"], 0),
    ],
)
def test_what_the_update_allocates_follows_from_the_run_file(settings, size):
    run = ROOT / "launch/runs/llama2_70b_pretrain.yaml"
    assert Job.of(load_run(run, settings)).update_bytes == size


def test_nothing_here_imports_torch():
    code = (
        "import sys; import megalemur.plan.memory, megalemur.plan.dry_result, megalemur.plan.checkpoint_cost; "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
