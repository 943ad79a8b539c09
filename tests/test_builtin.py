"""The built-in corpus and the model trained on it."""

import json
import math
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assay.builtin.corpus as source
from assay.builtin.corpus import SPLITS, corpus, family, split_of

MODEL = Path(source.__file__).parent / "model"
SIZE_LIMIT = 12_000_000
WINDOW, WINDOWS = 512, 32


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        flat = " ".join(paragraph.split())
        if len(flat) >= 250:
            yield flat


def test_no_family_is_in_two_splits() -> None:
    families = {split: {family(d.name) for d in corpus(split)} for split in SPLITS}
    assert not families["train"] & families["calibration"]
    assert not families["train"] & families["evaluation"]
    assert not families["calibration"] & families["evaluation"]
    assert all(split_of(d.name) == split for split in SPLITS for d in corpus(split))


def test_no_text_is_in_two_splits() -> None:
    owners: dict[str, set[str]] = {}
    for split in SPLITS:
        for document in corpus(split):
            for paragraph in paragraphs(document.text):
                owners.setdefault(paragraph, set()).add(split)
    shared = [paragraph for paragraph, splits in owners.items() if len(splits) > 1]
    assert len(owners) > 5_000
    assert len(shared) <= 3, shared[:5]  # measured: none on CPython 3.10 to 3.13


def test_names_that_share_text_share_a_family() -> None:
    assert family("module:json.decoder#3") == family("module:json")
    assert family("module:test.test_json.test_decode") == family("module:json")
    assert family("module:test.test_xml_etree") == family("module:xml.etree.ElementTree")
    assert family("module:_pydatetime") == family("module:datetime")
    assert family("module:sre_parse") == family("module:re._parser")
    assert family("topic:with") == family("topic:compound")
    assert family("topic:global") != family("module:global")


def test_a_split_of_a_name_never_depends_on_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {d.name: (split, d.text) for split in SPLITS for d in corpus(split)}
    stdlib = Path(sysconfig.get_path("stdlib"))
    kept = [p for p in source._sources(stdlib) if p.parent == stdlib][::3]
    (tmp_path / "json").mkdir()
    for path in [*kept, stdlib / "json" / "decoder.py"]:
        shutil.copy(path, tmp_path / path.relative_to(stdlib))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    some = {d.name: (split, d.text) for split in SPLITS for d in corpus(split)}
    assert 20 < sum(name.startswith("module:") for name in some) < len(everything) / 2
    assert all(everything[name] == owner for name, owner in some.items())


def test_held_out_splits_are_large_mixed_and_ordered_the_same_each_time() -> None:
    for split in ("calibration", "evaluation"):
        documents = corpus(split)
        assert documents == corpus(split)
        assert sum(len(d.text) for d in documents) > 350_000
        assert max(len(d.text) for d in documents) <= source.PIECE_CHARS
        topics = [d.name.startswith("topic:") for d in documents]
        assert any(topics[: len(topics) // 3]) and any(topics[-len(topics) // 3 :])
        assert sum(len(d.text) for d in documents if d.name.startswith("topic:")) > 40_000


def test_tests_do_not_dominate_training() -> None:
    documents = corpus("train")
    tests = sum(len(d.text) for d in documents if d.name.startswith("module:test."))
    assert tests < 0.5 * sum(len(d.text) for d in documents)


def test_a_python_without_its_library_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="library's source"):
        corpus("evaluation")


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="validation"):
        corpus("validation")  # type: ignore[arg-type]


def test_the_shipped_model_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= SIZE_LIMIT
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def evaluation_ids() -> Tensor:
    """The first windows of the evaluation split [WINDOWS, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = []
    for document in corpus("evaluation"):
        ids += [tokenizer.bos_token_id, *tokenizer(document.text, verbose=False)["input_ids"]]
        if len(ids) >= WINDOW * WINDOWS:
            break
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Mean next-token loss in nats."""
    parts = [float(model(input_ids=part, labels=part).loss) for part in ids.split(8)]
    return sum(parts) / len(parts)


@torch.no_grad()
def round_to_nearest(model: Any, bits: int, group: int = 64) -> None:
    """Rounds every block matrix to 2**bits levels between the ends of each group of inputs."""
    for matrix in (p for p in model.model.layers.parameters() if p.ndim == 2):
        groups = matrix.view(-1, group)
        low, high = groups.aminmax(dim=1, keepdim=True)
        step = (high - low).clamp(min=1e-8) / (2**bits - 1)
        groups.copy_(((groups - low) / step).round() * step + low)


def test_perplexity_on_evaluation_text(evaluation_ids: Tensor) -> None:
    measured = loss(load(), evaluation_ids)
    assert math.exp(measured) < 14.0  # measured: 12.97 on CPython 3.11


def test_four_bits_cost_little_and_two_bits_a_lot(evaluation_ids: Tensor) -> None:
    rises = {}
    for bits in (4, 2):
        model = load()
        before = loss(model, evaluation_ids)
        round_to_nearest(model, bits)
        rises[bits] = loss(model, evaluation_ids) - before
    assert 0 < rises[4] < 0.1  # measured: 0.036 nats
    assert rises[2] > 1.0  # measured: 1.846 nats


def test_it_continues_source_code() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer("    def __init__(self, name):\n        self", return_tensors="pt")
    written = load().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "self.name = name" in tokenizer.decode(written[0])
