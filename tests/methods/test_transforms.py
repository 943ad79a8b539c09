"""What is special about each transform: the orthogonal matrices, the searches, the orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lively import Lively, Made, enliven, logits, moment, transformed
from safetensors.torch import load_file
from tiny import save_tokenizer, text_file
from torch import Tensor

import assay
from assay.budget.probe import nearest as rounding_to
from assay.measure.damage import Curvature
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import nearest
from assay.methods.transform import awq, smooth_quant_plus, svd_smooth
from assay.methods.transform._orthogonal import hadamard, keeping_mean, orthogonal, rotation, times
from assay.methods.transform._scaling import Rounding, cheapest, groups
from assay.methods.transform._subject import Subject
from assay.methods.transform.klt_rotate import klt
from assay.methods.transform.permute_channels import falling
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.progress import Silent
from assay.model.sites import empty_model, load_config, survey
from assay.model.streams import Streams, find_streams
from assay.model.weights import Edits, Weights
from assay.prove.divergence import Candidate, compare
from assay.transforming import transform


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity_curvature(h: Tensor, rows: int) -> Curvature:
    return Curvature(h, torch.ones(rows), 1.0, 100)


def streams_of(given: Lively) -> Streams:
    source = Checkpoint.open(given.folder)
    return find_streams(source, survey(source, empty_model(source)), load_config(source))


# ---- orthogonal matrices -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 64, 72, 96, 256, 448, 768, 896, 1600])
def test_hadamard_matrices_have_ones_and_orthogonal_rows(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 6, 36, 52, 92])
def test_sizes_without_a_construction_get_a_random_rotation(size: int) -> None:
    assert hadamard(size) is None
    turned = rotation(size, seeded(0))
    torch.testing.assert_close(turned @ turned.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 3, 64, 100])
def test_a_rotation_that_keeps_the_mean_commutes_with_layer_norm(size: int) -> None:
    turned = keeping_mean(size, seeded(1))
    torch.testing.assert_close(turned @ turned.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(torch.ones(size, dtype=torch.float64) @ turned, torch.ones(size, dtype=torch.float64))
    x = torch.randn(5, size, generator=seeded(2), dtype=torch.float64) + 3
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(norm(x @ turned, (size,)), norm(x, (size,)) @ turned)
    other = orthogonal(size, seeded(3))
    assert size == 2 or not torch.allclose(norm(x @ other, (size,)), norm(x, (size,)) @ other, atol=1e-3)


def test_products_are_rounded_once_and_do_not_depend_on_the_cut() -> None:
    x, turned = torch.randn(3, 7, 64, generator=seeded(4)), rotation(64, seeded(5))
    assert torch.equal(times(x, turned), (x.double() @ turned).float())


def test_klt_makes_all_variances_equal_and_a_hadamard_matrix_alone_does_not() -> None:
    size = 96
    h = moment(size, 6)
    spread = {}
    for name, turned in (("klt", klt(h, seeded(7))), ("hadamard", rotation(size, seeded(7)))):
        torch.testing.assert_close(turned.T @ turned, torch.eye(size, dtype=torch.float64))
        variances = (turned.T @ h.double() @ turned).diagonal()
        torch.testing.assert_close(variances.mean(), h.double().trace() / size)
        spread[name] = float(variances.max() / variances.min())
    assert spread["klt"] < 1 + 1e-5
    assert spread["hadamard"] > 1.5


# ---- AWQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_awq_with_two_large_inputs_halves_the_loss_on_other_tokens(seed: int) -> None:
    generator = seeded(seed)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(2, 1024, 128, generator=generator)
    x[..., [5, 77]] *= 20
    seen, other = (m.T @ m / len(m) for m in x)
    rounding = Rounding(3, 128, torch.float32)
    found = awq.search([(weight, identity_curvature(seen, 64))], seen.diagonal().sqrt(), rounding)
    assert 0 < awq.EXPONENTS[found.place] < 1
    held_out = [(weight, identity_curvature(other, 64))]
    assert rounding.damage(held_out, found.scale) < 0.5 * rounding.damage(held_out, torch.ones(128))


def test_exponent_zero_is_rounding_to_nearest_exactly() -> None:
    weight, h, g = torch.randn(16, 128, generator=seeded(8)), moment(128, 9), moment(16, 10)
    curvature = Curvature(h, g, 0.5, 10)
    assert torch.equal(awq.scales(h.diagonal().sqrt(), 0.0), torch.ones(128))
    found = awq.search([(weight, curvature)], h.diagonal().sqrt(), Rounding(4, 64, torch.bfloat16))
    grid = IntegerGrid(4, 64, symmetric=False)
    stored = weight.bfloat16().float()
    rounded = nearest.solve(stored, grid)
    assert found.damages[0] == curvature.damage(grid.decode(rounded.codes, rounded.affine).float() - weight)
    assert found.damages[found.place] == min(found.damages) <= found.damages[0]


def test_sampled_rows_stand_for_all_rows() -> None:
    weight, h, g = torch.randn(900, 64, generator=seeded(11)), moment(64, 12), moment(900, 13)
    whole, scale = Curvature(h, g, 1.0, 10), torch.ones(64)
    few, all_rows = Rounding(3, 64, torch.float32, rows=300), Rounding(3, 64, torch.float32, rows=900)
    sample = few.sampled(weight, whole)
    assert len(sample[0]) == 300
    assert all_rows.sampled(weight, whole)[0] is weight
    assert few.damage([sample], scale) == pytest.approx(all_rows.damage([(weight, whole)], scale), rel=0.25)


def test_groups_of_a_size_that_does_not_divide_fall_back() -> None:
    sizes = [Rounding(4, 128, torch.bfloat16).grid(columns).group_size for columns in (256, 192, 96, 80)]
    assert sizes == [128, 64, 32, None]


def test_query_heads_that_share_a_value_head_share_its_scales(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    before = load_file(given.folder / "model.safetensors")
    transformed(given, ["awq"], tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.{}_proj.weight"
    columns = (after[name.format("o")] / before[name.format("o")]).median(0)[0].view(2, 2, 16)
    torch.testing.assert_close(columns[:, 0], columns[:, 1])
    assert columns.std() > 0.05
    down = "model.layers.1.mlp.{}_proj.weight"
    hidden = (after[down.format("down")] / before[down.format("down")]).median(0)[0]
    assert hidden.std() > 0.05
    torch.testing.assert_close(after[down.format("up")] * hidden[:, None], before[down.format("up")] * _ratio(before, after, 1))


def _ratio(before: dict[str, Tensor], after: dict[str, Tensor], block: int) -> Tensor:
    name = f"model.layers.{block}.post_attention_layernorm.weight"
    return before[name] / after[name]


# ---- scales that are folded --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_folding_powers_of_two_is_exact_to_the_bit(family: str, tmp_path: Path) -> None:
    given = enliven(family, tmp_path / "in")
    subject = Subject(Weights(Checkpoint.open(given.folder)), streams_of(given))
    edits = Edits()
    for place, group in enumerate(groups(subject)):
        width = subject.weights.width(group.readers[0].inputs)
        scale = 2.0 ** torch.randint(-3, 4, (width,), generator=seeded(place)).float()
        group.fold(subject.weights, group.shared(scale, largest=True), edits)
    changed = subject.weights.edited(edits.by_tensor())
    assert sum(not changed.untouched(n) for n in changed.names) > 8
    given.model.load_state_dict({n: changed.read(n) for n in changed.names}, strict=False)
    assert torch.equal(logits(given.model), given.logits)


def test_a_rounded_gain_does_not_move_the_function(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    given.model.bfloat16().save_pretrained(given.folder)
    subject = Subject(Weights(Checkpoint.open(given.folder)), streams_of(given))
    group = next(g for g in groups(subject) if g.norm)
    assert group.norm
    assert group.norm.weight
    edits = Edits()
    group.fold(subject.weights, torch.rand(64, generator=seeded(14)) + 0.5, edits)
    changed = subject.weights.edited(edits.by_tensor())
    gains = [w.read(group.norm.weight) for w in (subject.weights, changed)]
    assert torch.equal(gains[1], gains[1].bfloat16().float())
    for reader in group.readers:
        before, after = (w.read(reader.inputs.tensor) * g for w, g in zip((subject.weights, changed), gains, strict=True))
        torch.testing.assert_close(before, after, rtol=1e-6, atol=0)


# ---- SmoothQuant+ ------------------------------------------------------------------------------


def layer(seed: int, outliers: bool) -> tuple[Tensor, Curvature, Tensor, Tensor]:
    """A matrix, its curvature, and the sizes of its inputs and weights by channel."""
    generator = seeded(seed)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(1024, 128, generator=generator)
    if outliers:
        x[:, [5, 77]] *= 20
    else:
        weight[:, [5, 77]] *= 8
    h = x.T @ x / len(x)
    return weight, identity_curvature(h, 64), h.diagonal().sqrt(), weight.abs().amax(0)


def losses(seed: int, outliers: bool) -> list[float]:
    weight, curvature, inputs, largest = layer(seed, outliers)
    rounding = Rounding(3, 128, torch.float32)
    trials = [torch.ones(128), *(smooth_quant_plus.scales(inputs, largest, s) for s in smooth_quant_plus.STRENGTHS)]
    return [rounding.damage([(weight, curvature)], scale) for scale in trials]


def test_one_strength_serves_all_layers_and_differs_from_that_of_one() -> None:
    first, second = losses(0, outliers=True), losses(1, outliers=False)
    both = smooth_quant_plus.cheapest([a + b for a, b in zip(first, second, strict=True)])
    assert both is not None
    assert smooth_quant_plus.cheapest(first) not in (None, 0.0)
    assert len({smooth_quant_plus.cheapest(first), smooth_quant_plus.cheapest(second), both}) > 1


def test_without_scales_is_a_candidate_and_wins_where_scales_only_hurt() -> None:
    assert smooth_quant_plus.cheapest([1.0] + [2.0] * 21) is None
    assert smooth_quant_plus.cheapest([2.0, 1.0] + [3.0] * 20) == 0.0


@pytest.mark.parametrize(
    "name", ["awq:bits=3,group_size=32", "smooth_quant_plus:bits=3,group_size=32", "svd_smooth:bits=3,rank=2", "rotate"]
)
def test_planted_outliers_cost_less_on_other_text(name: str, tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    for block in given.model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[[3, 7]] *= 20
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.gate_proj):
            linear.weight.data[:, [3, 7]] *= 0.2
    given.model.save_pretrained(given.folder)
    save_tokenizer(given.folder)
    profile = assay.profile(given.folder, tmp_path / "profile", calibration=text_file(tmp_path), tokens=512, window=32)
    original, level = Checkpoint.open(given.folder), Level(3, 32, False)
    made = transform(original, [name], tmp_path / "out", profile, 0, Silent())
    reference = StreamedModel(original)
    other = Windows(torch.randint(1, 40, (8, 32), generator=seeded(15)), "other")
    rounded = {c: Candidate(StreamedModel(Checkpoint.open(c.folder)), rounding_to(lambda _: level)) for c in (original, made)}
    scores = compare(reference, {str(c.folder): candidate for c, candidate in rounded.items()}, other, Silent())
    kl = [float(torch.cat(scores[str(c.folder)].kl).mean()) for c in (original, made)]
    assert kl[1] < 0.7 * kl[0]


# ---- permutation -------------------------------------------------------------------------------


def test_equal_channels_keep_their_order() -> None:
    assert falling(torch.tensor([1.0, 3.0, 1.0, 3.0, 0.0])).tolist() == [1, 3, 0, 2, 4]


def test_channels_are_moved_as_they_are_and_end_in_falling_order(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    before = load_file(given.folder / "model.safetensors")
    source = Checkpoint.open(given.folder)
    profile = Made(given.folder, {"model": source.fingerprint})
    transform(source, ["permute_channels:residual=false"], tmp_path / "out", profile, 0, Silent())
    after = load_file(tmp_path / "out" / "model.safetensors")
    for block in range(2):
        name = f"model.layers.{block}.mlp.{{}}_proj.weight"
        sizes = profile.curvatures(block)[name.format("down")].h.diagonal()
        order = sizes.argsort(descending=True)
        assert torch.equal(after[name.format("down")], before[name.format("down")][:, order])
        for rows in ("gate", "up"):
            assert torch.equal(after[name.format(rows)], before[name.format(rows)][order])
    others = [n for n in before if ".mlp." not in n]
    assert all(torch.equal(before[n], after[n]) for n in others)
    transformed(given, ["permute_channels:hidden=false"], tmp_path / "residual")
    moved = load_file(tmp_path / "residual" / "model.safetensors")
    assert all(torch.equal(moved[n].flatten().sort()[0], before[n].flatten().sort()[0]) for n in before)
    assert not torch.equal(moved["model.norm.weight"], before["model.norm.weight"])


# ---- real weights ------------------------------------------------------------------------------


def pebble_inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """name -> (weight, H, H on other text) of the linear maps of one block."""
    folders = [parent / "shared" for parent in Path(__file__).resolve().parents]
    shared = next((f for f in folders if (f / "models/pebble/config.json").exists()), None)
    if shared is None:
        pytest.skip("shared/models/pebble is not here")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models/pebble")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/pebble", dtype=torch.float32)
    text = (shared / "data/wikitext2/valid.txt").read_text()[:60_000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0][:8192].view(2, 16, 256)
    maps = {n: m for n, m in model.model.layers[2].named_modules() if isinstance(m, torch.nn.Linear)}
    seen: dict[str, list[Tensor]] = {name: [] for name in maps}
    for name, linear in maps.items():
        linear.register_forward_hook(lambda _, x, __, name=name: seen[name].append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for half in ids:
            model(half)
    return {n: (maps[n].weight.detach(), *(x.T @ x / len(x) for x in seen[n])) for n in maps}


def test_a_larger_low_rank_term_leaves_less_to_rounding() -> None:
    weight = torch.randn(96, 128, generator=seeded(20)) * torch.randn(128, generator=seeded(21)).exp()
    curvature = identity_curvature(torch.eye(128), 96)
    damages = [Rounding(4, 64, rank=rank).damage([(weight, curvature)], torch.ones(128)) for rank in (0, 8, 16, 32)]
    assert damages == sorted(damages, reverse=True) and damages[3] < 0.7 * damages[0]


def test_smoothing_pays_beside_a_low_rank_term_too() -> None:
    """Scales searched with the term, on real weights and other text; those searched without it are never better for it."""
    maps, rounding, gained = pebble_inputs(), Rounding(3, 64, torch.bfloat16, rank=8), []
    for names in ([f"self_attn.{c}_proj" for c in "qkv"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]):
        matrices = [(w, identity_curvature(h, len(w))) for w, h, _ in (maps[n] for n in names)]
        held_out = [(w, identity_curvature(h, len(w))) for w, _, h in (maps[n] for n in names)]
        size = matrices[0][1].h.diagonal().sqrt()
        reach = torch.stack([w.abs().amax(0) for w, _ in matrices]).amax(0)
        trials = [svd_smooth.scales(size, reach, a, b) for a, b in svd_smooth.EXPONENTS]
        assert torch.equal(trials[0], torch.ones_like(size))
        found = cheapest(matrices, trials, rounding)
        assert min(found.damages) == found.damages[found.place] <= found.damages[0]
        assert (
            rounding.damage(matrices, awq.search(matrices, size, replace(rounding, rank=0)).scale) >= min(found.damages) * 0.999
        )
        gained.append(rounding.damage(held_out, found.scale) / rounding.damage(held_out, trials[0]))
    assert max(gained) < 1


def test_awq_beats_rounding_to_nearest_on_real_weights_and_other_text() -> None:
    maps = pebble_inputs()
    shared = [[f"self_attn.{c}_proj" for c in "qkv"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    for bits in (4, 3):
        rounding = Rounding(bits, 64, torch.bfloat16)
        for names in shared:
            matrices = [(w, identity_curvature(h, len(w))) for w, h, _ in (maps[n] for n in names)]
            held_out = [(w, identity_curvature(h, len(w))) for w, _, h in (maps[n] for n in names)]
            found = awq.search(matrices, matrices[0][1].h.diagonal().sqrt(), rounding)
            assert rounding.damage(held_out, found.scale) < rounding.damage(held_out, torch.ones_like(found.scale))
