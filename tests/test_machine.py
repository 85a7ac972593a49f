import os
import platform
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from medssl import machine

Core = namedtuple("Core", "user nice system idle iowait")


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def affinity(monkeypatch):
    return lambda cores: monkeypatch.setattr(machine, "_list_cores", lambda: cores)


def test_cores_are_those_of_the_affinity(tmp_path, affinity):
    affinity([3, 5, 8])
    assert machine.count_cores(tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_that_is_bound_to_a_core_has_one():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from medssl.machine import count_cores; print(count_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 16),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"proc/self/cgroup": "0::/jobs/job7/step\n",
          "sys/fs/cgroup/jobs/job7/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/job7\n1:memory:/other\n",
          "sys/fs/cgroup/cpu/job7/cpu.cfs_quota_us": "500000",
          "sys/fs/cgroup/cpu/job7/cpu.cfs_period_us": "100000"}, 5),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "many"}, 16),
    ],
)  # fmt: skip
def test_cores_are_within_the_quota_of_the_container_or_job(tmp_path, affinity, files, cores):
    affinity(list(range(16)))
    for name, text in files.items():
        write(tmp_path, name, text)
    assert machine.count_cores(tmp_path) == cores


STAT = "anon 5\nactive_file 1000\ninactive_file 3000\n"


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({"memory.max": "9000\n", "memory.current": "9000\n", "memory.stat": STAT}, 9000, 4000),
        ({"memory.max": "max\n", "memory.current": "9000\n", "memory.stat": STAT}, 99e9, 60e9),
        ({"jobs/7/memory.max": "9000", "jobs/7/memory.current": "1", "jobs/7/memory.stat": ""},
         9000, 8999),
        ({"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "5000",
          "memory/memory.stat": "inactive_file 1000\n"}, 9000, 5000),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "5",
          "memory/memory.stat": ""}, 99e9, 60e9),
        ({"memory.max": "9000", "memory.current": "9999", "memory.stat": ""}, 9000, 0),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_job_without_what_the_kernel_gives_back(
    tmp_path, monkeypatch, files, limit, free
):
    found = namedtuple("Memory", "total available")(99e9, 60e9)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: found)
    write(tmp_path, "proc/self/cgroup", "0::/jobs/7/step\n")
    for name, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text)
    assert machine.read_memory_limit(tmp_path) == limit
    assert machine.count_free_memory(root=tmp_path) == free


@pytest.mark.parametrize("seconds", [0.1, 0.3, 3.0])  # psutil's own percents are too low under 1 s
def test_free_is_what_is_idle_or_gives_way_on_the_cores_of_this_process(
    monkeypatch, affinity, seconds
):
    idle, busy = Core(0, 0, 0, 1, 0), Core(0.9, 0, 0.1, 0, 0)
    niced, waiting = Core(0, 1, 0, 0, 0), Core(0, 0, 0, 0.4, 0.6)
    used = [busy, idle, niced, waiting, idle]
    clock = iter(range(1, 100))

    def read_times(percpu):
        assert percpu
        now = next(clock) * seconds
        return [Core(*(1000 + now * share for share in core)) for core in used]

    monkeypatch.setattr(machine.psutil, "cpu_times", read_times)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    affinity([0, 1, 2, 3])
    for niced, grouped, free in (
        (False, False, 3),
        (True, False, 2),
        (False, True, 2),
    ):
        monkeypatch.setattr(machine, "_is_niced", lambda niced=niced: niced)
        monkeypatch.setattr(machine, "_has_autogroups", lambda grouped=grouped: grouped)
        assert machine.count_free_cores() == pytest.approx(free)


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OPENBLAS_NUM_THREADS")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_spin_for_a_moment_only_unless_the_user_says_otherwise(given):
    environment = {key: value for key, value in os.environ.items() if key not in WAITING}
    code = f"import medssl, os, sys; print(*(os.environ.get(k, '-') for k in {WAITING}))"
    code += "; assert not {'torch', 'numpy'} & set(sys.modules)"  # they read it when loaded
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    policy = ["ACTIVE", "-"] if given else ["PASSIVE", "300000"]
    assert done.stdout.split() == [*policy, "0", "1"]


def test_free_memory_is_within_the_limit_of_the_process():
    code = (
        "import psutil, resource\nfrom medssl.machine import count_free_memory\n"
        "most = psutil.Process().memory_info().vms + 10**7\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\nprint(count_free_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= 1e7


def test_the_probe_compares_the_number_formats_it_says_it_does(monkeypatch):
    dtypes, clock = [], [0.0]
    conv = machine.F.conv3d

    def slow(x, weight, padding):
        dtypes.append(x.dtype)
        clock[0] += 3.0 if x.dtype == torch.float32 else 1.0
        return conv(x, weight, padding=padding)

    monkeypatch.setattr(machine.F, "conv3d", slow)
    monkeypatch.setattr(machine.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(machine, "PROBE_SHAPE", (1, 2, 3, 3, 3))
    assert machine.measure_bfloat16.__wrapped__() == pytest.approx(3.0)
    assert dtypes == machine.PROBE_TURNS * [torch.float32, torch.bfloat16]


FAULTS = """
import resource, numpy
from medssl.machine import compute_with
compute_with(1)
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    features = [numpy.ones(3 * 2**18, dtype="float32") for _ in range(32)]
    del features
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are glibc's")
@pytest.mark.parametrize(("given", "keeps"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_a_step_has_the_memory_of_the_one_before_unless_the_user_says_otherwise(given, keeps):
    kept = {k: v for k, v in os.environ.items() if k not in machine.MALLOC_SETTINGS}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**kept, **given}
    )
    assert (int(done.stdout) < 100) == keeps, done.stdout  # of 24,576 pages
