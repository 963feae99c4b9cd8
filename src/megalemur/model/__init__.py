"""What a Llama is, on megatron-core. The only owner of megatron.core.models, transformer and tensor_parallel."""
