"""Rules about the data settings alone; those over the files are in sources.py."""

from typing import Any

from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.scale import is_costly


def source_never_drawn(run: Any, data: Any) -> Texts:
    """A weight so small that the whole run draws less than one sample of the source.
    https://github.com/NVIDIA/Megatron-LM/issues/705 https://github.com/NVIDIA/Megatron-LM/pull/1007"""
    total, samples = sum(source.weight for source in data.sources), run.steps * data.global_batch_size
    for source in data.sources:
        drawn = samples * source.weight / total
        if samples and drawn < 0.5:
            yield (
                f"data.sources: {source.name}: weight={source.weight:g} of {total:g} comes to {drawn:.2g} samples of "
                "the "
                f"run's {samples}; take it out, or give it {total / samples:.2g} or more"
            )


def source_rarely_drawn(run: Any, data: Any) -> Texts:
    """A weight so small that the source is drawn less than once in a hundred steps.
    https://github.com/NVIDIA/Megatron-LM/issues/705"""
    total, samples = sum(source.weight for source in data.sources), run.steps * data.global_batch_size
    for source in data.sources:
        share = source.weight / total
        if share * data.global_batch_size * 100 < 1 and share * samples >= 0.5:
            yield (
                f"data.sources: {source.name}: weight={source.weight:g} of {total:g} is one sample in "
                f"{1 / (share * data.global_batch_size):,.0f} steps; check its weight"
            )


def sources_hold_the_same(data: Any) -> Texts:
    """Two sources of one prefix: their weights add up, and samples come twice.
    https://github.com/NVIDIA/Megatron-Energon/issues/266"""
    names: dict[Any, str] = {}
    for source in data.sources:
        twin = names.setdefault(source.path, source.name)
        if twin != source.name:
            yield (
                f"data.sources: {twin} and {source.name} both are {source.path}; keep one, with the sum of their "
                "weights"
            )


def validation_on_training_data(data: Any) -> Texts:
    """A validation source that is trained on: its loss measures memory.
    https://github.com/marin-community/marin/pull/2700 https://github.com/EleutherAI/pythia/issues/102"""
    training = {source.path: source.name for source in data.sources}
    for source in data.validation:
        if source.path in training:
            yield (
                f"data.validation: {source.name} is {source.path}, which data.sources trains on as "
                f"{training[source.path]}; hold documents out with megalemur-split-index"
            )


def validation_never(run: Any, data: Any) -> Texts:
    """Validation sources that are opened and never looked at.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5341"""
    if data.validation and not data.validate_every:
        yield (
            "data.validation is given, but data.validate_every=0 never validates; use data.validate_every="
            f"{max(1, run.steps // 100)} or so"
        )


def documents_attend_to_each_other(data: Any) -> Texts:
    """Tokens attend to unrelated documents before them, and the run file does not say that this is meant.
    https://github.com/NVIDIA/Megatron-LM/issues/954"""
    if "document_mask" not in data.model_fields_set:
        yield (
            "data.document_mask is not given: tokens attend to whatever documents stand before them in their window; "
            "write document_mask: intra, or document_mask: none to say that this is meant"
        )


def tokenizer_not_named(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """A long run without data.tokenizer: nothing to check the sources against, and nothing in its checkpoints.
    https://github.com/pytorch/torchtitan/pull/2074"""
    if data.tokenizer is None and is_costly(run, model, parallel, data):
        yield (
            "data.tokenizer is not given: the sources are not checked against it, and checkpoints do not carry "
            "it; name "
            "the tokenizer that made the sources"
        )


RULES = (
    ("error", source_never_drawn),
    ("warning", source_rarely_drawn),
    ("error", sources_hold_the_same),
    ("warning", validation_on_training_data),
    ("warning", validation_never),
    ("warning", documents_attend_to_each_other),
    ("warning", tokenizer_not_named),
)
