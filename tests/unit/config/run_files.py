"""A small run file that the tests of the configuration change."""

from megalemur.config.load import ConfigError, parse_run

RUN = """
run: {name: small, steps: 10}
model: {preset: tiny}
optim: {learning_rate: 1e-3}
data: {sequence_length: 64, global_batch_size: 8, sources: [{name: a, path: here/a}]}
checkpoint: {directory: out}
log: {directory: out}
"""


def problems(*overrides: str, text: str = RUN) -> list[str]:
    """What is said against a run; nothing where it is accepted."""
    try:
        parse_run(text, overrides)
    except ConfigError as error:
        return error.problems
    return []
