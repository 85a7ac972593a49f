"""What this process may use of the machine: its cores, and how many of them are free."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.3


def count_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use: those of its affinity, within its cgroup's quota.

    Args:
        root: Where /proc and /sys lie.
    """
    quotas = [quota for folder in _find_groups(root) if (quota := _read_quota(folder)) is not None]
    return max(1, min([len(_list_cores()), *(round(quota) for quota in quotas)]))


def count_free_cores() -> float:
    """Return how many of the cores of this process nobody uses now, from a short look.

    What runs at a lower priority than this process is out of its way, and counts as free, unless
    priorities hold within a session only.
    """
    use = psutil.cpu_times_percent(interval=SAMPLE_SECONDS, percpu=True)
    cores = [use[index] for index in _list_cores() if index < len(use)]
    yielding = 0 if _is_niced() or _has_autogroups() else 1
    free = sum(
        core.idle + getattr(core, "iowait", 0.0) + yielding * getattr(core, "nice", 0.0)
        for core in cores
    )
    return free / 100 if cores else float(count_cores())


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


def _find_groups(root: Path) -> list[Path]:
    """Return the folders of the cgroup of this process and of those above it."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [base, base / "cpu"]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers or "cpu" in controllers.split(","):
            home = base if not controllers else base / "cpu"
            inner = Path(path.lstrip("/"))
            found += [home / part for part in (inner, *inner.parents)]
    return found


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
