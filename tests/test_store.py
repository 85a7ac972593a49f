"""A data set on a store of objects: what is copied when, what is refused, what is kept secret."""

import contextlib
import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import fsspec
import nibabel as nib
import numpy as np
import pytest
from commands import run_command
from conftest import draw_tiny_scan
from crew import Crew
from fsspec.implementations.memory import MemoryFileSystem

from medssl.config import InputError
from medssl.data.phantoms import write_phantoms
from medssl.data.store import find_url, mirror_store
from medssl.runs import read_json
from medssl.settings import load_config

FILES = {"images/a.nii.gz": b"scan a", "images/b.nii.gz": b"scan b", "labels/a.nii.gz": b"label"}
URL = "memory://bucket/set"


def list_tree(folder):
    """Return the content of every file below a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def store():
    """Return a function that puts objects into a store in memory."""
    system = fsspec.filesystem("memory")

    def put(files, url=URL):
        for name, content in files.items():
            system.pipe_file(f"{url}/{name}", content)
        return system

    system.store.clear()
    yield put
    system.store.clear()


@pytest.fixture
def copied(monkeypatch):
    """Return the names of the objects that were copied, as they are."""
    names, lock, get_file = [], threading.Lock(), MemoryFileSystem.get_file

    def count(self, place, *arguments, **options):
        with lock:
            names.append(place.removeprefix("/bucket/set/"))
        return get_file(self, place, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", count)
    return names


def test_a_copy_holds_every_object_and_is_named_as_its_folder(store, tmp_path):
    store(FILES)
    folder = mirror_store(f"{URL}/", tmp_path)
    assert folder.name == "set"
    assert list_tree(folder) == FILES
    assert find_url(folder) == find_url(folder / "images") == URL
    assert find_url(tmp_path) is None


def test_what_is_there_is_not_copied_again(store, copied, tmp_path):
    store(FILES)
    mirror_store(URL, tmp_path)
    assert sorted(copied) == sorted(FILES)
    mirror_store(URL, tmp_path)
    assert len(copied) == len(FILES)


def test_what_has_changed_is_copied_and_what_is_gone_is_removed(store, copied, tmp_path):
    system = store(FILES)
    folder = mirror_store(URL, tmp_path)
    copied.clear()
    system.rm(f"{URL}/labels/a.nii.gz")
    new = {"images/b.nii.gz": b"scan B", "images/c.nii.gz": b"scan c"}
    store(new)
    mirror_store(URL, tmp_path)
    assert sorted(copied) == sorted(new)
    assert list_tree(folder) == {"images/a.nii.gz": b"scan a", **new}
    assert not (folder / "labels").exists()  # an empty folder would be taken for a layout


@pytest.mark.parametrize(
    "harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"SCAN A")]
)
def test_a_copy_that_somebody_has_changed_is_mended(store, tmp_path, harm):
    store(FILES)
    folder = mirror_store(URL, tmp_path)
    harm(folder / "images/a.nii.gz")
    mirror_store(URL, tmp_path)
    assert list_tree(folder) == FILES


def test_a_folder_may_take_the_place_of_a_file(store, tmp_path):
    system = store({"a": b"1", "b/c": b"2"})
    mirror_store(URL, tmp_path)
    system.rm(f"{URL}/a")
    system.rm(f"{URL}/b", recursive=True)
    store({"a/c": b"3", "b": b"4"})
    assert list_tree(mirror_store(URL, tmp_path)) == {"a/c": b"3", "b": b"4"}


def test_of_a_list_the_files_of_its_folder_are_copied(store, copied, tmp_path):
    store({**FILES, "cases.csv": b"case_id,image"})
    path = mirror_store(f"{URL}/cases.csv", tmp_path)
    assert path.read_bytes() == b"case_id,image"
    assert len(list_tree(path.parent)) == 4
    copied.clear()
    assert mirror_store(URL, tmp_path) == path.parent  # one copy for both
    assert copied == []


def test_of_a_scan_nothing_else_is_copied(store, tmp_path):
    store(FILES)
    path = mirror_store(f"{URL}/images/a.nii.gz", tmp_path)
    assert (path.name, path.read_bytes()) == ("a.nii.gz", b"scan a")
    assert len(list_tree(path.parent)) == 1


@pytest.mark.parametrize("names", [["../x"], ["a//x"], ["a/./x"], ["a", "a/x"]])
def test_objects_that_no_folder_can_hold_are_refused(store, tmp_path, monkeypatch, names):
    entries = [{"name": f"/bucket/set/{n}", "size": 1, "type": "file"} for n in ["ok", *names]]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: entries)
    with pytest.raises(InputError, match=f"1 objects have names.*'{names[-1]}'"):
        mirror_store(URL, tmp_path)
    assert not list(tmp_path.rglob("ok"))


def test_a_disk_that_is_too_small_is_named_before_anything_is_copied(
    store, copied, tmp_path, monkeypatch
):
    store({"a": bytes(30_000_000)})
    usage = namedtuple("Usage", "free")(20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"1 to copy, 0.03 GB, and .*set has room for 0.02 GB"):
        mirror_store(URL, tmp_path)
    assert copied == []


def test_after_an_error_only_the_rest_is_copied(store, copied, tmp_path, monkeypatch):
    store(FILES)
    get_file = MemoryFileSystem.get_file

    def break_off(self, place, path, **options):
        get_file(self, place, path, **options)
        if place.endswith("images/b.nii.gz"):
            with open(path, "r+b") as file:
                file.truncate(2)
            raise ConnectionError("reset by https://anna:secret@host/x")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", break_off)
        with pytest.raises(InputError, match=r"does not answer.*reset by https://host/x") as told:
            mirror_store(URL, tmp_path)
    assert "secret" not in str(told.value)
    (folder,) = tmp_path.glob("stores/*/set")
    there = list_tree(folder)
    assert "images/b.nii.gz" not in there
    assert there.items() <= FILES.items()
    copied.clear()
    assert list_tree(mirror_store(URL, tmp_path)) == FILES
    assert sorted(copied) == sorted(set(FILES) - set(there))


def test_a_file_that_comes_short_is_not_taken(store, tmp_path, monkeypatch):
    store({"a": b"whole"})
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda self, place, path: open(path, "wb").close()
    )
    with pytest.raises(InputError, match="came with 0 of 5 bytes"):
        mirror_store(URL, tmp_path)
    assert not [name for name in list_tree(tmp_path) if name.endswith("/a")]


def test_processes_at_once_copy_each_object_once(store, copied, tmp_path):
    store(FILES)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: mirror_store(URL, tmp_path), range(4)))
    assert len(folders) == 1
    assert sorted(copied) == sorted(FILES)


SLOWLY = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from medssl.data.store import mirror_store
def get_file(self, place, path, **options):
    content = Path(place).read_bytes()
    with open(path, "wb") as file:
        file.write(content[:3])
        file.flush()
        time.sleep(0 if place.endswith("a.nii.gz") else 60)
LocalFileSystem.get_file = get_file
mirror_store(sys.argv[1], Path("cache"))
"""


