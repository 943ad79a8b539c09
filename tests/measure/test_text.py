"""Texts and tokenizers that can't be used are refused in one line that says what to do."""

from __future__ import annotations

import json
import sys
import sysconfig
import types
from pathlib import Path

import pytest
from tiny import save

import assay
from assay.measure import text
from assay.measure.text import Split, load_tokenizer, windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError


@pytest.mark.parametrize(("split", "option"), [("calibration", "--calibration"), ("evaluation", "--text")])
@pytest.mark.parametrize("missing", ["library's source files", "pydoc_data.topics"])
def test_a_python_without_the_builtin_text_names_the_option_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, split: Split, option: str
) -> None:
    model = Checkpoint.open(save("llama", tmp_path / "m"))
    if missing == "pydoc_data.topics":
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=f"{missing}.*{option}") as caught:
        windows(model, None, split, 64, 32, 64)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_code_is_not_run_and_the_way_out_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save("llama", tmp_path / "m")
    path = folder / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    capfd.readouterr()
    with pytest.raises(InputError, match="code, which assay never runs; remove auto_map and tokenizer_class") as caught:
        load_tokenizer(Checkpoint.open(folder))
    assert "\n" not in str(caught.value)
    assert "y/N" not in "".join(capfd.readouterr())
    path.write_text(json.dumps({k: v for k, v in plain.items() if k != "tokenizer_class"}))
    assert load_tokenizer(Checkpoint.open(folder)).get_vocab()["a"] == 1


def test_lines_of_jsonl_end_where_json_says(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two"}\r\n\n{"text": "three\u0085four"}\n', encoding="utf-8")
    assert list(text._file(path)) == ["one\u2028two", "three\u0085four"]


def test_a_data_set_without_text_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = types.SimpleNamespace(load_dataset=lambda *_, **__: iter([{"text": "fine"}, {"picture": 3}]))
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(InputError, match="some/set: no field"):
        list(text._hub("some/set", "calibration"))


@pytest.mark.parametrize("opening", ["", "=" * 20_000, "é€ß" * 6000])
def test_a_long_document_is_read_as_far_as_it_must_be_and_cut_without_a_trace(tmp_path: Path, opening: str) -> None:
    """Its first part may have more characters a token than the rest, or fewer."""
    path = tmp_path / "text.txt"
    path.write_text(opening + "".join(f"{n} lines, measured or guessed; " for n in range(40_000)))
    model = Checkpoint.open(assay.builtin_model())
    tokenizer = load_tokenizer(model)
    whole = tokenizer(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    for wanted in (64, 16_384, 98_304):
        assert windows(model, path, "calibration", wanted, 64, len(tokenizer)).ids.flatten().tolist() == whole[:wanted]
