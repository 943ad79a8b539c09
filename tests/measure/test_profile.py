"""H and G are the sums that their definitions say, additive, resumable, and priced right."""

from pathlib import Path

import pytest
import torch
from families import build

from assay.measure import profile, stream
from assay.measure.damage import Curvature
from assay.measure.profile import Curvatures, Gradients, measure
from assay.measure.stream import Activations, StreamedModel
from assay.measure.text import Windows
from assay.methods.solve.curvature import feedback_cost
from assay.model.checkpoint import Checkpoint
from assay.model.files import load_tensors
from assay.model.progress import Silent


@pytest.fixture
def llama(tmp_path: Path):
    _, model = build("llama")
    model.float().eval().save_pretrained(tmp_path / "m")
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    return tmp_path, model, Windows(ids, "random")


def test_inputs_equal_hooks_on_the_whole_model(llama) -> None:
    folder, model, text = llama
    expected: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(module, args) -> None:
            x = args[0].flatten(0, 1)
            expected[name] = expected.get(name, 0) + x.T @ x / text.tokens

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        model(text.ids)
    measure(StreamedModel(Checkpoint.open(folder / "m")), text, folder / "p", 0, Silent())
    for block in range(2):
        for name, curvature in Curvatures(folder / "p", block, text.tokens).items():
            torch.testing.assert_close(curvature.h, expected[name], rtol=1e-4, atol=1e-6)


def test_gradients_equal_autograd_on_the_whole_model(llama, monkeypatch) -> None:
    folder, model, text = llama
    chosen: list[torch.Tensor] = []
    sample = profile._sampled

    def remember(*args, **kwargs):
        chosen.append(sample(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(profile, "_sampled", remember)
    measure(StreamedModel(Checkpoint.open(folder / "m")), text, folder / "p", 0, Silent())
    grads: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def watch(module, args, out) -> None:
            out.register_hook(lambda g: grads.__setitem__(name, g.flatten(0, 1)))

        return watch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(hook(f"{name}.weight"))
    logits = model(text.ids).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.cat(chosen), reduction="sum").backward()
    for block in range(2):
        for name, curvature in Curvatures(folder / "p", block, text.tokens).items():
            torch.testing.assert_close(curvature.g, grads[name].T @ grads[name] / text.tokens, rtol=1e-3, atol=1e-8)


def test_less_of_the_gradients_is_the_diagonal_of_what_these_windows_give(llama) -> None:
    folder, _, _ = llama
    ids = torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(1))
    text, some = Windows(ids, "random"), Windows(ids[::2], "random")
    streamed = StreamedModel(Checkpoint.open(folder / "m"))
    measure(streamed, text, folder / "less", 0, Silent(), gradients=Gradients(2, whole=False))
    measure(streamed, text, folder / "all", 0, Silent())
    measure(streamed, some, folder / "some", 0, Silent())
    for block in range(2):
        less, everything, half = (
            Curvatures(folder / name, block, windows.tokens) for name, windows in (("less", text), ("all", text), ("some", some))
        )
        for name in everything:
            assert torch.equal(less[name].h, everything[name].h)
            torch.testing.assert_close(less[name].g, half[name].g.diagonal(), rtol=1e-5, atol=0)
            assert less[name].parts is not None and torch.equal(less[name].parts[1], everything[name].parts[1])


