"""Preflight: a copy of two blocks is those two blocks, seconds add up, size is exact, too little memory lowers the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.calls import call
from tiny import save, text_file

import assay
from assay import preflight
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model import memory, progress
from assay.model.checkpoint import Checkpoint

SMALL = {"tokens": 1024, "window": 32}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    save("llama", folder / "m", num_hidden_layers=5, hidden_size=128, intermediate_size=256)
    text_file(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "gpt_neox"])
def test_a_copy_is_the_first_two_blocks(family: str, tmp_path: Path) -> None:
    deep = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    model = StreamedModel(Checkpoint.open(save(family, tmp_path / "m", **deep)))
    short = preflight.copy_blocks(model, tmp_path / "copy")
    assert len(short.blocks) == 2
    for name in short.checkpoint.names:
        assert torch.equal(short.checkpoint.read(name), model.checkpoint.read(name))
    lacking = set(model.checkpoint.names) - set(short.checkpoint.names)
    later = tuple(f"{name}." for name in model.anatomy.block_names[2:])
    assert lacking == {n for path, stored in model.anatomy.parameters.items() if path.startswith(later) for n in stored}
    ids = torch.arange(8)[None]
    with model.outside(tail=False), short.outside(tail=False):
        hidden, same = model.embed(ids), short.embed(ids)
    with model.block(1), short.block(1):
        assert torch.equal(model.run_block(1, hidden, 0), short.run_block(1, same, 0))


def test_the_whole_is_the_first_block_and_the_others_like_the_second() -> None:
    clock = preflight.Clock()
    clock.tasks = [
        *((name, [1.0, 4.0, 2.0]) for name in progress.SWEEPS),
        (progress.PRICING, [3.0, 1.0, 0.5]), (progress.REHEARSING, [1.0] * 6),
        (progress.COMPARING, [1.0, 1.0]), (progress.COMPRESSING, [2.0, 1.0, 0.25]), (progress.COMPARING, [1.0, 1.0]),
        (progress.COMPRESSING, [5.0, 1.0, 0.25]), (progress.COMPARING, [1.0, 1.0]),
    ]  # fmt: skip
    whole = preflight._stages(clock, 5.0, (4.0, 1.0), profiled=False, planned=False)
    assert whole == {
        progress.SWEEPS[0]: 4 * (1 + 4 + 9 * 2), progress.SWEEPS[1]: 1 + 4 + 9 * 2,
        progress.PRICING: 3 + 9 + 0.5, progress.REHEARSING: 6.0,
        progress.COMPARING: 30.0, progress.COMPRESSING: (2 + 9 + 0.25) + (5 + 9 + 0.25),
    }  # fmt: skip
    assert preflight._stages(clock, 5.0, (4.0, 1.0), profiled=True, planned=True) == {progress.COMPRESSING: 5 + 9 + 0.25}


@pytest.mark.parametrize(
    ("budget", "engine"), [({"bits": 5}, "transformers"), ({"size": "560KB"}, "transformers"), ({"bits": 4.5}, "assay"),
                           ({"level": "int4-g32-asym"}, "vllm")]
)  # fmt: skip
def test_the_size_is_promised_to_a_thousandth_and_nothing_stays(room: Path, budget: dict, engine: str, tmp_path: Path) -> None:
    settings = budget | SMALL | {"engine": engine, "calibration": room / "text.txt"}
    told = assay.compress(room / "m", tmp_path / "out", dry_run=True, **settings)
    assert list(tmp_path.iterdir()) == []
    done = assay.compress(room / "m", tmp_path / "out", **settings)
    assert told["bytes"] == pytest.approx(done["bytes"], rel=0.003)
    assert told["seconds"] == pytest.approx(sum(told["stages"].values()))
    named = {*progress.SWEEPS, progress.PRICING, progress.REHEARSING, progress.COMPARING, progress.COMPRESSING}
    assert named <= told["stages"].keys()  # what is counted in a way of its own is told by its bar's title
    assert "2 of 5 blocks on 1024 of 1024 tokens" in told["basis"]


def test_a_size_to_rehearse_leaves_what_no_engine_compresses(room: Path) -> None:
    model = StreamedModel(Checkpoint.open(room / "m"))
    outside = [s.name for s in model.anatomy.sites.values() if s.block is None]
    kept = sum(model.checkpoint.kept_nbytes(name) for name in outside)
    count = sum(s.count for s in model.anatomy.sites.values() if s.block is None)
    extra = preflight._size(model, 4.5, outside) - preflight._size(model, 4.5, [])
    assert extra == pytest.approx(kept - count * 4.5 / 8, abs=preflight.ROOM_PER_SITE)


def test_a_uniform_size_is_that_of_the_level_that_is_taken(room: Path, tmp_path: Path) -> None:
    settings = SMALL | {"bits": 4.4, "uniform": True, "calibration": room / "text.txt"}
    told = assay.compress(room / "m", tmp_path / "out", dry_run=True, **settings)
    done = assay.compress(room / "m", tmp_path / "out", **settings)
    assert told["bytes"] == pytest.approx(done["bytes"], rel=0.003)


def test_the_command_prints_it_and_takes_no_output(room: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ("compress", room / "m", "--bits", "10", "--calibration", room / "text.txt", "--tokens", "1024", "--window", "32",
            "--keep", "*layers.4.*", "-o", tmp_path / "out", "--dry-run")  # fmt: skip
    code, out, err = call(capfd, *line, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (code, told["short"], told["gpu_memory"], told["batch_tokens"]) == (0, [], 0, 2048)
    code, out, _ = call(capfd, *line)
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_lowers_the_batch_to_one_window_and_says_so(room: Path) -> None:
    model = StreamedModel(Checkpoint.open(room / "m"))
    whole, one = (preflight.memory_needed(model, batch, 32) for batch in (2048, 32))
    assert one < whole
    assert preflight.handling(model, 32, None) == preflight.handling(model, 32, 2 * whole) == preflight.Handling(2048, whole)
    some = preflight.handling(model, 32, int((one + whole) / 2 / preflight.SPARE))
    assert 32 <= some.batch < 2048
    assert f"{some.batch} tokens at once instead of 2048" in some.said
    least = preflight.handling(model, 32, one // 2)
    assert least.batch == 32
    assert "a shorter --window needs less" in least.said


def test_smaller_batches_measure_the_same_and_a_cut_off_profile_goes_on_with_its_own(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"calibration": room / "text.txt", "tokens": 1024, "window": 32}
    usual = assay.profile(room / "m", tmp_path / "p", **settings)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    small = assay.profile(room / "m", tmp_path / "q", **settings)
    for site, found in small.curvatures(1).items():
        h = usual.curvatures(1)[site].h
        assert torch.allclose(found.h, h, rtol=1e-3, atol=1e-5 * float(h.abs().max()))
    shutil.copytree(small.folder, tmp_path / "cut")
    (tmp_path / "cut" / "profile.json").unlink()
    assert Profile.open(tmp_path / "q").index["calibration"] == usual.index["calibration"]
    monkeypatch.undo()
    again = assay.profile(room / "m", tmp_path / "cut", **settings)
    assert again.index["prices"] == small.index["prices"]
