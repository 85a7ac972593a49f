"""Resolve a configuration: presets, YAML and key=value merged, all mistakes reported at once.

Order of precedence: defaults < preset (``method``) < YAML < ``key.path=value``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from medssl.config import Config, InputError, show_value

MOST_BYTES = 2**17  # of a YAML file: a configuration has some hundred lines
MOST_LETTERS = 10_000  # of a value on the command line
MOST_NESTED = 12
MOST_REPORTED = 20  # mistakes in one message

SHORTCUTS = {
    "labeled": "data.labeled",
    "unlabeled": "data.unlabeled",
    "test": "data.test",
    "draw": "data.draw",
    "seed": "train.seed",
    "rounds": "train.rounds",
    "steps": "train.steps",
    "device": "train.device",
}
"""Keys that also work at the top level of the command line and of a YAML."""

_OTHER_WORDS = {
    "batchsize": "train.batch",
    "learningrate": "train.lr",
    "epochs": "train.steps",
    "iterations": "train.steps",
    "maxsteps": "train.steps",
    "numworkers": "train.workers",
    "gpu": "train.device",
    "amp": "train.precision",
    "model": "network.name",
    "classes": "data.labels",
    "roisize": "plan.patch_size",
}
"""Keys of other programs, without their hyphens, and what they are called here."""

_NAMED_INSIDE = ("data.labels", "losses.pseudo_label.options")  # settings with keys of their own


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value came from (dotted key -> source)."""

    config: Config
    sources: dict[str, str]


class _PlainLoader(yaml.SafeLoader):
    """YAML loader of plain values: what PyYAML would take silently for something else is not.

    Of duplicate keys it keeps the last; 010 is 8 for it, 1:30 is 90, 1e-3 a text, 2026-11-29 no
    text; and anchors of anchors fill any memory.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, or refuse it where a key stands twice."""
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):  # such as {{ name }}, a placeholder of templates
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED_TAGS = {_INTEGER, _FLOAT, "tag:yaml.org,2002:timestamp"}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in kinds if tag not in _REPLACED_TAGS]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
_PlainLoader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_PlainLoader.add_implicit_resolver(
    _FLOAT, re.compile(rf"(?:{_NUMBER}|\.(?:nan|NaN|NAN))$"), list("-+.0123456789")
)


def _read_integer(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    """Return an integer; of more digits than any machine counts with it is none."""
    text = str(loader.construct_scalar(node))
    if len(text) > 100:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    return int(text)


_PlainLoader.add_constructor(_INTEGER, _read_integer)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        yaml.YAMLError: It is none, or uses what a configuration has no use for.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_PlainLoader):
        wrong, tag = None, getattr(event, "tag", None)
        where: Any = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            wrong = "anchors (&) and aliases (*) are not read: write the value out, or quote it"
        elif tag:
            wrong = f"tags such as {show_value(tag)} are not read here: write the value alone"
        elif depth > MOST_NESTED:
            wrong = f"more than {MOST_NESTED} brackets or sections are nested"
        if wrong:
            raise yaml.constructor.ConstructorError(None, None, wrong, where)
    return yaml.load(text, Loader=_PlainLoader)


def find_configs() -> Path:
    """Return the folder of the presets: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def list_methods() -> dict[str, Path]:
    """Return the presets by name."""
    return {path.stem: path for path in sorted((find_configs() / "methods").glob("*.yaml"))}


def load_config(
    first: str | Path | None = None, overrides: Sequence[str] = (), plan: Mapping[str, Any] = {}
) -> Resolved:
    """Resolve a configuration.

    Args:
        first: A CONFIG (ends in .yaml or .yml) or DATA (a folder or a list of cases).
        overrides: ``key.path=value``, values parsed as YAML.
        plan: Dotted keys that the plan decided, which replace ``auto`` only.

    Raises:
        InputError: Naming all mistakes at once, with the nearest valid key.
    """
    problems: list[str] = []
    by_user: dict[str, tuple[Any, str]] = {}
    if first is not None and str(first).endswith((".yaml", ".yml")):
        values = _spell_out(_read_yaml(Path(first)), problems)
        by_user = {key: (value, str(first)) for key, value in values.items()}
    elif first is not None:
        by_user = {"data.root": (str(first), "command line")}
    values = _parse_overrides(overrides, problems)
    by_user |= {key: (value, "command line") for key, value in values.items()}
    method = str(by_user.get("method", ("default", "default"))[0])
    preset = _read_method(method, problems)
    merged = {key: (value, f"method {method}") for key, value in preset.items()} | by_user
    config = _validate(merged, problems)
    if plan:
        values = _flatten(dump(config))
        merged |= {key: (value, "plan") for key, value in plan.items() if values.get(key) == "auto"}
        config = _validate(merged, problems)
    return Resolved(config, {key: _find_source(key, merged) for key in _flatten(dump(config))})


def _find_source(key: str, merged: Mapping[str, tuple[Any, str]]) -> str:
    """Return where a dotted key, or the section that holds it, was given."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in merged:
            return merged[prefix][1]
    return "default"


