"""Each setting changed and the run resumed: free, recorded or refused, as the table says."""

import json

import pytest

from megalemur.config.load import dump_run, parse_run
from megalemur.config.resume import FACTS, RULES, Policy
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run, write_data

P = "parallel."
KEEPING = ("checkpoint.keep=2", "checkpoint.save_every=5")
CHANGED = {
    "run.name": "run.name=another",
    "run.steps": "run.steps=12",
    "run.seed": "run.seed=5",
    "run.deterministic": "run.deterministic=true",
    "run.stop_at": "run.stop_at=5",
    "run.stop_before": "run.stop_before=20min",
    "run.check_replicas_every": "run.check_replicas_every=3",
    "run.collective_timeout": "run.collective_timeout=60",
    "run.collect_garbage_every": "run.collect_garbage_every=5",
    "model.num_layers": "model.num_layers=2",
    "model.hidden_size": "model.hidden_size=128",
    "model.ffn_hidden_size": "model.ffn_hidden_size=128",
    "model.num_attention_heads": "model.num_attention_heads=4",
    "model.num_query_groups": "model.num_query_groups=2",
    "model.vocab_size": "model.vocab_size=300",
    "model.max_position_embeddings": "model.max_position_embeddings=256",
    "model.rope_theta": "model.rope_theta=5e5",
    **{
        f"model.rope_scaling.{key}": "model.rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
        "original_max_position_embeddings: 64}"
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    },
    "model.norm_eps": "model.norm_eps=1e-6",
    "model.tie_embeddings": "model.tie_embeddings=true",
    "model.init_std": "model.init_std=0.03",
    "model.backend": "model.backend=torch",
    "parallel.tensor": f"{P}tensor=2",
    "parallel.pipeline": f"{P}pipeline=2",
    "parallel.chunks": (f"{P}chunks=2", f"{P}pipeline=2"),
    "parallel.data": f"{P}data=2",
    "parallel.sequence": f"{P}sequence=false",
    "parallel.first_stage_layers": (f"{P}first_stage_layers=3", f"{P}pipeline=2"),
    "parallel.last_stage_layers": (f"{P}last_stage_layers=3", f"{P}pipeline=2"),
    "parallel.distributed_optimizer": f"{P}distributed_optimizer=false",
    "parallel.overlap_grad_reduce": f"{P}overlap_grad_reduce=true",
    "parallel.overlap_param_gather": (f"{P}overlap_param_gather=true", f"{P}overlap_grad_reduce=true"),
    "parallel.overlap_p2p": (f"{P}overlap_p2p=true", f"{P}chunks=2", f"{P}pipeline=2"),
    "parallel.pad_vocab_to": f"{P}pad_vocab_to=32",
    "parallel.bucket_parameters": f"{P}bucket_parameters=1000",
    "precision.dtype": "precision.dtype=bf16",
    "precision.reduce_grads_in_fp32": "precision.reduce_grads_in_fp32=false",
    "precision.recompute": "precision.recompute=full",
    "precision.recompute_modules": "precision.recompute_modules=[mlp]",
    "precision.recompute_method": "precision.recompute_method=block",
    "precision.recompute_layers": "precision.recompute_layers=2",
    "optim.kind": "optim.kind=adamw",
    "optim.learning_rate": "optim.learning_rate=2e-3",
    "optim.beta1": "optim.beta1=0.8",
    "optim.beta2": "optim.beta2=0.99",
    "optim.eps": "optim.eps=1e-7",
    "optim.weight_decay": "optim.weight_decay=0",
    "optim.clip_grad_norm": "optim.clip_grad_norm=0.5",
    "schedule.kind": "schedule.kind=constant",
    "schedule.warmup_steps": "schedule.warmup_steps=4",
    "schedule.decay_steps": "schedule.decay_steps=9",
    "schedule.min_ratio": "schedule.min_ratio=0.2",
    "guard.loss_spike": "guard.loss_spike=10",
    "guard.grad_norm_spike": "guard.grad_norm_spike=20",
    "guard.window": "guard.window=64",
    "guard.min_values": "guard.min_values=16",
    "guard.rollback_after": "guard.rollback_after=3",
    "guard.max_rollbacks": "guard.max_rollbacks=1",
    "data.sequence_length": "data.sequence_length=64",
    "data.micro_batch_size": "data.micro_batch_size=4",
    "data.global_batch_size": "data.global_batch_size=4",
    "data.sources.*.name": "data.sources.0.name=other",
    "data.sources.*.path": "data.sources.0.path=HERE/c",
    "data.sources.*.weight": "data.sources.0.weight=2",
    "data.sources.*.max_epochs": "data.sources.0.max_epochs=50",
    "data.validation.*.name": "data.validation.0.name=other",
    "data.validation.*.path": "data.validation.0.path=HERE/c",
    "data.validation.*.weight": "data.validation.0.weight=2",
    "data.validation.*.max_epochs": "data.validation.0.max_epochs=2",
    "data.validate_every": "data.validate_every=5",
    "data.validation_samples": "data.validation_samples=8",
    "data.document_mask": "data.document_mask=intra",
    "data.tokenizer": "data.tokenizer=HERE/tokenizer.model",
    "checkpoint.start_from": "checkpoint.start_from=HERE/hf",
    "checkpoint.load": ("checkpoint.load=weights", "checkpoint.start_from=HERE/hf"),
    "checkpoint.save_every": "checkpoint.save_every=5",
    "checkpoint.asynchronous": "checkpoint.asynchronous=false",
    "checkpoint.keep": "checkpoint.keep=2",
    "checkpoint.keep_every": (*KEEPING, "checkpoint.keep_every=10"),
    "checkpoint.keep_weights_every": (*KEEPING, "checkpoint.keep_weights_every=10"),
    "checkpoint.read_back": "checkpoint.read_back=false",
    "checkpoint.max_failed_saves": "checkpoint.max_failed_saves=1",
    "checkpoint.export_dtype": "checkpoint.export_dtype=bf16",
    "checkpoint.max_file_bytes": "checkpoint.max_file_bytes=100000",
    "checkpoint.weight_files": "checkpoint.weight_files=2",
    "checkpoint.allow_changes": "checkpoint.allow_changes=[versions]",
    "log.directory": "log.directory=HERE/other",
    "log.every": "log.every=5",
    "log.tensorboard": "log.tensorboard=true",
    "log.profiler.start_step": "log.profiler.start_step=5",
    "log.profiler.steps": "log.profiler.start_step=5",
    "log.profiler.ranks": "log.profiler.start_step=5",
    "log.memory_snapshot": "log.memory_snapshot=true",
    "log.peak_teraflops": "log.peak_teraflops=1",
    "watchdog.enabled": "watchdog.enabled=false",
    "watchdog.timeout": "watchdog.timeout=20",
    "watchdog.slow_timeout": "watchdog.slow_timeout=600",
}
ELSEWHERE = {
    "model.preset",  # a name beside settings that are all given
    "parallel.context",  # needs Transformer Engine
    "precision.fp8",  # needs Transformer Engine
    "data.sources.*.kind",  # there is one kind only
    "data.validation.*.kind",
    "checkpoint.directory",  # in another directory there is nothing to resume
}
"""Rows that no run of this machine can change; tests/unit/config/test_resume.py compares them all the same."""


