"""Weights of a model that starts from scratch: a function of (seed, Hugging Face name), the same in every layout."""

import hashlib

import torch

from megalemur.config.model import ModelConfig
from megalemur.model.names import hf_shapes
from megalemur.parallel.state import MASTER, Box

_BLOCK_ROWS = 1024


class InitialWeights:
    """Reads like a checkpoint: norms are one, matrices normal with standard deviation model.init_std.

    Rows are drawn in blocks with a generator each, so that a rank computes only the blocks that it holds rows of.
    """

    def __init__(self, model: ModelConfig, seed: int):
        self.shapes = hf_shapes(model)
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self._std, self._seed = model.init_std, seed

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """fp32 values of a box; moments do not exist before the first step."""
        assert kind == MASTER, kind
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(box.shape)
        first, last = box.start[0] // _BLOCK_ROWS, (box.stop[0] - 1) // _BLOCK_ROWS
        rows = torch.cat([self._block(name, shape, block) for block in range(first, last + 1)])
        offset = first * _BLOCK_ROWS
        return rows[box.start[0] - offset : box.stop[0] - offset, box.start[1] : box.stop[1]]

    def _block(self, name: str, shape: tuple[int, ...], block: int) -> torch.Tensor:
        key = hashlib.blake2b(f"{self._seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        rows = min(_BLOCK_ROWS, shape[0] - block * _BLOCK_ROWS)
        return torch.empty(rows, shape[1]).normal_(0.0, self._std, generator=generator)
