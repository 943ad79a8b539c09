"""Files of unfinished work: a bit that flips shows, wherever it is and whatever the threads."""

from __future__ import annotations

import pytest
import torch

from assay.model import files
from assay.model.files import checksum


def test_checksums_see_every_piece_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 64)
    tensor = torch.arange(100, dtype=torch.int32)
    known = {checksum(tensor)}
    for at in range(100):
        flipped = tensor.clone()
        flipped[at] ^= 1 << (at % 31)
        known.add(checksum(flipped))
    known |= {checksum(tensor.roll(16)), checksum(tensor.view(10, 10)), checksum(tensor.float()), checksum(tensor[:96])}
    assert len(known) == 105


def test_threads_change_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    tensor, before, found = torch.arange(9999.0), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.add(checksum(tensor))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
