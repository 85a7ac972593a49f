"""The report: what it says, shows and hides, on run folders of which any part may be missing."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image
from typer.testing import CliRunner

from medssl.cli import app
from medssl.config import InputError
from medssl.data.io import write_map, write_mask
from medssl.metrics import paired_difference
from medssl.names import Names, choose_names
from medssl.overlays import CLASS_COLORS, render_overlay
from medssl.report import figures, scans, write_report
from medssl.report.figures import _spread, pair_dice, plot_pairs
from medssl.report.page import _describe_origin
from medssl.report.sentences import (
    EVIDENCE,
    count_steps,
    explain_row,
    write_verdict,
)
from medssl.run_folder import read_folder, read_folder_with_tables
from medssl.runs import Journal, hash_record
from medssl.tracking.note import write_note

VALUES = (0, 1, 4)
CLASSES = {0: "background", 1: "organ", 2: "lesion"}
FLIPPED = np.array([[-1.0, 0, 0, 20], [0, 1.5, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1]])
ODD_ID = 'Müller<b>&"$x_1$'


def draw_case(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return a scan (I, J, K) and its classes: an ellipsoid with a small one inside."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    center = rng.uniform(-0.15, 0.15, (3, 1, 1, 1))
    outer = ((grid - center) ** 2 / np.array([0.5, 0.35, 0.4]).reshape(3, 1, 1, 1)).sum(0) < 0.5
    inner = ((grid - center - 0.15) ** 2).sum(0) < 0.06
    classes = outer.astype(np.uint8)
    classes[inner] = 2
    image = 100 + 60 * outer + 50 * inner + rng.normal(0, 12, shape)
    return image.astype(np.float32), classes


def spoil(classes: Any, rng: np.random.Generator, voxels: int) -> Any:
    """Return classes shifted by some voxels: a prediction."""
    return np.roll(classes, tuple(rng.integers(-voxels, voxels + 1, 3)), axis=(0, 1, 2))


def write_run(
    folder: Path,
    *,
    num_labeled: int = 4,
    num_unlabeled: int = 6,
    num_test: int = 9,
    num_rounds: int = 3,
    steps: int = 400,
    shape: tuple[int, int, int] = (24, 28, 20),
    gain: float = 0.03,
    evaluated: bool = True,
    seed: int = 0,
) -> Path:
    """Write a data set and a run folder as `medssl train` and `medssl evaluate` leave them."""
    rng = np.random.default_rng(seed)
    data, run = folder / "data", folder / "runs" / "phantoms"
    parts = {"labeled": num_labeled, "unlabeled": num_unlabeled, "test": num_test, "val": 0}
    splits: dict[str, Any] = {
        part: [f"{part}_{index:02d}" for index in range(number)] for part, number in parts.items()
    }
    splits["unlabeled"][0] = ODD_ID
    drawn = write_data(data, splits, rng, shape)
    about = {"name": "phantoms", "root": str(data), "num_cases": len(drawn)}
    dump(run / "splits.json", {**splits, "dataset": about})
    names = {c: f"case_{hashlib.sha256(c.encode()).hexdigest()[:8]}" for c in drawn}
    dump(run / "pseudonyms.json", names)
    write_settings(run, data, steps)
    lines, done = [], []
    for index in range(num_rounds):
        lines += [journal_line(rng, index, step, steps) for step in range(50, steps + 1, 50)]
        done.append(write_round(run, index, steps, splits["unlabeled"], drawn, rng))
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"round": 2, "st', encoding="utf-8")
    delivered = f"round_{num_rounds - 1}"
    summary = {
        "delivered": delivered,
        "exit": f"delivered round {num_rounds - 1}, the last that passed its gate",
        "rounds": done,
        "total_steps": num_rounds * steps,
        "baseline": {"round": 0, "steps": steps},
        "labeled_cases": num_labeled,
        "unlabeled_cases": num_unlabeled,
    }
    dump(run / "summary.json", summary)
    dump(run / "model" / "model.json", {"label_values": list(VALUES)})
    dump(run / "state.json", {"status": "delivered", "round": num_rounds - 1, "step": steps})
    if evaluated:
        write_evaluation(run, splits["test"], drawn, num_rounds, gain, rng)
    return run


def write_data(
    data: Path, splits: dict[str, Any], rng: np.random.Generator, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Write a list of cases with their files; return the classes of each case."""
    drawn: dict[str, Any] = {}
    rows = []
    for part, cases in splits.items():
        for number, case_id in enumerate(cases):
            image, drawn[case_id] = draw_case(rng, shape)
            stem = f"{part}{number}"
            write_map(data / "images" / f"{stem}.nii.gz", image, FLIPPED)
            label = ""
            if part != "unlabeled":
                label = f"labels/{stem}.nii.gz"
                write_mask(data / label, drawn[case_id], FLIPPED, VALUES)
            rows.append([case_id, f"images/{stem}.nii.gz", label, case_id, part])
    with (data / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "image", "label", "patient_id", "split"])
        writer.writerows(rows)
    return drawn


