"""Tiny models, text and steps that the tests of the cache share."""

from __future__ import annotations

from typing import Any

import torch
from families import build
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods import base
from assay.runtime.policy import Evictor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ALL = base.names("cache")
EVICTORS = [name for name in ALL if isinstance(base.load(name, "cache")(), Evictor)]
EXACT: dict[str, dict[str, Any]] = {
    "think": {"thin": 0.0},
    "cskv": {"density": 1.0, "window": 8},
    "double_sparsity": {"read": 1.0},
}
"""Options with which a policy changes nothing."""
CODED = ("kivi", "fp8", "block_float", "fireq")


def model(family: str = "llama") -> PreTrainedModel:
    """Three layers, four query heads, two key heads; gemma's outer layers see 8 tokens."""
    sliding = SLIDING if family.startswith("gemma") else {}
    found = build(family, num_hidden_layers=3, max_position_embeddings=128, **sliding)[1]
    generator = torch.Generator().manual_seed(5)
    for name, parameter in found.named_parameters():
        if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
            parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    return found


def text(rows: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(pads: int, length: int = 40) -> tuple[Tensor, Tensor]:
    """Two rows and their mask; the second has padding on the left."""
    ids = text(2, length)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids, mask


@torch.no_grad()
def run(found: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, prompt: int = 30, cache: Any = None, see: Any = None,
        chunk: int | None = None) -> tuple[Tensor, Any]:  # fmt: skip
    """Logits [B, S, V] of a prompt at once or in chunks, then token by token, and the cache; see(tokens so far) after each."""
    mask = torch.ones_like(ids) if mask is None else mask
    where = (mask.cumsum(1) - 1).clamp_min(0)
    ends = [*range(chunk or prompt, prompt, chunk or prompt), prompt, *range(prompt + 1, ids.shape[1] + 1)]
    start, logits = 0, []
    for end in ends:
        out = found(ids[:, start:end], attention_mask=mask[:, :end], position_ids=where[:, start:end], past_key_values=cache,
                    use_cache=True)  # fmt: skip
        cache = out.past_key_values
        logits.append(out.logits)
        if see:
            see(end)
        start = end
    return torch.cat(logits, 1), cache