def test_thinned_gradients_keep_windows_of_every_part_and_enough_of_a_long_text() -> None:
    for windows in (1, 8, 16, 40, 64, 128, 256, 300, 1024, 5000):
        every = profile.thinned(windows)
        picked = set(range(0, windows, every))
        parts = [{w for w in range(windows) if w * 8 // windows == part} for part in range(8)]
        assert all(len(part & picked) >= min(2, len(part)) for part in parts)
        assert every <= 4 or 64 <= len(picked) < 80


def test_labels_are_drawn_from_the_model() -> None:
    p = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    drawn = profile._sampled(p.expand(20_000, -1), profile._draws(0, 0, 100, 200))
    shares = drawn.bincount(minlength=5) / len(drawn)
    assert shares[0] == shares[4] == 0
    torch.testing.assert_close(shares, p, atol=0.015, rtol=0)  # four standard deviations


@pytest.mark.parametrize("every", [1, 3])
def test_a_sweep_cut_off_at_any_block_ends_with_the_same_bytes(llama, every: int, monkeypatch, tmp_path: Path) -> None:
    folder, _, text = llama
    streamed, gradients = StreamedModel(Checkpoint.open(folder / "m")), Gradients(every)
    streamed.batch_tokens = 2 * text.ids.shape[1]
    measure(streamed, text, tmp_path / "whole", 0, Silent(), gradients=gradients)
    countdown = [0]

    def cut(call):
        def counted(*arguments) -> None:
            if countdown[0] == 0:
                raise KeyboardInterrupt
            countdown[0] -= 1
            call(*arguments)

        return counted

    monkeypatch.setattr(profile, "save_tensors", cut(profile.save_tensors))
    monkeypatch.setattr(Activations, "drop", cut(Activations.drop))
    for stop in range(15 if every == 1 else 17):
        countdown[0] = stop
        streamed.forget()
        with pytest.raises(KeyboardInterrupt):
            measure(streamed, text, tmp_path / f"cut{stop}", 0, Silent(), gradients=gradients)
        countdown[0] = -1
        streamed.forget()
        measure(streamed, text, tmp_path / f"cut{stop}", 0, Silent(), gradients=gradients)
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / f"cut{stop}" / path.name).read_bytes(), (stop, path.name)


def test_batches_side_by_side_give_the_sums_of_one_after_another(llama, monkeypatch) -> None:
    """From any number of threads the same bits; sums made in other steps, so other last bits, where all go to one total."""
    folder, _, text = llama
    before, found = torch.get_num_threads(), {}
    for name, threads in (("one", 1), ("three", 3), ("totals", 3)):
        if name == "totals":
            monkeypatch.setattr(stream, "WORTH_SHARING", 0)
        torch.set_num_threads(threads)
        model = StreamedModel(Checkpoint.open(folder / "m"), batch_tokens=text.ids.shape[1])
        assert model.small == (name != "totals")
        measure(model, text, folder / name, 0, Silent(), ["fisher", "gradient"])
        found[name] = {path.name: load_tensors(path) for path in (folder / name).glob("*.safetensors")}
    torch.set_num_threads(before)
    for file, tensors in found["one"].items():
        for key, value in tensors.items():
            assert torch.equal(value, found["three"][file][key]), (file, key)
            largest = float(value.abs().max())
            torch.testing.assert_close(value, found["totals"][file][key], rtol=1e-4, atol=1e-5 * largest)


def test_experts_count_their_tokens(tmp_path: Path) -> None:
    _, model = build("mixtral")
    model.float().eval().save_pretrained(tmp_path / "m")
    text = Windows(torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0)), "random")
    measure(StreamedModel(Checkpoint.open(tmp_path / "m")), text, tmp_path / "p", 0, Silent())
    found = Curvatures(tmp_path / "p", 0, text.tokens)
    shares = [c.share for name, c in found.items() if name.endswith("w2.weight")]
    assert sum(shares) == pytest.approx(model.config.num_experts_per_tok)
    assert any(s != shares[0] for s in shares)


def test_damage_is_the_trace() -> None:
    torch.manual_seed(0)
    h, g, d = torch.randn(6, 9), torch.randn(4, 7), torch.randn(4, 6)
    h, g = h @ h.T, g @ g.T
    exact = 0.5 * torch.trace(g @ d @ h @ d.T)
    assert Curvature(h, g, 1.0, 1).damage(d) == pytest.approx(float(exact), rel=1e-5)
    assert Curvature(h, g.diagonal(), 0.5, 1).damage(d) == pytest.approx(
        0.25 * float(torch.trace(torch.diag(g.diagonal()) @ d @ h @ d.T)), rel=1e-5
    )


