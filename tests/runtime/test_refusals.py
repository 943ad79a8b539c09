"""What can't be attached is refused in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build
from runtime.subjects import model, text
from transformers import DynamicCache, StaticCache

import assay
from assay.methods.cache.h2o import H2O
from assay.model.errors import InputError


def enter(found: Any, *policies: Any, **options: Any) -> None:
    with assay.attach(found, *policies, **options):
        found(text(1), use_cache=True)


@pytest.mark.parametrize(("options", "says"), [
    ({"budget": 0.0}, "above 0"), ({"budget": 1.5}, "up to 1"), ({"budget": -1.0}, "above 0"),
    ({"tokens": 4}, "4 first that always stay"), ({"budget": 0.05}, "larger budget"), ({"budgte": 0.5}, "did you mean budget"),
    ({"shape": "cone"}, "uniform, pyramid, prefix"), ({"shape": (1.0, 2.0)}, "2 layers for a model of 3"),
    ({"sinks": -1}, "0 or more"),
])  # fmt: skip
def test_bad_budgets(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        enter(model(), "streaming_llm", **options)


@pytest.mark.parametrize(("policies", "options", "says"), [
    (("snapvk",), {}, "did you mean snapkv"), ((), {}, "no policy given"), (("h2o", "snapkv"), {}, "both drop tokens"),
    (("kivi", "fp8"), {}, "two policies quantize the keys"), (("cskv",), {}, "calibration=ids"),
    (("kivi",), {"bits": 3}, "1, 2, 4, 8"), (("kivi",), {"residual": 20}, "multiple of"), (("think",), {"thin": 1.0}, "thin"),
    (("snapkv",), {"kernel": 4}, "odd"), (("double_sparsity",), {"read": 0.0, "calibration": text(2)}, "above 0"),
    (("cskv", "h2o"), {"calibration": text(2)}, "stores heads together"),
    (("cskv",), {"calibration": torch.zeros(3)}, "token ids"),
    (("double_sparsity", "kivi"), {"offload": True, "calibration": text(2)}, "use it alone"),
])  # fmt: skip
def test_bad_policies(policies: tuple[str, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        enter(model(), *policies, **options)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "falcon", "gpt_neox", "mamba", "mixtral"])
def test_other_families(family: str) -> None:
    with pytest.raises(InputError, match=f"{family}: cache policies know llama"):
        enter(build(family)[1], "h2o")


def _static(found: Any) -> None:
    found.generate(text(1), max_new_tokens=4, cache_implementation="static", pad_token_id=0)


def _own_static(found: Any) -> None:
    found(text(1), past_key_values=StaticCache(config=found.config, max_cache_len=64))


def _filled(found: Any) -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    found(text(1), past_key_values=cache)


def _long(found: Any) -> None:
    found(text(1, 200), use_cache=True)


def _right(found: Any) -> None:
    mask = torch.ones(2, 40)
    mask[0, -3:] = 0
    found(text(2), attention_mask=mask, use_cache=True)


def _four(found: Any) -> None:
    found(text(1), attention_mask=torch.ones(1, 1, 40, 40), use_cache=True)


def _short_mask(found: Any) -> None:
    cache = found(text(1), use_cache=True).past_key_values
    found(text(1), attention_mask=torch.tensor([[0] + [1] * 39]), past_key_values=cache, use_cache=True)


def _crop(found: Any) -> None:
    found(text(1), use_cache=True).past_key_values.crop(-2)


@pytest.mark.parametrize(("use", "says"), [
    (_static, "StaticCache can't hold"), (_own_static, "StaticCache can't hold"),
    (_filled, "from outside"), (_long, "200 tokens in a context"),
    (_right, "pad on the left"), (_four, "four dimensions"), (_short_mask, "for all tokens so far"), (_crop, "can't be cropped"),
])  # fmt: skip
def test_bad_use(use: Callable[[Any], None], says: str) -> None:
    found = model()
    with assay.attach(found, "h2o"), pytest.raises(InputError, match=says):
        use(found)


def test_twice_in_training_and_after_the_end() -> None:
    found = model()
    with assay.attach(found, "h2o") as attached:
        cache = found(text(1), use_cache=True).past_key_values
        assert attached.nbytes > 0
        with pytest.raises(InputError, match="attached to this model already"):
            enter(found, "snapkv")
    with pytest.raises(InputError, match="has ended"):
        found(text(1), past_key_values=cache, use_cache=True)
    with assay.attach(found, "h2o"), pytest.raises(InputError, match="from outside"):
        found(text(1), past_key_values=cache, use_cache=True)
    found.train()
    with pytest.raises(InputError, match="training mode"):
        enter(found, "h2o")
    found.eval()
    found.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="attn_implementation='sdpa'"):
        enter(found, "h2o")


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    found, ids = model(), text(1)
    with torch.no_grad():
        before = found(ids).logits
        with pytest.raises(ZeroDivisionError), assay.attach(found, H2O(budget=0.3)):
            found(ids, use_cache=True)
            raise ZeroDivisionError
        assert torch.equal(found(ids).logits, before)
