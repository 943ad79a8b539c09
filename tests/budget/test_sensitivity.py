"""Rankings: what is kept, how sure that is, and how well they agree with measured divergence."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from cli.calls import call, one_line

import assay
from assay.budget import sensitivity
from assay.budget.spread import by_part, relative_error
from assay.measure.damage import Curvature
from assay.measure.profile import Profile
from assay.model.files import save_note

ROWS = [
    {"name": f"m.layers.{b}.{part}.weight", "block": b, "shape": [4, 4]}
    for b in range(12) for part in ("attn.q", "attn.o", "mlp")
]  # fmt: skip


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of the built-in model, on eight parts of text."""
    return assay.profile("builtin", tmp_path_factory.mktemp("rank") / "p", tokens=4096, window=128, methods=("gptq",))


def test_kfac_puts_matrices_in_the_order_of_what_is_measured(profile: Profile) -> None:
    short = dict(profile.index) | {"held_out": profile.index["held_out"][:6]}
    save_note(profile.folder / "profile.json", short)
    rankings = assay.rank(profile.folder, ["kfac", "leave_one_out", "zd"], model="builtin")
    found = sensitivity.correlations(rankings)["leave_one_out"]
    assert found["kfac"] > 0.85
    assert found["kfac"] > abs(found["zd"]) + 0.3
    for ranking in rankings[:2]:
        for row in ranking.rows:
            assert row.low <= row.score <= row.high
            assert row.low < row.high
    assert rankings[0].samples == "parts of the text"
    assert rankings[2].samples == "" and rankings[2].rows[0].low is None


def test_what_is_kept_is_worth_the_most_within_its_share(profile: Profile) -> None:
    ranking = assay.rank(profile.folder)[0]
    worth = [row.score / row.count for row in ranking.rows]
    assert worth == sorted(worth, reverse=True)
    kept = [row for row in ranking.rows if row.keep]
    assert kept == list(ranking.rows[: len(kept)])
    total = sum(row.count for row in ranking.rows)
    assert sum(row.count for row in kept) <= 0.05 * total < sum(row.count for row in ranking.rows[: len(kept) + 1])
    assert ranking.share == pytest.approx(sum(r.score for r in kept) / sum(r.score for r in ranking.rows))
    assert ranking.share > 0.1
    assert all(row.again > 0.5 for row in kept[:-1])
    assert ranking.rows[-1].again == 0


def test_keeping_them_makes_the_same_plan_lose_less(profile: Profile) -> None:
    ranking = assay.rank(profile.folder)[0]
    count = len(ranking.patterns)
    least = [row.site for row in reversed(ranking.rows) if row.count == ranking.rows[0].count][:count]
    best, worst = (
        assay.plan(profile.folder, level="int3-g64-asym", method="gptq", keep=keep).predicted
        for keep in (ranking.patterns, least)
    )  # fmt: skip
    assert best < 0.95 * worst


def test_units_are_kept_until_the_share_is_used() -> None:
    worth = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 0.0, 0.0, 0.0]])
    counts = torch.tensor([10.0, 10.0, 60.0, 20.0])
    assert sensitivity.to_keep(worth, counts, 0.3).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert sensitivity.to_keep(worth, counts, 0.0).tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2], [1], [3, 4, 5, 7], list(range(36)), [4, 5, 33], []], ids=lambda c: f"{len(c)} of 36"
)
def test_patterns_match_what_was_chosen_and_nothing_else(chosen: list[int]) -> None:
    names = [ROWS[i]["name"] for i in chosen]
    found = sensitivity.patterns(names, ROWS)
    assert [r["name"] for r in ROWS if any(fnmatchcase(r["name"], p) for p in found)] == names
    assert len(found) == len(set(found)) <= max(len(chosen), 1)
    if len(chosen) == 3:
        assert found == ["m.layers.0.*"] or len(found) == 3


