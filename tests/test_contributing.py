"""The worked examples of docs/contributing.md do what they say."""

import contextlib
import importlib.util
import itertools
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from medssl.config import InputError
from medssl.objective import load_objective
from medssl.settings import load_config

ROOT = Path(__file__).parent.parent
LAWS = ROOT / "tests" / "test_robust.py"
GUIDE = ROOT / "docs" / "contributing.md"


def read_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@contextlib.contextmanager
def import_copy(root):
    """Import medssl from a copy; what was imported before comes back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list_imported():
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(root)
        try:
            yield
        finally:
            for name in list_imported():
                del sys.modules[name]


def list_imported():
    return [name for name in sys.modules if name.split(".")[0] == "medssl"]


def choose_focal_loss():
    """Return the loss that a run with `losses.pseudo_label.name=focal` has."""
    from medssl.objective import find_loss
    from medssl.settings import load_config

    config = load_config(None, ["losses.pseudo_label.name=focal"]).config
    return find_loss(config.losses.pseudo_label.name)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and its presets."""
    shutil.copytree(ROOT / "medssl", tmp_path / "medssl")
    if not (tmp_path / "medssl" / "configs").is_dir():
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def check_laws(name):
    """Run what tests/test_robust.py holds of every loss on one of them, of the copy."""
    spec = importlib.util.spec_from_file_location("robust_of_the_copy", LAWS)
    laws = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laws)
    loss, count = laws.ROBUST[name], 0
    for law in vars(laws).values():
        marks = {m.args[0]: list(m.args[1]) for m in getattr(law, "pytestmark", ())}
        if loss not in marks.pop("loss", ()):
            continue
        count += 1
        for values in itertools.product(*marks.values()):
            law(loss=loss, **dict(zip(marks, values, strict=True)))
    return count


def test_the_worked_example_adds_a_loss_with_one_function_and_one_name(copy):
    code, _ = read_blocks("python")
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
    with import_copy(copy):
        import medssl
        from medssl.losses.supervised import ce

        assert medssl.__file__.startswith(str(copy))
        loss = choose_focal_loss()
        torch.manual_seed(0)
        logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
        torch.testing.assert_close(loss(logits, target, gamma=0.0), ce(logits, target))
        assert loss(logits, target) < ce(logits, target)
        assert check_laws("focal") > 5


def test_the_worked_example_adds_a_term_that_moves_the_student(tmp_path, monkeypatch):
    _, code = read_blocks("python")
    first, body = code.split("\n", 1)
    (tmp_path / first.removeprefix("# ")).write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = re.findall(r"`objective=(\S+)`", GUIDE.read_text(encoding="utf-8"))
    config = load_config(None, [f"objective={name}", "filter.uncertainty.online_passes=2"]).config
    student = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.Dropout3d(0.1))
    objective = load_objective(config.objective)(student, config, ["background", "a", "b"])
    weak, weight = torch.randn(2, 1, 6, 6, 6), torch.ones(2, 1, 6, 6, 6)
    labeled = {"image": weak, "label": torch.ones(2, 1, 6, 6, 6).byte(), "weight": weight}
    unlabeled = {"weak": weak, "strong": weak, "weight": weight}
    terms = objective(labeled, unlabeled, 0.5, torch.Generator())
    assert set(terms) > {"supervised", "mirrored"}
    terms["mirrored"].backward()
    assert student[0].weight.grad.abs().max() > 0
    assert set(objective(labeled, None, 0.5, torch.Generator())) == {"supervised"}


def test_without_the_name_the_loss_is_refused():
    with pytest.raises(InputError, match="focal"):
        choose_focal_loss()
