"""Puts a stack of policies into a transformers model: its attention function, its mask, its caches; and takes it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from assay.model.arch import CACHED
from assay.model.errors import InputError
from assay.runtime.attention import EMPTY, Rule, attend, visible
from assay.runtime.layer import Layer, Pending
from assay.runtime.policy import Stack

NAME = "assay"
REPLACEABLE = ("sdpa", "eager")


class Attached:
    """What is known of the caches of an attached model; `cache` is the one made last."""

    def __init__(self, stack: Stack, model: PreTrainedModel) -> None:
        self.stack, self._model = stack, model
        self.cache: Cache | None = None
        self._layers: list[list[Layer]] = []

    @property
    def layers(self) -> list[Layer]:
        """Layers of the cache made last."""
        return self._layers[-1] if self._layers else []

    @property
    def nbytes(self) -> int:
        """Bytes that the cache made last holds now: keys, values, scales, positions and what policies count."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def away(self) -> int:
        """Bytes that it keeps elsewhere: in host memory for a GPU, in a mapped file for a CPU."""
        return sum(layer.away for layer in self.layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache for this model, with the policies in it."""
        cache = DynamicCache()
        self._adopt(cache)
        return cache

    def close(self) -> None:
        """Refuse further use of every cache."""
        for layers in self._layers:
            for layer in layers:
                layer.closed = True

    def check(self, cache: Any) -> Cache:
        """A cache that the policies are in, from None, an empty one, or one of this attachment. Raises InputError."""
        if cache is None:
            return self.new_cache()
        if any(cache.layers is known for known in self._layers):
            return cache
        if type(cache) not in (Cache, DynamicCache) or getattr(cache, "offloading", False):
            raise InputError(
                f"{type(cache).__name__} can't hold a policy; leave out cache_implementation and past_key_values, "
                "or give a DynamicCache()"
            )
        if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
            raise InputError("the cache holds tokens from outside this `with` block; start with an empty one")
        self._adopt(cache)
        return cache

    def _adopt(self, cache: Cache) -> None:
        layers: list[Layer] = []
        config = self._model.config
        width = getattr(config, "max_position_embeddings", None)
        layers.extend(Layer(self.stack, i, layers, width) for i in range(config.num_hidden_layers))
        cache.layers, cache.layer_class_to_replicate = layers, None  # type: ignore[assignment]
        self._layers = [*self._layers[-1:], layers]
        self.cache = cache


@contextmanager
def attached(model: PreTrainedModel, stack: Stack) -> Iterator[Attached]:
    """A model whose new caches follow the policies. Raises InputError for a model that can't."""
    check_model(model)
    before = model.config._attn_implementation
    found = Attached(stack, model)
    handle = model.base_model.register_forward_pre_hook(_cache_hook(found), with_kwargs=True)
    model.config._attn_implementation = NAME
    try:
        yield found
    finally:
        model.config._attn_implementation = before
        handle.remove()
        found.close()


def check_model(model: PreTrainedModel) -> None:
    """Raises InputError with the reason where a cache policy can't be attached."""
    family = model.config.model_type
    if family not in CACHED:
        raise InputError(f"{family}: cache policies know {', '.join(CACHED)}; its cache or its attention is another")
    implementation = model.config._attn_implementation
    if implementation == NAME:
        raise InputError("a policy is attached to this model already; leave its `with` block first, or attach both at once")
    if implementation not in REPLACEABLE:
        raise InputError(f"attention {implementation!r} can't be replaced; load the model with attn_implementation='sdpa'")
    if model.training:
        raise InputError("the model is in training mode; call model.eval() first")


def attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, position_ids: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function: through the cache layer where there is one, else causal over the keys given."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError("an attention mask of four dimensions; give one of [rows, tokens]")
    if isinstance(key, Pending):
        out = key.layer.attend(query, key, attention_mask, position_ids, rule)
    else:
        order = torch.arange(key.shape[2], device=query.device)[None].expand(len(query), -1)
        if attention_mask is not None:
            order = torch.where(attention_mask, order, EMPTY)
        simple = attention_mask is None and (sliding_window is None or key.shape[2] <= sliding_window)
        out = attend(query, key, value, None if simple else visible(order[:, None], order, sliding_window), rule)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of the tokens, bool [rows, tokens], without causality; None where nothing is padding."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def _cache_hook(found: Attached) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("use_cache")
        wanted = module.config.use_cache if wanted is None else wanted  # type: ignore[union-attr]
        if wanted or kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = found.check(kwargs.get("past_key_values"))
        return args, kwargs

    return hook


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
