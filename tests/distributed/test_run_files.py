"""Every run file builds its first and its last rank: real modules, fake process group, fake tensors, no weights."""

import contextlib
from pathlib import Path

import pytest

from megalemur.config.layers import chunk_layers
from megalemur.config.load import load_run
from tests.support.ranks import run_ranks

RUN_FILES = sorted((Path(__file__).parents[2] / "launch/runs").glob("*.yaml"))


def build_and_run(path, rank):
    """(layers, parameters) of a rank after one micro-batch forward and backward through its first chunk."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megalemur.model.llama import build_chunks
    from megalemur.parallel.device import open_seam
    from megalemur.parallel.seeds import seed_step

    config = load_run(path)
    open_seam()
    parallel = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        create_gloo_process_groups=False,
    )
    seed_step(1, 0, 0, 0)
    # the tracker compares real tensors, which fake mode cannot
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    s, b, h = config.data.sequence_length, config.data.micro_batch_size, config.model.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        chunks = build_chunks(config.model, parallel, config.precision)
        chunk = chunks[-1] if rank else chunks[0]
        tokens, positions = torch.zeros(b, s, dtype=torch.long), torch.arange(s)[None].expand(b, -1)
        if not chunk.pre_process:
            rows = s // parallel.tensor if parallel.sequence_parallel else s
            chunk.set_input_tensor(torch.empty(rows, b, h, dtype=chunk.config.params_dtype, requires_grad=True))
        out = chunk(tokens, positions, None, labels=tokens if chunk.post_process else None)
        out.float().mean().backward()
        assert out.shape == (b, s) if chunk.post_process else out.shape[-1] == h
        layers = sum(len(part.decoder.layers) for part in chunks)
        return layers, sum(p.numel() for part in chunks for p in part.parameters())


@pytest.mark.parametrize("path", RUN_FILES, ids=[path.stem for path in RUN_FILES])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_run_file_builds_its_ends(path, end):
    config = load_run(path)
    rank = 0 if end == "first" else config.parallel.world_size - 1
    ((layers, parameters),) = run_ranks(1, build_and_run, path, rank)
    stage = 0 if end == "first" else -1
    expected = sum(chunk_layers(config.model.num_layers, config.parallel)[stage])
    assert layers == expected
    model, t = config.model, config.parallel.tensor
    matrices = expected * (model.parameters_per_layer - 2 * model.hidden_size) // t
    norms = expected * 2 * model.hidden_size
    table = config.parallel.padded_vocab(model.vocab_size) // t * model.hidden_size
    ends = (2 if config.parallel.pipeline == 1 else 1) * table
    final_norm = model.hidden_size if end == "last" or config.parallel.pipeline == 1 else 0
    assert parameters == matrices + norms + ends + final_norm
