"""config.json goes through unchanged in the eyes of transformers 4, which `make setup` puts beside the installed 5."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalemur.model.hf_config import hf_config_json, read_hf_config
from tests.support.tiny import write_llama

TRANSFORMERS4 = Path(sys.prefix) / "transformers4"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCRIPT = """
import json, sys
import transformers
from transformers import LlamaConfig
assert transformers.__version__.startswith("4."), transformers.__version__
{make}
print(json.dumps([LlamaConfig.from_pretrained(path).to_dict() for path in sys.argv[1:]]))
"""


def seen_by_transformers4(*directories, make=""):
    import json

    command = [sys.executable, "-c", SCRIPT.replace("{make}", make), *map(str, directories)]
    environment = {**os.environ, "PYTHONPATH": str(TRANSFORMERS4)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(autouse=True)
def _installed():
    if not TRANSFORMERS4.is_dir():
        pytest.skip(f"{TRANSFORMERS4} is missing: `make setup` installs transformers 4 there")


# what transformers 5 writes for Llama 3, transformers 4 misreads by itself: the test after this one
@pytest.mark.parametrize(("writer", "rope"), [("4", "default"), ("4", "llama3"), ("5", "default")])
def test_a_config_goes_through_unchanged(tmp_path, writer, rope):
    source, result = tmp_path / "source", tmp_path / "result"
    result.mkdir()
    if writer == "5":
        write_llama(source)
    else:
        scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"} if rope == "llama3" else None
        make = f"LlamaConfig(vocab_size=251, rope_theta=5e5, rope_scaling={scaling}).save_pretrained(sys.argv[1])"
        seen_by_transformers4(source, make=make)
    hf = read_hf_config(source)
    (result / "config.json").write_bytes(hf_config_json(hf.model, dtype="float32", source=hf.original))
    before, after = seen_by_transformers4(source, result)
    for config in (before, after):
        for key in ("torch_dtype", "dtype", "transformers_version"):
            config.pop(key, None)
    assert before == after


def test_transformers4_reads_the_llama3_scaling_of_a_file_that_5_wrote(tmp_path):
    hf = read_hf_config(write_llama(tmp_path / "source", rope_parameters=LLAMA3))
    (tmp_path / "result").mkdir()
    written = hf_config_json(hf.model, dtype="float32", source=hf.original)
    (tmp_path / "result/config.json").write_bytes(written)
    (config,) = seen_by_transformers4(tmp_path / "result")
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"]["factor"] == 8.0 and config["rope_scaling"]["rope_type"] == "llama3"
