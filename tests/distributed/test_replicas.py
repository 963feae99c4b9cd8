"""A bit that flips in one replica is found and named; clean steps of all layouts raise no alarm."""

import pytest

from tests.support.poison import flip
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, take_steps

P = "parallel."
REPLICATED = f"{P}distributed_optimizer=false"


def check_of(run):
    from megalemur.train.replicas import ReplicaCheck, circles_of

    engine = run.engine
    circles = lambda: circles_of(run.config, run.place, engine.chunks, engine.optimizer, run.segments)  # noqa: E731
    return ReplicaCheck(run.place, circles, every=1, steps_taken=0), circles


def flip_one_after_another(config, culprit, wanted):
    """Flip a bit of every tensor of the culprit whose name contains `wanted`, one at a time: what was said of each."""
    from megalemur.checkpoint.exchange import Peers

    run = start(config)
    take_steps(run, 1)
    check, circles = check_of(run)
    clean = check.compare()
    mine = {held.name: held.tensor for circle in circles() for held in circle.held if wanted in held.name}
    names = Peers(run.place.cpu_group).all_gather(sorted(mine))[culprit]
    said = []
    for number, name in enumerate(names):
        for _ in range(2):  # the second flip mends it
            if run.place.rank == culprit:
                tensor = mine[name]
                flip(tensor, number * 7919 % tensor.numel(), number % (8 * tensor.element_size()))
            said.append((name, [event.text for event in check.compare()]))
    return clean, said


def assert_each_is_found(results, culprits, kinds):
    clean, said = results[0]
    assert all(result == (clean, said) for result in results), "all ranks know the same"
    assert clean == [] and said
    for name, texts in said[::2]:
        assert len(texts) == 1 and name in texts[0], (name, texts)
        assert all(f"rank {rank} (" in texts[0] for rank in culprits), texts
    assert all(texts == [] for _, texts in said[1::2])
    assert {name.rpartition("(")[2].rstrip(")") for name, _ in said} == kinds


def test_every_parameter_master_and_moment_of_a_replica_is_watched_without_the_distributed_optimizer(tmp_path):
    layout = (f"{P}data=3", "data.global_batch_size=6", REPLICATED)
    config = tiny_run(tmp_path, *layout, "precision.dtype=bf16", num_layers=1)
    results = run_ranks(3, flip_one_after_another, config, 1, "")
    assert_each_is_found(results, [1], {"parameter", "master", "exp_avg", "exp_avg_sq"})
    assert all("rank 0 (" not in texts[0] and "replicas 0, 2" in texts[0] for _, texts in results[0][1][::2])


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_norms_are_watched_over_tensor_parallel_ranks(tmp_path, distributed):
    layout = (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}distributed_optimizer={distributed}")
    config = tiny_run(tmp_path, *layout, "precision.dtype=bf16", num_layers=4)
    results = run_ranks(4, flip_one_after_another, config, 2, "norm.weight")
    # of two, nobody knows which one is right: both are named
    assert_each_is_found(results, [2, 3], {"parameter", "master", "exp_avg", "exp_avg_sq"})


def test_parameters_are_watched_with_the_distributed_optimizer(tmp_path):
    config = tiny_run(tmp_path, f"{P}data=2", "precision.dtype=bf16", num_layers=2)
    results = run_ranks(2, flip_one_after_another, config, 1, "")
    assert_each_is_found(results, [0, 1], {"parameter"})


def test_a_tied_embedding_is_watched_over_the_ends_of_the_pipeline(tmp_path):
    config = tiny_run(tmp_path, f"{P}pipeline=2", num_layers=2, tie_embeddings=True)
    results = run_ranks(2, flip_one_after_another, config, 1, "embed_tokens")
    assert_each_is_found(results, [0, 1], {"parameter", "exp_avg", "exp_avg_sq"})


