"""The shape of the package: no circles of imports, rooms that can be taken in at a glance, classes that hold little."""

from __future__ import annotations

import pytest

from tests.house import structure
from tests.house.structure import MAX_ATTRIBUTES, MAX_FILES, MAX_LINES, excepted

pytestmark = pytest.mark.xdist_group("structure")  # in one worker: it reads all sources once


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not inside functions, and not only for types."""
    assert structure.circles(structure.imports()) == []


def test_a_circle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert structure.circles(edges) == [["a", "b", "c"]]


def test_a_folder_holds_few_files() -> None:
    too_many = {name: count for name, count in structure.files_per_folder().items() if count > MAX_FILES}
    assert {name: count for name, count in too_many.items() if not excepted(name)} == {}


def test_a_module_holds_one_concept() -> None:
    assert {
        name: length for name, length in structure.lines().items() if length > MAX_LINES and not excepted(name)
    } == {}


def test_a_class_holds_few_attributes() -> None:
    wide = {name: count for name, count in structure.attributes().items() if count > MAX_ATTRIBUTES}
    assert {name: count for name, count in wide.items() if not excepted(name)} == {}


def test_nobody_reaches_through_a_parent() -> None:
    reaches = [reach for rows in structure.reaches().values() for reach in rows]
    assert [reach for reach in reaches if not excepted(reach)] == []


def test_every_exception_is_needed() -> None:
    names = [name for name, count in structure.files_per_folder().items() if count > MAX_FILES]
    names += [name for name, length in structure.lines().items() if length > MAX_LINES]
    names += [name for name, count in structure.attributes().items() if count > MAX_ATTRIBUTES]
    names += [reach for rows in structure.reaches().values() for reach in rows]
    assert structure.unused_exceptions(names) == []


def test_a_name_of_a_class_says_one_thing() -> None:
    """Two modules may have a class of one name where both are the same thing, which its reason says."""
    homonyms = structure.homonyms()
    assert {name: places for name, places in homonyms.items() if name not in structure.SHARED_NAMES} == {}
    assert sorted(set(structure.SHARED_NAMES) - set(homonyms)) == []
