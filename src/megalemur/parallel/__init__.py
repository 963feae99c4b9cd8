"""Where this process stands. The only owner of megatron.core.parallel_state."""
