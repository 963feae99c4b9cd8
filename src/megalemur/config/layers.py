"""Which layers live on which pipeline stage and chunk: pure arithmetic, used by the checks, the model and the plan."""

from megalemur.config.parallel import ParallelConfig


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers on each pipeline stage.

    Raises:
        ValueError: the layers do not spread exactly; the message names settings that work.
    """
    stages, first, last = parallel.pipeline, parallel.first_stage_layers, parallel.last_stage_layers
    if stages == 1:
        if first is not None or last is not None:
            raise ValueError("parallel.first_stage_layers and last_stage_layers need parallel.pipeline above 1")
        return [num_layers]
    rest = num_layers - (first or 0) - (last or 0)
    between = stages - (first is not None) - (last is not None)
    if (between == 0 and rest != 0) or (between > 0 and (rest <= 0 or rest % between)):
        if first is None and last is None:
            good = [d for d in range(1, num_layers + 1) if num_layers % d == 0]
            shown = ", ".join(map(str, good[:9])) + (" …" if len(good) > 9 else "")
            raise ValueError(
                f"parallel.pipeline={stages} does not divide model.num_layers={num_layers}; use {shown}, "
                "or set parallel.first_stage_layers and parallel.last_stage_layers"
            )
        raise ValueError(
            f"parallel.first_stage_layers={first} and parallel.last_stage_layers={last} leave {rest} of "
            f"model.num_layers={num_layers} for {between} stages of parallel.pipeline={stages}, which is no even share"
        )
    share = rest // between if between else 0
    counts = [share] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Layers on each [stage][chunk].

    Raises:
        ValueError: the layers do not spread exactly over stages and chunks.
    """
    counts, chunks = stage_layers(num_layers, parallel), parallel.chunks
    for count in counts:
        if count % chunks:
            good = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
            raise ValueError(
                f"parallel.chunks={chunks} does not divide the {count} layers of a pipeline stage "
                f"(model.num_layers={num_layers}, parallel.pipeline={parallel.pipeline}); use {good}"
            )
    return [[count // chunks] * chunks for count in counts]