def test_a_kill_leaves_nothing_half_and_the_rest_is_copied_after_it(tmp_path):
    files = {"a.nii.gz": b"123", "b.nii.gz": b"123456"}
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content)
    url, cache = f"file://{tmp_path}/set", tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, url], cwd=tmp_path)
    begun = time.monotonic()
    while b"123" not in [v for k, v in list_tree(tmp_path).items() if k.endswith(".b.nii.gz")]:
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    process.kill()
    process.wait()
    (whole,) = cache.rglob("a.nii.gz")
    assert not list(cache.rglob("b.nii.gz"))
    inode = whole.stat().st_ino
    folder = mirror_store(url, cache)
    assert list_tree(folder) == files  # what the kill left begun is gone
    assert whole.stat().st_ino == inode


TOGETHER = """
import sys
from pathlib import Path
from medssl import cli, ranks
from medssl.data import store
asked = []
mirror = store.mirror_store
store.mirror_store = lambda *arguments: asked.append(1) or mirror(*arguments)
with ranks.join_others(whatever_comes=True):
    try:
        print(cli._fetch(sys.argv[1], Path("cache")).name, end=" ")
    finally:
        print(len(asked), flush=True)
"""


@pytest.mark.slow
def test_of_several_processes_the_first_one_copies(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").touch()
    with Crew(3, "-c", TOGETHER, f"file://{tmp_path}/set", cwd=tmp_path) as crew:
        assert crew.wait() == [0, 0, 0], crew.read()
        last = [text.splitlines()[-1] for text in crew.read()]
    assert last == ["set 1", "set 0", "set 0"]


def test_where_the_first_one_fails_all_end_and_say_why(tmp_path):
    with Crew(2, "-c", TOGETHER, f"file://{tmp_path}/none", cwd=tmp_path) as crew:
        assert crew.wait(60) == [1, 1]
        assert all("InputError" in text and "/none: no such" in text for text in crew.read())


def test_a_folder_that_cannot_be_listed_removes_nothing_from_the_copy(store, tmp_path, monkeypatch):
    store(FILES)
    folder, ls = mirror_store(URL, tmp_path), MemoryFileSystem.ls

    def fail(self, path, **options):
        if path.endswith("labels"):
            raise OSError("a timeout")
        return ls(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    with pytest.raises(InputError, match=r"does not answer .OSError: a timeout"):
        mirror_store(URL, tmp_path)
    assert list_tree(folder) == FILES


def test_an_empty_or_missing_folder_is_refused_and_the_copy_stays(store, tmp_path):
    system = store(FILES)
    folder = mirror_store(URL, tmp_path)
    system.rm(URL, recursive=True)
    with pytest.raises(InputError, match=r"memory://bucket/set: no such bucket, folder or file"):
        mirror_store(URL, tmp_path)
    assert list_tree(folder) == FILES


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/set", "s3:// needs a package that is missing.*pip install 'medssl\\[s3\\]'"),
        ("nowhere://bucket/set", "Protocol not known: nowhere.*such as s3://BUCKET/FOLDER"),
    ],
)
def test_what_cannot_be_opened_is_a_message_and_code_2(url, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for command in ("check", "train"):
        code, told = run_command(command, url)
        assert code == 2
        assert re.search(words, told), told
    assert not list(tmp_path.rglob("set"))


@pytest.fixture
def scans(tmp_path):
    """A folder with three labeled scans and one unlabeled, and a list of them."""
    folder = tmp_path / "heart"
    (folder / "labels").mkdir(parents=True)
    (folder / "images").mkdir()
    for index, name in enumerate("abcd"):
        image, label = draw_tiny_scan(index)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"{name}.nii.gz")
        if name != "d":
            nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"{name}.nii.gz")
    return folder


