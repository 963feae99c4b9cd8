"""Gradients, optimizer and schedule. The only owner of megatron.core.optimizer and megatron.core.distributed."""
