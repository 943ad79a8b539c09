"""`assay verify --tasks`: lm-eval on a task of a local file; where it is not installed, how to install it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cli.calls import call, one_line
from engines.real_gguf import SIZE, byte_level, save_tokenizer
from tiny import TEXT, save, text_file

import assay
from assay.measure.text import load_tokenizer
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.prove.tasks import INSTALL, Tasks, compared

TASK = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROWS = [{"question": TEXT[i : i + 12], "choices": [TEXT[i + 12 : i + 14], "zq", "4,"], "answer": 0} for i in range(0, 24 * 7, 7)]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, a result `o` and a task `letters.yaml`."""
    folder = tmp_path_factory.mktemp("tasks")
    save("llama", folder / "m", vocab_size=SIZE)
    save_tokenizer(folder / "m", byte_level())
    settings = {"calibration": text_file(folder), "tokens": 256, "window": 32}
    assay.compress(folder / "m", folder / "o", level="int3-g32-asym", **settings)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "letters.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    (folder / "other.txt").write_text(TEXT[::-1])
    return folder


def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `tasks`)")


def by_hand(model: Path) -> list[float]:
    """1 for each row whose right choice is the likeliest, the log-likelihoods summed over its letters."""
    checkpoint = Checkpoint.open(model)
    tokenizer, running = load_tokenizer(checkpoint), assay.load(model)
    found = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            start, whole = (tokenizer(text)["input_ids"] for text in (row["question"], row["question"] + " " + choice))
            with torch.no_grad():
                logs = running(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        found.append(float(max(range(3), key=sums.__getitem__) == 0))
    return found


def test_scores_are_those_of_the_two_models(room: Path) -> None:
    installed()
    tasks = Tasks.of([str(room / "letters.yaml")])
    found = compared(Checkpoint.open(room / "o"), Checkpoint.open(room / "m"), tasks)["letters"]["acc"]
    old, new = by_hand(room / "m"), by_hand(room / "o")
    assert found["examples"] == len(ROWS)
    assert found["original"] == pytest.approx(sum(old) / len(ROWS))
    assert found["compressed"] == pytest.approx(sum(new) / len(ROWS))
    change = torch.tensor(new) - torch.tensor(old)
    reach = 1.96 * float(change.std()) / len(ROWS) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((float(change.mean()) - reach, float(change.mean()) + reach))


def test_the_command_adds_the_scores_to_the_verdict(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    installed()
    line = ("verify", room / "o", "--against", room / "m", "--text", room / "other.txt", "--tokens", "256", "--window", "32")
    code, out, _ = call(capfd, *line, "--tasks", str(room / "letters.yaml"), "--limit", "5", "--json")
    assert code == 0 and json.loads(out)["tasks"]["letters"]["acc"]["examples"] == 5
    assert json.loads((room / "o" / "assay" / "verdict.json").read_text())["tasks"]["letters"]["acc_norm"]["examples"] == 5
    code, out, err = call(capfd, *line, "--tasks", "letterz")
    assert (code, out) == (2, "") and "lm-eval has no task 'letterz'" in one_line(err)


def test_a_task_whose_data_is_gone_is_refused_before_anything_is_measured(room: Path, tmp_path: Path) -> None:
    installed()
    (tmp_path / "letters2.yaml").write_text(TASK.format(data=tmp_path / "gone.jsonl").replace("letters", "letters2"))
    with pytest.raises(InputError, match="task letters2: its data can't be read"):
        Tasks.of([str(tmp_path / "letters2.yaml")])


def test_without_lm_eval_one_line_says_how_to_install_it(
    room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [n for n in sys.modules if n.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    capfd.readouterr()
    code, out, err = call(capfd, "verify", room / "o", "--against", room / "m", "--tasks", "arc_easy")
    assert (code, out) == (2, "") and INSTALL in one_line(err)


def test_what_is_no_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("tasks: none\n")
    with pytest.raises(InputError, match=r"x.yaml: no task of lm-eval"):
        Tasks.of([str(tmp_path / "x.yaml")])
    with pytest.raises(InputError, match="names no task"):
        Tasks.of([" "])
