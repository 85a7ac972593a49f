import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.config import hide_password
from medssl.names import PATH, Names, choose_names
from medssl.report.page import _describe_origin
from medssl.run_folder import RunFolder, read_folder, read_folder_with_tables
from medssl.runs import describe_provenance, write_json
from medssl.tracking.note import write_note
from medssl.tracking.send import _clean_config

IDS = {"p07": "case_0", "012": "case_1", "4": "case_2", "anna_schmidt_001": "case_3"}
SECRETS = ("anna", "schmidt", "bert", "ward7", "hospital", "swordfish", "p07", "t1")
TEXTS = [
    ("p07", "case_0"),
    ("p07 and p070, p07_b and xp07", "case_0 and p070, case_0_b and xp07"),
    ("012 has Dice 0.012", "case_1 has Dice 0.012"),
    ("4 labeled cases of 12", "4 labeled cases of 12"),
    ("4", "case_2"),
    ("0.9 Dice/case, losses/total, 3 / 4, +/-0.02", "0.9 Dice/case, losses/total, 3 / 4, +/-0.02"),
    ("p07_0000.nii.gz is empty", f"{PATH} is empty"),
    ("see ../scans/bert.NII.GZ, (~/ward7/bert) and bert.pt", f"see {PATH} ({PATH} and {PATH}"),
    ("see /data/p07/t1.nii.gz and losses/total", f"see {PATH} and losses/total"),
    ("root:/hospital/bert", f"root:{PATH}"),
    ("of `C:\\scans\\bert`", f"of `{PATH}"),
    ("/srv/ward7/anna schmidt/t1.nii: no scan", f"{PATH}: no scan"),
    ("in /srv/my scans/anna schmidt/t1.nii.gz", f"in {PATH} {PATH}"),
    ("the 10 scans of scans/bert", f"the 10 scans of {PATH}"),
    ("http://anna:swordfish@host:5000/a/b", "http://host:5000/a/b"),
    ("at sqlite:////srv/ward7/x or file:///srv/ward7", f"at sqlite:{PATH} or file:{PATH}"),
    ("anna_schmidt_001: lost liver", "case_3: lost liver"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that has every text, and a case of which pseudonyms.json does not know."""
    path = tmp_path / "run"
    path.mkdir()
    config = {"data": {"root": "scans"}, "network": {"weights": "ward7/bert", "name": "unet"}}
    config["notes"] = [text for text, _ in TEXTS]
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(path / "pseudonyms.json", IDS)
    about = {"name": "set", "root": "/srv/my scans"}
    write_json(path / "splits.json", {"labeled": ["p07"], "test": ["bert-2"], "dataset": about})
    write_json(path / "plan.json", {"reasons": [text for text, _ in TEXTS]})
    return path


def test_no_pattern_grows_with_the_number_of_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    build = re.compile
    monkeypatch.setattr(
        "medssl.names.re.compile",
        lambda text, *flags: sizes.append(len(text)) or build(text, *flags),
    )
    many = Names({f"scan {number}": f"case_{number:08x}" for number in range(5000)})
    text = "scan 17 and scan 4999, scan 170000; xscan 3, scan 3a"
    expected = "case_00000011 and case_00001387, scan 170000; xscan 3, scan 3a"
    assert many.clean_text(text) == expected
    assert many.find_names(text) == ["scan 17", "scan 4999"]
    assert sum(sizes) < 1000


def test_of_ids_that_begin_alike_the_longest_is_taken() -> None:
    names = Names({"a-1": "case_0", "a": "case_1", "a-1 b": "case_2", "": "case_3"})
    assert names.clean_text("a-1 b, a-1 c, a-12, (a)") == "case_2, case_0 c, case_1-12, (case_1)"


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_ids_paths_and_passwords_are_taken_out_of_a_text(
    run: Path, text: str, expected: str
) -> None:
    assert choose_names(read_folder(run)).clean_text(text) == expected


def test_mlflow_and_a_shared_report_hide_the_same_in_the_same_texts(run: Path) -> None:
    folder: RunFolder = read_folder(run)
    note = write_note(folder, choose_names(folder))
    said = re.findall(r"^- (.*)$", note, re.MULTILINE)
    page = _describe_origin(
        read_folder_with_tables(run), choose_names(read_folder_with_tables(run))
    )
    assert said == page["reasons"] == [expected for _, expected in TEXTS]
    target: Any = type("Target", (), {"folder": folder, "names": choose_names(folder)})
    sent, shown = _clean_config(target), yaml.safe_load(page["config"])
    assert sent["notes"] == shown["notes"]
    assert sent["network"] == shown["network"] == {"weights": PATH, "name": "unet"}
    assert "root" not in shown["data"]
    for secret in SECRETS:
        everything = json.dumps([said, sent, shown]).replace("p070", "").replace("xp07", "")
        assert secret not in everything


def test_a_case_without_a_pseudonym_leaves_under_a_number_both_ways(run: Path) -> None:
    for folder in (read_folder(run), read_folder_with_tables(run)):
        names = choose_names(folder)
        assert names.clean_text("bert-2 is empty") == "case_001 is empty"
        assert names.name_case("bert-2") == "case_001"
        assert names.clean_tree({"bert-2": ["a bert-2", 3]}) == {"case_001": ["a case_001", 3]}


def test_names_that_stay_at_home_are_shown_as_they_are() -> None:
    names = Names(IDS, ("/srv/my scans",), shared=False)
    for text, _ in TEXTS:
        assert names.clean_text(text) == text
    assert names.clean_tree({"p07": "a/b"}) == {"p07": "a/b"}
    assert names.name_case("p07") == "p07"


def test_numbers_of_a_file_that_is_full_of_them_are_no_case_ids() -> None:
    names = Names(IDS, numbers=False)
    assert (names.clean_text("4"), names.clean_text("012 voxels")) == ("4", "012 voxels")
    assert names.find_names("012 and p07") == ["p07"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/set", "s3://bucket/set"),
        ("https://anna:secret@host:80/set", "https://host:80/set"),
        ("s3://AKIA1:se/cr@et@bucket/set", "s3://bucket/set"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        (
            "https://host/a?x=1&X-Amz-Signature=abc&y=2",
            "https://host/a?x=1&X-Amz-Signature=[hidden]&y=2",
        ),
        ("train az://c/a?sv=1&sig=ab%2F rounds=2", "train az://c/a?sv=1&sig=[hidden] rounds=2"),
    ],
)
def test_user_names_passwords_and_signatures_are_hidden(url, expected):
    assert hide_password(url) == expected


def test_the_command_that_a_run_keeps_has_no_password(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["medssl", "train", "https://anna:secret@host/set", "test=2"])
    assert describe_provenance("cpu", 1)["command"] == "medssl train https://host/set test=2"