def dump(config: Config) -> dict[str, Any]:
    """Return a configuration as plain types, ready for YAML or JSON."""
    result: dict[str, Any] = config.model_dump(mode="json")
    return result


def describe_terms(config: Config) -> str:
    """Return the terms of the objective that are on, in a line."""
    if not config.train.rounds:
        return f"supervised {config.losses.supervised.name}"
    target, losses = config.target, config.losses
    parts = [f"supervised {losses.supervised.beside_pseudo_labels}"]
    if losses.pseudo_label.weight:
        how = f"{target.kind} labels" + (", transport" if target.assignment != "argmax" else "")
        parts.append(f"pseudo-label {losses.pseudo_label.name} ({how})")
    if losses.entropy.weight:
        parts.append(f"entropy of order {losses.entropy.order:g}")
    if losses.consistency.weight:
        parts.append(f"consistency {losses.consistency.name}")
    used = [f"threshold {config.filter.threshold.name}"]
    used += [f"uncertainty {config.filter.uncertainty.source}", f"mixing {config.noise.mixing}"]
    extra = [text for text in used if not text.endswith(" none")]
    teacher = " and ".join(config.teacher.source).replace("_", " ")
    rounds = f"{config.train.rounds} round" + ("s" if config.train.rounds > 1 else "")
    return f"{' + '.join(parts)}; {', '.join([f'teacher {teacher}', *extra, rounds])}"


def render(resolved: Resolved, only_given: bool = False) -> str:
    """Return the configuration as text, one dotted key a line with its source.

    Args:
        resolved: The configuration.
        only_given: Leave out defaults, and what the preset or the plan decided.
    """
    values = _flatten(dump(resolved.config))
    if only_given:
        sources = {key: resolved.sources.get(key, "default") for key in values}
        values = {k: v for k, v in values.items() if not _is_decided(sources[k])}
    texts = {
        key: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        for key, value in values.items()
    }
    texts = {key: text.replace("\n...\n", "").strip() for key, text in texts.items()}
    width = max((len(f"{key}: {text}") for key, text in texts.items()), default=0)
    width = min(width, 72)
    return "\n".join(
        f"{f'{key}: {text}':<{width}}  # {resolved.sources.get(key, 'default')}"
        for key, text in texts.items()
    )


def _is_decided(source: str) -> bool:
    """Tell whether a value comes from a default, a preset or the plan, and not from the user."""
    return source in ("default", "plan") or source.startswith("method ")


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; every way in which that fails is an InputError."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such configuration file{hint}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(
            f"{path}: {size} bytes are no configuration, which has {MOST_BYTES} at most; DATA is a "
            "folder or a list that ends in .csv or .json"
        )
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error.reason}); save it with that encoding"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a valid YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines, got {type(content).__name__}")
    return content


def _read_method(name: str, problems: list[str]) -> dict[str, Any]:
    """Read the preset of a method, given by name or by file."""
    if name.endswith((".yaml", ".yml")):
        values = _spell_out(_read_yaml(Path(name).expanduser()), problems)
        if "method" in values:
            problems.append(
                f"{name}: method={values['method']}: a preset builds on no other one; write out "
                "what it shall have of that"
            )
        return values
    methods = list_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(
            f"method: unknown preset {show_value(name)}; {hint}there are: {', '.join(methods)}"
        )
        return {}
    values = _flatten(_read_yaml(methods[name]))
    return {key: value for key, value in values.items() if not key.startswith("about.")}


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Parse ``key.path=value`` arguments; of two for the same key the later one counts."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(
                f"{show_value(text)}: expected key=value, as labeled=4 or train.lr=1e-3"
            )
        elif not value.strip():
            problems.append(
                f"{show_value(text)}: a value is missing; leave the key out, or say null"
            )
        elif len(text) > MOST_LETTERS:
            problems.append(f"{show_value(text)}: too long; write it into a YAML file")
        else:
            try:
                values.update(_spell_out({key: parse_yaml(value)}, problems))
            except yaml.YAMLError as error:
                problems.append(f"{key}: {show_value(value)} cannot be read as a value: {error}")
    return values


