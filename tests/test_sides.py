import unicodedata

import nibabel as nib
import numpy as np
import pytest

from medssl.data.cases import Case
from medssl.sides import find_mirrored, find_sided

SIDED = (
    "kidney_l", "Kidney_L", "kidney-left", "LeftKidney", "kidneyRight", "leftkidney", "tibiaright",
    "Right Lung", "L_Hippocampus", "hippocampus.L", "HippocampusL", "LKidney", "lh.hippocampus",
    "ctx-rh-bankssts", "femur_left", "lung_upper_lobe_left", "Lt kidney", "kidney Rt", "l",
    "kidney_l_1", "Kidney (L)", "right-sided effusion", "sin", "dex", "ren dexter", "Ren sin.",
    "niere links", "linke Niere", "rechte_niere", "Linksventrikel", "NiereRechts", "niere li",
    "rein gauche", "rein droit", "orbites droites", "riñón izquierdo", "riñón izq", "riñon der",
    "rene destro", "rene sx", "rim_direito", "rim esquerdo", "linkernier", "rechter nier",
    "vänster njure", "höger", "venstre nyre", "højre", "høyre nyre", "левая почка", "ПРАВАЯ",
    "почка прав.", "左肾", "右腎", "左", "ひだり", "왼쪽 신장", "lewa nerka", "levá ledvina",
    "vasen munuainen", "αριστερός νεφρός", "ｋｉｄｎｅｙ＿Ｌ", "좌신장", "우폐", "vasak neer",
    "kairysis inkstas", "ronyó esquerre", "کلیه چپ", "ไตซ้าย", "ojo dch",
)  # fmt: skip
NOT_SIDED = (
    "bright", "hyperbright", "alright", "upright", "cleft", "midcleft", "leftover tumor", "L3",
    "L3 vertebra", "vertebra_L5", "vertebra L 3", "Wirbel L3", "L4-L5 disc", "relative", "lesion",
    "LV", "rv", "LNs", "liver", "lateral ventricle", "anterior", "colon", "rectum", "levator",
    "linked nodes", "Rechteck", "Kopf der Niere", "tumor sin realce", "l'aorta", "sinus",
    "dextrose", "destroyed bone", "правильный", "class_1", "3", "lymph node",
)  # fmt: skip
PAIRS = (
    ("LK", "RK"), ("rkid", "lkid"), ("LV", "RV"), ("LUL", "RUL"), ("kidl", "kidr"), ("L3", "R3"),
    ("limbleft", "limbright"), ("rein_g", "rein_d"), ("rim_e", "rim_d"), ("riñón_i", "riñón_d"),
    ("rene s", "rene d"), ("njure_v", "njure_h"), ("почка_л", "почка_п"),
    ("sol böbrek", "sağ böbrek"), ("kidney_l_1", "kidney_r_2"), ("RG", "RD"), ("G", "D"),
    ("PE", "PD"), ("NL", "NP"), ("ЛЛ", "ЛП"), ("munuainen_v", "munuainen_o"), ("좌 엽", "우 엽"),
)  # fmt: skip


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", SIDED)
def test_a_word_for_a_side_counts_in_every_language_and_spelling(name, form):
    name = unicodedata.normalize(form, name)
    assert find_sided([name]) == [name]
    assert find_sided(["liver", name, "tumor"]) == [name]


@pytest.mark.parametrize("name", NOT_SIDED)
def test_a_word_that_holds_or_begins_like_a_side_does_not_count(name):
    assert find_sided([name, "tumor"]) == []


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_names_that_differ_in_a_side_alone_are_a_pair(one, other):
    assert find_sided(["spleen", one, other]) == [one, other]


@pytest.mark.parametrize(
    "names",
    [("lesion_a", "lesion_b", "lesion_d", "lesion_e"), ("L1", "L2", "S1"), ("T1", "T2"), ("a", "b"),
     ("anterior", "posterior"), ("liver", "spleen"), ("lung", "rib"), ("LV", "MYO", "LA"),
     ("GTV", "CTV", "DTV"), ("ED", "ET", "NCR"), ("우울", "표")],
)  # fmt: skip
def test_names_that_differ_in_something_else_are_no_pair(names):
    assert find_sided(names) == []


