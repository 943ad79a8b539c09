"""What vLLM 0.11 seems to ask of a compressed-tensors checkpoint: inferred from its sources, never run in vLLM.

Which settings of a group select which kernel, which parameters that kernel loads with which shapes and dtypes, how layers
that it joins are matched with targets and `ignore`. A checkpoint that keeps all of this may still be refused: kernels have
limits on shapes that depend on the GPU, and of experts and caches the sources of other versions were read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from assay.engines.fused import siblings
from assay.model.checkpoint import Checkpoint
from assay.model.layouts.compressed_tensors import EXPERTS
from assay.model.stored import TensorInfo

Shapes = Mapping[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_ONLY_BITS = (4, 8)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


def problems(written: Checkpoint) -> list[str]:
    """What vLLM would refuse or read wrongly by these rules, one sentence each; empty for a checkpoint that keeps them."""
    config = written.config.get("quantization_config") or {}
    if config.get("quant_method") != "compressed-tensors":
        return []
    found = [f"config.json has {key}, which vLLM 0.11 warns of or refuses" for key in ("sparsity_config",) if key in config]
    if config.get("quantization_status") != "compressed":
        found.append("quantization_status is not compressed")
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        if reason := _kernel_problem(group, str(group.get("format") or config.get("format"))):
            found.append(f"{', '.join(group['targets'][:2])}: {reason}")
    modules = _modules(written)
    owners = {module: [g for g in groups if _matches(module, g["targets"])] for module in modules}
    ignored = {module for module in modules if _matches(module, config.get("ignore") or [])}
    for module, infos in modules.items():
        own = owners[module]
        compressed = "weight_packed" in infos or "weight_scale" in infos
        if len(own) > 1:
            found.append(f"{module} is a target of {len(own)} groups")
        elif compressed and (not own or module in ignored):
            found.append(f"{module} is compressed, but {'ignored' if own else 'no group names it'}")
        elif own and not compressed:
            found.append(f"{module} is a target, but not compressed")
        elif compressed:
            found += _expert_problems(module, own[0])
            found += _shape_problems(module, infos, own[0], str(own[0].get("format") or config.get("format")))
        elif module not in ignored and not module.endswith(("lm_head", "embed_tokens")) and groups and not own:
            found.append(f"{module} is a linear layer that is neither a target nor in ignore")
    described = [*(t for group in groups for t in group["targets"]), *(config.get("ignore") or [])]
    for layer in sorted({name.partition(EXPERTS)[0] for name in written.stored if EXPERTS in name}):
        if lost := [n for leaf in EXPERT_NAMES if not _matches(n := f"{layer}{EXPERTS}0.{leaf}", described)]:
            found.append(f"{lost[0]}, by which the experts of {layer} are found, is neither a target nor in ignore")
    return found + _joined_problems(written, owners, ignored) + _cache_problems(written, config)


def _modules(written: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """Stored parts of every module that is compressed or has a matrix, but for embeddings."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in written.stored.items():
        module, _, part = name.rpartition(".")
        if part.startswith(("weight", "input_")):
            found.setdefault(module, {})[part] = info
    matrices = {m: p for m, p in found.items() if "weight_packed" in p or ("weight" in p and len(p["weight"].shape) == 2)}
    return {m: p for m, p in matrices.items() if "embed" not in m.rpartition(".")[2]}


def _matches(module: str, targets: Iterable[str]) -> bool:
    return any(re.match(t[3:], module) if t.startswith("re:") else t == module or t == "Linear" for t in targets)


def _kernel_problem(group: Mapping[str, Any], form: str) -> str | None:
    """Why no kernel takes a group's settings."""
    weights, inputs = group["weights"], group.get("input_activations")
    bits, strategy = weights["num_bits"], weights["strategy"]
    if form not in FORMATS:
        return f"no kernel for format {form}"
    if weights.get("dynamic"):
        return "weights can't be dynamic"
    if form == "nvfp4-pack-quantized":
        fits = (weights["type"], bits, strategy, weights["group_size"]) == ("float", 4, "tensor_group", 16)
        return None if fits and weights["symmetric"] else "NVFP4 has tensor groups of 16"
    if form == "pack-quantized":
        if weights["type"] != "int" or bits not in WEIGHT_ONLY_BITS or strategy not in ("group", "channel"):
            return f"packed weights are integers of {WEIGHT_ONLY_BITS} bits in groups or rows"
        return "packed weights with rounded inputs" if inputs else None
    if bits != 8 or not weights["symmetric"] or strategy not in ("tensor", "channel", "block"):
        return "8-bit weights are symmetric, with a scale of the tensor, a row or a block"
    if weights["type"] == "int" and (inputs is None or strategy == "block"):
        return "INT8 weights need rounded inputs"
    if inputs and (inputs["num_bits"], inputs["type"]) != (8, weights["type"]):
        return "inputs are rounded to another type than the weights"
    return _input_problem(weights, inputs) if inputs else None


