"""What each sensitivity computes: exact values on planted cases, and its definition on the built-in model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import short
import torch
from torch import Tensor

import assay
from assay.budget.probe import probed_level
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, token_divergences, token_losses
from assay.measure.text import Windows
from assay.methods import base
from assay.methods.clusters import plus_plus
from assay.methods.sensitivity._subject import Scores, Subject
from assay.methods.sensitivity.activation_entropy import entropy
from assay.methods.sensitivity.augmented_hessian import products
from assay.methods.sensitivity.hessian_trace import diagonals
from assay.methods.sensitivity.zd import above
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.run import open_model

CUT = 1
"""A block whose two last matrices are zero, so that it passes its input on."""
LAST = ("o_proj.weight", "down_proj.weight")
Score = Callable[[str], Scores]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The first three blocks of the built-in model, one of them cut, with a profile on few tokens."""
    folder = tmp_path_factory.mktemp("sensitivity")
    model = short.save(folder / "model", 3, lambda name: f"layers.{CUT}." in name and name.endswith(LAST))
    profile = assay.profile(model, folder / "profile", tokens=1024, window=64, methods=("squeezellm",))
    index = dict(profile.index) | {"held_out": profile.index["held_out"][:4]}
    return Subject(Profile(profile.folder, index), lambda columns: probed_level(columns, 3), StreamedModel(open_model(model)))


@pytest.fixture(scope="module")
def samples(subject: Subject) -> Score:
    """Scores by name, each computed once."""
    return cache(lambda name: base.load(name, "sensitivity")().score(subject))


def means(scores: Scores) -> dict[str, float]:
    return {site: float(samples.mean()) for site, samples in scores.items()}


def in_block(scores: Scores, block: int) -> list[float]:
    return [value for name, value in means(scores).items() if f"layers.{block}." in name]


@pytest.mark.parametrize(("name", "least"), [("lim", -1.0), ("block_influence", 0.0), ("macro_influence", 0.0)])
def test_a_block_that_passes_its_input_on_matters_least(samples: Score, name: str, least: float) -> None:
    scores = samples(name)
    assert in_block(scores, CUT) == pytest.approx([least] * 7, abs=1e-9)
    others = in_block(scores, 0) + in_block(scores, 2)
    assert len(others) == 14
    assert min(others) > least + 0.01


@pytest.mark.parametrize("name", ["leave_one_out", "augmented_hessian", "zeroth_order"])
def test_matrices_before_a_cut_cost_nothing_and_the_others_do(samples: Score, name: str) -> None:
    scores = means(samples(name))
    before = {n for n in scores if f"layers.{CUT}." in n and not (name == "zeroth_order" and n.endswith(LAST))}
    assert {n for n, v in scores.items() if abs(v) < 1e-7} == before


def test_leave_one_out_is_what_the_judge_measures(subject: Subject, samples: Score) -> None:
    site = next(s for s in subject.sites if s.block == 2 and s.name.endswith("v_proj.weight"))
    one = {"one": Candidate(subject.model, subject.rounding(site))}
    judged = compare(subject.model, one, Windows(subject.ids, "held out"), Silent())["one"]
    found = samples("leave_one_out")[site.name]
    torch.testing.assert_close(found, torch.cat(judged.kl).double().mean(1), rtol=1e-3, atol=1e-9)


def test_zeroth_order_is_the_slope_along_its_draw(subject: Subject, samples: Score) -> None:
    i, site = next((i, s) for i, s in enumerate(subject.sites) if s.block == 2 and s.name.endswith("down_proj.weight"))
    draw = torch.randn(site.shape, generator=torch.Generator().manual_seed(i))
    slopes = []
    with subject.model.whole() as network:
        parameter = network.get_parameter(site.parameter).requires_grad_(True)
        for ids in subject.ids.split(1):
            loss = token_losses(network(input_ids=ids).logits, ids).mean()
            slopes.append((torch.autograd.grad(loss, parameter)[0] * draw).sum().abs())
    torch.testing.assert_close(samples("zeroth_order")[site.name], torch.stack(slopes).double(), rtol=0.02, atol=2e-3)


def test_kfac_is_the_profile_s_price(subject: Subject, samples: Score) -> None:
    scores = means(samples("kfac"))
    prices, excess = subject.profile.prices, subject.profile.index["first"]
    expected = {n: prices[n]["int3-g64-asym"]["nearest"] * (excess if ".0." in n else 1) for n in scores}
    assert scores == pytest.approx(expected, rel=1e-3)
    assert len(scores) == 21


def test_fisher_diagonal_weighs_every_squared_error(subject: Subject, samples: Score) -> None:
    site = next(s for s in subject.sites if s.block == 0 and s.name.endswith("k_proj.weight"))
    fisher = subject.profile.curvatures(0, ("fisher",))[site.name].fisher
    assert fisher is not None
    weight = subject.weight(site)
    errors = (subject.rounded(weight) - weight).flatten().tolist()
    total = sum(0.5 * f * e * e for f, e in zip(fisher.flatten().tolist(), errors, strict=True))
    assert means(samples("fisher_diagonal"))[site.name] == pytest.approx(total, rel=1e-4)


def test_the_hessian_s_diagonal_is_exact_with_one_probe_where_there_is_nothing_else() -> None:
    w, scale = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3)
    found = diagonals(lambda: (scale * w.square()).sum() + w.sum(), [w], 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[0], 2 * scale)


