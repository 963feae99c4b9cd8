"""For each rule over a run file: runs on which it fires, with what it says, and neighbours on which it does not."""

BIG = (
    "model.preset=llama2_70b data.sequence_length=4096 data.global_batch_size=1024 data.document_mask=none "
    "run.steps=20000 parallel.tensor=8 parallel.pipeline=4 parallel.data=2 checkpoint.save_every=100 checkpoint.keep=3 "
    "data.tokenizer=t.model parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true "
    "checkpoint.start_from=start log.directory=log"
)
"""A large run with nothing to say against it."""
A = "{name: a, path: here/a}"

FIRES = {
    "key_value_heads_replicated": [("parallel.tensor=16", "parallel.tensor=16 is above model.num_query_groups=8")],
    "tensor_within_node": [
        ("parallel.tensor=16", "use parallel.tensor=8 and more"),
        ("parallel.tensor=32 model.preset=llama2_70b", "does not fit into nodes of 8"),
    ],
    "pipeline_bubble": [
        ("data.global_batch_size=16", "idles 27% of the time"),
        ("data.global_batch_size=4", "and fewer than the stages"),
    ],
    "vocabulary_padding_waste": [("parallel.pad_vocab_to=1100", "by 3200 rows (10%)")],
    "output_stage_heavier": [
        ("model.preset=llama3_8b parallel.tensor=4", "set parallel.last_stage_layers="),
        ("model.vocab_size=256000", "heavier than the others"),
    ],
    "overlaps_off": [
        ("parallel.overlap_param_gather=false", "set overlap_param_gather to true"),
        (
            "parallel.overlap_param_gather=false parallel.overlap_grad_reduce=false",
            "set overlap_grad_reduce and overlap_param_gather to true",
        ),
    ],
    "optimizer_state_replicated": [
        ("parallel.distributed_optimizer=false parallel.overlap_param_gather=false", "frees 12 GiB of them"),
    ],
    "rotary_base_of_llama3": [("model.vocab_size=128256", "model.rope_theta=10000 is Llama 2's")],
    "positions_never_trained": [
        ("checkpoint.start_from=null data.sequence_length=2048", "use model.max_position_embeddings=2048"),
    ],
    "floor_before_the_end": [("schedule.decay_steps=10000", "the last 50% of the tokens")],
    "long_warm_up": [("schedule.warmup_steps=6000", "is 30% of run.steps=20000")],
    "gradients_in_bf16": [("precision.reduce_grads_in_fp32=false", "use precision.reduce_grads_in_fp32=true")],
    "fp32_at_scale": [("precision.dtype=fp32", "use precision.dtype=bf16")],
    "deterministic_at_scale": [("run.deterministic=true", "chooses slower kernels")],
    "gradients_never_clipped": [("optim.clip_grad_norm=0", "use optim.clip_grad_norm=1.0")],
    "replicas_never_compared": [("run.check_replicas_every=0", "is never compared")],
    "recompute_settings_unused": [
        ("precision.recompute_layers=2", "precision.recompute_layers has no effect with precision.recompute=none"),
        ("precision.recompute=full precision.recompute_modules=[mlp]", "precision.recompute_modules has no effect"),
    ],
    "source_never_drawn": [
        (f"data.sources=[{A},{{name: b, path: here/b, weight: 1.0e-9}}]", "b: weight=1e-09 of 1 comes to 0.02 samples"),
    ],
    "source_rarely_drawn": [
        (f"data.sources=[{A},{{name: b, path: here/b, weight: 1.0e-6}}]", "is one sample in 977 steps"),
    ],
    "sources_hold_the_same": [(f"data.sources=[{A},{{name: b, path: here/a}}]", "a and b both are here/a")],
    "validation_on_training_data": [
        ("data.validation=[{name: v, path: here/a}] data.validate_every=5", "which data.sources trains on as a"),
    ],
    "validation_never": [("data.validation=[{name: v, path: here/v}]", "data.validate_every=0 never validates")],
    "documents_attend_to_each_other": [("", "data.document_mask is not given")],
    "tokenizer_not_named": [("data.tokenizer=null", "data.tokenizer is not given")],
    "much_work_at_risk": [
        ("checkpoint.save_every=0", "a crash costs up to"),
        ("checkpoint.save_every=1000", "for an hour"),
    ],
    "checkpoints_pile_up": [("checkpoint.keep=0", "keeps all 200 checkpoints")],
    "saves_not_read_back": [
        ("checkpoint.read_back=false checkpoint.keep=0 run.steps=100", "use checkpoint.read_back=true")
    ],
    "stop_before_shorter_than_a_save": [("run.stop_before=60s", "is less than a step and a save")],
    "start_in_own_directory": [("checkpoint.start_from=out", "checkpoint.directory both are out")],
    "stalls_not_watched": [("watchdog.enabled=false", "use watchdog.enabled=true")],
    "hang_held_too_long": [
        ("run.collective_timeout=14400", "a hang is ended after 7200 s"),
        ("watchdog.timeout=4000 run.collective_timeout=9000", "costs 71 GPU-hours"),
    ],
    "collectives_in_haste": [("run.collective_timeout=30", "use run.collective_timeout=600")],
    "stop_at_beyond_the_end": [("run.stop_at=20001", "run.stop_at=20001 is beyond run.steps=20000")],
    "profile_never_taken": [
        ("log.profiler.start_step=19999", "use start_step=19998 or less"),
        ("log.profiler={start_step: 3, ranks: [0, 64]}", "log.profiler.ranks has [64]"),
    ],
}
"""Rule to (overrides of BIG, what is said)."""

