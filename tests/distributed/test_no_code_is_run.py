"""Save, load and resume open no pickle and run no text, as the interpreter itself reports."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_run, write_llama

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_that_is_read_or_sent_runs(world: int, tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", num_layers=2)
    tiny_run(tmp_path, num_layers=2)  # the data, made once for all ranks
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.audited", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            },
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err[-3000:]
            told = json.loads(out.splitlines()[-1])
            assert told["during"] == []
            assert [line.split()[0] for line in told["offences"]] == ["pickle.find_class", "compile", "exec"]
    finally:
        for rank in ranks:
            rank.kill()
