"""A slice of `make fuzz`."""

import os

from tests.faults.fuzz_index import fuzz


def test_mutated_files_are_refused_or_read_in_bounds(tmp_path):
    ended = fuzz(tmp_path, 5000, seed=os.getpid())
    for kind in ("field", "length", "pointer", "border", "cut", "grow"):
        assert ended[f"{kind}: refused"] > 100
    assert ended["tokens: read"] > 100, "other tokens of a whole file are no damage that the index shows"
