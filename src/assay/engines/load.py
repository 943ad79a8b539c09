"""A compressed checkpoint as a transformers model that runs compressed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from assay.engines.kernels import PackedExperts, PackedLinear
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.sites import Site, empty_model, load_config, survey


def load(folder: Path, kernels: bool = True) -> Any:
    """The model of a folder: its compressed linear layers stay compressed in memory and run through torch's kernels.

    kernels: False decodes each layer at every call instead, to the bit what the weights say. GGUF files are decoded whole.
    Nothing compressed: the model as stock transformers opens it. Raises InputError for what transformers has no model of.
    """
    source = Checkpoint.open(folder)
    if not source.levels and source.method not in ("assay", "gguf"):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    model, dtype = empty_model(source), _dtype(source)
    anatomy = survey(source, model)
    sites: dict[str, list[Site]] = {}
    for site in anatomy.sites.values():
        sites.setdefault(site.parameter, []).append(site)
    for path, stored in anatomy.parameters.items():
        if stored:
            _place(model, source, path, stored, sites.get(path, []), kernels, dtype)
    model.tie_weights()
    _finish(model, source)
    return model


def _dtype(source: Checkpoint) -> torch.dtype:
    """Dtype of the model: what the config says, else that of the most weights."""
    if named := getattr(load_config(source), "dtype", None):
        return named
    count: Counter[torch.dtype] = Counter()
    for name in source.names:
        count[source.dtype(name)] += math.prod(source.shape(name)) if source.dtype(name).is_floating_point else 0
    return count.most_common(1)[0][0]


def _place(
    model: PreTrainedModel, source: Checkpoint, path: str, stored: tuple[str, ...], sites: list[Site], kernels: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Put one parameter into the model, compressed where the files hold it so."""
    home, _, leaf = path.rpartition(".")
    module = model.get_submodule(home)
    if len(stored) > 1 and all(name in source.levels for name in stored):
        per_expert = len(stored) // len({site.expert for site in sites})
        packed = [source.read_packed(name) for name in stored]
        groups = [packed[i : i + per_expert] for i in range(0, len(packed), per_expert)]
        shape = tuple(module._parameters[leaf].shape)  # type: ignore[union-attr]
        del module._parameters[leaf]
        setattr(module, leaf, PackedExperts(groups, shape, dtype))
    elif leaf == "weight" and stored[0] in source.levels and isinstance(module, nn.Linear):
        bias = module.bias
        shape = (module.out_features, module.in_features)
        made = PackedLinear(source.mapped(stored[0]), bias, shape, kernels)
        parent, _, name = home.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    else:
        value = _value(source, stored, sites, dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _value(source: Checkpoint, stored: tuple[str, ...], sites: list[Site], dtype: torch.dtype) -> Tensor:
    """A parameter as the model holds it, all numbers in its dtype as transformers casts them."""
    parts = [part.to(dtype) if part.is_floating_point() else part for part in map(source.read, stored)]
    if len(parts) == 1:
        return parts[0]
    experts = len({site.expert for site in sites})
    return torch.stack(parts).unflatten(0, (experts, -1)).flatten(1, 2)


def _finish(model: PreTrainedModel, source: Checkpoint) -> None:
    """What `from_pretrained` sets beside the weights."""
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise InputError(f"{source.folder}: {left[0]} is in no weight file; download the model again")
    model.config.use_cache = True
    model.config.dtype = model.dtype
    model.config.name_or_path = model.name_or_path = str(source.folder)
    if model.can_generate() and (source.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.eval()
