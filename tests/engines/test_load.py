"""`assay.load`: layers stay compressed and compute what their weights say; generation, pipelines and adapters work on top."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.samples import random_packed, shuffled
from families import build
from tiny import save
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import assay
from assay import engines
from assay.engines import kernels, write
from assay.methods import base
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.packed import Packed

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest error of a product beside its length: the kernels sum in these dtypes."""


def products(weight: Packed, dtype: torch.dtype, seed: int = 0) -> tuple[Any, float]:
    """The kernel chosen, and its largest error beside the largest output."""
    made, decoded = kernels.product(weight), weight.decode().double()
    x = torch.randn(3, 5, decoded.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    meant, found = linear(x.double(), decoded), made(x)
    assert found.dtype is dtype and found.shape == meant.shape
    return made, float((found.double() - meant).abs().max() / meant.abs().max())


def even(level: Level, rows: int, columns: int, dtype: torch.dtype) -> Packed:
    """Codes that use their whole range with scales of one size, as in a real weight."""
    weight = random_packed(level, rows, columns, torch.float32, 1)
    scale = (0.02 + 0.02 * torch.rand(weight.scale.shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    return replace(weight, scale=scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("level", "kernel"),
    [
        (Level(4, 32), "Int4Product"), (Level(4, 128, True), "Int4Product"), (Level(3, 64), "Int4Product"),
        (Level(2, None), "Int4Product"), (Level(4, None, True), "Int4Product"), (Level(8, None, True), "Int8Product"),
        (Level(6, None), "Int8Product"), (Level(8, 32), "Product"),
    ],
    ids=lambda x: getattr(x, "name", x),
)  # fmt: skip
def test_kernels_compute_what_the_weights_say(level: Level, kernel: str, dtype: torch.dtype) -> None:
    for rows in (64, 40):
        made, error = products(even(level, rows, 256, dtype), dtype)
        assert type(made).__name__ == kernel
        assert error <= TOLERANCE[dtype], error


def test_groups_that_are_not_neighbours_sort_their_inputs_first() -> None:
    weight = shuffled(even(Level(4, 32), 48, 128, torch.float32), 0)  # type: ignore[arg-type]
    made, error = products(weight, torch.float32)
    assert isinstance(made, kernels.OrderedProduct) and isinstance(made.base, kernels.Int4Product)
    assert error <= TOLERANCE[torch.float32]


TERMS = {
    "int4-g32-asym+sparse0.005": "sparse_gptq", "int4-g32-asym+rank8": "lorc", "nf4-g64": "gptq", "trellis2-channel": "trellis",
    "lut3-channel": "lut_gptq", "vector2-channel": "vptq",
}  # fmt: skip
FIRST = next(iter(TERMS))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model at several levels of assay's layout."""
    folder = tmp_path_factory.mktemp("load")
    source = Checkpoint.open(save("llama", folder / "m", **WIDE))
    for level, method in TERMS.items():
        written(source, Level.parse(level), method, folder / level)
    return {name: folder / name for name in TERMS} | {"plain": source.folder}


def written(source: Checkpoint, level: Level, method: str, folder: Path, engine: str = "assay") -> None:
    """A model whose projections are all at a level."""
    names = [n for n in source.names if "_proj" in n or ".experts." in n]

    def encode(name: str) -> Packed:
        weight = source.read(name).float()[None]
        return base.get(method)().encode(weight, level, source.dtype(name), base.Statistics())[0]

    loaders = {n: cache(partial(encode, n)) for n in names}
    write.write(folder, source, loaders, engines.get(engine), {}, dict.fromkeys(names, level))


IDS = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("level", TERMS)
def test_every_kind_of_term_runs_as_decoded(tmp_path: Path, sources: dict[str, Path], level: str) -> None:
    assay.export(sources[level], "plain", tmp_path / "plain")
    meant = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").eval()
    with torch.no_grad():
        logits = meant(IDS).logits
        assert torch.equal(assay.load(sources[level], kernels=False)(IDS).logits, logits)
        fast = assay.load(sources[level])
        assert (fast(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    layers = [m for m in fast.modules() if isinstance(m, kernels.PackedLinear)]
    assert len(layers) == 14
    assert all(torch.equal(m.weight, meant.get_submodule(n).weight) for n, m in fast.named_modules() if m in layers)


FORMATS = ["int4-g32-asym", "int8-channel-sym", "fp8-channel", "nvfp4-g16", "mxfp4-g32", "mxfp8-g32"]


@pytest.mark.parametrize("level", FORMATS)
def test_stock_transformers_reads_every_format_exactly_and_we_within_bf16(tmp_path: Path, level: str) -> None:
    _, model = build("llama", **WIDE)
    model.bfloat16().save_pretrained(tmp_path / "m")
    written(Checkpoint.open(tmp_path / "m"), Level.parse(level), "nearest", tmp_path / "out", "transformers")
    assay.export(tmp_path / "out", "plain", tmp_path / "plain")
    with torch.no_grad():
        meant, found = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype="auto").eval()(IDS).logits for f in ("plain", "out")
        )
        assert meant.dtype is torch.bfloat16 and torch.equal(found, meant)
        assert (assay.load(tmp_path / "out")(IDS).logits - meant).abs().max() <= 0.02 * meant.abs().max()


def test_it_generates_what_the_decoded_model_generates(tmp_path: Path, sources: dict[str, Path]) -> None:
    level = FIRST
    assay.export(sources[level], "plain", tmp_path / "plain")
    meant, fast = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval(), assay.load(sources[level])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    assert torch.equal(fast.generate(IDS, **options), meant.generate(IDS, **options))
    assert fast.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(sources[level])
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer)("the quick", max_new_tokens=8, do_sample=False)
        for m in (fast, meant)
    ]
    assert texts[0] == texts[1]


def test_an_adapter_trains_on_top_and_leaves_the_weights(tmp_path: Path, sources: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = assay.load(sources[FIRST])
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, kernels.PackedLinear)}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained and all(p.numel() <= 4 * 256 for p in trained)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        loss = tuned(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(m.weight, before[n]) for n, m in model.named_modules() if n in before)
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(assay.load(sources[FIRST]), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, tuned.eval()(IDS).logits, atol=1e-5)


