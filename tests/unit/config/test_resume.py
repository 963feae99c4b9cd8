"""Every setting has a rule for a resume, the documents show the same table, and old run files compare too."""

import copy
from pathlib import Path

import pytest
import yaml

from megalemur.config.checkpoint import CheckpointConfig
from megalemur.config.load import dump_run, parse_run
from megalemur.config.resume import FACTS, RULES, Policy, compare, refusals, rule_of, settings, table
from tests.unit.config.run_files import RUN

BASE = parse_run(
    RUN,
    [
        "data.sources=[{name: a, path: here/a}, {name: b.c, path: here/b}]",
        "data.validation=[{name: v, path: here/v}]",
        "log.profiler.start_step=3",
        "model.rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64}",
    ],
)


def resolved(config=BASE):
    return yaml.safe_load(dump_run(config))


def test_every_setting_of_a_run_has_exactly_one_rule():
    assert {".".join(path) for path, _ in settings()} == set(RULES)


def test_every_word_of_allow_changes_belongs_to_a_rule_and_the_other_way_round():
    words = CheckpointConfig.model_json_schema()["properties"]["allow_changes"]["items"]["enum"]
    assert set(words) == {rule.unless for rule in [*RULES.values(), *FACTS.values()]} - {""}


def test_the_documents_show_the_table_of_the_code():
    assert table() in (Path(__file__).parents[3] / "docs/resume.md").read_text()


def with_another(values, path):
    """The same run file with another value of one setting; `*` is the second item of a list."""
    values = copy.deepcopy(values)
    here = values
    for key in path[:-1]:
        here = here[-1] if key == "*" else here[key]
    assert path[-1] in here
    here[path[-1]] = "another"
    return values


@pytest.mark.parametrize("setting", [name for name in RULES if not name.endswith("*.name")])
def test_a_changed_setting_is_found_and_gets_its_rule(setting):
    old = with_another(resolved(), setting.split("."))
    (found,) = compare(old, BASE).differences
    item = "v" if setting.startswith("data.validation.") else "b.c"
    assert found.setting == setting.replace("*", item)
    assert found.rule is RULES[setting] and found.old == "another" and found.new != "another"
    refused = refusals([found], ())
    assert bool(refused) == (found.rule.policy is Policy.REFUSED)
    assert all(found.setting in sentence and found.rule.reason in sentence for sentence in refused)
    if found.rule.unless:
        assert refusals([found], (found.rule.unless,)) == []


def test_equal_runs_do_not_differ():
    assert compare(resolved(), BASE) == ((), (), ())


def test_sources_are_known_by_their_names_not_by_their_order():
    old = resolved()
    old["data"]["sources"].reverse()
    assert compare(old, BASE).differences == ()


def test_a_source_that_comes_or_goes_is_recorded():
    fewer = parse_run(dump_run(BASE), ["data.sources=[{name: a, path: here/a}]"])
    for old, new in ((BASE, fewer), (fewer, BASE)):
        found = compare(resolved(old), new).differences
        assert {difference.setting for difference in found} == {
            f"data.sources.b.c.{key}" for key in ("name", "path", "weight")
        }
        assert refusals(found, ()) == []


def test_a_section_that_comes_is_compared_with_nothing():
    plain = parse_run(RUN)
    found = {difference.setting: difference for difference in compare(resolved(plain), BASE).differences}
    assert found["model.rope_scaling.factor"].old is None and found["model.rope_scaling.factor"].new == 8.0
    assert found["log.profiler.steps"].old is None


def test_a_setting_that_an_old_file_lacks_had_its_default():
    old = resolved()
    del old["guard"], old["run"]["check_replicas_every"], old["data"]["sources"][0]["weight"]
    assert compare(old, BASE) == ((), (), ())
    changed = parse_run(dump_run(BASE), ["run.check_replicas_every=7"])
    (found,) = compare(old, changed).differences
    assert (found.setting, found.old, found.new) == ("run.check_replicas_every", 100, 7)


def test_a_setting_that_this_release_lacks_is_named_and_not_refused():
    old = resolved()
    old["run"]["max_skipped_steps"] = 10
    old["elsewhere"] = {"deep": {"setting": 1}}
    found = compare(old, BASE)
    assert found.differences == () and found.unknown == ("run.max_skipped_steps", "elsewhere.deep.setting")


def test_a_setting_without_default_that_is_missing_is_said():
    old = resolved()
    del old["optim"]["learning_rate"]
    assert compare(old, BASE) == ((), (), ("optim.learning_rate",))


def test_a_rule_is_found_for_an_item_with_a_dot_in_its_name():
    assert rule_of(("data", "sources", "b.c", "weight")) is RULES["data.sources.*.weight"]
