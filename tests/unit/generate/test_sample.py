import pytest
import torch

from megalemur.generate.sample import Sampling, choose

# probabilities 1/2, 1/4, 1/8, 1/8 at temperature 1
LOGITS = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()


def shares(sampling, draws=4000):
    generator = torch.Generator().manual_seed(0)
    chosen = choose(LOGITS.expand(draws, -1), sampling, generator)
    return (torch.bincount(chosen, minlength=4) / draws).tolist()


def test_greedy_takes_the_likeliest_of_every_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert choose(logits, Sampling()).tolist() == [1, 0]


def test_temperature_one_draws_from_the_model_s_distribution():
    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.125, 0.5, 0.25, 0.125], abs=0.03)


def test_half_the_temperature_squares_the_probabilities():
    squares = [1 / 64, 1 / 4, 1 / 16, 1 / 64]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([x / sum(squares) for x in squares], abs=0.03)


def test_top_k_keeps_the_k_likeliest_in_proportion():
    assert shares(Sampling(temperature=1.0, top_k=2)) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.03)


def test_top_k_keeps_k_where_several_are_equally_likely():
    even = torch.zeros(2000, 5)
    drawn = choose(even, Sampling(temperature=1.0, top_k=2), torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 2


def test_top_k_above_the_vocabulary_keeps_all():
    assert min(shares(Sampling(temperature=1.0, top_k=99))) > 0


@pytest.mark.parametrize(
    ("mass", "kept"), [(0.0, {1}), (0.4, {1}), (0.5, {1}), (0.6, {1, 2}), (0.75, {1, 2}), (0.9, None)]
)
def test_top_p_keeps_the_smallest_set_that_has_the_mass(mass, kept):
    found = {token for token, share in enumerate(shares(Sampling(temperature=1.0, top_p=mass))) if share}
    if kept is None:
        assert len(found) >= 3
    else:
        assert found == kept


def test_top_p_applies_to_what_top_k_left():
    # of 2/3 and 1/3, the first alone has the mass 0.6
    assert shares(Sampling(temperature=1.0, top_k=2, top_p=0.6)) == [0, 1, 0, 0]


def test_the_same_seed_draws_the_same_tokens():
    def draw(seed):
        return choose(LOGITS.expand(50, -1), Sampling(temperature=1.0), torch.Generator().manual_seed(seed)).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
