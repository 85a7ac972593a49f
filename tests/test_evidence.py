"""The tables and the figure of docs/evidence.md are those of the committed CSVs."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

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
    evidence.replace_table(page, path.name, evidence.tabulate(path))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{other}after\n")
    assert "old" not in text
    assert "| round_0 | 0 | 0.5000 |" in text
    evidence.replace_table(page, path.name, evidence.tabulate(path))
    assert page.read_text() == text


@pytest.mark.parametrize("draws", [3, 5, 10])
def test_a_detectable_gain_is_found_in_eight_of_ten_studies(evidence, draws):
    gain = evidence.find_detectable(0.04, draws)
    rng = np.random.default_rng(0)
    studies = rng.normal(gain, 0.04, (200_000, draws))
    found = scipy.stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.004)


def test_power_is_of_sets_with_a_gain_in_two_draws(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 100)
    paths = [tmp_path / name for name in list(evidence.SETS)]
    write_study(paths[0], ["labels", "recipe"], draws=(0, 1, 2))
    write_study(paths[1], ["labels", "recipe"], draws=(0,))
    table = evidence.tabulate_power(paths)
    assert f"| {evidence.SETS[paths[0].name]} | +0.150, +0.150, +0.150 | 0.000 |" in table
    assert len(table.splitlines()) == 3
    assert evidence.tabulate_power(paths[1:]) == ""


@pytest.mark.slow
def test_the_pages_and_their_figure_are_those_of_the_committed_tables(evidence):
    tables = {path: page for page in evidence.PAGES for path in evidence.list_tables(page)}
    assert {path.name for path in tables} > set(evidence.SETS)
    for path, page in tables.items():
        assert evidence.tabulate(path) in page.read_text(encoding="utf-8"), path.name
    power = evidence.tabulate_power([ROOT / "docs" / name for name in evidence.SETS])
    assert power in evidence.PAGES[0].read_text(encoding="utf-8")
    figure = (ROOT / "docs" / "evidence.svg").read_text(encoding="utf-8")
    assert evidence.hash_contents([ROOT / "docs" / name for name in evidence.SETS]) in figure
