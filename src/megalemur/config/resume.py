"""What a resume may change: every setting of a run file is free, recorded or refused, each with its reason.

Compares a run file with the one that a checkpoint carries, as plain values: a file of an older schema compares too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from megalemur.config.run import RunConfig

Keys = tuple[str, ...]


class Policy(Enum):
    """What becomes of a difference between a run file and the checkpoint that it resumes."""

    FREE = "free"
    """Passes without a word."""
    RECORDED = "recorded"
    """Takes effect from the next step; logged, and kept in trainer/state.json from then on."""
    REFUSED = "refused"
    """The run does not start."""


class Rule(NamedTuple):
    """One row of the table."""

    policy: Policy
    reason: str
    unless: str = ""
    """Word in checkpoint.allow_changes that turns a refusal into a record."""


def _free(reason: str) -> Rule:
    return Rule(Policy.FREE, reason)


def _recorded(reason: str) -> Rule:
    return Rule(Policy.RECORDED, reason)


def _refused(reason: str, unless: str = "") -> Rule:
    return Rule(Policy.REFUSED, reason, unless)


_OTHER_MODEL = _refused("another model: the state does not fit it, or means something else in it")
_NUMBERS = _refused("other numbers from the same state", unless="precision")
_LAYOUT = _recorded("any layout loads any checkpoint; sums are taken in another order")
_RATE = _recorded("a function of the step: the next step runs at the new rate")
_UPDATE = _recorded("the next update uses it; the moments stay")
_BLEND = _recorded("part of the blend: the history of the data takes it up at the next sample")
_WATCHED = _recorded("validation losses before and after are not of the same samples")
_GUARD = _recorded("decides which steps are skipped")
_SAYS = _free("what is said, not what is trained")
_FILES = _free("where and when files are written")
_SAME_BITS = _free("memory for time; the same bits")

RULES: Mapping[str, Rule] = {
    "run.name": _SAYS,
    "run.steps": _recorded("the end of the run and of its schedule"),
    "run.seed": _refused("samples would come twice or never"),
    "run.deterministic": _recorded("other kernels, other roundings"),
    "run.stop_at": _free("a pause"),
    "run.stop_before": _free("a pause"),
    "run.check_replicas_every": _free("compares, changes nothing"),
    "run.collective_timeout": _free("patience"),
    "run.collect_garbage_every": _free("memory of the process"),
    "model.preset": _free("a name; what it fills in is compared setting by setting"),
    "model.num_layers": _OTHER_MODEL,
    "model.hidden_size": _OTHER_MODEL,
    "model.ffn_hidden_size": _OTHER_MODEL,
    "model.num_attention_heads": _OTHER_MODEL,
    "model.num_query_groups": _OTHER_MODEL,
    "model.vocab_size": _OTHER_MODEL,
    "model.max_position_embeddings": _OTHER_MODEL,
    "model.rope_theta": _OTHER_MODEL,
    "model.rope_scaling.factor": _OTHER_MODEL,
    "model.rope_scaling.low_freq_factor": _OTHER_MODEL,
    "model.rope_scaling.high_freq_factor": _OTHER_MODEL,
    "model.rope_scaling.original_max_position_embeddings": _OTHER_MODEL,
    "model.norm_eps": _OTHER_MODEL,
    "model.tie_embeddings": _OTHER_MODEL,
    "model.init_std": _free("only a start from scratch draws weights"),
    "model.backend": _recorded("what it resolves to is compared as the fact `backend`"),
    "parallel.tensor": _LAYOUT,
    "parallel.pipeline": _LAYOUT,
    "parallel.chunks": _LAYOUT,
    "parallel.context": _LAYOUT,
    "parallel.data": _LAYOUT,
    "parallel.sequence": _LAYOUT,
    "parallel.first_stage_layers": _LAYOUT,
    "parallel.last_stage_layers": _LAYOUT,
    "parallel.distributed_optimizer": _LAYOUT,
    "parallel.overlap_grad_reduce": _LAYOUT,
    "parallel.overlap_param_gather": _LAYOUT,
    "parallel.overlap_p2p": _LAYOUT,
    "parallel.pad_vocab_to": _LAYOUT,
    "parallel.bucket_parameters": _LAYOUT,
    "precision.dtype": _NUMBERS,
    "precision.reduce_grads_in_fp32": _NUMBERS,
    "precision.fp8": _NUMBERS,
    "precision.recompute": _SAME_BITS,
    "precision.recompute_modules": _SAME_BITS,
    "precision.recompute_method": _SAME_BITS,
    "precision.recompute_layers": _SAME_BITS,
    "optim.kind": _recorded("its class is compared as the fact `optimizer`"),
    "optim.learning_rate": _RATE,
    "optim.beta1": _UPDATE,
    "optim.beta2": _UPDATE,
    "optim.eps": _UPDATE,
    "optim.weight_decay": _UPDATE,
    "optim.clip_grad_norm": _UPDATE,
    "schedule.kind": _RATE,
    "schedule.warmup_steps": _RATE,
    "schedule.decay_steps": _RATE,
    "schedule.min_ratio": _RATE,
    "guard.loss_spike": _GUARD,
    "guard.grad_norm_spike": _GUARD,
    "guard.window": _GUARD,
    "guard.min_values": _GUARD,
    "guard.rollback_after": _GUARD,
    "guard.max_rollbacks": _GUARD,
    "data.sequence_length": _refused("samples would be cut elsewhere and come twice or never"),
    "data.micro_batch_size": _free("the same samples in every step; sums are taken in another order"),
    "data.global_batch_size": _recorded("samples are counted, not steps: the next step goes on at the next sample"),
    "data.sources.*.name": _BLEND,
    "data.sources.*.path": _recorded("a source is known by the digest of its files: other files are another source"),
    "data.sources.*.weight": _BLEND,
    "data.sources.*.kind": _refused("another kind cuts other samples"),
    "data.sources.*.max_epochs": _recorded("a limit, checked against the ledger before the start"),
    "data.validation.*.name": _WATCHED,
    "data.validation.*.path": _WATCHED,
    "data.validation.*.weight": _free("a validation source has no share"),
    "data.validation.*.kind": _WATCHED,
    "data.validation.*.max_epochs": _free("no run trains on it"),
    "data.validate_every": _SAYS,
    "data.validation_samples": _WATCHED,
    "data.document_mask": _recorded("the same samples, seen otherwise from the next step on"),
    "data.tokenizer": _recorded("checked against the sources, and carried by later checkpoints"),
    "checkpoint.directory": _FILES,
    "checkpoint.start_from": _free("read at a start only"),
    "checkpoint.load": _free("read at a start only"),
    "checkpoint.save_every": _FILES,
    "checkpoint.asynchronous": _FILES,
    "checkpoint.keep": _FILES,
    "checkpoint.keep_every": _FILES,
    "checkpoint.keep_weights_every": _FILES,
    "checkpoint.read_back": _FILES,
    "checkpoint.max_failed_saves": _free("patience"),
    "checkpoint.export_dtype": _recorded("the width of the exported weights; the fp32 state does not change"),
    "checkpoint.max_file_bytes": _FILES,
    "checkpoint.weight_files": _FILES,
    "checkpoint.allow_changes": _free("what it lets pass is recorded itself"),
    "log.directory": _SAYS,
    "log.every": _SAYS,
    "log.tensorboard": _SAYS,
    "log.profiler.start_step": _SAYS,
    "log.profiler.steps": _SAYS,
    "log.profiler.ranks": _SAYS,
    "log.memory_snapshot": _SAYS,
    "log.peak_teraflops": _SAYS,
    "watchdog.enabled": _free("watches, changes nothing"),
    "watchdog.timeout": _free("patience"),
    "watchdog.slow_timeout": _free("patience"),
}
"""Setting to its rule; `*` stands for the items of a list, which are known by their names."""

FACTS: Mapping[str, Rule] = {
    "backend": _refused("other kernels than those that the checkpoint was trained with", unless="backend"),
    "optimizer": _refused("another optimizer class reads the moments", unless="optimizer"),
    "versions": _refused("another release of megalemur, torch or megatron-core computes", unless="versions"),
}
"""What a checkpoint's record says about the process that wrote it, compared like a setting."""


