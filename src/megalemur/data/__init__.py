"""Indexed files, sources, the order of samples, batches. Knows no model and no process group."""
