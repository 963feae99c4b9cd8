import io
from pathlib import Path

import pytest
from rich.console import Console

from megalemur.config.load import parse_run
from megalemur.observe.report import banner, facts, short, table

RUN = """
run: {name: big, steps: 100}
model: {preset: llama2_70b}
parallel: {tensor: 8, pipeline: 4, data: 2, first_stage_layers: 19, last_stage_layers: 21}
optim: {learning_rate: 1e-4}
data:
  sequence_length: 4096
  global_batch_size: 64
  sources: [{name: code, path: code}]
checkpoint: {directory: checkpoints}
log: {directory: log}
"""


def shown(renderable):
    out = io.StringIO()
    Console(file=out, width=120).print(renderable)
    return out.getvalue()


def test_the_banner_says_what_follows_from_the_run_file():
    rows = dict(facts(parse_run(RUN)))
    assert rows["parameters"] == "68,976,648,192 (68.98 B)"
    assert rows["processes"] == "64"
    assert rows["layout"] == "tensor 8 x pipeline 4 x data 2, sequence parallel, distributed optimizer"
    assert rows["layers a stage"] == "19 + 2 x 20 + 21"
    assert rows["vocabulary"] == "32,000, padded to 32,768"
    assert rows["samples a step"] == "64 = 2 replicas x 32 micro-batches x 1"
    assert rows["tokens a step"] == "262,144 (4,096 a sample)"
    assert rows["tokens in all"] == "26.21 M"
    assert rows["FLOPs a token"].startswith("444.5 B full attention, 428.4 B causal")


def test_the_host_memory_of_a_background_save_is_shown():
    # the last stage: 21 layers, the norm and the head, 12 bytes a parameter over tensor 8 x data 2
    share = -(-(21 * 855_654_400 + 8192 + 32000 * 8192) // 16) * 12
    assert f"{share:,} bytes" in dict(facts(parse_run(RUN)))["saves"]
    assert "stands still" in dict(facts(parse_run(RUN, ["checkpoint.asynchronous=false"])))["saves"]


def test_a_pause_is_shown():
    assert dict(facts(parse_run(RUN, ["run.stop_at=40"])))["steps"] == "100, pausing at 40"


def test_every_row_of_the_banner_is_printed_whole():
    config = parse_run(RUN)
    text = shown(banner(config))
    assert all(name in text and value in text for name, value in facts(config))


def test_brackets_in_a_value_are_text():
    assert "[bold]x[/bold]" in shown(table("[red]t", [("name", "[bold]x[/bold]")]))


@pytest.mark.parametrize(
    ("number", "text"), [(68_976_648_192, "68.98 B"), (999, "999"), (1500, "1.5 K"), (2e12, "2 T"), (0, "0")]
)
def test_short_numbers(number, text):
    assert short(number) == text


@pytest.mark.parametrize("path", sorted(Path("launch/runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_has_a_banner(path):
    assert "tokens a step" in shown(banner(parse_run(path.read_text())))
