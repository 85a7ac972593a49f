"""The worked example of CONTRIBUTING does what it says."""

import re
import shutil
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"

USE = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "medssl"]:
    del sys.modules[name]
sys.path.insert(0, {root!r})
import torch
from medssl.settings import load_config
from medssl.losses.supervised import ce
from medssl.objective import find_loss
import medssl
assert medssl.__file__.startswith({root!r}), medssl.__file__
config = load_config(None, ["losses.pseudo_label.name=focal"]).config
loss = find_loss(config.losses.pseudo_label.name)
torch.manual_seed(0)
logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
torch.testing.assert_close(loss(logits, target, gamma=0.0), ce(logits, target))
assert loss(logits, target) < ce(logits, target)
"""


def read_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def use(root):
    return processes.run("-c", USE.format(root=str(root)), cwd=root)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and its presets."""
    shutil.copytree(ROOT / "medssl", tmp_path / "medssl")
    if not (tmp_path / "medssl" / "configs").is_dir():
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def test_the_worked_example_adds_a_loss_with_one_function_and_one_name(copy):
    (code,) = read_blocks("python")
    (change,) = read_blocks("diff")
    assert len(code.splitlines()) < 40
    first, body = code.split("\n", 1)
    module = copy / first.removeprefix("# ")
    module.write_text(module.read_text() + "\n\n" + body)
    parts = re.findall(r"--- (\S+), .*\n- +(.+)\n\+ +(.+)\n", change)
    assert len(parts) == 2
    for name, old, new in parts:
        place = copy / name
        assert place.read_text().count(old) == 1
        place.write_text(place.read_text().replace(old, new))
    done = use(copy)
    assert done.returncode == 0, done.stderr


def test_without_the_name_the_loss_is_refused(copy):
    done = use(copy)
    assert done.returncode != 0
    assert "focal" in done.stderr
