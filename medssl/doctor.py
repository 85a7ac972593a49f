"""What this machine is, what is wrong with it, and how to mend it."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from medssl.config import hide_password
from medssl.machine import (
    choose_device,
    choose_threads,
    count_cores,
    count_free_cores,
    count_free_memory,
    has_bfloat16,
    read_memory_limit,
)
from medssl.runs import describe_provenance
from medssl.tracking import find_store_problem

LOW_DISK_GB = 5.0
LOW_MEMORY_GB = 4.0
LOW_CARD_GB = 4.0
LOW_ADDRESSES_GB = 32.0  # torch maps several times what it uses
LOW_SHM_MB = 256.0
LARGEST_SKEW_S = 60.0
SHM = Path("/dev/shm")


def examine_machine(uri: str) -> tuple[str, bool]:
    """Return a report in text, and whether training can run here as it should.

    Args:
        uri: The MLflow store that runs go to.
    """
    import torch

    facts = describe_provenance("auto", torch.get_num_threads())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cores = f"{count_cores()} cores, {count_free_cores():.1f} of them free"
    memory = f"{count_free_memory() / 1e9:.1f} of {read_memory_limit() / 1e9:.1f} GB available"
    shm = f"{shutil.disk_usage(SHM).total / 1e9:.2f} GB" if SHM.is_dir() else "not there"
    lines = {
        "python": f"{facts['python']} ({sys.executable})",
        "packages": versions,
        "processor": f"{cores}, {choose_threads()} threads used",
        "bfloat16": "yes" if _has_bfloat16() else "no: training is slower on it",
        "cards": ", ".join(_list_cards()) or "none that torch sees",
        "driver": _ask_driver() or "nvidia-smi is not there",
        "memory": memory,
        "disk": f"{shutil.disk_usage(Path()).free / 1e9:.0f} GB free in this folder",
        "/dev/shm": shm,
        "clock": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "store": hide_password(uri),
    }
    problems = [
        *_find_card_problems(),
        *_find_memory_problems(),
        *_find_disk_problems(),
        *_find_clock_problems(Path(), time.time()),
        *_find_version_problems("medssl"),
        *filter(None, [find_store_problem(uri)]),
    ]
    report = [f"{name:10} {value}" for name, value in lines.items()]
    report += [f"PROBLEM: {problem}" for problem in problems] or ["nothing is wrong"]
    return "\n".join(report), not problems


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


def _find_card_problems() -> Iterator[str]:
    """Yield what keeps torch from the cards of this machine."""
    import torch

    driver = _ask_driver()
    if driver and not torch.cuda.is_available():
        yield f"there is a card ({driver}), but torch {torch.__version__} " + _explain_unseen(
            torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
        )
    for index, card in enumerate(_list_cards()):
        capability, builds = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
        if not is_built_for(capability, builds):
            yield (
                f"cuda:{index}, {card}, is sm_{capability[0]}{capability[1]}, but this torch is "
                f"built for {', '.join(builds)}; install a torch build for it first (see the "
                "README), or train on another: train.device=cpu"
            )
            continue
        try:
            free = torch.cuda.mem_get_info(index)[0] / 1e9
        except RuntimeError as error:
            yield (
                f"cuda:{index}, {card}, cannot be used ({str(error).splitlines()[0]}); look at "
                "`nvidia-smi -q`, and train on another: train.device=cuda:1"
            )
            continue
        if free < LOW_CARD_GB:
            yield (
                f"cuda:{index}, {card}, has {free:.1f} GB free; `nvidia-smi` says who has the "
                "rest: wait for them, or train on another: train.device=cuda:1"
            )


def _explain_unseen(cuda: str | None, visible: str | None) -> str:
    """Say why torch may not see a card that the driver sees.

    Args:
        cuda: The CUDA version that torch is built for, None for a CPU build.
        visible: CUDA_VISIBLE_DEVICES.
    """
    if cuda is None:
        return "is a build for CPUs; install a CUDA build of it (see the README)"
    if visible is not None:
        return f"does not see it: CUDA_VISIBLE_DEVICES={visible!r} hides it; unset it"
    return (
        f"does not see it: the driver may be too old for CUDA {cuda}; update the driver, or "
        "install a torch build for its CUDA version first (see the README)"
    )


def is_built_for(capability: Sequence[int], builds: Sequence[str]) -> bool:
    """Return whether a build of torch has code for a card.

    Args:
        capability: Major and minor of the card, such as (7, 5).
        builds: What torch was built for, such as sm_75 (binary: the same major, up to this minor)
            and compute_90 (compiled on the way: this and all later ones).

    Example:
        >>> is_built_for((6, 1), ["sm_75", "sm_80"]), is_built_for((8, 6), ["sm_75", "sm_80"])
        (False, True)
    """
    for build in builds:
        kind, _, number = build.partition("_")
        major, minor = divmod(int(re.sub(r"\D", "", number) or 0), 10)
        if kind == "compute" and (major, minor) <= tuple(capability):
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return not builds


def _find_memory_problems() -> Iterator[str]:
    """Yield where memory, addresses or shared memory are short."""
    if (free := count_free_memory()) < LOW_MEMORY_GB * 1e9:
        yield (
            f"{free / 1e9:.1f} GB of memory are available; training wants 4 or more: "
            "end other programs, or raise the limit of the job (--mem=16G) or container "
            "(--memory=16g)"
        )
    addresses = _read_address_limit()
    if addresses < LOW_ADDRESSES_GB * 1e9:
        yield (
            f"a process may have {addresses / 1e9:.0f} GB of addresses only (ulimit -v), less than "
            "torch maps; run `ulimit -v unlimited` first"
        )
    if SHM.is_dir() and shutil.disk_usage(SHM).total < LOW_SHM_MB * 2**20:
        yield (
            "/dev/shm is small: trainings start only as many loader processes as it has room for "
            "the batches of; give the container --shm-size=1g"
        )


def _read_address_limit() -> float:
    """Return the bytes of addresses that this process may have."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else float(limit)


