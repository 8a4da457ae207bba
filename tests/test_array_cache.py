"""`ArrayCache`: what it evicts, and which batches it replays."""

import itertools

import numpy as np
import pytest

from jaxft.array_cache import ArrayCache


def test_array_cache_evicts_least_recently_used():
    kept, array = ArrayCache(4 * 40), np.zeros(10, np.float32)
    for key in "abbcd":  # "b" twice
        kept.add(key, array)
    assert kept.get("a") is array
    kept.add("e", array)
    assert [kept.get(key) is not None for key in "abcde"] == [True, False, True, True, True]
    kept.add("f", np.zeros(41, np.float32))  # larger than the whole cache
    assert [kept.get(key) is not None for key in "abcdef"] == [True, False, True, True, True, False]


@pytest.mark.parametrize(("room", "again"), [(10 + 3 * 9, "xyz"), (10 + 3 * 9 - 1, "pqr")])
def test_array_cache_replays_batches_if_all_were_seen_and_fit(room, again):
    kept = ArrayCache(room)
    kept.add("rows of a prefix", np.zeros(10, np.int8))  # must not be evicted for batches

    def batches(names):
        return ((np.zeros(5, np.int8), np.full(4, ord(name), np.int8)) for name in names)

    def seen(names, count=3):
        found = itertools.islice(kept.replayed("images", batches(names), 3), count)
        return "".join(chr(targets[0]) for _, targets in found)

    assert [seen("abc", 2), seen("xyz", 4), seen("pqr")] == ["ab", "xyz", again]
