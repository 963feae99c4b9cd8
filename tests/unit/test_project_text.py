"""The project's own text: nothing in it holds for one machine only."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# what a path of somebody's machine begins with
PLACES = ["home", "root", "work", "mnt", "opt", "scratch", "Users"]
LOCAL = re.compile(r"(?<![\w./$})~-])/(?:" + "|".join(PLACES) + ")/")
KEY = re.compile("-----BEGIN [A-Z ]*PRIVATE " + "KEY|[a-z]+://[^/\\s:@]+:[^/\\s:@]+" + "@")


def tracked() -> list[Path]:
    """Files of the commit to be."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def found(pattern: re.Pattern[str], text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def test_no_file_names_a_place_of_one_machine_or_a_secret():
    said = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        said += [f"{path.relative_to(ROOT)}: {line}" for pattern in (LOCAL, KEY) for line in found(pattern, text)]
    assert not said, "\n".join(said)


def test_no_run_file_needs_an_absolute_path():
    for path in sorted((ROOT / "launch" / "runs").glob("*.yaml")):
        assert not found(re.compile(r":\s*[\"']?/"), path.read_text()), path


def test_no_tracked_file_is_large():
    large = [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 1 << 20]
    assert large == []


@pytest.mark.parametrize("place", PLACES)
def test_a_place_of_one_machine_is_found(place):
    assert found(LOCAL, f"path: /{place}/me/data")
    assert found(LOCAL, f'open("/{place}/me/data")')


@pytest.mark.parametrize(
    "line", ["https://example.org/home/page", "src/home/x", "$HOME/opt/x", "${ROOT}/home/x", "~/home/x", "a/root/b"]
)
def test_what_only_looks_like_one_is_let_through(line):
    assert found(LOCAL, line) == []


def test_a_secret_is_found():
    assert found(KEY, "-----BEGIN RSA PRIVATE " + "KEY-----")
    assert found(KEY, "https" + "://me:word@example.org")
