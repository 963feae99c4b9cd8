"""Every cross-check fires on a run that it is there for, names the way out, and lets the neighbouring run pass."""

import inspect
import re

import pytest
import yaml

from megalemur.config.checks import CHECKS
from megalemur.config.load import parse_run
from tests.unit.config.run_files import RUN, problems

SOURCE = "{name: a, path: here/a}"
# check -> (overrides of the small run, what is said). tiny: 8 layers, width 128, 8 heads, 4 groups, 2048 tokens
FIRES = {
    "attention_shape": [
        ("model.num_attention_heads=12", "num_attention_heads=12 does not divide model.hidden_size=128; use 1, 2, 4"),
        ("model.num_attention_heads=128 model.num_query_groups=128", "head size 1 is odd"),
        ("model.num_query_groups=3", "num_query_groups=3 does not divide model.num_attention_heads=8; use 1, 2, 4, 8"),
    ],
    "layers_over_stages": [
        ("parallel.pipeline=3", "parallel.pipeline=3 does not divide model.num_layers=8; use 1, 2, 4, 8"),
        ("parallel.pipeline=2 parallel.chunks=3", "parallel.chunks=3 does not divide the 4 layers of a pipeline stage"),
        ("parallel.pipeline=2 parallel.first_stage_layers=8", "leave 0 of model.num_layers=8 for 1 stages"),
        ("parallel.pipeline=2 parallel.first_stage_layers=3 parallel.last_stage_layers=4", "leave 1 of"),
        ("parallel.first_stage_layers=3", "need parallel.pipeline above 1"),
        ("parallel.chunks=2", "parallel.chunks=2 needs parallel.pipeline above 1"),
    ],
    "widths_over_tensor": [
        ("parallel.tensor=16", "parallel.tensor=16 does not divide model.num_attention_heads=8; use 1, 2, 4, 8"),
        ("parallel.tensor=4 model.ffn_hidden_size=342", "does not divide model.ffn_hidden_size=342; use 1, 2, 3, 6"),
        (
            "parallel.tensor=6 model.num_attention_heads=12 model.hidden_size=384 model.ffn_hidden_size=384 "
            "data.sequence_length=96",
            "neither divides model.num_query_groups=4 nor is a multiple of it",
        ),
    ],
    "vocabulary_padding": [
        ("model.vocab_size=100 parallel.tensor=2", "pads model.vocab_size=100 by 156 rows"),
    ],
    "batch_over_replicas": [
        ("parallel.data=3", "no multiple of data.micro_batch_size=1 x parallel.data=3; use 6 or 9"),
        ("data.micro_batch_size=16", "use 16"),
        ("parallel.pipeline=4 parallel.chunks=2 data.global_batch_size=6", "to be a multiple of parallel.pipeline=4"),
    ],
    "sequence_over_tensor": [
        ("parallel.sequence=true", "parallel.sequence=true has no effect with parallel.tensor=1"),
        ("parallel.tensor=4 data.sequence_length=62", "sequence_length=62 is no multiple of 4"),
        (
            "parallel.tensor=2 parallel.context=2 model.backend=transformer_engine data.sequence_length=60",
            "sequence_length=60 is no multiple of 8",
        ),
    ],
    "sequence_within_model": [
        ("data.sequence_length=1024", "sequence_length=1024 is above model.max_position_embeddings=512"),
    ],
    "recompute_over_layers": [
        ("precision.recompute=full precision.recompute_layers=3", "must divide the 8 layers of a model chunk"),
        (
            "precision.recompute=full precision.recompute_method=block precision.recompute_layers=5 "
            "parallel.pipeline=2",
            "must be at most the 4 layers of a model chunk; use 4",
        ),
    ],
    "transformer_engine_only": [
        ("parallel.context=2", "parallel.context=2 needs Transformer Engine"),
        ("precision.fp8=hybrid", "precision.fp8=hybrid needs Transformer Engine"),
        ("precision.fp8=e4m3 model.backend=torch", "precision.fp8=e4m3 needs Transformer Engine"),
    ],
    "overlaps": [
        ("parallel.overlap_param_gather=true", "overlap_param_gather=true needs parallel.distributed_optimizer=true"),
        (
            "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true parallel.distributed_optimizer=false",
            "overlap_param_gather=true needs parallel.distributed_optimizer=true",
        ),
        ("parallel.overlap_p2p=true parallel.pipeline=2", "overlap_p2p=true needs the interleaved schedule"),
    ],
    "watchdog_before_collectives": [
        ("watchdog.timeout=600", "watchdog.timeout=600 leaves less than 5 s before run.collective_timeout=600"),
        ("watchdog.timeout=60 run.collective_timeout=64", "raise run.collective_timeout to 120, or lower"),
    ],
    "schedule_within_run": [
        ("schedule.warmup_steps=10", "warmup_steps=10 leaves no step after the warm-up of run.steps=10"),
        ("schedule.kind=constant schedule.decay_steps=5", "decay_steps has no effect with schedule.kind=constant"),
        ("schedule.decay_steps=3 schedule.warmup_steps=3", "decay_steps=3 ends before schedule.warmup_steps=3"),
        ("schedule.decay_steps=11", "decay_steps=11 is beyond run.steps=10"),
        ("schedule.kind=wsd schedule.warmup_steps=5 schedule.decay_steps=6", "exceed run.steps=10"),
    ],
    "sources_named_once": [
        (f"data.sources=[{SOURCE},{SOURCE}]", "data.sources: the name 'a' is used 2 times"),
        (f"data.validation=[{SOURCE},{SOURCE}]", "data.validation: the name 'a' is used 2 times"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.validate_every=5", "data.validate_every=5 has no effect without data.validation"),
    ],
    "retention_has_effect": [
        ("checkpoint.keep_every=100 checkpoint.save_every=50", "keep_every=100 has no effect with checkpoint.keep=0"),
        ("checkpoint.keep=2 checkpoint.keep_every=100", "is no multiple of checkpoint.save_every=0"),
        (
            "checkpoint.keep=2 checkpoint.keep_weights_every=75 checkpoint.save_every=50",
            "so those steps are",
        ),
        (
            "checkpoint.keep=2 checkpoint.keep_every=50 checkpoint.keep_weights_every=100 checkpoint.save_every=50",
            "keep_weights_every=100 has no effect: checkpoint.keep_every=50 keeps all of those whole",
        ),
        ("checkpoint.keep=2 checkpoint.read_back=false", "keep=2 has no effect with checkpoint.read_back=false"),
    ],
    "load_from_somewhere": [
        ("checkpoint.load=all", "checkpoint.load=all has no effect without checkpoint.start_from"),
        ("checkpoint.load=weights", "checkpoint.load=weights has no effect without checkpoint.start_from"),
    ],
    "guard_window": [("guard.window=8 guard.min_values=9", "use guard.min_values=8 or less")],
}
# check -> runs near to those above that nobody objects to
PASSES = {
    "attention_shape": ["model.num_attention_heads=16", "model.num_query_groups=8", "model.num_query_groups=1"],
    "layers_over_stages": [
        "parallel.pipeline=8",
        "parallel.pipeline=4 parallel.chunks=2",
        "parallel.pipeline=3 parallel.first_stage_layers=2 parallel.last_stage_layers=2",
        "parallel.pipeline=3 parallel.first_stage_layers=2",
        "parallel.pipeline=2 parallel.first_stage_layers=3 parallel.last_stage_layers=5",
    ],
    "widths_over_tensor": ["parallel.tensor=8", "parallel.tensor=2", "parallel.tensor=8 model.num_query_groups=1"],
    "vocabulary_padding": [
        "model.vocab_size=2047 parallel.tensor=8",
        "model.vocab_size=100 parallel.tensor=2 parallel.pad_vocab_to=25",
    ],
    "batch_over_replicas": [
        "parallel.data=8",
        "data.micro_batch_size=2 parallel.data=4",
        "parallel.pipeline=4 parallel.chunks=2",
    ],
    "sequence_over_tensor": [
        "parallel.tensor=4",
        "parallel.tensor=4 data.sequence_length=62 parallel.sequence=false",
        "parallel.sequence=false",
    ],
    "sequence_within_model": ["data.sequence_length=512"],
    "recompute_over_layers": [
        "precision.recompute=full precision.recompute_layers=4",
        "precision.recompute_layers=3",
        "precision.recompute=selective precision.recompute_layers=3",
        "precision.recompute=full precision.recompute_method=block precision.recompute_layers=3 parallel.pipeline=2",
    ],
    "transformer_engine_only": [
        "model.backend=transformer_engine parallel.context=2",
        "model.backend=transformer_engine precision.fp8=hybrid",
        "model.backend=torch",
    ],
    "overlaps": [
        "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true",
        "parallel.overlap_p2p=true parallel.pipeline=2 parallel.chunks=2",
    ],
    "watchdog_before_collectives": [
        "watchdog.timeout=595",
        "watchdog.timeout=9000 watchdog.enabled=false",
        "run.collective_timeout=1",
    ],
    "schedule_within_run": [
        "schedule.warmup_steps=9",
        "schedule.decay_steps=10 schedule.warmup_steps=9",
        "schedule.kind=wsd schedule.warmup_steps=5 schedule.decay_steps=5",
        "run.steps=0 schedule.warmup_steps=100",
    ],
    "sources_named_once": [
        f"data.sources=[{SOURCE},{{name: b, path: here/a}}]",
        f"data.validation=[{SOURCE}] data.validate_every=5",
    ],
    "retention_has_effect": [
        "checkpoint.keep=2 checkpoint.keep_every=100 checkpoint.keep_weights_every=50 checkpoint.save_every=50",
        "checkpoint.read_back=false",
        "checkpoint.keep=2",
    ],
    "load_from_somewhere": ["checkpoint.load=all checkpoint.start_from=here", "checkpoint.start_from=here"],
    "guard_window": ["guard.window=8 guard.min_values=8"],
}


def overrides(line: str) -> list[str]:
    """Split before each section.key=, since values hold blanks too."""
    return re.split(r" (?=\w+\.\w+=)", line)


def one_each(table):
    return [
        pytest.param(name, *(case if isinstance(case, tuple) else (case,))) for name in table for case in table[name]
    ]


def test_every_check_has_a_run_that_it_refuses_and_one_that_it_lets_pass():
    names = [check.__name__ for check in CHECKS]
    assert sorted(FIRES) == sorted(PASSES) == sorted(names)


def said_by(name: str, line: str) -> list[str]:
    """What one check alone says of a run whose sections are each valid."""
    parts = dict(parse_run(RUN))
    for override in overrides(line):
        section, key, value = re.split(r"[.=]", override, maxsplit=2)
        values = {**parts[section].model_dump(), key: yaml.safe_load(value)}
        parts[section] = type(parts[section]).model_validate(values)
    check = next(check for check in CHECKS if check.__name__ == name)
    return list(check(*(parts[part] for part in inspect.signature(check).parameters)))


@pytest.mark.parametrize(("check", "line", "said"), one_each(FIRES))
def test_a_check_refuses_what_it_is_there_for(check, line, said):
    assert any(said in problem for problem in said_by(check, line))
    assert any(said in problem for problem in problems(*overrides(line)))


@pytest.mark.parametrize(("check", "line"), one_each(PASSES))
def test_a_check_lets_its_neighbours_pass(check, line):
    assert problems(*overrides(line)) == []
