"""What the README promises, done: its commands on a folder, and the wheel on its own."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import processes
import pytest

from medssl.data.phantoms import write_phantoms

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = [
    "steps=60", "rounds=1", "filter.uncertainty.passes=2", "network.depth=3", "plan.flips=[0]",
    "train.lr=4e-3",
]  # fmt: skip
RUN = [sys.executable, "-m", "medssl"]


def list_commands() -> list[list[str]]:
    """Return the medssl commands of the README's shell blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("medssl ")]


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(port: int, process: processes.Process) -> str:
    """Return the first page of a server once it answers."""
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not answer within two minutes")


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    phantoms = tmp_path / "phantoms"
    write_phantoms(phantoms, num_labeled=3, num_unlabeled=2, num_test=0, shape=(28, 28, 28))
    (phantoms / "cases.csv").unlink()
    phantoms.rename(tmp_path / "scans")
    (tmp_path / "new_scan.nii.gz").write_bytes(
        next((tmp_path / "scans" / "images").glob("*.nii.gz")).read_bytes()
    )
    commands = list_commands()
    assert [command[0] for command in commands] == ["check", "train", "predict", "ui"]
    for command in commands[:-1]:
        extra = QUICK if command[0] == "train" else []
        result = processes.run("-m", "medssl", *command, *extra, cwd=tmp_path)
        assert result.returncode in ((0, 3) if command[0] == "train" else (0,)), result.stderr
    assert (tmp_path / "masks" / "new_scan.nii.gz").is_file()
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    port = find_port()
    process = processes.Process("-m", "medssl", *commands[-1], "--port", port, cwd=tmp_path)
    try:
        assert "MLflow" in wait_for_page(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def test_files_and_commands_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"scripts/\w+(?:\.\w+)?", README):
        path = ROOT / script
        assert path.is_file() if path.suffix else os.access(path, os.X_OK), script
    help_text = subprocess.run([*RUN, "--help"], capture_output=True, text=True, check=True).stdout
    for name in re.findall(r"`medssl (\w+)", README):
        assert re.search(rf"\b{name}\b", help_text), name


def test_the_studies_read_their_arguments_as_the_docs_write_them(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    lines = re.findall(
        r"^python (scripts/\S+ FOLDER/.*)$", "\n".join(texts).replace("\\\n", " "), re.M
    )
    scripts = {line.split()[0] for line in lines}
    names = ("study", "compare_peers", "measure_robustness", "audit_gain", "draw_features")
    assert scripts == {f"scripts/{name}.py" for name in names}
    for line in lines:
        script, *arguments = line.split()
        done = processes.run(ROOT / script, *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "usage:" not in done.stderr
        assert f"{arguments[0]}: no such" in done.stderr, done.stderr


def test_the_wheel_alone_lists_presets_and_runs_the_demo(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, *tmp_path.glob("*.whl")], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, check=False
        )

    where = run(sys.executable, "-c", "import medssl; print(medssl.__file__)")
    assert where.stdout.startswith(str(site))
    assert "default" in run(*RUN, "methods").stdout
    few = ("steps=10", *QUICK[1:3], "plan.patch_size=[24,32,24]", "plan.flips=[]")
    result = run(*RUN, "demo", *few)
    assert result.returncode in (0, 3), result.stderr
    assert "measured:" in result.stdout
    assert (empty / "medssl-demo" / "runs" / "demo" / "report.html").is_file()
