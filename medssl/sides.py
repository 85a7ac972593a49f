"""Which classes have a side, by their names or by how they lie: those scans are never mirrored.

A mirrored left kidney looks like a right one. Where names leave doubt, the opened labels tell.
Axes: I J K voxel axes; in scans x points to the right, in pictures the columns are axis 1.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medssl.data.cases import Case
from medssl.data.io import read_label

Moments = tuple[float, NDArray[np.float64], NDArray[np.float64]]  # volume, mean (3,), covariance

LEAST_RATIO = 0.5  # of the smaller volume to the larger one
LEAST_ASIDE = 2.0  # how much farther two structures lie apart left-right than in other directions
LEAST_LIKENESS = 0.93  # of the mirrored shape, 1 for the same; heart chambers have 0.86
LEAST_VOXELS = 8
MOST_VOXELS = 100_000  # of a class that its place and shape are taken from
MOST_CASES = 12  # that are looked at


def fold_text(text: str) -> str:
    """Return a text in one case, without accents, full-width letters as common ones."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in unicodedata.normalize("NFKD", parts) if not unicodedata.combining(c))


_SIDE = re.compile(
    fold_text(
        r"l|r|lt|rt|lh|rh|lft|rgt|lhs|rhs|left(?!over)\w*|right(?!eous|ful)\w*"
        r"|(?!(?:over|hyper|eye)bright|(?:out|down|forth|copy|birth)right|\w*cleft)"
        r"\w{3,}(?:left|right)|\w*(?:links|rechts)\w*|linke(?!d)\w*|rechte(?!ck)\w*|recht"
        r"|gauches?|droite?s?|izquierd[oa]s?|izq(?:d[oa])?|izd[oa]|derech[oa]s?|dch[oa]?|drch[oa]?"
        r"|sinistr\w*|sinister|destr[oaie]|dex|dext|dexter|dextr(?:a|ae|am|um|i|o|us)?"
        r"|esquerd[oa]s?|esq|direit[oa]s?|vänster\w*|höger\w*|venstre\w*|højre\w*|høyre\w*"
        r"|vasen|vasem\w*|oikea\w*|lew(?:y|a|e|ego|ej)|praw(?:y|a|e|ego|ej)|l[ií]?j?ev(?:ý|á|é|i|o)"
        r"|prav(?:ý|á|é|eho|ej)|desn[aiou]|stâng(?:a|ul)?|drept(?:ul)?|dreapta|kiri|kanan"
        r"|trái|phải|лев(?:ый|ая|ое|ые|ого|ой|ую|ым|ом|ых)?|лево\w*|право\w*"
        r"|прав(?:ый|ая|ое|ые|ого|ой|ую|ым|ом|ых|ий|а|е|ої)?|лів(?:ий|а|е|ої)|ляв\w*|десен|десн\w*"
        r"|vasak\w*|parem(?:al|a|pool\w*)?|kair(?:ė|ysis|ioji|\w*inis)|dešin(?:ė|ysis|ioji|inis)"
        r"|esquerr[ae]s?|dret[as]?|چپ|راست|.*(?:ซ้าย|ขวา).*"
        r"|(?:좌|우)(?:신|폐|뇌|심|측|상|하|중|완|슬|대퇴).*"
        r"|αριστερ\w*|δεξι\w*|(?:ال)?(?:يسار|أيسر|يسرى|يمين|أيمن|يمنى)|שמאל\w*|ימין|ימני\w*"
        r"|.*[左右].*|.*(?:ひだり|みぎ|ヒダリ|ミギ|왼|오른|좌측|우측).*"
    )
)
_SHORT = re.compile("sin|der|dir|dx|sx|sn|li|re|gche|dte")  # as a last word; der Kopf, sin tumor
_INSIDE = (
    *(("l", "r"), ("left", "right"), ("links", "rechts"), ("izq", "der"), ("esq", "dir")),
    (fold_text("좌"), fold_text("우")),
)
"""What may stand anywhere in a name for the one side and the other: lkid, rkid."""
_ALONE = (
    *_INSIDE, ("g", "d"), ("e", "d"), ("i", "d"), ("s", "d"), ("sin", "dx"), ("sin", "dex"),
    ("sin", "dext"), ("sx", "dx"), ("sn", "dx"), ("v", "h"), ("li", "re"), ("l", "p"), ("л", "п"),
    ("v", "o"), ("л", "пр"), ("sol", fold_text("sağ")), ("bal", "jobb"), ("va", "ho"),
    ("gche", "dte"),
)  # fmt: skip
"""Words, or letters, that mean sides in one language or another where two names differ in them."""
_LONGEST_INITIALS = 3  # letters of a word that stands for several, one of which may be the side
_VERTEBRA = re.compile("(vert|lumb|wirb|spin|dis[ck]|lend|colon)\\w*")  # before L 3


