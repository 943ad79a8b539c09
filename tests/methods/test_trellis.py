"""Trellis-coded quantization: what is read is what was chosen, the choice is optimal, and as good as stated."""

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.methods.grid import _trellis
from assay.methods.grid.lloyd_max import gaussian_distortion, lloyd_max
from assay.methods.grid.trellis import distortion as told
from assay.methods.grid.trellis import encode
from assay.model import trellis as reader
from assay.model.errors import InputError
from assay.model.trellis import Trellis

PUBLISHED = {2: 0.071, 3: 0.0189, 4: 0.0059}
MEASURED = {2: 0.0687, 3: 0.0175, 4: 0.00447}
CODES = [(bits, k) for bits, codes in reader._TABLES.items() for k in range(1, len(codes) + 1)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(rows: int, length: int = 4096, seed: int = 0) -> Tensor:
    """A sample with exactly a Gaussian's quantiles, in random order."""
    count = rows * length
    quantiles = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).float()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(seed))].view(rows, length)


def distortion(trellis: Trellis, x: Tensor) -> float:
    return float((encode(trellis, x).values - x).double().square().mean())


def all_sequences(trellis: Trellis, length: int) -> tuple[Tensor, Tensor]:
    """Every stream of `length` steps [2^bits, 1] and what each decodes to."""
    bits = trellis.bits(length)
    streams = (torch.arange(1 << bits) << (32 - bits)).int()[:, None]
    return streams, trellis.decode(streams, length)


# ---- reading -----------------------------------------------------------------------------------


