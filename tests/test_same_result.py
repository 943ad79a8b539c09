"""The same command gives the same files, to the bit; from one profile also with another number of threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save, text_file

import assay
from assay.measure.profile import Profile

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
TEXT = {"tokens": 1024, "window": 32, "methods": ["two_sided"]}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("family", "engine"), [("llama", "transformers"), ("mixtral", "plain")])
def test_threads_change_no_bit_of_plan_and_result(
    family: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide enough for torch to divide its products; in folders of one name, as the result's page names the folder."""
    model, found = save(family, tmp_path / "m", **WIDE), {}
    assay.profile(model, tmp_path / "profile", calibration=text_file(tmp_path), **TEXT)
    for count in (1, 3):
        room = tmp_path / str(count)
        room.mkdir()
        monkeypatch.chdir(room)
        torch.set_num_threads(count)
        plan = assay.plan(tmp_path / "profile", bits=3.6, engine=engine)
        plan.save(Path("plan.yaml"))
        assay.compress(model, "out", plan=plan, profile=tmp_path / "profile")
        found[count] = digests(room)
    assert {"plan.yaml", "out/model.safetensors", "out/assay/ledger.json", "out/assay/report.html"} <= found[1].keys()
    assert found[1] == found[3]


def test_profiles_are_the_same_bytes_in_the_same_threads_and_the_same_plan_in_others(tmp_path: Path) -> None:
    """torch's own sums and activations end a thread's share with other instructions, so other threads change last bits."""
    model, text, found = save("llama", tmp_path / "m", **WIDE), text_file(tmp_path), []
    for name, count in (("a", 3), ("b", 3), ("c", 1)):
        torch.set_num_threads(count)
        found.append(assay.profile(model, tmp_path / name, calibration=text, **TEXT).folder)
    assert digests(found[0]) == digests(found[1])
    plans = [assay.plan(folder, bits=3.6) for folder in found]
    assert {n: c.level for n, c in plans[0].choices.items()} == {n: c.level for n, c in plans[2].choices.items()}
    assert plans[0].predicted == pytest.approx(plans[2].predicted, rel=1e-4)
    for site, prices in Profile.open(found[0]).prices.items():
        for level, by_method in prices.items():
            assert by_method == pytest.approx(Profile.open(found[2]).prices[site][level], rel=1e-3)
