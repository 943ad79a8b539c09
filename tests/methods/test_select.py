"""Selection: exactly so many different windows, like the target or covering the pool, on planted mixtures of real text."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

import assay
from assay.builtin.corpus import corpus
from assay.measure.text import load_tokenizer
from assay.methods import base
from assay.methods.select._ngrams import counts
from assay.methods.select.dsir import DSIR
from assay.methods.select.kmeans import evenly
from assay.run import open_model

LENGTH = 64


@cache
def tokens(kind: str, windows: int) -> Tensor:
    """Windows of the library's source ("module") or of its English reference ("topic")."""
    tokenizer = load_tokenizer(open_model("builtin"))
    documents = [d.text for split in ("calibration", "evaluation") for d in corpus(split) if d.name.startswith(kind)]
    ids = tokenizer("\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) >= windows * LENGTH
    return torch.tensor(ids[: windows * LENGTH]).view(windows, LENGTH)


@cache
def mixture(rare: str, common: str) -> tuple[Tensor, Tensor, Tensor]:
    """A pool with one window in twenty of the rare kind, which these are, and other text of the rare kind."""
    few, many = tokens(rare, 80), tokens(common, 380)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    return torch.cat([few[:20], many])[order], order < 20, few[20:]


@pytest.mark.parametrize("name", base.names("select"))
@pytest.mark.parametrize("count", [1, 37, 400])
def test_so_many_different_windows_are_chosen_and_by_the_seed_alone(name: str, count: int) -> None:
    pool, _, target = mixture("topic", "module")
    method = base.load(name, "select")()
    chosen = method.select(pool, target, count, 3)
    assert chosen.dtype == torch.int64
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 400
    assert torch.equal(chosen, method.select(pool, target, count, 3))


@pytest.mark.parametrize(("rare", "common"), [("topic", "module"), ("module", "topic")])
def test_dsir_finds_what_is_like_the_target(rare: str, common: str) -> None:
    pool, is_rare, target = mixture(rare, common)
    chosen = base.load("dsir", "select")().select(pool, target, 40, 0)
    assert int(is_rare[chosen].sum()) >= 15, "of 20 in the pool; two are expected by chance"
    buckets = 1000

    def divergence(ids: Tensor) -> float:
        p, q = (counts(x, buckets).sum(0) + 1 for x in (target, ids))
        p, q = p / p.sum(), q / q.sum()
        return float((p * (p / q).log()).sum())

    assert divergence(pool[chosen]) < divergence(pool)


def test_dsir_has_no_favourites_when_the_target_is_the_pool() -> None:
    pool, _, _ = mixture("topic", "module")
    assert DSIR(prior=0.0).log_weights(pool, pool).abs().max() < 1e-6
    assert DSIR().log_weights(pool, pool).abs().max() < 1e-6


def test_dsir_draws_as_one_after_another_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    monkeypatch.setattr(DSIR, "log_weights", lambda self, pool, target: weights.log())
    runs, seen = 4000, torch.zeros(4, dtype=torch.float64)
    for seed in range(runs):
        seen[DSIR().select(torch.zeros(4, 2), torch.zeros(1, 2), 2, seed)] += 1
    expected = torch.zeros(4, dtype=torch.float64)
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] * weights[second] / (1 - weights[first])
        expected[first] += chance
        expected[second] += chance
    torch.testing.assert_close(seen / runs, expected, atol=0.03, rtol=0)


def test_kmeans_is_not_crowded_by_near_copies() -> None:
    """Nine windows in ten are one and the same but for a tenth of the tokens; the others are all different."""
    generator = torch.Generator().manual_seed(0)
    different = tokens("topic", 80)[:40]
    copies = tokens("module", 380)[:1].repeat(360, 1)
    changed = torch.rand(copies.shape, generator=generator) < 0.1
    copies[changed] = torch.randint(0, 4096, (int(changed.sum()),), generator=generator)
    pool, method = torch.cat([different, copies]), base.load("kmeans", "select")()
    for seed in range(4):
        chosen = method.select(pool, None, 64, seed)
        assert int((chosen < 40).sum()) > 3 * 64 * 0.1


def test_one_cluster_is_a_random_draw_and_small_clusters_are_used_up() -> None:
    drawn = torch.zeros(10)
    for seed in range(500):
        drawn[evenly(torch.zeros(10, dtype=torch.long), 5, seed)] += 1
    assert drawn.min() > 200 and drawn.max() < 300
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    chosen = labels[evenly(labels, 23, 0)]
    assert torch.bincount(chosen).tolist() == [10, 3, 10]


def test_ngrams_are_counted_once_each_and_pairs_have_an_order() -> None:
    ids = torch.tensor([[5, 7, 5, 7, 9], [7, 5, 9, 5, 7]])
    found = counts(ids, 100_003)
    assert found.sum(1).tolist() == [9.0, 9.0]
    assert sorted(found[0][found[0] > 0].tolist()) == [1, 1, 1, 2, 2, 2]
    assert not torch.equal(found[0], found[1]), "the same tokens in another order"
    spread = counts(torch.arange(4096)[None], 1024)
    assert float(spread.max()) < 30, "8 a bucket on average"


def test_the_table_of_methods_names_them() -> None:
    rows = {m["name"]: m for m in assay.list_methods()}
    assert rows["dsir"]["needs"] == ["target"] and rows["kmeans"]["needs"] == []
