"""Each rule fires on a run that it is there for, lets its neighbours pass, and is missed where it is taken out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalemur.plan.lint.catalogue import CONFIG_RULES, REFUSED_AT_LOAD
from megalemur.plan.lint.disk_catalogue import FILE_RULES
from megalemur.plan.lint.report import documentation
from megalemur.plan.lint.run import LintError, apply, lint_config, lint_run_file, refuse
from tests.unit.config.run_files import RUN
from tests.unit.config.test_checks import FIRES as CHECKS_FIRE
from tests.unit.config.test_checks import overrides as split
from tests.unit.plan.lint_examples import BIG, FIRES, PASSES

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
NAMES = [rule.name for rule in CONFIG_RULES]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def overrides_of(line: str, rule: str = "") -> list[str]:
    """BIG with the line's changes; a rule about what is not written sees a file without it."""
    given = {o.partition("=")[0]: o for o in split(BIG)}
    given |= {o.partition("=")[0]: o for o in split(line) if line}
    if rule == "documents_attend_to_each_other" and not line:
        del given["data.document_mask"]
    return list(given.values())


def cases(table):
    return [pytest.param(name, *(c if isinstance(c, tuple) else (c,))) for name in table for c in table[name]]


def test_every_rule_has_examples_of_both_kinds():
    assert len(set(NAMES)) == len(NAMES)
    assert sorted(FIRES) == sorted(PASSES) == sorted(NAMES)
    assert all(FIRES[name] and PASSES[name] for name in NAMES)


@pytest.mark.parametrize(("rule", "line", "said"), cases(FIRES))
def test_a_rule_fires_and_is_missed_where_it_is_taken_out(rule, line, said, run_file, monkeypatch):
    found = lint_run_file(run_file, overrides_of(line, rule))
    (mine,) = [f for f in found if f.rule == rule] or [None]
    assert mine is not None and said in mine.text, found
    assert mine.level == next(r.level for r in CONFIG_RULES if r.name == rule)
    others = tuple(r for r in CONFIG_RULES if r.name != rule)
    monkeypatch.setattr("megalemur.plan.lint.run.CONFIG_RULES", others)
    assert said not in " ".join(f.text for f in lint_run_file(run_file, overrides_of(line, rule)))


@pytest.mark.parametrize(("rule", "line"), cases(PASSES))
def test_a_rule_lets_its_neighbours_pass(rule, line, run_file):
    assert [f for f in lint_run_file(run_file, overrides_of(line, rule)) if f.rule == rule] == []


def test_nothing_is_said_against_the_large_run(run_file):
    assert lint_run_file(run_file, split(BIG)) == []


@pytest.mark.parametrize("check", [rule.name for rule in REFUSED_AT_LOAD])
def test_what_is_refused_at_load_is_reported_under_its_name(check, run_file):
    line, said = CHECKS_FIRE[check][0]
    found = lint_run_file(run_file, split(line))
    assert any(f.rule == check and f.level == "error" and said in f.text for f in found)


def test_a_broken_section_does_not_hide_the_others(run_file):
    found = lint_run_file(run_file, ["model.num_layers=-1", "optim.clip_grad_norm=0"])
    assert {"settings", "gradients_never_clipped"} <= {f.rule for f in found}
    assert found[0].level == "error"


def test_a_file_that_is_no_run_file_is_one_error(tmp_path):
    (tmp_path / "x.yaml").write_text("[")
    assert [(f.rule, f.level) for f in lint_run_file(tmp_path / "x.yaml")] == [("settings", "error")]
    assert [f.rule for f in lint_run_file(tmp_path / "absent.yaml")] == ["settings"]


def test_errors_are_refused_and_warnings_are_not(run_file):
    refuse(lint_run_file(run_file, ["optim.clip_grad_norm=0"]))
    with pytest.raises(LintError, match=r"start_in_own_directory: .*both are out"):
        refuse(lint_run_file(run_file, ["checkpoint.start_from=out"]))


@pytest.mark.parametrize("rule", [*REFUSED_AT_LOAD, *CONFIG_RULES, *FILE_RULES], ids=lambda rule: rule.name)
def test_every_rule_says_what_it_is_and_where_it_comes_from(rule):
    assert len(rule.says.split()) > 2
    if rule not in REFUSED_AT_LOAD:
        assert rule.threads or "Measured here" in rule.check.__doc__
    assert all(url.count("/") >= 6 for url in rule.threads)


def test_the_documents_show_the_table_of_the_code():
    text = (ROOT / "docs" / "lint.md").read_text()
    for rules in (REFUSED_AT_LOAD, CONFIG_RULES, FILE_RULES):
        assert documentation(rules) in text


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_nothing_is_said_against_the_run_files_that_are_shipped(path):
    assert lint_run_file(path) == []


def test_a_subject_without_what_a_rule_needs_is_passed_over():
    assert apply(CONFIG_RULES, {}) == []


def lint(*arguments):
    command = [sys.executable, "-m", "megalemur.cli.main", "lint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_command_says_it_in_json_and_by_its_exit_code(run_file):
    done = lint(run_file, "--json", "optim.clip_grad_norm=0")
    rules = {f["rule"]: f["level"] for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0 and rules["gradients_never_clipped"] == "warning"
    assert lint(run_file, "--strict", "optim.clip_grad_norm=0").returncode == 11
    refused = lint(run_file, "parallel.tensor=3")
    assert refused.returncode == 11 and "widths_over_tensor" in refused.stdout


@pytest.mark.parametrize("files", ["", "--files"])
def test_no_torch_is_loaded(run_file, files):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom megalemur.cli.main import app\n"
        "CliRunner().invoke(app, [a for a in ['lint', *sys.argv[1:]] if a])\n"
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert 'megalemur.plan.lint.run' in sys.modules\nsys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_file), files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_train_ends_on_an_error_before_anything_starts(run_file):
    command = [sys.executable, "-m", "megalemur.cli.main", "train", str(run_file), "checkpoint.start_from=out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 11
    assert "start_in_own_directory" in done.stderr and "Traceback" not in done.stderr


def test_lint_config_is_what_lint_says_of_a_run_that_loads(run_file):
    from megalemur.config.load import load_run

    config = load_run(run_file, ["optim.clip_grad_norm=0"])
    assert lint_config(config) == lint_run_file(run_file, ["optim.clip_grad_norm=0"])
