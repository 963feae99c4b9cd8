"""The launch scripts, run by bash with programs in the place of Slurm's that write down how they were called."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalemur.cli import exit_codes
from megalemur.config.run import RunConfig

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")])
RUN_FILE = "launch/runs/quickstart.yaml"

# srun: one line a word of the call, then the task for rank 5 of 16 in this environment.
FAKE_SRUN = """#!/usr/bin/env bash
[[ " $* " == *" lint "* ]] && record=lint-srun || record=srun
printf '%s\\n' "$@" > "$RECORD/$record"
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=16 "$@"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/scontrol-$1"
[[ $1 == show ]] && printf '%s\\n' node07 node08
exit 0
"""
FAKE_SQUEUE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/squeue"
[[ -n ${JOB_END:-} ]] && echo "$JOB_END"
"""
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $3 == lint ]]; then
    printf '%s\\n' "$@" > "$RECORD/lint"
    env > "$RECORD/lint-environment"
    exit "${LINT_EXIT:-0}"
fi
printf '%s\\n' "$@" > "$RECORD/trainer"
env > "$RECORD/environment"
[[ -z ${SAVED_STEP:-} ]] || echo "$SAVED_STEP" > "$MEGALEMUR_PROGRESS"
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
    _program(bin_directory, "squeue", FAKE_SQUEUE)
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
    assert _recorded(cluster, "scontrol-show") == ["show", "hostnames", "node[07-08]"]
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert seen["NCCL_IB_TIMEOUT"] == "22"
    assert seen["OMP_NUM_THREADS"] == "6"


def test_run_file_and_overrides_reach_the_trainer_word_for_word(cluster: dict[str, str]):
    _submit(cluster, RUN_FILE, "run.name=two words", "run.steps=7")
    assert _recorded(cluster, "trainer") == [
        *("-m", "megalemur.cli.main", "train", RUN_FILE),
        *("run.name=two words", "run.steps=7"),
    ]


def test_one_task_lints_before_the_others_start(cluster: dict[str, str]):
    assert _submit(cluster, RUN_FILE, "run.name=two words").returncode == 0
    assert _recorded(cluster, "lint") == ["-m", "megalemur.cli.main", "lint", "--files", RUN_FILE, "run.name=two words"]
    words = _recorded(cluster, "lint-srun")
    assert {"--nodes=1", "--ntasks=1", f"--output={cluster['MEGALEMUR_LOGS']}/lint.log"} <= set(words)
    assert f"--output={cluster['MEGALEMUR_LOGS']}/rank-%t.log" not in words
    seen = dict(line.partition("=")[::2] for line in _recorded(cluster, "lint-environment") if "=" in line)
    assert (seen["MEGALEMUR_TASKS"], seen["CUDA_DEVICE_MAX_CONNECTIONS"]) == ("16", "1")
    assert _recorded(cluster, "srun")


@pytest.mark.parametrize("code", [11, 1])
def test_what_lint_refuses_is_not_started_and_not_requeued(cluster: dict[str, str], code: int):
    result = _submit(cluster | {"LINT_EXIT": str(code)}, RUN_FILE)
    assert (result.returncode, "nothing was started" in result.stderr) == (code, True)
    assert not (Path(cluster["RECORD"]) / "srun").exists()
    assert not _was_requeued(cluster)


def test_tasks_are_bound_logged_one_by_one_and_end_by_themselves(cluster: dict[str, str]):
    _submit(cluster, RUN_FILE)
    words = _recorded(cluster, "srun")
    assert {"--kill-on-bad-exit=0", "--wait=60", "--cpu-bind=cores", "--cpus-per-task=12"} <= set(words)
    assert f"--output={cluster['MEGALEMUR_LOGS']}/rank-%t.log" in words
    assert not [word for word in words if word.startswith("--container")]


def test_a_container_sees_the_repository(cluster: dict[str, str]):
    cluster |= {"MEGALEMUR_CONTAINER": "/images/train.sqsh", "MEGALEMUR_CONTAINER_MOUNTS": "/data:/data"}
    _submit(cluster, RUN_FILE)
    words = _recorded(cluster, "srun")
    assert "--container-image=/images/train.sqsh" in words
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in words


