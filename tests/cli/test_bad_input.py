"""Bad input: one line that says what is wrong and what to do, exit code 2, and not a byte written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.calls import refused
from safetensors.torch import load_file, save_file
from tiny import save, save_tokenizer, text_file

import assay

OTHER_LETTERS = "".join(map(chr, range(97, 400)))
SMALL = ("--tokens", "1024", "--window", "32")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` in two shards, another one `n`, the text of both, a profile `p` and a plan of `m`."""
    folder = tmp_path_factory.mktemp("prepared")
    save("llama", folder / "n", num_hidden_layers=3)
    save("llama", folder / "m")
    tensors = load_file(folder / "m" / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / "m" / shard, {"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "m" / "model.safetensors").unlink()
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    assay.plan(folder / "p", bits=4.7).save(folder / "plan.yaml")
    return folder


@pytest.fixture
def room(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was prepared, to be damaged; the present folder of the commands."""
    shutil.copytree(prepared, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def compressing(*changed: object) -> tuple[object, ...]:
    """A command line that would work, with options added or, later ones winning, changed."""
    return ("compress", "m", "--bits", "4.7", "--calibration", "text.txt", *SMALL, "-o", "out", *changed)


def shard(folder: Path) -> Path:
    return folder / "m" / "model-1.safetensors"


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def set_weight(path: Path, value: float) -> None:
    tensors = load_file(path)
    name = next(n for n in tensors if "proj" in n)
    tensors[name][0, 0] = value
    save_file(tensors, path, {"format": "pt"})


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leave_the_folder(folder: Path) -> None:
    path = folder / "m" / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-1.safetensors", "../m/model-1.safetensors"))


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shutil.rmtree(f / "m"), "no model at m"),
    "no config": (lambda f: (f / "m" / "config.json").unlink(), "not a model folder"),
    "no weights": (lambda f: [p.unlink() for p in (f / "m").glob("model*")], "not a model folder"),
    "truncated shard": (lambda f: cut(shard(f), -100), "download the file again"),
    "shard cut in its header": (lambda f: cut(shard(f), 40), "wrong safetensors header"),
    "missing shard": (lambda f: shard(f).unlink(), "is missing; download the model again"),
    "wrong header": (lambda f: long_header(shard(f)), "wrong safetensors header"),
    "shard outside": (leave_the_folder, "leaves the folder"),
    "NaN": (lambda f: set_weight(shard(f), float("nan")), "NaN or infinite weights"),
    "infinite": (lambda f: set_weight(shard(f), float("-inf")), "NaN or infinite weights"),
    "unknown architecture": (lambda f: set_config(f, model_type="nonesuch"), "unknown architecture 'nonesuch'"),
    "another model's config": (lambda f: set_config(f, intermediate_size=128), "don't belong together"),
    "no tokenizer": (lambda f: (f / "m" / "tokenizer.json").unlink(), "tokenizer"),
    "a larger tokenizer": (lambda f: [save_tokenizer(f / "m", OTHER_LETTERS), text_file(f, OTHER_LETTERS * 20)], "don't match"),
}  # fmt: skip
TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda t: t.write_text(" \n"), "empty; give some text"),
    "binary": (lambda t: t.write_bytes(b"\0\1\2" * 100), "binary; give plain text"),
    "another encoding": (lambda t: t.write_bytes("müde".encode("latin1") * 200), "not UTF-8"),
    "too short for a window": (lambda t: t.write_text("too short"), "one window needs"),
    "too short to hold some out": (lambda t: t.write_text("too short " * 10), "calibration needs at least"),
    "missing": (lambda t: t.unlink(), "does not exist"),
    "a folder": (lambda t: [t.unlink(), t.mkdir()], "is a folder"),
}


@pytest.mark.parametrize("command", ["compress", "profile"])
@pytest.mark.parametrize("damage", MODELS)
def test_models(room: Path, capfd: pytest.CaptureFixture[str], damage: str, command: str) -> None:
    change, words = MODELS[damage]
    change(room)
    profiling = ("profile", "m", "--calibration", "text.txt", *SMALL, "-o", "out")
    refused(capfd, room, compressing() if command == "compress" else profiling, words)


@pytest.mark.parametrize("tokens", ["1024", "auto"])
@pytest.mark.parametrize("damage", TEXTS)
def test_calibration_texts(room: Path, capfd: pytest.CaptureFixture[str], damage: str, tokens: str) -> None:
    change, words = TEXTS[damage]
    change(room / "text.txt")
    refused(capfd, room, compressing("--tokens", tokens), words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tokens", "²"), "--tokens ²: give a number above zero"), (("--seed", "99999999999999999"), "--seed"),
        (("-o", "text.txt/p"), "Not a directory"),
    ],
)  # fmt: skip
def test_numbers_and_places_that_make_no_sense(
    room: Path, capfd: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    place = () if "-o" in more else ("-o", "out")
    refused(capfd, room, ("profile", "m", "--calibration", "text.txt", *SMALL, *place, *more), words)


@pytest.mark.parametrize("row", ["{", '{"other": 1}', "3"])
def test_lines_that_are_no_documents(room: Path, capfd: pytest.CaptureFixture[str], row: str) -> None:
    (room / "text.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    refused(capfd, room, compressing("--calibration", "text.jsonl"), "text.jsonl:2: no")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (("--bits", "0.5"), "this model and engine allow"),
        (("--size", "1KB"), "this model and engine allow"),
        (("--size", "3 furlongs"), "write it like 3.5GB"),
        (("--size", "nan"), "write it like 3.5GB"),
        (("--size", "inf"), "write it like 3.5GB"),
        (("--size", "-1GB"), "must be one byte or more"),
        (("--size", "0"), "must be one byte or more"),
        *((("--bits", text), "must be a number above zero") for text in ("inf", "nan", "-inf", "-4", "0", "1e999")),
        *((("--max-loss", text), "must be a number above zero") for text in ("inf", "nan", "-0.1", "0", "-0.0")),
        (("--bits", "four"), "--bits"),
        (("--bits", "3", "--size", "1GB"), "one budget: --size, --bits, --memory, --max-loss, --level, --latency or "),
        (("--bits", "3", "--size", "1GB"), "(got --size and --bits)"),
        (("--bits", "3", "--max-loss", "1"), "(got --bits and --max-loss)"),
        (("--bits", "3", "--level", "W4A16"), "(got --bits and --level)"),
        (("--level", "W4A15"), "did you mean W4A16"),
        (("--level", "int9-g64-asym"), "unknown level"),
        (("--level", "nf4-g64"), "transformers can't hold"),
        (("--level", "trellis3-channel", "--method", "gptq"), "gptq does not make trellis3-channel"),
        ((), "one budget"),
        (("--memory", "1GB", "--engine", "vllm"), "--memory needs --context"),
        (("--memory", "1GB", "--context", "32", "--engine", "vllm"), "MB of that are cache, activations and engine"),
        (("--memory", "1 parsec", "--context", "32"), "write it like 3.5GB"),
        (("--memory", "1GB", "--bits", "4", "--context", "32"), "(got --bits and --memory)"),
        (("--bits", "5", "--context", "32", "--cache", "auto"), "--cache auto needs --memory"),
        (("--bits", "5", "--context", "32", "--evict", "snapkv"), "--evict needs --memory and --cache auto"),
        (("--bits", "5", "--evict", "snapkv"), "--evict needs --context"),
        (("--memory", "2GB", "--context", "32"), "--engine vllm"),
        (("--memory", "2GB", "--context", "32", "--engine", "vllm", "--cache", "fp4"), "vllm has fp16, fp8"),
        (("--memory", "2GB", "--context", "32k", "--engine", "vllm"), "more than the 64 tokens that this model reads"),
        *((("--bits", "5", "--context", text), "tokens above zero") for text in ("0", "-4", "1.5", "many")),
        (("--bits", "5", "--context", "32", "--batch", "0"), "--batch 0"),
        (("--bits", "5", "--batch", "2"), "--batch needs --context"),
    ],
)
@pytest.mark.parametrize("command", [("compress", "m", "--calibration", "text.txt", *SMALL), ("plan", "p")])
def test_budgets(
    room: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...], budget: tuple[str, ...], words: str
) -> None:
    refused(capfd, room, (*command, *budget, "-o", "out"), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sweep", "2:8", "--bits", "4"), "--sweep and --bits exclude each other"),
        (("--sweep", "8:2"), "bits must rise"),
        (("--sizes", "1MB,2MB", "--memory", "1GB", "-o", "out"), "--sizes and --memory exclude each other"),
        (("--sizes", "1KB,2MB", "-o", "out"), "--size 1KB is out of reach"),
        (("--bits", "5"), "give --output"),
        (("--latency", "1", "-o", "out"), "needs --speeds"),
        (("--tokens-per-second", "-1", "-o", "out"), "--tokens-per-second -1.0 must be a number above zero"),
        (("--latency", "1", "--speeds", "plan.yaml", "-o", "out"), "not readable as JSON"),
    ],
)
def test_plans_that_contradict_themselves(
    room: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    refused(capfd, room, ("plan", "p", *options), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "gptk"), "did you mean gptq"),
        (("--engine", "vlm"), "did you mean vllm"),
        (("--keep", "*.q_prj"), "matches nothing; near it"),
        (("--keep", "*"), "--keep matches all"),
        (("--planner", "lagrang"), "did you mean lagrange"),
        (("--minutes", "3"), "--minutes bounds the search of --planner evolution"),
        (("--planner", "evolution", "--minutes", "0"), "above zero"),
        (("--planner", "evolution", "--uniform"), "--uniform leaves nothing"),
        (("--profile", "m"), "not a profile"),
        (("--profile", "absent"), "not a profile"),
    ],
)
def test_names(room: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    refused(capfd, room, compressing(*options), words)


@pytest.mark.parametrize("made", ["folder", "file", "full profile"])
@pytest.mark.parametrize("command", ["compress", "plan", "export", "profile"])
def test_outputs_that_exist(room: Path, capfd: pytest.CaptureFixture[str], command: str, made: str) -> None:
    out = room / "out"
    if made == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    if made == "full profile":
        shutil.copytree(room / "p", out, dirs_exist_ok=True)
    lines = {
        "compress": compressing(), "plan": ("plan", "p", "--bits", "4.7", "-o", "out"),
        "export": ("export", "m", "--to", "plain", "-o", "out"),
        "profile": ("profile", "m", "--calibration", "text.txt", "--tokens", "512", "--window", "32", "-o", "out"),
    }  # fmt: skip
    words = "profile of other settings" if (command, made) == ("profile", "full profile") else "exists"
    refused(capfd, room, lines[command], words)


def test_an_output_that_can_not_be_written(
    room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(capfd, room, compressing("-o", "no/such/out"), "does not exist; make it first")
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == room and mode == os.W_OK))
    refused(capfd, room, compressing(), "can't be written to; choose another folder")


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("budget", [("--bits", "4.7"), ("--size", "120KB"), ("--max-loss", "0.1"), ("--plan", "plan.yaml")])
@pytest.mark.parametrize("engine", ["transformers", "plain"])
def test_a_disk_too_small_for_the_result_is_noticed_before_measuring(
    room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, budget: tuple[str, ...], engine: str
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(10**9, 10**9 - 16_030_000, 16_030_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    line = ("compress", "m", *budget, "--calibration", "text.txt", *SMALL, "--engine", engine, "-o", "out")
    refused(capfd, room, line, "16 MB free where the result needs 16 MB; free some or choose a folder on another disk")
    assert asked == [room]


@pytest.mark.parametrize("layout", ["plain", "compressed-tensors"])
def test_a_disk_too_small_for_an_export(
    room: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    assay.compress("m", "small", plan="plan.yaml", profile="p")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    refused(capfd, room, ("export", "small", "--to", layout, "-o", "out"), "0 MB free where the result needs 16 MB")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    at = text.index(old)
    end = text.index("\n", at)
    path.write_text(text[:at] + new + text[end:])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model.layers.0.mlp.down_proj.weight:", "model.layers.0.mlp.down_proj.weight: int4-g64-asym", "sizes that fit: 32"),
        ("model.layers.0.mlp.down_proj.weight:", "model.layers.0.mlp.down_proj.weight: int9-g32-asym", "unknown level"),
        ("model.layers.0.mlp.down_proj.weight:", "model.layers.0.mlp.dwn_proj.weight: keep", "near it: model.layers"),
        ("model.layers.0.mlp.down_proj.weight:", "", "lacks model.layers.0.mlp.down_proj.weight"),
        ("engine:", "engine: vlm", "did you mean vllm"),
        ("method:", "method: gptk", "did you mean gptq"),
        ("gap:", "gap: [", "not a plan (line"),
        ("gap:", "", "not a plan (missing or unknown: gap)"),
    ],
)
def test_plans_edited_wrongly(room: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, words: str) -> None:
    edit(room / "plan.yaml", old, new)
    refused(capfd, room, ("compress", "m", "--plan", "plan.yaml", "--profile", "p", "-o", "out"), words)


def test_a_plan_that_parts_what_an_engine_fuses(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assay.plan("p", bits=4.9, engine="vllm").save(room / "fused.yaml")
    edit(room / "fused.yaml", "model.layers.0.self_attn.q_proj.weight:", "model.layers.0.self_attn.q_proj.weight: keep")
    edit(room / "fused.yaml", "model.layers.0.self_attn.k_proj.weight:", "model.layers.0.self_attn.k_proj.weight: int4-g32-asym")
    refused(
        capfd,
        room,
        ("compress", "m", "--plan", "fused.yaml", "--profile", "p", "-o", "out"),
        "give them one level, not int4-g32-asym and keep",
    )


def test_caches_that_can_not_be_chosen(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    served = ("plan", "p", "--memory", "2GB", "--context", "32", "--engine", "vllm", "-o", "out")
    refused(capfd, room, (*served, "--cache", "auto"), "--cache auto needs prices of the cache; run assay profile with --cache")
    measuring = ("profile", "m", "--calibration", "text.txt", *SMALL, "--cache", "-o", "q")
    refused(capfd, room, measuring, "a cache is priced on windows of 128 tokens or more; this model has 64 positions")
    refused(capfd, room, (*served, "--evict", "snapkv"), "--evict needs prices of the cache; run assay profile with --cache")
    (room / "p" / "cache.json").write_text("{}")
    refused(capfd, room, served, "cache.json: damaged")


def test_things_that_do_not_belong_together(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    by_plan = ("--plan", "plan.yaml", "--calibration", "text.txt", *SMALL, "-o", "out")
    refused(capfd, room, ("compress", "n", *by_plan), "the plan was made for another model")
    refused(capfd, room, ("compress", "n", *by_plan, "--tokens", "auto"), "the plan was made for another model")
    refused(capfd, room, ("compress", "n", "--bits", "4.7", "--profile", "p", "-o", "out"), "a profile of another model")
    refused(capfd, room, ("compress", "m", *by_plan, "--tokens", "512"), "the plan was made from another profile")
    with_profile = ("compress", "m", "--plan", "plan.yaml", "--profile", "p", "-o", "out")
    for more in (("--keep", "*q_proj*"), ("--uniform",), ("--method", "nearest")):
        refused(capfd, room, (*with_profile, *more), "a plan has its levels and its method; edit it")
    for more in (("--calibration", "text.txt"), ("--tokens", "512"), ("--window", "32")):
        refused(capfd, room, (*with_profile, *more), "a profile has its text; leave out --calibration, --tokens and --window")
    refused(capfd, room, ("plan", "p", "--bits", "5", "--uniform", "--planner", "nosuch", "-o", "out"), "nosuch")
    save_tokenizer(room / "m", "zyxwvutsrqponmlkjihgfedcba")
    by_profile = ("compress", "m", "--bits", "4.7", "--profile", "p", "-o", "out")
    refused(capfd, room, by_profile, "made with another tokenizer; run assay profile again")


def test_a_report_replaces_nothing(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assay.compress("m", "small", plan="plan.yaml", profile="p")
    for place, words in (("text.txt", "exists"), ("small", "exists"), ("gone/page.html", "does not exist")):
        refused(capfd, room, ("report", "small", "-o", place), words)
    refused(
        capfd, room, ("compress", "n", "--bits", "4.7", "--profile", "p", "--dry-run", "-o", "out"), "a profile of another model"
    )


def test_verdicts_that_would_mean_nothing(room: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assay.compress("m", "small", plan="plan.yaml", profile="p")
    refused(capfd, room, ("verify", "small", "--against", "n", "--text", "text.txt"), "made from another model than n")
    refused(capfd, room, ("verify", "small", "--against", "m", "--text", "text.txt"), "judge it on other text")
    refused(capfd, room, ("verify", "small", "--against", "m", "--limit", "5"), "--limit counts examples of --tasks; name some")
    refused(capfd, room, ("convert", "small", "--to", "gguff", "-o", "out"), "unknown layout 'gguff'; there are")
    refused(capfd, room, ("export", "m", "--to", "compressed-tensors", "-o", "out"), "no compressed weights that assay can move")
