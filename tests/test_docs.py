"""The pages of docs/ are built without a warning, and need no network to be looked at."""

import re
import shutil
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parent.parent
OTHERS = [str(p) for p in (ROOT / "medssl").iterdir() if p.name not in ("__init__.py", "losses")]


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [OTHERS, pytest.param([], marks=pytest.mark.nightly)])
def test_the_pages_are_built_without_a_warning_and_load_nothing_from_elsewhere(tmp_path, left_out):
    source = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("api"))
    settings = source / "conf.py"
    text = settings.read_text()
    assert text.count('"../medssl",') == 1
    modules = f'{str(ROOT / "medssl")!r}, "exclude_patterns": {left_out},'
    settings.write_text(text.replace('"../medssl",', modules))
    pages = tmp_path / "pages"
    done = processes.run("-m", "sphinx", "-q", "-W", "--keep-going", source, pages)
    assert done.returncode == 0, done.stderr
    assert "renyi_entropy" in (pages / "api" / "medssl.losses.entropy.html").read_text()
    assert (pages / "api" / "medssl.plan.html").exists() is not bool(left_out)
    loads = r"""<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*stylesheet[^>]*//"""
    for page in pages.rglob("*.html"):
        assert not re.search(loads, page.read_text(encoding="utf-8")), page.name
