"""Comparison of arms: alignment by case, averaging of seeds, verdicts, readable text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from medssl.compare import compare
from medssl.config import InputError
from medssl.data.cases import Dataset
from medssl.data.trained import find_trained_on
from medssl.metrics import format_estimate

BASE = [0.50, 0.60, 0.70, 0.40, 0.55, 0.65, 0.80, 0.75, 0.60, 0.70]


def write_table(
    folder: Path,
    dice: Sequence[float | None],
    first: int = 0,
    classes: Sequence[str] = ("organ", "tumor"),
    reference: float = 2.0,
    patients: Sequence[str] = (),
) -> Path:
    """Write a per_case.csv in which every class of a case has the same dice."""
    metrics = ("dice", "hd95_mm", "reference_ml", "missed")
    ids = ["case_id", *["patient_id"] * bool(patients)]
    lines = [",".join([*ids, *(f"{m}/{c}" for m in metrics for c in classes), "dice"])]
    for index, value in enumerate(dice, first):
        cell = "" if value is None else str(value)
        distance = "" if value is None else "3.5"
        missed = int(value == 0.0)
        cells = [v for v in (cell, distance, str(reference), str(missed)) for _ in classes]
        patient = [*patients[index - first : index - first + 1]]
        lines.append(",".join([f"case{index:02d}", *patient, *cells, cell]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "per_case.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_runs_rounds_and_evaluation_folders_are_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_table(run / "evaluation", [v + 0.1 for v in BASE])
    write_table(run / "evaluation" / "round_0", BASE)
    (run / "round_0").mkdir()
    paths = [run / "round_0", run, run / "evaluation" / "round_0", run / "evaluation/per_case.csv"]
    text, rows = compare(paths)
    means = [row["dice"]["mean"] for row in rows]
    assert means == pytest.approx([0.625, 0.725, 0.625, 0.725])
    assert rows[1]["difference"]["mean"] == pytest.approx(0.1)
    assert rows[1]["verdict"] == "gain"
    assert rows[2]["verdict"] == "no gain"
    assert rows[0]["difference"] is None
    assert "round_0" in text


def test_the_text_shows_differences_and_verdicts_within_100_columns(tmp_path: Path) -> None:
    long = "a_run_with_a_name_that_is_far_too_long_for_any_table"
    write_table(tmp_path / long / "labels_only", BASE)
    write_table(tmp_path / long / "evaluation", [v + 0.1 for v in BASE])
    write_table(tmp_path / "short", [1.0, 0.0, *BASE[2:]])
    text, rows = compare([tmp_path / long / "labels_only", tmp_path / long, tmp_path / "short"])
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "+0.100 [+0.100, +0.100]" in text
    assert format_estimate(rows[0]["dice"]) in text
    assert "3.50" in text
    entry = rows[2]["classes"]["tumor"]
    assert (entry["num_missed"], entry["dice"]["n"]) == (1, 10)
    gain = next(line for line in text.splitlines() if line.endswith(" gain"))
    assert gain.startswith("..")
    assert "no gain" in text


def test_only_common_cases_are_compared_and_the_others_counted(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", [v + 0.2 for v in BASE[4:]] + [0.1, 0.1], first=4)
    text, rows = compare([a, b])
    assert [row["n"] for row in rows] == [6, 6]
    assert rows[1]["difference"]["mean"] == pytest.approx(0.2)
    assert "6 cases, evaluated in all 2 arms; 6 others only in some are left out" in text
    assert rows[1]["verdict"] == "no verdict"
    assert re.search(r"\+0\.200 \[.*\] +no verdict$", text, re.MULTILINE), "no p of six cases"
    assert "a verdict needs 8 patients" in text


def test_the_order_of_cases_in_a_table_does_not_matter(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", [v + 0.1 for v in BASE])
    head, *lines = (b / "per_case.csv").read_text().splitlines()
    (b / "per_case.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    assert compare([a, b])[1][1]["difference"]["low"] == pytest.approx(0.1)


def test_seeds_that_disagree_are_no_gain_however_alike_their_mean_is(tmp_path: Path) -> None:
    base = write_table(tmp_path / "base", BASE)
    up = write_table(tmp_path / "s0", [v + 0.19 for v in BASE])
    down = write_table(tmp_path / "s1", [v - 0.17 for v in BASE])
    text, rows = compare([base, f"student={up},{down}"])
    row = rows[1]
    assert (row["name"], row["num_tables"], row["n"]) == ("student", 2, 10)
    # Averaged within each case first there would be no spread left; the seeds differ by 0.36.
    difference = row["difference"]
    assert (
        difference["mean"] == row["classes"]["organ"]["difference"]["mean"] == pytest.approx(0.01)
    )
    assert difference["low"] == pytest.approx(0.01 - 12.7062 * 0.18)
    assert difference["p"] > 0.9
    assert row["verdict"] == "no verdict"  # the luck of the only first run is in both alike
    copy = write_table(tmp_path / "base_1", BASE)
    assert compare([f"base={base},{copy}", f"student={up},{down}"])[1][1]["verdict"] == "no gain"
    assert "student (x2)" in text
    assert "of several runs Student's t over runs and patients" in " ".join(text.split())


def test_runs_are_held_against_those_of_the_first_arm_one_by_one(tmp_path: Path) -> None:
    shifts = (0.0, 0.1, 0.2)
    before = [write_table(tmp_path / f"a{i}", [v + s for v in BASE]) for i, s in enumerate(shifts)]
    after = [
        write_table(tmp_path / f"b{i}", [v + s + 0.01 + 0.001 * i for v in BASE])
        for i, s in enumerate(shifts)
    ]
    arms = [f"{name}={','.join(map(str, paths))}" for name, paths in (("a", before), ("b", after))]
    text, rows = compare(arms)
    assert rows[1]["difference"]["mean"] == pytest.approx(0.011)
    assert rows[1]["difference"]["low"] == pytest.approx(0.011 - 4.3027 * 0.001 / 3**0.5, abs=1e-6)
    assert rows[1]["verdict"] == "gain"
    text, rows = compare([arms[0], f"b={after[0]},{after[1]}"])
    assert rows[1]["difference"]["mean"] == pytest.approx(0.0105 - 0.05)
    assert rows[1]["verdict"] == "no verdict"
    assert "and as many runs as the first arm has" in text


def test_a_false_alarm_of_one_of_two_seeds_is_half_a_false_alarm(tmp_path: Path) -> None:
    base = write_table(tmp_path / "base", [0.0, *BASE[1:]])
    s0 = write_table(tmp_path / "s0", [None, *BASE[1:]])
    s1 = write_table(tmp_path / "s1", [0.0, *BASE[1:]])
    rows = compare([base, f"arm={s0},{s1}"])[1]
    assert rows[1]["difference"]["mean"] == pytest.approx(0.5 / 10)
    assert rows[1]["classes"]["organ"]["hd95_mm"]["mean"] == pytest.approx((9 * 3.5 + 1.75) / 10)
    assert rows[1]["n"] == 10


def test_a_class_may_be_called_as_an_id(tmp_path: Path) -> None:
    names = ("organ", "tumor_id")
    a = write_table(tmp_path / "a", BASE, classes=names)
    b = write_table(tmp_path / "b", [v + 0.1 for v in BASE], classes=names)
    assert list(compare([a, b])[1][1]["classes"]) == list(names)


def test_seeds_with_other_cases_are_compared_on_the_common_ones(tmp_path: Path) -> None:
    base = write_table(tmp_path / "base", BASE)
    s0 = write_table(tmp_path / "s0", BASE)
    s1 = write_table(tmp_path / "s1", BASE[:8])
    text, rows = compare([base, f"arm={s0},{s1}"])
    assert rows[1]["n"] == 8
    assert "arm: 2 cases that not all of its evaluations have are left out" in text


def test_classes_that_only_some_arms_have_are_left_out_of_the_mean(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE, classes=["organ", "tumor"])
    b = write_table(tmp_path / "b", BASE, classes=["organ"])
    text, rows = compare([a, b])
    assert list(rows[0]["classes"]) == ["organ"]
    assert "left out: tumor" in text
    c = write_table(tmp_path / "c", BASE, classes=["vessel"])
    with pytest.raises(InputError, match="no class in common"):
        compare([a, c])


def test_arms_without_a_common_case_are_refused(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", BASE, first=50)
    with pytest.raises(InputError, match="no case was evaluated in all 2 arms"):
        compare([a, b])


def test_the_same_case_id_with_another_reference_is_refused(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", BASE, reference=2.5)
    with pytest.raises(InputError, match="case00: the reference of 'organ' is 2 ml in a"):
        compare([a, b])


def test_references_are_those_of_each_run_and_not_of_their_average(tmp_path: Path) -> None:
    a1, b1 = (write_table(tmp_path / name, BASE) for name in ("a1", "b1"))
    a2, b2 = (write_table(tmp_path / name, BASE, reference=4.0) for name in ("a2", "b2"))
    with pytest.raises(InputError, match="is 2 ml in A and 4 ml in A: not the same label"):
        compare([f"A={a1},{a2}", f"B={b1},{b2}"])


def test_cases_are_of_one_patient_if_any_arm_says_so(tmp_path: Path) -> None:
    gains = [0.1, 0.1, 0.1, -0.05, -0.05, -0.05, 0.1, 0.1, 0.1, -0.05]
    two = ["p0"] * 3 + ["p1"] * 3 + ["p0"] * 3 + ["p1"]
    four = [f"q{index // 3}" for index in range(10)]
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", [v + g for v, g in zip(BASE, gains, strict=True)], patients=two)
    c = write_table(tmp_path / "c", BASE, patients=four)
    for arms in ([a, b], [b, a]):
        row = compare(arms)[1][1]
        assert row["difference"]["num_patients"] == 2
        assert row["verdict"] == "no verdict"
    assert compare([a, c])[1][1]["difference"]["num_patients"] == 4
    assert compare([c, b])[1][1]["difference"]["num_patients"] == 2  # q0 and q2 are p0


def test_there_is_no_verdict_where_a_model_may_have_seen_the_cases(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    b = write_table(tmp_path / "b", [v + 0.1 for v in BASE])
    assert compare([a, b])[1][1]["verdict"] == "gain"
    remark = find_trained_on(
        tmp_path / "copied", Dataset("", tmp_path, "csv", (), None, ("mr",)), list
    )[1]
    (b / "summary.json").write_text(json.dumps({"remarks": remark}))
    text, rows = compare([a, b])
    assert rows[1]["verdict"] == "no verdict"
    assert "b: " in text
    assert "lies in no run" in text
    assert "cases that no model was trained on" in " ".join(text.split())


def test_a_path_without_an_evaluation_is_refused_with_the_command(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    (tmp_path / "run" / "round_0").mkdir(parents=True)
    with pytest.raises(InputError, match=f"medssl evaluate {tmp_path / 'run'}$"):
        compare([a, tmp_path / "run" / "round_0"])
    with pytest.raises(InputError, match="no such run"):
        compare([a, tmp_path / "nowhere"])
    with pytest.raises(InputError, match="expected a path, or arm="):
        compare([a, "arm="])
    with pytest.raises(InputError, match="at least two"):
        compare([a])


def test_names_are_what_tells_the_arms_apart(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    write_table(run / "evaluation", BASE)
    write_table(run / "evaluation" / "round_0", BASE)
    write_table(run / "evaluation" / "round_1", BASE)
    b = write_table(tmp_path / "runs" / "b" / "evaluation", BASE)

    def names(*paths: str | Path) -> list[str]:
        return [row["name"] for row in compare(paths)[1]]

    assert names(run, b) == ["a", "b"]
    assert names(run, run / "round_0") == ["a", "a/round_0"]
    assert names(run / "round_0", run / "round_1") == ["a/round_0", "a/round_1"]
    assert names(run / "round_0", f"seeds={run},{b}") == ["a/round_0", "seeds"]
    assert names(run, run) == ["1: a", "2: a"]


def test_a_case_that_stands_twice_is_refused(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    text = (a / "per_case.csv").read_text()
    (a / "per_case.csv").write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(InputError, match="stands twice"):
        compare([a, a])


def test_a_folder_with_an_equals_sign_or_comma_in_its_name_is_a_path(tmp_path: Path) -> None:
    a = write_table(tmp_path / "lr=0,1", BASE)
    b = write_table(tmp_path / "lr=0,2", BASE)
    rows = compare([a, b])[1]
    assert [row["name"] for row in rows] == ["lr=0,1", "lr=0,2"]


def test_comparing_imports_neither_torch_nor_monai() -> None:
    code = "import sys, medssl.compare; print({'torch', 'monai', 'mlflow'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def write_classes(folder: Path, organ: float, lesion: float | None) -> Path:
    """Write a per_case.csv of ten cases that have no lesion."""
    alarm = "" if lesion is None else str(lesion)
    dice = (organ + (lesion or 0.0)) / 2 if lesion is not None else organ
    lines = ["case_id,dice/organ,dice/lesion,hd95_mm/organ,hd95_mm/lesion,dice"]
    distance = "" if lesion is None else "40"
    lines += [f"case{i},{organ},{alarm},3,{distance},{dice}" for i in range(10)]
    folder.mkdir()
    (folder / "per_case.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_headline_pairs_classes_before_their_mean(tmp_path: Path) -> None:
    a = write_classes(tmp_path / "a", 0.90, 0.0)
    b = write_classes(tmp_path / "b", 0.44, None)
    row = compare([a, b])[1][1]
    differences = [entry["difference"]["mean"] for entry in row["classes"].values()]
    assert differences == pytest.approx([-0.46, 1.00])
    assert row["difference"]["mean"] == pytest.approx(0.27)
    assert row["verdict"] == "gain"
    assert compare([b, a])[1][1]["difference"]["mean"] == pytest.approx(-0.27)


def test_the_means_side_by_side_differ_by_the_difference(tmp_path: Path) -> None:
    a = write_classes(tmp_path / "a", 0.90, 0.0)
    b = write_classes(tmp_path / "b", 0.44, None)
    first, second = compare([a, b])[1]
    assert second["dice"]["mean"] - first["dice"]["mean"] == pytest.approx(0.27)
    lesion = second["classes"]["lesion"]
    assert (lesion["dice"]["mean"], lesion["hd95_mm"]["mean"]) == (1.0, 0.0)


def test_another_arm_changes_no_difference(tmp_path: Path) -> None:
    a = write_classes(tmp_path / "a", 0.5, None)
    b = write_classes(tmp_path / "b", 0.7, None)
    c = write_classes(tmp_path / "c", 0.6, 0.0)
    alone = compare([a, b])[1][1]["difference"]
    assert compare([a, b, c])[1][1]["difference"] == alone
    assert alone["mean"] == pytest.approx(0.2)


def test_a_run_without_test_cases_is_not_sent_in_a_circle(tmp_path: Path) -> None:
    a = write_table(tmp_path / "a", BASE)
    run = tmp_path / "run"
    run.mkdir()
    (run / "splits.json").write_text('{"test": []}')
    with pytest.raises(InputError) as error:
        compare([a, run])
    assert f"medssl evaluate {run} DATA --out EVALUATION_OF_run" in str(error.value)
    assert "medssl compare EVALUATION_OF_run" in str(error.value)
    write_table(run / "cross_check", BASE)
    with pytest.raises(InputError, match=f"its folds: {run / 'cross_check'}"):
        compare([a, run])
    assert len(compare([a, run / "cross_check"])[1]) == 2
