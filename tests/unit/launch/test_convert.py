"""The conversion job: killed and requeued it goes on, and a finished one is not done again."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch/slurm/convert.sbatch"
JOB = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "7"}


def submit(*arguments, **changes):
    environment = {"PATH": "/usr/bin:/bin", "MEGALEMUR_PYTHON": "/bin/echo", **JOB, **changes}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_job_converts_with_all_its_cores_and_goes_on_where_it_was():
    ran = submit("a b", "c", "--to", "hf")
    assert ran.returncode == 0
    assert ran.stdout == "checkpoints_tools/convert.py a b c --to hf --resume --workers 7\n"


def test_a_job_that_is_requeued_after_its_end_does_nothing(tmp_path):
    (tmp_path / "conversion.json").write_text("{}")
    again = submit("a", str(tmp_path), "--to", "hf", SLURM_RESTART_COUNT="1")
    assert again.returncode == 0 and "was finished" in again.stdout
    first = submit("a", str(tmp_path), "--to", "hf")
    assert "checkpoints_tools/convert.py" in first.stdout, "a destination that somebody else made is refused there"


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (("a", "b"), {}, "usage: sbatch"),
        (("a", "b", "--to", "hf"), {"SLURM_SUBMIT_DIR": "/"}, "from the root of the repository"),
    ],
)
def test_a_job_that_cannot_run_says_why(arguments, changes, said):
    ran = submit(*arguments, **changes)
    assert ran.returncode == 2 and said in ran.stderr