def run_with_a_flip(config, before_step, kind):
    """The whole loop; rank 1 flips a bit of the last norm's state, or of the first that it owns, before a step."""
    from megalemur.train.agreement import StopRequest
    from megalemur.train.guard import ReplicaError
    from megalemur.train.loop import run_loop
    from megalemur.train.replicas import norms_of

    run = start(config)
    events = []

    class Flipping:
        def after_step(self, report):
            events.extend(report.events)
            if report.step == before_step - 1 and run.place.rank == 1:
                if kind == "norm":
                    flip(norms_of(run.config, run.engine.chunks)[0], 3, 9)
                    return
                pieces = [p for p in run.pieces() if p.kind == kind]
                last = next((p for p in pieces if p.name == "model.norm.weight"), pieces[0])
                flip(last.tensor, 3, 20)

        def at_save(self, step, path, seconds):
            pass

        def at_end(self):
            pass

    try:
        with StopRequest() as stop:
            run_loop(run, [Flipping()], stop)
    except ReplicaError as error:
        return run.state.step, str(error), [event.kind for event in events], dict(events[-1].facts)
    return run.state.step, "", [event.kind for event in events], {}


def test_the_run_stops_within_k_steps_and_says_who(tmp_path):
    config = tiny_run(tmp_path, f"{P}data=3", "data.global_batch_size=6", REPLICATED, "run.check_replicas_every=4")
    results = run_ranks(3, run_with_a_flip, config, 6, "exp_avg_sq")
    step, said, kinds, facts = results[0]
    assert all(result == results[0] for result in results)
    assert step == 8 and kinds == ["replicas"], "steps 4 and 8 compare; the flip came in between"
    assert "model.norm.weight (exp_avg_sq): rank 1 (tp0 pp0 dp1) differs from replicas 0, 2" in said
    assert facts["ranks"] == "1" and facts["tensors"] >= 1
    assert not list((tmp_path / "checkpoints").glob("step_*")), "what has come apart is not saved"


def test_a_norm_that_tensor_parallel_ranks_share_is_found_in_the_step_that_used_it(tmp_path):
    layout = (f"{P}tensor=2", f"{P}pipeline=2", "precision.dtype=bf16", "run.check_replicas_every=100")
    config = tiny_run(tmp_path, *layout, num_layers=4)
    for step, said, kinds, _ in run_ranks(4, run_with_a_flip, config, 6, "norm"):
        assert (step, kinds) == (6, ["replicas"])
        assert "model.layers.0.input_layernorm.weight (parameter)" in said and "rank 1 (tp1 pp0 dp0)" in said


def test_with_the_distributed_optimizer_a_gather_heals_what_flips_between_two_steps(tmp_path):
    """What docs/guards.md says that the check cannot see."""
    config = tiny_run(tmp_path, f"{P}data=2", "run.check_replicas_every=1", "run.stop_at=8")
    for step, said, kinds, _ in run_ranks(2, run_with_a_flip, config, 6, "exp_avg_sq"):
        assert (step, said, kinds) == (8, "", [])


CLEAN = {
    "tp2 without sequence parallelism": (f"{P}tensor=2", f"{P}sequence=false"),
    "tp2 pp2 vp2 dp2": (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}data=2"),
    "dp2 overlapped": (f"{P}data=2", f"{P}overlap_grad_reduce=true", f"{P}overlap_param_gather=true"),
    "tp2 dp2 replicated": (f"{P}tensor=2", f"{P}data=2", REPLICATED),
    "pp2 dp2": (f"{P}pipeline=2", f"{P}data=2"),
}


def clean_steps(config):
    run = start(config)
    take_steps(run, 6)
    return run.engine.guard.take_events()


@pytest.mark.parametrize("layout", CLEAN.values(), ids=CLEAN.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_clean_steps_raise_no_alarm(tmp_path, layout, tied):
    precision = "fp32" if tied else "bf16"
    every = ("run.check_replicas_every=1", f"precision.dtype={precision}")
    config = tiny_run(tmp_path, *layout, *every, tie_embeddings=tied)
    assert run_ranks(config.parallel.world_size, clean_steps, config) == [()] * config.parallel.world_size