@pytest.mark.parametrize("way", ["argument", "setting", "yaml"])
def test_check_reads_a_url_however_it_is_given(scans, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    url = scans.as_uri()
    (tmp_path / "a.yaml").write_text(f"data: {{root: '{url}'}}")
    (tmp_path / "b.yaml").write_text("method: classic")
    arguments = {"argument": [url], "setting": ["b.yaml", f"data.root={url}"], "yaml": ["a.yaml"]}
    code, told = run_command("check", *arguments[way])
    assert code == 0, told
    assert "7 files, 0.00 GB; 7 to copy" in told
    assert "files below runs/cache/stores" in told
    assert len(list((tmp_path / "runs" / "cache" / "stores").glob("*/heart/labels/*"))) == 3


def test_a_url_stays_whole_in_the_configuration(tmp_path):
    assert load_config("s3://bucket//set").config.data.root == "s3://bucket//set"
    code, told = run_command("config", "s3://bucket/set")
    assert code == 0
    assert "data.root: s3://bucket/set " in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "scans", "--run", "s3://bucket/run"],
        ["predict", "model", "scan.nii.gz", "--out", "s3://bucket/masks"],
        ["evaluate", "model", "scans", "--out", "s3://bucket/tables"],
    ],
)
def test_nothing_is_written_to_a_url(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, told = run_command(*arguments)
    assert code == 2
    assert f"'{arguments[-1]}' is a URL: only scans are" in " ".join(told.split())
    assert not list(tmp_path.iterdir())


class Guarded(http.server.SimpleHTTPRequestHandler):
    """A folder on the web, for those who know the password."""

    def do_GET(self):
        if self.headers.get("Authorization") != "Basic YW5uYTpzZWNyZXQ=":  # anna:secret
            self.send_error(401)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(handler):
    """Serve HTTP from a thread; yield host and port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "{}:{}".format(*server.server_address)
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_on_the_web_is_read_and_its_password_told_to_nobody(tmp_path):
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp")
    (tmp_path / "web" / "set" / "images").mkdir(parents=True)
    (tmp_path / "web" / "set" / "images" / "a b.nii").write_bytes(b"scan")
    with serve(functools.partial(Guarded, directory=tmp_path / "web")) as host:
        folder = mirror_store(f"http://anna:secret@{host}/set", tmp_path / "cache")
        assert list_tree(folder) == {"images/a b.nii": b"scan"}
        assert find_url(folder) == f"http://{host}/set"
        with pytest.raises(InputError, match=r"does not let you read it.*user and password"):
            mirror_store(f"http://anna:wrong@{host}/set", tmp_path / "cache")
    with pytest.raises(InputError, match="the store does not answer") as told:
        mirror_store(f"http://anna:secret@{host}/set", tmp_path / "cache")
    assert "secret" not in str(told.value)
    assert not [name for name, text in list_tree(tmp_path / "cache").items() if b"secret" in text]


@pytest.fixture(scope="module")
def server():
    """The address of a server that speaks S3."""
    reason = "needs the extra nightly: s3fs and the server of moto"
    pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A file system of that server with an empty bucket, known to s3:// by the environment."""
    system = fsspec.get_filesystem_class("s3")
    known = {
        "ACCESS_KEY_ID": "AKIAANNA",
        "SECRET_ACCESS_KEY": "the-secret",
        "DEFAULT_REGION": "us-east-1",
    }
    for key, value in {**known, "ENDPOINT_URL": server}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    system.clear_instance_cache()  # one of another environment
    opened = system()
    opened.mkdir("s3://bucket")
    yield opened
    opened.rm("s3://bucket", recursive=True)
    system.clear_instance_cache()


@pytest.mark.nightly
def test_a_bucket_is_copied_once_and_then_what_has_changed(s3, tmp_path):
    s3.pipe({f"bucket/set/{name}": content for name, content in FILES.items()})
    s3.touch("bucket/set/empty/")  # as consoles make a folder
    s3.pipe_file("bucket/settings", b"beside it")
    folder = mirror_store("s3://bucket/set", tmp_path)
    assert (folder.name, list_tree(folder)) == ("set", FILES)
    inodes = {name: (folder / name).stat().st_ino for name in FILES}
    s3.pipe_file("bucket/set/images/b.nii.gz", b"scan B")
    mirror_store("s3://bucket/set", tmp_path)
    assert list_tree(folder) == {**FILES, "images/b.nii.gz": b"scan B"}
    same = [name for name in FILES if (folder / name).stat().st_ino == inodes[name]]
    assert same == ["images/a.nii.gz", "labels/a.nii.gz"]
    assert list_tree(mirror_store("s3://bucket", tmp_path)).keys() == {
        "settings",
        *(f"set/{name}" for name in FILES),
    }


@pytest.mark.nightly
def test_a_bucket_that_does_not_answer_as_it_should_is_a_sentence(s3, tmp_path, monkeypatch):
    s3.pipe_file("bucket/set/a", b"1")
    for url in ("s3://bucket/sets", "s3://no-such-bucket/set"):
        with pytest.raises(InputError, match=f"{url}: no such bucket, folder or file"):
            mirror_store(url, tmp_path)
    with monkeypatch.context() as patch:  # until then the server believes everybody
        patch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
        with pytest.raises(InputError, match=r"does not let you read it .*set AWS_ACCESS_KEY_ID"):
            mirror_store("s3://bucket/set", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(type(s3), "retries", 1)  # else half a minute
    type(s3).clear_instance_cache()
    with pytest.raises(InputError, match=r"does not answer .*AWS_ENDPOINT_URL") as told:
        mirror_store("s3://bucket/set", tmp_path)
    assert "secret" not in str(told.value)
    assert not list(tmp_path.rglob("a"))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("brief")
def test_a_run_on_a_bucket_trains_resumes_is_measured_and_predicts(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_phantoms(tmp_path / "made", num_labeled=4, num_unlabeled=0, num_test=2, shape=(28,) * 3)
    s3.put(f"{tmp_path}/made/", "s3://bucket/organs/", recursive=True)
    shutil.rmtree(tmp_path / "made")
    url = "s3://bucket/organs"

    def medssl(*arguments):
        code, told = run_command(*arguments)
        assert code == 0, told
        assert "the-secret" not in told
        return told

    assert "to copy" in medssl("check", url)
    train = ["train", url, "steps=6", "rounds=0", "network.width=0.5", "network.depth=3"]
    train += ["plan.patch_size=[16,16,16]", "--run", "runs/first"]
    assert "nothing to copy" in medssl(*train)  # check has the same cache
    assert "nothing to copy" in medssl(*train)
    (run,) = (tmp_path / "runs").glob("first")
    assert read_json(run / "provenance.json")["data"] == url
    assert read_json(run / "splits.json")["dataset"]["url"] == url
    assert url in (run / "report.html").read_text()
    scan = s3.ls("bucket/organs/images", detail=False)[0]
    medssl("predict", "runs/first", f"s3://{scan}", "--out", "masks")
    assert (tmp_path / "masks" / scan.rpartition("/")[2]).is_file()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # what a run has it needs no more
    type(s3).clear_instance_cache()
    medssl("evaluate", "runs/first")
    told = list_tree(tmp_path)
    assert not [name for name, content in told.items() if b"the-secret" in content]
    assert not [
        name for name, content in told.items() if "mlflow.db" in name and b"s3://" in content
    ]
