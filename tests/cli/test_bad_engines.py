"""Plans, versions and files that an engine can't take: one line, exit code 2, and not a byte written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli.calls import refused
from gguf import GGUFWriter
from tiny import save, text_file

import assay

READ = ("--calibration", "text.txt", "--tokens", "1024", "--window", "32")
ALL = ("--plan", "plan.yaml", *READ, "-o", "out")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, its text, profile `p` and plan."""
    folder = tmp_path_factory.mktemp("prepared")
    save("llama", folder / "m")
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    assay.plan(folder / "p", bits=4.7).save(folder / "plan.yaml")
    return folder


@pytest.fixture
def room(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was prepared; the present folder of the commands."""
    shutil.copytree(prepared, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def at(room: Path, **levels: str) -> None:
    """Give matrices of the plan that end so another level, the others int4-g32-asym."""
    text = (room / "plan.yaml").read_text()
    for line in text[text.index("levels:") :].splitlines()[1:]:
        if ".layers." in line:
            name = line.split(":")[0]
            level = next((x for end, x in levels.items() if name.strip().endswith(f"{end}.weight")), "int4-g32-asym")
            text = text.replace(line, f"{name}: {level}")
    (room / "plan.yaml").write_text(text)


def test_a_plan_for_another_engine_says_which_groups_and_what_they_would_become(
    room: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at(room, o_proj="int3-g32-asym", down_proj="int5-g32-asym")
    line = ("compress", "m", *ALL, "--engine", "vllm")
    refused(capfd, room, line, "vllm can't hold 4 of the plan's 8 groups: model.layers.0.self_attn.o_proj, model.layers.1.self")
    refused(capfd, room, line, "there is no int3-g32-asym; the nearest is int4-g32-asym")
    refused(capfd, room, line, "mlp.down_proj: there is no int5-g32-asym; the nearest is int4-g32-asym; change the plan, or")
    refused(capfd, room, (*line[:-1], "llama.cpp"), "the plan's 14 groups: model.layers.0.self_attn.q_proj")
    at(room)
    assay.compress("m", "held", plan="plan.yaml", calibration="text.txt", tokens=1024, window=32, engine="vllm")
    assert json.loads((room / "held/config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert "engine: vllm" in (room / "held/assay/plan.yaml").read_text()


def test_a_plan_that_mixes_bits_inside_a_fused_projection(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    at(room, k_proj="int8-g32-asym")
    joined = " + ".join(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    words = f"can't hold 2 of the plan's 8 groups: {joined}, "
    refused(capfd, room, ("compress", "m", *ALL, "--engine", "vllm"), words)
    refused(capfd, room, ("compress", "m", *ALL, "--engine", "vllm"), "give them one level, not int4-g32-asym and int8-g32-asym")
    text = (room / "plan.yaml").read_text()
    (room / "plan.yaml").write_text(text.replace("engine: transformers", "engine: vllm"))
    refused(capfd, room, ("compress", "m", *ALL), words)


def test_a_result_in_a_layout_that_can_not_hold_it_says_which_weights(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    at(room, o_proj="int5-g32-asym")
    assay.compress("m", "small", plan="plan.yaml", profile="p")
    line = ("convert", "small", "--to", "gptq", "-o", "out")
    refused(capfd, room, line, "2 of 14 weights would have to be rounded anew: model.layers.0.self_attn.o_proj (int5-g32-asym)")


@pytest.mark.parametrize("command", [("compress", "m", "--bits", "4.7", *READ), ("plan", "p", "--bits", "5")])
def test_an_old_version_of_an_engine(room: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    refused(capfd, room, (*command, "--engine", "vllm@0.6", "-o", "out"), "vllm 0.6 does not read what assay writes for vllm")


@pytest.mark.parametrize("command", ["compress", "inspect", "convert"])
def test_a_gguf_file_of_an_unknown_architecture(room: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    writer = GGUFWriter(room / "x.gguf", "nonesuch")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    lines = {
        "compress": ("compress", "x.gguf", "--bits", "5", *READ, "-o", "out"), "inspect": ("inspect", "x.gguf"),
        "convert": ("convert", "x.gguf", "--to", "plain", "-o", "out"),
    }  # fmt: skip
    refused(capfd, room, lines[command], "architecture nonesuch, whose layout is not known; there are")


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_missing_tokenizer_for_any_engine(room: Path, capfd: pytest.CaptureFixture[str], engine: str) -> None:
    for path in (room / "m").glob("tokenizer*"):
        path.unlink()
    refused(capfd, room, ("compress", "m", "--bits", "4.7", *READ, "-o", "out", "--engine", engine), "tokenizer")
