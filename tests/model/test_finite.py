"""Numbers that aren't, wherever they are."""

from __future__ import annotations

import pytest
import torch

from assay.model.finite import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_one_is_found_and_large_sums_are_no_reason(dtype: torch.dtype) -> None:
    large = torch.full((7, 300), torch.finfo(dtype).max, dtype=dtype)
    assert finite(large) and finite(torch.zeros(0, dtype=dtype))
    for wrong in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        for x in (large, torch.randn(7, 300).to(dtype)):
            broken = x.clone()
            broken.flatten()[torch.arange(len(wrong)) + 1999] = torch.tensor(wrong, dtype=dtype)
            assert not finite(broken)