def _find_disk_problems() -> Iterator[str]:
    """Yield what is wrong with the disk of this folder."""
    if shutil.disk_usage(Path()).free < LOW_DISK_GB * 1e9:
        yield f"under {LOW_DISK_GB:g} GB of disk are free in this folder; run from a larger one"
    try:
        tempfile.TemporaryFile(dir=Path()).close()
    except OSError as error:
        yield f"nothing can be written in this folder ({error.strerror}); run from one of yours"


def _find_clock_problems(folder: Path, now: float) -> Iterator[str]:
    """Yield why dates of runs would be wrong.

    Args:
        folder: Where runs go.
        now: Seconds since 1970, by the clock of this machine.
    """
    repair = "set the clock by the network's (timedatectl set-ntp true, or chrony)"
    installed = Path(__file__).stat().st_mtime
    if now < installed - LARGEST_SKEW_S:
        stated, least = (
            datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
            for seconds in (now, installed)
        )
        yield f"the clock says {stated}, but medssl was installed at {least}; {repair}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            skew = Path(file.name).stat().st_mtime - now
    except OSError:  # it is told as a problem of the disk
        return
    if abs(skew) > LARGEST_SKEW_S:
        yield (
            f"files in this folder are dated {skew:+.0f} s from the clock of this machine, so what "
            f"a killed run left would be judged wrongly; on both machines, {repair}"
        )


def _find_version_problems(package: str) -> Iterator[str]:
    """Yield what a package needs, and what that needs, but is not there in a version that fits."""
    todo, checked = [package], {package}
    while todo:
        name = todo.pop()
        try:
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            continue
        for need in needs:
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            repair = f'pip install "{need.name}{need.specifier}"'
            try:
                installed = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{need.name}, which {name} needs, is not installed; {repair}"
                continue
            if not need.specifier.contains(installed, prereleases=True):
                yield f"{need.name} is {installed}, but {name} needs {need.specifier}; {repair}"
            key = need.name.lower().replace("_", "-")
            if key not in checked:
                checked.add(key)
                todo.append(need.name)
