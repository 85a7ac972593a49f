"""What must not leave: case ids, paths, names of files, user names and passwords.

One rule for all that goes out: for MLflow, for the delivered model and for a report that is shared.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.config import InputError, hide_password
from medssl.run_folder import RunFolder

PATH = "[path]"
"""What stands in the place of a path or a name of a file."""

_ENDINGS = "nii|gz|nrrd|mha|mhd|dcm|png|jpe?g|tiff?|csv|jsonl?|ya?ml|np[yz]|db|txt|html|pth?"
_PATHS = re.compile(
    r"(?<=sqlite:)/+\S+|(?<=file:)/+\S+"
    r"|(?:^|(?<=[\s'\"`([{<>=:;,|]))(?!(?<=:)//)(?:[~.]{0,2}[\\/]|[a-z]:[\\/])\S+"
    rf"|[^\s,;:'\"()]*\.(?:{_ENDINGS})\b",
    re.IGNORECASE,
)
_STARTS = re.compile(r"(?<![A-Za-z0-9])(?<!\d\.)(?=.)", re.DOTALL)  # of words; not of decimals
_GOES_ON = re.compile(r"[A-Za-z0-9]")
_WHOLE = re.compile(r"(?:~?/|[A-Za-z]:[\\/]).*?(?=: |$)")


@dataclass(frozen=True)
class Names:
    """How cases and texts are shown: as they are, or fit to leave.

    Attributes:
        pseudonyms: Of every case that the run knows.
        roots: The folders that the run has to do with.
        shared: Whether names and paths are hidden; otherwise all is shown as it is.
        numbers: Whether a case id of digits alone is hidden too; not in what is full of numbers.
    """

    pseudonyms: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    shared: bool = True
    numbers: bool = True

    def name_case(self, case_id: str) -> str:
        """Return the name to show for a case; an unknown one is not shown when shared."""
        return self.pseudonyms.get(case_id, "case ?") if self.shared else case_id

    def clean_text(self, text: str) -> str:
        """Return a text, when shared without case ids, paths, names of files and passwords.

        A case id becomes its pseudonym wherever it stands between characters that are no letters
        or digits; in running text a number of one or two digits is left alone. A text that begins
        as a path does is one up to the first colon, since paths may hold spaces.
        """
        if not self.shared:
            return text
        if text in self.pseudonyms and (self.numbers or not text.isdigit()):
            return self.pseudonyms[text]
        text = _WHOLE.sub(PATH, text, count=1) if _WHOLE.match(text) else text
        text = _PATHS.sub(PATH, self._roots.sub(PATH, hide_password(text)))
        parts, end = [], 0
        for start, case_id in self._find_ids(text):
            parts += [text[end:start], self.pseudonyms[case_id]]
            end = start + len(case_id)
        return "".join([*parts, text[end:]])

    def clean_tree(self, value: Any) -> Any:
        """Return plain data with every text, keys included, fit to be shown.

        A value without spaces in which a slash stands is a path, also one that begins with no dot.
        """
        if isinstance(value, str):
            is_path = self.shared and re.fullmatch(r"\S*[\\/]\S*", value)
            return PATH if is_path and value not in self.pseudonyms else self.clean_text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.clean_tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean_tree(item) for item in value]
        return value

    def _key(self, key: object) -> object:
        """Return a key fit to be shown."""
        return self.clean_text(key) if isinstance(key, str) else key

    def find_names(self, text: str) -> list[str]:
        """Return the case ids and known folders that stand in a text that was made to be shown."""
        return [*(case_id for _, case_id in self._find_ids(text)), *self._roots.findall(text)]

    def _find_ids(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the case ids that stand alone, with their places; of several the longest.

        They are looked up by their lengths: a pattern of a hundred thousand ids would be tried at
        each letter.
        """
        end = 0
        for start in (match.start() for match in _STARTS.finditer(text)):
            for length in self._lengths if start >= end else ():
                case_id = text[start : start + length]
                if case_id in self._ids and not _GOES_ON.match(text, start + len(case_id)):
                    yield start, case_id
                    end = start + len(case_id)
                    break

    @functools.cached_property
    def _ids(self) -> frozenset[str]:
        """The case ids that are looked for in running text."""
        ids = (i for i in self.pseudonyms if not i.isdigit() or (self.numbers and len(i) > 2))
        return frozenset(filter(None, ids))

    @functools.cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Their lengths, the largest first."""
        return tuple(sorted({len(case_id) for case_id in self._ids}, reverse=True))

    @functools.cached_property
    def _roots(self) -> re.Pattern[str]:
        """The folders, with what follows them; a bare word is one only where a path goes on."""
        paths = {root.rstrip("\\/") for root in self.roots}
        known = _either(path for path in paths if re.search(r"[\\/]", path))
        words = _either(path for path in paths if path and not re.search(r"[\\/.]", path))
        return re.compile(rf"(?<![\w.])(?:(?:{known})(?![\w-])|(?:{words})(?=[\\/]))\S*")


def _either(texts: Iterable[str]) -> str:
    """Return a pattern of any of the texts, the longest first; of none nothing matches."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def choose_names(folder: RunFolder) -> Names:
    """Return the names under which a run may leave; a case without a pseudonym gets a number."""
    known = {str(row["case_id"]) for row in folder.rows}
    for part in ("labeled", "unlabeled", "val", "test"):
        known.update(folder.list_part(part))
    for entry in folder.rounds:
        known.update(str(row["case_id"]) for row in (*entry.review, *entry.rows))
    pseudonyms = dict(folder.pseudonyms)
    for index, case_id in enumerate(sorted(known - set(pseudonyms)), 1):
        pseudonyms[case_id] = f"case_{index:03d}"
    about, data = folder.splits.get("dataset") or {}, folder.config.get("data") or {}
    roots = (*(about.get(key) for key in ("root", "source", "url")), data.get("root"), folder.path)
    return Names(pseudonyms, tuple(str(root) for root in roots if root))


def refuse_names(path: Path, texts: Iterable[str]) -> None:
    """Refuse to send a file in which case ids or paths stand: ``texts`` are those found in it.

    Raises:
        InputError: It holds a case_id or a path; it stays here.
    """
    for text in texts:
        raise InputError(
            f"{path} holds a case_id or a path, {text.strip()[:80]!r}, and so was not sent to "
            "MLflow; medssl never writes one there: make the file again with this version"
        )
