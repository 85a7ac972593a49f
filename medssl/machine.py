"""What this process may use of the machine: devices, cores, threads, memory, number formats."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

from medssl import ranks
from medssl.config import InputError

SAMPLE_SECONDS = 0.3
PROBE_SHAPE = (2, 16, 32, 32, 32)  # of the features that number formats are compared on
PROBE_TURNS = 6  # of each number format; the first one warms up
TORCH_THREADS = torch.get_num_threads()  # of torch, if nobody tells it otherwise
MALLOC_LIMITS = {  # of glibc, by their numbers in malloc.h, in bytes
    -3: 2**25,  # M_MMAP_THRESHOLD: the most that it takes; larger arrays go back at once
    -1: 2**30,  # M_TRIM_THRESHOLD
}
MALLOC_SETTINGS = "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"


def choose_device(name: str) -> str:
    """Return the device to compute on.

    Raises:
        InputError: The device that was asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" or ranks.count_neighbors() == 1:
            return name
    if name == "cuda" and ranks.count_neighbors() > 1:  # a card for each process
        name = f"cuda:{ranks.find_neighbor() % max(1, torch.cuda.device_count())}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name}: not available here ({str(error).splitlines()[0]}); leave it out "
            "(auto), or give cpu, cuda, cuda:1; `medssl doctor` says what there is"
        ) from error
    return name


def has_bfloat16(device: str) -> bool:
    """Return whether a device computes in bfloat16 natively; emulated it is slower than float32."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and has_cpu_bfloat16()


def has_cpu_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 natively."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.cache
def measure_bfloat16() -> float:
    """Return how many times as fast as in float32 this processor convolves in bfloat16.

    A 3D convolution, there and back, a few times in turns: well under a second.
    """
    features = torch.ones(PROBE_SHAPE).to(memory_format=torch.channels_last_3d)
    weight = torch.ones(PROBE_SHAPE[1], PROBE_SHAPE[1], 3, 3, 3)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(PROBE_TURNS):
        for dtype, seconds in times.items():
            x, w = (tensor.to(dtype).requires_grad_() for tensor in (features, weight))
            started = time.process_time()
            F.conv3d(x, w, padding=1).sum().backward()  # type: ignore[no-untyped-call]
            seconds.append(time.process_time() - started)
    full, short = (min(seconds[1:]) for seconds in times.values())  # what others disturbed least
    return full / max(short, 1e-9)


def read_memory_limit(root: Path = Path("/")) -> float:
    """Return the bytes that this process may take at most: the machine's, or its cgroups'.

    Args:
        root: Where /proc and /sys lie.
    """
    limits = (limit for limit, _ in _read_memory_groups(root))
    return min(float(psutil.virtual_memory().total), *limits, math.inf)


def _read_memory_groups(root: Path) -> Iterator[tuple[float, float]]:
    """Yield limit and use, in bytes, of each cgroup of this process that has a limit.

    Files that the kernel keeps in memory, and gives back, do not count as used.
    """
    names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder in _find_groups(root, "memory"):
        for files in names:
            try:
                limit, used = (float((folder / name).read_text()) for name in files)
                lines = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such file, or "max"
                continue
            parts = dict(line.split() for line in lines)
            cached = sum(float(parts.get(kind, 0)) for kind in ("active_file", "inactive_file"))
            yield limit, used - cached


def count_free_memory(device: str = "cpu", root: Path = Path("/")) -> float:
    """Return the bytes that this process may still take: of the machine, its cgroups, its limit.

    Args:
        device: Of what is computed on a GPU, the memory of that counts too.
        root: Where /proc and /sys lie.
    """
    groups = (limit - used for limit, used in _read_memory_groups(root))
    free = min(float(psutil.virtual_memory().available), *groups, math.inf)
    if device.startswith("cuda"):
        free = min(free, float(torch.cuda.mem_get_info(device)[0]))
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        free = min(free, float(allowed - psutil.Process().memory_info().vms))
    return max(free, 0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is what numpy and torch say when memory does not suffice."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn what numpy and torch say when memory does not suffice into advice.

    Raises:
        InputError: The advice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{advice} ({error})") from error


def choose_threads(recorded: int | None = None) -> int:
    """Return the threads to compute with: those asked for, else as many as cores are free.

    Two threads on one free core wait for each other at every step.

    Args:
        recorded: Those of a run that goes on, which would give other bits with others.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return TORCH_THREADS
    most = min(TORCH_THREADS, count_cores())
    return min(most, max(1, recorded or round(count_free_cores())))


def compute_with(threads: int) -> None:
    """Compute with so many threads, and let each step have the memory of the one before.

    glibc hands freed features back to the kernel, and each page of the next ones is a fault: a
    tenth of a step. Up to 1 GiB is kept; whoever has set glibc's limits has them as they are.

    Args:
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc" and not set(MALLOC_SETTINGS) & set(os.environ):
        libc = ctypes.CDLL(None)
        for kind, size in MALLOC_LIMITS.items():
            libc.mallopt(kind, size)


def count_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use: those of its affinity, within its cgroup's quota.

    Processes of one command share those of a machine evenly.

    Args:
        root: Where /proc and /sys lie.
    """
    quotas = [
        quota for folder in _find_groups(root, "cpu") if (quota := _read_quota(folder)) is not None
    ]
    cores = min([len(_list_cores()), *(round(quota) for quota in quotas)])
    return max(1, cores // ranks.count_neighbors())


def count_free_cores() -> float:
    """Return how many of the cores of this process nobody uses now, from a short look.

    What runs at a lower priority than this process is out of its way, and counts as free, unless
    priorities hold within a session only.
    """
    yielding = () if _is_niced() or _has_autogroups() else ("nice",)
    before = psutil.cpu_times(percpu=True)
    time.sleep(SAMPLE_SECONDS)
    after = psutil.cpu_times(percpu=True)
    cores = [index for index in _list_cores() if index < len(after)]
    if not cores:
        return float(count_cores())
    return sum(
        _sum_times(before[index], after[index], ("idle", "iowait", *yielding))
        / max(_sum_times(before[index], after[index], after[index]._fields), 1e-9)
        for index in cores
    )


def _sum_times(before: NamedTuple, after: NamedTuple, kinds: Iterable[str]) -> float:
    """Return the seconds of some kinds between two states of a core; guests' are in user's."""
    return sum(
        max(0.0, getattr(after, kind, 0.0) - getattr(before, kind, 0.0))
        for kind in kinds
        if not kind.startswith("guest")
    )


def _list_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _is_niced() -> bool:
    """Return whether this process gives way to others."""
    return hasattr(os, "getpriority") and os.getpriority(os.PRIO_PROCESS, 0) > 0


def _has_autogroups(root: Path = Path("/")) -> bool:
    """Return whether sessions share the cores evenly, however low the priorities in them are."""
    try:
        return (root / "proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False


def _find_groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of the cgroup of this process and of those above it, for a controller."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders = [base, base / controller]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers or controller in controllers.split(","):
            home = base if not controllers else base / controller
            inner = Path(path.lstrip("/"))
            folders += [home / part for part in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def _read_quota(folder: Path) -> float | None:
    """Return the cores' worth of time that a cgroup may take, or None without a limit."""
    names = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for files in names:
        try:
            words = [word for name in files for word in (folder / name).read_text().split()]
            quota, period = (float(word) for word in words)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
