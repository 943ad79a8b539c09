"""What a model needs beside its weights while it is served, per token and layer: plain numbers, kept in the profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import DynamicCache

from assay.measure.stream import StreamedModel
from assay.model.errors import InputError

STATE_ITEMSIZE = 4


@dataclass(frozen=True)
class LayerCache:
    """Cache of one layer. keys, values: elements a token; window: tokens it looks back at most; state: bytes a
    sequence that don't grow with the context."""

    keys: int = 0
    values: int = 0
    window: int | None = None
    state: int = 0


@dataclass(frozen=True)
class Footprint:
    """Sizes that decide the memory of serving, in elements.

    latent: elements a token that stand for keys and values of a layer where an engine stores these
    compressed (multi-head latent attention), else None; context: tokens the model reads, None without a limit;
    unknown: why the cache isn't known, else "".
    """

    layers: tuple[LayerCache, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    latent: int | None
    context: int | None
    unknown: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any] | None) -> Footprint:
        """Raises InputError for a profile that holds none."""
        if value is None:
            raise InputError("the profile doesn't say what the model's cache needs; run assay profile again")
        return cls(**(value | {"layers": tuple(LayerCache(**layer) for layer in value["layers"])}))


def footprint(model: StreamedModel) -> Footprint:
    """The sizes of a model, from its config and the shapes of its matrices."""
    config = model.model.config.get_text_config(decoder=True)
    layers, unknown = _layers(model, config)
    latent = _get(config, "kv_lora_rank")
    hidden = int(_get(config, "hidden_size", "d_model", "n_embd") or 0)
    wide = max((s.shape[0] for s in model.anatomy.sites.values() if s.role in ("mlp.up", "mlp.gate")), default=4 * hidden)
    return Footprint(
        layers, hidden, wide, int(_get(config, "vocab_size") or 0),
        int(latent + (_get(config, "qk_rope_head_dim") or 0)) if latent else None,
        _get(config, "max_position_embeddings"), unknown,
    )  # fmt: skip


def _layers(model: StreamedModel, config: Any) -> tuple[tuple[LayerCache, ...], str]:
    shapes = {(s.block, s.role): s.shape[0] for s in model.anatomy.sites.values()}
    found, unknown = [], ""
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kind, window, state = type(layer).__name__, None, 0
        if getattr(layer, "is_sliding", False) is True:
            window = int(layer.sliding_window)  # type: ignore[union-attr]
        if "Linear" in kind:
            state = _state(config)
            unknown = unknown or ("" if state else f"the state of the layers of {model.anatomy.family} is not known")
        keys, values = (0, 0) if kind == "LinearAttentionLayer" else _heads(config, shapes, index)
        unknown = unknown or ("" if keys or state else f"the attention of {model.anatomy.family} is not known")
        found.append(LayerCache(keys, values, window, state))
    return tuple(found), unknown


def _heads(config: Any, shapes: dict[tuple[int | None, str], int], index: int) -> tuple[int, int]:
    """Elements a token of keys and of values: what the projections put out, else what the config says."""
    if (index, "attn.k") in shapes and (index, "attn.v") in shapes:
        return shapes[index, "attn.k"], shapes[index, "attn.v"]
    heads = int(_get(config, "num_attention_heads", "n_head") or 0)
    if not heads:
        return 0, 0
    nope, rope, value = (_get(config, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if nope and rope and value:
        return heads * (nope + rope), heads * value
    size = _get(config, "head_dim") or int(_get(config, "hidden_size", "n_embd") or 0) // heads
    groups = _get(config, "num_key_value_heads", "num_kv_heads") or heads
    if _get(config, "multi_query") and not _get(config, "new_decoder_architecture"):
        groups = 1
    return groups * size, groups * size


def _state(config: Any) -> int:
    """Bytes a sequence of a linear-attention layer: its recurrent matrix and the tail of its short convolution."""
    wanted = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
    parts = [_get(config, name) for name in wanted]
    if not all(parts):
        return 0
    key_heads, key, value_heads, value = (int(p) for p in parts)
    mixed = 2 * key_heads * key + value_heads * value
    return STATE_ITEMSIZE * (value_heads * key * value + mixed * int(_get(config, "linear_conv_kernel_dim") or 4))


def _get(config: Any, *names: str) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)
