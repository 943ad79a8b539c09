"""Tiny random models of every supported family, made in a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2}
_GPT: dict[str, Any] = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16},
    "gemma3_text": _COMMON | {"head_dim": 16},
    "phi3": _COMMON | {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    "opt": {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    },
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "bloom": _GPT,
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY},
    "mixtral": _COMMON | _MOE | {"num_local_experts": 4},
    "qwen3_moe": _COMMON | _MOE | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4},
    "bert": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "vit": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 8, "num_labels": 5,
    },
}  # fmt: skip
FAMILIES = tuple(SETTINGS)
WRITTEN: dict[str, dict[str, Any]] = SETTINGS | {
    "gemma": _COMMON | {"head_dim": 16},
    "olmo2": _COMMON,
    "starcoder2": _COMMON,
    "qwen2_moe": _COMMON | _MOE | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "olmoe": _COMMON | _MOE | {"num_experts": 4},
}
"""Families that every writer is run on, twenty of them language models."""
CAUSAL = tuple(f for f in FAMILIES if f not in ("bert", "vit"))


def build(family: str, **changes: Any) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Config and float32 model of a family in evaluation mode; the same weights every time."""
    config = AutoConfig.for_model(family, **WRITTEN[family] | changes)
    kind = {"bert": AutoModelForMaskedLM, "vit": AutoModelForImageClassification}.get(family, AutoModelForCausalLM)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config).float().eval()
    return config, model
