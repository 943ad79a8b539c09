"""Activation sparsity: exact at its ends, better than chance between them, and measured as promised."""

from __future__ import annotations

from typing import Any

import pebble
import pytest
import torch
from runtime.subjects import model, text
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import assay
from assay.attaching import named
from assay.methods.activation._sparse import Gate, linears, quantile
from assay.methods.activation.ppl_p import PplP, lost, threshold
from assay.methods.activation.r_sparse import RSparse
from assay.methods.activation.teal import Teal
from assay.methods.activation.wina import Wina
from assay.model.errors import InputError

NAMES = ("teal", "wina", "r_sparse")


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(gate: Gate, weight: Tensor, x: Tensor) -> Tensor:
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight
    return gate.apply(linear, x).detach()


@pytest.mark.parametrize("name", ["teal", "wina"])
def test_no_sparsity_changes_nothing(name: str) -> None:
    found, ids = model(), text(2)
    with torch.no_grad():
        dense = found(ids).logits
        with assay.attach(found, name, sparsity=0.0, calibration=ids):
            assert torch.equal(found(ids).logits, dense)
        assert torch.equal(found(ids).logits, dense)


@pytest.fixture(scope="module")
def trained() -> tuple[PreTrainedModel, Tensor, Tensor]:
    folder = pebble.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/pebble")
    found = AutoModelForCausalLM.from_pretrained(folder / "models/pebble", dtype=torch.float32).eval()
    parts = []
    for name in ("valid", "test"):
        words = (folder / f"data/wikitext2/{name}.txt").read_text()[:4000]
        parts.append(tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[:, :512].view(4, 128))
    return found, parts[0], parts[1]


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_on_other_text_is_the_one_asked_for(name: str, trained: Any) -> None:
    found, calibration, judged = trained
    options = {"splits": (1.0,)} if name == "r_sparse" else {}
    policy = named(name)(sparsity=0.5, **options).calibrated(found, calibration)
    shares: list[Tensor] = []
    hooks = []
    for key, gate in policy.gates.items():
        index, _, rest = key.partition(".")
        linear = linears(found.model.layers[int(index)])[rest]
        hooks.append(linear.register_forward_pre_hook(lambda _, x, g=gate: shares.append((~g.kept(x[0])).float().mean())))
    with torch.no_grad(), policy.wrapped(found):
        found(judged, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(shares) == 42
    assert torch.stack(shares).mean() == pytest.approx(0.5, abs=0.02)


def divergence(found: PreTrainedModel, judged: Tensor, policy: Any) -> float:
    with torch.no_grad():
        p = found(judged, use_cache=False).logits.log_softmax(-1)
        with policy.wrapped(found):
            q = found(judged, use_cache=False).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_real_weights_lose_less_by_size_than_by_chance_or_rank_alone(trained: Any) -> None:
    found, calibration, judged = trained
    losses = {name: divergence(found, judged, named(name)(sparsity=0.5).calibrated(found, calibration)) for name in NAMES}
    rank = divergence(found, judged, RSparse(sparsity=0.5, splits=(0.0,)).calibrated(found, calibration))
    assert max(losses.values()) < 0.5 * rank
    weight, x = found.model.layers[2].mlp.up_proj.weight.detach(), tensor(64, 256)
    exact = x @ weight.T
    chance = (x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) > 0.5)) @ weight.T
    ours = output(Wina().gate(weight, x, 0.5), weight, x)
    assert (ours - exact).square().sum() < 0.5 * (chance - exact).square().sum()


def test_greedy_shares_average_to_the_target_and_do_not_lose() -> None:
    few = model()
    ids = text(1)
    uniform, greedy = (Teal(sparsity=0.4, greedy=g).calibrated(few, ids) for g in (False, True))
    block = few.model.layers[0]
    total = sum(m.weight.numel() for m in linears(block).values())
    inputs: dict[str, Tensor] = {}
    for name, linear in linears(block).items():
        linear.register_forward_pre_hook(lambda _, x, n=name: inputs.setdefault(n, x[0]))
    with torch.no_grad():
        few(ids, use_cache=False)
    measured = sum(float((~greedy.gates[f"0.{n}"].kept(inputs[n])).float().mean()) * m.weight.numel()
                   for n, m in linears(block).items()) / total  # fmt: skip
    assert measured == pytest.approx(0.4, abs=0.03)
    assert {g.threshold for g in greedy.gates.values()} != {g.threshold for g in uniform.gates.values()}
    assert divergence(few, ids, greedy) < 1.1 * divergence(few, ids, uniform)


