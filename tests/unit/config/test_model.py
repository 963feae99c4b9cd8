"""Presets have the parameter counts that their authors published."""

import pytest

from megalemur.config.model import ModelConfig
from megalemur.config.presets import PRESETS

PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}


@pytest.mark.parametrize(("preset", "parameters"), PUBLISHED.items())
def test_a_preset_has_the_published_number_of_parameters(preset, parameters):
    assert ModelConfig(preset=preset).parameters == parameters


def test_every_preset_is_held_against_a_published_number():
    assert set(PRESETS) - {"tiny"} == set(PUBLISHED)


def test_a_tied_head_is_counted_once():
    model = ModelConfig(preset="tiny")
    tied = ModelConfig(preset="tiny", tie_embeddings=True)
    assert model.parameters - tied.parameters == model.vocab_size * model.hidden_size


def test_what_is_given_beside_a_preset_wins():
    model = ModelConfig(preset="llama2_70b", num_layers=2)
    assert (model.num_layers, model.hidden_size) == (2, 8192)
