"""What README.md shows is there and works as it is shown."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from megalemur.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`megalemur ([a-z-]+)", README)))
RUN_FILES = sorted(set(re.findall(r"launch/runs/\w+\.yaml", README)))


def test_every_command_is_shown_and_every_shown_one_exists():
    assert set(COMMANDS) == set(typer.main.get_command(app).commands)


def test_every_make_target_exists():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"quickstart", "test", "setup"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_and_folder_exists():
    paths = set(
        re.findall(r"`((?:src|data_prep|checkpoints_tools|launch|tests|benchmarks|docs)(?:/[\w./]+)?)`", README)
    )
    paths |= set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(RUN_FILES)
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_room_is_in_the_tree():
    rooms = {f"src/megalemur/{path.parent.name}" for path in (ROOT / "src/megalemur").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE))


def test_the_step_is_the_one_that_is_run():
    from megalemur.train.step import train_step

    (shown,) = re.findall(r"```python\n(def train_step.*?)```", README, re.DOTALL)
    real, quoted = (ast.parse(text).body[0] for text in (inspect.getsource(train_step), shown))
    statements = real.body[1:]  # behind the docstring
    assert [ast.dump(node) for node in statements] == [ast.dump(node) for node in quoted.body]


@pytest.mark.parametrize("run_file", RUN_FILES)
def test_the_run_files_can_be_looked_at_from_the_root(run_file):
    command = [sys.executable, "-m", "megalemur.cli.main", "show-config", run_file]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "tokens in all" in ended.stdout


def test_the_plans_that_are_shown_are_what_comes_out(tmp_path):
    chapter = re.search(r"^## Planning.*?^## ", README, re.DOTALL | re.MULTILINE)[0]
    shown = re.findall(r"^\$ megalemur ([^\n]*)\n(.*?)(?=^\$ |^```)", chapter, re.DOTALL | re.MULTILINE)
    assert [line.split()[0] for line, _ in shown] == ["plan", "lint", "plan", "plan"]
    environment = {**os.environ, "COLUMNS": "120"}
    for line, output in shown[:3]:  # the last is the dry run: a minute, and tests of its own
        command = [sys.executable, "-m", "megalemur.cli.main", *line.replace("out/", f"{tmp_path}/").split()]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode == 0, ended.stderr
        printed = ended.stdout.replace(str(tmp_path), "out")
        missing = set(output.splitlines()) - {"…", *(text.rstrip() for text in printed.splitlines())}
        assert not missing, (missing, printed)
    assert (tmp_path / "plan.html").stat().st_size > 1_000_000
