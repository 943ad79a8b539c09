"""The frontier from one profile: as good as single plans, falling, never worse than uniform, and without the model."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from cli.calls import call
from tiny import save, text_file

import assay
from assay.budget.sweep import parse_range
from assay.model.errors import InputError


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that was moved, and whose model and text are gone."""
    folder = tmp_path_factory.mktemp("sweep")
    save("llama", folder / "m")
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    shutil.rmtree(folder / "m")
    (folder / "text.txt").unlink()
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "p", folder / "elsewhere" / "q")
    return folder / "elsewhere" / "q"


def test_a_frontier_is_the_plans_it_stands_for(profile: Path) -> None:
    found = assay.sweep(profile, 3, 8, 1.0)
    points = found["points"]
    assert [p["target"] for p in points] == [3, 4, 5, 6, 7, 8]
    for point in points:
        plan = assay.plan(profile, bits=point["target"])
        assert (plan.bits, plan.nbytes_tensors) == (pytest.approx(point["bits"]), point["bytes"])
        assert (plan.predicted_low, plan.predicted) == (pytest.approx(point["predicted_low"]), pytest.approx(point["predicted"]))
        assert point["predicted"] <= point["uniform"]["predicted"]
        assert point["bits"] <= point["target"]
    assert all(a["predicted"] > b["predicted"] and a["bytes"] < b["bytes"] for a, b in pairwise(points))
    assert found["profile_bytes"] == sum(p.stat().st_size for p in profile.rglob("*") if p.is_file())


def test_points_out_of_reach_are_left_out_and_nothing_else_is(profile: Path) -> None:
    found = assay.sweep(profile, 1, 32, 0.5)
    low, high = found["achievable_bits"]
    targets = [p["target"] for p in found["points"]]
    assert targets == [t / 2 for t in range(2, 65) if low <= t / 2 <= high]
    with pytest.raises(InputError, match=f"nothing between 0.5 and 1 bits; this model and engine allow {low:.3f} to {high:.3f}"):
        assay.sweep(profile, 0.5, 1)


@pytest.mark.parametrize("text", ["2", "8:2", "0:4", "-1:4", "2:8:0", "2:8:-1", "2:x", "2:8:1:1", "nan:8", "2:inf", "2:8:1e-9"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_range(text)


def test_commands(profile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "plan", profile, "--sweep", "3:8", "-o", tmp_path / "f.json", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "f.json").read_text())
    code, out, _ = call(capfd, "plan", profile, "--sweep", "4:5:0.5")
    rows = [line for line in out.splitlines() if line.startswith("│ ")]
    assert (code, len(rows)) == (0, 3), out
    code, out, _ = call(capfd, "plan", profile, "--sizes", "100KB,130kB", "-o", tmp_path / "many")
    assert code == 0
    made = {p.stem: assay.run.Plan.load(p) for p in sorted((tmp_path / "many").iterdir())}  # type: ignore[attr-defined]
    assert {name: plan.budget for name, plan in made.items()} == {n: {"size": n} for n in ("100KB", "130kB")}
    assert made["100KB"].nbytes_tensors <= 100_000 < made["130kB"].nbytes_tensors <= 130_000
