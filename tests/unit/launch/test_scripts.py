"""The launch scripts, run by bash with programs in the place of Slurm's that write down how they were called."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalemur.config.run import RunConfig

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")])
RUN_FILE = "launch/runs/quickstart.yaml"

# srun: one line a word of the call, then the task for rank 5 of 16 in this environment.
FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=16 "$@"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/scontrol"
printf '%s\\n' node07 node08
"""
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/trainer"
env > "$RECORD/environment"
exit "${TRAINER_EXIT:-0}"
"""


def _program(directory: Path, name: str, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch job of 2 nodes; what the programs were called with lands in RECORD."""
    bin_directory = tmp_path / "bin"
    _program(bin_directory, "srun", FAKE_SRUN)
    _program(bin_directory, "scontrol", FAKE_SCONTROL)
    python = _program(bin_directory, "trainer", FAKE_PYTHON)
    record = tmp_path / "record"
    record.mkdir()
    return {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RECORD": str(record),
        "MEGALEMUR_PYTHON": str(python),
        "MEGALEMUR_LOGS": str(tmp_path / "logs"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "12",
    }


def _call(script: str, arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def _submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return _call("launch/slurm/train.sbatch", arguments, environment)


def _recorded(environment: dict[str, str], name: str) -> list[str]:
    return (Path(environment["RECORD"]) / name).read_text().splitlines()


def _environment_of_trainer(environment: dict[str, str]) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in _recorded(environment, "environment") if "=" in line)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read(script: Path):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def _setting_names() -> set[str]:
    names = {"learning_rate", "lr"}
    for part in RunConfig.model_fields.values():
        assert part.annotation is not None
        names |= set(part.annotation.model_fields)
    # words of every shell script and of plain English
    return names - {"name", "steps", "directory", "data", "kind", "every", "sequence", "path", "keep", "context"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_setting_of_a_run_is_in_shell(script: Path):
    code = "\n".join(line for line in script.read_text().splitlines() if not re.match(r"\s*#(?!SBATCH)", line))
    words = set(re.findall(r"[a-z0-9_]+", code.lower().replace("-", "_")))
    assert not words & _setting_names()
    sections = "|".join(RunConfig.model_fields)
    assert not re.search(rf"\b({sections})\.\w+=", code)


def test_the_trainer_learns_its_place_from_slurm(cluster: dict[str, str]):
    result = _submit(cluster, RUN_FILE)
    assert result.returncode == 0, result.stderr
    seen = _environment_of_trainer(cluster)
    place = {name: seen[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert place == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "23456",
    }
    assert _recorded(cluster, "scontrol") == ["show", "hostnames", "node[07-08]"]
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert seen["NCCL_IB_TIMEOUT"] == "22"
    assert seen["OMP_NUM_THREADS"] == "6"


def test_run_file_and_overrides_reach_the_trainer_word_for_word(cluster: dict[str, str]):
    _submit(cluster, RUN_FILE, "run.name=two words", "run.steps=7")
    assert _recorded(cluster, "trainer") == [
        *("-m", "megalemur.cli.main", "train", RUN_FILE),
        *("run.name=two words", "run.steps=7"),
    ]


def test_tasks_are_bound_logged_one_by_one_and_end_together(cluster: dict[str, str]):
    _submit(cluster, RUN_FILE)
    words = _recorded(cluster, "srun")
    assert {"--kill-on-bad-exit=1", "--cpu-bind=cores", "--cpus-per-task=12"} <= set(words)
    assert f"--output={cluster['MEGALEMUR_LOGS']}/rank-%t.log" in words
    assert not [word for word in words if word.startswith("--container")]


def test_a_container_sees_the_repository(cluster: dict[str, str]):
    cluster |= {"MEGALEMUR_CONTAINER": "/images/train.sqsh", "MEGALEMUR_CONTAINER_MOUNTS": "/data:/data"}
    _submit(cluster, RUN_FILE)
    words = _recorded(cluster, "srun")
    assert "--container-image=/images/train.sqsh" in words
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in words


def test_the_job_ends_with_the_exit_code_of_srun(cluster: dict[str, str]):
    assert _submit(cluster | {"TRAINER_EXIT": "37"}, RUN_FILE).returncode == 37


def test_a_warning_before_the_time_limit_reaches_the_tasks_and_the_job_waits_for_them(
    cluster: dict[str, str], tmp_path: Path
):
    ready = tmp_path / "ready"
    srun = f"""#!/usr/bin/env bash
trap 'echo saving; sleep 0.2; exit 5' USR1
touch {ready}
while :; do sleep 0.05; done
"""
    _program(tmp_path / "bin", "srun", srun)
    command = ["bash", str(ROOT / "launch/slurm/train.sbatch"), RUN_FILE]
    job = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "saving" in said
    assert job.returncode == 5


def test_values_that_are_set_are_kept(cluster: dict[str, str]):
    _submit(cluster | {"NCCL_IB_TIMEOUT": "20", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "3"}, RUN_FILE)
    seen = _environment_of_trainer(cluster)
    assert (seen["NCCL_IB_TIMEOUT"], seen["MASTER_PORT"], seen["OMP_NUM_THREADS"]) == ("20", "29500", "3")


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        ({}, [], "usage"),
        ({}, ["no/such.yaml"], "no/such.yaml"),
        ({"MEGALEMUR_FABRIC": "tokenring"}, [RUN_FILE], "tokenring"),
        ({"SLURM_SUBMIT_DIR": "/"}, [RUN_FILE], "root of the repository"),
    ],
)
def test_a_job_that_cannot_run_says_why_before_any_task(
    cluster: dict[str, str], change: dict[str, str], arguments: list[str], named: str
):
    result = _submit(cluster | change, *arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert not (Path(cluster["RECORD"]) / "srun").exists()


def test_a_task_is_bound_to_the_numa_node_of_its_gpu(cluster: dict[str, str], tmp_path: Path):
    bin_directory = tmp_path / "bin"
    _program(bin_directory, "nvidia-smi", "#!/usr/bin/env bash\n[[ $1 == --id=1 ]] && echo 00000000:1B:00.0\n")
    numactl = '#!/usr/bin/env bash\necho "$*" >> "$RECORD/numactl"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    _program(bin_directory, "numactl", numactl)
    device = tmp_path / "pci" / "0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("3\n")
    result = _submit(cluster | {"SYSFS_PCI": str(tmp_path / "pci")}, RUN_FILE)
    assert result.returncode == 0, result.stderr
    assert _recorded(cluster, "numactl")[-1].startswith("--all --cpunodebind=3 --preferred=3")
    assert _recorded(cluster, "trainer")[2] == "train"


def test_local_starts_torchrun_on_this_machine_only(cluster: dict[str, str], tmp_path: Path):
    """A copy of the launch folder has no virtual environment beside it, so torchrun comes from the PATH."""
    torchrun = FAKE_PYTHON.replace("trainer", "torchrun")
    _program(tmp_path / "bin", "torchrun", torchrun)
    for name in ("launch/local.sh", "launch/env/common.sh"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_text((ROOT / name).read_text())
    script = str(tmp_path / "copy" / "launch/local.sh")
    result = _call(script, ["4", RUN_FILE, "run.steps=7"], cluster | {"TRAINER_EXIT": "9"})
    assert result.returncode == 9
    words = _recorded(cluster, "torchrun")
    assert {"--nproc-per-node=4", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"} <= set(words)
    assert words[-5:] == ["-m", "megalemur.cli.main", "train", RUN_FILE, "run.steps=7"]
    handled = next(word for word in words if word.startswith("--signals-to-handle="))
    assert {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"} <= set(handled.partition("=")[2].split(","))
    assert _environment_of_trainer(cluster)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("arguments", [[], ["8"], [RUN_FILE, "8"], ["0", RUN_FILE]])
def test_local_without_processes_and_run_file_says_how_to_call_it(cluster: dict[str, str], arguments: list[str]):
    result = _call("launch/local.sh", arguments, cluster)
    assert result.returncode == 2
    assert "usage" in result.stderr
