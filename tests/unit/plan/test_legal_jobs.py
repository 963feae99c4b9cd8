"""Whatever a run file may say has a plan that makes sense, and the search says the same of it as the plan."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megalemur.config.load import ConfigError, load_run
from megalemur.config.presets import PRESETS
from megalemur.config.run import RunConfig
from megalemur.plan.better import look_for_better
from megalemur.plan.cluster import load_cluster
from megalemur.plan.document import document
from megalemur.plan.memory import peak_memory
from megalemur.plan.search import overrides
from megalemur.plan.whole import make_plan

ROOT = Path(__file__).parents[3]
RUN = ROOT / "launch/runs/llama2_7b_8gpu.yaml"
CLUSTERS = [load_cluster(str(path)) for path in sorted((ROOT / "launch/clusters").glob("*.yaml"))]
OFTEN_REFUSED = {"deadline": None, "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow]}

MODELS = st.fixed_dictionaries(
    {
        "model.preset": st.sampled_from(sorted(PRESETS)),
        "model.max_position_embeddings": st.just(131072),
        "model.backend": st.sampled_from(["torch", "transformer_engine"]),
        "data.sequence_length": st.sampled_from([512, 2048, 4096, 32768, 131072]),
        "precision.reduce_grads_in_fp32": st.sampled_from(["true", "false"]),
    },
    optional={
        "model.vocab_size": st.sampled_from([151, 32001, 50257, 256000]),
        "model.tie_embeddings": st.just("true"),
        "parallel.pad_vocab_to": st.just(1),
        "precision.fp8": st.just("hybrid"),
        "precision.dtype": st.just("fp32"),
        "optim.kind": st.just("adamw"),
        "checkpoint.asynchronous": st.just("false"),
    },
)
WIDTHS = st.fixed_dictionaries(
    {
        "parallel.tensor": st.sampled_from([1, 2, 4, 8, 16]),
        "parallel.data": st.sampled_from([1, 2, 3, 64, 512]),
        "parallel.overlap_grad_reduce": st.sampled_from(["true", "false"]),
        "parallel.overlap_param_gather": st.just("false"),
        "parallel.distributed_optimizer": st.sampled_from(["true", "false"]),
    },
    optional={"parallel.sequence": st.just("false"), "parallel.context": st.sampled_from([2, 4, 8])},
)
DEPTHS = st.fixed_dictionaries(
    {"parallel.pipeline": st.sampled_from([1, 2, 4, 8, 16]), "parallel.chunks": st.sampled_from([1, 1, 2, 5])},
    optional={"parallel.first_stage_layers": st.integers(1, 4), "parallel.last_stage_layers": st.integers(1, 4)},
)
RECOMPUTE = st.one_of(
    st.just({"precision.recompute": "none"}),
    st.fixed_dictionaries(
        {
            "precision.recompute": st.just("selective"),
            "precision.recompute_modules": st.sampled_from(["[core_attn]", "[mlp]", "[core_attn, mlp]"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "precision.recompute": st.just("full"),
            "precision.recompute_method": st.sampled_from(["uniform", "block"]),
            "precision.recompute_layers": st.integers(1, 3),
        }
    ),
)


def loaded(values: dict[str, object]) -> RunConfig:
    """The run file with these settings; examples that it refuses are none."""
    try:
        return load_run(RUN, [f"{name}={value}" for name, value in values.items()])
    except ConfigError:
        assume(False)
        raise


def figures(value: object) -> list[float]:
    """Every number of a document."""
    if isinstance(value, dict):
        return [figure for one in value.values() for figure in figures(one)]
    if isinstance(value, list | tuple):
        return [figure for one in value for figure in figures(one)]
    return [value] if isinstance(value, int | float) else []


@settings(max_examples=60, **OFTEN_REFUSED)
@given(MODELS, WIDTHS, DEPTHS, RECOMPUTE, st.sampled_from([1, 2, 3, 8]), st.integers(1, 20), st.sampled_from(CLUSTERS))
def test_every_legal_run_has_a_plan_of_finite_figures(model, widths, depths, recompute, micro, count, cluster):
    batch = {"data.micro_batch_size": micro, "data.global_batch_size": micro * widths["parallel.data"] * count}
    config = loaded({**model, **widths, **depths, **recompute, **batch})
    assume(not config.precision.fp8 or cluster.peak_teraflops_fp8)
    plan = make_plan(config, cluster)
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures(document(plan).model_dump()))
    assert len(plan.memory) == config.parallel.pipeline and peak_memory(plan.job) == plan.fullest.total
    assert all(stage.parameters > 0 < stage.activations_peak for stage in plan.memory)
    assert sum(plan.step.breakdown.values()) == pytest.approx(plan.step.seconds)
    assert 0 < plan.step.mfu_causal_attention < 0.9
    # no stage is quicker than its own work
    assert plan.step.seconds > max(plan.job.micro_batches * sum(map(sum, stage)) for stage in plan.step.chunks)


@settings(max_examples=15, **OFTEN_REFUSED)
@given(MODELS, st.sampled_from([1, 3, 8, 12, 64, 1000]), st.sampled_from([1, 8, 48, 1000]), st.randoms())
def test_what_the_search_finds_is_what_the_plan_says(model, gpus, batch, chosen):
    one = {f"parallel.{name}": 1 for name in ("tensor", "pipeline", "data")}
    given_ = {**model, **one, "parallel.overlap_param_gather": "false", "data.global_batch_size": batch}
    config, cluster = loaded(given_), CLUSTERS[-1]
    assume(not config.precision.fp8 or cluster.peak_teraflops_fp8)
    found = look_for_better(config, cluster, gpus).found.candidates
    for candidate in [*found[:1], *chosen.sample(found, min(5, len(found)))]:
        written = dict(line.split("=", 1) for line in overrides(candidate.job))
        plan = make_plan(load_run(RUN, [f"{name}={value}" for name, value in {**given_, **written}.items()]), cluster)
        assert plan.job == candidate.job and plan.job.world_size == gpus
        assert plan.fullest.total == candidate.peak_bytes
        assert plan.step.seconds == pytest.approx(candidate.seconds, rel=0.02)
