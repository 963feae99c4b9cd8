"""Merges two data sets into one of more than 2^32 tokens, 12.9 GB, and verifies it. Run by `make fuzz`.

python -m tests.faults.merge_large --directory /somewhere/with/13/GB
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.datasets import refuse_wrong_holes, write_holes

TOOLS = Path(__file__).parents[2] / "data_prep"


def merge_large(directory: Path) -> None:
    """Two sources of 3 documents of 2^30 tokens each: the pointers pass 2^32 in tokens and 2^33 in bytes."""
    for name, first_id in (("a", 7), ("b", 10)):
        write_holes(directory / name, 3, 2**30, first_id)
    tool(directory, "merge_index.py", "a", "b", "--output", "c", "--vocab-size", "32000")
    refuse_wrong_holes(directory / "c", 6, 2**30, 7)
    tool(directory, "verify_index.py", "c")


def tool(directory: Path, *arguments: str) -> None:
    """Run a command of data_prep there."""
    script, *options = arguments
    subprocess.run([sys.executable, str(TOOLS / script), *options], cwd=directory, check=True)


def main() -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to put the files; unset: a temporary one")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as scratch:
        merge_large(Path(scratch))
    sys.stdout.write("6,442,450,944 tokens in 6 documents: merged and verified\n")


if __name__ == "__main__":
    main()
