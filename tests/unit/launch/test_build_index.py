"""The array job: each task builds its own part; an array with holes is refused."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch/slurm/build_index.sbatch"
ARRAY = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "3",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_CPUS_PER_TASK": "7",
}


def submit(arguments, **changes):
    environment = {"PATH": "/usr/bin:/bin", "MEGALEMUR_PYTHON": "/bin/echo", **ARRAY, **changes}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_each_task_builds_its_part():
    ran = submit(["--input", "a b/*.jsonl", "--output", "data/x"])
    assert ran.returncode == 0
    assert ran.stdout == "data_prep/build_index.py --input a b/*.jsonl --output data/x --workers 7 --part 2 --parts 4\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_ARRAY_TASK_MIN": "1"}, "must count from 0"),
        ({"SLURM_ARRAY_TASK_MAX": "6"}, "in steps of 1"),
        ({"SLURM_SUBMIT_DIR": "/"}, "from the root of the repository"),
    ],
)
def test_what_would_leave_out_data_is_refused(changes, said):
    ran = submit(["--input", "a", "--output", "b"], **changes)
    assert ran.returncode == 2 and said in ran.stderr


def test_without_arguments_it_says_how_it_is_called():
    assert "usage: sbatch" in submit([]).stderr
