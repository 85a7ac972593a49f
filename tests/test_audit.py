"""What `scripts/audit_gain.py` measures of models on unlabeled scans, and its table."""

import json

import numpy as np
import pytest
from bright import make_model, write_case

from medssl.config import InputError
from medssl.data.cases import Case
from medssl.runs import write_json


@pytest.fixture
def audit(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "scripts")
    import audit_gain

    return audit_gain


def log(round_index, step, **thresholds):
    metrics = {f"monitors/threshold/{name}": value for name, value in thresholds.items()}
    metrics |= {"losses/total": 1.0}
    return json.dumps({"round": round_index, "step": step, "time": 0.0, "metrics": metrics}) + "\n"


@pytest.fixture
def run(tmp_path):
    """A run of round 0 and one student of 9 steps, and a round that is not done."""
    folder = tmp_path / "draw_0_recipe"
    for index, parts in ((0, (1, 2)), (1, (2,)), (2, (1,))):
        for place in ("model", *(f"snapshots/{part}" for part in parts)):
            write_json(folder / f"round_{index}" / place / "model.json", {})
        gate = {"passed": True, "reasons": []}
        mark = {"hash": "", "round": index, "steps": 9, "seconds": 1.0, "gate": gate, "final": {}}
        if index < 2:
            write_json(folder / f"round_{index}" / "done.json", mark)
    lines = [log(0, 9), log(1, 4, organ=0.6), log(1, 6, organ=0.7, lesion=0.9)]
    lines.append(log(1, 9, organ=0.8))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_states_are_those_of_done_rounds_with_the_thresholds_of_their_step(audit, run):
    states = audit.list_states(run)
    assert [(s.round, s.step, s.folder.relative_to(run).as_posix()) for s in states] == [
        (0, 3, "round_0/snapshots/1"),
        (0, 6, "round_0/snapshots/2"),
        (0, 9, "round_0"),
        (1, 6, "round_1/snapshots/2"),
        (1, 9, "round_1"),
    ]
    assert states[2].thresholds == {}
    assert states[3].thresholds == {"organ": 0.7, "lesion": 0.9}
    assert states[4].thresholds == {"organ": 0.8, "lesion": 0.9}
    for folder in (run / "round_0", run / "round_1"):
        (folder / "done.json").unlink()
    with pytest.raises(InputError, match="none of its rounds is done"):
        audit.list_states(run)


def test_accepted_voxels_are_those_that_reach_the_threshold_of_their_class(audit):
    reference = np.array([1, 1, 1, 2, 2, 2, 0, 255], np.uint8).reshape(8, 1, 1)
    classes = np.array([1, 1, 2, 2, 2, 1, 0, 1])
    confidence = np.array([0.9, 0.6, 0.9, 0.8, 0.95, 0.7, 0.99, 0.99], np.float32)
    probs = np.full((3, 8, 1, 1), 0.0, np.float32)
    for voxel, (c, p) in enumerate(zip(classes, confidence, strict=True)):
        probs[:, voxel, 0, 0] = (1 - p) / 2
        probs[c, voxel, 0, 0] = p
    measured = audit.measure_acceptance(probs, reference, np.array([0.5, 0.7, 0.9]), None)
    # accepted: 0, 2, 4, 5, 6 of the seven that are known; surfaces lie at 1, 2, 4, 5 and 6
    assert measured == {
        "coverage": pytest.approx(5 / 7),
        "coverage_surface": pytest.approx(4 / 5),
        "accepted": pytest.approx(3 / 5),
        "confidence": pytest.approx(np.mean([0.9, 0.9, 0.95, 0.7, 0.99])),
        "refused": pytest.approx(2 / 2),
    }
    nothing = audit.measure_acceptance(probs, reference, np.array([0.5, np.nan, 0.9]), None)
    assert set(nothing.values()) == {None}
    nothing = audit.measure_acceptance(probs, 0 * reference, np.array([0.5, 0.7, 0.9]), None)
    assert set(nothing.values()) == {None}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surfaces_of_a_plane_network_lie_within_its_slices(audit, axis):
    reference = np.ones((6, 6, 6), np.uint8)
    classes = np.moveaxis(np.arange(6) % 2 * np.ones((6, 6, 6)), 2, axis)  # each slice is one class
    probs = np.stack([0.9 - 0.8 * classes, 0.1 + 0.8 * classes]).astype(np.float32)
    for slice_axis in (0, 1, 2, None):
        share = audit.measure_acceptance(probs, reference, np.zeros(2), slice_axis)
        assert (share["coverage_surface"] is None) == (slice_axis == axis)


