"""Values of the wrong type that pydantic alone would let pass."""

import pytest

from megalemur.config.load import ConfigError, parse_run

TEXT = """
run: {name: x, steps: 10}
model: {preset: tiny}
optim: {learning_rate: 1e-4}
data: {sequence_length: 128, global_batch_size: 4, sources: [{name: a, path: a}]}
checkpoint: {directory: out}
log: {directory: out}
"""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.tensor=true", "parallel.tensor: not a setting that is true or false"),
        ("model.preset=[1]", "no such preset [1]"),
        ("parallel.distributed_optimizer=3", "parallel.distributed_optimizer"),
        ("optim.learning_rate=.nan", "optim.learning_rate"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, said):
    with pytest.raises(ConfigError, match="run file") as caught:
        parse_run(TEXT, [override])
    assert said in str(caught.value)


def test_switches_are_switches():
    assert parse_run(TEXT, ["parallel.distributed_optimizer=false"]).parallel.distributed_optimizer is False
    assert parse_run(TEXT, ["parallel.sequence=false"]).parallel.sequence_parallel is False
