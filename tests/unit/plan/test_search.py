"""Layouts: each is one that a run file can say, none that it can say is left out, the ranking is what it says."""

import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megalemur.config.load import ConfigError, load_run
from megalemur.plan.job import Job
from megalemur.plan.search import Candidate, layouts, overrides, pareto, search, splits_of_depth

RUN = Path(__file__).parents[3] / "launch/runs/llama2_70b_pretrain.yaml"
ENGINE = ["model.backend=transformer_engine"]


def run_and_job(*changes):
    config = load_run(RUN, changes)
    return config, Job.of(config)


def all_layouts(config, job, *, gpus, gpus_per_node=8):
    return list(
        layouts(
            job,
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            vocab_size=config.model.vocab_size,
            pad_vocab_to=config.parallel.pad_vocab_to,
        )
    )


def recomputed(job):
    """Each way to recompute, once."""
    seen = []

    def peak(one):
        seen.append(one)
        return 2  # never fits, so that all are tried

    search(iter([job]), limit_bytes=1, peak_bytes=peak, seconds=lambda _: 0.0)
    return seen


@pytest.mark.parametrize("gpus", [1, 8, 24, 64, 2048])
def test_a_run_file_with_the_overrides_of_a_layout_is_that_layout(gpus):
    config, job = run_and_job(*ENGINE)
    found = all_layouts(config, job, gpus=gpus)
    assert len(found) == len(set(found)) > 0
    for layout in random.Random(0).sample(found, min(25, len(found))):
        assert layout.world_size == gpus
        for one in recomputed(layout):
            assert Job.of(load_run(RUN, [*ENGINE, *overrides(one)])) == one


def test_no_layout_pads_a_small_vocabulary_by_more_than_it_has():
    one = ["parallel.tensor=1", "parallel.sequence=null"]
    config, job = run_and_job("model.vocab_size=151", "parallel.pad_vocab_to=32", *one)
    found = all_layouts(config, job, gpus=64)
    assert {layout.tensor for layout in found} == {1, 2, 4, 8}  # 8 x 32 rows hold 151 and 105 of padding
    config, job = run_and_job("model.vocab_size=151", "parallel.pad_vocab_to=64", *one)
    found = all_layouts(config, job, gpus=64)
    assert {layout.tensor for layout in found} == {1, 2, 4}  # 8 x 64 would be 151 and 361
    assert all(layout.vocab_padding <= 151 for layout in found)


def test_every_layout_that_a_run_file_accepts_is_tried():
    config, job = run_and_job("data.global_batch_size=48")
    found = {
        (j.tensor, j.pipeline, j.chunks, j.data, j.micro_batch_size): j
        for j in all_layouts(config, job, gpus=48)
        if len({sum(s) for s in j.layers}) == 1
    }
    accepted, fixed = set(), ("parallel.sequence=null", "data.global_batch_size=48")
    sizes = [d for d in range(1, 49) if 48 % d == 0]
    for tensor, pipeline, chunks, micro in product((1, 2, 4, 8), sizes, (1, 2, 4, 5, 8, 10, 20), (1, 2, 4, 8, 16)):
        if (48 // tensor) % pipeline:
            continue
        data = 48 // tensor // pipeline
        said = f"parallel.tensor={tensor} parallel.pipeline={pipeline} parallel.chunks={chunks} parallel.data={data}"
        try:
            load_run(RUN, [*fixed, *said.split(), f"data.micro_batch_size={micro}"])
        except ConfigError:
            continue
        accepted.add((tensor, pipeline, chunks, data, micro))
    assert {key for key in found if key[2] in (1, 2, 4, 5, 8, 10, 20)} == accepted


def test_context_parallelism_is_tried_where_there_is_a_kernel_for_it():
    config, job = run_and_job()
    assert {layout.context for layout in all_layouts(config, job, gpus=64)} == {1}
    config, job = run_and_job(*ENGINE)
    assert {layout.context for layout in all_layouts(config, job, gpus=64)} >= {1, 2, 4}


def test_tensor_parallelism_stays_inside_a_node():
    config, job = run_and_job()
    assert max(layout.tensor for layout in all_layouts(config, job, gpus=64, gpus_per_node=4)) == 4


@pytest.mark.parametrize(("layers", "stages"), [(80, 8), (30, 4), (32, 3), (80, 1), (126, 16), (4, 4)])
def test_a_split_holds_all_layers_and_leaves_no_stage_empty(layers, stages):
    for counts in splits_of_depth(layers, stages):
        assert sum(counts) == layers and len(counts) == stages and min(counts) > 0
        assert len(set(counts[1:-1])) <= 1


def test_an_uneven_split_is_found_where_no_even_one_exists():
    """Llama 3 405B has 126 layers, two fewer than its 16 stages would take (Grattafiori et al. 2024, section 3.3.2)."""
    assert (7, *(8,) * 14, 7) in splits_of_depth(126, 16)


def test_what_fits_comes_fastest_first_and_with_every_recompute_that_fits():
    _, job = run_and_job()
    sizes = {"none": 90, "selective": 80, "full": 40}
    slow = {"none": 1.0, "selective": 1.1, "full": 1.3}
    found = search(
        iter([job, replace(job, micro_batch_size=2)]),
        limit_bytes=85,
        peak_bytes=lambda one: sizes[one.recompute] // (2 if one.micro_batch_size == 2 else 1),
        seconds=lambda one: slow[one.recompute],
    )
    assert [c.seconds for c in found.candidates] == sorted(c.seconds for c in found.candidates)
    assert all(c.peak_bytes <= 85 for c in found.candidates)
    fitting = [c for c in found.candidates if c.job.micro_batch_size == 2]
    # none is the fastest; the others need less memory, and belong to the front
    assert {c.job.recompute for c in fitting} == {"none", "selective", "full"}
    assert {(c.seconds, c.peak_bytes) for c in pareto(fitting)} == {(1.0, 45), (1.1, 40), (1.3, 20)}
    assert found.tried > len(found.candidates)


def test_the_front_holds_what_no_other_beats():
    _, job = run_and_job()
    chance = random.Random(1)
    points = [Candidate(job, chance.randint(1, 20), chance.randint(1, 20)) for _ in range(60)]
    front = {(c.seconds, c.peak_bytes) for c in pareto(points)}

    def beaten(one):
        return any(
            (o.seconds, o.peak_bytes) != (one.seconds, one.peak_bytes)
            and o.seconds <= one.seconds
            and o.peak_bytes <= one.peak_bytes
            for o in points
        )

    assert front == {(c.seconds, c.peak_bytes) for c in points if not beaten(c)}
