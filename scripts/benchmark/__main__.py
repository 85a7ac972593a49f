"""Measures what medssl takes of a machine: `python scripts/benchmark WHAT --out DIR`.

step: a training step beside the bare passes of its networks. inference: a sliding window beside
those of MONAI and nnU-Net, and MC dropout. memory: the peak of what the commands do. cache: the
first start on one core and on all, and the second. threads: steps on a busy machine. scale: what
commands cost by the number of scans. Each prints a table and writes WHAT.json.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

KINDS = ("step", "inference", "memory", "cache", "threads", "scale")


def main() -> None:
    """Measure what is asked for, and write it."""
    parser = argparse.ArgumentParser(
        "benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, help="followed by its own options: step --help")
    kind = parser.parse_args(sys.argv[1:2]).kind
    module = importlib.import_module(kind)  # it alone: some say how torch is to be imported
    parser = argparse.ArgumentParser(f"benchmark {kind}", description=module.__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder of the JSON")
    module.add_arguments(parser)
    arguments = parser.parse_args(sys.argv[2:])
    rows = module.measure(arguments)
    if rows:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{kind}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
