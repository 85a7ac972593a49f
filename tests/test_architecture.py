# The rules of the house, held by a walk over the syntax trees: nothing is imported to check it.
# Each rule is a function (module, source) -> problems, with a control that has to go red.
import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only what stands above it, or beside it in the same package.
LAYERS = (
    "__init__",
    "config",
    "settings",
    "ranks",
    "machine",
    "beside",
    "runs",
    "metrics",
    "run_folder",
    "names",
    "tracking",
    "losses",
    "networks",
    "transforms",
    "formats",
    "overlays",
    "data",
    "sides",
    "windows",
    "plan",
    "pseudo",
    "objective",
    "cross_pseudo",
    "predict",
    "costs",
    "train",
    "evaluate",
    "rounds",
    "cross_check",
    "compare",
    "report",
    "export",
    "doctor",
    "cli",
    "__main__",
)
HEAVY = {
    "torch",
    "monai",
    "nibabel",
    "mlflow",
    "scipy",
    "matplotlib",
    "segmentation_models_pytorch",
}
INSTANT = (
    "medssl.config",
    "medssl.settings",
    "medssl.runs",
    "medssl.cli",
    "medssl.data.cases",
    "medssl.formats.readers",
)
RIVALS = {"nnunetv2"}  # of the extra `peers`: measured beside ours where it is installed
ARTEFACTS = {"torchio"}  # of the extra `robust`
NAMELESS = {"util", "utils", "helper", "helpers", "common", "core", "engine", "misc"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {
    "eval",
    "exec",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.Loader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
HOME = re.compile(r"(?<![\w.])(?:/(?:home|Users|root)/|[A-Z]:\\Users\\)\w")


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def python_files(*folders: str) -> list[tuple[str, str]]:
    """(module, source) of every Python file in these folders."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [(name_module(path), path.read_text(encoding="utf-8")) for path in paths]


def imported_names(module: str, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import, also inside functions and under TYPE_CHECKING, with its full dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*module.split(".")[: -node.level], *base]
            yield from ((node, ".".join([*base, alias.name])) for alias in node.names)


def literal_imports(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """import_module("name") and __import__("name") with the name written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__"):
                yield node, str(node.args[0].value)


def all_imports(module: str, source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    found = [*imported_names(module, tree), *literal_imports(tree)]
    return [(node.lineno, name) for node, name in found]


# ---------------------------------------------------------------- the rules


def find_layer_problems(module: str, source: str) -> list[str]:
    own = module.split(".")[1]
    if own not in LAYERS:
        return [f"{module} has no place in LAYERS"]
    problems = []
    for line, name in all_imports(module, source):
        package, _, rest = name.partition(".")
        layer = rest.split(".")[0]
        if package in ("scripts", "tests"):
            problems.append(f"{module}:{line} imports {name}, which only people run")
        elif package == "medssl" and layer != "__version__":
            if layer not in LAYERS:
                problems.append(f"{module}:{line} imports {name}, which has no place in LAYERS")
            elif LAYERS.index(layer) > LAYERS.index(own):
                problems.append(f"{module}:{line} imports {name}, which stands below it")
    return problems


def find_mlflow_imports(module: str, source: str) -> list[str]:
    if module.startswith("medssl.tracking."):
        return []
    imports = all_imports(module, source)
    return [f"{module}:{n} imports {x}" for n, x in imports if x.split(".")[0] == "mlflow"]


def find_heavy_imports(module: str, source: str) -> list[str]:
    """Heavy imports outside functions: those that run when the module is imported."""
    if module not in INSTANT:
        return []
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, functions)
        for node in ast.walk(function)
    }
    return [
        f"{module}:{node.lineno} imports {name} at its top"
        for node, name in imported_names(module, tree)
        if id(node) not in inside and name.split(".")[0] in HEAVY
    ]


def find_undeclared_imports(module: str, source: str) -> list[str]:
    """Imports of packages that pyproject.toml does not name; what comes along today may not."""
    declared, providers = read_dependencies(with_tools=module.startswith("scripts."))
    scripts = {path.stem for path in (ROOT / "scripts").iterdir()}
    own = {"medssl", *scripts, *sys.stdlib_module_names}
    if module.startswith(("scripts.benchmark", "scripts.peers")):
        own |= {*RIVALS, "step"}
    if module.startswith("scripts.robustness"):
        own |= ARTEFACTS
    return [
        f"{module}:{line} imports {name}, which is no dependency"
        for line, name in all_imports(module, source)
        if (package := name.split(".")[0]) not in own
        and not declared & {normalize(found) for found in providers.get(package, [package])}
    ]


@functools.cache
def read_dependencies(with_tools: bool) -> tuple[set[str], Mapping[str, list[str]]]:
    """What pyproject.toml names, and which distributions are installed for each import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["dependencies"], *(project["optional-dependencies"]["dev"] * with_tools)]
    declared = {normalize(re.split(r"[^\w.-]", text)[0]) for text in named}
    return declared, importlib.metadata.packages_distributions()


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find_unsafe_loading(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    aliases = dict(local_names(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = {id(call.func) for call in calls if is_safe_load(resolve(call.func, aliases), call)}
    problems = [
        f"{module}:{line} imports {name}"
        for line, name in all_imports(module, source)
        if name.split(".")[0] in PICKLES
    ]
    for node in ast.walk(tree):
        name = resolve(node, aliases)
        if name in UNSAFE:
            problems.append(f"{module}:{node.lineno} uses {name}")
        elif name in SAFE_ONLY_WITH and id(node) not in safe:
            key, value = SAFE_ONLY_WITH[name]
            problems.append(f"{module}:{node.lineno} uses {name} without {key}={value}")
    return problems


def local_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a module calls the things that it imports, and their full dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def resolve(node: ast.AST, aliases: dict[str, str]) -> str:
    """The full dotted name that a name or an attribute stands for, if it is one."""
    if isinstance(node, ast.Attribute):
        return f"{resolve(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def is_safe_load(name: str, call: ast.Call) -> bool:
    key, value = SAFE_ONLY_WITH.get(name, ("", None))
    return any(
        keyword.arg == key
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is value
        for keyword in call.keywords
    )


def find_nameless_modules(module: str, source: str = "") -> list[str]:
    parts = {part.strip("_").lower() for part in module.split(".")}
    return [f"{module} does not say what it is about"] if parts & NAMELESS else []


def find_missing_docstrings(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else [module]
    return missing + [f"{module}.{name}" for name in undocumented(tree)]


def undocumented(parent: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Public functions and classes, and public methods of public classes, without a docstring."""
    for node in definitions(parent):
        if node.name.startswith("_"):
            continue
        if not (ast.get_docstring(node) or is_overload(node)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{node.name}.")


def definitions(
    parent: ast.AST,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a body, also those under an if, a try or a with."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from definitions(node)


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def find_home_paths(name: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [f"{name}:{number} {line.strip()[:120]}" for number, line in lines if HOME.search(line)]


def find_unplaced_masks(module: str, source: str) -> list[str]:
    """Masks and maps that are written without the header of their scan."""
    writers = {"write_mask": 6, "write_map": 4}  # arguments, the header last
    return [
        f"{module}:{call.lineno} writes a file without the header of its scan"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and len(call.args) < writers.get(call.func.id, 0)
        and "header" not in {keyword.arg for keyword in call.keywords}
    ]


def find_calls_of_the_current_gpu(module: str, source: str) -> list[str]:
    """Calls that without an argument go to the first GPU, whichever one the training uses."""
    tree = ast.parse(source)
    aliases = dict(local_names(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and not n.args + n.keywords]
    return [
        f"{module}:{call.lineno} calls {resolve(call.func, aliases)} without a device"
        for call in calls
        if re.fullmatch(
            r"torch\.cuda\.(synchronize|empty_cache|current_\w+|mem_get_info|get_(?!arch_list)\w+"
            r"|(max_)?memory_\w+|reset_\w+)",
            resolve(call.func, aliases),
        )
    ]


# ---------------------------------------------------------------- the house keeps them


def check(rule, *folders):
    problems = [problem for file in python_files(*folders) for problem in rule(*file)]
    assert not problems, "\n".join(problems)


def test_a_module_imports_only_what_stands_above_it():
    check(find_layer_problems, "medssl")


def test_only_tracking_knows_mlflow():
    check(find_mlflow_imports, "medssl", "scripts")


def test_every_mask_and_map_carries_the_place_of_its_scan():
    files = [file for file in python_files("medssl") if file[0] != "medssl.data.phantoms"]
    problems = [problem for file in files for problem in find_unplaced_masks(*file)]
    assert not problems, "\n".join(problems)


def test_what_asks_a_gpu_says_which():
    check(find_calls_of_the_current_gpu, "medssl", "scripts")


def test_every_package_that_is_imported_is_declared():
    check(find_undeclared_imports, "medssl", "scripts")


def test_what_the_command_line_needs_at_once_imports_nothing_heavy():
    check(find_heavy_imports, "medssl")
    modules = {module.removesuffix(".__init__") for module, _ in python_files("medssl")}
    assert set(INSTANT) <= modules  # else the rule would hold for want of a subject


@pytest.mark.parametrize("module", INSTANT)
def test_importing_it_loads_nothing_heavy_by_a_detour_either(module):
    code = f"import sys, {module}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_nothing_unpickles_or_evaluates_what_it_reads():
    check(find_unsafe_loading, "medssl", "scripts")


def test_every_module_has_a_name_that_says_something():
    check(find_nameless_modules, "medssl", "scripts", "tests")


def test_everything_public_has_a_docstring():
    check(find_missing_docstrings, "medssl")


def list_tracked(*options: str) -> list[Path]:
    """Files that git tracks; skips the test where there is no git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the tracked files")
    command = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_nothing_that_git_ignores_is_tracked():
    tracked = list_tracked("--cached", "--ignored", "--exclude-standard")
    assert not tracked, f"{len(tracked)} files, such as {tracked[0]}"


def test_no_tracked_file_names_a_home_folder():
    paths = [path for path in list_tracked() if path.is_file()]
    assert paths
    problems = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        problems += find_home_paths(str(path.relative_to(ROOT)), text)
    assert not problems, "\n".join(problems)


def test_every_layer_but_the_last_exists():
    modules = {module.split(".")[1] for module, _ in python_files("medssl")}
    assert set(LAYERS) - {"__main__"} <= modules  # a renamed layer must not leave a hole


# ---------------------------------------------------------------- and the rules can go red

RED = [
    (find_layer_problems, "medssl.losses.entropy", "import medssl.train"),
    (find_layer_problems, "medssl.losses.entropy", "from medssl import train"),
    (find_layer_problems, "medssl.losses.entropy", "from medssl.data.io import read_image"),
    (find_layer_problems, "medssl.losses.entropy", "from ..data import io"),
    (find_layer_problems, "medssl.losses.entropy", "from .. import data"),
    (find_layer_problems, "medssl.losses.__init__", "from ..data import io"),
    (find_layer_problems, "medssl.runs", "def f():\n    from medssl.cli import main"),
    (find_layer_problems, "medssl.runs", "if TYPE_CHECKING:\n    from medssl.plan import Plan"),
    (find_layer_problems, "medssl.runs", "import importlib\nimportlib.import_module('medssl.cli')"),
    (find_layer_problems, "medssl.config", "from medssl.runs import write_json"),
    (find_layer_problems, "medssl.__init__", "from medssl.config import Config"),
    (find_layer_problems, "medssl.train", "from medssl.nowhere import thing"),
    (find_layer_problems, "medssl.train", "from scripts.demo import main"),
    (find_layer_problems, "medssl.nowhere", "x = 1"),
    (find_mlflow_imports, "medssl.report.page", "import mlflow"),
    (find_mlflow_imports, "medssl.cli", "def ui():\n    from mlflow.server import run"),
    (find_mlflow_imports, "medssl.cli", "__import__('mlflow')"),
    (find_heavy_imports, "medssl.config", "import torch"),
    (find_heavy_imports, "medssl.runs", "from scipy import stats"),
    (find_heavy_imports, "medssl.cli", "import monai.data as data"),
    (find_heavy_imports, "medssl.cli", "if TYPE_CHECKING:\n    from nibabel import Nifti1Image"),
    (find_heavy_imports, "medssl.data.cases", "try:\n    import torch\nexcept ImportError: ..."),
    (find_undeclared_imports, "medssl.train", "import requests"),
    (find_undeclared_imports, "medssl.train", "def f():\n    from click.core import Group"),
    (find_undeclared_imports, "medssl.predict", "import torchio"),
    (find_unsafe_loading, "medssl.train", "import torch\ntorch.load(path)"),
    (find_unsafe_loading, "medssl.train", "import torch\ntorch.load(path, weights_only=False)"),
    (find_unsafe_loading, "medssl.train", "import torch as t\nt.load(path, weights_only=flag)"),
    (find_unsafe_loading, "medssl.train", "from torch import load\nload(path)"),
    (find_unsafe_loading, "medssl.train", "import torch\nlist(map(torch.load, paths))"),
    (find_unsafe_loading, "medssl.train", "import numpy as np\nnp.load(path)"),
    (find_unsafe_loading, "medssl.train", "import numpy as np\nnp.load(p, allow_pickle=True)"),
    (find_unsafe_loading, "medssl.train", "import numpy as np\nnp.load(path, **options)"),
    (find_unsafe_loading, "medssl.train", "from numpy import load as f\nf(path)"),
    (find_unsafe_loading, "medssl.train", "import pickle"),
    (find_unsafe_loading, "medssl.train", "from joblib import load"),
    (find_unsafe_loading, "medssl.config", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
    (find_unsafe_loading, "medssl.config", "x = eval(text)"),
    (find_unplaced_masks, "medssl.predict", "write_mask(path, mask, affine, values)"),
    (find_unplaced_masks, "medssl.predict", "write_map(path, array, affine)"),
    (find_calls_of_the_current_gpu, "medssl.train", "import torch\ntorch.cuda.synchronize()"),
    (find_calls_of_the_current_gpu, "medssl.train", "from torch import cuda\ncuda.mem_get_info()"),
    (find_nameless_modules, "medssl.data.utils", ""),
    (find_nameless_modules, "medssl.core.train", ""),
    (find_nameless_modules, "medssl._helpers", ""),
    (find_missing_docstrings, "medssl.train", "x = 1"),
    (find_missing_docstrings, "medssl.train", '"""Doc."""\ndef train(): ...'),
    (find_missing_docstrings, "medssl.train", '"""Doc."""\nasync def train(): ...'),
    (find_missing_docstrings, "medssl.train", '"""Doc."""\nclass Model: ...'),
    (
        find_missing_docstrings,
        "medssl.train",
        '"""Doc."""\nclass Model:\n    """Doc."""\n    def move(self): ...',
    ),
    (find_home_paths, "notes.md", "scans lie in /" + "home/anna/scans"),
    (find_home_paths, "notes.md", 'root: "/' + 'Users/anna/scans"'),
    (find_home_paths, "notes.md", "C:\\" + "Users\\anna"),
]
GREEN = [
    (find_layer_problems, "medssl.data.io", "from medssl.transforms.geometry import Volume"),
    (find_layer_problems, "medssl.losses.entropy", "from medssl.losses import mean_over_valid"),
    (find_layer_problems, "medssl.losses.__init__", "from . import entropy"),
    (find_layer_problems, "medssl.cli", "import torch\nfrom medssl import __version__, report"),
    (find_mlflow_imports, "medssl.tracking.store", "import mlflow"),
    (find_mlflow_imports, "medssl.train", "import mlflow_like_name"),
    (find_heavy_imports, "medssl.cli", "def train():\n    import torch"),
    (find_heavy_imports, "medssl.data.cases", "import numpy as np"),
    (find_heavy_imports, "medssl.train", "import torch"),
    (find_undeclared_imports, "medssl.train", "import yaml\nfrom PIL import Image\nimport re"),
    (find_undeclared_imports, "scripts.robustness.artefacts", "def f():\n    import torchio"),
    (find_unsafe_loading, "medssl.train", "import torch\ntorch.load(path, weights_only=True)"),
    (find_unsafe_loading, "medssl.train", "import numpy as np\nnp.load(p, allow_pickle=False)"),
    (find_unsafe_loading, "medssl.train", "import json\njson.load(file)\nnetwork.eval()"),
    (find_unplaced_masks, "medssl.predict", "write_mask(path, mask, affine, values, header=h)"),
    (find_unplaced_masks, "medssl.predict", "write_map(path, array, affine, header)"),
    (find_calls_of_the_current_gpu, "medssl.train", "import torch\ntorch.cuda.synchronize(gpu)"),
    (find_calls_of_the_current_gpu, "medssl.plan", "import torch\ntorch.cuda.is_available()"),
    (find_calls_of_the_current_gpu, "medssl.doctor", "import torch\ntorch.cuda.get_arch_list()"),
    (find_nameless_modules, "medssl.data.io", ""),
    (
        find_missing_docstrings,
        "medssl.train",
        '"""Doc."""\ndef _f(): ...\nclass A:\n    """Doc."""\n    def __len__(self): ...',
    ),
    (find_home_paths, "notes.md", "~/scans, https://example.org/home/scans, runs/root/x"),
]


@pytest.mark.parametrize(("rule", "module", "source"), RED)
def test_a_rule_goes_red_on_what_it_forbids(rule, module, source):
    assert rule(module, source)


@pytest.mark.parametrize(("rule", "module", "source"), GREEN)
def test_a_rule_stays_green_on_what_it_allows(rule, module, source):
    assert rule(module, source) == []
