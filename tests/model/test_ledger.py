"""The ledger has every tensor once, and its sums are the sums of its entries."""

from __future__ import annotations

import json

import pytest

from assay.model.ledger import Entry, Ledger

ENTRIES = [
    Entry("a", "int4-g64-asym", "done", "gptq", 800, 200),
    Entry("b", "int4-g64-asym", "fell_back", "not positive definite", 800, 210),
    Entry("c", None, "copied", "a vector (norm or bias)", 10, 10),
    Entry("d", None, "dropped", "tied", 10, 0),
]


def test_counts_and_bytes() -> None:
    ledger = Ledger(ENTRIES)
    assert ledger.counts() == {"planned": 2, "done": 1, "fell_back": 1, "copied": 1, "dropped": 1}
    assert ledger.nbytes == 420


def test_a_tensor_has_one_fate() -> None:
    with pytest.raises(ValueError, match="twice"):
        Ledger([ENTRIES[0], ENTRIES[0]])


def test_it_comes_back_from_json_sorted() -> None:
    rows = json.loads(json.dumps(Ledger(reversed(ENTRIES)).to_json()))
    assert [row["tensor"] for row in rows] == ["a", "b", "c", "d"]
    assert Ledger(Entry(**row) for row in rows).entries == Ledger(ENTRIES).entries


def test_an_empty_ledger_counts_zero() -> None:
    assert set(Ledger().counts().values()) == {0}
