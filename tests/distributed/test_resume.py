"""Saving in one layout and loading in another changes no bit; resuming continues as if nothing had happened."""

import pytest
import torch

from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader
from megalemur.parallel.state import MASTER, whole
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_llama
from tests.support.training import take_steps, train_and_save, whole_state

P = "parallel."
LAYOUTS = {
    "one": (),
    "tp4": (f"{P}tensor=4",),
    "tp2 pp2 vp2": (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2"),
    "pp4 uneven": (f"{P}pipeline=4", f"{P}first_stage_layers=1", f"{P}last_stage_layers=1"),
    "dp4": (f"{P}data=4",),
    "dp2 replicated": (f"{P}data=2", f"{P}distributed_optimizer=false"),
}
# every layout writes for two others and reads from two others
PAIRS = [(a, b) for i, a in enumerate(LAYOUTS) for b in (list(LAYOUTS) * 2)[i + 1 : i + 3]]


def load_and_save(config, to):
    """Resume and write what was loaded, without a step."""
    from megalemur.checkpoint.save import save_checkpoint
    from megalemur.train.saving import contents_of
    from tests.support.training import start

    run = start(config)
    group = run.place.cpu_group if run.place.world_size > 1 else None
    return save_checkpoint(to, contents_of(run), group=group, max_file_bytes=config.checkpoint.max_file_bytes)


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps of every layout, saved."""
    found = {}
    for name, layout in LAYOUTS.items():
        directory = tmp_path_factory.mktemp("resume")
        config = tiny_run(directory, *layout, "run.stop_at=3", start_from=write_llama(directory / "hf"))
        found[name] = (directory, run_ranks(config.parallel.world_size, train_and_save, config)[0][1])
    return found


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=[f"{a} to {b}" for a, b in PAIRS])
def test_another_layout_loads_every_bit(trained, tmp_path, writer, reader):
    directory, path = trained[writer]
    config = tiny_run(directory, *LAYOUTS[reader])
    again = run_ranks(config.parallel.world_size, load_and_save, config, tmp_path / "again")[0]
    assert_bit_equal(whole_state(path), whole_state(again))
    for key in ("run", "data"):
        assert CheckpointReader(path).state[key] == CheckpointReader(again).state[key]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", [(), (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}data=2")], ids=["one", "tp2 pp2 vp2 dp2"]
)
def test_five_steps_and_five_more_are_ten(tmp_path, dtype, layout):
    model = write_llama(tmp_path / "hf")
    here = (*layout, f"precision.dtype={dtype}", f"checkpoint.directory={tmp_path}/halves")
    first, second = (tiny_run(tmp_path, *here, *more, start_from=model) for more in (("run.stop_at=5",), ()))
    whole_run = tiny_run(tmp_path, *layout, f"precision.dtype={dtype}", start_from=model)
    world = first.parallel.world_size
    expected, path = run_ranks(world, train_and_save, whole_run)[0]
    begun, _ = run_ranks(world, train_and_save, first)[0]
    ended, resumed = run_ranks(world, train_and_save, second)[0]
    assert begun + ended == expected
    assert_bit_equal(whole_state(path), whole_state(resumed))


def zero_steps(config):
    from megalemur.train.saving import save_run
    from tests.support.training import start

    run = start(config)
    assert take_steps(run, 0) == []
    return save_run(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_hugging_face_in_and_out_is_the_identity(tmp_path, dtype, precision):
    from transformers import LlamaConfig

    model = write_llama(tmp_path / "hf", dtype=dtype)
    layout = (f"{P}tensor=2", f"{P}pipeline=2", "run.steps=0", "schedule.warmup_steps=0")
    config = tiny_run(tmp_path, *layout, f"precision.dtype={precision}", start_from=model)
    path = run_ranks(4, zero_steps, config)[0]
    source, result = HuggingFaceReader(model), HuggingFaceReader(path)
    assert source.dtypes == result.dtypes
    for name, shape in source.shapes.items():
        assert torch.equal(source.read(name, MASTER, whole(shape)), result.read(name, MASTER, whole(shape))), name
    assert LlamaConfig.from_pretrained(model).to_dict() == LlamaConfig.from_pretrained(path).to_dict()