PASSES = {
    "key_value_heads_replicated": ["parallel.tensor=8", "parallel.tensor=2"],
    "tensor_within_node": ["parallel.tensor=8", "parallel.tensor=1", "parallel.tensor=4"],
    "pipeline_bubble": ["data.global_batch_size=64", "data.global_batch_size=16 run.steps=1 model.preset=tiny"],
    "vocabulary_padding_waste": ["parallel.pad_vocab_to=128", "parallel.pad_vocab_to=4096"],
    "output_stage_heavier": [
        "parallel.pipeline=4",
        "model.preset=llama3_8b parallel.tensor=4 parallel.pipeline=1",
        "model.preset=llama3_8b parallel.tensor=4 parallel.first_stage_layers=9 parallel.last_stage_layers=5",
    ],
    "overlaps_off": ["parallel.data=1 parallel.overlap_grad_reduce=false parallel.overlap_param_gather=false"],
    "optimizer_state_replicated": [
        "parallel.distributed_optimizer=false parallel.overlap_param_gather=false parallel.data=1",
    ],
    "rotary_base_of_llama3": ["model.vocab_size=128256 model.rope_theta=500000", "model.vocab_size=32000"],
    "positions_never_trained": ["checkpoint.start_from=null", "data.sequence_length=2048"],
    "floor_before_the_end": ["schedule.decay_steps=19000", "schedule.kind=wsd schedule.decay_steps=2000"],
    "long_warm_up": ["schedule.warmup_steps=2000", "run.steps=50 schedule.warmup_steps=20"],
    "gradients_in_bf16": [
        "precision.reduce_grads_in_fp32=true",
        "precision.dtype=fp32 precision.reduce_grads_in_fp32=false",
    ],
    "fp32_at_scale": ["precision.dtype=fp32 run.steps=1 model.preset=tiny"],
    "deterministic_at_scale": ["run.deterministic=true run.steps=1 model.preset=tiny"],
    "gradients_never_clipped": ["optim.clip_grad_norm=0.5"],
    "replicas_never_compared": ["run.check_replicas_every=10"],
    "recompute_settings_unused": [
        "precision.recompute=full precision.recompute_layers=2",
        "precision.recompute=selective precision.recompute_modules=[mlp]",
    ],
    "source_never_drawn": [f"data.sources=[{A},{{name: b, path: here/b, weight: 0.001}}]", "run.steps=0"],
    "source_rarely_drawn": [f"data.sources=[{A},{{name: b, path: here/b, weight: 0.001}}]"],
    "sources_hold_the_same": [f"data.sources=[{A},{{name: b, path: here/b}}]"],
    "validation_on_training_data": ["data.validation=[{name: v, path: here/v}] data.validate_every=5"],
    "validation_never": ["data.validation=[{name: v, path: here/v}] data.validate_every=5"],
    "documents_attend_to_each_other": ["data.document_mask=none", "data.document_mask=intra"],
    "tokenizer_not_named": ["data.tokenizer=t.json", "data.tokenizer=null run.steps=1 model.preset=tiny"],
    "much_work_at_risk": ["checkpoint.save_every=100", "checkpoint.save_every=0 run.steps=10"],
    "checkpoints_pile_up": ["checkpoint.keep=3", "checkpoint.keep=0 run.steps=200"],
    "saves_not_read_back": ["checkpoint.read_back=true"],
    "stop_before_shorter_than_a_save": ["run.stop_before=20min"],
    "start_in_own_directory": ["checkpoint.start_from=elsewhere"],
    "stalls_not_watched": ["watchdog.timeout=100"],
    "hang_held_too_long": ["run.collective_timeout=1800"],
    "collectives_in_haste": ["run.collective_timeout=120"],
    "stop_at_beyond_the_end": ["run.stop_at=20000"],
    "profile_never_taken": ["log.profiler.start_step=10"],
}
"""Rule to overrides of BIG on which it is silent."""