AFFINES = {
    "right": np.diag([2.0, 2.0, 3.0, 1.0]),
    "left": np.diag([-2.0, -2.0, 3.0, 1.0]),
    "oblique": np.array([[0, 0.3, 3, 5], [2, 0, 0, -9], [0, 2, -0.5, 1], [0, 0, 0, 1.0]]),
}


def draw(affine, places, seed=0, shape=(52, 44, 40)):
    """A label of ellipsoids at offsets in mm of the center, right, anterior and superior."""
    rng = np.random.default_rng(seed)
    grid = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T
    grid = grid - affine[:3, :3] @ (np.array(shape) / 2)
    label = np.zeros(shape, np.uint8)
    for value, (place, radii) in places.items():
        radii = np.array(radii) * rng.uniform(0.9, 1.1, 3)
        where = np.array(place) + rng.uniform(-3, 3, 3)
        label[(((grid - where) / radii) ** 2).sum(-1) < 1] = value
    return label


def find(tmp_path, places, num_cases=3, affine="right", axis=0, parts=None):
    cases = []
    for index in range(num_cases):
        path = tmp_path / f"{index}.nii.gz"
        here = {v: p for v, p in places.items() if parts is None or v == parts[index % len(parts)]}
        nib.save(nib.Nifti1Image(draw(AFFINES[affine], here, index), AFFINES[affine]), path)
        cases.append(Case(str(index), (path,), path, str(index)))
    return find_mirrored(cases, (0, *places), None, axis)


LEFT, RIGHT = ((-28, 0, 2), (8, 9, 15)), ((28, 2, -2), (9, 8, 14))
LIVER, SPINE, FRONT = (
    ((22, 14, 25), (24, 18, 16)),
    ((0, -25, 0), (6, 6, 40)),
    ((0, 30, 0), (9,) * 3),
)


@pytest.mark.parametrize("affine", ["right", "left", "oblique"])
def test_two_like_structures_left_and_right_are_found_from_their_labels(tmp_path, affine):
    assert find(tmp_path, {1: RIGHT, 2: LEFT}, affine=affine)[0] == (1, 2)


def test_they_are_found_beside_other_classes_and_in_a_single_label(tmp_path):
    places = {1: LIVER, 2: RIGHT, 5: SPINE, 9: LEFT}
    assert find(tmp_path, places, num_cases=1)[0] == (2, 4)  # class indices, not values


@pytest.mark.parametrize(
    "places",
    [
        {1: LIVER, 2: LEFT},  # of other sizes
        {1: SPINE, 2: FRONT},
        {1: FRONT, 2: ((0, -12, 0), (9, 9, 9))},  # one before the other
        {1: LEFT, 2: ((28, 0, 0), (15, 8, 9))},  # of other shapes
    ],
)
def test_what_is_not_as_left_to_right_is_not_found(tmp_path, places):
    assert find(tmp_path, places) == (None, True)


def test_sides_that_are_swapped_from_scan_to_scan_are_none(tmp_path):
    cases = []
    for index in range(4):
        path, pair = tmp_path / f"{index}.nii.gz", (LEFT, RIGHT) if index % 2 else (RIGHT, LEFT)
        label = draw(AFFINES["right"], dict(zip((1, 2), pair, strict=True)), index)
        nib.save(nib.Nifti1Image(label, AFFINES["right"]), path)
        cases.append(Case(str(index), (path,), path, str(index)))
    assert find_mirrored(cases, (0, 1, 2), None, 0)[0] is None


def test_classes_that_no_label_holds_together_cannot_be_compared(tmp_path):
    assert find(tmp_path, {1: LEFT, 2: RIGHT}, parts=[1, 2]) == (None, False)
