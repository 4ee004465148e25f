"""Packed lists say what the plain ones said."""

import pytest

from mvd.data.annotations import Entry, fingerprint
from mvd.data.packed import PackedEntries

ENTRIES = [Entry("/a/one video.mp4", 3), Entry("/b/dvě.mp4", 0), Entry("/c/\udcff.mp4", 173), Entry("/d", 2**40)]


def test_entries_come_back_in_order():
    packed = PackedEntries(ENTRIES)
    assert list(packed) == ENTRIES and len(packed) == 4
    assert [packed[number] for number in (0, 2, -1)] == [ENTRIES[number] for number in (0, 2, -1)]
    assert packed[1:3] == ENTRIES[1:3] and packed[::-2] == ENTRIES[::-2]
    assert type(packed[0]) is Entry and type(packed[0].label) is int
    assert fingerprint(PackedEntries(ENTRIES[:2])) == fingerprint(ENTRIES[:2])


@pytest.mark.parametrize("number", [4, -5])
def test_there_is_nothing_beyond_the_ends(number):
    with pytest.raises(IndexError):
        PackedEntries(ENTRIES)[number]


def test_an_empty_list_stays_empty():
    assert list(PackedEntries([])) == []
