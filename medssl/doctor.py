"""What this machine is, what is wrong with it, and how to mend it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from medssl.machine import (
    choose_device,
    choose_threads,
    count_cores,
    count_free_cores,
    has_bfloat16,
    read_memory_limit,
)
from medssl.runs import describe_provenance

LOW_DISK_GB = 5.0
LOW_MEMORY_GB = 4.0
LOW_SHM_MB = 256.0


def examine() -> tuple[str, bool]:
    """Return a report in text, and whether training can run here."""
    import torch

    lines = []
    facts = describe_provenance("auto", torch.get_num_threads())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines.append(f"python     {facts['python']} ({sys.executable})")
    lines.append(f"packages   {versions}")
    cores = f"{count_cores()} cores, {count_free_cores():.1f} of them free"
    lines.append(f"processor  {cores}, {choose_threads()} threads used")
    lines.append(f"bfloat16   {'yes' if _has_bfloat16() else 'no: training is slower on it'}")
    lines.append(f"cards      {', '.join(_list_cards()) or 'none that torch sees'}")
    lines.append(f"driver     {_ask_driver() or 'nvidia-smi is not there'}")
    lines.append(f"memory     {_read_memory_gb():.1f} GB available")
    lines.append(f"disk       {shutil.disk_usage(Path()).free / 1e9:.0f} GB free in this folder")
    problems = list(_find_problems())
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["nothing is wrong"]
    return "\n".join(lines), not problems


def _has_bfloat16() -> bool:
    """Return whether the device that `auto` takes computes in bfloat16."""
    return has_bfloat16(choose_device("auto"))


def _list_cards() -> list[str]:
    """Return name and memory of the cards that torch sees."""
    import torch

    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)")
    return cards


def _ask_driver() -> str:
    """Return what nvidia-smi says of driver and cards."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(result.stdout.strip().splitlines()) if result.returncode == 0 else ""


def _read_memory_gb(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the memory that is available to this process, its cgroup's limit included.

    Files that the kernel keeps in memory, and gives back, do not count as used.
    """
    import psutil

    available = float(psutil.virtual_memory().available)
    if (group / "memory.current").is_file():
        used = float((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= sum(float(parts.get(kind, 0)) for kind in ("active_file", "inactive_file"))
        available = min(available, read_memory_limit(group) - used)
    return available / 1e9


def _find_problems() -> Iterator[str]:
    """Yield what is wrong, each with its repair."""
    import torch

    driver = _ask_driver()
    if driver and not torch.cuda.is_available():
        yield (
            f"there is a card ({driver}), but torch {torch.__version__} does not see it: the "
            "driver may be too old for this build; install a torch build for its CUDA version "
            "first (see the README), or update the driver"
        )
    if _read_memory_gb() < LOW_MEMORY_GB:
        yield f"{_read_memory_gb():.1f} GB of memory are available; training wants 4 or more"
    if shutil.disk_usage(Path()).free < LOW_DISK_GB * 1e9:
        yield "under 5 GB of disk are free in this folder; run from a larger one"
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).total < LOW_SHM_MB * 2**20:
        yield (
            "/dev/shm is small: trainings start only as many loader processes as it has room for "
            "the batches of; give the container --shm-size=1g"
        )
