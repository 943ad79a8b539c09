"""Undo names the groups whose restoration recovers most loss per byte, by brute force and as measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from cli.calls import call
from hypothesis import given
from hypothesis import strategies as st

import assay
from assay.budget.undo import NAMED, restorations
from assay.measure.stream import StreamedModel, read_weight
from assay.measure.text import windows
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.run import open_model

NUMBERS = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10)), min_size=1, max_size=7)


@given(NUMBERS, st.integers(1, 3))
def test_no_other_groups_of_so_many_bytes_recover_more(numbers: list[tuple[int, float]], width: int) -> None:
    names = [f"t{i}" for i in range(len(numbers))]
    added, damage = ({n: row[k] for n, row in zip(names, numbers, strict=True)} for k in (0, 1))
    groups = [names[i : i + width] for i in range(0, len(names), width)]
    found = restorations(damage, added, groups)
    useful = [g for g in groups if sum(added[t] for t in g) > 0 and sum(damage[t] for t in g) > 0]
    assert sorted(r.tensors for r in found) == sorted(map(tuple, useful))
    totals = [(sum(added[t] for t in g), sum(damage[t] for t in g)) for g in useful]
    for count in range(1, len(found) + 1):
        room, recovered = sum(r.nbytes for r in found[:count]), sum(r.damage for r in found[:count])
        others = itertools.product((0, 1), repeat=len(totals))
        best = max(
            sum(d for (_, d), take in zip(totals, picks, strict=True) if take)
            for picks in others if sum(b for (b, _), take in zip(totals, picks, strict=True) if take) <= room
        )  # fmt: skip
        assert recovered >= best * (1 - 1e-9)


def test_what_was_never_compressed_is_not_named() -> None:
    found = restorations({"a": 1.0, "b": 1.0}, {"a": 10, "b": 0}, [["a", "norm"], ["b"], ["head"]])
    assert [r.tensors for r in found] == [("a",)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undo") / "out"
    assay.compress("builtin", out, level="int3-g64-asym", method="nearest", tokens=2048, window=128)
    return out


def test_the_first_named_recovers_more_measured_loss_per_byte_than_the_median(result: Path) -> None:
    verdict = assay.verify(result, "builtin", tokens=2048, window=128)
    named = verdict["restore"]
    assert len(named) == NAMED
    assert [r["damage"] / r["bytes"] for r in named] == sorted((r["damage"] / r["bytes"] for r in named), reverse=True)
    assert sum(r["kl"] for r in named) < verdict["kl"]["measured"]
    original, small = StreamedModel(open_model("builtin")), StreamedModel(open_model(result))
    recipe = json.loads((result / "assay" / "recipe.json").read_text())
    ledger = {e["tensor"]: e for e in json.loads((result / "assay" / "ledger.json").read_text())}
    rates = {n: d / (ledger[n]["bytes_before"] - ledger[n]["bytes_after"]) for n, d in recipe["damage"].items()}
    order = sorted(rates, key=lambda n: -rates[n])
    assert named[0]["tensors"] == order[:1]

    def restored(name: str) -> Candidate:
        return Candidate(small, lambda site, weight: read_weight(original, site) if site.name == name else weight)

    judge = windows(original.checkpoint, None, "evaluation", 4096, 128, original.vocabulary)
    candidates = {"none": Candidate(small), "first": restored(order[0]), "median": restored(order[len(order) // 2])}
    kl = {n: float(torch.cat(s.kl).double().mean()) for n, s in compare(original, candidates, judge, Silent()).items()}
    grown = {n: ledger[t]["bytes_before"] - ledger[t]["bytes_after"] for n, t in (("first", order[0]), ("median", order[21]))}
    per_byte = {n: (kl["none"] - kl[n]) / grown[n] for n in grown}
    assert per_byte["first"] > 2 * per_byte["median"]


def test_the_command_shows_a_short_table(result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "verify", result, "--against", "builtin", "--tokens", "512")
    assert code == 0
    assert "worth most per byte" in out and "self_attn" in out


def test_a_damaged_ledger_is_one_line(result: Path, tmp_path: Path) -> None:
    ledger = result / "assay" / "ledger.json"
    text = ledger.read_text()
    ledger.write_text(text[: len(text) // 2])
    try:
        with pytest.raises(InputError, match=r"ledger\.json: not as it was written"):
            assay.verify(result, "builtin", tokens=512, window=128)
    finally:
        ledger.write_text(text)