def _spell_out(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return dotted keys, shortcuts by their full names, or name those that stand twice."""
    flat: dict[str, Any] = {}
    for key, value in _walk(tree):
        name = SHORTCUTS.get(key, key)
        if name in flat:
            problems.append(f"{name}: stands twice, in two ways of writing it")
        flat[name] = value
    return flat


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys for nested sections."""
    return dict(_walk(tree))


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; class names of ``data.labels`` stay together."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name != "data.labels":
            yield from _walk(value, f"{name}.")
        else:
            yield name, value


def _unflatten(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return nested sections for dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        if len(parents) > MOST_NESTED:
            problems.append(f"{show_value(key)}: unknown key; `medssl config` lists all keys")
            continue
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                problems.append(f"{key}: {parent!r} is given both a value and keys below it")
                child = {}
            node = child
        node[last] = value
    return tree


def _validate(merged: Mapping[str, tuple[Any, str]], problems: list[str]) -> Config:
    """Build the configuration, or raise one error that names every mistake."""
    tree = _unflatten({key: value for key, (value, _) in merged.items()}, problems)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = problems + _explain_all(error.errors())
        config = Config()
    if problems:
        items = [f"  - {problem}" for problem in dict.fromkeys(problems)]
        more = len(items) - MOST_REPORTED
        lines = "\n".join(items[:MOST_REPORTED] + ([f"  - and {more} more"] if more > 0 else []))
        plural = "mistake" if len(items) == 1 else "mistakes"
        raise InputError(f"{len(items)} {plural} in the configuration:\n{lines}")
    return config


def _explain_all(items: Sequence[Any]) -> list[str]:
    """Say each validation error in a sentence: key, problem, value, nearest valid key."""
    valid = list(_list_keys(Config))
    unknown: dict[str, None] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    for item in items:
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            key = next(iter(_flatten({".".join(path): item["input"]})))
            is_searched = (
                len(unknown) < MOST_REPORTED
            )  # to look for the nearest of thousands takes minutes
            unknown[
                _explain_key(key, valid) if is_searched else f"{show_value(key)}: unknown key"
            ] = None
            continue
        while path and ".".join(path) not in valid:
            path.pop()  # the rest names a member of a union, or a place in a list
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = "a value is missing"
        if item["type"] == "tuple_type":
            message = "Input should be a list, such as [1, 2]"
        value = f" (got {show_value(item['input'])})" if path else ""
        wrong.setdefault((".".join(path), value), []).append(message + _offer_choice(item))
    sentences = [
        f"{key}: {'; or: '.join(dict.fromkeys(m))}{value}" if key else m[0]
        for (key, value), m in wrong.items()
    ]
    return [*unknown, *sentences]


def _explain_key(key: str, valid: Sequence[str]) -> str:
    """Say what an unknown key may have meant."""
    first, _, rest = key.partition(".")
    last = key.split(".")[-1]
    near = [name for name in valid if name.split(".")[-1] == last]
    if rest and not near:
        near = [f"{name}.{rest}" for name in _NAMED_INSIDE if name.endswith(f".{first}")]
    near = near or [name for name in [_OTHER_WORDS.get(_squeeze(last))] if name]
    near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`medssl config` lists all keys"
    return f"{key if len(key) <= 100 else show_value(key)}: unknown key; {hint}"


def _offer_choice(item: Any) -> str:
    """Return a hint to the choice that a name is nearest to, whatever its case."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    choices = re.findall("'([^']+)'", item["ctx"]["expected"])
    near = difflib.get_close_matches(_squeeze(item["input"][:100]), map(_squeeze, choices), n=1)
    named = [choice for choice in choices if near == [_squeeze(choice)]]
    return f"; did you mean {named[0]}?" if named else ""


def _squeeze(word: str) -> str:
    """Return a word in lower case and without what parts it."""
    return re.sub(r"[-_ ]", "", word.lower())


def _list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a section."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _list_keys(kind, f"{prefix}{name}.")
    if not prefix:
        yield from SHORTCUTS


def hash_config(config: Config, ignore: Sequence[str] = ()) -> str:
    """Return a hash of what decides the result: not device, workers, logging or tracking.

    Args:
        config: The resolved configuration.
        ignore: Keys to leave out as well; one that ends in a dot stands for all below it.
    """
    deciding = _list_deciding(config, ignore)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def list_changes(old: Config, new: Config, ignore: Sequence[str] = ()) -> list[str]:
    """Say which settings decide another result than before, with both values.

    Args:
        old: The resolved configuration of before.
        new: That of now.
        ignore: Keys to leave out, as of `hash_config`.
    """
    before, now = (_list_deciding(config, ignore) for config in (old, new))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} is {before.get(key)} there and {now.get(key)} here" for key in keys]


_ADDED = {
    "data.unlabeled": "all",
    "teacher.probs": "clean",
    "filter.uncertainty.online_passes": "auto",
    "filter.uncertainty.fidelity": "full",
    "train.student_lr": "auto",
}
"""Settings that 0.1.0 did not have, with the values that mean what it did: its runs go on."""

_RENAMED = {
    ("method", "classic"): "default",
    ("validation", "fifth"): "auto",
    ("network.encoder", "auto"): "resnet18",
}
"""What stands for a value of 0.1.0 now, and that value."""


_PINNED = ("default", "dice_ce")
"""A preset that named the loss of its students, which was that of round 0, and that loss."""


def _list_deciding(config: Config, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the settings that decide the result, by dotted key."""
    values = _flatten(dump(config))
    skipped: tuple[str, ...] = (
        "tracking.", "train.device", "train.workers", "train.log_every", "train.checkpoint_every",
        "data.root",
    )  # fmt: skip
    skipped = (*skipped, *(key for key in ignore if key.endswith(".")))
    deciding = {k: v for k, v in values.items() if not k.startswith(skipped) and k not in ignore}
    deciding = {k: v for k, v in deciding.items() if k not in _ADDED or v != _ADDED[k]}
    key = "losses.supervised.student"
    if deciding.get(key) == "auto" and (config.method, config.losses.supervised.name) == _PINNED:
        deciding[key] = config.losses.supervised.name
    return {k: _RENAMED.get((k, str(v)), v) for k, v in deciding.items()}
