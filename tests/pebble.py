"""The small trained model of the shared folder, for tests that need real weights; they skip where it is absent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


def folder() -> Path:
    """The shared folder that holds models/pebble."""
    folders = [parent / "shared" for parent in Path(__file__).resolve().parents]
    shared = next((f for f in folders if (f / "models/pebble/config.json").exists()), None)
    if shared is None:
        pytest.skip("shared/models/pebble is not here")
    return shared


def weights() -> dict[str, Tensor]:
    """Every linear map of the blocks, float32."""
    stored = load_file(folder() / "models/pebble/model.safetensors")
    return {name: tensor.float() for name, tensor in stored.items() if ".layers." in name and tensor.dim() == 2}


def block() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """name -> (weight, H, G) of the linear maps of one block, measured on a little text."""
    shared = folder()
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models/pebble")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/pebble", dtype=torch.float32)
    text = (shared / "data/wikitext2/valid.txt").read_text()[:40_000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0][:4096].view(16, 256)
    maps = {n: m for n, m in model.model.layers[2].named_modules() if isinstance(m, torch.nn.Linear)}
    seen: dict[str, list[Tensor]] = {name: [] for name in maps}

    def watch(name: str, x: Tensor, y: Tensor) -> None:
        seen[name].append(x.detach().flatten(0, 1))
        y.register_hook(lambda g: seen[name].append(g.flatten(0, 1)))

    for name, linear in maps.items():
        linear.register_forward_hook(lambda _, x, y, name=name: watch(name, x[0], y))
    logits = model(ids).logits.flatten(0, 1)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
    moments = {name: tuple(v.mT @ v / len(v) for v in pair) for name, pair in seen.items()}
    return {name: (maps[name].weight.detach(), *moments[name]) for name in maps}
