"""What `medssl doctor` says of a machine, and the repair that it names."""

import importlib.metadata
import os
import sqlite3
import threading
import time
from collections import namedtuple
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from commands import run_command

from medssl import doctor
from medssl.tracking import find_default_uri, find_store_problem

Disk = namedtuple("Disk", "total used free")
KINDS = ("python", "packages", "processor", "bfloat16", "cards", "driver", "memory", "disk")
KINDS += ("/dev/shm", "clock", "store")


def test_the_report_has_a_line_for_every_part_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = run_command("doctor", "runs")
    assert [line.split()[0] for line in text.splitlines()[: len(KINDS)]] == list(KINDS)
    assert code == int("PROBLEM" in text)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_a_problem_is_told_with_its_repair_and_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "count_free_memory", lambda: 2e9)
    code, text = run_command("doctor")
    assert code == 1
    assert "PROBLEM: 2.0 GB of memory are available" in text
    assert "--mem=16G" in text
    assert run_command("doctor", "file://somewhere")[0] == 2


@pytest.mark.parametrize(
    ("cuda", "visible", "said"),
    [
        (None, None, "is a build for CPUs; install a CUDA build"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES='' hides it; unset it"),
        ("13.0", None, "too old for CUDA 13.0; update the driver"),
    ],
)
def test_a_card_that_torch_does_not_see_has_a_reason(monkeypatch, cuda, visible, said):
    monkeypatch.setattr(doctor, "_ask_driver", lambda: "NVIDIA T4, 470.1")
    monkeypatch.setattr(doctor, "_list_cards", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (problem,) = doctor._find_card_problems()
    assert "there is a card (NVIDIA T4, 470.1)" in problem
    assert said in problem


@pytest.mark.parametrize(
    ("capability", "free", "said"),
    [
        ((6, 1), 8e9, "is sm_61, but this torch is built for sm_75, sm_90"),
        ((7, 5), 1e9, "has 1.0 GB free; `nvidia-smi` says who has the rest"),
        ((7, 5), RuntimeError("CUDA error: ECC"), "cannot be used (CUDA error: ECC)"),
        ((8, 0), 8e9, "is sm_80"),
        ((7, 5), 8e9, None),
    ],
)
def test_a_card_that_is_too_old_full_or_broken_is_told(monkeypatch, capability, free, said):
    def ask(index):
        if isinstance(free, Exception):
            raise free
        return free, 16e9

    monkeypatch.setattr(doctor, "_list_cards", lambda: ["NVIDIA T4 (16 GiB)"])
    monkeypatch.setattr(doctor, "_ask_driver", str)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    problems = list(doctor._find_card_problems())
    assert len(problems) == (said is not None)
    if said:
        assert "cuda:0, NVIDIA T4 (16 GiB), " in problems[0]
        assert said in problems[0]


@pytest.mark.parametrize(
    ("card", "builds", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 1), ["sm_120"], True),
        ((7, 0), ["sm_75", "compute_90"], False),
        ((7, 0), [], True),
    ],
)
def test_code_for_a_card_is_of_its_major_or_compiled_on_the_way(card, builds, runs):
    assert doctor.is_built_for(card, builds) is runs


def test_addresses_shared_memory_and_disk_that_are_short_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "count_free_memory", lambda: 64e9)
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    monkeypatch.setattr(doctor, "_read_address_limit", lambda: 8e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(64 << 20, 0, 1e9))
    addresses, shm = doctor._find_memory_problems()
    assert "8 GB of addresses" in addresses
    assert "ulimit -v unlimited" in addresses
    assert "--shm-size=1g" in shm
    (disk,) = doctor._find_disk_problems()
    assert "under 5 GB of disk" in disk


def test_a_folder_that_cannot_be_written_is_told(monkeypatch):
    def refuse(**given):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(1e12, 0, 1e12))
    (problem,) = doctor._find_disk_problems()
    assert "(Read-only file system); run from one of yours" in problem


def test_a_clock_that_is_wrong_is_told(tmp_path):
    now = time.time()
    assert list(doctor._find_clock_problems(tmp_path, now)) == []
    behind = list(doctor._find_clock_problems(tmp_path, 1e9))
    assert "the clock says 2001-09-09" in behind[0]
    assert "timedatectl" in behind[0]
    (skewed,) = doctor._find_clock_problems(tmp_path, now + 3600)
    assert "dated -3600 s from the clock" in skewed


def test_packages_that_are_missing_or_too_old_are_told_with_their_command(monkeypatch):
    needs = {
        "house": ["wall>=2", 'roof ; extra == "dear"', "Door_a<3", "gate"],
        "wall": ["brick==1.0"],
        "Door_a": [],
        "brick": ["wall"],  # a circle
    }
    versions = {"wall": "2.1.dev1", "Door_a": "3.0", "brick": "1.0+cpu"}

    def look(table):
        def find(name):
            if name not in table:
                raise importlib.metadata.PackageNotFoundError(name)
            return table[name]

        return find

    monkeypatch.setattr(importlib.metadata, "requires", look(needs))
    monkeypatch.setattr(importlib.metadata, "version", look(versions))
    assert list(doctor._find_version_problems("house")) == [
        'Door_a is 3.0, but house needs <3; pip install "Door_a<3"',
        'gate, which house needs, is not installed; pip install "gate"',
    ]
    assert list(doctor._find_version_problems("tent")) == []  # not installed: from its sources


def test_a_store_that_is_no_database_or_held_by_another_is_told(tmp_path):
    uri = find_default_uri(tmp_path)
    assert find_store_problem(uri) == ""
    assert not list(tmp_path.iterdir())
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store, store:
        store.execute("create table experiments (experiment_id, artifact_location)")
    assert find_store_problem(uri) == ""
    (tmp_path / "mlflow.db").write_text("hello, this is no database")
    assert "MLflow cannot use this store (file is not a database)" in find_store_problem(uri)


@pytest.mark.skipif(os.name == "nt", reason="a port of its own")
def test_a_server_is_asked_and_its_password_kept():
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):  # the name that http.server asks for
            known = self.headers["Authorization"] == "Basic YW5uYTpzZWNyZXQ="  # anna:secret
            wanted = {"/health": 200, "/private/health": 200 if known else 401}
            self.send_response(wanted.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert find_store_problem(uri) == ""
        assert "404" in find_store_problem(f"{uri}/elsewhere")
        assert "401" in find_store_problem(f"{uri}/private")
        assert find_store_problem(uri.replace("//", "//anna:secret@") + "/private") == ""
        server.shutdown()
    problem = find_store_problem(uri.replace("//", "//anna:secret@"))
    assert f"{uri} does not answer" in problem
    assert "medssl sync RUN" in problem
    assert "secret" not in problem
