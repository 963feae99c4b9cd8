"""The run files that are shipped load without a problem and say what their comments promise."""

from pathlib import Path

import pytest

from megalemur.config.load import load_run
from megalemur.config.run import RunConfig

RUNS = Path(__file__).parents[3] / "launch" / "runs"
CODE = {"python", "sql", "java", "shell", "notebook", "javascript", "c", "php", "cpp", "other_code"}
GIB = 2**30


@pytest.fixture(scope="module")
def lemur() -> RunConfig:
    return load_run(RUNS / "llama2_70b_pretrain.yaml")


@pytest.mark.parametrize("path", sorted(RUNS.iterdir()), ids=lambda path: path.name)
def test_every_run_file_loads_and_is_named_after_its_run(path: Path):
    assert load_run(path).run.name == path.stem


@pytest.mark.parametrize(("name", "processes"), [("quickstart", 8), ("llama2_7b_8gpu", 8), ("llama2_70b_pretrain", 64)])
def test_run_files_need_the_processes_they_say(name: str, processes: int):
    assert load_run(RUNS / f"{name}.yaml").parallel.world_size == processes


def test_quickstart_splits_the_model_in_every_way():
    parallel = load_run(RUNS / "quickstart.yaml").parallel
    assert min(parallel.tensor, parallel.pipeline, parallel.chunks, parallel.data) == 2
    assert parallel.sequence_parallel and parallel.distributed_optimizer


def test_70b_sees_90_billion_tokens_in_steps_of_4_million(lemur: RunConfig):
    assert lemur.tokens_per_step == 4 * 2**20
    seen = lemur.run.steps * lemur.tokens_per_step
    assert 0 <= seen - 90e9 < lemur.tokens_per_step


def test_70b_blends_code_and_text_ten_to_one(lemur: RunConfig):
    weights = {source.name: source.weight for source in lemur.data.sources}
    code = sum(weight for name, weight in weights.items() if name in CODE)
    text = sum(weight for name, weight in weights.items() if name not in CODE)
    assert set(weights) > CODE
    assert sum(weights.values()) == pytest.approx(99.9)
    assert code / text == pytest.approx(10, rel=5e-3)


def test_70b_takes_the_rates_of_the_paper(lemur: RunConfig):
    assert (lemur.optim.learning_rate, lemur.optim.beta1, lemur.optim.beta2) == (4e-5, 0.9, 0.95)
    assert lemur.optim.clip_grad_norm == 1.0
    assert (lemur.schedule.kind, lemur.schedule.warmup_steps, lemur.schedule.min_ratio) == ("cosine", 2000, 0.1)


def state_bytes(run: RunConfig) -> float:
    """Weights, gradients, masters and moments of a rank of the first stage."""
    assert run.parallel.distributed_optimizer and run.precision.dtype == "bf16"
    layers = run.model.num_layers / run.parallel.pipeline * run.model.parameters_per_layer
    embedding = run.model.vocab_size * run.model.hidden_size
    bytes_a_parameter = 6 + 12 / run.parallel.data  # bf16 weight and fp32 gradient; masters and two moments over DP
    return (layers + embedding) / run.parallel.tensor * bytes_a_parameter


def activation_bytes(run: RunConfig) -> float:
    """What the first stage keeps for the backward passes of the micro-batches under way, schedule of Narayanan et al.
    2021, section 2.2."""
    stages, chunks = run.parallel.pipeline, run.parallel.chunks
    under_way = stages if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages + 1
    layers = run.model.num_layers / stages / chunks
    # counted on the torch backend with saved-tensor hooks, the norms' fp32 copies included, at the 70B shape; 7B: 61
    bytes_a_token = 63 * run.model.hidden_size / run.parallel.tensor
    return under_way * layers * bytes_a_token * run.data.sequence_length * run.data.micro_batch_size


@pytest.mark.parametrize("name", ["llama2_7b_8gpu", "llama2_70b_pretrain"])
def test_what_the_first_stage_holds_leaves_a_tenth_of_80_gb_free(name: str):
    run = load_run(RUNS / f"{name}.yaml")
    assert run.parallel.sequence_parallel and run.precision.recompute == "none"
    assert state_bytes(run) + activation_bytes(run) < 0.9 * 80 * GIB


def test_the_70b_layout_that_others_publish_would_not_leave_it_without_fused_kernels():
    run = load_run(RUNS / "llama2_70b_pretrain.yaml", ["parallel.pipeline=4", "parallel.data=4"])
    assert state_bytes(run) + activation_bytes(run) > 0.9 * 80 * GIB


@pytest.mark.parametrize("name", ["llama2_7b_8gpu", "llama2_70b_pretrain"])
def test_tensor_parallelism_stays_within_a_node_of_8(name: str):
    assert 8 % load_run(RUNS / f"{name}.yaml").parallel.tensor == 0
