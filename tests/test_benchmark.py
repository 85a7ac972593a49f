"""`scripts/benchmark` on scans of seconds, and what its bare steps repeat."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medssl.data import cache
from medssl.data.cache import build_cache
from medssl.data.cases import split_cases
from medssl.data.check import check_dataset
from medssl.data.layouts import read_dataset
from medssl.networks.build import build_network
from medssl.objective import Objective
from medssl.predict import predict_logits
from medssl.settings import load_config
from medssl.windows import Window

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch):
    """Return what runs a measurement by its command line, and has its modules."""
    monkeypatch.syspath_prepend(FOLDER)
    modules = {
        name: importlib.import_module(name)
        for name in ("cache", "inference", "memory", "scale", "step")
    }

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        runpy.run_path(str(FOLDER), run_name="__main__")

    return SimpleNamespace(run=run, **modules)


@pytest.mark.slow
def test_rivals_at_inference_take_turns_and_say_the_same(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(benchmark.inference, "SIZES", {True: (20, 16)})
    benchmark.run("inference", "--small", "--turns", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "inference.json").read_text())
    ours = [row for row in rows if row["of"] == "medssl"]
    formats = [(row["dimension"], row["precision"], row["ratio"]) for row in ours]
    assert formats == [(d, precision, 1) for d in (3, 2) for precision in ("float32", "bfloat16")]
    assert {"MONAI", "8 passes, full", "8 passes, fast"} < {row["of"] for row in rows}
    image = torch.randn(1, 1, 20, 20, 20)
    for window in (Window((16, 16, 16)), Window((16, 16), slice_axis=0)):
        build = torch.nn.Conv3d if window.slice_axis is None else torch.nn.Conv2d
        network = build(1, 3, 3, padding=1)
        theirs = benchmark.inference.prepare_monai(network, image, window)()
        assert torch.allclose(theirs, predict_logits(network, image, window), atol=1e-5)


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own_and_its_peak_is_as_forecast():
    command = [
        sys.executable,
        FOLDER,
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
    monkeypatch.setattr(benchmark.memory.subprocess, "run", measure)
    monkeypatch.setattr("builtins.print", lambda text, **options: told.append(text))
    benchmark.run("memory", "--out", tmp_path / "new", "--most", 80)
    first, _, cache, *_, last = "\n".join(told).splitlines()[2:]
    assert first == "| predict | 256 x 256 x 256 | 3 | 0 | 0.60 GB | 0.45 GB | 12.0 | 7 |"
    assert cache == "| cache | 256 x 256 x 256 | 3 | 0 | 0.60 GB |  | 12.0 | 7 |"
    assert last.startswith("| predict | 512 x 512 x 300 | 3 | 0 | 2.83 GB |")
    rows = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert [row["voxels"] for row in rows] == [*[256**3] * 5, 512 * 512 * 300]


def test_starts_are_compared_on_one_core_and_on_all(benchmark, tmp_path, monkeypatch, capsys):
    starts, real = [], build_cache

    def build(cases, recipe, folder, *settings):
        starts.append((cache.count_cores(), folder.exists()))
        return real(cases, recipe, folder, *settings)

    monkeypatch.setattr(cache, "build_cache", build)
    monkeypatch.setattr(benchmark.cache, "count_cores", lambda: 3)
    benchmark.run("cache", "--scans", 2, "--side", 16, "--turns", 2, "--out", tmp_path)
    assert starts == [(1, False), (3, False), (3, True)] * 2
    rows = json.loads((tmp_path / "cache.json").read_text())
    assert [row["of"] for row in rows] == ["one core", "all cores", "second start"]
    assert rows[0]["ratio"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3


def test_the_bare_passes_of_a_step_are_those_that_it_asked_of_its_networks(benchmark, tiny_spec):
    config = load_config(None, ["method=default"]).config
    objective = Objective(build_network(tiny_spec), config, ("background", "a", "b")).train()
    label = torch.zeros(2, 1, 8, 8, 8, dtype=torch.uint8)
    labeled = {
        "image": torch.randn(2, 1, 8, 8, 8),
        "label": label,
        "weight": torch.ones(label.shape),
    }
    weak = torch.randn(3, 1, 8, 8, 8)
    unlabeled = {"weak": weak, "strong": weak + 1, "weight": torch.ones(weak.shape)}
    modes = [module.training for module in objective.modules()]
    with benchmark.step.record_calls(objective) as calls:
        objective(labeled, unlabeled, 0.5, torch.Generator())
    teacher, student = calls
    assert (teacher.network, teacher.has_gradient) == (objective.teacher.module, False)
    assert len(teacher.image) == 2 * 3  # two passes with dropout
    assert (student.network, student.has_gradient) == (objective.student, True)
    assert len(student.image) == 2 + 3
    assert benchmark.step.repeat_calls(calls, torch.bfloat16) > 0
    objective.student(weak)
    assert len(calls) == 2
    assert all(weight.grad is None for weight in objective.parameters())
    assert modes == [module.training for module in objective.modules()]


def test_tables_of_scale_say_what_a_further_scan_costs(benchmark, tmp_path, monkeypatch):
    ran = []

    def measure(command, **options):
        what, folder = command[4], Path(command[6])
        cases = benchmark.scale.count_cases(folder / "data")
        ran.append((cases, what))
        (folder / "runs" / "run").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "run" / "report.html").write_bytes(b"x" * 3000)
        stages = {"cache": 0.6 + 0.02 * cases, "splits": 0.001} if what == "train" else {}
        row = {"seconds": 1 + 0.05 * cases, "wall": 9.0, "peak": 5e8, "stages": stages}
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{json.dumps(row)}\n")

    monkeypatch.setattr(benchmark.scale.subprocess, "run", measure)
    monkeypatch.setattr(benchmark.scale, "MOST_TRAINED", 50)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scale -->\nold\n<!-- scale end -->\nafter\n")
    options = ("scale", "--out", tmp_path / "new", "--page", page, "--cases")
    benchmark.run(*options, "20,40")
    benchmark.run(*options, "20,60", "--without", "check")
    commands = {size: [what for cases, what in ran if cases == size] for size in (20, 40, 60)}
    assert (
        commands[20]
        == commands[40]
        == [
            *("check", "train", "train again", "label", "evaluate", "compare", "review", "report"),
            *("sync", "sync again"),
        ]
    )
    assert commands[60] == ["train", "enlarge", "review", "report", "sync", "sync again"]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    assert table["`train`"][:5] == ["2.0", "3.0", "", "50.00", ""]
    assert table["train: cache"][3] == "20.00"
    assert "train: splits" not in table
    assert table["`check`"][:5] == ["2.0", "3.0", "", "50.00", ""]
    assert table["cache"] == ["0 (0)", "0 (0)", ""]
    assert table["report.html"] == ["3 (1)"] * 3


def test_made_up_scans_are_a_data_set_and_no_two_are_alike(benchmark, tmp_path):
    benchmark.scale.write_scans(tmp_path, 200)
    dataset = read_dataset(tmp_path)
    settings = load_config(
        tmp_path, [*benchmark.scale.SETTINGS, *benchmark.scale.choose_parts(200)]
    )
    splits = split_cases(dataset, settings.config.data, 0)
    result = check_dataset(dataset, splits)
    assert [len(part) for part in splits.to_json().values()] == [10, 180, 0, 10]
    assert not result.problems
    assert not [text for text in result.warnings if "voxel by voxel" in text]
    assert result.labels == {0: "background", 1: "class_1"}
