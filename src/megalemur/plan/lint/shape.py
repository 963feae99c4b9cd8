"""Rules about the layout: what it wastes, and what it does without saying so."""

from typing import Any

from megalemur.config.layers import chunk_layers, stage_layers
from megalemur.plan.lint.finding import Texts
from megalemur.plan.lint.scale import GIB, gpu_hours, is_costly

_BUBBLE, _HEAVY, _PADDING = 0.10, 1.10, 0.05
_LLAMA3_VOCABULARY = 128256
_FREED_BYTES = 5 * GIB


def key_value_heads_replicated(model: Any, parallel: Any) -> Texts:
    """More tensor-parallel ranks than key and value heads: each head is held and computed on several of them.
    https://github.com/modelscope/ms-swift/issues/8219"""
    copies = parallel.tensor // model.num_query_groups
    if parallel.tensor > model.num_query_groups and parallel.tensor % model.num_query_groups == 0:
        yield (
            f"parallel.tensor={parallel.tensor} is above model.num_query_groups={model.num_query_groups}: every "
            "key and "
            f"value head is held and computed {copies} times; use parallel.tensor={model.num_query_groups} to avoid it"
        )


def tensor_within_node(parallel: Any, gpus_per_node: int) -> Texts:
    """Tensor parallelism that leaves the node: its collectives go over the network, against the advice of Narayanan et
    al. 2021 that is quoted in https://github.com/NVIDIA/Megatron-LM/issues/258"""
    if gpus_per_node % parallel.tensor:
        good = max(t for t in range(1, min(parallel.tensor, gpus_per_node) + 1) if gpus_per_node % t == 0)
        yield (
            f"parallel.tensor={parallel.tensor} does not fit into nodes of {gpus_per_node} GPUs: its collectives, four "
            f"a layer and micro-batch, would go over the network; use parallel.tensor={good} and more pipeline stages"
        )