def write_settings(run: Path, data: Path, steps: int) -> None:
    """Write config.yaml, plan.json and provenance.json."""
    config = {"data": {"root": str(data), "format": "auto", "labels": None, "ignore": None}}
    config |= {"train": {"rounds": 2, "steps": steps}, "tracking": {"uri": "sqlite:////srv/db"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plan = {
        "labels": {str(index): name for index, name in CLASSES.items()},
        "label_values": list(VALUES),
        "ignore": None,
        "reasons": ["spacing 1 x 1.5 x 2 mm: the median of 10 scans", "device cpu: no GPU"],
    }
    dump(run / "plan.json", plan)
    provenance = {
        "command": f"medssl train {data} labeled=4 --run {run}",
        "started": "2026-01-05T10:00:00+00:00",
        "versions": {"medssl": "0.1.0", "torch": "2.9"},
        "python": "3.11.7",
        "device": "cpu",
        "threads": 2,
    }
    dump(run / "provenance.json", provenance)


def journal_line(rng: np.random.Generator, index: int, step: int, steps: int) -> str:
    """Return a line of metrics.jsonl."""
    t = step / steps
    metrics = {
        "losses/supervised": 1.4 * np.exp(-3 * t) + 0.25 + rng.normal(0, 0.05),
        "monitors/lr": 1e-3 * (1 - t) ** 0.9,
    }
    if index:
        metrics["losses/pseudo_label"] = 0.5 * np.exp(-2 * t) + 0.1 + rng.normal(0, 0.03)
        metrics["losses/entropy"] = 0.01 * (1 - 0.5 * t)
        metrics["losses/consistency"] = 0.02 * np.exp(-t)
        for class_index, name in CLASSES.items():
            metrics[f"monitors/coverage/{name}"] = 0.97 - 0.14 * class_index * (1 - t)
            metrics[f"monitors/threshold/{name}"] = 0.95 - 0.06 * class_index
    metrics["losses/total"] = sum(v for k, v in metrics.items() if k.startswith("losses/"))
    entry = {"round": index, "step": step, "time": 1.7e9 + step, "metrics": metrics}
    return json.dumps(entry)


def write_round(
    run: Path, index: int, steps: int, cases: list[str], drawn: dict[str, Any], rng: Any
) -> dict[str, Any]:
    """Write the folder of a round; return its done.json."""
    folder = run / f"round_{index}"
    rows = []
    for case_id in cases:
        classes = spoil(drawn[case_id], rng, 1)
        classes[(np.roll(classes, 1, 1) != classes) & (classes < 2)] = 255
        mask = folder / "pseudo_masks" / f"{case_id}.nii.gz"
        write_mask(mask, classes, FLIPPED, VALUES)
        uncertainty = float(rng.uniform(0.1, 0.5))
        rows.append(
            {
                "case_id": case_id,
                "accepted": int(uncertainty < 0.45),
                "reason": "" if uncertainty < 0.45 else f"lost lesion in {case_id}",
                "confidence": f"{1 - uncertainty / 2:.4f}",
                "uncertainty": f"{uncertainty:.4f}",
                "agreement": f"{rng.uniform(0.7, 0.98):.4f}" if index else "",
                "coverage": f"{rng.uniform(0.9, 0.99):.4f}",
                "coverage/organ": f"{rng.uniform(0.8, 0.97):.4f}",
                "coverage/lesion": f"{rng.uniform(0.4, 0.9):.4f}",
            }
        )
    with (folder / "review.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = {
        "round": index,
        "steps": steps,
        "seconds": 71.5 + 30 * index,
        "gate": {"passed": True, "reasons": []},
        "num_labeled": 4,
        "num_unlabeled": len(cases) if index else 0,
        "final": {"monitors/agreement": 0.9 + 0.02 * index} if index else {},
    }
    dump(folder / "done.json", done)
    return done


def write_evaluation(
    run: Path, cases: list[str], drawn: dict[str, Any], num_rounds: int, gain: float, rng: Any
) -> None:
    """Write tables with plausible numbers and the masks of the delivered model."""
    base = {case_id: float(rng.uniform(0.68, 0.85)) for case_id in cases}
    tables = []
    for index in range(num_rounds):
        rise = gain * index / max(1, num_rounds - 1)
        noise = rng.normal(0, 0.01, len(base))
        changes = rise + noise - noise.mean() if index else 0 * noise
        table = {c: v + float(d) for (c, v), d in zip(base.items(), changes, strict=True)}
        write_table(run / "evaluation" / f"round_{index}" / "per_case.csv", table)
        tables.append(table)
    write_table(run / "evaluation" / "per_case.csv", tables[-1])
    for case_id in cases:
        path = run / "evaluation" / "predictions" / f"{case_id}.nii.gz"
        write_mask(path, spoil(drawn[case_id], rng, 2), FLIPPED, VALUES)
    paired = paired_difference(list(tables[-1].values()), list(base.values()))
    estimate = {"mean": 0.8, "low": 0.77, "high": 0.83, "n": len(cases), "num_dropped": 0}
    entry = {"dice": estimate, "hd95_mm": {"mean": 3.214}, "surface_dice": {"mean": 0.91}}
    entry |= {"num_present": len(cases), "num_missed": 0, "num_false_alarms": 47}
    low = paired["low"]
    enough = len(cases) >= 8 and low is not None
    verdict = ("gain" if low > 0 else "no gain") if enough else "no verdict"
    summary = {
        "delivered": f"round_{num_rounds - 1}",
        "rounds": {f"round_{r}": float(np.mean(list(t.values()))) for r, t in enumerate(tables)},
        "paired": paired if num_rounds > 1 else None,
        "verdict": verdict,
        "classes": {"organ": entry, "lesion": entry},
        "notes": ["A missed structure counts as dice 0."],
    }
    dump(run / "evaluation" / "summary.json", summary)


def write_table(path: Path, dice: dict[str, float]) -> None:
    """Write a per_case.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{c},{v:.6g},{v:.6g},{v:.6g}" for c, v in dice.items()]
    path.write_text("\n".join(["case_id,dice/organ,dice/lesion,dice", *lines]) + "\n")


def dump(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """What a page holds: its text, its addresses, and tags that were never closed."""

    VOID = frozenset({"meta", "img", "br", "line", "circle"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def num_images(self) -> int:
        return sum(link.startswith("data:image/png;base64,") for link in self.links)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may damage; its data stays in place."""
    return Path(shutil.copytree(finished, tmp_path / "phantoms"))


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures and draw none of them: for tests that read the page and do not look at it."""
    monkeypatch.setattr(scans, "render_overlay", lambda *args, **kwargs: b"picture")
    monkeypatch.setattr(figures, "_save", lambda figure: b"figure")


def report(run_dir: Path, share: bool = False) -> Page:
    return Page(write_report(run_dir)[share])


def test_the_page_is_self_contained_and_small(run: Path) -> None:
    path = write_report(run)[0]
    page = Page(path)
    assert path == run / "report.html"
    assert path.stat().st_size < 5_000_000
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "<script" not in page.html
    assert "@import" not in page.html
    assert "url(" not in page.html
    assert not page.open
    assert page.num_images == 11  # dots, curves, 2 x coverage, best/median/worst, 4 to annotate


@pytest.mark.usefixtures("unseen")
def test_without_a_filter_no_flat_coverage_is_drawn(run: Path) -> None:
    assert "every voxel enters the loss" not in report(run).text
    lines = Journal(run / "metrics.jsonl").read()
    for line in lines:
        line["metrics"] |= {k: 1.0 for k in line["metrics"] if "monitors/coverage/" in k}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run)
    assert "every voxel enters the loss" in page.text
    assert "Agreement of each unlabeled scan" in page.text
    assert page.num_images == 10


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("student", "said"), [("ce", True), ("dice_ce", False), ("auto", False), (None, False)]
)
def test_losses_of_different_kinds_are_not_left_to_be_compared(
    run: Path, student: str | None, said: bool
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    section = {"name": "dice_ce"} | ({"student": student} if student else {})
    config["losses"] = {"supervised": section}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert ("among students only" in report(run).text) == said


@pytest.mark.usefixtures("unseen")
def test_a_record_that_cannot_be_read_does_not_stop_the_page(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("medssl.run_folder.find_edited", refuse)
    assert "Not what this run was begun with" not in report(run).text


@pytest.mark.usefixtures("unseen")
def test_splits_and_plan_that_were_changed_are_named(run: Path) -> None:
    words = "Not what this run was begun with"
    dump(run / "run.json", {"hash": "", **hash_record(run)})
    assert words not in report(run).text
    splits = json.loads((run / "splits.json").read_text())
    dump(run / "splits.json", {**splits, "test": splits["test"][1:]})
    assert re.search(rf"{words}[^<]*: splits\.json\.", report(run).text)
    (run / "plan.json").write_text((run / "plan.json").read_text() + "\n")
    assert re.search(rf"{words}[^<]*: plan\.json, splits\.json\.", report(run).text)


@pytest.mark.usefixtures("unseen")
def test_directions_of_the_body_are_named_for_scans_and_not_for_pictures(run: Path) -> None:
    assert "the patient's right" in report(run).text
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "has_spacing": False}))
    assert "the patient's right" not in report(run).text


@pytest.mark.usefixtures("unseen")
def test_headline_and_verdict_say_what_was_measured_on_what(run: Path) -> None:
    text = report(run).text
    assert "trained on 4 labeled and 6 unlabeled scans of the set phantoms" in text
    assert "organ and lesion" in text
    assert "1,200 steps" in text
    assert "95 % interval +0.0" in text
    assert "on 9 test cases that it was not trained on" in text
    assert "labels only (400 steps)" in text
    assert "rounds=0 steps=1200" in text
    plan = json.loads((run / "plan.json").read_text()) | {"batch": 2, "num_unlabeled": 3}
    (run / "plan.json").write_text(json.dumps(plan))  # a student's step has 2 + 3 patches
    assert f"rounds=0 steps={400 + round(2.5 * 800)}" in report(run).text
    assert "Validation labels count as labels" in text
    assert "Each scan counts as a patient" in text
    assert "A missed structure counts as dice 0." in text
    assert "missed false alarms organ" in " ".join(text.split())
    assert " 9 0 47 " in " ".join(text.split())


@pytest.mark.parametrize(
    ("gain", "kind", "word"),
    [(0.05, "gain", "Gain"), (0.0, "no gain", "No gain"), (-0.05, "loss", "No gain: worse")],
)
def test_the_verdict_follows_the_interval(
    tmp_path: Path, gain: float, kind: str, word: str
) -> None:
    run = read_folder_with_tables(write_run(tmp_path, gain=gain, num_unlabeled=1, shape=(8, 8, 8)))
    verdict = write_verdict(run, "")
    assert verdict.kind == kind
    assert verdict.word.startswith(word)


def test_few_test_cases_give_a_number_but_no_verdict(tmp_path: Path) -> None:
    folder = write_run(tmp_path, num_test=5, gain=0.05, num_unlabeled=1, shape=(8, 8, 8))
    run = read_folder_with_tables(folder)
    verdict = write_verdict(run, "")
    assert verdict.word == "No verdict: too few patients"
    assert "on 5 test cases" in verdict.sentence
    assert "needs such cases of 8 patients" in verdict.sentence


@pytest.mark.usefixtures("unseen")
def test_a_run_without_evaluation_is_not_measured_and_opens_no_label(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "evaluation")
    opened = record_labels(monkeypatch)
    page = report(run)
    assert "Not measured" in page.text
    assert "have not been looked at yet" in page.text
    assert "No test case was evaluated, so these are pseudo-masks" in page.text
    assert not any("labels" in path.parts for path in opened)


@pytest.mark.usefixtures("unseen")
def test_only_labels_of_test_cases_are_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = record_labels(monkeypatch)
    report(run)
    labels = [path.name for path in opened if "labels" in path.parts]
    assert len(labels) == 3
    assert all(name.startswith("test") for name in labels)


def record_labels(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record every file that is read as a label or mask."""
    opened: list[Path] = []
    read = scans.read_label

    def recording(path: Path, *args: Any) -> Any:
        opened.append(path)
        return read(path, *args)

    monkeypatch.setattr(scans, "read_label", recording)
    return opened


def remove(*names: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    change.__name__ = f"remove {' '.join(names)}"
    return change


def damage(name: str, content: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_text(content, encoding="utf-8")

    change.__name__ = f"damage {name}"
    return change


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove("plan.json"), "plan.json is missing"),
        (remove("provenance.json"), "the command is not known"),
        (remove("config.yaml"), "config.yaml is missing"),
        (remove("splits.json"), "an unknown set of scans"),
        (remove("splits.json", "evaluation"), "which cases the model has not seen"),
        (remove("metrics.jsonl"), "metrics.jsonl is missing"),
        (remove("summary.json"), "Verdict"),
        (remove("pseudonyms.json"), "Verdict"),
        (remove("state.json"), "Verdict"),
        (remove("evaluation/round_0"), "No case has been measured with both"),
        (remove("evaluation/predictions"), "the run folder holds no predictions of it"),
        (remove("round_2/pseudo_masks"), "the run folder holds no pseudo_masks of it"),
        (remove("round_1", "round_2"), "Annotate next"),
        (
            remove("round_0/review.csv", "round_1/review.csv", "round_2/review.csv"),
            "none is known to be difficult",
        ),
        (damage("plan.json", "{"), "Could not be read and is left out: plan.json"),
        (damage("summary.json", "[1]"), "left out: summary.json"),
        (damage("config.yaml", "a: [1"), "left out: config.yaml"),
        (damage("evaluation/per_case.csv", "x,y\n1,2\n"), "left out: evaluation/per_case.csv"),
        (damage("round_2/review.csv", "x,y\n1,2\n"), "left out: round_2/review.csv"),
        (damage("round_1/done.json", "nonsense"), "left out: round_1/done.json"),
        (damage("evaluation/predictions/test_00.nii.gz", "no scan"), "Verdict"),
        (damage("metrics.jsonl", '3\n{"round": "x"}\n[]\n'), "metrics.jsonl is missing or holds"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_is_missing_is_said(
    run: Path,
    change: Callable[[Path], None],
    expected: str,
) -> None:
    change(run)
    assert expected in report(run).text


@pytest.mark.usefixtures("unseen")
def test_a_run_interrupted_in_round_0_has_a_report(run: Path) -> None:
    for name in ("round_1", "round_2", "evaluation"):
        shutil.rmtree(run / name)
    for name in ("done.json", "review.csv", "pseudo_masks"):
        remove(f"round_0/{name}")(run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]), encoding="utf-8")
    dump(run / "state.json", {"status": "interrupted", "round": 0, "step": 150})
    page = report(run)
    assert "interrupted after step 150 of round 0" in page.text
    assert "Round 0, not finished" in page.text
    assert "so far labels only" in page.text
    assert "has not delivered a model yet" in page.text
    assert "holds no delivered model" in page.text
    assert "No review of pseudo-labels: the run has no student round" in page.text
    assert page.num_images == 1  # the losses so far


@pytest.mark.usefixtures("unseen")
def test_the_reasons_of_the_plan_stand_on_the_page(run: Path) -> None:
    reasons = json.loads((run / "plan.json").read_text())["reasons"]
    text = report(run).text
    assert reasons
    assert all(reason in text for reason in reasons)


@pytest.mark.usefixtures("unseen")
def test_a_rejected_round_gives_its_reasons(run: Path) -> None:
    done = json.loads((run / "round_2" / "done.json").read_text())
    done["gate"] = {"passed": False, "reasons": ["lesion covers <0.01 % & less"]}
    dump(run / "round_2" / "done.json", done)
    dump(run / "state.json", {"status": "stopped_by_gate", "round": 2, "step": 400})
    page = report(run)
    assert "rejected" in page.text
    assert "lesion covers <0.01 % & less" in page.text
    assert "stopped by its gate" in page.text
    assert "From the review of round 1" in page.text


@pytest.mark.usefixtures("unseen")
def test_a_round_0_that_failed_its_gate_is_not_called_good(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_rounds=1, shape=(8, 8, 8))
    done = json.loads((run / "round_0" / "done.json").read_text())
    done["gate"] = {"passed": False, "reasons": ["6 of 6 pseudo-labels were refused"]}
    dump(run / "round_0" / "done.json", done)
    dump(run / "state.json", {"status": "stopped_by_gate", "round": 0, "step": 400})
    text = report(run).text
    assert "kept for want of a better one; look at its masks" in text
    assert "last good" not in text
    note = write_note(read_folder(run), Names(shared=False))
    assert "no better model to keep" in note
    assert "Labels only: a baseline" in note
    assert "is delivered" not in text
    assert "Not measured" in text
    assert "before and after are one" in text
    assert "so far" not in text


@pytest.mark.parametrize(
    ("delivered", "method", "is_recalled"),
    [("round_2", "default", True), ("round_0", "default", False), ("round_2", "uamt", False)],
)
def test_the_study_is_recalled_where_a_student_of_its_recipe_is_delivered(
    tmp_path: Path, delivered: str, method: str, is_recalled: bool
) -> None:
    run = write_run(tmp_path, num_test=0, shape=(8, 8, 8), evaluated=False)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "method": method}))
    summary = json.loads((run / "summary.json").read_text())
    dump(run / "summary.json", {**summary, "delivered": delivered})
    folder = read_folder_with_tables(run)
    verdict = write_verdict(folder, "")
    assert _describe_origin(folder, Names(shared=False))["evaluate"].endswith("--out evaluation")
    assert verdict.word == "Not measured here"
    assert (EVIDENCE in verdict.sentence) is is_recalled
    assert ("learned from labels only" in verdict.sentence) is (delivered == "round_0")


