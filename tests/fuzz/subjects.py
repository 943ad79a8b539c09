"""Everything that assay parses: valid inputs to start from, how to damage them, and what reading them means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tiny import save, text_file
from torch import Tensor

import assay
from assay import engines
from assay.budget import plans, undo
from assay.budget.plan import Plan
from assay.budget.speed import Speeds
from assay.engines.gguf import imatrix
from assay.engines.layout import LAYOUTS
from assay.explore.state import State
from assay.exporting import importance
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.methods import base
from assay.methods.base import Statistics
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.report.page import facts
from assay.report.page.render import page
from assay.transforming import origin, steps_of
from fuzz import mutations
from fuzz.guard import guarded
from fuzz.mutations import Mutation

SMALL = {"tokens": 1024, "window": 32}
INDEX = "model.safetensors.index.json"
OWN = (("trellis3.25-channel", "trellis"), ("nf4-g32", "gptq"), ("int3-g32-asym", "gptq"))
LIKE = ("gptq", "awq", "compressed-tensors", "compressed-tensors-w8a8")

KINDS = (
    "safetensors", "index", "config", "transform",
    *(f"{name}{part}" for name in ("own-trellis3.25", "own-nf4", "own-int3", *LIKE, "fp8", "mxfp4", "nvfp4")
      for part in ("", "-config")),
    "profile", "profile-inputs", "profile-gradients", "plan", "recipe", "ledger", "sites", "verdict", "speeds", "explorer",
    "text.txt", "text.jsonl", "imatrix.gguf", "imatrix.dat", "gguf",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A kind of file. place: where the input is put; read: all that is ever done with it; also: folders that may be read too."""

    root: Path
    place: Path
    read: Callable[[], object]
    mutate: Mutation
    also: tuple[Path, ...] = ()

    def damage(self, number: int, valid: bytes) -> bytes:
        """The input of this number, the same on every machine for the same valid one."""
        return self.mutate(Random(number), valid)

    def take(self, data: bytes) -> None:
        """Put an input in its place and read it, guarded."""
        self.place.write_bytes(data)
        with guarded(self.root, self.also):
            self.read()


def prepare(folder: Path) -> dict[str, Subject]:
    """All kinds, each in a folder of its own below this one; each place holds a valid input."""
    model, text = save("llama", folder / "m", num_hidden_layers=1), text_file(folder)
    assay.profile(model, folder / "p", calibration=text, **SMALL)
    assay.plan(folder / "p", bits=4.7).save(folder / "plan.yaml")
    assay.compress(model, folder / "out", plan=folder / "plan.yaml", profile=folder / "p")
    assay.verify(folder / "out", model, text=text_file(folder / "out", "a dog, a fox.\n" * 100), window=32)
    (folder / "out" / "text.txt").unlink()
    found = _plain(folder, model) | _own(folder, model) | _layouts(folder) | _profiles(folder)
    return found | _results(folder, model) | _texts(folder, model) | _gguf(folder)


def _copy(folder: Path, source: str, name: str) -> Path:
    return Path(shutil.copytree(folder / source, folder / "cases" / name))


def _read_all(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    for name in checkpoint.names:
        checkpoint.shape(name), checkpoint.dtype(name), checkpoint.nbytes(name), checkpoint.kept_nbytes(name)
        checkpoint.read(name)
        if name in checkpoint.levels:
            checkpoint.read_packed(name).decode()
    _ = checkpoint.fingerprint, checkpoint.kept_file_bytes, checkpoint.side_files(), checkpoint.method


def _plain(folder: Path, model: Path) -> dict[str, Subject]:
    plain, sharded, config, record = (_copy(folder, "m", name) for name in ("safetensors", "index", "config", "transform"))
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    (sharded / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(sorted(Checkpoint.open(model).names), "one.safetensors")})
    )
    shutil.copy(model / "model.safetensors", folder / "cases" / "secret.safetensors")
    (record / "assay").mkdir()
    (record / "assay" / "transform.json").write_text(
        json.dumps({"source": "0" * 32, "steps": [{"name": "smooth", "seed": 0}], "versions": {"torch": "2.13.0"}})
    )

    def recorded() -> None:
        checkpoint = Checkpoint.open(record)
        origin(checkpoint), steps_of(checkpoint)

    return {
        "safetensors": Subject(plain, plain / "model.safetensors", lambda: _read_all(plain), mutations.in_header),
        "index": Subject(sharded, sharded / INDEX, lambda: _read_all(sharded), mutations.in_json),
        "config": Subject(
            config, config / "config.json", lambda: StreamedModel(Checkpoint.open(config)), mutations.in_json
        ),
        "transform": Subject(record, record / "assay" / "transform.json", recorded, mutations.in_json),
    }  # fmt: skip