def test_unshrunken_costs_of_feedback_multiply_to_the_determinant() -> None:
    torch.manual_seed(0)
    root = torch.randn(8, 20)
    h = root @ root.T / 20
    assert float(feedback_cost(h, 0.0, 0.0).log().sum()) == pytest.approx(float(torch.logdet(h)), rel=1e-4)
    assert bool((feedback_cost(h, 0.0, 0.0) <= h.diagonal() + 1e-5).all())


def grown(llama, name: str, at: tuple[int, int], step: float) -> float:
    """Loss on the text, summed in float64, of the whole model with one weight moved."""
    _, model, text = llama
    weight = model.get_parameter(name)
    kept = weight.data[at].clone()
    weight.data[at] += step
    logits = model.double()(text.ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text.ids[:, 1:]).item()
    model.float()
    weight.data[at] = kept
    return loss


def test_the_gradient_is_that_of_central_differences(llama) -> None:
    folder, _, text = llama
    measure(StreamedModel(Checkpoint.open(folder / "m")), text, folder / "p", 0, Silent(), ["gradient"])
    for block, name in ((0, "model.layers.0.self_attn.k_proj.weight"), (1, "model.layers.1.mlp.down_proj.weight")):
        found = Curvatures(folder / "p", block, text.tokens, ["gradient"])[name].gradient
        for at in ((0, 0), (3, 5), divmod(int(found.abs().argmax()), found.shape[1])):
            slope = (grown(llama, name, at, 0.02) - grown(llama, name, at, -0.02)) / 0.04
            assert float(found[at]) == pytest.approx(slope, rel=1e-2, abs=2e-7)


def test_fisher_is_the_mean_of_squared_gradients_of_windows(llama, monkeypatch) -> None:
    folder, model, text = llama
    chosen: list[torch.Tensor] = []
    plain = profile._sampled
    monkeypatch.setattr(profile, "_sampled", lambda p, generator: chosen.append(plain(p, generator)) or chosen[-1])
    measure(StreamedModel(Checkpoint.open(folder / "m")), text, folder / "p", 0, Silent(), ["fisher"])
    labels = torch.cat(chosen).view(text.ids.shape)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    expected = torch.zeros_like(weight)
    for ids, wanted in zip(text.ids, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(ids[None]).logits[0], wanted, reduction="sum")
        expected += torch.autograd.grad(loss, weight)[0].square() / text.tokens
    found = Curvatures(folder / "p", 0, text.tokens, ["fisher"])[name]
    torch.testing.assert_close(found.fisher, expected, rtol=1e-3, atol=1e-8)
    assert found.gradient is None


def test_further_statistics_leave_h_and_g_as_they_are(llama) -> None:
    folder, _, text = llama
    for name, weightwise in (("plain", []), ("more", ["fisher", "gradient"])):
        measure(StreamedModel(Checkpoint.open(folder / "m")), text, folder / name, 0, Silent(), weightwise)
    for path in (folder / "plain").iterdir():
        assert path.read_bytes() == (folder / "more" / path.name).read_bytes(), path.name


def test_experts_have_weightwise_statistics(tmp_path: Path) -> None:
    _, model = build("mixtral")
    model.float().eval().save_pretrained(tmp_path / "m")
    text = Windows(torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0)), "random")
    measure(StreamedModel(Checkpoint.open(tmp_path / "m")), text, tmp_path / "p", 0, Silent(), ["gradient"])
    loss = torch.nn.functional.cross_entropy(model(text.ids).logits[:, :-1].transpose(1, 2), text.ids[:, 1:])
    loss.backward()
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj.grad
    for name, found in Curvatures(tmp_path / "p", 0, text.tokens, ["gradient"]).items():
        if ".w1." in name or ".w3." in name:
            expert = int(name.split("experts.")[1].split(".")[0])
            half = gate_up[expert].chunk(2)[".w3." in name]
            torch.testing.assert_close(found.gradient, half, rtol=1e-3, atol=1e-7)
