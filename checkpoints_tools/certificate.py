"""conversion.json: that what lies in the destination, read back, is what was read from the source, tensor by tensor."""

import platform
import threading
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import xxhash

import megalemur
from checkpoints_tools.errors import CertificateError
from checkpoints_tools.mover import Progress, digest_of, in_threads
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import Key
from megalemur.config.strict_json import readable_json
from megalemur.model.names import hf_shapes

NAME = "conversion.json"
FORMAT, VERSION = "megalemur-conversion", 1
_SHOWN = 10


def compare(expected: Mapping[Key, str], destination: Weights, workers: int, progress: Progress) -> None:
    """Read every tensor of the destination and compare its digest with that of what was read from the source.

    Raises:
        CertificateError: names the tensors that differ or are not there.
    """
    keys, lock, shapes = list(expected), threading.Lock(), hf_shapes(destination.model)
    differing: list[Key] = []
    missing = [key for key in keys if key not in destination.dtypes]
    surplus = [key for key in destination.dtypes if key not in expected]

    def one(number: int) -> None:
        found = digest_of(destination, keys[number], shapes[keys[number].name], progress)
        if found != expected[keys[number]]:
            with lock:
                differing.append(keys[number])

    if not missing:
        in_threads(one, len(keys), workers)
    found = {"differs": differing, "is not there": missing, "is too much": surplus}
    listed = [f"{key.name} ({key.kind}) {why}" for why, keys in found.items() for key in sorted(keys)]
    if listed:
        more = f"\n  - and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise CertificateError(
            "what was written is not what was read; the destination was not made:"
            + "".join(f"\n  - {line}" for line in listed[:_SHOWN])
            + more
        )


def certificate(
    weights: Weights, digests: Mapping[Key, str], *, source: Mapping[str, Any], destination: Mapping[str, Any]
) -> bytes:
    """The text of conversion.json.

    Args:
        weights: what was written.
        digests: xxh3_128 of each tensor's rows in Hugging Face's names, shapes and order, equal in source and
            destination.
        source: format, path, changes that were made on the way.
        destination: format and options.
    """
    shapes = hf_shapes(weights.model)
    tensors: dict[str, dict[str, Any]] = {}
    for key, digest in sorted(digests.items()):
        dtype = str(weights.dtypes[key]).removeprefix("torch.")
        said = {"shape": list(shapes[key.name]), "dtype": dtype, "xxh3_128": digest}
        tensors.setdefault(key.kind, {})[key.name] = said
    lines = "".join(f"{key.kind}|{key.name}|{digest}\n" for key, digest in sorted(digests.items()))
    root = xxhash.xxh3_128_hexdigest(lines.encode())
    return readable_json(
        {
            "format": FORMAT,
            "version": VERSION,
            "proven": "every tensor was read back from the written files and has the digest of what was read",
            "root": root,
            "source": dict(source),
            "destination": dict(destination),
            "model": weights.model.model_dump(mode="json"),
            "tensors": tensors,
            "versions": {
                "megalemur": megalemur.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "safetensors", "xxhash")},
            },
        }
    )
