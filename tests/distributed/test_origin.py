"""What a run starts from: the newest checkpoint without damage, or what the run file names, never less."""

import json
import shutil

import pytest
import torch

from megalemur.checkpoint.directory import checkpoint_directories, open_manifest
from megalemur.checkpoint.manifest import MANIFEST, dump_manifest, without_trainer
from megalemur.checkpoint.read import CheckpointReader
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import start, take_steps, train_and_save, whole_state

P = "parallel."
LAYOUTS = {1: (), 2: (f"{P}tensor=2",), 4: (f"{P}pipeline=2", f"{P}data=2")}


def save_at(config, steps):
    """Train, and save after each of these steps."""
    from megalemur.train.saving import save_run

    run = start(config)
    for step in steps:
        take_steps(run, step)
        save_run(run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with checkpoints of steps 2, 4 and 6, and what they hold."""
    directory = tmp_path_factory.mktemp("origin")
    config = tiny_run(directory, num_layers=2)
    run_ranks(1, save_at, config, (2, 4, 6))
    return directory, {step: whole_state(at(directory, step)) for step in (2, 4, 6)}


def at(directory, step):
    return directory / "checkpoints" / f"step_{step:06d}"


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that directory, to be damaged."""
    directory, states = trained
    shutil.copytree(directory, tmp_path / "run")
    return tmp_path / "run", states


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 16
    path.write_bytes(data)


def begin(config):
    """(step, where from, warnings) of a run that starts, after it saved what it holds elsewhere."""
    import logging

    from megalemur.checkpoint.save import save_checkpoint
    from megalemur.train.saving import contents_of

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megalemur").addHandler(handler)
    run = start(config)
    origin = None if run.origin.reader is None else run.origin.reader.path
    elsewhere = config.checkpoint.directory.parent / "again"
    saved = save_checkpoint(elsewhere, contents_of(run), group=run.place.cpu_group, max_file_bytes=1 << 30)
    return run.state, origin, said, saved


def begun(directory, *overrides, ranks=1):
    config = tiny_run(directory, *LAYOUTS[ranks], *overrides, num_layers=2)
    return run_ranks(ranks, begin, config)[0]


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


DAMAGE = {
    "moments": lambda path: flip(path / "trainer" / "rank-00000.safetensors"),
    "weights that no rank wants": lambda path: flip(path / "model.safetensors"),
    "state": lambda path: flip(path / "trainer" / "state.json"),
    "config": lambda path: flip(path / "config.json"),
    "run file": lambda path: flip(path / "run.yaml"),
    "zeroes": lambda path: (path / "model.safetensors").write_bytes(bytes((path / "model.safetensors").stat().st_size)),
    "manifest": lambda path: flip(path / "manifest.json"),
    "gone": lambda path: (path / "model.safetensors").unlink(),
    "renamed": lambda path: path.rename(path.with_name("step_000009")),
    "linked": lambda path: (path.rename(path.with_name("real")), path.symlink_to(path.with_name("real"))),
}


@pytest.mark.parametrize(("damage", "ranks"), [("moments", 1), *((damage, 2) for damage in DAMAGE)])
def test_a_damaged_checkpoint_is_named_and_the_next_older_one_is_resumed(copy, damage, ranks):
    directory, states = copy
    DAMAGE[damage](at(directory, 6))
    state, origin, said, saved = begun(directory, ranks=ranks)
    assert state.step == 4 and state.samples == 32 and origin == at(directory, 4)
    assert_bit_equal(whole_state(saved), states[4])
    named = [line for line in said if line.startswith("passed over")]
    assert len(named) == 1 and ("step_000006" in named[0] or "step_000009" in named[0])


def test_two_damaged_ones_are_passed_over_by_four_ranks(copy):
    directory, states = copy
    for step in (6, 4):
        DAMAGE["moments"](at(directory, step))
    state, origin, said, saved = begun(directory, ranks=4)
    assert state.step == 2 and origin == at(directory, 2)
    assert_bit_equal(whole_state(saved), states[2])
    assert sum(line.startswith("passed over") for line in said) == 2


@pytest.mark.parametrize("damage", ["moments", "state"])
def test_a_damaged_checkpoint_is_out_of_the_way_of_the_next_save(copy, damage):
    directory, states = copy
    DAMAGE[damage](at(directory, 6))
    config = tiny_run(directory, "run.stop_at=6", num_layers=2)
    ((_, path),) = run_ranks(1, train_and_save, config)
    assert path == at(directory, 6)
    assert_bit_equal(whole_state(path), states[6])
    assert len(list((directory / "checkpoints").glob("step_000006.damaged-*"))) == 1


def failure(config):
    try:
        start(config)
    except Exception as error:
        from megalemur.cli.failures import code_of

        return type(error).__name__, str(error), code_of(error)
    return None


@pytest.mark.parametrize("ranks", [2])
def test_no_good_checkpoint_is_never_a_run_from_scratch(copy, ranks):
    directory, _ = copy
    for step, damage in ((6, "moments"), (4, "state"), (2, "weights that no rank wants")):
        DAMAGE[damage](at(directory, step))
    for kind, said, code in run_ranks(ranks, failure, tiny_run(directory, *LAYOUTS[ranks], num_layers=2)):
        assert kind == "NoGoodCheckpoint" and code == 13
        assert all(part in said for part in ("3 checkpoints", "rank-00000", "state.json", "model.safetensors"))


def drop_trainer(path):
    """As retention does: the manifest says so, then the files go."""
    manifest = open_manifest(path)
    (path / MANIFEST).write_bytes(dump_manifest(without_trainer(manifest)))
    shutil.rmtree(path / "trainer")


def test_a_checkpoint_without_its_trainer_part_is_not_resumed(copy):
    directory, _ = copy
    drop_trainer(at(directory, 6))
    state, origin, said, _ = begun(directory)
    assert state.step == 4 and origin == at(directory, 4)
    assert [line for line in said if "was dropped" in line and "step_000006" in line]
    assert at(directory, 6).is_dir(), "its weights are good"


def elsewhere(path, *more):
    return (f"checkpoint.directory={path}/new", *more)


def test_the_weights_of_a_dropped_checkpoint_start_a_run(copy, tmp_path):
    directory, states = copy
    drop_trainer(at(directory, 6))
    state, origin, _, saved = begun(directory, *elsewhere(tmp_path, f"checkpoint.start_from={at(directory, 6)}"))
    assert state.step == 0 and origin == at(directory, 6)
    found = whole_state(saved)
    for name, value in states[6].items():
        kind = name.split("/")[0]
        assert torch.equal(found[name], value if kind == "master" else torch.zeros_like(value)), name


def test_moments_are_not_dropped_in_silence(copy, tmp_path):
    directory, _ = copy
    here = elsewhere(tmp_path, f"checkpoint.start_from={at(directory, 6)}")
    ((kind, said, code),) = run_ranks(1, failure, tiny_run(directory, *here, num_layers=2))
    assert kind == "ValueError" and code == 11
    assert "moments and counters of step 6" in said
    assert "checkpoint.load=weights" in said and "checkpoint.load=all" in said


@pytest.mark.parametrize("ranks", [2])
def test_load_weights_takes_masters_and_nothing_else(copy, tmp_path, ranks):
    directory, states = copy
    more = (f"checkpoint.start_from={at(directory, 6)}", "checkpoint.load=weights")
    state, _, _, saved = begun(directory, *elsewhere(tmp_path, *more), ranks=ranks)
    assert state.step == state.samples == state.updates == 0
    found = whole_state(saved)
    for name, value in states[6].items():
        assert torch.equal(found[name], value if name.startswith("master/") else torch.zeros_like(value)), name


@pytest.mark.parametrize("ranks", [2])
def test_load_all_goes_on_with_the_run(copy, tmp_path, ranks):
    directory, states = copy
    more = (f"checkpoint.start_from={at(directory, 4)}", "checkpoint.load=all")
    state, _, _, saved = begun(directory, *elsewhere(tmp_path, *more), ranks=ranks)
    assert state.step == state.updates == 4 and state.samples == 32
    assert_bit_equal(whole_state(saved), states[4])
    wanted, found = (CheckpointReader(path).state for path in (at(directory, 4), saved))
    assert found["data"] == wanted["data"]


def test_load_all_wants_a_checkpoint_with_everything(copy, tmp_path):
    directory, _ = copy
    drop_trainer(at(directory, 6))
    llama = write_llama(tmp_path / "hf", num_layers=2)
    for path, part in ((at(directory, 6), "has lost its trainer/"), (llama, "directory without moments")):
        here = elsewhere(tmp_path, f"checkpoint.start_from={path}", "checkpoint.load=all")
        ((kind, said, code),) = run_ranks(1, failure, tiny_run(directory, *here, num_layers=2))
        assert kind == "ValueError" and code == 11 and part in said


@pytest.mark.parametrize("load", ["weights", "all"])
def test_a_damaged_start_is_refused_and_stays_where_it_is(copy, tmp_path, load):
    directory, _ = copy
    DAMAGE["weights that no rank wants"](at(directory, 6))
    here = elsewhere(tmp_path, f"checkpoint.start_from={at(directory, 6)}", f"checkpoint.load={load}")
    for kind, said, code in run_ranks(2, failure, tiny_run(directory, *here, *LAYOUTS[2], num_layers=2)):
        assert kind == "DamagedCheckpoint" and code == 13 and "model.safetensors" in said
    assert at(directory, 6).is_dir()


def test_a_state_file_of_another_program_is_damage(copy):
    """Right digests, wrong contents: the manifest vouches for what was written, not for sense."""
    from dataclasses import replace

    from megalemur.checkpoint.digests import entry_of

    directory, _ = copy
    path = at(directory, 6)
    manifest = open_manifest(path)
    for state in ([], {}, {"run": {}, "data": {}}, {"run": None, "data": 1}):
        data = json.dumps(state).encode()
        (path / "trainer" / "state.json").write_bytes(data)
        files = {**manifest.files, "trainer/state.json": entry_of(data)}
        (path / MANIFEST).write_bytes(dump_manifest(replace(manifest, files=files)))
        found, _, said, saved = begun(directory)
        assert found.step == 4 and any("state.json: cannot be used" in line for line in said)
        shutil.rmtree(saved)
        (moved,) = (directory / "checkpoints").glob("step_000006.damaged-*")
        moved.rename(path)


def restore_to_the_beginning(config):
    """The first two steps, and again after going back to where there is no checkpoint yet."""
    from megalemur.train.setup import restore

    run = start(config)
    first = take_steps(run, 2)
    restore(run)
    assert run.state.step == run.state.updates == 0
    return first, take_steps(run, 2)


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(tmp_path):
    config = tiny_run(tmp_path, *LAYOUTS[2], num_layers=2)
    for first, second in run_ranks(2, restore_to_the_beginning, config):
        assert first == second


def restore_twice(config):
    """(step, samples, loss) after each of: three steps, back, three steps, back and three steps."""
    from megalemur.train.setup import restore

    run = start(config)
    told = [take_steps(run, 9)]
    for _ in range(2):
        restore(run)
        assert run.state.step == 6 and run.state.samples == 48
        told.append(take_steps(run, 9))
    return told


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_back_in_process_and_does_the_same_again(copy, ranks):
    directory, _ = copy
    config = tiny_run(directory, *LAYOUTS[ranks], num_layers=2)
    for first, second, third in run_ranks(ranks, restore_twice, config):
        assert first == second == third and len(first) == 3
    assert checkpoint_directories(directory / "checkpoints")[0] == at(directory, 6)


def generated_from(path):
    """The type of the error of loading a model for generation; None where it loads."""
    from megalemur.config.parallel import ParallelConfig
    from megalemur.config.precision import PrecisionConfig
    from megalemur.generate.run import load_model
    from megalemur.parallel.groups import join

    join(ParallelConfig(), timeout_seconds=60)
    try:
        load_model(path, PrecisionConfig(dtype="fp32"))
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_text_is_generated_from_damaged_weights(copy, name):
    directory, _ = copy
    assert run_ranks(1, generated_from, at(directory, 6)) == [None]
    flip(at(directory, 6) / name)
    ((kind, said),) = run_ranks(1, generated_from, at(directory, 6))
    assert kind == "DamagedCheckpoint" and name in said