def test_the_trace_of_least_squares_comes_from_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 6, generator=generator), torch.zeros(4, 6, requires_grad=True)
    moment = x.T @ x / len(x)
    hessian = torch.kron(2 * torch.eye(4), moment)
    spread = math.sqrt(2 * float(hessian.square().sum() - hessian.diagonal().square().sum()))
    probes = 400
    found = diagonals(lambda: (x @ w.T - 1).square().sum() / len(x), [w], probes, generator)
    assert float(found[0].sum()) == pytest.approx(2 * 4 * float(moment.trace()), abs=4 * spread / math.sqrt(probes))


def test_hessian_trace_follows_the_size_of_the_error_alone(subject: Subject) -> None:
    method = base.load("hessian_trace", "sensitivity")(probes=1)
    coarse = dataclasses.replace(subject, level_of=lambda columns: probed_level(columns, 2))
    fine, rough = method.score(subject), method.score(coarse)
    for site in subject.sites:
        if site.name.endswith("up_proj.weight"):
            weight = subject.weight(site)
            errors = [float((s.rounded(weight) - weight).square().sum()) for s in (coarse, subject)]
            torch.testing.assert_close(rough[site.name], fine[site.name] * errors[0] / errors[1], rtol=1e-4, atol=1e-12)


def test_pair_terms_are_what_two_changes_cost_together() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    changes = 1e-3 * torch.randn(3, 30, 50, generator=generator, dtype=torch.float64)
    changes[1] += changes[0]

    def kl(change: Tensor) -> float:
        """Summed over all tokens."""
        logits = torch.cat([reference, reference[:1]]), torch.cat([reference + change, reference[:1]])
        return float(token_divergences(logits[0][None], logits[1][None]).sum())

    found = products(reference, reference + changes)
    for i in range(3):
        assert 0.5 * float(found[i, i]) == pytest.approx(kl(changes[i]), rel=1e-2)
        for j in range(i):
            pair = kl(changes[i] + changes[j]) - kl(changes[i]) - kl(changes[j])
            assert float(found[i, j]) == pytest.approx(pair, rel=2e-2, abs=2e-2 * kl(changes[i]))
    assert float(found[0, 1]) > 0.5 * float(found[0, 0])


def test_shares_of_the_augmented_hessian_add_up_to_rounding_everything(subject: Subject) -> None:
    fine = dataclasses.replace(subject, level_of=lambda columns: probed_level(columns, 4))
    rounded = {"all": Candidate(subject.model, lambda _, weight: fine.rounded(weight))}
    judged = compare(subject.model, rounded, Windows(subject.ids, "held out"), Silent())["all"]
    blocks = {s.name for s in subject.sites}
    assert blocks == {s.name for s in subject.model.anatomy.sites.values() if s.block is not None}
    found = base.load("augmented_hessian", "sensitivity")().score(fine)
    assert sum(means(found).values()) == pytest.approx(float(torch.cat(judged.kl).double().mean()), rel=0.15)


@pytest.mark.parametrize(("kind", "share"), [("normal", 0.1587), ("laplace", 0.1216), ("uniform", 0.2113)])
def test_zd_of_known_distributions_whatever_their_scale(kind: str, share: float) -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    laplace = -(u - 0.5).sign() * torch.log1p(-2 * (u - 0.5).abs())
    draws = {"normal": torch.special.ndtri(u), "laplace": laplace, "uniform": u}[kind]
    assert float(above(draws)) == pytest.approx(share, abs=0.003)
    assert float(above(3 * draws - 7)) == pytest.approx(float(above(draws)), abs=1e-4)


def test_zd_pools_the_matrices_of_a_block(subject: Subject, samples: Score) -> None:
    scores = samples("zd")
    assert all(len(set(in_block(scores, block))) == 1 for block in range(3))
    pooled = torch.cat([subject.weight(s).flatten() for s in subject.sites if s.block == 2]).double()
    assert in_block(scores, 2)[0] == pytest.approx(-float((pooled > pooled.mean() + pooled.std()).double().mean()))


def test_entropy_counts_clusters() -> None:
    points = torch.eye(8).repeat_interleave(20, 0)
    assert entropy(points, 8, 0) == pytest.approx(3.0)
    assert entropy(points, 100, 0) == pytest.approx(3.0)
    assert entropy(torch.ones(50, 4), 10, 0) == 0.0
    uneven = torch.cat([points[:1].repeat(120, 1), points[-1:].repeat(40, 1)])
    assert entropy(uneven, 10, 0) == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))


def test_entropy_finds_the_block_that_says_few_things(subject: Subject) -> None:
    scores = base.load("activation_entropy", "sensitivity")(clusters=10, starts=2).score(subject)
    assert all(0 < float(s.max()) <= math.log2(10) for s in scores.values())
    rotated = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))
    assert entropy(rotated @ turn, 10, 0) == pytest.approx(entropy(rotated, 10, 0), abs=0.02)


def test_starting_points_are_different() -> None:
    points = torch.cat([torch.zeros(50, 3), torch.ones(50, 3), torch.eye(3)])
    starts = plus_plus(points, 20, 0)
    assert len(starts) == len(starts.unique(dim=0)) == 5


@pytest.mark.parametrize("name", base.names("sensitivity"))
def test_facts_are_stated(name: str, subject: Subject) -> None:
    method = base.load(name, "sensitivity")
    assert method.verb == "score"
    assert method.paper and isinstance(method.prices, bool)
    if "model" in method.needs:
        alone = Subject(subject.profile, subject.level_of)
        with pytest.raises(InputError, match="--model"):
            method().score(alone)


def test_the_profile_must_hold_fisher(subject: Subject, tmp_path: Path) -> None:
    index = dict(subject.profile.index) | {"settings": dict(subject.profile.index["settings"]) | {"weightwise": []}}
    with pytest.raises(InputError, match="--method squeezellm"):
        base.load("fisher_diagonal", "sensitivity")().score(dataclasses.replace(subject, profile=Profile(tmp_path, index)))