@given(st.data())
def test_the_reader_gives_what_the_search_chose(data: st.DataObject) -> None:
    state_bits = data.draw(st.sampled_from([4, 6, 8, 10]))
    widest = min(state_bits, 8)
    trellis = Trellis(tuple(data.draw(st.lists(st.integers(1, widest), min_size=1, max_size=4))), state_bits)
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(state_bits, 90))
    x = normal(length, rows, length)
    weight = normal(rows, rows, length).square() if data.draw(st.booleans()) else None
    stream, values = encode(trellis, x, weight)
    bits = sum(trellis.steps[t % len(trellis.steps)] for t in range(length))
    assert trellis.bits(length) == bits
    assert stream.shape == (rows, -(-bits // 32))
    assert stream.dtype == torch.int32
    assert torch.equal(trellis.decode(stream, length), values)
    padding = 32 * stream.shape[1] - bits
    assert not (stream[:, -1].long() & ((1 << padding) - 1)).any()


@pytest.mark.parametrize("steps", [(2,), (1, 3), (2, 2, 3)])
def test_states_are_the_last_bits_of_a_stream_that_goes_round(steps: tuple[int, ...]) -> None:
    trellis, length = Trellis(steps, 8), 50
    stream = torch.randint(-(2**31), 2**31, (3, trellis.words(length)), generator=torch.Generator().manual_seed(0)).int()
    values = trellis.decode(stream, length)
    for row, decoded in zip(stream.tolist(), values, strict=True):
        text = "".join(f"{word % 2**32:032b}" for word in row)[: trellis.bits(length)]
        end = 0
        for t in range(length):
            k = steps[t % len(steps)]
            end += k
            state = int((text * 2)[len(text) + end - 8 : len(text) + end], 2)
            assert decoded[t] == reader._table(8, k)[state]


def test_a_stream_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 4 words a row, but its shape is \[2, 5\]"):
        Trellis((2,)).decode(torch.zeros(2, 5, dtype=torch.int32), 64)


# ---- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state_bits", "k"), CODES)
def test_tables_hold_each_quantile_once_and_are_symmetric(state_bits: int, k: int) -> None:
    table, count = reader._table(state_bits, k), 1 << state_bits
    deviation = reader._TABLES[state_bits][k - 1][3] / 100
    quantiles = torch.special.ndtri((torch.arange(count).double() + 0.5) / count) * deviation
    torch.testing.assert_close(table.sort().values.double(), quantiles, rtol=0, atol=2.0**-17)
    assert torch.equal(table.flip(0), -table), "the complement of a state must be its negative"
    # of the states that one state leads to, at most 1.5 times their share lies in any quarter of the values
    quarter = torch.bucketize(table, table.sort().values[[count // 4, count // 2, 3 * count // 4]], right=True)
    if k >= 3 and state_bits >= 8:
        counts = torch.nn.functional.one_hot(quarter, 4).view(-1, 1 << k, 4).sum(1)
        assert counts.max() <= 1.5 * (1 << k) / 4


def test_tables_never_change() -> None:
    """They are part of the stored format."""
    total = 0
    for state_bits, k in CODES:
        total = zlib.crc32(reader._table(state_bits, k).numpy().tobytes(), total)
    assert total == 3453673306


# ---- the search --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1,), (2,), (1, 2), (3, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_path_is_the_best_of_all_through_its_seam(steps: tuple[int, ...], weighted: bool) -> None:
    trellis, length = Trellis(steps, 4), 6
    streams, candidates = all_sequences(trellis, length)
    seams = streams[:, 0].long() >> (32 - trellis.bits(length)) & ((1 << (4 - steps[0])) - 1)
    x = normal(1, 40, length)
    weight = normal(2, 40, length).square() if weighted else torch.ones(40, length)
    stream, values = encode(trellis, x, weight if weighted else None)
    best_of_all = 0
    for target, price, chosen, found in zip(x, weight, stream, values, strict=True):
        costs = (price * (target - candidates).square()).sum(1)
        mine = (price * (target - found).square()).sum()
        same_seam = seams == seams[streams[:, 0] == chosen[0]]
        torch.testing.assert_close(mine, costs[same_seam].min(), rtol=1e-5, atol=1e-6)
        best_of_all += int(mine <= costs.min() * 1.00001 + 1e-6)
    assert best_of_all >= 1.5 * 40 / (1 << (4 - steps[0])), "the first search should find the best seam, not just any"


@pytest.mark.parametrize("k", [1, 2])
def test_a_path_with_free_ends_is_the_best_of_all(k: int) -> None:
    length, bits = 6, 4
    table = reader._table(bits, k)
    steps, tables, phases = np.array([k]), table[None].numpy(), np.zeros(length, dtype=np.int64)
    groups, symbols = 1 << (bits - k), list(itertools.product(range(1 << k), repeat=length))
    states = torch.arange(groups).repeat_interleave(len(symbols))
    decoded = []
    for new in torch.tensor(symbols).repeat(groups, 1).T:
        states = (states << k | new) & ((1 << bits) - 1)
        decoded.append(table[states])
    candidates = torch.stack(decoded, 1)
    for seed in range(30):
        x, root = normal(seed, length), normal(seed + 100, length).abs()
        path = np.empty(length, dtype=np.int64)
        assert _trellis._search(bits, steps, tables, phases, k, x.numpy(), root.numpy(), -1, False, 99, path)
        mine = (root * (x - table[path])).square().sum()
        assert all(path[t] & (groups - 1) == path[t + 1] >> k for t in range(length - 1)), "states must follow each other"
        torch.testing.assert_close(mine, (root * (x - candidates)).square().sum(1).min(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [(1,), (2, 3), (5,)])
def test_deciding_in_windows_changes_nothing(steps: tuple[int, ...]) -> None:
    trellis, x = Trellis(steps, 10), gaussian(4, 1000)
    weight = normal(3, 4, 1000).exp()
    weight[:, 300:500] = 0
    results = []
    for window in (2, 60, 1000):
        stream, values = torch.zeros(4, trellis.words(1000), dtype=torch.int32), torch.empty_like(x)
        tables, arrays = trellis.tables().numpy(), [t.numpy() for t in (x, weight, stream, values)]
        _trellis.encode_rows(10, np.array(steps), tables, window, 80, *arrays)
        results.append(stream)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])
    phases, path = np.arange(1000) % len(steps), np.empty(1000, dtype=np.int64)
    facts = (10, np.array(steps), trellis.tables().numpy(), phases, steps[0], x[0].numpy(), np.ones(1000, dtype=np.float32))
    assert not _trellis._search(*facts, -1, False, 2, path), "a window of 2 must be noticed to be too short"


def test_sequences_and_threads_do_not_meddle() -> None:
    trellis, x = Trellis((2, 3), 8), gaussian(5, 200)
    weight = normal(4, 5, 200).square()
    expected = encode(trellis, x, weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, encode(trellis, x, weight), expected))
    finally:
        torch.set_num_threads(before)
    alone = [encode(trellis, x[i : i + 1], weight[i : i + 1]).stream for i in range(5)]
    assert torch.equal(torch.cat(alone), expected.stream)


def test_weights_count_by_their_ratios_and_buy_precision() -> None:
    trellis, x = Trellis((2,)), gaussian(2, 1024)
    weight = normal(5, 2, 1024).mul(1.5).exp()
    found = encode(trellis, x, weight)
    assert torch.equal(encode(trellis, x, weight * 2.0**-40).stream, found.stream)
    assert torch.equal(encode(trellis, x, torch.full_like(x, 7.0)).stream, encode(trellis, x).stream)
    plain = encode(trellis, x)
    errors = [(weight * (e.values - x).square()).sum() for e in (found, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert not encode(trellis, x, torch.zeros_like(x)).values.isnan().any()


# ---- quality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [2, 3, 4])
def test_distortion_is_as_published_or_less_and_near_the_bound(rate: int) -> None:
    found = distortion(Trellis.of_rate(rate), gaussian(32))
    bound = 2.0 ** (-2 * rate)
    assert found < PUBLISHED[rate]
    assert found == pytest.approx(MEASURED[rate], rel=0.01)
    assert bound < found < bound * 2 ** (2 * 0.1), "the gap to the bound should be at most 0.1 bit"
    assert found < 0.6 * gaussian_distortion(lloyd_max(rate))


@pytest.mark.parametrize("rate", [1, 1.75, 2.25, 3, 3.5, 4.5, 5, 6])
def test_the_formula_for_the_distortion_is_what_encoding_leaves(rate: float) -> None:
    assert told(rate) == pytest.approx(distortion(Trellis.of_rate(rate), gaussian(16)), rel=0.025)


@pytest.mark.parametrize("state_bits", [8, 12])
def test_distortion_falls_with_every_quarter_of_a_bit(state_bits: int) -> None:
    x = gaussian(4)
    rates = [1 + i / 4 for i in range(21)]
    assert [Trellis.of_rate(r).rate for r in rates] == rates
    found = [distortion(Trellis.of_rate(r, state_bits), x) for r in rates]
    for rate, before, after in zip(rates[1:], found, found[1:], strict=False):
        assert 2.0 ** (-2 * rate) < after < before
        assert 0.6 < after / before < 0.85, "a quarter of a bit should be worth about 2^-0.5"


def test_longer_states_are_better() -> None:
    x = gaussian(8)
    found = [distortion(Trellis((2,), state_bits), x) for state_bits in (4, 6, 8, 10, 12, 14)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
def test_going_round_beats_storing_the_first_state(length: int) -> None:
    """Per bit: the distortion of a free start, plus what its L - k extra bits would buy."""
    x = gaussian(32768 // length, length)
    k, bits, table = 2, 12, reader._table(12, 2)
    phases, root = np.zeros(length, dtype=np.int64), np.ones(length, dtype=np.float32)
    path, free = np.empty(length, dtype=np.int64), 0.0
    for row in x:
        assert _trellis._search(bits, np.array([k]), table[None].numpy(), phases, k, row.numpy(), root, -1, False, length, path)
        free += float((table[path] - row).double().square().sum()) / x.numel()
    found = distortion(Trellis((k,), bits), x)
    assert free < found < free * 4 ** ((bits - k) / length)


def test_trained_weights_lose_less_than_with_a_scalar_table() -> None:
    folders = [parent / "shared/models/pebble" for parent in Path(__file__).resolve().parents]
    folder = next((f for f in folders if (f / "config.json").exists()), None)
    if folder is None:
        pytest.skip("shared/models/pebble is not here")
    from assay.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    names = [n for n in checkpoint.names if "layers.2." in n and n.endswith("proj.weight")]
    assert names
    for name in names:
        weight = checkpoint.read(name).float()[:, :32].T
        x = weight / weight.square().mean(1, keepdim=True).sqrt()
        for bits in (2, 3, 4):
            levels = lloyd_max(bits).float()
            scalar = levels[(x[..., None] - levels).abs().argmin(-1)]
            ours = encode(Trellis.of_rate(bits), x).values
            assert (ours - x).square().mean() < 0.75 * (scalar - x).square().mean()


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.75, 8.25, 2.1, -1, float("inf"), float("nan")])
def test_other_rates_are_refused(rate: float) -> None:
    with pytest.raises(InputError, match="1 to 8 in steps of 0.25"):
        Trellis.of_rate(rate)


def test_impossible_trellises_and_sequences_are_refused() -> None:
    with pytest.raises(InputError, match="use one of 4, 6, 8"):
        Trellis((2,), 9)
    with pytest.raises(InputError, match="steps of 1 to 4 bits, not 2, 5"):
        Trellis((2, 5), 4)
    with pytest.raises(InputError, match="not none"):
        Trellis(())
    with pytest.raises(InputError, match="5 weights make 10 bits"):
        encode(Trellis((2,)), torch.zeros(1, 5))
    for x, weight in ((torch.zeros(8), None), (torch.zeros(1, 8), torch.ones(8)), (torch.full((1, 8), torch.nan), None),
                      (torch.zeros(1, 8), -torch.ones(1, 8))):  # fmt: skip
        with pytest.raises(ValueError, match="trellis"):
            encode(Trellis((2,)), x, weight)
