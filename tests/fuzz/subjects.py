"""Everything that assay parses: valid inputs to start from, how to damage them, and what reading them means."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzz import mutations
from fuzz.mutations import Mutation
from safetensors.torch import load_file, save_file
from tiny import save, text_file

import assay
from assay import engines
from assay.budget import plans, undo
from assay.budget.plan import Plan
from assay.budget.speed import Speeds
from assay.engines.gguf import imatrix
from assay.exporting import importance
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.folder import INDEX
from assay.report.page import facts
from assay.report.page.render import page

SMALL = {"tokens": 1024, "window": 32}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of file. place: where the input is put; read: all that is ever done with it; seeds: valid ones."""

    place: Path
    read: Callable[[], object]
    mutate: Mutation
    seeds: Sequence[bytes]

    def take(self, data: bytes) -> None:
        """Put an input in its place and read it."""
        self.place.write_bytes(data)
        self.read()


def prepare(folder: Path) -> dict[str, Subject]:
    """All kinds, each in a folder of its own below this one."""
    model, text = save("llama", folder / "m"), text_file(folder)
    assay.profile(model, folder / "p", calibration=text, **SMALL)
    assay.plan(folder / "p", bits=4.7).save(folder / "plan.yaml")
    assay.compress(model, folder / "out", plan=folder / "plan.yaml", profile=folder / "p")
    assay.verify(folder / "out", model, text=text_file(folder / "out", "a dog, a fox.\n" * 100), window=32)
    (folder / "out" / "text.txt").unlink()
    found = _weights(folder, model) | _profiles(folder) | _results(folder, model) | _texts(folder, model)
    return found | _gguf(folder)


def _copy(folder: Path, source: str, name: str) -> Path:
    return Path(shutil.copytree(folder / source, folder / "cases" / name))


def _read_all(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    for name in checkpoint.names:
        checkpoint.shape(name), checkpoint.dtype(name), checkpoint.nbytes(name), checkpoint.kept_nbytes(name)
        checkpoint.read(name)
    _ = checkpoint.fingerprint, checkpoint.kept_file_bytes, checkpoint.side_files()


def _weights(folder: Path, model: Path) -> dict[str, Subject]:
    plain, sharded, config = (_copy(folder, "m", name) for name in ("safetensors", "index", "config"))
    shutil.copy(plain / "model.safetensors", sharded / "one.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(Checkpoint.open(model).names)
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}))
    shutil.copy(model / "model.safetensors", folder / "cases" / "secret.safetensors")
    found = {
        "safetensors": Subject(
            plain / "model.safetensors", lambda: _read_all(plain), mutations.in_header,
            [(plain / "model.safetensors").read_bytes()],
        ),
        "index": Subject(sharded / INDEX, lambda: _read_all(sharded), mutations.in_json, [(sharded / INDEX).read_bytes()]),
        "config": Subject(
            config / "config.json", lambda: StreamedModel(Checkpoint.open(config)), mutations.in_json,
            [(config / "config.json").read_bytes()],
        ),
    }  # fmt: skip
    half = _in_bfloat16(model, folder / "cases" / "half")
    for level, method in (("trellis3.25-channel", "trellis"), ("nf4-g32", "gptq"), ("int3-g32-asym", "gptq")):
        out = folder / "cases" / f"packed-{level.partition('-')[0]}"
        how = {"level": level, "method": method, "engine": "assay", "calibration": folder / "text.txt"}
        assay.compress(half, out, **how, **SMALL)
        weights = out / "model.safetensors"
        found[out.name] = Subject(
            weights, lambda out=out: _read_all(out), _either(mutations.in_body, mutations.in_header), [weights.read_bytes()]
        )
        found[f"{out.name}-config"] = Subject(
            (again := Path(shutil.copytree(out, f"{out}-config"))) / "config.json", lambda again=again: _read_all(again),
            mutations.in_json, [(out / "config.json").read_bytes()],
        )  # fmt: skip
    return found