def find_sided(names: Iterable[str]) -> list[str]:
    """Return the names that have a side, in their order.

    A name has a side if one of its words means one, or if another name differs in that alone:
    `lkid` and `rkid`, `LV` and `RV`. `bright`, `cleft`, `L3` and `lv` without `rv` have none.

    Example:
        >>> find_sided(["liver", "lkid", "rkid", "L3", "rein gauche"])
        ['lkid', 'rkid', 'rein gauche']
    """
    split = {name: split_words(name) for name in names}
    pairs = _find_pairs(split)
    return [name for name, words in split.items() if name in pairs or _has_side(words)]


def split_words(name: str) -> list[str]:
    """Return the words of a name, folded; camelCase, digits and other signs part them.

    An `l` or `r` keeps the digit behind it (L3), or the apostrophe (l'aorta).

    Example:
        >>> split_words("leftKidney_2")
        ['left', 'kidney', '2']
    """
    text = unicodedata.normalize("NFKC", name)
    parted = "".join(
        f" {c}" if c.isupper() and _starts_word(text, place) else c for place, c in enumerate(text)
    )
    return re.findall(r"(?:(?<![^\W\d_])[lr](?:\d+|['’]))|[^\W\d_]+|\d+", fold_text(parted))


def _starts_word(text: str, place: int) -> bool:
    """Return whether a capital starts a word: after a small letter, or LKidney."""
    before, after = text[place - 1 : place], text[place + 1 : place + 3]
    return before.islower() or (before.isupper() and len(after) == 2 and after.islower())


def _has_side(words: Sequence[str]) -> bool:
    """Return whether one of the words of a name means a side, whatever the other names are."""
    letters = [word for word in words if not word.isdigit()]
    if letters and _SHORT.fullmatch(letters[-1]):
        return True
    for place, word in enumerate(words):
        is_level = words[place + 1 : place + 2] and words[place + 1].isdigit() and word in "lr"
        if is_level and (place == 0 or _VERTEBRA.fullmatch(words[place - 1])):
            continue
        if _SIDE.fullmatch(word):
            return True
    return False


