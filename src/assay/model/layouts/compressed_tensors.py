"""The layouts of compressed-tensors 0.20, as vLLM, SGLang and transformers read them, one format a module.

- `pack-quantized`: integers as dense streams of bits, scales [out, groups], packed zero points; older files have a
  `weight_g_idx` where groups are not neighbours, which the library reads no more.
- `int-quantized`, `float-quantized`, `naive-quantized`: one int8 or FP8 number a weight; scales of the tensor, of rows, of
  groups or of blocks; zero points in int8; `input_scale` where inputs are rounded
  by a stored scale. `mxfp8-quantized`: the same with exponents for scales.
- `nvfp4-pack-quantized`, `mxfp4-pack-quantized`: two E2M1 patterns a byte, the lower nibble first, with E4M3 scales that
  are divided by `weight_global_scale`, or with exponents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.model.layouts import floats
from assay.model.layouts.base import Headers, Parts, Stored, matches, modules, packed, parts_of
from assay.model.layouts.float8 import FP8, spread_blocks
from assay.model.layouts.own import torch_dtype
from assay.model.level import FORMATS, Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedInteger, PackedTable
from assay.model.tiles import PackedTiles

SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale",
)  # fmt: skip
EXPERTS = ".experts."
TILE = Level(8, 128, True, "tile")
"""FP8 with a scale a block, the one size of block that others write too."""
NIBBLES = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
Scheme = Mapping[str, Any]
Inputs = Literal["exact", "dynamic", "static"]
"""Whether inputs are rounded to 8 bits as well, and if so by scales found while the model runs or by stored ones."""


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every module in one of the formats, by its weight's name. Raises InputError for one without a scheme."""
    quantization = config["quantization_config"]
    lookup = _schemes(quantization)
    dtype = torch_dtype(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    found = {}
    for module in modules(stored, "weight_packed"):
        scheme = lookup(module.removesuffix("."))
        if scheme is None:
            raise InputError(f"config.json gives no quantization scheme for {module}weight")
        parts = parts_of(stored, module, SUFFIXES[1:])
        if "weight_scale" not in parts:
            raise InputError(f"tensor {module}weight_scale is missing from the weight files; download the model again")
        kind = _nibbles if _format(scheme) in NIBBLES else _streams
        found[f"{module}weight"] = kind(parts, stored, scheme, dtype)
    for module in modules(stored, "weight"):
        whole = stored[f"{module}weight"].dtype in FP8 | {torch.int8} and f"{module}weight_scale" in stored
        if whole and (scheme := lookup(module.removesuffix("."))) is not None:
            found[f"{module}weight"] = _numbers(parts_of(stored, module, SUFFIXES), stored, scheme)
    return found


def _schemes(quantization: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """The scheme of a module by its name: named outright, by a pattern, or by the class that all linear layers have."""
    exact: dict[str, Scheme] = {}
    patterns: list[tuple[str, Scheme]] = []
    common: list[Scheme] = []
    for group in (quantization.get("config_groups") or {}).values():
        if not group.get("weights"):
            continue
        scheme = {"format": quantization.get("format"), **{k: v for k, v in group.items() if v is not None}}
        for target in group.get("targets", []):
            if target.startswith("re:"):
                patterns.append((target[3:], scheme))
            elif "." not in target and target[:1].isupper():
                common.append(scheme)
            else:
                exact[target] = scheme

    def lookup(module: str) -> Scheme | None:
        if module in exact:
            return exact[module]
        return next((s for p, s in patterns if matches(p, module)), common[0] if common else None)

    return lookup


def _format(scheme: Scheme) -> str:
    """The format of a module; files of mixed formats name it in the group."""
    return str(scheme.get("format"))


def _streams(parts: dict[str, str], stored: Headers, scheme: Scheme, dtype: torch.dtype) -> Stored:
    weights = scheme["weights"]
    if weights.get("type") != "int" or "weight_shape" not in parts:
        raise InputError(f"{parts['weight_packed']}: assay reads no packed {weights.get('type')} weights of {_format(scheme)}")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    level = Level(int(weights["num_bits"]), size, bool(weights["symmetric"]))

    def restore(found: Parts) -> Packed:
        plain = PackedInteger.from_tensors(found, level)
        return PackedOrdered.of(plain, found["weight_g_idx"]) if "weight_g_idx" in found else plain

    return packed(parts, None, stored[parts["weight_scale"]].dtype, level, restore)


def _nibbles(parts: dict[str, str], stored: Headers, scheme: Scheme, dtype: torch.dtype) -> Stored:
    rows, half = stored[parts["weight_packed"]].shape
    micro = _format(scheme) == "mxfp4-pack-quantized"
    level = Level(4, 32, True, "mxfp") if micro else Level(4, 16, True, "nvfp")

    def restore(found: Parts) -> Packed:
        codes = torch.stack([found["weight_packed"] & 0xF, found["weight_packed"] >> 4], -1).flatten(1)
        unit = None if micro else found["weight_global_scale"].float().reciprocal().view(1)
        return _table(codes, floats.E2M1, level, dtype, found["weight_scale"], unit)

    def decode(found: Parts) -> Tensor:
        if micro:
            return restore(found).decode()
        codes = torch.stack([found["weight_packed"] & 0xF, found["weight_packed"] >> 4], -1).flatten(1)
        scale = found["weight_scale"].float() / found["weight_global_scale"].float()
        return (floats.E2M1[codes.int()].unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).to(dtype)

    made = packed(parts, (rows, 2 * half), dtype, level, restore)
    return Stored(made.parts, made.shape, dtype, decode, level, restore)


def _numbers(parts: dict[str, str], stored: Headers, scheme: Scheme) -> Stored:
    """One int8 or FP8 number a weight."""
    weights, info, scales = scheme["weights"], stored[parts["weight"]], stored[parts["weight_scale"]]
    strategy = weights.get("strategy") or "tensor"
    if strategy == "block":
        sides = list(weights.get("block_structure") or [128, 128])
        known = sides == [FORMATS[TILE.format].tile, TILE.group_size] and info.shape[1] % sides[1] == 0
        if known and info.dtype == torch.float8_e4m3fn:
            return packed(parts, info.shape, scales.dtype, TILE, _tiles)
        decode = partial(_blocks, parts["weight"], sides)
        return Stored(parts, info.shape, scales.dtype, decode)
    size = int(weights["group_size"]) if strategy == "group" else None
    integer, micro = info.dtype == torch.int8, scales.dtype == torch.uint8
    if info.dtype == torch.float8_e5m2:
        raise InputError(f"{parts['weight']}: compressed-tensors with E5M2 weights; assay reads E4M3")
    kind = "int" if integer else "mxfp" if micro else "fp"
    level = Level(int(weights["num_bits"]), size, bool(weights.get("symmetric", True)), kind)
    dtype = torch.bfloat16 if micro else scales.dtype

    def restore(found: Parts) -> Packed:
        scale = found["weight_scale"].reshape(-1, 1) if size is None else found["weight_scale"]
        scale = scale.expand(info.shape[0], -1).contiguous()
        if not integer:
            return _table(found["weight"].view(torch.uint8), floats.E4M3, level, dtype, scale, None)
        middle = 1 << (int(level.bits) - 1)
        codes = (found["weight"].short() + middle).to(torch.uint8)
        zeros = found["weight_zero_point"].short() if "weight_zero_point" in found else torch.zeros(1, 1, dtype=torch.int16)
        zeros = zeros.reshape(-1, 1) if size is None else zeros
        return PackedInteger(level, codes, scale, (zeros + middle).to(torch.uint8).expand(scale.shape).contiguous())

    return packed(parts, info.shape, dtype, level, restore)


def _tiles(found: Parts) -> PackedTiles:
    places = floats.to_places(found["weight"].view(torch.uint8), floats.E4M3)
    return PackedTiles(TILE, places, floats.table_of(floats.E4M3), found["weight_scale"])


def _blocks(name: str, sides: list[int], found: Parts) -> Tensor:
    scale = found["weight_scale"]
    return (found["weight"].float() * spread_blocks(name, scale.float(), found["weight"].shape, sides)).to(scale.dtype)


def _table(codes: Tensor, patterns: Tensor, level: Level, dtype: torch.dtype, scale: Tensor, unit: Tensor | None) -> PackedTable:
    try:
        places = floats.to_places(codes, patterns)
    except ValueError as error:
        raise InputError(f"a compressed weight can't be decoded: {error}; download the model again") from None
    return PackedTable(level, places, floats.table_of(patterns), dtype, scale, unit)


# ---- writing -------------------------------------------------------------------------------


def format_of(level: Level, rounded_inputs: bool) -> str:
    """The format in which weights of a level are stored; rounded_inputs: whether inputs are rounded to 8 bits as well."""
    if level.format == "int":
        return "int-quantized" if rounded_inputs else "pack-quantized"
    known = {
        ("fp", 8): "float-quantized", ("tile", 8): "float-quantized", ("mxfp", 4): NIBBLES[1], ("mxfp", 8): "mxfp8-quantized",
        ("nvfp", 4): NIBBLES[0],
    }  # fmt: skip
    return known[level.format, int(level.bits)]


def tensors(weight: Packed, rounded_inputs: bool = False) -> dict[str, Tensor]:
    """The stored parts of a weight."""
    form = format_of(weight.level, rounded_inputs)
    if form == "pack-quantized":
        return weight.tensors()
    if form == "int-quantized":
        assert isinstance(weight, PackedInteger)
        middle = 1 << (int(weight.level.bits) - 1)
        return {"weight": (weight.codes.short() - middle).to(torch.int8), "weight_scale": weight.scale.contiguous()}
    assert isinstance(weight, PackedTable | PackedTiles) and weight.scale is not None
    if isinstance(weight, PackedTiles) or form not in NIBBLES:
        numbers = floats.to_patterns(weight.codes, floats.E4M3).view(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale": weight.scale.contiguous()}
    codes = floats.to_patterns(weight.codes, floats.E2M1)
    found = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": weight.scale.contiguous()}
    if weight.global_scale is not None:
        found["weight_global_scale"] = weight.global_scale.reciprocal()
    return found


def nbytes(level: Level, rows: int, columns: int, itemsize: int, rounded_inputs: bool = False) -> int:
    """Exact bytes of a [rows, columns] weight."""
    form = format_of(level, rounded_inputs)
    if form == "pack-quantized":
        return level.nbytes(rows, columns, itemsize)
    one = 1 if level.format in ("mxfp", "nvfp") else itemsize
    scaled = -(-rows // FORMATS[level.format].tile)
    return rows * columns * int(level.bits) // 8 + scaled * level.groups(columns) * one + 4 * (form == NIBBLES[0])


def config(levels: Mapping[str, Level], kept: list[str], inputs: Inputs = "exact") -> dict[str, Any]:
    """quantization_config: one group a level, and the linear modules that stay."""
    groups: dict[str, Any] = {}
    for index, level in enumerate(sorted(set(levels.values()))):
        groups[f"group_{index}"] = {
            "targets": sorted(name.removesuffix(".weight") for name, own in levels.items() if own == level),
            "weights": _arguments(level), "input_activations": None if inputs == "exact" else _inputs(level, inputs),
            "output_activations": None, "format": format_of(level, inputs != "exact"),
        }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": groups, "ignore": kept, "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def kept_experts(names: Iterable[str], levels: Mapping[str, Level]) -> list[str]:
    """Entries of `ignore` for layers none of whose experts is compressed: vLLM asks for names that the files may not have."""
    kept, compressed = ({n.partition(EXPERTS)[0] for n in found if EXPERTS in n} for found in (names, levels))
    return [rf"re:^{re.escape(layer)}\.experts(\..*)?$" for layer in sorted(kept - compressed)]


def _arguments(level: Level) -> dict[str, Any]:
    by_group = {"nvfp": "tensor_group", "tile": "block"}.get(level.format, "group")
    sides = [FORMATS["tile"].tile, level.group_size] if level.format == "tile" else None
    found: dict[str, Any] = {
        "num_bits": level.bits, "type": "int" if level.format == "int" else "float", "symmetric": level.symmetric,
        "strategy": "channel" if level.group_size is None else by_group, "group_size": None if sides else level.group_size,
        "dynamic": False, "actorder": None, "block_structure": sides, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    kinds = {"nvfp": "torch.float8_e4m3fn", "mxfp": "torch.uint8"}
    return found | ({"scale_dtype": kinds[level.format], "zp_dtype": kinds[level.format]} if level.format in kinds else {})


def _inputs(level: Level, inputs: Inputs) -> dict[str, Any]:
    """Inputs rounded to 8 bits: by a stored scale, or by one for each token, and for the inputs of each block, while it runs."""
    size = level.group_size if level.format == "tile" else None
    strategy = "tensor" if inputs == "static" else "token" if size is None else "group"
    return {
        "num_bits": 8, "type": "int" if level.format == "int" else "float", "symmetric": True, "strategy": strategy,
        "group_size": size, "dynamic": inputs == "dynamic", "actorder": None, "block_structure": None,
        "observer": "minmax" if inputs == "static" else None, "observer_kwargs": {},
    }  # fmt: skip


def input_scale(largest: Tensor, level: Level) -> Tensor:
    """The stored scale [1], float32, of inputs whose largest magnitude is `largest` (a number)."""
    top = 127.0 if level.format == "int" else float(floats.E4M3[floats.E4M3.isfinite()].max())
    return (largest.float() / top).clamp_min(torch.finfo(torch.float32).tiny).reshape(1)


CACHE_SCALES = (".k_scale", ".v_scale")
CACHE_SCHEME: Mapping[str, Any] = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False,
    "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
"""`kv_cache_scheme` of a checkpoint in which each attention has `CACHE_SCALES`."""


def cache_scale(largest: Tensor) -> Tensor:
    """The stored scale [1], float32, of keys or values whose largest magnitude is `largest`: FP8 E4M3 reaches it."""
    return input_scale(largest, Level(8, None, True, "fp"))