def _pair(name: str, folder: Path) -> dict[str, Subject]:
    """The weights and the config of a compressed checkpoint."""
    other = Path(shutil.copytree(folder, f"{folder}-config"))
    both = _either(mutations.in_body, mutations.in_header)
    return {
        name: Subject(folder, folder / "model.safetensors", lambda: _read_all(folder), both),
        f"{name}-config": Subject(other, other / "config.json", lambda: _read_all(other), mutations.in_json),
    }


def _own(folder: Path, model: Path) -> dict[str, Subject]:
    """Assay's own layout: a matrix of each kind and what lies outside the blocks."""
    half = folder / "cases" / "half"
    shutil.copytree(model, half)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    found: dict[str, Subject] = {}
    for level, method in OWN:
        out = folder / "cases" / f"own-{level.partition('-')[0]}"
        how = {"level": level, "method": method, "engine": "assay", "calibration": folder / "text.txt"}
        assay.compress(half, out, **how, **SMALL)
        stored = load_file(out / "model.safetensors")
        kept = {n: t for n, t in stored.items() if ".layers." not in n or ".0.self_attn.q_proj" in n or ".0.input" in n}
        save_file(kept, out / "model.safetensors", {"format": "pt"})
        found |= _pair(out.name, out)
    return found


def _layouts(folder: Path) -> dict[str, Subject]:
    """Two matrices in each layout of other programs."""
    weights = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    found: dict[str, Subject] = {}
    for layout in LIKE:
        level = Level(8, None, True) if layout.endswith("w8a8") else Level(4, 32)
        packed = base.get("nearest")().encode(weights, level, torch.float16, Statistics())
        names = ["a.q_proj", "a.k_proj"]
        stored = {
            f"{n}.{suffix}": t for n, w in zip(names, packed, strict=True) for suffix, t in LAYOUTS[layout].tensors(w).items()
        }
        describe = LAYOUTS[layout].config
        assert describe is not None
        settings = describe({f"{n}.weight": level for n in names}, [], frozenset())
        found |= _pair(layout, _written(folder / "cases" / layout, stored, settings))
    whole = weights[0].to(torch.float8_e4m3fn)
    stored = {
        "a.weight": whole,
        "a.weight_scale_inv": torch.ones(1, 2),
        "b.weight": whole.clone(),
        "b.weight_scale": torch.ones(1),
    }
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    blocks = {"e_blocks": torch.zeros(2, 6, 3, 16, dtype=torch.uint8), "e_scales": torch.full((2, 6, 3), 127, dtype=torch.uint8)}
    group = {"targets": ["re:.*a$"], "weights": {"num_bits": 4, "type": "float"}, "format": "nvfp4-pack-quantized"}
    nibbles = {
        "a.weight_packed": torch.zeros(8, 16, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.ones(1),
    }  # fmt: skip
    found |= _pair("fp8", _written(folder / "cases" / "fp8", stored, fp8))
    found |= _pair("mxfp4", _written(folder / "cases" / "mxfp4", blocks, {"quant_method": "mxfp4"}))
    scheme = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": "nvfp4-pack-quantized"}
    return found | _pair("nvfp4", _written(folder / "cases" / "nvfp4", nibbles, scheme))


def _written(folder: Path, stored: Mapping[str, Tensor], settings: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": settings}))
    save_file(dict(stored), folder / "model.safetensors")
    return folder


def _either(first: Mutation, second: Mutation) -> Mutation:
    return lambda random, data: (first if random.random() < 0.5 else second)(random, data)


def _profiles(folder: Path) -> dict[str, Subject]:
    index, inputs, gradients = (_copy(folder, "p", name) for name in ("profile", "profile-inputs", "profile-gradients"))
    plan, whole = folder / "cases" / "plan", Profile.open(folder / "p")
    plan.mkdir()
    shutil.copy(folder / "plan.yaml", plan)

    def spend() -> None:
        measured = Profile.open(index)
        assay.plan(index, bits=4.7)
        assay.plan(index, max_loss=0.5)
        assay.sweep(index, 3, 4, 1)
        assay.rank(index)
        importance(measured)

    def follow() -> None:
        plans.checked(whole, given := Plan.load(plan / "plan.yaml"), engines.get(given.engine))

    return {
        "profile": Subject(index, index / "profile.json", spend, mutations.in_note),
        "profile-inputs": Subject(
            inputs, inputs / "block-0000.H.safetensors", lambda: importance(Profile.open(inputs)), mutations.in_tensors
        ),
        "profile-gradients": Subject(
            gradients, gradients / "block-0000.G.safetensors", lambda: importance(Profile.open(gradients)), mutations.in_tensors
        ),
        "plan": Subject(plan, plan / "plan.yaml", follow, mutations.in_yaml, (folder / "p",)),
    }  # fmt: skip


def _results(folder: Path, model: Path) -> dict[str, Subject]:
    found = {}
    original = StreamedModel(Checkpoint.open(model))
    for name in ("recipe", "ledger", "sites", "verdict"):
        out = _copy(folder, "out", name)

        def read(out: Path = out) -> None:
            known = facts.read(out)
            page(known)
            if "damage" in known.recipe:
                undo.suggestions(out, original, known.recipe, 0.1)

        mutate = mutations.in_note if name == "verdict" else mutations.in_json
        (out / "assay" / "SHA256SUMS").unlink()
        found[name] = Subject(out, out / "assay" / f"{name}.json", read, mutate, (model,))
    loose = folder / "cases" / "loose"
    loose.mkdir()
    speeds, state = loose / "speeds.json", loose / "state.json"
    Speeds({("keep", (64, 64)): 1e-3, ("int4-g32-asym", (64, 64)): 5e-4}, "here").save(speeds)
    state.write_text(json.dumps({"bits": 4.5, "engine": "vllm", "context": "8k", "pins": [["0", "q", "keep"]]}))
    found["speeds"] = Subject(loose, speeds, lambda: Speeds.load(speeds), mutations.in_json)
    found["explorer"] = Subject(
        loose, state, lambda: State.parse(state.read_text(encoding="utf-8", errors="replace")), mutations.in_json
    )
    return found


def _texts(folder: Path, model: Path) -> dict[str, Subject]:
    checkpoint, place = Checkpoint.open(model), folder / "cases" / "texts"
    place.mkdir()
    rows = ['{"text": "the dog"}', '"a fox"', '{"messages": [{"role": "user", "content": "why not"}]}', '{"prompt": "over"}']
    shutil.copy(folder / "text.txt", place / "text.txt")
    (place / "text.jsonl").write_text("\n".join(rows * 9))

    def read(name: str) -> Callable[[], object]:
        return lambda: windows(checkpoint, place / name, "calibration", 512, 16, 64)

    ways = {"text.txt": mutations.in_bytes, "text.jsonl": mutations.in_lines}
    return {name: Subject(place, place / name, read(name), mutate, (model,)) for name, mutate in ways.items()}


def _gguf(folder: Path) -> dict[str, Subject]:
    place = folder / "cases" / "gguf"
    place.mkdir()
    matrix = importance(Profile.open(folder / "p"))
    for name in ("i.gguf", "i.dat"):
        imatrix.write(place / name, matrix)
    model = small_gguf(place / "model.gguf")
    return {
        "imatrix.gguf": Subject(place, place / "i.gguf", lambda: imatrix.read(place / "i.gguf"), mutations.in_head),
        "imatrix.dat": Subject(place, place / "i.dat", lambda: imatrix.read(place / "i.dat"), mutations.in_bytes),
        "gguf": Subject(place, model, lambda: _read_all(model), mutations.in_head),
    }  # fmt: skip


def small_gguf(path: Path) -> Path:
    """A llama of two blocks in Q8_0 and F32, as few bytes as that takes."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_context_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c", "d"])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (4, 32), "output_norm": (32,), "output": (4, 32), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