def _find_pairs(split: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the names that differ from another one only in the side."""
    sided: set[str] = set()
    families: dict[tuple[object, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, words in split.items():
        for place, word in enumerate(words):
            others = (place, *words[:place], None, *words[place + 1 :])
            families[others].append((name, word))
            for index, letter in enumerate(word if len(word) <= _LONGEST_INITIALS else ""):
                families[others, word[:index], word[index + 1 :]].append((name, letter))
    for members in families.values():
        if len(members) == 2 and any(  # a, b, c, d and e are no sides
            {members[0][1], members[1][1]} == set(pair) for pair in _ALONE
        ):
            sided |= {name for name, _ in members}
    texts = {name: " ".join(words) for name, words in split.items()}
    for (one, first), (other, second) in itertools.permutations(texts.items(), 2):
        if any(second in _swap(first, *pair) for pair in _INSIDE):
            sided |= {one, other}
    return sided


def _swap(text: str, left: str, right: str) -> set[str]:
    """Return the texts in which one left has become a right."""
    return {
        text[: match.start()] + right + text[match.end() :] for match in re.finditer(left, text)
    }


def find_mirrored(
    cases: Sequence[Case], label_values: tuple[int, ...], ignore: int | None, axis: int
) -> tuple[tuple[int, int] | None, bool]:
    """Return two classes that lie as left and right do, and whether all were compared.

    Both are about equally large and lie side by side, the same one always on the same side; in a
    mirror one has the shape of the other.

    Args:
        cases: Labeled cases; some of them are opened.
        label_values: Value of each class index.
        ignore: Value that means: not annotated.
        axis: The axis of the mirror: 0 (right) of scans, 1 (columns) of pictures.

    Returns:
        Two class indices or None, and whether every two classes occur together in a label.
    """
    classes = range(1, len(label_values))
    if len(classes) < 2:
        return None, True
    labeled = [case for case in cases if case.label is not None]
    chosen = labeled[:: -(-len(labeled) // MOST_CASES) or 1]
    comparisons: dict[tuple[int, int], list[tuple[float, ...]]] = defaultdict(list)
    for case in chosen:
        if case.label is None:
            continue
        moments = _measure_moments(
            *read_label(case.label, label_values, ignore, case), len(label_values)
        )
        for one, other in itertools.combinations(moments, 2):
            comparisons[one, other].append(_compare(moments[one], moments[other], axis))
    scores = [
        (float(np.median([row[3] for row in rows])), pair)
        for pair, rows in comparisons.items()
        if _are_mirrored(np.array(rows))
    ]
    pair = max(scores)[1] if scores else None
    return pair, set(comparisons) == set(itertools.combinations(classes, 2))


def _are_mirrored(rows: NDArray[np.float64]) -> bool:
    """Return whether the results of `_compare` in all cases are those of left and right."""
    ratio, aside, apart, likeness = np.median(np.abs(rows), axis=0)
    same = abs(np.sign(rows[:, 1]).mean())  # of the cases, less those with the sides swapped
    return bool(
        ratio >= LEAST_RATIO
        and aside >= LEAST_ASIDE
        and apart >= 1
        and likeness >= LEAST_LIKENESS
        and same >= 0.5
    )


def _measure_moments(
    classes: NDArray[np.uint8], affine: NDArray[np.float64], num_classes: int
) -> dict[int, Moments]:
    """Return volume, mean and covariance of each class that is there, in mm."""
    result = {}
    size = np.diag((affine[:3, :3] ** 2).sum(0)) / 12  # of a voxel: a flat class has a thickness
    for index in range(1, num_classes):
        inside = np.flatnonzero(classes == index)
        if len(inside) >= LEAST_VOXELS:
            some = inside[:: -(-len(inside) // MOST_VOXELS)]
            voxels = np.stack(np.unravel_index(some, classes.shape), axis=1)
            places = voxels @ affine[:3, :3].T + affine[:3, 3]
            covariance = np.cov(places.T) + size
            result[index] = (float(len(inside)), places.mean(0), covariance)
    return result


def _compare(one: Moments, other: Moments, axis: int) -> tuple[float, float, float, float]:
    """Return how alike two classes are as left and right.

    The ratio of their volumes; their signed distance along the axis, once over the distance across
    it, once in units of their extents; and the Bhattacharyya coefficient of the covariances, one
    of them mirrored.
    """
    mirror = np.eye(3)
    mirror[axis, axis] = -1
    distance = one[1] - other[1]
    across = float(np.linalg.norm(np.delete(distance, axis)))
    first, second = mirror @ one[2] @ mirror, other[2]
    extents = float(np.sqrt(first[axis, axis]) + np.sqrt(second[axis, axis]))
    dets = [float(np.linalg.det(m)) for m in (first, second, (first + second) / 2)]
    likeness = (dets[0] * dets[1]) ** 0.25 / dets[2] ** 0.5
    volumes = sorted((one[0], other[0]))
    aside = float(distance[axis]) / max(across, 1e-3)
    return volumes[0] / volumes[1], aside, float(distance[axis]) / extents, likeness