def _was_requeued(environment: dict[str, str]) -> bool:
    path = Path(environment["RECORD"]) / "scontrol-requeue"
    requeued = path.exists()
    path.unlink(missing_ok=True)
    return requeued


OURS = {code for name, code in vars(exit_codes).items() if name.isupper()}
OTHER_CODES = sorted(OURS - {exit_codes.REQUEUE} | {1, 37, 137})


@pytest.mark.parametrize("code", OTHER_CODES)
def test_the_job_ends_with_the_exit_code_of_srun_and_is_not_requeued(cluster: dict[str, str], code: int):
    assert _submit(cluster | {"TRAINER_EXIT": str(code)}, RUN_FILE).returncode == code
    assert not _was_requeued(cluster)


def test_a_job_that_has_saved_and_asks_for_it_is_requeued(cluster: dict[str, str]):
    result = _submit(cluster | {"TRAINER_EXIT": str(exit_codes.REQUEUE)}, RUN_FILE)
    assert result.returncode == exit_codes.REQUEUE
    assert _recorded(cluster, "scontrol-requeue") == ["requeue", "123456"]


def test_restarts_without_a_newer_checkpoint_come_to_an_end(cluster: dict[str, str]):
    cluster |= {"TRAINER_EXIT": str(exit_codes.REQUEUE)}
    codes = []
    for saved_step in ("", "", "100", "100", "200", "200", "200", "200"):
        result = _submit(cluster | {"SAVED_STEP": saved_step}, RUN_FILE)
        codes.append((result.returncode, _was_requeued(cluster)))
    assert codes == [(exit_codes.REQUEUE, True)] * 7 + [(exit_codes.CRASH_LOOP, False)]
    assert "step 200" in result.stderr and "restarts" in result.stderr
    (Path(cluster["MEGALEMUR_LOGS"]) / "restarts").unlink()
    assert _submit(cluster | {"SAVED_STEP": "200"}, RUN_FILE).returncode == exit_codes.REQUEUE
    assert _was_requeued(cluster)


@pytest.mark.parametrize(
    ("said", "also", "end"),
    [
        ("2026-11-25T15:00:00", {"SLURM_JOB_END_TIME": "1"}, "1795618800"),
        ("N/A", {"SLURM_JOB_END_TIME": "1795618801"}, "1795618801"),
        ("N/A", {}, None),
        ("2026-11-25T15:00:00", {"MEGALEMUR_JOB_END": "7"}, "7"),
    ],
)
def test_the_trainer_learns_when_the_job_ends(
    cluster: dict[str, str], said: str, also: dict[str, str], end: str | None
):
    _submit(cluster | {"JOB_END": said, "TZ": "UTC", **also}, RUN_FILE)
    assert _environment_of_trainer(cluster).get("MEGALEMUR_JOB_END") == end


def test_the_supervisors_meet_at_a_port_and_share_a_secret(cluster: dict[str, str]):
    tokens = set()
    for _ in range(2):
        _submit(cluster, RUN_FILE)
        seen = _environment_of_trainer(cluster)
        tokens.add(seen["MEGALEMUR_TOKEN"])
        assert seen["MEGALEMUR_SUPERVISOR_PORT"] == "13456"
        assert seen["MEGALEMUR_PROGRESS"] == f"{cluster['MEGALEMUR_LOGS']}/progress"
    assert len(tokens) == 2 and all(len(token) == 32 for token in tokens)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("ends", "code", "requeued"),
    [("exit 10", 10, True), ("exit 5", 5, False), ("trap - USR1; kill -USR1 $$", 10, True)],
)
def test_a_signal_reaches_the_tasks_as_usr1_and_the_job_waits_for_them(
    cluster: dict[str, str], tmp_path: Path, sent: signal.Signals, ends: str, code: int, requeued: bool
):
    ready = tmp_path / "ready"
    srun = f"""#!/usr/bin/env bash
[[ " $* " == *" lint "* ]] && exit 0
trap 'echo saving; sleep 0.2; {ends}' USR1
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
        job.send_signal(sent)
        said, _ = job.communicate(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "saving" in said
    assert (job.returncode, _was_requeued(cluster)) == (code, requeued)


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


# a rank: writes down how it was called; what it then does is in BEHAVIOUR, by rank
FAKE_RANK = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/words-$RANK"
env > "$RECORD/environment-$RANK"
sleep 30 &
trap 'kill %1; exit 10' USR1 USR2 TERM INT
echo $$ > "$RECORD/pid-$RANK"
eval "$BEHAVIOUR"
"""


