"""ReLU tuning: the schedule, what it does to a trained model, and neurons skipped without loss."""

from __future__ import annotations

import itertools
import math

import pebble
import pytest
import torch
from families import WRITTEN
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.subjects import FAMILIES, model, text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import assay
from assay.model.errors import InputError
from assay.relu_tuning import Stages, judge, relufy


@settings(max_examples=60)
@given(st.integers(0, 30), st.lists(st.tuples(st.floats(0, 5), st.integers(2, 40)), min_size=1, max_size=4))
def test_the_weight_never_jumps_after_the_first_stage(adapt: int, parts: list[tuple[float, int]]) -> None:
    ends = [adapt + sum(n for _, n in parts[: i + 1]) for i in range(len(parts))]
    weights = [w for w, _ in parts]
    stages = Stages(adapt, tuple(weights), tuple(ends))
    assert all(stages.weight(t) == 0 for t in range(adapt))
    assert all(stages.weight(t) == weights[0] for t in range(adapt, ends[0] + 1))
    for (before, after), length, start in zip(itertools.pairwise(weights), [n for _, n in parts[1:]], ends, strict=False):
        # the steepest slope of half a sine
        most = abs(after - before) * math.pi / 2 / length + 1e-9
        for t in range(start, start + length):
            assert abs(stages.weight(t + 1) - stages.weight(t)) <= most
    assert stages.weight(ends[-1] + 100) == pytest.approx(weights[-1])


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    folder = pebble.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/pebble")
    found = []
    for name, count in (("valid", 128), ("test", 12)):
        words = (folder / f"data/wikitext2/{name}.txt").read_text()[: 600 * count]
        ids = tokenizer(words, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        found.append(ids[0, : 64 * count].view(count, 64))
    return found[0], found[1]


def test_zeros_rise_at_a_bounded_loss(texts: tuple[Tensor, Tensor]) -> None:
    """A trained model, 24 steps, with the penalty and without: more zeros, and a loss near that without."""
    results = {}
    for weight in (0.0, 0.6):
        found = AutoModelForCausalLM.from_pretrained(pebble.folder() / "models/pebble", dtype=torch.float32).eval()
        stages = Stages(6, (weight / 5, weight), (10, 20))
        results[weight] = (assay.tune_relu(found, *texts, steps=24, stages=stages, batch=4, rate=2e-4), found)
    plain, tuned = results[0.0][0], results[0.6][0]
    assert plain.zeros[0] < 0.01 < plain.zeros[1], "a smooth gate has no zeros, a ReLU has"
    assert plain.loss[2] < plain.loss[1], "training must make up for the changed gate"
    assert tuned.zeros[2] > plain.zeros[2] + 0.05
    assert tuned.loss[2] < plain.loss[2] + 0.25
    found, ids = results[0.6][1], texts[1][:1, :8]
    with torch.no_grad():
        dense = found(ids[:, :1], use_cache=False).logits
        with assay.attach(found, "prosparse"):
            torch.testing.assert_close(found(ids[:, :1], use_cache=False).logits, dense, atol=1e-4, rtol=1e-4)
        with assay.attach(found, "prosparse", limit=0.01):
            assert judge(found, texts[1])[1] > tuned.zeros[2]
            assert judge(found, texts[1])[0] < tuned.loss[2] + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_zeros_is_lossless(family: str) -> None:
    found, ids = model(family), text(1)
    relufy(found)
    with torch.no_grad():
        dense = found(ids).logits
        with assay.attach(found, "prosparse"):
            torch.testing.assert_close(found(ids).logits, dense)
            torch.testing.assert_close(found(ids[:, :1], use_cache=False).logits, dense[:, :1], atol=2e-5, rtol=2e-5)
        assert torch.equal(found(ids).logits, dense)
        assert judge(found, ids)[1] > 0.2


@pytest.mark.parametrize("family", ["granite", "cohere", "llama"])
def test_the_loss_is_that_of_the_models_own_logits(family: str) -> None:
    torch.manual_seed(0)
    scale = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}.get(family, {})
    subject = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **WRITTEN["llama"], **scale)).eval()
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert judge(subject, ids)[0] == pytest.approx(float(subject(input_ids=ids, labels=ids).loss), rel=1e-4)


def test_refusals() -> None:
    with pytest.raises(InputError, match="run assay.tune_relu"), assay.attach(model(), "prosparse"):
        pass
    with pytest.raises(InputError, match="0 or more"), assay.attach(model(), "prosparse", limit=-1.0):
        pass
    with pytest.raises(InputError, match="ends that rise"):
        Stages(10, (1.0,), (5,))
    with pytest.raises(InputError, match="held_out of shape"):
        assay.tune_relu(model(), text(2), torch.zeros(3))
    with pytest.raises(InputError, match="0 steps"):
        assay.tune_relu(model(), text(2), text(2), steps=0)
