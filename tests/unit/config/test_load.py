"""Run files: what YAML may say, how problems are named, and that a resolved run reads back equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from megalemur.config.load import ConfigError, dump_run, load_run, parse_run, run_schema
from tests.unit.config.run_files import RUN, problems


def test_unknown_settings_are_named_with_the_one_that_was_meant():
    assert problems("parallel.tensr=2") == ["parallel.tensr: no such setting; did you mean parallel.tensor?"]
    assert problems("paralel.tensor=2") == ["paralel: no such setting; did you mean parallel?"]
    assert problems("data.sources.0.wieght=2") == [
        "data.sources.0.wieght: no such setting; did you mean data.sources.0.weight?"
    ]


def test_an_unknown_setting_like_no_other_is_answered_with_what_there_is():
    (said,) = problems("schedule.zzzz=2")
    assert said == "schedule.zzzz: no such setting; there are kind, warmup_steps, decay_steps, min_ratio"


def test_an_unknown_setting_does_not_hide_what_else_is_wrong_with_its_section():
    text = RUN.replace("tiny", "llama2_70b") + "parallel: {tensr: 2, pipeline: 3}"
    tensr, pipeline = problems(text=text)
    assert tensr == "parallel.tensr: no such setting; did you mean parallel.tensor?"
    assert pipeline.startswith("parallel.pipeline=3 does not divide model.num_layers=80; use 1, 2, 4, 5, 8")


def test_an_unknown_setting_of_a_list_item_hides_nothing_either():
    said = problems("data.sources.0.wieght=2", "data.validate_every=5")
    assert [problem.split(":")[0] for problem in said] == [
        "data.sources.0.wieght",
        "data.validate_every=5 has no effect without data.validation",
    ]


def test_all_problems_are_reported_at_once():
    said = "\n".join(problems("run.steps=-1", "optim.learning_rate=fast", "parallel.tensor=3", "schedule.kid=wsd"))
    for part in ("run.steps: ", "optim.learning_rate: ", "parallel.tensor=3 does not divide", "schedule.kid: "):
        assert part in said


def test_what_is_not_given_is_named():
    (said,) = problems(text=RUN.replace(", steps: 10", ""))
    assert said == "run.steps: not given, and it has no default"
    assert any(problem.startswith("model.num_layers: not given") for problem in problems("model.preset=null"))


def test_an_unknown_preset_is_answered_with_the_known_ones():
    (said,) = problems("model.preset=llama2_7")
    assert "llama2_7b" in said and "llama3_70b" in said


def test_a_preset_that_the_run_file_leaves_nothing_to_do_is_refused():
    resolved = dump_run(parse_run(RUN))
    (said,) = problems("model.preset=llama2_7b", text=resolved)
    assert said.startswith(
        "model.preset=llama2_7b fills in only what the run file leaves out, and it gives num_layers="
    )
    one_given = RUN.replace("preset: tiny", "preset: tiny, num_layers: 4")
    (said,) = problems("model.preset=llama2_7b", text=one_given)
    assert "it gives num_layers=4; take" in said


def test_a_preset_may_be_overridden_with_everything_that_the_run_file_gives():
    one_given = RUN.replace("preset: tiny", "preset: tiny, num_layers: 4")
    assert parse_run(RUN, ["model.preset=llama2_7b"]).model.num_layers == 32
    assert parse_run(one_given, ["model.preset=llama2_7b", "model.num_layers=16"]).model.num_layers == 16
    resolved = dump_run(parse_run(RUN))
    assert parse_run(resolved, ["model.preset=tiny", "run.steps=3"]).run.steps == 3


REFUSED = {
    "run is given twice": RUN + "run: {name: again, steps: 1}",
    "name is given twice": RUN.replace("name: small", "name: small, name: large"),
    "anchors and aliases": RUN + "parallel: &layout {tensor: 1}\nprecision: *layout",
    "python/object/apply": RUN + "parallel: !!python/object/apply:os.system ['false']",
    "python/name": RUN + "parallel: !!python/name:os.system",
    "tag:yaml.org,2002:merge": RUN.replace("run: {", "run: {<<: {seed: 1}, "),
    "key 1 is not text": RUN + "1: 2",
    "found another document": RUN + "---\na: 1",
    "line 1, column 5": "a: [",
    "a run file is a mapping of sections": "- run",
    "special characters": "\x00",
}


@pytest.mark.parametrize("said", REFUSED)
def test_yaml_that_surprises_is_refused(said):
    (problem,) = problems(text=REFUSED[said])
    assert said in problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("007", "007"),
        ("1_000a", "1_000a"),
    ],
)
def test_text_stays_text(text, value):
    assert parse_run(RUN, [f"run.name={text}"]).run.name == value


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E3", 2000.0), (".5", 0.5), ("3", 3.0), ("1_0.5", 10.5)])
def test_numbers_are_numbers(text, value):
    assert parse_run(RUN, [f"optim.learning_rate={text}"]).optim.learning_rate == value


def test_a_number_with_leading_zeros_is_decimal():
    assert parse_run(RUN, ["run.steps=010"]).run.steps == 10


@pytest.mark.parametrize("text", [".inf", "inf", "nan", ".nan"])
def test_a_number_that_is_none_is_refused(text):
    (said,) = problems(f"optim.learning_rate={text}")
    assert said.startswith("optim.learning_rate: ")


@pytest.mark.parametrize(
    "override",
    ["run.steps=true", "checkpoint.keep=false", "optim.learning_rate=true", "data.sources.0.max_epochs=true"],
)
def test_true_and_false_are_no_numbers(override):
    (said,) = problems(override)
    assert said.startswith(f"{override.partition('=')[0]}: not a setting that is true or false")


@pytest.mark.parametrize("override", ["log.tensorboard=false", "parallel.sequence=false", "run.deterministic=true"])
def test_true_and_false_are_taken_where_they_are_meant(override):
    assert problems(override) == []


def test_a_value_is_shown_as_it_was_given():
    assert problems("parallel.tensor=2.5")[0].endswith("(given: 2.5)")
    assert problems("parallel.tensor=")[0].endswith("(given: nothing)")


def test_overrides_change_settings_lists_and_sections_that_are_empty():
    text = RUN + "parallel:\n"
    overrides = ["parallel.data=2", "data.sources.0.weight=2.5", "log.profiler.start_step=3", "schedule.kind=constant"]
    run = parse_run(text, overrides)
    assert (run.parallel.data, run.data.sources[0].weight, run.schedule.kind) == (2, 2.5, "constant")
    assert run.log.profiler is not None and run.log.profiler.start_step == 3
    again = parse_run(dump_run(parse_run(RUN)), ["log.profiler.start_step=3"])  # the dump says `profiler: null`
    assert again.log.profiler == run.log.profiler


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.tensor", "an override is written section.key=value"),
        ("tensor=2", "an override is written section.key=value"),
        ("parallel..tensor=2", "an override is written section.key=value"),
        ("run.name.first=2", "name holds no settings"),
        ("data.sources.7.weight=2", "7 holds no settings"),
        ("data.sources.0=2", "name a setting of an item"),
        ("parallel.tensor=[1", "expected ',' or ']'"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(override, said):
    (problem,) = problems(override)
    assert said in problem


def test_a_section_that_is_no_mapping_is_refused():
    for value in ("3", "false", "[1]", "''"):
        (said,) = problems(text=RUN + f"parallel: {value}")
        assert said.startswith("parallel: ")


def test_a_resolved_run_reads_back_equal():
    run = parse_run(
        RUN,
        [
            "run.name=plain",
            "parallel.tensor=2",
            "parallel.data=2",
            "optim.eps=1e-9",
            "checkpoint.allow_changes=[backend]",
            "log.profiler.start_step=3",
            "data.validation=[{name: v, path: there, weight: 0.1}]",
        ],
    )
    assert parse_run(dump_run(run)) == run


@pytest.mark.parametrize(
    "name", ["1e3", "yes", "null", "1:30", "2024-01-01", "007", "a: b", "é", "'", "", "-", "~", "1_0"]
)
def test_a_text_that_looks_like_something_else_reads_back_equal(name):
    run = parse_run(RUN.replace("small", json.dumps(name)))
    assert run.run.name == name
    assert parse_run(dump_run(run)) == run


def test_a_loaded_run_cannot_be_changed():
    run = parse_run(RUN)
    with pytest.raises(ValidationError, match="frozen"):
        run.parallel.tensor = 2


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml:\n.*cannot be read"):
        load_run(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml:\n.*cannot be read"):
        load_run(tmp_path / "latin.yaml")
    (tmp_path / "good.yaml").write_text(RUN)
    assert load_run(tmp_path / "good.yaml") == parse_run(RUN)


def test_every_setting_is_described_in_the_schema():
    schema = run_schema()
    assert schema["additionalProperties"] is False
    bare = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, setting in section["properties"].items()
        if not setting.get("description")
    ]
    assert bare == []
    assert {"RunSettings", "ModelConfig", "ParallelConfig", "OptimConfig", "DataConfig"} <= set(schema["$defs"])


def test_the_schema_refers_only_to_what_it_defines():
    schema = run_schema()
    text = json.dumps(schema)
    wanted = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert wanted == set(schema["$defs"])
    assert set(schema["required"]) == {"run", "model", "optim", "data", "checkpoint", "log"}


def test_config_needs_neither_torch_nor_megatron():
    program = (
        "import sys, megalemur.config.load, megalemur.config.layers\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy')])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_every_section_forbids_what_it_does_not_know():
    for field in type(parse_run(RUN)).model_fields.values():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]


def test_the_run_files_that_are_shipped_have_no_problems():
    files = sorted((Path(__file__).parents[3] / "launch" / "runs").glob("*.yaml"))
    assert files
    for file in files:
        load_run(file)
