"""Steps as physics has them: what must be equal is, and what must fall with more of something falls."""

import random
from dataclasses import replace

import pytest

from megalemur.config.model import ModelConfig
from megalemur.config.presets import PRESETS
from megalemur.observe.throughput import flops_per_token as closed_form
from megalemur.plan.collectives import Links
from megalemur.plan.constants import fitted
from megalemur.plan.flops import flops_per_token
from megalemur.plan.job import Kernels
from megalemur.plan.schedule import step_seconds
from megalemur.plan.step_time import ChunkTime, StepTime, TimeModel, pipeline_seconds, predict, stage_parameters
from tests.unit.plan.timed import A100, H100, job, with_figures

LAYOUT = {"tensor": 4, "pipeline": 4, "chunks": 5, "data": 4}


def step(cluster=H100, **settings) -> StepTime:
    return predict(job(**settings), cluster, fitted())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sequence", [64, 4096])
def test_flops_are_the_closed_form_of_throughput(preset, sequence):
    model = ModelConfig.model_validate({"preset": preset})
    assert flops_per_token(job(preset, sequence=sequence, tensor=8)) == closed_form(model, sequence)


def test_flops_of_two_matrices_are_those_of_the_paper():
    # Narayanan et al. 2021, equation 3, less recompute: 72 B s L h^2 (1 + s / 6h + V / 12Lh)
    h, layers, s, v = 4096, 36, 2048, 51200
    gpt = job(
        "llama2_7b", sequence=s, num_layers=layers, ffn_hidden_size=4 * h, gated=False, vocab_size=v, vocab_padding=0
    )
    expected = 72 * layers * h * h * (1 + s / (6 * h) + v / (12 * layers * h))
    assert flops_per_token(gpt).full_attention == pytest.approx(expected, rel=1e-12)


