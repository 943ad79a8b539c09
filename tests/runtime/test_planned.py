"""Budgets planned for every head: the best choice, exact bytes, ragged heads that free memory, and less lost on real weights."""

from __future__ import annotations

import itertools

import pebble
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.masked import masked
from runtime.subjects import model, padded, run, text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import assay
from assay.methods.cache._planned import counts
from assay.methods.cache.snapkv import SnapKV
from assay.model.errors import InputError


@settings(max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(0, 2))
def test_no_other_split_retains_more(seed: int, kept: int, always: int) -> None:
    """Against every split of the total over four heads of six tokens."""
    scores = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(seed)) ** 3
    found = counts(scores, kept, always)
    flat = scores.flatten(0, 1).sort(-1, descending=True)[0]
    floor = min(always, kept)

    def mass(split: tuple[int, ...]) -> float:
        return sum(float(s[:n].sum()) for s, n in zip(flat, split, strict=True))

    splits = [s for s in itertools.product(range(floor, 7), repeat=4) if sum(s) == 4 * kept]
    assert int(found.sum()) == 4 * kept
    assert int(found.min()) >= floor
    assert mass(tuple(found.flatten().tolist())) == pytest.approx(max(map(mass, splits)), rel=1e-6)


def test_ragged_heads_are_masked_heads_and_free_memory() -> None:
    """A full cache with the same columns masked, head by head, gives the same logits; bytes are those of an even split."""
    found, (ids, mask) = model(), padded(5)
    shape = ((3.0, 1.0), (1.0, 2.0), (2.0, 3.0))
    allowed: dict[tuple[int, int], Tensor] = {}
    sizes = []
    with assay.attach(found, "h2o", budget=0.4, shape=shape) as attached:

        def see(seen: int) -> None:
            for i, layer in enumerate(attached.layers):
                lanes = []
                for positions in layer.kept():
                    index = positions[:, 0].long()
                    row = torch.zeros(len(index), seen + 1, dtype=torch.bool)
                    lanes.append(row.scatter_(1, torch.where(index < 0, seen, index), True)[:, :seen])
                allowed[i, seen] = torch.stack(lanes, 1)

        ours, _ = run(found, ids, mask, see=see)
        sizes.append(attached.nbytes)
    with masked(found, allowed):
        theirs, _ = run(found, ids, mask, cache=DynamicCache())
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=2e-5)
    with assay.attach(found, "h2o", budget=0.4, shape=tuple((1.0, 1.0) for _ in range(3))) as attached:
        run(found, ids, mask)
        sizes.append(attached.nbytes)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_refusals() -> None:
    with pytest.raises(InputError, match="shape='planned' needs text"), assay.attach(model(), "h2o", shape="planned"):
        pass
    for name in ("streaming_llm", "prefixkv"):
        with (
            pytest.raises(InputError, match="use another shape"),
            assay.attach(model(), name, shape="planned", calibration=text(2)),
        ):
            pass


def test_a_plan_for_heads_loses_less_on_real_weights() -> None:
    folder = pebble.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/pebble")
    found = AutoModelForCausalLM.from_pretrained(folder / "models/pebble", dtype=torch.float32).eval()
    words = [(folder / f"data/wikitext2/{name}.txt").read_text()[:8000] for name in ("valid", "test")]
    plan_on, judged = (
        tokenizer(w, add_special_tokens=False, return_tensors="pt").input_ids[:, :1024].view(4, 256) for w in words
    )
    losses = []
    with torch.no_grad():
        exact = found(judged).logits[:, 224:].log_softmax(-1)
        for shape in ("uniform", "planned"):
            with assay.attach(found, SnapKV(budget=0.5, shape=shape), calibration=plan_on) as attached:
                cache = found(judged[:, :224], use_cache=True).past_key_values
                kept = [len(lane) for layer in attached.layers for lane in layer.lanes]
                q = found(judged[:, 224:], past_key_values=cache, use_cache=True).logits.log_softmax(-1)
            losses.append(float((exact.exp() * (exact - q)).sum(-1).mean()))
    assert losses[1] < 0.6 * losses[0]
    assert sum(kept) == 112 * len(kept)
    assert len(kept) == found.config.num_hidden_layers * found.config.num_key_value_heads
    assert min(kept) < 80 < 144 < max(kept)
