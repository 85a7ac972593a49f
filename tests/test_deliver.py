"""Which round is delivered, and what becomes of the masks of unlabeled scans."""

from types import SimpleNamespace

import pytest

from medssl.rounds import deliver
from medssl.runs import write_json


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of three rounds and three unlabeled scans, of which nothing is there but done.json."""
    for name in ("_copy_model", "_summarize", "set_status"):
        monkeypatch.setattr(deliver, name, lambda *_: None)
    monkeypatch.setattr(deliver, "load_model", lambda *_: None)
    cases = [SimpleNamespace(case_id=f"u{i}", mask_suffix=".nii.gz") for i in range(3)]
    return SimpleNamespace(
        folder=tmp_path,
        find_round_folder=lambda index: tmp_path / f"round_{index}",
        plan=SimpleNamespace(device="cpu"),
        num_rounds=2,
        unlabeled=cases,
        stop=SimpleNamespace(is_set=lambda: False, reason=None),
    )


def write_round(run, index, rows, **final):
    gate = {"passed": True, "reasons": ["empty"]}
    mark = {"hash": "", "round": index, "steps": 1, "seconds": 1.0}
    done = {**mark, "final": final, "validation": rows, "gate": gate}
    write_json(run.find_round_folder(index) / "done.json", done)


def make_row(organ, lesion):
    known = [value for value in (organ, lesion) if value is not None]
    dice = sum(known) / len(known) if known else None
    return {"case_id": "v", "dice/organ": organ, "dice/lesion": lesion, "dice": dice}


def test_a_round_that_rightly_leaves_a_class_out_is_better_than_one_with_false_alarms(run):
    write_round(run, 0, [make_row(0.90, 0.0)], **{"val/dice": 0.45})
    write_round(run, 1, [make_row(0.44, None)], **{"val/dice": 0.44})
    assert deliver.deliver_model(run, [0, 1], 0, False).delivered == "round_1"


def test_rounds_of_version_0_1_0_are_compared_by_their_means(run):
    write_round(run, 0, [], **{"val/dice": 0.5})
    write_round(run, 1, [], **{"val/dice": 0.4})
    assert deliver.deliver_model(run, [0, 1], 0, False).delivered == "round_0"


def test_an_unlabeled_scan_that_fails_is_named_and_the_others_get_their_masks(run, monkeypatch):
    write_round(run, 0, [])
    written = []

    def segment(run, model, case, path):
        if case.case_id == "u1":
            raise ValueError("holes")
        written.append(path.name)

    monkeypatch.setattr(deliver, "_segment", segment)
    outcome = deliver.deliver_model(run, [0], 0, True)
    assert written == ["u0.nii.gz", "u2.nii.gz"]
    assert (outcome.status, outcome.unsegmented) == ("delivered", ("u1",))
    assert "1 of 3 unlabeled scans got no mask" in outcome.message
    assert "u1: ValueError: holes" in outcome.message


def test_masks_that_were_asked_for_and_are_not_written_are_not_passed_over(run):
    write_round(run, 0, [])
    refused = deliver.deliver_model(run, [], 1, True)
    assert "--predict-unlabeled has written no masks" in refused.message
    assert "--predict-unlabeled" not in deliver.deliver_model(run, [], 1, False).message
    run.unlabeled = []
    assert "there is no unlabeled scan" in deliver.deliver_model(run, [0], 0, True).message
