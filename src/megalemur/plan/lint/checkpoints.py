"""Rules over checkpoints and the disk: what a run starts from, what it would resume, and whether there is room."""

import os

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.manifest import MANIFEST
from megalemur.checkpoint.retention import survey
from megalemur.config.load import parse_resolved
from megalemur.config.plain_files import read_plain
from megalemur.config.resume import compare, refusals
from megalemur.config.run import RunConfig
from megalemur.model.hf_config import check_model_matches, read_hf_config
from megalemur.plan.lint.files import Files
from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.machine import existing
from megalemur.plan.lint.scale import checkpoint_bytes, size

_RUN_FILE = "run.yaml"
_SMALL_FILES = 24


def start_can_be_read(config: RunConfig, files: Files) -> Texts:
    """checkpoint.start_from is missing, is no Llama, or is another model than the run's.
    https://github.com/huggingface/transformers/issues/24986"""
    start = config.checkpoint.start_from
    if start is None or (not isinstance(files.newest, CheckpointError) and files.newest.path is not None):
        return
    try:
        check_model_matches(config.model, read_hf_config(start))
    except ValueError as error:
        yield f"checkpoint.start_from={start}: {error}"


def start_says_what_is_loaded(config: RunConfig, files: Files) -> Texts:
    """checkpoint.start_from is a checkpoint with moments, and the run file does not say what becomes of them.
    https://github.com/areal-project/AReaL/pull/1468"""
    start, load = config.checkpoint.start_from, config.checkpoint.load
    if start is None or (not isinstance(files.newest, CheckpointError) and files.newest.path is not None):
        return
    if load is None and (start / MANIFEST).is_file() and (start / "trainer").is_dir():
        yield (
            f"checkpoint.start_from={start} holds moments and counters; write checkpoint.load=weights to begin a "
            "new run "
            "with its masters, or checkpoint.load=all to go on with that run"
        )
    if load == "all" and start.is_dir() and not (start / MANIFEST).is_file():
        yield f"checkpoint.load=all, but checkpoint.start_from={start} has no moments; use checkpoint.load=weights"


def own_checkpoints_verify(files: Files) -> Texts:
    """The run has checkpoints, and none of them can be resumed from, by manifest and sizes.
    https://github.com/RLinf/RLinf/pull/1469"""
    if isinstance(files.newest, CheckpointError):
        yield str(files.newest)


def resume_is_allowed(config: RunConfig, files: Files) -> Texts:
    """The newest checkpoint is of a run with settings that a resume may not change.
    https://github.com/bghira/SimpleTuner/pull/3093 https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5637"""
    old = _resumed_settings(files)
    if old is not None:
        for sentence in refusals(compare(old, config).differences, config.checkpoint.allow_changes):
            yield f"resuming the newest checkpoint in {config.checkpoint.directory}: {sentence}"


def resumes_another_run(config: RunConfig, files: Files) -> Texts:
    """The newest checkpoint in checkpoint.directory was written by a run of another name.
    https://github.com/meta-pytorch/torchforge/issues/631 https://github.com/NVIDIA-NeMo/Automodel/issues/836"""
    old = _resumed_settings(files) or {}
    section = old.get("run")
    name = section.get("name") if isinstance(section, dict) else None
    if name is not None and name != config.run.name:
        yield (
            f"checkpoint.directory={config.checkpoint.directory} holds checkpoints of the run {name!r}, which this one "
            f"({config.run.name!r}) would go on with; use another checkpoint.directory for a new run"
        )


def _resumed_settings(files: Files) -> dict[str, object] | None:
    """The run file of the newest checkpoint."""
    if isinstance(files.newest, CheckpointError) or files.newest.path is None:
        return None
    try:
        return parse_resolved(read_plain(files.newest.path / _RUN_FILE, follow_links=False).decode())
    except (OSError, ValueError):
        return None


def folders_can_be_written(config: RunConfig) -> Texts:
    """checkpoint.directory or log.directory cannot be written: the run would fail at its first save.
    https://github.com/mlfoundations/open_lm/issues/154"""
    for name, path in (("checkpoint.directory", config.checkpoint.directory), ("log.directory", config.log.directory)):
        there = existing(path)
        if not there.is_dir():
            yield f"{name}={path}: {there} is no directory; use another place"
        elif not os.access(there, os.W_OK | os.X_OK):
            yield f"{name}={path}: {there} cannot be written by this user; use another place, or change its rights"


def _stays(config: RunConfig) -> tuple[float, int]:
    """(bytes, directories) that the run's checkpoints take at most, the one being written included."""
    rules, model, steps = config.checkpoint, config.model, config.last_step
    whole, every = checkpoint_bytes(model), rules.save_every
    saves = -(-steps // every) if every else 1
    if not rules.keep:
        return float(saves * whole), saves
    held = min(saves, rules.keep + 1)
    more = steps // rules.keep_every if rules.keep_every else 0
    weights = steps // rules.keep_weights_every if rules.keep_weights_every else 0
    return float((held + more) * whole + weights * whole / 7), held + more + weights


def disk_has_room(config: RunConfig) -> Texts:
    """The checkpoints that retention keeps do not fit the free disk.
    https://github.com/mlfoundations/open_lm/issues/154 https://github.com/allenai/OLMo-core/pull/694"""
    there = existing(config.checkpoint.directory)
    if not there.is_dir():
        return  # folders_can_be_written reports it
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    wanted, count = _stays(config)
    stored = sum(
        sum(entry.size for entry in item.manifest.files.values())
        for item in survey(config.checkpoint.directory)
        if item.manifest is not None
    )
    more = wanted - stored
    if more > free:
        yield (
            f"checkpoint.directory={config.checkpoint.directory}: the run keeps up to {count} checkpoints of "
            f"{size(checkpoint_bytes(config.model))}, {size(wanted)} in all; {size(stored)} are there, and "
            f"{size(free)} "
            "are free (a quota is not seen); lower checkpoint.keep or raise checkpoint.save_every, or use another disk"
        )


def disk_has_inodes(config: RunConfig) -> Texts:
    """The files of the checkpoints are more than the file system has names for.
    https://github.com/hpcugent/vsc_user_docs/pull/660"""
    there = existing(config.checkpoint.directory)
    if not there.is_dir():
        return
    found = os.statvfs(there)
    files = _stays(config)[1] * (2 * config.parallel.world_size + _SMALL_FILES)
    if found.f_files and files > found.f_favail:
        yield (
            f"checkpoint.directory={config.checkpoint.directory}: up to {files} files, but the file system has "
            f"{found.f_favail} names (inodes) left; lower checkpoint.keep, or use another disk"
        )


RULES = (
    ("error", start_can_be_read),
    ("error", start_says_what_is_loaded),
    ("error", own_checkpoints_verify),
    ("error", resume_is_allowed),
    ("warning", resumes_another_run),
    ("error", folders_can_be_written),
    ("error", disk_has_room),
    ("error", disk_has_inodes),
)