def pipeline_bubble(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """So few micro-batches that the pipeline idles for more than a tenth of the step.
    https://github.com/bigscience-workshop/bigscience/issues/70"""
    stages, batches = parallel.pipeline, data.global_batch_size // (data.micro_batch_size * parallel.data)
    idle = (stages - 1) / (parallel.chunks * batches + stages - 1) if batches else 0.0
    if idle > _BUBBLE and is_costly(run, model, parallel, data, share=idle):
        hours = idle * gpu_hours(run, model, parallel, data)
        fewer = " and fewer than the stages" if batches < stages else ""
        yield (
            f"parallel.pipeline={stages} with {batches} micro-batches a step{fewer} idles {idle:.0%} of the time, "
            f"about {hours:,.0f} GPU-hours of this run or more; use a smaller data.micro_batch_size or parallel.data, "
            "more parallel.chunks, or fewer stages"
        )


def vocabulary_padding_waste(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """Padding rows of the vocabulary that cost memory and arithmetic for nothing.
    Measured here: the rows are counted."""
    rows = parallel.padded_vocab(model.vocab_size) - model.vocab_size
    if _PADDING * model.vocab_size < rows <= model.vocab_size and is_costly(run, model, parallel, data):
        yield (
            f"parallel.pad_vocab_to={parallel.pad_vocab_to} x parallel.tensor={parallel.tensor} pads model.vocab_size="
            f"{model.vocab_size} by {rows} rows ({rows / model.vocab_size:.0%}); use a smaller parallel.pad_vocab_to"
        )


def output_stage_heavier(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """The last pipeline stage computes more than a tenth more than the others, because the output layer is there: all
    wait for it.
    https://github.com/NVIDIA/Megatron-LM/issues/890 https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5391"""
    try:
        layers = stage_layers(model.num_layers, parallel)
    except ValueError:
        return  # layers_over_stages reports it
    if len(layers) < 2 or not is_costly(run, model, parallel, data):
        return
    work = _work(layers, model, data)
    ratio = work[-1] * (len(work) - 1) / sum(work[:-1])
    if ratio <= _HEAVY:
        return
    better = _better_last_stage(model, parallel, data)
    advice = f"set parallel.last_stage_layers={better}" if better else "use fewer stages, or other parallel.chunks"
    yield (
        f"the output layer of model.vocab_size={model.vocab_size} makes the last of "
        f"parallel.pipeline={len(work)} stages "
        f"{ratio - 1:.0%} heavier than the others, which wait for it; {advice}"
    )


def _work(layers: list[int], model: Any, data: Any) -> list[float]:
    """Multiply-adds a token on each stage, attention's scores included."""
    layer = model.parameters_per_layer + data.sequence_length * model.hidden_size
    work = [float(count * layer) for count in layers]
    work[-1] += model.vocab_size * model.hidden_size
    return work


def _better_last_stage(model: Any, parallel: Any, data: Any) -> int | None:
    """The number of layers on the last stage that makes the slowest stage fastest; None where none is better."""
    slowest = {}
    for last in range(1, model.num_layers):
        layout = parallel.model_copy(update={"last_stage_layers": last})
        try:
            chunk_layers(model.num_layers, layout)
            slowest[last] = max(_work(stage_layers(model.num_layers, layout), model, data))
        except ValueError:
            continue
    now = max(_work(stage_layers(model.num_layers, parallel), model, data))
    best = min(slowest, key=lambda last: slowest[last], default=None)
    return best if best is not None and slowest[best] < now else None


def overlaps_off(run: Any, model: Any, parallel: Any, data: Any) -> Texts:
    """Several replicas whose gradients and parameters travel while nothing is computed.
    https://github.com/NVIDIA/Megatron-LM/issues/391"""
    off = [name for name in ("overlap_grad_reduce", "overlap_param_gather") if not getattr(parallel, name)]
    if not parallel.distributed_optimizer:
        off = [name for name in off if name != "overlap_param_gather"]
    if parallel.data > 1 and off and is_costly(run, model, parallel, data, share=0.05):
        moved = 6 * model.parameters / (parallel.tensor * parallel.pipeline)
        yield (
            f"{' and '.join(f'parallel.{name}=false' for name in off)} with parallel.data={parallel.data}: about "
            f"{moved / 1e9:.1f} GB a GPU and step travel while it waits; set {' and '.join(off)} to true"
        )


def optimizer_state_replicated(model: Any, parallel: Any) -> Texts:
    """Masters and moments are held whole by every replica although they could be split over them.
    https://github.com/NVIDIA-NeMo/Speech/pull/9482"""
    held = 12 * model.parameters / (parallel.tensor * parallel.pipeline)
    freed = held * (1 - 1 / parallel.data)
    if not parallel.distributed_optimizer and freed > _FREED_BYTES:
        yield (
            f"parallel.distributed_optimizer=false holds {held / GIB:.0f} GiB of masters and moments on every GPU; "
            f"parallel.distributed_optimizer=true frees {freed / GIB:.0f} GiB of them"
        )


def rotary_base_of_llama3(model: Any) -> Texts:
    """A vocabulary of Llama 3 with the rotary base of Llama 2.
    https://github.com/marin-community/levanter/pull/649"""
    if model.vocab_size == _LLAMA3_VOCABULARY and model.rope_theta == 10000.0:
        yield (
            f"model.vocab_size={_LLAMA3_VOCABULARY} is Llama 3's, but model.rope_theta=10000 is Llama 2's; use "
            "model.rope_theta=500000, or a preset"
        )


def positions_never_trained(model: Any, data: Any, checkpoint: Any) -> Texts:
    """A model from scratch that declares positions which it never sees: beyond them it writes nonsense.
    https://github.com/TransformerLensOrg/TransformerLens/issues/492"""
    if checkpoint.start_from is None and data.sequence_length < model.max_position_embeddings:
        yield (
            f"model.max_position_embeddings={model.max_position_embeddings} goes into the exported config.json, but a "
            f"run from scratch sees data.sequence_length={data.sequence_length} only; use "
            f"model.max_position_embeddings={data.sequence_length}"
        )


RULES = (
    ("warning", key_value_heads_replicated),
    ("warning", tensor_within_node),
    ("warning", pipeline_bubble),
    ("warning", vocabulary_padding_waste),
    ("warning", output_stage_heavier),
    ("warning", overlaps_off),
    ("warning", optimizer_state_replicated),
    ("warning", rotary_base_of_llama3),
    ("warning", positions_never_trained),
)