def test_parameters_of_all_stages_are_the_models():
    model = ModelConfig.model_validate({"preset": "llama2_70b"})
    split = job(tensor=4, pipeline=4)
    held = 4 * sum(stage_parameters(split, stage) for stage in range(4))
    assert held == pytest.approx(model.parameters, rel=1e-4)  # rows of padding; the last norm is left out
    assert stage_parameters(split, 0) > stage_parameters(split, 1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_breakdown_sums_to_the_step(exact, recompute):
    made = predict(job(**LAYOUT, recompute=recompute), H100, fitted(), exact=exact)
    assert sum(made.breakdown.values()) == pytest.approx(made.seconds, rel=1e-12)
    assert all(seconds >= 0 for seconds in made.breakdown.values()), made.breakdown
    assert (made.breakdown["recompute"] > 0) == (recompute != "none")


def test_tokens_a_second_and_utilisation_are_the_steps():
    made, planned = step(**LAYOUT), job(**LAYOUT)
    assert made.tokens_per_second_per_gpu == pytest.approx(planned.tokens_per_step / made.seconds / planned.world_size)
    flops = flops_per_token(planned)
    assert made.mfu_causal_attention == pytest.approx(
        made.tokens_per_second_per_gpu * flops.causal_attention / (H100.peak_teraflops_16bit * 1e12)
    )
    assert made.mfu_full_attention > made.mfu_causal_attention


def test_no_step_beats_the_peak():
    for preset in PRESETS:
        for precision in ("bf16", "fp8"):
            made = step(preset=preset, micro=8, batch=64, precision=precision)
            assert 0 < made.mfu_causal_attention < 0.9


FASTER = {
    "tensor links": {"node_gigabytes_per_second": 900.0},
    "memory": {"memory_gigabytes_per_second": 6000.0},
    "matrix units": {"peak_teraflops_16bit": 2000.0},
    "power": {"achievable_fraction": 1.1},
    "network": {"network_gigabytes_per_second": 100.0},
}


@pytest.mark.parametrize("figure", FASTER)
def test_a_faster_device_or_link_makes_a_shorter_step(figure):
    # without overlap everything shows
    planned = job(**LAYOUT, overlap_grad_reduce=False, overlap_param_gather=False)
    before, after = (predict(planned, c, fitted()).seconds for c in (H100, with_figures(H100, **FASTER[figure])))
    assert after < 0.9999 * before


def test_more_micro_batches_leave_a_smaller_share_of_bubble():
    shares = []
    for batch in (32, 64, 128, 512):
        made = step(**LAYOUT, batch=batch)
        shares.append(made.breakdown["bubble"] / made.seconds)
    assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[-1]


def test_more_chunks_make_a_smaller_bubble():
    bubbles = [step(tensor=4, pipeline=4, data=4, chunks=chunks).breakdown["bubble"] for chunks in (1, 2, 4, 5)]
    assert bubbles == sorted(bubbles, reverse=True)


def test_recompute_and_exposed_messages_cost_time():
    none, selective, full = (step(**LAYOUT, recompute=kind).seconds for kind in ("none", "selective", "full"))
    assert none < selective < full < 1.4 * none
    halves = [step(**LAYOUT, recompute="full", recompute_method="block", recompute_layers=n).seconds for n in (1, 2, 4)]
    assert none < halves[0] < halves[1] < halves[2] == full
    mlp = step(**LAYOUT, recompute="selective", recompute_modules=("core_attn", "mlp")).seconds
    assert selective < mlp < full


@pytest.mark.parametrize("better", [{"fused_swiglu": True}, {"fused_norm": True}, {"fused_cross_entropy": True}])
def test_fused_kernels_save_time(better):
    plain, fused = Kernels(), Kernels(**better)
    assert step(**LAYOUT, kernels=fused).seconds < step(**LAYOUT, kernels=plain).seconds


def test_attention_kernels_are_ordered():
    times = [
        step(**LAYOUT, kernels=kernels).seconds
        for kernels in (Kernels(flash_attention=False), Kernels(), Kernels(attention_generation=3))
    ]
    assert times == sorted(times, reverse=True)
    # made for Hopper: on Ampere there is only one kind
    assert step(A100, kernels=Kernels()).seconds == step(A100, kernels=Kernels(attention_generation=3)).seconds


def test_overlap_hides_messages_in_order():
    exposed = [
        step(**LAYOUT, kernels=Kernels(tensor_overlap=overlap)).breakdown["tensor_messages"]
        for overlap in ("none", "backward", "full")
    ]
    assert exposed == sorted(exposed, reverse=True) and exposed[0] > 2 * exposed[-1]


def test_tensor_parallelism_over_nodes_is_dear():
    inside, across = (step(tensor=t, data=32 // t, batch=128).breakdown["tensor_messages"] for t in (8, 16))
    assert across > 2 * inside


def test_fp8_is_faster_and_refused_where_there_is_none():
    assert step(**LAYOUT, precision="fp8").seconds < 0.85 * step(**LAYOUT).seconds
    with pytest.raises(ValueError, match="a100_80gb_sxm has no fp8"):
        step(A100, **LAYOUT, precision="fp8")


def test_fp32_runs_without_tensor_cores_and_moves_twice_the_bytes():
    long = {"preset": "llama2_7b", "sequence": 131072, "tensor": 4, "pipeline": 2, "data": 8, "batch": 32}
    narrow, wide = (step(**long, precision=precision) for precision in ("bf16", "fp32"))
    ratio = H100.peak_teraflops_16bit / H100.peak_teraflops_fp32
    for kind in ("attention", "matrices"):
        assert wide.breakdown[kind] == pytest.approx(ratio * narrow.breakdown[kind], rel=0.15)
    for kind in ("elementwise", "pipeline_messages"):
        assert wide.breakdown[kind] == pytest.approx(2 * narrow.breakdown[kind], rel=0.05)
    assert wide.mfu_causal_attention < 0.9


def test_context_parallelism_splits_the_work():
    one, two = (step(preset="llama3_8b", sequence=32768, context=c, batch=8).seconds for c in (1, 2))
    assert 0.5 * one < two < 0.7 * one


def test_a_ring_of_context_parallel_ranks_is_as_fast_as_its_slowest_link():
    links = Links.of(H100, fitted())
    inside, across = links.message(1e8, 1), links.message(1e8, 8)
    assert links.step(1e8, 2, 4) == links.step(1e8, 8, 1) == inside
    assert links.step(1e8, 4, 4) == links.step(1e8, 16, 1) == links.step(1e8, 2, 8) == across > 5 * inside


def test_replicas_share_the_optimizer():
    alone, shared = (step(tensor=8, data=d, batch=32 * d).breakdown["optimizer"] for d in (1, 8))
    assert shared < alone
    whole = step(tensor=8, data=8, batch=256, distributed_optimizer=False).breakdown["optimizer"]
    assert whole == pytest.approx(alone)


def test_gradients_travel_behind_the_backward_pass():
    wide = {"tensor": 8, "data": 64, "batch": 512}
    plain = step(**wide, overlap_grad_reduce=False, overlap_param_gather=False).breakdown["data_parallel"]
    reduced, both = (step(**wide, overlap_grad_reduce=True, overlap_param_gather=g) for g in (False, True))
    assert both.breakdown["data_parallel"] < reduced.breakdown["data_parallel"] < plain


@pytest.mark.parametrize("pipeline", [2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_closed_form_is_near_the_replay(pipeline, chunks, recompute):
    for batch in (8, 64):
        planned = job(tensor=4, pipeline=pipeline, chunks=chunks, batch=batch, recompute=recompute)
        near, exact = (predict(planned, H100, fitted(), exact=way).seconds for way in (False, True))
        assert near == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("counts", [(5, 6, 5), (7, 7, 6), (1, 3, 3, 3, 3, 3, 3, 1), (2, 3, 3, 3, 3, 2)])
@pytest.mark.parametrize("rounds", [1, 2, 5, 60])
@pytest.mark.parametrize("vocabulary", [32000, 256000])
def test_interleaved_stages_that_are_unequal_are_replayed(counts, rounds, vocabulary):
    layers = tuple((count, count) for count in counts)
    model = {"num_layers": 2 * sum(counts), "vocab_size": vocabulary}
    planned = replace(
        job("llama2_13b", batch=rounds * len(counts)), **model, pipeline=len(counts), chunks=2, layers=layers
    )
    near, exact = (predict(planned, H100, fitted(), exact=way) for way in (False, True))
    assert near.seconds == pytest.approx(exact.seconds, rel=0.005)
    # negative control: the closed form, where the last chunk is one layer of three and a large output layer
    if min(counts) == 1 and rounds == 60 and vocabulary == 256000:
        assert pipeline_seconds(near.chunks, planned.micro_batches, near.message_seconds) < 0.95 * exact.seconds


def test_the_closed_form_is_exact_for_equal_stages():
    for pipeline, chunks, micro_batches in ((2, 1, 5), (4, 1, 4), (4, 2, 8), (8, 3, 24)):
        equal = tuple((ChunkTime(1.0, 2.0),) * chunks for _ in range(pipeline))
        expected = 3.0 * (micro_batches * chunks + pipeline - 1)
        assert pipeline_seconds(equal, micro_batches, 0.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 16])
def test_the_closed_form_bears_unequal_stages(micro_batches):
    generator = random.Random(0)
    for _ in range(60):
        stages = [[generator.uniform(0.7, 1.3)] * 2 for _ in range(generator.choice((2, 3, 4, 8)))]
        chunks = tuple((ChunkTime(forward, 2 * backward),) for forward, backward in stages)
        made = StepTime(
            seconds=0.0,
            breakdown={},
            critical_stage=0,
            chunks=chunks,
            message_seconds=0.0,
            tokens_per_second_per_gpu=0.0,
            mfu_full_attention=0.0,
            mfu_causal_attention=0.0,
        )
        exact = step_seconds(made.timeline(micro_batches))
        assert pipeline_seconds(chunks, micro_batches, 0.0) == pytest.approx(exact, rel=0.02)
        # negative control: as if all stages were the mean one
        if max(max(stages)) > 1.25:
            mean = sum(c.forward + c.backward for (c,) in chunks) / len(chunks)
            assert micro_batches < 16 or mean * (micro_batches + len(chunks) - 1) < 0.99 * exact


def test_the_timeline_is_what_the_exact_step_took():
    planned = job(**LAYOUT)
    made = predict(planned, H100, fitted(), exact=True)
    rest = sum(made.breakdown[kind] for kind in ("data_parallel", "optimizer", "other"))
    assert step_seconds(made.timeline(planned.micro_batches)) == pytest.approx(made.seconds - rest, rel=1e-9)


def test_what_jobs_share_is_worked_out_once_and_is_the_same():
    model, planned = TimeModel(H100, fitted()), job(**LAYOUT)
    assert model.predict(planned) == model.predict(planned) == predict(planned, H100, fitted())
    other = replace(planned, micro_batch_size=2)
    assert model.predict(other) == predict(other, H100, fitted()) != model.predict(planned)
