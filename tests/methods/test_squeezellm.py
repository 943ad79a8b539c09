"""SqueezeLLM: per-row tables that are optimal under Fisher information, beside exact weights."""

import torch
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.solve import codebook
from assay.methods.split.scores import sensitive_or_large
from assay.model.level import Level
from assay.model.packed import PackedTable
from assay.model.terms import PackedSum


def test_sparse_weights_are_exact_and_don_t_move_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 16, 128, generator=generator).bfloat16().float()
    fisher = torch.randn(weight.shape, generator=generator).square()
    level = Level.parse("lut3-channel+sparse0.01")
    packed = get("squeezellm")().encode(weight, level, torch.float32, Statistics(fisher=fisher))[0]
    mask = sensitive_or_large(weight, fisher, level.kept(16, 128))
    assert isinstance(packed, PackedSum) and isinstance(packed.base, PackedTable)
    assert torch.equal(packed.decode()[mask[0]], weight[0][mask[0]])
    assert torch.equal(packed.base.table, codebook.fit(weight, fisher * ~mask, 8)[0])


def test_without_fisher_information_it_is_k_means() -> None:
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    level = Level.parse("lut2-channel")
    packed = get("squeezellm")().encode(weight, level, torch.float32, Statistics())[0]
    table = codebook.fit(weight, torch.ones_like(weight), 4)
    assert torch.equal(packed.decode(), table[0].gather(1, codebook.nearest(weight, table)[0].long()))


def test_on_real_weights_fisher_wins_where_it_should_and_loses_where_it_should() -> None:
    for bits in (3, 2):
        for weight, curvature in pebble_block().values():
            assert curvature.fisher is not None
            errors = {}
            with_fisher = encode("squeezellm", f"lut{bits}-channel", weight, curvature)
            without = get("squeezellm")().encode(weight[None], Level.parse(f"lut{bits}-channel"), torch.bfloat16, Statistics())[0]
            uniform = encode("clip", f"int{bits}-channel-asym", weight, curvature)
            for name, packed in (("fisher", with_fisher), ("plain", without), ("uniform", uniform)):
                away = (packed.decode().float() - weight).square()
                errors[name] = (float((curvature.fisher * away).sum()), float(away.sum()))
            assert errors["fisher"][0] < errors["plain"][0] < errors["uniform"][0]
            assert errors["fisher"][1] > errors["plain"][1]
        assert damage("squeezellm", f"lut{bits}-channel+sparse0.0045") < damage("squeezellm", f"lut{bits}-channel")
        assert damage("squeezellm", f"lut{bits}-channel") < damage("clip", f"int{bits}-channel-asym")
