"""WINA's rotation: the same function, orthogonal columns, and less lost."""

from __future__ import annotations

import pebble
import pytest
import torch
from runtime.subjects import FAMILIES, model, text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assay
from assay.methods.activation._sparse import linears
from assay.methods.activation.wina import Wina


def columns(found: torch.nn.Module, gates: dict, name: str) -> Tensor:
    """Products of the turned columns of a map of block 0."""
    weight = linears(found.model.layers[0])[name].weight.detach() @ gates[f"0.{name}"].turn.basis
    return weight.mT @ weight


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_inputs_are_the_same_function(family: str) -> None:
    found, ids = model(family), text(2)
    with torch.no_grad():
        dense = found(ids).logits
        with assay.attach(found, "wina", sparsity=0.0, rotate=True, calibration=ids):
            torch.testing.assert_close(found(ids).logits, dense, atol=3e-5, rtol=3e-5)
            one = found(ids[:1, :1], use_cache=False).logits
        assert torch.equal(found(ids).logits, dense)
    torch.testing.assert_close(one, dense[:1, :1], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("family", "leaders"), [
    ("llama", ("self_attn.k_proj", "mlp.gate_proj")), ("phi3", ("self_attn.qkv_proj", "mlp.gate_up_proj")),
])  # fmt: skip
def test_columns_of_the_leading_maps_are_orthogonal(family: str, leaders: tuple[str, str]) -> None:
    found, ids = model(family), text(2)
    gates = Wina(rotate=True).calibrated(found, ids).gates
    for name in leaders:
        products = columns(found, gates, name)
        assert (products - products.diag().diag()).abs().max() < 1e-5 * products.diag().max()
        plain = linears(found.model.layers[0])[name].weight.detach()
        assert (plain.mT @ plain).fill_diagonal_(0).abs().max() > 1e-2 * products.diag().max()


def test_no_choice_of_inputs_loses_less_in_the_leading_map() -> None:
    """All choices of four of eight inputs, in the basis, on a weight whose own columns are far from orthogonal."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(8, 8, generator=generator), torch.randn(1, 8, generator=generator)
    turned = torch.nn.Linear(8, 8, bias=False)
    turned.weight.data = weight
    turn = Wina(rotate=True).turns({"gate_proj": turned})["gate_proj"]
    weight, x = weight @ turn.basis, x @ turn.basis
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    lost = {tuple(m.tolist()): float(((x * (1 - m)) @ weight.T).square().sum()) for m in every if m.sum() == 4}
    kept = Wina().gate(weight, x, 0.5).kept(x)[0].float()
    assert lost[tuple(kept.tolist())] == pytest.approx(min(lost.values()), rel=1e-5)


def test_it_pays_on_real_weights() -> None:
    folder = pebble.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/pebble")
    found = AutoModelForCausalLM.from_pretrained(folder / "models/pebble", dtype=torch.float32).eval()
    words = (folder / "data/wikitext2/test.txt").read_text()[:6000]
    ids = tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[:, :1024].view(8, 128)
    losses = {}
    with torch.no_grad():
        p = found(ids[4:], use_cache=False).logits.log_softmax(-1)
        for rotate in (False, True):
            with Wina(rotate=rotate).calibrated(found, ids[:4]).wrapped(found):
                q = found(ids[4:], use_cache=False).logits.log_softmax(-1)
            losses[rotate] = float((p.exp() * (p - q)).sum(-1).mean())
    assert losses[True] < 0.8 * losses[False]
