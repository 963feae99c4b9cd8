"""Saves, finds, verifies, loads and prunes checkpoints. Deals in `Piece`s; knows no model and no megatron-core.

save, load and read need torch; directory, manifest and placement do not.
"""
