"""What must not leave: case ids, folders, user names and passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medssl.config import InputError
from medssl.run_folder import RunFolder

Scrub = Callable[[str], str]


def make_scrub(folder: RunFolder, numbers: bool = True) -> Scrub:
    """Return a function that takes case ids, folders and passwords out of a text.

    A case id becomes its pseudonym wherever it stands between characters that are no letters or
    digits. (In running text a number of one or two digits is left alone; without ``numbers`` all
    case ids of digits are.) Of a path its last part stays, of a URL everything but the password.
    """
    names = {k: v for k, v in folder.pseudonyms.items() if numbers or not k.isdigit()}
    ids = match_ids(name for name in names if not (name.isdigit() and len(name) < 3))
    roots = match_roots(folder)

    def scrub(text: str) -> str:
        if text in names:
            return names[text]
        text = roots.sub(lambda match: Path(match.group()).name, hide_password(text))
        if text.startswith(("/", "~/")):
            text = Path(text).name
        text = re.sub(r"sqlite:/{2,}(?:[^\s/]+/)*", "sqlite:", text)
        text = re.sub(r"(?<![\w./:-])~?/(?:[^\s/'\"]+/)+", "", text)
        return ids.sub(lambda match: names[match.group()], text)

    return scrub


def match_ids(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of names that stand alone; digits behind a decimal point do not."""
    longest_first = sorted(names, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first)) or "(?!)"
    return re.compile(rf"(?<![A-Za-z0-9])(?<!\d\.)(?:{either})(?![A-Za-z0-9])")


def match_roots(folder: RunFolder) -> re.Pattern[str]:
    """Return a pattern of the folders that this run has to do with."""
    root = folder.config.get("data", {}).get("root"), folder.splits.get("dataset", {}).get("root")
    paths = {str(path).rstrip(os.sep) for path in (*root, folder.path) if path}
    known = sorted((path for path in paths if os.sep in path), key=len, reverse=True)
    either = "|".join(map(re.escape, known)) or "(?!)"
    return re.compile(rf"(?<![\w.])(?:{either})(?![\w-])")


def hide_password(uri: str) -> str:
    """Return a URL without user name and password."""
    return re.sub(r"://[^/@\s]+@", "://", uri)


def scrub_tree(value: Any, scrub: Scrub) -> Any:
    """Return plain data with every text, keys included, scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(str(key)): scrub_tree(item, scrub) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_tree(item, scrub) for item in value]
    return value


def refuse_names(path: Path, found: Iterable[str]) -> None:
    """Refuse a file that others made for going out if something was found in it.

    Raises:
        InputError: It holds a case_id or a path; it stays here.
    """
    for text in found:
        raise InputError(
            f"{path} holds a case_id or a path, {text.strip()[:80]!r}, and so was not sent to "
            "MLflow; medssl never writes one there: make the file again with this version"
        )
