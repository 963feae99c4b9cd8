"""The run: setup, step, loop. The only owner of megatron.core.pipeline_parallel."""
