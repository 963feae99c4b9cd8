"""A Llama that transformers wrote goes through a checkpoint, and transformers reads it back bit by bit."""

from pathlib import Path

import pytest
import torch

from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import HuggingFaceReader
from megalemur.checkpoint.save import Contents, save_checkpoint
from megalemur.model.hf_config import generation_config_json, hf_config_json, read_hf_config
from megalemur.model.names import hf_shapes
from megalemur.parallel.state import MASTER, Piece, whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_file_bytes", [10_000, 1 << 30])
def test_a_model_of_transformers_goes_through_unchanged(tied: bool, max_file_bytes: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float16)
    model.save_pretrained(tmp_path / "source")

    source, reader = read_hf_config(tmp_path / "source"), HuggingFaceReader(tmp_path / "source")
    shapes = hf_shapes(source.model)
    pieces = [Piece(name, MASTER, shape, whole(shape), torch.empty(shape)) for name, shape in shapes.items()]
    load_pieces(reader, pieces, shapes=shapes)
    files = {
        "config.json": hf_config_json(source.model, dtype="float16", source=source.original),
        "generation_config.json": generation_config_json(),
    }
    contents = Contents(0, pieces, shapes, reader.dtypes, files, {}, {})
    path = save_checkpoint(tmp_path, contents, group=None, max_file_bytes=max_file_bytes)

    again, said = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float16
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert LlamaConfig.from_pretrained(path).to_dict() == LlamaConfig.from_pretrained(tmp_path / "source").to_dict()
