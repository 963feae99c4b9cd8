"""What a job would run on: one kind of GPU, its node and its network, from a small YAML file."""

import contextlib
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from megalemur.config.load import ConfigError, parse_settings
from megalemur.config.plain_files import read_plain
from megalemur.config.section import Section

_MAX_BYTES = 1 << 16
_FOLDER = Path("launch/clusters")


class Cluster(Section):
    """GPUs in nodes, nodes on a network. Bandwidths are the data sheets'; what of them is reached says Constants."""

    name: str
    """As in the file's name."""
    gpu: str
    """The GPU, as CUDA names it."""
    architecture: Literal["ampere", "hopper", "blackwell"]
    """Generation, which chooses the efficiency constants."""
    memory_bytes: PositiveInt
    """Memory of one GPU, bytes, as its driver reports it."""
    peak_teraflops_16bit: PositiveFloat
    """bf16 and fp16 tensor-core peak, dense, TFLOP/s."""
    peak_teraflops_fp8: PositiveFloat | None = None
    """fp8 tensor-core peak, dense, TFLOP/s. None: the GPU has no fp8."""
    peak_teraflops_fp32: PositiveFloat
    """fp32 peak outside the tensor cores, TFLOP/s."""
    achievable_fraction: float = Field(default=1.0, gt=0, le=1.25)
    """What products and attention reach here of what Constants expects of this architecture: below 1 where power or
    clocks are capped. A measured step beside a planned one tells it. At 1.25 products and attention are near the
    peak."""
    multiprocessors: PositiveInt
    """Streaming multiprocessors of one GPU."""
    memory_gigabytes_per_second: PositiveFloat
    """Bandwidth of the GPU's memory, GB/s."""
    gpus_per_node: PositiveInt
    """GPUs that the fast links join."""
    node_gigabytes_per_second: PositiveFloat
    """One GPU's bandwidth to the others of its node, one direction, GB/s."""
    node_latency_seconds: PositiveFloat
    """One hop between GPUs of a node, seconds."""
    network_gigabytes_per_second: PositiveFloat
    """One GPU's share of its node's network, one direction, GB/s."""
    network_latency_seconds: PositiveFloat
    """One hop between nodes, seconds."""
    sources: dict[str, str]
    """Where each figure comes from: every figure's name has an entry."""

    @model_validator(mode="after")
    def _every_figure_has_its_source(self) -> "Cluster":
        figures = {
            name
            for name in type(self).model_fields
            if name in self.model_fields_set and isinstance(getattr(self, name), (int, float))
        }
        missing, strange = sorted(figures - set(self.sources)), sorted(set(self.sources) - figures)
        if missing:
            raise ValueError(f"sources: nothing is said about {', '.join(missing)}; write where each figure comes from")
        if strange:
            raise ValueError(f"sources: {', '.join(strange)} is no figure of this file")
        return self


def _folders(beside: Path | None) -> list[Path]:
    """Where clusters are looked up by name: the working directory, above the run file, the checkout of this package."""
    places = [Path.cwd(), Path(__file__).parents[3]]
    if beside is not None:
        near = Path(beside).resolve()
        places[1:1] = [near, near.parent, near.parent.parent, near.parent.parent.parent]
    folders = dict.fromkeys((place / _FOLDER).resolve() for place in places)
    return [folder for folder in folders if folder.is_dir()]


def load_cluster(name_or_path: str, beside: Path | None = None) -> Cluster:
    """The cluster of a file, or of a name such as h100_sxm, which is looked up in launch/clusters.

    Args:
        name_or_path: a name without a suffix, or a path that ends in .yaml or .yml.
        beside: the run file, or a folder, in whose parents launch/clusters is looked for too.

    Raises:
        ConfigError: no such cluster (the message lists those that there are), or a file that is no cluster.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        folders = _folders(beside)
        found = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}
        if name_or_path not in found:
            known = f"there are {', '.join(sorted(found))}" if found else f"no {_FOLDER} was found"
            raise ConfigError(
                f"cluster {name_or_path}", [f"no such cluster; {known}, or write the path of a YAML file"]
            )
        path = found[name_or_path]
    return _read(path)


def cluster_with(gpu: str) -> Cluster | None:
    """The cluster in launch/clusters whose GPU CUDA names so; None: there is none, or several. Files that cannot be
    read are passed over: nobody has asked for them."""
    files = {file.stem: file for folder in reversed(_folders(None)) for file in sorted(folder.glob("*.yaml"))}
    fitting = []
    for file in files.values():
        with contextlib.suppress(ConfigError):
            cluster = _read(file)
            fitting += [cluster] if cluster.gpu == gpu else []
    return fitting[0] if len(fitting) == 1 else None


def _read(path: Path) -> Cluster:
    try:
        text = read_plain(path, _MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    values = parse_settings(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["a cluster is a mapping of figures; see launch/clusters/h100_sxm.yaml"])
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise ConfigError(str(path), problems) from None