def test_an_answer_that_the_text_does_not_settle_is_not_called_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    sure = torch.tensor([5.0, 1.0, 1.0, 1.0])[:, None] + 0.1 * torch.randn(4, 8, generator=generator)
    open_ = torch.ones(4, 1) + torch.randn(4, 8, generator=generator)
    counts = torch.ones(4, dtype=torch.float64)
    (keep, again), (_, unsure) = (sensitivity._answer(w.double(), counts, None, 0.25) for w in (sure, open_))
    assert keep.tolist() == [True, False, False, False]
    assert again.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(unsure.max()) < 0.95
    assert float(unsure.sum()) == pytest.approx(1.0)


def test_parts_are_the_change_of_the_price_when_a_part_counts_more() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, counts = torch.rand(6, 5, generator=generator), torch.tensor([100.0, 100.0, 50.0])
    h, g = torch.rand(3, 5, generator=generator), torch.rand(3, 6, generator=generator)

    def price(weights: torch.Tensor) -> float:
        shares = (weights * counts / (weights * counts).sum()).double()
        return float((shares @ g.double()) @ errors.double() @ (shares @ h.double()))

    shares = counts / counts.sum()
    found = by_part(errors, Curvature(shares @ h, shares @ g, 1.0, 250, parts=(counts, h, g)))
    assert float((shares * found).sum()) == pytest.approx(1, rel=1e-5)
    for part in range(3):
        more = torch.ones(3, dtype=torch.float64)
        more[part] += 1e-5
        slope = (price(more) / price(torch.ones(3, dtype=torch.float64)) - 1) / 1e-5
        assert slope == pytest.approx(float(shares[part] * (found[part] - 1)), abs=1e-3)


def test_parts_of_a_profile_average_to_the_whole(profile: Profile) -> None:
    # products of a model stored in 16 bits are taken of factors in bf16
    for name, curvature in profile.curvatures(3).items():
        counts, inputs, outputs = curvature.parts
        shares = counts / counts.sum()
        assert len(counts) == 8 and counts.sum() == 4096
        torch.testing.assert_close(shares @ inputs, curvature.h.diagonal(), rtol=5e-3, atol=1e-9)
        torch.testing.assert_close(shares @ outputs, curvature.g.diagonal(), rtol=5e-3, atol=1e-9)
        assert 0.001 < relative_error(profile.index["spread"], name) < 0.5


def test_the_command_prints_a_table_or_json(profile: Profile, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "inspect", profile.folder, "--sensitivity")
    assert code == 0
    first = assay.rank(profile.folder)[0]
    assert first.rows[0].site in out and f"--keep '{first.patterns[0]}'" in out
    code, out, _ = call(capfd, "inspect", profile.folder, "--by", "kfac,zd", "--model", "builtin", "--json")
    value = json.loads(out)
    assert code == 0
    assert [r["name"] for r in value["rankings"]] == ["kfac", "zd"]
    assert value["correlations"]["kfac"]["kfac"] == 1.0
    code, out, _ = call(capfd, "inspect", profile.folder, "--by", "kfac,zd", "--model", "builtin")
    assert code == 0 and "correlation" in out and "kfac keeps" in out and "zd keeps" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--by", "kfca"), "did you mean kfac?"),
        (("--by", "lim"), "give it with --model"),
        (("--by", "lim", "--model", "absent/folder/here"), "absent/folder/here"),
        (("--by", "fisher_diagonal", "--model", "builtin"), "--method squeezellm"),
        (("--sensitivity", "--bits", "5"), "2, 3, 4 bits"),
        (("--bits", "3"), "--bits goes with --sensitivity"),
    ],
)
def test_wrong_input_is_one_line(
    profile: Profile, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = call(capfd, "inspect", profile.folder, *arguments)
    assert (code, out) == (2, "")
    assert words in one_line(err)


def test_another_model_is_refused(profile: Profile, tmp_path: Path) -> None:
    other = Profile(tmp_path, dict(profile.index) | {"model": "another"})
    with pytest.raises(assay.model.errors.InputError, match="another model"):
        sensitivity.rank(other, "zd", assay.measure.stream.StreamedModel(assay.run.open_model("builtin")), None)
