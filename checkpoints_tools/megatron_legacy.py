"""The format `megatron-legacy`, read: a file of torch.save for each tensor-parallel rank and pipeline stage, as
Megatron-LM saves it with `--ckpt-format torch`.

With virtual chunks the layers of the model go around the stages: chunk c of stage p comes behind chunk c of stage
p - 1, and chunk c + 1 of the first stage behind chunk c of the last.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_tools.copies import first_difference
from checkpoints_tools.errors import ConversionError, UnfitSource
from checkpoints_tools.foreign import StoredTensor
from checkpoints_tools.megatron_args import HOW_TO_GIVE_IT, model_and_notes
from checkpoints_tools.megatron_dist import TRACKER, tokenizer_files
from checkpoints_tools.megatron_ranks import RANK_FILE, Place, RankFile, iteration_directory, read_ranks
from checkpoints_tools.megatron_shards import local_shape
from checkpoints_tools.megatron_tensors import EMBEDDING, HEAD
from checkpoints_tools.opened import Opened
from checkpoints_tools.regions import WEIGHT, Key, Region, Regions, contiguous
from megalemur.config.model import ModelConfig
from megalemur.model.names import Split, segments_of

NAME = "megatron-legacy"


def recognises(path: Path) -> bool:
    """Whether this is the directory of an iteration with rank files, or one whose tracker names such."""
    try:
        return iteration_directory(path) is not None
    except (OSError, ValueError):
        return False


def open_megatron_legacy(path: Path, model: ModelConfig | None = None) -> Opened:
    """Everything but the tensors' bytes, except for those that several ranks hold: norms, and a tied head.

    Args:
        path: the directory of an iteration, or the one above it with latest_checkpointed_iteration.txt.
        model: the architecture, for files that do not say it, or in the place of what they say.

    Raises:
        ConversionError: another model than a Llama, or one that nobody describes.
        UnfitSource: ranks that do not fit together.
        DamagedCheckpoint: files that are cut short or are not what torch.save writes.
    """
    try:
        directory = iteration_directory(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path / TRACKER}: says neither a number nor 'release': {error}") from None
    if directory is None:
        raise ConversionError(f"{path}: holds no mp_rank_00/{RANK_FILE} and no mp_rank_00_000/{RANK_FILE}")
    grid = _Grid(directory, read_ranks(directory))
    grid.refuse_unfit()
    said, notes = grid.model(model)
    return Opened(
        format=NAME,
        path=directory,
        model=said,
        regions=grid.regions(said),
        small_files=tokenizer_files(directory),
        facts=grid.facts(),
        notes=(*notes, *grid.notes(said)),
    )


class _Parameter(NamedTuple):
    """A tensor of a rank."""

    place: Place
    chunk: int
    layers_before: int
    """Layers of the model before the chunk's first."""
    name: str
    stored: StoredTensor


