"""The pages of docs/ are built without a warning, and need no network to be looked at."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning_and_load_nothing_from_elsewhere(tmp_path):
    source = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("api"))
    settings = source / "conf.py"
    text = settings.read_text()
    assert text.count('"../medssl"') == 1
    settings.write_text(text.replace('"../medssl"', repr(str(ROOT / "medssl"))))
    pages = tmp_path / "pages"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(pages)]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "renyi_entropy" in (pages / "api" / "medssl.losses.entropy.html").read_text()
    loads = r"""<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*stylesheet[^>]*//"""
    for page in pages.rglob("*.html"):
        assert not re.search(loads, page.read_text(encoding="utf-8")), page.name
