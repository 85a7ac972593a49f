"""The wheelhouse and the image that is made of it, without a download."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
HADOLINT = shutil.which("hadolint", path=PLACES)
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLED"
case "$*" in
  "-m pip freeze"*) printf 'torch==1.2\\nmedssl @ file:///somewhere\\n' ;;
  "-m pip wheel"*)
    while [ "$1" != --constraint ]; do shift; done
    cp "$2" "$CALLED.versions"
    echo whole > "$4/medssl-1-py3-none-any.whl" ;;
  "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install"*) exit "${INCOMPLETE:-0}" ;;
  *) echo python3.11 ;;
esac
"""


@pytest.fixture
def collect(tmp_path):
    """Return a function that runs the script with a Python that writes down what it is asked."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments, **environment):
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "wheelhouse"), *arguments],
            env={**os.environ, "PYTHON": str(python), "CALLED": str(tmp_path / "called")}
            | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_the_versions_that_were_tested_are_collected_and_tried_without_an_index(collect, tmp_path):
    done = collect("wheels", "--extra-index-url", "there")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called.versions").read_text() == "torch==1.2\n"
    called = (tmp_path / "called").read_text()
    extras = re.escape("[dicom,export]")
    assert re.search(rf"pip wheel .*--extra-index-url there \.{extras}$", called, re.M)
    assert re.search(
        rf"pip install .*--dry-run --no-index --find-links .*/wheels medssl{extras}$", called, re.M
    )
    assert "--find-links FOLDER 'medssl[dicom,export]'" in done.stdout
    folder = tmp_path / "wheels"
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    (folder / "medssl-1-py3-none-any.whl").write_text("damaged")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_a_folder_that_lacks_something_is_an_error(collect, tmp_path):
    assert collect("wheels", INCOMPLETE="1").returncode == 1
    assert not (tmp_path / "wheels" / "SHA256SUMS").exists()


def test_a_mistake_is_told_with_what_to_do(collect):
    assert collect().returncode == 2
    done = collect("wheels", PYTHON="nowhere/python")
    assert done.returncode == 2
    assert "scripts/demo makes .venv" in done.stderr


def test_the_image_takes_the_wheelhouse_alone_and_runs_without_rights():
    assert DOCKERFILE.count("pip install") == 1
    assert '--no-index --find-links /wheels "medssl[dicom,export]"' in DOCKERFILE
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.M)
    assert int(user) > 0
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!wheels"]
    page = (ROOT / "docs" / "install_offline.md").read_text(encoding="utf-8")
    for option in ("--network none", "--read-only", "--tmpfs /tmp"):
        assert option in DOCKERFILE
        assert option in page


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
