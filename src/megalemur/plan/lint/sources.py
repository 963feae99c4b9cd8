"""Rules over the data sets on the disk. What `train` refuses is asked of the functions with which it does."""

from collections.abc import Mapping

from megalemur.config.run import RunConfig
from megalemur.data.errors import DataError
from megalemur.data.manifest import manifest_path
from megalemur.data.sources import check_tokenizers, shares_of
from megalemur.plan.lint.files import Files
from megalemur.plan.lint.finding import Texts

_EPOCHS, _UNKNOWN = 4.0, 0.001


def sources_can_be_read(files: Files) -> Texts:
    """A source that is missing, damaged, shorter than a window or holds ids that the model does not have.
    https://github.com/huggingface/tokenizers/issues/1609"""
    yield from files.refused


def tokenizers_agree(config: RunConfig, files: Files) -> Texts:
    """Sources made with different tokenizers, or with another than data.tokenizer.
    https://github.com/decoderesearch/SAELens/issues/146 https://github.com/marin-community/marin/issues/301"""
    try:
        check_tokenizers([*files.training, *files.validation], config.data.tokenizer)
    except (DataError, ValueError) as error:
        yield str(error)


def special_ids_agree(files: Files) -> Texts:
    """One tokenizer whose sources have other ids for the ends of documents.
    https://github.com/huggingface/datatrove/pull/489 https://github.com/huggingface/datatrove/issues/345"""
    seen: dict[tuple[int | None, int | None], str] = {}
    for source in (*files.training, *files.validation):
        if source.manifest is not None:
            made = source.manifest.tokenizer
            seen.setdefault((made.bos_id, made.eos_id), source.config.name)
    if len(seen) > 1:
        listing = ", ".join(f"{name} has bos {bos} and eos {eos}" for (bos, eos), name in seen.items())
        yield f"data.sources differ in their special ids: {listing}; build them again with one tokenizer"


def documents_end_alike(files: Files) -> Texts:
    """Documents without an end-of-document token, or some with and some without.
    https://github.com/stanford-crfm/mistral/issues/91 https://github.com/NVIDIA/Megatron-LM/issues/431"""
    for source in files.training:
        manifest = source.manifest
        if manifest is not None and not (manifest.append_eos or manifest.prepend_bos):
            yield (
                f"{manifest_path(source.config.path)}: append_eos=false and prepend_bos=false: nothing tells the model "
                "where a document ends; build it again with the end-of-document token"
            )
    ends = {(source.manifest.append_eos, source.manifest.prepend_bos) for source in files.training if source.manifest}
    if len(ends) > 1:
        yield "data.sources: some documents begin and end with other special tokens than others; build them alike"


def sources_differ(files: Files) -> Texts:
    """Two prefixes that hold the same data.
    https://github.com/NVIDIA/Megatron-Energon/issues/266"""
    try:
        shares_of(files.training)
    except ValueError as error:
        yield str(error)


def manifests_are_there(files: Files) -> Texts:
    """A source without a manifest: nothing says which tokenizer made it.
    https://github.com/Lightning-AI/litgpt/issues/471"""
    for source in (*files.training, *files.validation):
        if source.manifest is None:
            yield (
                f"{manifest_path(source.config.path)}: no such file: nothing says which tokenizer made "
                f"{source.config.name}"
                ", and its index is read through at every start; build it with megalemur-build-index"
            )


def _epochs(files: Files) -> Mapping[str, float]:
    drawn = files.samples_drawn()
    return {s.config.name: drawn[s.config.name] / s.samples.samples_per_epoch for s in files.training if drawn}


def epochs_within_limit(files: Files) -> Texts:
    """A source that the run would use more often than its max_epochs.
    https://github.com/NVIDIA/Megatron-LM/issues/1127"""
    epochs = _epochs(files)
    for source in files.training:
        limit, made = source.config.max_epochs, epochs.get(source.config.name, 0.0)
        if limit is not None and made > limit:
            yield (
                f"data.sources: {source.config.name}: the run makes {made:.2f} epochs of it, more than its max_epochs="
                f"{limit:g}; lower run.steps or its weight, or raise its max_epochs"
            )


def epochs_many(files: Files) -> Texts:
    """More than four passes over a source without a max_epochs that allows them (Muennighoff et al. 2023).
    https://github.com/bigcode-project/Megatron-LM/issues/25"""
    epochs = _epochs(files)
    for source in files.training:
        made = epochs.get(source.config.name, 0.0)
        if source.config.max_epochs is None and made > _EPOCHS:
            yield (
                f"data.sources: {source.config.name}: the run makes {made:.1f} epochs of it; beyond four, repeating "
                "gains "
                f"little: lower its weight, or write max_epochs: {made + 0.5:.0f} to say that this is meant"
            )


def validation_is_held_out(files: Files) -> Texts:
    """A validation source with the same data as a training source, whatever its path.
    https://github.com/marin-community/marin/pull/2700"""
    training = {source.key: source.config for source in files.training}
    for source in files.validation:
        twin = training.get(source.key)
        if twin is not None and twin.path != source.config.path:
            yield (
                f"data.validation: {source.config.name} holds the same data as {twin.name}, which is trained on; hold "
                "documents out with megalemur-split-index"
            )


def unknown_tokens_many(files: Files) -> Texts:
    """More than a thousandth of the tokens are unknown: the tokenizer does not know this text.
    https://github.com/nlpyang/PreSumm/issues/184"""
    for source in files.training:
        manifest = source.manifest
        if manifest is not None and manifest.unknown_tokens > _UNKNOWN * manifest.tokens:
            yield (
                f"{manifest_path(source.config.path)}: {manifest.unknown_tokens} of {manifest.tokens} tokens are "
                "unknown; "
                "look at it with megalemur-inspect-index, and use a tokenizer that knows this text"
            )


RULES = (
    ("error", sources_can_be_read),
    ("error", tokenizers_agree),
    ("error", special_ids_agree),
    ("warning", documents_end_alike),
    ("error", sources_differ),
    ("warning", manifests_are_there),
    ("error", epochs_within_limit),
    ("warning", epochs_many),
    ("warning", validation_is_held_out),
    ("warning", unknown_tokens_many),
)
