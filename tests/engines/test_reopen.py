"""Reading a result back notices anything that is not as it was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines.samples import sample
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay import engines
from assay.engines import reopen, write
from assay.model.errors import ShortfallError

Tensors = dict[str, Tensor]
ROW = "model.layers.0.mlp.down_proj."


def flip(name: str) -> Callable[[Tensors], None]:
    """Changes the lowest bit of a tensor's last byte but one."""

    def change(tensors: Tensors) -> None:
        data = tensors[name].contiguous().view(torch.uint8)
        data.view(-1)[-2] ^= 1
        tensors[name] = data.view(tensors[name].dtype).view(tensors[name].shape)

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def test_a_result_as_it_was_meant_passes(tmp_path: Path) -> None:
    source, loaders, levels = sample(tmp_path / "m")
    for engine in ("transformers", "plain"):
        contract = engines.get(engine)
        write.write(tmp_path / engine, source, loaders, contract, {}, levels)
        counts = reopen.compare(tmp_path / engine, source, loaders, contract)
        packed = len(levels) if engine == "transformers" else 0
        assert counts == {"packed": packed, "copied": len(source.names) - packed}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip(ROW + "weight_packed"), "down_proj.weight does not read back"),
        (flip(ROW + "weight_scale"), "down_proj.weight does not read back"),
        (flip("model.layers.0.mlp.gate_proj.weight_packed"), "gate_proj.weight does not read back"),
        (flip("model.norm.weight"), "norm.weight does not read back"),
        (flip("model.embed_tokens.weight"), "embed_tokens.weight does not read back"),
        (drop("model.norm.weight"), "norm.weight was not written"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra is in the files or in the source"),
    ],
)
def test_one_wrong_bit_is_noticed(tmp_path: Path, damage: Callable[[Tensors], None], words: str) -> None:
    source, loaders, levels = sample(tmp_path / "m")
    contract = engines.get("transformers")
    write.write(tmp_path / "out", source, loaders, contract, {}, levels)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ShortfallError, match=words):
        reopen.compare(tmp_path / "out", source, loaders, contract)


def test_a_wrong_level_in_the_config_is_noticed_by_the_reader_that_uses_it(tmp_path: Path) -> None:
    source, loaders, levels = sample(tmp_path / "m")
    contract = engines.get("transformers")
    write.write(tmp_path / "out", source, loaders, contract, {}, levels)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    group = next(g for g in config["quantization_config"]["config_groups"].values() if not g["weights"]["symmetric"])
    group["weights"]["symmetric"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ShortfallError, match="level"):
        reopen.compare(tmp_path / "out", source, loaders, contract)
