"""The doctor names what is here and what is not, whatever state the packages are in."""

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megalemur.observe import doctor
from megalemur.observe.doctor import Finding, examine, render, shared_memory

ROOT = Path(__file__).parents[3]
OPTIONAL = ("transformer_engine", "apex", "flash_attn", "amp_C", "fused_weight_gradient_mlp_cuda")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes modules to the front of the search path, in the place of whatever this machine has."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in OPTIONAL}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**modules: str) -> None:
        for name, source in modules.items():
            path = tmp_path / name.replace("__", "/") / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in OPTIONAL]:
        del sys.modules[name]
    sys.modules.update(kept)


def _found(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


def _shown(findings: list[Finding]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(render(findings))
    return out.getvalue()


def test_everything_that_a_run_may_use_is_looked_at():
    names = [finding.name for finding in examine()]
    assert names == [
        *("Python", "torch", "megatron-core", "Transformer Engine", "Apex", "flash attention"),
        *("NCCL", "GPUs", "CPU cores", "memory", "/dev/shm"),
    ]


def test_what_runs_the_tests_is_in_order():
    assert (_found("torch").status, _found("torch").version) == ("ok", torch.__version__)
    assert _found("Python").status == _found("megatron-core").status == "ok"


def test_whatever_is_not_in_order_says_what_it_costs_and_how_to_get_it():
    for finding in examine():
        complete = bool(finding.missing and finding.cost and finding.install)
        assert complete == (finding.status != "ok"), finding


def test_transformer_engine_without_its_pytorch_part_is_incomplete(install: Callable[..., None]):
    broken = "raise ImportError('libtransformer_engine.so: undefined symbol: _ZN3c10')"
    install(transformer_engine="__version__ = '2.9.0'", transformer_engine__pytorch=broken)
    finding = _found("Transformer Engine")
    assert finding.status == "incomplete"
    assert "undefined symbol" in finding.missing


@pytest.mark.parametrize("raised", ["OSError('libcudart.so.12')", "RuntimeError()", "AssertionError('no GPU [0]')"])
def test_no_error_of_a_package_ends_the_examination(install: Callable[..., None], raised: str):
    install(flash_attn=f"raise {raised}", apex=f"raise {raised}", transformer_engine=f"raise {raised}")
    findings = examine()
    statuses = {finding.name: finding.status for finding in findings}
    assert statuses["flash attention"] == statuses["Apex"] == statuses["Transformer Engine"] == "incomplete"
    assert raised.partition("(")[0] in _shown(findings)


def test_the_other_apex_is_told_from_nvidias(install: Callable[..., None]):
    install(apex="from apex.request import Request", apex__request="class Request: pass")
    finding = _found("Apex")
    assert finding.status == "incomplete"
    assert "another program" in finding.missing


def test_apex_built_for_python_only_lacks_its_kernels(install: Callable[..., None]):
    install(apex="", apex__multi_tensor_apply="", amp_C="")
    finding = _found("Apex")
    assert finding.status == "incomplete"
    assert "fused_weight_gradient_mlp_cuda" in finding.missing
    assert "amp_C" not in finding.missing


def test_whole_apex_is_in_order(install: Callable[..., None]):
    install(apex="__version__ = '0.1'", apex__multi_tensor_apply="", amp_C="", fused_weight_gradient_mlp_cuda="")
    assert _found("Apex").status == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [("0.15.3", "unsupported"), ("0.16.0", "ok"), ("0.20.0rc1", "unsupported")]
)
def test_megatron_core_outside_the_supported_range_is_named(install: Callable[..., None], tmp_path, version, status):
    metadata = tmp_path / f"megatron_core-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    finding = _found("megatron-core")
    assert (finding.status, finding.version) == (status, version)


def test_supported_ranges_are_those_of_the_package():
    wanted = (ROOT / "pyproject.toml").read_text()
    (oldest, too_new), torch_oldest = doctor.MEGATRON_CORE, doctor.TORCH
    assert f'"megatron-core>={oldest[0]}.{oldest[1]},<{too_new[0]}.{too_new[1]}"' in wanted
    assert f'"torch>={torch_oldest[0]}.{torch_oldest[1]}"' in wanted
    assert f'requires-python = ">={doctor.PYTHON[0]}.{doctor.PYTHON[1]}"' in wanted


def test_shared_memory_that_cannot_be_read_is_a_finding(tmp_path: Path):
    finding = shared_memory(tmp_path / "absent")
    assert finding.status == "absent"
    assert "No such file" in finding.missing


def test_brackets_in_an_error_are_shown_and_not_taken_for_markup():
    assert "device [red] 0" in _shown([Finding("GPUs", "absent", missing="device [red] 0")])
