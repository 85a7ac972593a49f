"""`scripts/benchmark.py memory`, on a scan of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    return benchmark


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own_and_its_peak_is_as_forecast():
    command = [
        sys.executable,
        ROOT / "scripts" / "benchmark.py",
        "memory",
        "--row",
        "predict,128,128,96,3,1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    assert row["voxels"] == 128 * 128 * 96
    assert 2e8 < row["peak"] < 2e9
    assert 0.7 < row["expected"] / row["peak"] < 1.3


def test_the_table_has_a_line_for_each_row_and_each_row_is_kept(benchmark, tmp_path, monkeypatch):
    def measure(command, **options):
        what, *words = command[-1].split(",")
        *shape, classes, flips = (int(word) for word in words)
        voxels = shape[0] * shape[1] * shape[2]
        sizes = {"voxels": voxels, "peak": 12 * voxels * classes, "expected": 9 * voxels * classes}
        sizes["expected"] = sizes["expected"] if what == "predict" else None
        row = {
            "of": what,
            "shape": shape,
            "classes": classes,
            "flips": flips,
            "seconds": 7.2,
            **sizes,
        }
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{json.dumps(row)}\n")

    told = []
    monkeypatch.setattr(benchmark.subprocess, "run", measure)
    monkeypatch.setattr("builtins.print", lambda text, **options: told.append(text))
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "memory", "--out", str(tmp_path / "new"), "--most", "80"]
    )
    benchmark.main()
    first, _, cache, *_, last = "\n".join(told).splitlines()[2:]
    assert first == "| predict | 256 x 256 x 256 | 3 | 0 | 0.60 GB | 0.45 GB | 12.0 | 7 |"
    assert cache == "| cache | 256 x 256 x 256 | 3 | 0 | 0.60 GB |  | 12.0 | 7 |"
    assert last.startswith("| predict | 512 x 512 x 300 | 3 | 0 | 2.83 GB |")
    rows = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert [row["voxels"] for row in rows] == [*[256**3] * 5, 512 * 512 * 300]