def test_memory_is_that_of_the_codes(sources: dict[str, Path]) -> None:
    model = assay.load(sources[FIRST])
    linears = [m for m in model.modules() if isinstance(m, kernels.PackedLinear)]
    held = sum(b.nbytes for m in linears for b in m.product.buffers() if b.layout is torch.strided)
    assert held < 0.25 * sum(4 * m.in_features * m.out_features for m in linears)
    assert not [n for n, p in model.named_parameters() if n.endswith("proj.weight")]


@pytest.mark.parametrize(
    "level", ["int4-g64-asym", "int3-g32-asym", "int2-channel-asym", "int6-g128-asym", "int8-channel-sym", "int8-g32-asym"]
)
def test_what_a_level_takes_in_memory_is_what_its_product_holds(level: str) -> None:
    """No more than is counted when memory is planned, and not far less."""
    wanted = Level.parse(level)
    weight = base.get("nearest")().encode(torch.randn(1, 48, 256), wanted, torch.bfloat16, base.Statistics())[0]
    made = kernels.product(weight)
    held = [*made.buffers(), *(vars(made.packed).values() if isinstance(made, kernels.Product) else ())]
    taken = sum(t.nbytes for t in held if torch.is_tensor(t))
    assert 0.85 * kernels.held_nbytes(wanted, 48, 256, 2) <= taken <= kernels.held_nbytes(wanted, 48, 256, 2)


def test_experts_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    source = Checkpoint.open(save("mixtral", tmp_path / "m", **WIDE))
    written(source, Level(4, 32, True), "nearest", tmp_path / "out", "gptq")
    assay.export(tmp_path / "out", "plain", tmp_path / "plain")
    with torch.no_grad():
        meant = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation="eager").eval()(IDS).logits
        loaded = assay.load(tmp_path / "out")
        assert (loaded(IDS).logits - meant).abs().max() <= 1e-5 * meant.abs().max()
    held = [m for m in loaded.modules() if isinstance(getattr(m, "gate_up_proj", None), kernels.PackedExperts)]
    assert len(held) == 2


def test_a_model_that_is_not_compressed_opens_as_it_is(sources: dict[str, Path]) -> None:
    with torch.no_grad():
        first = assay.load(sources["plain"]).eval()(IDS).logits
        assert torch.equal(first, AutoModelForCausalLM.from_pretrained(sources["plain"]).eval()(IDS).logits)