def test_a_case_is_measured_as_evaluate_does(audit, tiny_plan, tmp_path):
    case, model = write_case(tmp_path), make_model(tiny_plan)
    row = audit.measure_case(model, case, None, dict.fromkeys(model.info.labels.values(), 0.0))
    assert row["coverage"] == row["coverage_surface"] == "1.0000"
    assert row["refused"] == ""
    assert 0 < float(row["accepted"]) < 1
    assert float(row["dice"]) > 0.1
    assert {"volume_ml/organ", "reference_ml/lesion", "hd95_mm/organ"} <= row.keys()
    assert "surface_dice/organ" not in row
    without = audit.measure_case(model, case, None, {})
    assert without["coverage"] == ""
    assert without["ece"] == row["ece"]


def test_what_stands_in_the_csv_is_not_measured_again(audit, run, tmp_path, monkeypatch):
    calls = []

    def measure(model, case, ignore, thresholds):
        calls.append((model, case.case_id, dict(thresholds)))
        return {"case_id": case.case_id, "patient_id": "p", "dice": "0.5"}

    cases = [Case(f"c{n}", (), None, f"p{n}") for n in range(3)]
    monkeypatch.setattr(audit, "measure_case", measure)
    monkeypatch.setattr(audit, "load_model", lambda folder: folder.name)
    monkeypatch.setattr(audit, "open_unlabeled_cases", lambda run, n: (None, cases[:n]))
    path = tmp_path / "a.csv"
    audit.run_arm(tmp_path, path, 0, "recipe", 2)
    assert len(calls) == 5 * 2
    assert calls[-1] == ("round_1", "c1", {"organ": 0.8, "lesion": 0.9})
    audit.run_arm(tmp_path, path, 0, "recipe", None)
    assert [call[1] for call in calls[10:]] == ["c2"] * 5
    assert len(audit.read_rows(path)) == 15
    with pytest.raises(InputError, match="no such run"):
        audit.run_arm(tmp_path, path, 0, "labels", None)


def test_what_another_process_measured_meanwhile_stands_once(audit, run, tmp_path, monkeypatch):
    path = tmp_path / "a.csv"

    def measure(model, case, ignore, thresholds):
        row = {"case_id": case.case_id, "patient_id": "p", "dice": "0.5"}
        if not path.is_file():
            first = {"draw": "0", "arm": "recipe", "round": "0", "step": "3"}
            audit.write_csv(path, [{**first, **row}])
        return row

    monkeypatch.setattr(audit, "measure_case", measure)
    monkeypatch.setattr(audit, "load_model", lambda folder: None)
    monkeypatch.setattr(
        audit, "open_unlabeled_cases", lambda *_: (None, [Case("c", (), None, "p")])
    )
    audit.run_arm(tmp_path, path, 0, "recipe", None)
    rows = [(row["round"], row["step"]) for row in audit.read_rows(path)]
    assert rows == [("0", "3"), ("0", "6"), ("0", "9"), ("1", "6"), ("1", "9")]


def test_the_table_has_means_by_state_and_volumes_as_a_whole(audit, tmp_path):
    columns = ["dice/organ", "dice", "hd95_mm/organ", "volume_ml/organ", "reference_ml/organ"]
    head = ",".join(["draw,arm,round,step,case_id,patient_id", *columns, *audit.SHARES])
    rows = [
        "0,recipe,0,9,a,p,0.5,0.5,4,10,20,,,,,,0.2",
        "1,recipe,0,9,a,p,,,,0,0,,,,,,",
        "0,recipe,1,10,a,p,0.7,0.7,2,30,20,0.9,0.5,0.8,0.9,0.4,0.1",
        "0,recipe,1,9,a,p,0.6,0.6,2,20,20,0.8,0.4,0.8,0.9,,0.1",
    ]
    (tmp_path / "a.csv").write_text("\n".join([head, *rows]) + "\n")
    lines = audit.tabulate(tmp_path / "a.csv").splitlines()
    assert lines[2:] == [
        "| recipe | 0 | 9 | 0, 1 | 2 | 0.500 | 0.500 | 0.50 | 4.000 |  |  |  |  |  | 0.200 |",
        "| recipe | 1 | 9 | 0 | 1 | 0.600 | 0.600 | 1.00 | 2.000 "
        "| 0.800 | 0.400 | 0.800 | 0.900 |  | 0.100 |",
        "| recipe | 1 | 10 | 0 | 1 | 0.700 | 0.700 | 1.50 | 2.000 "
        "| 0.900 | 0.500 | 0.800 | 0.900 | 0.400 | 0.100 |",
    ]