def test_no_mask_beats_wina_where_columns_are_orthogonal() -> None:
    weight = torch.linalg.qr(tensor(8, 8))[0] * tensor(8, seed=1).exp()
    x = tensor(1, 8, seed=2)
    gate = Wina().gate(weight, x, 0.5)
    ours = float((output(gate, weight, x) - x @ weight.T).square().sum())
    every = [m for m in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8) if m.sum() == 4]
    best = min(float(((x * m) @ weight.T - x @ weight.T).square().sum()) for m in every)
    assert ours == pytest.approx(best, rel=1e-5)


def test_wina_does_not_see_a_channel_scaled_and_its_column_back() -> None:
    weight, x, factor = tensor(24, 16), tensor(40, 16, seed=1), torch.logspace(-1, 1, 16)
    plain, scaled = Wina().gate(weight, x, 0.5), Wina().gate(weight / factor, x * factor, 0.5)
    assert torch.equal(plain.kept(x), scaled.kept(x * factor))
    exact = x @ weight.T
    teal = Teal().gate(weight / factor, x * factor, 0.5)
    ours, theirs = (float((output(g, weight / factor, x * factor) - exact).square().sum()) for g in (scaled, teal))
    assert ours < 0.7 * theirs


def test_r_sparse_has_teal_and_the_truncated_svd_at_its_ends() -> None:
    weight, x = tensor(24, 16), tensor(200, 16, seed=1)
    ends = {s: RSparse(splits=(s,)).gate(weight, x, 0.5) for s in (0.0, 1.0)}
    torch.testing.assert_close(output(ends[1.0], weight, x), output(Teal().gate(weight, x, 0.5), weight, x))
    rank = int(16 * 24 * 0.5 / 40)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(
        output(ends[0.0], weight, x), x @ ((left[:, :rank] * values[:rank]) @ right[:rank]).T, atol=1e-4, rtol=1e-4
    )


def test_r_sparse_mixes_where_the_weight_is_low_rank_plus_noise() -> None:
    weight = tensor(64, 4) @ tensor(4, 64, seed=1) + 0.3 * tensor(64, 64, seed=2)
    x = tensor(400, 64, seed=3) * tensor(400, 64, seed=4).exp()
    losses = {}
    for split in (0.0, 0.5, 0.7, 1.0):
        gate = RSparse(splits=(split,)).gate(weight, x, 0.5)
        losses[split] = float((output(gate, weight, x) - x @ weight.T).square().sum())
    assert min(losses[0.5], losses[0.7]) < min(losses[0.0], losses[1.0])


def test_cett_is_one_for_all_neurons_and_bisection_keeps_below_a_share() -> None:
    neurons, weight = functional.relu(tensor(100, 32)), tensor(8, 32, seed=1)
    assert lost(neurons, weight, 1e9) == pytest.approx(1)
    for share in (0.1, 0.3, 0.6):
        assert lost(neurons, weight, threshold(neurons, weight, share)) <= share
    zero = threshold(neurons, weight, 0.0)
    masked = (neurons.abs() * weight.norm(dim=0) <= zero).float().mean()
    assert masked == pytest.approx(float((neurons == 0).float().mean()), abs=0.01)


def test_perplexity_rises_by_p_percent_at_most_and_nearly(trained: Any) -> None:
    found, calibration, _ = trained
    policy = PplP(p=5.0).calibrated(found, calibration)
    with torch.no_grad():
        dense = found(calibration, labels=calibration, use_cache=False).loss
        with policy.wrapped(found):
            sparse = found(calibration, labels=calibration, use_cache=False).loss
    assert 1.03 < float((sparse - dense).exp()) <= 1.0501
    assert policy.sparsity is not None and policy.sparsity > 0.4
    assert "ppl_p" in {m["name"] for m in assay.list_methods()}


@pytest.mark.parametrize("name", NAMES)
def test_single_tokens_skip_rows_and_give_what_the_mask_gives(name: str) -> None:
    """One token takes the kernel, two rows of the same token the masked product."""
    found, ids = model("qwen2"), text(1)
    with torch.no_grad(), assay.attach(found, name, calibration=ids):
        assert found.model.layers[0].mlp.down_proj.weight.T.is_contiguous()
        one, two = found(ids[:, :1], use_cache=False).logits, found(ids[:, :1].expand(2, -1), use_cache=False).logits
    torch.testing.assert_close(one[0], two[0], atol=1e-5, rtol=1e-5)
    assert found.model.layers[0].mlp.down_proj.weight.is_contiguous()


def test_refusals() -> None:
    with pytest.raises(InputError, match="below 1"):
        Teal(sparsity=1.0)
    with pytest.raises(InputError, match="calibration=ids"), assay.attach(model(), "wina"):
        pass
    with pytest.raises(InputError, match="token ids"), assay.attach(model(), "teal", calibration=torch.zeros(3)):
        pass
    assert quantile(torch.arange(10.0), 0.3) == 2
