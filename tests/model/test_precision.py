"""Where products may be rounded, attention and linear maps are too, and nowhere else."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from assay.model.precision import bf16_products, float32_products, has_bf16, rounded_maps


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_rounded_only_where_products_are(masked: bool) -> None:
    query, key, value = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    given = {"attn_mask": torch.randn(16, 16, generator=torch.Generator().manual_seed(1))} if masked else {"is_causal": True}
    exact = scaled_dot_product_attention(query, key, value, **given)
    with float32_products(), rounded_maps():
        assert torch.equal(scaled_dot_product_attention(query, key, value, **given), exact)
    leaf = query.clone().requires_grad_()
    with bf16_products(), rounded_maps():
        rounded = scaled_dot_product_attention(leaf, key, value, **given)
    rounded.sum().backward()
    assert rounded.dtype == leaf.grad.dtype == torch.float32
    assert torch.equal(rounded, exact) != has_bf16("cpu")
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0)


def test_linear_maps_are_rounded_where_products_are_and_differ_by_no_more_than_bf16_does() -> None:
    x, weight = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    with float32_products(), rounded_maps():
        exact = linear(x, weight)
        assert torch.equal(exact, x @ weight.T)
    leaf = x.clone().requires_grad_()
    with bf16_products(), rounded_maps():
        rounded = linear(leaf, weight)
        rounded.sum().backward()
    assert rounded.dtype == leaf.grad.dtype == torch.float32
    if has_bf16("cpu"):
        assert not torch.equal(rounded, exact)
    for found, wanted in ((rounded, exact), (leaf.grad, weight.sum(0).expand_as(x))):
        torch.testing.assert_close(found, wanted, atol=0.02 * float(wanted.std()), rtol=2**-7)