@pytest.mark.usefixtures("unseen")
def test_scans_that_are_gone_are_said_to_be_gone(tmp_path: Path) -> None:
    run = write_run(tmp_path, shape=(8, 8, 8))
    shutil.rmtree(tmp_path / "data")
    page = report(run)
    assert "No picture: the data set is no longer where it was" in page.text
    assert "No pictures: the data set is no longer where it was" in page.text
    assert "cannot be checked any more" in page.text


@pytest.mark.usefixtures("unseen")
def test_case_ids_are_escaped_in_the_plain_report(run: Path) -> None:
    page = report(run)
    assert ODD_ID in page.text
    assert "<b>" not in page.html.replace("<figcaption><b>", "")
    assert "&lt;b&gt;&amp;" in page.html


@pytest.mark.usefixtures("unseen")
def test_a_shared_report_holds_no_name_and_no_path(run: Path, finished: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["reasons"] = [
        f"spacing of {ODD_ID} and test_03, in {finished}/x",
        "see ../scans/smith.nii.gz",
    ]
    dump(run / "plan.json", plan)
    path = write_report(run)[1]
    page = Page(path)
    assert path == run / "report_share.html"
    everything = page.html + page.text
    splits = json.loads((run / "splits.json").read_text())
    for part in ("labeled", "unlabeled", "test"):
        for case_id in splits[part]:
            assert case_id not in everything
    for secret in (
        str(run),
        str(finished),
        str(finished.parents[1]),
        splits["dataset"]["root"],
        "smith",
        "sqlite",
    ):
        assert secret not in everything
    assert re.search(r"case_[0-9a-f]{8}", page.text)
    assert "medssl train DATA labeled=4 --run DATA" in page.text
    assert page.num_images == 11


def test_a_case_without_a_pseudonym_gets_a_number(run: Path) -> None:
    (run / "pseudonyms.json").unlink()
    names = choose_names(read_folder_with_tables(run))
    assert re.fullmatch(r"case_\d{3}", names.name_case("test_00"))
    assert names.name_case("never heard of") == "case ?"


@pytest.mark.usefixtures("unseen")
def test_the_most_uncertain_scan_comes_first(run: Path) -> None:
    rows = read_folder_with_tables(run).rounds[-1].review
    worst = max(rows, key=lambda row: float(row["uncertainty"]))["case_id"]
    listed = report(run).html.partition('id="annotate"')[2]
    places = {row["case_id"]: listed.find(str(escape(row["case_id"]))) for row in rows}
    assert min(places, key=lambda case_id: places[case_id]) == worst


def test_agreement_has_a_panel_per_class_where_the_review_has_a_column_per_class(
    run: Path,
) -> None:
    before = list_panels(run)
    for path in run.glob("round_*/review.csv"):
        lines = path.read_text(encoding="utf-8").splitlines()
        extra = ["agreement/organ,agreement/lesion"] + ["0.9,0.8"] * (len(lines) - 1)
        text = "\n".join(",".join(pair) for pair in zip(lines, extra, strict=True))
        path.write_text(text, encoding="utf-8")
    assert before == ["agreement"]
    assert list_panels(run) == ["agreement/organ", "agreement/lesion"]


def list_panels(run: Path) -> list[str]:
    files = read_folder_with_tables(run)
    return [panel.column for panel in figures._list_panels(files, files.rounds, "agreement")]


def test_steps_without_a_summary_are_the_sum_of_done_rounds(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "round_2" / "done.json").unlink()
    assert count_steps(read_folder_with_tables(run)) == 800


def test_a_step_that_stands_twice_counts_once(run: Path) -> None:
    line = {"round": 0, "step": 50, "time": 1.0, "metrics": {"losses/total": 7.0, "x": None}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(line) + "\n")
    points = read_folder_with_tables(run).rounds[0].curves["losses/total"]
    assert [step for step, _ in points] == list(range(50, 401, 50))
    assert points[0] == (50, 7.0)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("options", [[], ["--share"]])
def test_the_command_renews_the_page_that_mlflow_gets_with_the_other(
    run: Path, options: list[str]
) -> None:
    pages = [run / "report.html", run / "report_share.html"]
    for path in pages:
        path.write_text("of an older version")
    result = CliRunner().invoke(app, ["report", str(run), *options])
    assert result.output.split() == [str(pages[len(options)])]
    assert all("<html" in path.read_text() for path in pages)


@pytest.mark.usefixtures("unseen")
def test_a_report_on_scans_without_a_layout_writes_no_list_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, num_unlabeled=1, num_test=1, num_rounds=1)
    (tmp_path / "data" / "cases.csv").unlink()
    (tmp_path / "data" / "images").rename(tmp_path / "data" / "scans")
    files = sorted((tmp_path / "data").rglob("*"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "no longer where it was" in report(run).text
    assert list((tmp_path / "here").iterdir()) == []
    assert sorted((tmp_path / "data").rglob("*")) == files


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path / "absent")


def test_an_overlay_shows_both_contours_in_their_colors() -> None:
    image, classes = draw_case(np.random.default_rng(0), (30, 34, 26))
    png = render_overlay(image, classes, title="case $1", reference=np.roll(classes, 2, 0))
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for color in CLASS_COLORS[:2]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).sum(-1) < 30).sum() > 100


