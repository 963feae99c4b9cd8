"""Files of other programs that are made of pickles: torch.save archives and the metadata of torch's distributed
checkpoints. Read without calling anything that they name, and written so that those programs take them for their own.

machine.py puts the values of pickles together, pickles.py says what their names mean and writes them, zips.py knows the
archives around them.
"""

from checkpoints_tools.foreign.archives import (
    Archive,
    Framed,
    PlannedTensor,
    StoredTensor,
    dump_archive,
    frame_archive,
    read_archive,
)
from checkpoints_tools.foreign.crc import combined_crc
from checkpoints_tools.foreign.dcp import DcpChunk, DcpMetadata, DcpTensor, dump_dcp_metadata, read_dcp_metadata
from checkpoints_tools.foreign.values import Namespace, Stub

__all__ = [
    "Archive",
    "DcpChunk",
    "DcpMetadata",
    "DcpTensor",
    "Framed",
    "Namespace",
    "PlannedTensor",
    "StoredTensor",
    "Stub",
    "combined_crc",
    "dump_archive",
    "dump_dcp_metadata",
    "frame_archive",
    "read_archive",
    "read_dcp_metadata",
]
