"""Where products may be rounded, attention is too, and nowhere else."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

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