@pytest.mark.parametrize("fill", [0, 255])
def test_an_overlay_without_a_class_is_a_picture(fill: int) -> None:
    image = np.full((9, 5, 1), np.nan, dtype=np.float32)
    png = render_overlay(image, np.full(image.shape, fill, dtype=np.uint8))
    assert png.startswith(b"\x89PNG")


def test_an_overlay_refuses_arrays_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="one shape"):
        render_overlay(np.zeros((4, 4, 4)), np.zeros((4, 4, 5), dtype=np.uint8))


def test_the_patients_right_is_left_and_the_front_is_on_top() -> None:
    image = np.zeros((40, 40, 40), dtype=np.float32)
    image[30:, 30:, :] = 100  # right, front
    classes = np.zeros(image.shape, dtype=np.uint8)
    classes[1:39, 1:39, 1:39] = 1
    png = render_overlay(image, classes, legend=False)
    with Image.open(io.BytesIO(png)) as picture:
        axial = np.asarray(picture.convert("L")).astype(float)[:, : picture.width // 3]
    rows, columns = axial.shape
    assert axial[: rows // 5, : columns // 5].mean() > 150
    assert axial[-rows // 5 :, : columns // 5].mean() < 60
    assert axial[: rows // 5, -columns // 5 :].mean() < 60


@pytest.mark.parametrize("number", [1, 12, 80])
def test_any_number_of_cases_can_be_paired(number: int) -> None:
    rng = np.random.default_rng(1)
    before = {f"c{i}": float(rng.uniform(0, 1)) for i in range(number)}
    png = plot_pairs(before, {c: v * 0.9 for c, v in before.items()}, lambda c: f"$\\{c} 頭")
    assert png.startswith(b"\x89PNG")


@given(
    st.lists(st.floats(0, 1), max_size=8).map(sorted),
    st.floats(0.001, 0.1),
)
def test_labels_never_touch(wanted: list[float], gap: float) -> None:
    places = _spread(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert not places or places[-1] <= 1 + 1e-9


@pytest.mark.usefixtures("unseen")
def test_a_reason_that_all_scans_have_is_said_once(run: Path) -> None:
    path = run / "round_2" / "review.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"accepted": "0", "reason": "lost lesion", "agreement": "0.9"}
        row |= {key: "0.9" for key in row if key.startswith("coverage/")}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    html = report(run).html
    assert html.count("not used for training (lost lesion)") == 1
    assert "Of all of them: not used for training (lost lesion)." in html


def test_a_class_that_is_not_there_is_not_called_distrusted() -> None:
    row = {"coverage/organ": "0.6", "coverage/lesion": "", "volume_ml/lesion": "0.0"}
    assert explain_row(row, ["organ", "lesion"], Names()) == "only 60% of organ is trusted"
    old = {**row, "coverage/lesion": "0.0000"}  # as version 0.1.0 wrote it
    assert "lesion" not in explain_row(old, ["organ", "lesion"], Names())
    there = {**old, "volume_ml/lesion": "1.5"}
    assert explain_row(there, ["organ", "lesion"], Names()) == "only 0% of lesion is trusted"
    assert explain_row({"coverage/organ": "0.9", "volume_ml/organ": "1"}, ["organ"], Names()) == ""


def test_before_and_after_are_paired_class_by_class() -> None:
    before = [{"case_id": "a", "dice/x": 0.90, "dice/y": 0.0, "dice": 0.45}]
    after = [{"case_id": "a", "dice/x": 0.44, "dice/y": None, "dice": 0.44}]
    more: Any = [{"case_id": "b", "dice/x": None, "dice/y": None, "dice": None}]
    first, second = pair_dice([*before, *more], [*more, *after])
    assert (first, second) == ({"a": 0.45}, {"a": pytest.approx(0.72)})
