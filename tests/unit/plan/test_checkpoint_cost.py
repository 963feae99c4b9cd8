"""What a checkpoint weighs: Llama-2-70B by hand, and a small one beside its files."""

from itertools import chain

import pytest

from megalemur.plan.checkpoint_cost import checkpoint_cost
from tests.support.planned import planned_run
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import train_and_save

PUBLISHED = 68_976_648_192
"""Parameters of Llama-2-70B."""
LLAMA_2_70B = (
    "model.num_layers=80",
    "model.hidden_size=8192",
    "model.ffn_hidden_size=28672",
    "model.num_attention_heads=64",
    "model.num_query_groups=8",
)


def cost(*overrides, disk=5e9, **given):
    return checkpoint_cost(planned_run(*overrides), disk_bytes_per_second=disk, **given)


def test_llama_2_70b_takes_14_bytes_a_parameter():
    found = cost(*LLAMA_2_70B, "parallel.tensor=8", "parallel.pipeline=8", "parallel.data=2")
    assert (found.weights, found.whole) == (2 * PUBLISHED, 14 * PUBLISHED)
    assert found.whole_seconds == pytest.approx(14 * PUBLISHED / 5e9)
    assert found.weights_seconds == pytest.approx(2 * PUBLISHED / 5e9)
    # the fullest stage: ten layers and the output layer, over 16 ranks
    assert found.rank == pytest.approx(12 * (10 * 855_654_400 + 32000 * 8192 + 8192) / 16, rel=1e-6)


def test_weights_are_written_in_the_type_that_was_asked_for():
    narrow, wide = cost("checkpoint.export_dtype=bf16"), cost("checkpoint.export_dtype=fp32")
    assert wide.weights == 2 * narrow.weights
    assert wide.whole - narrow.whole == narrow.weights
    assert cost("precision.dtype=fp32").weights == wide.weights  # there is no source: as it is trained


def test_weights_follow_the_checkpoint_that_the_run_starts_from():
    start = ("checkpoint.start_from=nowhere", "checkpoint.export_dtype=source")
    assert cost(*start, source_width=4).weights == 2 * cost(*start).weights


@pytest.mark.parametrize("disk", [0.0, -1.0, float("nan")])
def test_a_disk_that_takes_nothing_is_refused(disk):
    with pytest.raises(ValueError, match="give more than 0"):
        cost(disk=disk)


def test_the_files_of_a_real_checkpoint_are_as_large(tmp_path):
    run = tiny_run(tmp_path, "parallel.tensor=2", "run.stop_at=1", vocab_size=2048, hidden_size=128)
    _, path = run_ranks(2, train_and_save, run)[0]
    tensors = chain(path.glob("*.safetensors"), (path / "trainer").glob("*.safetensors"))
    written = sum(file.stat().st_size for file in tensors)
    planned = checkpoint_cost(run, disk_bytes_per_second=1.0)
    assert planned.whole <= written < 1.01 * planned.whole  # headers