@dataclass(frozen=True)
class _Grid:
    """All ranks' files."""

    directory: Path
    ranks: Mapping[Place, RankFile]

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return max(self.ranks)[0] + 1

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return max(self.ranks)[1] + 1

    @property
    def chunks(self) -> int:
        """Virtual chunks of a stage."""
        return max(number for rank in self.ranks.values() for number in rank.chunks) + 1

    @property
    def _first(self) -> RankFile:
        return self.ranks[0, 0]

    @property
    def _rows(self) -> int:
        """Rows of the embedding, padding included."""
        table = self._first.chunk(0).get(EMBEDDING)
        if table is None or len(table.shape) != 2:
            raise ConversionError(f"{self._first.path}: holds no {EMBEDDING}")
        return table.shape[0] * self.tensor

    @cached_property
    def _parameters(self) -> list[_Parameter]:
        """Everything, in the order of the layers."""
        found, before = list[_Parameter](), 0
        for chunk, stage in product(range(self.chunks), range(self.stages)):
            for tensor in range(self.tensor):
                tensors = self.ranks[tensor, stage].chunk(chunk)
                found += [_Parameter((tensor, stage), chunk, before, *named) for named in tensors.items()]
            before += self.ranks[0, stage].layers(chunk)
        return found

    def refuse_unfit(self) -> None:
        """Compare what the files say about each other.

        Raises:
            ConversionError: they are not one checkpoint's, or of a kind whose rows have another order.
        """
        settings, first = self._first.settings, self._first
        for name, found in (
            ("tensor_model_parallel_size", self.tensor),
            ("pipeline_model_parallel_size", self.stages),
            ("virtual_pipeline_model_parallel_size", self.chunks),
        ):
            told = settings.get(name)
            if isinstance(told, int) and told != found:
                raise UnfitSource(f"{first.path}: {name} is {told}, and what lies here is of {found}")
        for (_, stage), rank in self.ranks.items():
            if rank.iteration != first.iteration:
                raise UnfitSource(
                    f"{rank.path}: is of iteration {rank.iteration}, and {first.path} of {first.iteration}"
                )
            twin = self.ranks[0, stage]
            for number in range(self.chunks):
                odd = set(rank.chunk(number)) ^ set(twin.chunk(number))
                if odd:
                    raise UnfitSource(f"{min(odd)} is in one of {twin.path} and {rank.path}, and not in the other")
            if rank.has_old_names:
                self._refuse_other_order(rank)

    def _refuse_other_order(self, rank: RankFile) -> None:
        if not isinstance(rank.version, (int, float)) or rank.version < 2:
            raise ConversionError(
                f"{rank.path}: checkpoint_version is {rank.version!r}; before 2.0 queries, keys and values had another "
                "order: load it with a Megatron-LM of those days and save it again"
            )
        if self._first.settings.get("swiglu") is not True:
            raise ConversionError(
                f"{rank.path}: args.swiglu is not true; only of Megatron-LM's own SwiGLU is it known that the gate "
                "comes first"
            )

    def model(self, given: ModelConfig | None) -> tuple[ModelConfig, list[str]]:
        """What the settings say about the model, and what is not certain."""
        settings = self._first.settings
        if not settings and given is None:
            raise ConversionError(
                f"{self._first.path}: has no args. Heads, groups, rotary base and the epsilon of the norms cannot be "
                f"told from shapes: {HOW_TO_GIVE_IT}"
            )
        return model_and_notes(settings, self._first.path, self._rows, given)

    def regions(self, model: ModelConfig) -> Regions:
        """Every weight, once: of what several ranks hold, the first rank's."""
        self._refuse_other_depth(model)
        copies = {(copy.place, copy.chunk, copy.name) for copy, _ in self._copies(model)}
        found: dict[Key, list[Region]] = {}
        for one in self._parameters:
            split = Split(model, self.tensor, one.place[0], self._rows)
            rank = self.ranks[one.place]
            _refuse_other_shape(rank.path, one, split)
            if (one.place, one.chunk, one.name) in copies:
                continue
            row_bytes = one.stored.dtype.itemsize * (one.stored.shape[1] if len(one.stored.shape) > 1 else 1)
            for segment in segments_of(one.name, one.layers_before, split):
                at = one.stored.offset + segment.first_row * row_bytes
                region = contiguous(segment.box, rank.file, at, one.stored.dtype)
                found.setdefault(Key(WEIGHT, segment.name), []).append(region)
        return found

    def _refuse_other_depth(self, model: ModelConfig) -> None:
        counts = [[self.ranks[0, p].layers(chunk) for chunk in range(self.chunks)] for p in range(self.stages)]
        if sum(map(sum, counts)) != model.num_layers:
            told = ", ".join(" + ".join(map(str, stage)) for stage in counts)
            raise UnfitSource(
                f"{self.directory}: the stages hold {told} layers, and the model has {model.num_layers}; is a stage's "
                "folder missing?"
            )
        heads = [one for one in self._parameters if one.name == HEAD]
        if model.tie_embeddings and self.stages == 1 and heads:
            raise self._untied(heads[0], None)

    def _untied(self, head: _Parameter, index: int | None) -> ConversionError:
        columns = head.stored.shape[1]
        where = "" if index is None else f" (first at [{index // columns}, {index % columns}])"
        return ConversionError(
            f"{self.ranks[head.place].path}: {HEAD} is not the embedding{where}, and the settings say that it is; "
            f"{HOW_TO_GIVE_IT} with tie_word_embeddings false"
        )

    def _copies(self, model: ModelConfig) -> Iterator[tuple[_Parameter, _Parameter]]:
        """What is stored more than once, with the one that counts: norms, and a tied head on the last stage."""
        norms: dict[tuple[int, int, str], _Parameter] = {}
        tables = {one.place[0]: one for one in self._parameters if one.name == EMBEDDING}
        for one in self._parameters:
            if one.name == HEAD and model.tie_embeddings:
                yield one, tables[one.place[0]]
            elif len(one.stored.shape) == 1:
                first = norms.setdefault((one.place[1], one.chunk, one.name), one)
                if first is not one:
                    yield one, first

    def facts(self) -> dict[str, Any]:
        """Step and layout."""
        told = {
            "step": self._first.iteration,
            "tensor_parallel": self.tensor,
            "pipeline_parallel": self.stages,
            "chunks": self.chunks,
            "checkpoint_version": self._first.version,
        }
        return {name: value for name, value in told.items() if isinstance(value, (int, float)) and value is not True}

    def notes(self, model: ModelConfig) -> Iterator[str]:
        """What was passed over, and copies that differ.

        Raises:
            ConversionError: a tied head is another matrix than the embedding.
        """
        others = dict.fromkeys(name for rank in self.ranks.values() for name in rank.others)
        if others:
            yield f"only the weights are read, and not {', '.join(others)}"
        differing = []
        for copy, first in self._copies(model):
            index = first_difference(*((self.ranks[one.place].path, one.stored) for one in (first, copy)))
            if index is not None and copy.name == HEAD:
                raise self._untied(copy, index)
            if index is not None:
                differing.append(copy)
        if differing:
            yield (
                f"{len(differing)} tensors that ranks should have in common differ between them, {differing[0].name} "
                f"in {self.ranks[differing[0].place].file} for one; the first rank's are taken"
            )
        stubs = dict.fromkeys(name for rank in self.ranks.values() for name in rank.stubs)
        if stubs:
            yield f"classes that were not called: {', '.join(stubs)}"


def _refuse_other_shape(path: Path, one: _Parameter, split: Split) -> None:
    try:
        wanted = local_shape(one.name, split)
    except KeyError:
        raise UnfitSource(f"{path}: {one.name}: no Llama has it") from None
    if one.stored.shape != wanted:
        raise UnfitSource(
            f"{path}: {one.name} has shape {list(one.stored.shape)}; one of {split.tensor} ranks has {list(wanted)} of "
            f"this model with its vocabulary padded to {split.padded_vocab}"
        )
