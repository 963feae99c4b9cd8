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


def test_the_plan_that_is_shown_is_what_comes_out(tmp_path):
    shown = re.search(r"\$ megalemur (plan \S+ --search[^\n]*)\n(.*?)\n…", README, re.DOTALL)
    line = shown[1].replace("out/llama2_70b_32gpu.yaml", str(tmp_path / "written.yaml")).split()
    command = [sys.executable, "-m", "megalemur.cli.main", *line]
    environment = {**os.environ, "COLUMNS": "120"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    printed = {text.rstrip() for text in ended.stdout.splitlines()}
    assert set(shown[2].splitlines()) <= printed
    ended = subprocess.run([*command[:3], "lint", tmp_path / "written.yaml"], cwd=ROOT, check=False)
    assert ended.returncode == 0
