"""A GGUF file as a model folder's weights and config: its tensors by their names in transformers, decoded exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

from assay.model import memory
from assay.model.errors import InputError
from assay.model.gguf_header import open_gguf
from assay.model.gguf_layout import Target, depth, facts, pairs, yarn_magnitude
from assay.model.stored import TensorInfo

SUFFIX = ".gguf"
PLAIN = {
    GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}  # fmt: skip


def find(source: str | Path) -> Path | None:
    """The GGUF file that is meant by a path: itself, or the one in a folder without safetensors. Raises InputError."""
    path = Path(source)
    if path.is_file() and path.suffix == SUFFIX:
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise InputError(f"{path} holds {len(files)} GGUF files; name the one, like {files[0]}")
    return files[0] if files else None


def read(path: Path, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and stored tensors. config: the one beside the file, whose values then hold; None: made from the metadata.

    Raises InputError for a damaged file, an architecture without a layout, and tensors without a place.
    """
    try:
        reader = open_gguf(path)
        tensors = {t.name: t for t in reader.tensors}
        made = dict(config) if config is not None else _config(path, reader, tensors)
        return made, _stored(path, made, tensors)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, ArithmeticError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(f"{path}: not a GGUF file, or a damaged one ({reason}); download it again") from error


def _stored(path: Path, made: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> dict[str, TensorInfo]:
    if depth(made) > len(tensors):
        raise InputError(f"{path}: {depth(made)} blocks, but {len(tensors)} tensors; download it again")
    stored: dict[str, TensorInfo] = {}
    placed = set()
    experts: dict[str, int] = {}
    for name, target in pairs(made):
        if target.name not in tensors or (target.name == "output.weight" and made.get("tie_word_embeddings")):
            continue
        placed.add(target.name)
        place = experts.get(target.name, 0)
        experts[target.name] = place + 1
        stored[name] = _info(path, tensors[target.name], target, place)
    computed = {f"{name}.weight" for name in facts()["computed"]}
    if odd := sorted(set(tensors) - placed - computed - {"output.weight"}):
        raise InputError(f"{path}: {odd[0]} has no place in {made['model_type']} models of transformers")
    return stored


def _info(path: Path, tensor: ReaderTensor, target: Target, place: int) -> TensorInfo:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    count = shape[0] if target.stacked else 1
    shape = shape[1:] if target.stacked else shape
    shape = shape[::-1] if target.turned and len(shape) == 2 else shape
    dtype = torch.float32 if target.offset else PLAIN.get(tensor.tensor_type, torch.float32)
    return TensorInfo(path, dtype, shape, int(tensor.n_bytes) // count, read=_reader(path, tensor, target, place, dtype))


def _reader(path: Path, tensor: ReaderTensor, target: Target, place: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            return decoded()
        except (ValueError, IndexError, RuntimeError, TypeError, NotImplementedError, OSError) as error:
            if memory.lacked(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{tensor.name} can't be decoded ({reason}); download the file again") from error

    def decoded() -> Tensor:
        data = _stored_data(path, tensor, place if target.stacked else None)
        if tensor.tensor_type == GGMLQuantizationType.BF16:
            value = torch.from_numpy(data).view(torch.bfloat16)
        elif tensor.tensor_type in PLAIN:
            value = torch.from_numpy(data)
        else:
            value = torch.from_numpy(np.array(quants.dequantize(data, tensor.tensor_type)))
        return target.backward(value).to(dtype).contiguous()

    return read


def _stored_data(path: Path, tensor: ReaderTensor, place: int | None) -> npt.NDArray[Any]:
    """A tensor as it is stored, or one matrix of a stack. Raises OSError for a file that ends too early.

    It is read, not mapped: a mapped file that another program cuts short kills the process.
    """
    shape, dtype = tensor.data.shape, tensor.data.dtype
    wanted = shape if place is None else shape[1:]
    count = math.prod(wanted)
    raw = np.fromfile(path, dtype, count, offset=int(tensor.data_offset) + (place or 0) * count * dtype.itemsize)
    if len(raw) != count:
        raise OSError("the file ends too early")
    return raw.reshape(wanted)


# ---- config ----------------------------------------------------------------------------------


def _config(path: Path, reader: GGUFReader, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """config.json in the words of transformers, from the metadata. Raises InputError."""
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.tok")}
    arch = str(values.get("general.architecture"))
    fitting = {k: f for k, f in facts()["families"].items() if f["arch"] == arch}
    if not fitting:
        known = ", ".join(dict.fromkeys(f["arch"] for f in facts()["families"].values()))
        raise InputError(f"{path}: a GGUF file of architecture {arch}, whose layout is not known; there are {known}")
    experts = bool(values.get(f"{arch}.expert_count"))
    kind = next((k for k, f in fitting.items() if bool(f.get("experts")) == experts), None)
    if kind is None:
        raise InputError(f"{path}: {arch} models {'with' if experts else 'without'} experts have no known layout")
    own = fitting[kind]
    table = facts()["metadata"]
    table = {key: table[key] for key in own.get("keys", table)} | own.get("metadata", {})
    other = {name: key for key, name in own.get("alias", {}).items()}
    found = {name: _short(values[f"{arch}.{key}"]) for key, name in table.items() if f"{arch}.{key}" in values}
    mine = {other.get(name, name): value for name, value in found.items()}
    config = {name: value for name, value in mine.items() if name not in ("rope_theta", "rotary_dim")}
    fixed = {k: v[-1] if isinstance(v, list) else v for k, v in own["must"].items() if not str(v).startswith("=")}
    fixed |= {k: config[v[1:]] for k, v in own["must"].items() if str(v).startswith("=")}
    config |= {k: v for k, v in fixed.items() if k != "rope_local_theta"}
    config["model_type"] = kind
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if "head_dim" not in config and "num_attention_heads" in config:
        config["head_dim"] = values.get(f"{arch}.rope.dimension_count", config["hidden_size"] // config["num_attention_heads"])
    if "rope.freq_base" in table:
        config["rope_parameters"] = _rope(path, values, arch, own, fixed, tensors)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = values.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that stands for it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(
    path: Path, values: Mapping[str, Any], arch: str, own: Mapping[str, Any], fixed: Mapping[str, Any],
    tensors: Mapping[str, ReaderTensor],
) -> dict[str, Any]:  # fmt: skip
    if "rope_freqs.weight" in tensors or any(name.startswith("rope_factors") for name in tensors):
        raise InputError(f"{path}: rotary positions with factors of their own; put the model's config.json beside the file")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.get(f"{arch}.rope.freq_base", 10000.0)}
    width, heads = values[f"{arch}.embedding_length"], values[f"{arch}.attention.head_count"]
    head = values.get(f"{arch}.attention.key_length", width // heads)
    rotary = values.get(f"{arch}.rope.dimension_count", head)
    if rotary != head:
        rope["partial_rotary_factor"] = rotary / head
    kind = values.get(f"{arch}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": values[f"{arch}.rope.scaling.factor"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values[f"{arch}.rope.scaling.original_context_length"]
        if (beside := values.get(f"{arch}.rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = beside * yarn_magnitude(rope["factor"])
    if "period" not in own:
        return rope
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": fixed["rope_local_theta"]}}