def _local(cluster: dict[str, str], tmp_path: Path, behaviour: str, *arguments: str) -> subprocess.Popen[bytes]:
    rank = _program(tmp_path / "bin", "rank", FAKE_RANK)
    environment = cluster | {"MEGALEMUR_PYTHON": str(rank), "BEHAVIOUR": behaviour}
    command = ["bash", str(ROOT / "launch/local.sh"), *(arguments or ("3", RUN_FILE))]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_local_starts_every_rank_on_this_machine_only(cluster: dict[str, str], tmp_path: Path):
    job = _local(cluster, tmp_path, "kill %1", "4", RUN_FILE, "run.steps=7", "run.name=two words")
    assert job.wait(timeout=30) == 0
    ports = set()
    for rank in range(4):
        words = ["-m", "megalemur.cli.main", "train", RUN_FILE, "run.steps=7", "run.name=two words"]
        assert _recorded(cluster, f"words-{rank}") == words
        seen = dict(line.partition("=")[::2] for line in _recorded(cluster, f"environment-{rank}") if "=" in line)
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "4")
        assert (seen["MASTER_ADDR"], seen["OMP_NUM_THREADS"]) == ("127.0.0.1", "1")
        assert seen["MEGALEMUR_LAUNCHER_PID"] == str(job.pid)
        ports.add((seen["MASTER_PORT"], seen["MEGALEMUR_SUPERVISOR_PORT"], seen["MEGALEMUR_TOKEN"]))
    ((master, supervisors, token),) = ports
    assert master != supervisors and len(token) == 32


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("kill %1; exit 10", 10),
        ("kill %1; exit 15", 15),
        ("kill %1; (( RANK != 1 )) && exit 17; kill -KILL $$", 17),
        ("kill %1; (( RANK == 1 )) || exit 0; kill -KILL $$", 137),
        ("(( RANK != 1 )) || { kill %1; exit 13; }; wait", 13),
    ],
)
def test_local_ends_with_the_code_of_the_run(cluster: dict[str, str], tmp_path: Path, behaviour: str, code: int):
    assert _local(cluster, tmp_path, behaviour).wait(timeout=30) == code


@pytest.mark.parametrize("sent", ["USR1", "USR2", "TERM", "INT", "HUP", "QUIT"])
@pytest.mark.parametrize("behaviour", ["wait; wait", "trap - USR1 USR2 TERM INT; wait"], ids=["listening", "not yet"])
def test_local_hands_a_signal_on_once_and_waits(cluster: dict[str, str], tmp_path: Path, sent: str, behaviour: str):
    job = _local(cluster, tmp_path, behaviour)
    record = Path(cluster["RECORD"])
    deadline = time.monotonic() + 30
    while len(list(record.glob("pid-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(job.pid, signal.Signals[f"SIG{sent}"])  # as a terminal does: the ranks are in groups of their own
    assert job.wait(timeout=20) == exit_codes.REQUEUE


@pytest.mark.parametrize("arguments", [[], ["8"], [RUN_FILE, "8"], ["0", RUN_FILE]])
def test_local_without_processes_and_run_file_says_how_to_call_it(cluster: dict[str, str], arguments: list[str]):
    result = _call("launch/local.sh", arguments, cluster)
    assert result.returncode == 2
    assert "usage" in result.stderr
