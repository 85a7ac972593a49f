"""Speed of training steps on a busy machine, by threads and by how they wait.

A process of normal priority spins on one core for as long as this runs, and a second time on none.
Each line is a process of its own: steps a second, and the ratio to one thread.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

ARMS = {
    "one": {"OMP_NUM_THREADS": "1"},
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "{cores}"},
    "bounded": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": "{cores}"},
    "passive": {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "{cores}"},
    "medssl": {},
}


def occupy_core(seconds: float) -> None:
    """Keep the last core busy."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def measure_speed(seconds: float) -> None:
    """Print threads and steps a second of a small network in 3D."""
    from medssl.machine import choose_threads
    from medssl.networks.build import NetworkSpec, build_network

    torch = importlib.import_module("torch")  # after medssl, which says how threads wait
    torch.set_num_threads(choose_threads())
    spec = NetworkSpec(
        in_channels=1, num_classes=3, filters=(8, 16, 32), kernels=((3, 3, 3),) * 3,
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), dropout=0.1, deep_supervision=True,
    )  # fmt: skip
    network = build_network(spec)
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.randn(2, 1, 24, 24, 16)
    times: list[float] = []
    while sum(times[2:]) < seconds:
        started = time.perf_counter()
        loss = sum(head.square().mean() for head in network.forward_heads(image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    print(torch.get_num_threads(), len(times[2:]) / sum(times[2:]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked for."""
    parser.add_argument("--seconds", type=float, default=6.0, help="of each line")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spin", type=float, help=argparse.SUPPRESS)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Run all arms beside a competitor, and without one."""
    if arguments.spin:
        occupy_core(arguments.spin)
        return []
    if arguments.inside:
        measure_speed(arguments.seconds)
        return []
    rows = []
    for is_busy in (True, False):
        rows += compare_arms(arguments.seconds, arguments.arms, is_busy)
    return rows


def compare_arms(seconds: float, arms: list[str], is_busy: bool) -> list[dict[str, object]]:
    """Print a line for each arm, and return them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{cores} cores, {'one of them busy' if is_busy else 'no competitor'}")
    rows: list[dict[str, object]] = []
    reference = None
    for name in arms:
        variables = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        environment = {key: value for key, value in os.environ.items() if key not in variables}
        environment |= {key: value.format(cores=cores) for key, value in ARMS[name].items()}
        this = [sys.executable, str(Path(__file__).parent), "threads"]
        rival = subprocess.Popen([*this, "--spin", "120"]) if is_busy else None
        try:
            command = [*this, "--inside", "--seconds", str(seconds)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
        finally:
            if rival is not None:
                rival.kill()
                rival.wait()
        threads, rate = done.stdout.split()
        reference = reference or float(rate)
        ratio = float(rate) / reference
        print(f"  {name:<10} {threads} threads {float(rate):6.2f} steps/s {ratio:5.2f}", flush=True)
        rows.append({"arm": name, "busy": is_busy, "threads": int(threads), "ratio": ratio})
    return rows
