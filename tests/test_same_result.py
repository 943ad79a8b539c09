"""The same command gives the same files, to the bit, with another number of threads as well."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from threading import Event

import pytest
import torch
from tiny import save, text_file
from torch import Tensor
from torch.nn.functional import gelu, silu, softplus

import assay
from assay import execute
from assay.methods import base
from assay.methods.solve.curvature import inverse_factor, total
from assay.model.alike import alike
from assay.model.threads import started

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
TEXT = {"tokens": 1024, "window": 32, "methods": ["two_sided"]}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("family", "engine"), [("llama", "transformers"), ("mixtral", "plain")])
def test_threads_change_no_bit_of_plan_and_result(
    family: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide enough for torch to divide its products; in folders of one name, as the result's page names the folder."""
    model, found = save(family, tmp_path / "m", **WIDE), {}
    assay.profile(model, tmp_path / "profile", calibration=text_file(tmp_path), **TEXT)
    for count in (1, 3):
        room = tmp_path / str(count)
        room.mkdir()
        monkeypatch.chdir(room)
        torch.set_num_threads(count)
        plan = assay.plan(tmp_path / "profile", bits=3.6, engine=engine)
        plan.save(Path("plan.yaml"))
        assay.compress(model, "out", plan=plan, profile=tmp_path / "profile")
        found[count] = digests(room)
    assert {"plan.yaml", "out/model.safetensors", "out/assay/ledger.json", "out/assay/report.html"} <= found[1].keys()
    assert found[1] == found[3]


@pytest.mark.parametrize(("method", "level"), [("admm", "int3-g32-asym"), ("ggml", "iq3_s")])
def test_what_begins_while_another_matrix_is_solved_changes_no_bit(
    method: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = save("llama", tmp_path / "m", **WIDE), tmp_path / "profile"
    assay.profile(model, profile, calibration=text_file(tmp_path), **TEXT | {"methods": [method]})
    plan = assay.plan(profile, level=level, method=method, engine="assay")
    encoder, found, begun = base.get(method), set(), []
    early = encoder.begin
    monkeypatch.setattr(encoder, "begin", lambda _, stats: begun.append(stats) or early(stats))
    for count, worth in product((1, 3), (1 << 20, 1)):
        torch.set_num_threads(count)
        monkeypatch.setattr(execute, "WORTH_SHARING", worth)
        assay.compress(model, tmp_path / "out", plan=plan, profile=profile)
        found.add(digests(tmp_path / "out")["model.safetensors"])
        shutil.rmtree(tmp_path / "out")
        assert bool(begun) == (worth == 1)
        begun.clear()
    assert len(found) == 1


PROFILES = """
import sys
import torch
from assay.cli.main import main
model, text, *threads = sys.argv[1:]
for place, count in enumerate(threads):
    torch.set_num_threads(int(count))
    try:
        main(["profile", model, "-o", str(place), "--calibration", text, "--tokens", "512", "--method", "nearest"])
    except SystemExit as end:
        assert not end.code
"""


def test_threads_change_no_bit_of_a_profile(tmp_path: Path) -> None:
    """By the command line, which asks MKL for it before the first product; in three threads shares end where no vector does."""
    model, text, threads = save("llama", tmp_path / "m", **WIDE), text_file(tmp_path), ("1", "3", "2")
    subprocess.run([sys.executable, "-c", PROFILES, model, text, *threads], cwd=tmp_path, check=True)
    found = [digests(tmp_path / str(place)) for place in range(len(threads))]
    assert "profile.json" in found[0] and all(one == found[0] for one in found)


def test_a_function_gives_the_same_numbers_from_any_number_of_threads() -> None:
    """Of a size whose shares end within a vector, and of one that isn't contiguous; without `alike` some differ."""
    found: dict[tuple[bool, int], list[Tensor]] = {}
    flat = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    rows = flat[:200_000].view(2, 500, 200)[..., :100]
    for mended, count in product((False, True), (1, 2, 3, 7)):
        torch.set_num_threads(count)
        with alike() if mended else nullcontext():
            leaf = flat.clone().requires_grad_()
            (silu(leaf) * leaf.sigmoid() + gelu(leaf, approximate="tanh")).backward(flat.flip(0))
            found[mended, count] = [flat.sum(), flat.mean(), flat.exp2(), 2**flat, silu(rows), softplus(rows), leaf.grad]
        assert torch.get_num_threads() == count
    assert all(torch.equal(a, b) for n in (2, 3, 7) for a, b in zip(found[True, n], found[True, 1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[True, 1], found[False, 1], strict=True))
    assert not all(torch.equal(a, b) for n in (2, 3, 7) for a, b in zip(found[False, n], found[False, 1], strict=True))


def test_a_thread_in_the_background_stays_one_whatever_another_sets() -> None:
    torch.set_num_threads(2)
    runs, go_on = Event(), Event()
    wait = started(lambda _: runs.set() or (go_on.wait(60) and torch.get_num_threads()), [0])
    runs.wait(60)
    torch.set_num_threads(3)
    go_on.set()
    assert wait() == [1]


def test_threads_change_no_bit_of_a_factor() -> None:
    """More than one block of columns; LAPACK alone has other last bits in two threads."""
    sample = torch.randn(900, 600, generator=torch.Generator().manual_seed(0))
    found, moment = [], (sample.T @ sample / 900)[None]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(inverse_factor(moment, 0.01)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    inverse = found[0].mT @ found[0]
    damped = moment + 0.01 * moment.diagonal(dim1=1, dim2=2).mean() * torch.eye(600)
    assert (inverse @ damped - torch.eye(600)).abs().max() < 1e-3


def test_threads_change_no_bit_of_a_sum() -> None:
    matrix, found = torch.randn(1, 40_000, 70, generator=torch.Generator().manual_seed(0)), []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        found.append((total(matrix), matrix.sum((-2, -1))))
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    assert not all(torch.equal(one[1], found[0][1]) for one in found)
