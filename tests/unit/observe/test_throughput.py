import subprocess
import sys

import pytest

from megalemur.config.model import ModelConfig
from megalemur.observe.throughput import flops_per_token, known_peak_teraflops, utilisation

LLAMA2_70B = ModelConfig.model_validate({"preset": "llama2_70b"})


def test_llama2_70b_costs_what_published_tables_say():
    flops = flops_per_token(LLAMA2_70B, 4096)
    assert flops.full_attention / 1e9 == pytest.approx(444.5, abs=0.05)
    assert flops.causal_attention / 1e9 == pytest.approx(428.4, abs=0.05)


def test_flops_of_a_toy_by_hand():
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=10
    )
    # a layer: query and output 2 x 64, key and value 2 x 8 x 4, gate, up and down 3 x 8 x 16; the head 8 x 10
    matrices = 6 * (2 * (128 + 64 + 384) + 80)
    assert flops_per_token(model, 5) == (matrices + 12 * 2 * 8 * 5, matrices + 6 * 2 * 8 * 5)


def test_tying_the_output_layer_changes_no_flops():
    tied = LLAMA2_70B.model_copy(update={"tie_embeddings": True})
    assert flops_per_token(tied, 4096) == flops_per_token(LLAMA2_70B, 4096)


def test_utilisation_by_hand():
    # 1000 tokens/s x 500 GFLOP = 500 TFLOP/s on two devices of 500
    assert utilisation(1000, 500e9, devices=2, peak_teraflops=500) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peaks_go_by_the_name_that_cuda_gives(name, teraflops):
    assert known_peak_teraflops(name) == teraflops


@pytest.mark.parametrize("name", ["NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100", "cpu"])
def test_a_device_that_is_not_surely_known_has_no_peak(name):
    assert known_peak_teraflops(name) is None


def test_meter_and_sinks_need_no_torch():
    modules = "throughput, meter, sinks, terminal, logs, report, garbage, metrics"
    code = f"import sys\nfrom megalemur.observe import {modules}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