def _in_bfloat16(model: Path, folder: Path) -> Path:
    """The same model, whose kept tensors our own layout stores without their redundant bits."""
    shutil.copytree(model, folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _either(first: Mutation, second: Mutation) -> Mutation:
    return lambda random, data: (first if random.random() < 0.5 else second)(random, data)


def _profiles(folder: Path) -> dict[str, Subject]:
    index, inputs, gradients = (_copy(folder, "p", name) for name in ("profile", "profile-inputs", "profile-gradients"))
    plan, whole = folder / "cases" / "plan", Profile.open(folder / "p")
    plan.mkdir()

    def spend() -> None:
        measured = Profile.open(index)
        assay.plan(index, bits=4.7)
        assay.plan(index, max_loss=0.5)
        assay.sweep(index, 3, 5, 1)
        assay.rank(index)
        importance(measured)

    def block(source: Path) -> None:
        measured = Profile.open(source)
        for curvature in measured.curvatures(0).values():
            _ = curvature.h.sum(), curvature.g.sum()
        importance(measured)

    def follow() -> None:
        plans.checked(whole, given := Plan.load(plan / "plan.yaml"), engines.get(given.engine))

    return {
        "profile": Subject(index / "profile.json", spend, mutations.in_note, [(index / "profile.json").read_bytes()]),
        "profile-inputs": Subject(
            inputs / "block-0000.H.safetensors", lambda: block(inputs), mutations.in_tensors,
            [(inputs / "block-0000.H.safetensors").read_bytes()],
        ),
        "profile-gradients": Subject(
            gradients / "block-0000.G.safetensors", lambda: block(gradients), mutations.in_tensors,
            [(gradients / "block-0000.G.safetensors").read_bytes()],
        ),
        "plan": Subject(plan / "plan.yaml", follow, mutations.in_yaml, [(folder / "plan.yaml").read_bytes()]),
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

        path = out / "assay" / f"{name}.json"
        found[name] = Subject(path, read, mutations.in_json, [path.read_bytes()])
    speeds = folder / "cases" / "speeds.json"
    Speeds({("keep", (64, 64)): 1e-3, ("int4-g32-asym", (64, 64)): 5e-4}, "here").save(speeds)
    found["speeds"] = Subject(speeds, lambda: Speeds.load(speeds), mutations.in_json, [speeds.read_bytes()])
    return found


def _texts(folder: Path, model: Path) -> dict[str, Subject]:
    checkpoint, place = Checkpoint.open(model), folder / "cases" / "texts"
    place.mkdir()
    rows = ['{"text": "the dog"}', '"a fox"', '{"messages": [{"role": "user", "content": "why not"}]}', '{"prompt": "over"}']
    seeds = {"text.txt": (folder / "text.txt").read_bytes(), "text.jsonl": "\n".join(rows * 9).encode()}

    def read(name: str) -> Callable[[], object]:
        return lambda: windows(checkpoint, place / name, "calibration", 512, 16, 64)

    ways = {"text.txt": mutations.in_bytes, "text.jsonl": mutations.in_lines}
    return {name: Subject(place / name, read(name), ways[name], [seed]) for name, seed in seeds.items()}


def _gguf(folder: Path) -> dict[str, Subject]:
    place = folder / "cases" / "gguf"
    place.mkdir()
    matrix = importance(Profile.open(folder / "p"))
    for name in ("i.gguf", "i.dat"):
        imatrix.write(place / name, matrix)
    model = small_gguf(place / "model.gguf")
    return {
        "imatrix.gguf": Subject(place / "i.gguf", lambda: imatrix.read(place / "i.gguf"), mutations.in_head,
                                [(place / "i.gguf").read_bytes()]),
        "imatrix.dat": Subject(place / "i.dat", lambda: imatrix.read(place / "i.dat"), mutations.in_bytes,
                               [(place / "i.dat").read_bytes()]),
        "gguf": Subject(model, lambda: _read_all(model), mutations.in_head, [model.read_bytes()]),
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