def base(directory, *overrides):
    validation = f"data.validation=[{{name: v, path: {directory}/b}}]"
    return tiny_run(directory, validation, *overrides, num_layers=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that stood still after one step, with what the rows need beside it."""
    from tests.support.training import train_and_save

    directory = tmp_path_factory.mktemp("policy")
    write_data(directory / "c", vocab_size=251, seed=7)
    (directory / "tokenizer.model").write_bytes(b"a tokenizer")
    run_ranks(1, train_and_save, base(directory, "run.stop_at=1"))
    return directory


def outcome(config):
    """(settings that are recorded, what is refused) when this run is started again, without a process group."""
    import torch.distributed as dist

    from megalemur.train.setup import build_record, preflight
    from megalemur.train.start import Starts

    assert not dist.is_initialized()
    try:
        preflight(config)
    except ValueError as error:
        return [], str(error)
    start = Starts(config, build_record(config, "torch")).next()
    return [change.setting for change in start.changes.new], ""


def outcomes(configs):
    return [outcome(config) for config in configs]


def test_every_row_of_the_table_is_tried_or_said_to_be_elsewhere():
    assert set(CHANGED) | ELSEWHERE == set(RULES) and not set(CHANGED) & ELSEWHERE


@pytest.fixture(scope="module")
def tried(saved):
    """What became of each row."""
    rows = [(row,) if isinstance(row, str) else row for row in CHANGED.values()]
    configs = [base(saved, *(override.replace("HERE", str(saved)) for override in row)) for row in rows]
    (found,) = run_ranks(1, outcomes, configs)
    return dict(zip(CHANGED, found, strict=True))


@pytest.mark.parametrize("setting", CHANGED)
def test_a_row_of_the_table(tried, setting):
    recorded, refused = tried[setting]
    rule = RULES[setting]
    if setting == "optim.kind":  # the class that it names is what is refused
        assert "optimizer: FusedAdamW in the checkpoint, AdamW now" in refused
        return
    head, _, tail = setting.partition("*")
    names = [name for name in recorded if name.startswith(head) and name.endswith(tail)]
    if rule.policy is Policy.REFUSED:
        assert f"  - {setting}: " in refused and "checkpoint.start_from=" in refused
        assert (f"{rule.unless} in checkpoint.allow_changes" in refused) == bool(rule.unless)
    else:
        assert refused == "" and bool(names) == (rule.policy is Policy.RECORDED)


def test_everything_that_is_refused_is_said_at_once_on_every_rank_and_before_a_process_group(saved):
    wrong = ("run.seed=5", "data.sequence_length=64", "model.num_layers=2", "precision.dtype=bf16", "optim.kind=adamw")
    config = base(saved, *wrong, f"{P}data=2")
    one, other = run_ranks(2, start_refused, config)
    assert one == other
    for name in ("run.seed", "data.sequence_length", "model.num_layers", "precision.dtype", "optimizer"):
        assert f"  - {name}: " in one[0]
    assert one[1] is False


def start_refused(config):
    import torch.distributed as dist

    from megalemur.train.run import train

    try:
        train(config)
    except ValueError as error:
        return str(error), dist.is_initialized()
    return None


def resave(config, to, edit):
    """The same state under another directory, with a changed run file and record."""
    from dataclasses import replace

    from megalemur.checkpoint.save import save_checkpoint
    from megalemur.train.saving import contents_of
    from tests.support.training import start

    run = start(config)
    contents = contents_of(run)
    files, record = edit(dict(contents.files), dict(contents.record))
    settings = config.checkpoint
    return save_checkpoint(
        to, replace(contents, files=files, record=record), group=None, max_file_bytes=settings.max_file_bytes
    )


def of_an_older_release(files, record):
    text = files["run.yaml"].decode().replace("  check_replicas_every: 100\n", "  max_skipped_steps: 10\n")
    text = text[: text.index("guard:")] + text[text.index("\ndata:") + 1 :]
    return {**files, "run.yaml": text.encode()}, record


def with_other_facts(files, record):
    return files, {**record, "versions": {**record["versions"], "torch": "1.0"}, "backend": "transformer_engine"}


def without_a_run_file(files, record):
    return {name: data for name, data in files.items() if name != "run.yaml"}, record


@pytest.mark.parametrize("edit", [of_an_older_release, without_a_run_file])
def test_a_run_file_of_another_release_or_none_does_not_keep_a_run_from_going_on(saved, tmp_path, edit):
    run_ranks(1, resave, base(saved), tmp_path / "old", edit)
    config = base(saved, f"checkpoint.directory={tmp_path}/old")
    assert run_ranks(1, outcomes, [config])[0] == [([], "")]


def test_other_kernels_and_releases_are_refused_or_recorded_when_asked_for(saved, tmp_path):
    run_ranks(1, resave, base(saved), tmp_path / "other", with_other_facts)
    plain = base(saved, f"checkpoint.directory={tmp_path}/other")
    asked = base(saved, f"checkpoint.directory={tmp_path}/other", "checkpoint.allow_changes=[versions,backend]")
    (((_, refused), (recorded, nothing)),) = run_ranks(1, outcomes, [plain, asked])
    assert all(f"  - {name}: " in refused for name in ("backend", "versions")) and set(FACTS) > {"backend", "versions"}
    assert recorded == ["backend", "versions"] and nothing == ""


def take_two_and_save(config):
    from megalemur.train.saving import save_run
    from tests.support.training import start, take_steps

    run = start(config)
    take_steps(run, run.state.step + 2)
    return save_run(run), run.engine.guard.state


def state_of(path):
    return json.loads((path / "trainer/state.json").read_text())


def test_changes_take_effect_at_once_and_later_checkpoints_keep_them(tmp_path):
    first = ("optim.learning_rate=2e-3", "data.global_batch_size=4", "data.sources.1.weight=5")
    ((path, _),) = run_ranks(1, take_two_and_save, base(tmp_path))
    assert state_of(path)["changes"] == []
    ((path, guard),) = run_ranks(1, take_two_and_save, base(tmp_path, *first))
    state = state_of(path)
    assert state["run"]["samples"] == 2 * 8 + 2 * 4
    assert [blend["begins"] for blend in state["data"]["blends"]] == [0, 16]
    assert {change["setting"]: (change["step"], change["old"], change["new"]) for change in state["changes"]} == {
        "optim.learning_rate": (2, 1e-3, 2e-3),
        "data.global_batch_size": (2, 8, 4),
        "data.sources.b.weight": (2, 1.0, 5.0),
    }
    assert len(guard.losses) == 2, "what moves the losses empties the guard's window"
    ((path, guard),) = run_ranks(1, take_two_and_save, base(tmp_path, *first, f"{P}pad_vocab_to=8"))
    kept = [(change["step"], change["setting"]) for change in state_of(path)["changes"]]
    assert kept[:3] == [(change["step"], change["setting"]) for change in state["changes"]]
    assert kept[3:] == [(4, "parallel.pad_vocab_to")]
    assert len(guard.losses) == 4, "another layout does not"


def test_other_data_under_the_same_path_are_another_source_from_the_next_sample_on(tmp_path):
    ((path, _),) = run_ranks(1, take_two_and_save, base(tmp_path))
    write_data(tmp_path / "a2", vocab_size=251, seed=9)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a2{suffix}").replace(tmp_path / f"a{suffix}")
    ((path, _),) = run_ranks(1, take_two_and_save, base(tmp_path))
    blends = state_of(path)["data"]["blends"]
    assert [blend["begins"] for blend in blends] == [0, 16]
    assert len({share["key"] for blend in blends for share in blend["shares"]}) == 3


def deterministic(config):
    import os

    import torch

    from megalemur.train.deterministic import use_deterministic_kernels
    from tests.support.training import start, take_steps

    use_deterministic_kernels()
    run = start(config)
    take_steps(run, 2)
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    flags = (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
    return [os.environ[name] for name in names], flags, run.engine.chunks[0].config.deterministic_mode


def test_a_deterministic_run_says_so_to_everybody(tmp_path):
    config = base(tmp_path, "run.deterministic=true", f"{P}tensor=2")
    assert run_ranks(2, deterministic, config) == [([":4096:8", "Ring", "0"], (True, False), True)] * 2


def contradicted(config):
    import os

    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "1"
    return start_refused(config)


def test_an_environment_that_says_the_opposite_is_refused(tmp_path):
    ((said, begun),) = run_ranks(1, contradicted, base(tmp_path, "run.deterministic=true"))
    assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 contradicts run.deterministic=true" in said and not begun


def test_the_resolved_run_of_a_checkpoint_reads_back(saved):
    text = (saved / "checkpoints/step_000001/run.yaml").read_text()
    assert dump_run(parse_run(text)) == text
