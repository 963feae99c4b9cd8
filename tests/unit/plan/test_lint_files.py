"""The rules over files and machine: each fires on real files or a described machine, and is silent on good ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalemur.config.load import dump_run, parse_run
from megalemur.model.hf_config import hf_config_json
from megalemur.plan.lint.disk_catalogue import FILE_RULES
from megalemur.plan.lint.machine import Site
from megalemur.plan.lint.run import lint_files
from tests.support.datasets import tokenizer_record, write_dataset

RUN = """
run: {name: small, steps: 10}
model: {preset: tiny}
optim: {learning_rate: 1e-3}
data: {sequence_length: 16, global_batch_size: 2, document_mask: none}
"""
NODE = Site(
    environ={
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": "6",
        "MEGALEMUR_TASKS": "2",
    },
    has_gpus=True,
    infiniband=True,
    cores=96,
    shared_memory=1 << 34,
    open_files=65536,
)
TOKENIZER = tokenizer_record(vocab_size=2048)


@pytest.fixture
def good(tmp_path):
    """A run whose files are all right: overrides by setting."""
    write_dataset(tmp_path / "a", [range(3, 200)] * 4, TOKENIZER)
    write_dataset(tmp_path / "v", [range(5, 90)] * 2, TOKENIZER)
    start = tmp_path / "start"
    start.mkdir()
    model = parse_run(RUN, settings(tmp_path)).model
    (start / "config.json").write_bytes(hf_config_json(model, dtype="float32"))
    return tmp_path


def settings(root: Path, *more: str) -> list[str]:
    given = [
        f"data.sources=[{{name: a, path: {root}/a}}]",
        f"data.validation=[{{name: v, path: {root}/v}}]",
        f"checkpoint.directory={root}/checkpoints",
        f"checkpoint.start_from={root}/start",
        f"log.directory={root}/log",
        "parallel.tensor=2",
    ]
    return [*given, *more]


def said(root, *more, site=NODE, without=""):
    config = parse_run(RUN, settings(root, *more))
    return [f for f in lint_files(config, site) if f.rule != without]


def test_nothing_is_said_against_good_files_on_a_good_node(good):
    assert said(good) == []


def test_a_laptop_is_not_asked_for_a_node_s_environment(good):
    assert said(good, site=Site()) == []


def other_source(root, name, **changes):
    write_dataset(root / name, [range(7, 190)] * 4, changes.pop("tokenizer", TOKENIZER), **changes)
    return f"data.sources=[{{name: a, path: {root}/a}},{{name: b, path: {root}/{name}}}]"


def with_checkpoint(root, name="small", **changes):
    """A directory that looks like the newest checkpoint to rules that read its run file."""
    pytest.importorskip("torch")
    from megalemur.checkpoint.save import save_checkpoint
    from tests.unit.checkpoint.synthetic import contents, whole_pieces

    config = parse_run(RUN, settings(root, f"run.name={name}", *(f"{k}={v}" for k, v in changes.items())))
    files = {"config.json": b"{}", "run.yaml": dump_run(config).encode()}
    save_checkpoint(root / "checkpoints", contents(whole_pieces(), files=files), group=None, max_file_bytes=1 << 20)


FILES = {
    "sources_can_be_read": lambda root: ((root / "a.bin").unlink(), [])[1],
    "tokenizers_agree": lambda root: [other_source(root, "b", tokenizer=tokenizer_record(b"other", vocab_size=2048))],
    "special_ids_agree": lambda root: [other_source(root, "b", tokenizer=tokenizer_record(vocab_size=2048, eos_id=3))],
    "documents_end_alike": lambda root: [other_source(root, "b", append_eos=False)],
    "sources_differ": lambda root: (
        write_dataset(root / "b", [range(3, 200)] * 4, TOKENIZER),
        [f"data.sources=[{{name: a, path: {root}/a}},{{name: b, path: {root}/b}}]"],
    )[1],
    "manifests_are_there": lambda root: ((root / "a.manifest.json").unlink(), [])[1],
    "epochs_within_limit": lambda root: [
        f"data.sources=[{{name: a, path: {root}/a, max_epochs: 2}}]",
        "run.steps=60",
    ],
    "epochs_many": lambda root: ["run.steps=110"],
    "validation_is_held_out": lambda root: (
        write_dataset(root / "w", [range(3, 200)] * 4, TOKENIZER),
        [f"data.validation=[{{name: v, path: {root}/w}}]"],
    )[1],
    "unknown_tokens_many": lambda root: [other_source(root, "b", unknown_tokens=50)],
    "start_can_be_read": lambda root: ["model.num_layers=4"],
    "start_says_what_is_loaded": lambda root: ["checkpoint.load=all"],
    "own_checkpoints_verify": lambda root: ((root / "checkpoints/step_000005").mkdir(parents=True), [])[1],
    "resume_is_allowed": lambda root: (with_checkpoint(root, **{"run.seed": 7}), [])[1],
    "resumes_another_run": lambda root: (with_checkpoint(root, name="other"), [])[1],
    "folders_can_be_written": lambda root: [f"log.directory={root}/a.bin/log"],
    "disk_has_room": lambda root: ["model.num_layers=8000000", "checkpoint.start_from=null"],
    "disk_has_inodes": lambda root: ["run.steps=100000000", "checkpoint.save_every=1"],
}
NODES = {
    "tasks_match_layout": {"MEGALEMUR_TASKS": "16"},
    "connections_not_one": {"CUDA_DEVICE_MAX_CONNECTIONS": ""},
    "nccl_links_disabled": {"NCCL_P2P_DISABLE": "1"},
    "nccl_network_disabled": {"NCCL_IB_DISABLE": "1"},
    "nccl_takes_a_signal": {"NCCL_PROXY_DUMP_SIGNAL": "10"},
    "errors_not_handled": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
    "kernels_wait_for_each_other": {"CUDA_LAUNCH_BLOCKING": "1"},
    "threads_oversubscribed": {"OMP_NUM_THREADS": "96"},
    "allocator_fragments": {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"},
}
LIMITS = {
    "shared_memory_small": {"shared_memory": 64 << 20},
    "open_files_few": {"open_files": 128.0},
    "locked_memory_small": {"locked_memory": 8192.0},
}


def test_every_rule_is_tried():
    tried = [*FILES, *NODES, *LIMITS, "connections_one_without_tensor"]
    assert sorted(tried) == sorted(rule.name for rule in FILE_RULES)


def fires_and_is_missed(rule, found, again, monkeypatch):
    assert [f for f in found if f.rule == rule], found
    others = tuple(r for r in FILE_RULES if r.name != rule)
    monkeypatch.setattr("megalemur.plan.lint.disk_catalogue.FILE_RULES", others)
    assert [f for f in again() if f.rule == rule] == []


@pytest.mark.parametrize("rule", FILES)
def test_a_rule_over_files_fires(rule, good, monkeypatch):
    more = FILES[rule](good)
    fires_and_is_missed(rule, said(good, *more), lambda: said(good, *more), monkeypatch)


@pytest.mark.parametrize("rule", [*NODES, *LIMITS])
def test_a_rule_over_the_machine_fires(rule, good, monkeypatch):
    site = replace(NODE, environ={**NODE.environ, **NODES.get(rule, {})}, **LIMITS.get(rule, {}))
    fires_and_is_missed(rule, said(good, site=site), lambda: said(good, site=site), monkeypatch)


def test_one_connection_without_tensor_parallelism_overlaps_nothing(good, monkeypatch):
    more = ["parallel.tensor=1", "parallel.data=2", "parallel.overlap_grad_reduce=true"]
    rule = "connections_one_without_tensor"
    fires_and_is_missed(rule, said(good, *more), lambda: said(good, *more), monkeypatch)


@pytest.mark.parametrize("number", ["", "-1", "34"])
def test_a_signal_that_nobody_stops_a_run_with_may_be_nccls(good, number):
    site = replace(NODE, environ={**NODE.environ, "NCCL_PROXY_DUMP_SIGNAL": number})
    assert said(good, site=site) == []