def _input_problem(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
    """Why no kernel rounds inputs this way for 8-bit weights."""
    if weights["strategy"] == "block":
        facts = (inputs.get("dynamic"), inputs["strategy"], inputs.get("group_size"))
        fits = facts == (True, "group", weights["block_structure"][1])
        return None if fits else "inputs of weights in blocks are rounded in groups as wide as a block, while the model runs"
    if not inputs.get("dynamic") and (inputs["strategy"] != "tensor" or not inputs["symmetric"]):
        return "stored scales of inputs are one a layer and symmetric"
    return None


def _shape_problems(module: str, infos: Mapping[str, TensorInfo], group: Mapping[str, Any], form: str) -> list[str]:
    """Parts that a kernel doesn't find, or finds in another shape or dtype than it loads."""
    found = []
    for part, (dtypes, shape) in _wanted(infos, group, form).items():
        info = infos.get(part)
        if info is None:
            found.append(f"{module}.{part} is missing")
        elif info.dtype not in dtypes or info.shape != shape:
            found.append(f"{module}.{part} is {info.dtype} {list(info.shape)}, the kernel loads {dtypes[0]} {list(shape)}")
    sides = group["weights"].get("block_structure") if group["weights"]["strategy"] == "block" else None
    if sides and any(n % side for n, side in zip(infos["weight"].shape, sides, strict=True)):
        found.append(f"{module} is {list(infos['weight'].shape)}, which blocks of {sides} don't divide")
    return found


def _expert_problems(module: str, group: Mapping[str, Any]) -> list[str]:
    """Experts are found by the names of expert 0, and have fewer kernels than other layers."""
    if EXPERTS not in module:
        return []
    leaf, weights = module.rpartition(".")[2], group["weights"]
    if leaf not in EXPERT_NAMES:
        return [f"{module}: compressed experts are found by the names {', '.join(EXPERT_NAMES)} only"]
    if not weights["symmetric"]:
        return [f"{module}: experts have no zero points"]
    if weights["type"] == "float" and weights["num_bits"] == 8 and not group.get("input_activations"):
        return [f"{module}: FP8 experts need rounded inputs"]
    if (group.get("input_activations") or {}).get("dynamic") is False and weights["strategy"] != "tensor":
        return [f"{module}: experts with stored scales of inputs need one scale for the weights as well"]
    return []


def _wanted(infos: Mapping[str, TensorInfo], group: Mapping[str, Any], form: str) -> Shapes:
    weights = group["weights"]
    rows = infos["weight_packed" if "weight_packed" in infos else "weight"].shape[0]
    if form == "nvfp4-pack-quantized":
        columns = 2 * infos["weight_packed"].shape[1]
        return {
            "weight_packed": ((torch.uint8,), (rows, columns // 2)),
            "weight_scale": ((torch.float8_e4m3fn,), (rows, columns // 16)),
            "weight_global_scale": ((torch.float32,), (1,)),
        }
    if form == "pack-quantized":
        bits, scale = weights["num_bits"], infos["weight_scale"].shape
        columns = infos["weight_packed"].shape[1] * 32 // bits
        groups = columns // weights["group_size"] if weights["strategy"] == "group" else 1
        wanted: dict[str, Any] = {
            "weight_packed": ((torch.int32,), (rows, columns * bits // 32)),
            "weight_scale": (FLOATS, (rows, groups)), "weight_shape": ((torch.int64, torch.int32), (2,)),
        }  # fmt: skip
        if not weights["symmetric"]:
            wanted["weight_zero_point"] = ((torch.int32,), (rows * bits // 32, scale[1]))
        return wanted
    rows, columns = infos["weight"].shape
    sides = weights.get("block_structure") or [128, 128]
    scales = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // sides[0]), -(-columns // sides[1]))}
    dtype = torch.int8 if weights["type"] == "int" else torch.float8_e4m3fn
    inputs = group.get("input_activations") or {}
    static = {"input_scale": (FLOATS, (1,))} if inputs and not inputs.get("dynamic") else {}
    return {"weight": ((dtype,), (rows, columns)), "weight_scale": (FLOATS, scales.get(weights["strategy"], ())), **static}


def _joined_problems(written: Checkpoint, owners: Mapping[str, list[Any]], ignored: set[str]) -> list[str]:
    """Layers that vLLM joins, but whose groups or NVFP4 units differ."""
    found = []
    for group in siblings(f"{module}.weight" for module in owners):
        modules = [name.removesuffix(".weight") for name in group]
        if len({str(owners[m]) for m in modules}) > 1 or len({m in ignored for m in modules}) > 1:
            found.append(f"{', '.join(modules)} are joined, but not described alike")
        units = [f"{m}.weight_global_scale" for m in modules if f"{m}.weight_global_scale" in written.stored]
        if len({t.item() for _, t in written.iter_raw(units)}) > 1:
            found.append(f"{', '.join(modules)} are joined, but have different NVFP4 units")
    return found


def _cache_problems(written: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """A scheme for the cache needs FP8 and a scale of keys and values in each layer."""
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return []
    facts = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy"), scheme.get("symmetric"), scheme.get("dynamic"))
    if facts != (8, "float", "tensor", True, False):
        return ["kv_cache_scheme is not static symmetric FP8 with a scale of the tensor"]
    attention = {n.rpartition(k)[0] for n in written.stored for k in (".k_proj.", ".qkv_proj.") if k in n}
    wanted = [f"{a}.{part}" for a in sorted(attention) for part in ("k_scale", "v_scale")]
    return [f"{name} is missing, which kv_cache_scheme needs" for name in wanted if name not in written.stored]
