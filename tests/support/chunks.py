"""Smaller chunks, so that a small state has many of them."""


def use_chunks_of(size: int) -> None:
    """Digest and read by chunks of `size` bytes, a multiple of 8, in this process."""
    from megalemur.checkpoint import digests, manifest

    digests.CHUNK_BYTES = manifest.CHUNK_BYTES = size
