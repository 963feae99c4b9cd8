import pytest

from megalemur.config.load import dump_run, parse_run
from tests.unit.config.run_files import RUN, problems


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20min", 1200), ("1h30min", 5400), ("1d2h3min4s", 93784), ("1.5h", 5400), ("75", 75), ("0.5", 0.5)],
)
def test_a_duration_is_read_and_written_back(text, seconds):
    config = parse_run(RUN, [f"run.stop_before={text}"])
    assert config.run.stop_before == seconds
    assert parse_run(dump_run(config)) == config


@pytest.mark.parametrize(
    "text", ["20 minutes", "20m", "min", "30min1h", "1h1h", "-5s", "-5", "1h30", "true", "''", "1e400s"]
)
def test_anything_else_is_refused_with_the_way_to_write_it(text):
    (said,) = problems(f"run.stop_before={text}")
    assert said.startswith("run.stop_before: ")
    if text not in ("-5", "true"):
        assert "20min" in said