class Difference(NamedTuple):
    """A setting that has another value than in the checkpoint; None: not there, or not set."""

    setting: str
    old: Any
    new: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.setting}: {_shown(self.old)} in the checkpoint, {_shown(self.new)} now"


class Comparison(NamedTuple):
    """What a run file changes about a checkpoint's run."""

    differences: tuple[Difference, ...]
    unknown: tuple[str, ...]
    """Settings of the checkpoint's run file that this release does not have."""
    unset: tuple[str, ...]
    """Settings that it lacks and that have no default: nothing is known about them."""


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def rule_of(path: Keys) -> Rule:
    """The rule of a setting, items of lists by their names as in ("data", "sources", "code", "weight")."""
    generic = (*path[:2], "*", *path[3:]) if path[:2] in _LISTS else path
    return RULES[".".join(generic)]


_LISTS = (("data", "sources"), ("data", "validation"))
_NOTHING = object()


def settings(section: type[BaseModel] = RunConfig, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every setting that a run file can have, with its default in JSON's types; `*` for the items of a list.

    A setting without a default comes with one that equals nothing else.
    """
    for name, field in section.model_fields.items():
        here = (*path, name)
        inner = _inner(field.annotation)
        if inner is None:
            yield here, _NOTHING if field.is_required() else _plain(section, name)
        else:
            yield from settings(inner, (*here, "*") if here in _LISTS else here)


def _plain(section: type[BaseModel], name: str) -> Any:
    """A default as a resolved run file has it."""
    default = section.model_fields[name].get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: alone, optional or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part)) is not None), None)


def _leaves(values: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every value of a resolved run file. A section that is null yields nothing: its settings count as not set."""
    if path in _LISTS and isinstance(values, list):
        values = {str(item.get("name")): item for item in values if isinstance(item, Mapping)}
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, values


def compare(old: Mapping[str, Any], new: RunConfig) -> Comparison:
    """What differs between a checkpoint's run file and this one, in the order of the settings.

    Settings that the old file lacks had their defaults; those that this release lacks are named, not refused.

    Args:
        old: the resolved run file of the checkpoint, parsed and not validated.
        new: this run.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new.model_dump(mode="json")))
    differences, unset, known = [], [], set()
    for generic, default in settings():
        for path in _instances(generic, [*before, *after]):
            known |= {path[:end] for end in range(len(path) + 1)}  # a section that is null is a leaf of its own
            one, other = _value(path, before, default), _value(path, after, default)
            if one is _NOTHING:
                unset.append(".".join(path))
            elif one != other and not _comes_or_goes(path, one, other):
                differences.append(Difference(".".join(path), one, other, rule_of(path)))
    unknown = [".".join(path) for path in before if path not in known]
    return Comparison(tuple(differences), tuple(unknown), tuple(unset))


def _instances(generic: Keys, given: list[Keys]) -> list[Keys]:
    """The setting itself, or that of every item of its list."""
    if "*" not in generic:
        return [generic]
    names = dict.fromkeys(path[2] for path in given if path[:2] == generic[:2] and len(path) > 2)
    return [(*generic[:2], name, *generic[3:]) for name in names]


def _value(path: Keys, values: Mapping[Keys, Any], default: Any) -> Any:
    """What a setting is: given, or its default, or None where the section or item that would hold it is not there."""
    if path in values:
        return values[path]
    there = len(path) == 2 or any(len(other) == len(path) and other[:-1] == path[:-1] for other in values)
    return default if there else None


def _comes_or_goes(path: Keys, one: Any, other: Any) -> bool:
    """A refused setting of an item that is new or gone: the item counts, not what it cannot change into."""
    return path[:2] in _LISTS and None in (one, other) and rule_of(path).policy is Policy.REFUSED


def refusals(differences: Iterable[Difference], allowed: Sequence[str]) -> list[str]:
    """A sentence for each difference that is refused and not allowed by checkpoint.allow_changes."""
    return [
        f"{difference} ({difference.rule.reason}"
        + (f"; accepted with {difference.rule.unless} in checkpoint.allow_changes)" if difference.rule.unless else ")")
        for difference in differences
        if difference.rule.policy is Policy.REFUSED and difference.rule.unless not in allowed
    ]


def table() -> str:
    """The table of docs/resume.md."""
    rows = [("setting", "at a resume", "why"), ("---", "---", "---")]
    for name, rule in [*RULES.items(), *((f"fact: {name}", rule) for name, rule in FACTS.items())]:
        unless = f", unless `checkpoint.allow_changes` has `{rule.unless}`" if rule.unless else ""
        rows.append((f"`{name}`", f"{rule.policy.value}{unless}", rule.reason))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
