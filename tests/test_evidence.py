"""The tables and the figure of docs/evidence.md are those of the committed CSVs."""

from pathlib import Path

import pytest

from medssl import metrics

ROOT = Path(__file__).resolve().parents[1]
DICE = {"round_0": 0.5, "labels": 0.6, "recipe": 0.75, "all": 0.9}


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import write_evidence

    return write_evidence


def write_study(path, arms, draws=(0, 1)):
    rows = [
        f"{draw},{arm},10,1.0,c{case},p{case},{DICE[arm] + 0.01 * (draw + case)}"
        for arm in arms
        for draw in (draws if arm != "all" else draws[:1])
        for case in range(4)
    ]
    path.write_text("\n".join(["draw,arm,steps,minutes,case_id,patient_id,dice", *rows]) + "\n")


def test_the_figure_has_each_draw_and_the_gain_of_a_set(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 100)
    paths = [tmp_path / name for name in list(evidence.SETS)[:2]]
    write_study(paths[0], DICE)
    write_study(paths[1], ["round_0", "recipe"])  # without a control
    figure = evidence.draw_gains(paths)
    first, second = list(evidence.SETS.values())[:2]
    assert f"{first}: +0.150 [+0.150, +0.150] over labels alone<" in figure
    assert second not in figure
    assert [figure.count(f">draw {draw}<") for draw in (0, 1, 2)] == [1, 1, 0]
    assert evidence.draw_gains(paths) == figure
    write_study(paths[0], DICE, draws=(0, 1, 2))
    assert evidence.hash_contents(paths) not in figure
    assert evidence.hash_contents(paths) in evidence.draw_gains(paths)


def test_the_tables_of_a_page_are_replaced(evidence, tmp_path):
    path, page = tmp_path / "s.csv", tmp_path / "page.md"
    path.write_text("draw,arm,case_id,patient_id,dice\n0,round_0,c,p,0.5\n")
    other = "<!-- none.csv -->\n<!-- none.csv end -->\n"
    page.write_text(f"before\n<!-- s.csv -->\nold\n<!-- s.csv end -->\n{other}after\n")
    assert evidence.list_tables(page) == [path]
    evidence.replace_table(page, path, evidence.tabulate(path))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{other}after\n")
    assert "old" not in text
    assert "| round_0 | 0 | 0.5000 |" in text
    evidence.replace_table(page, path, evidence.tabulate(path))
    assert page.read_text() == text


@pytest.mark.slow
def test_the_page_and_its_figure_are_those_of_the_committed_tables(evidence):
    page = ROOT / "docs" / "evidence.md"
    tables = evidence.list_tables(page)
    assert {path.name for path in tables} > set(evidence.SETS)
    for path in tables:
        assert evidence.tabulate(path) in page.read_text(encoding="utf-8"), path.name
    figure = (ROOT / "docs" / "evidence.svg").read_text(encoding="utf-8")
    assert evidence.hash_contents([ROOT / "docs" / name for name in evidence.SETS]) in figure
