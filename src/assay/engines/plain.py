"""Decoded weights in the source's dtype: every level, no smaller; to simulate, and for engines without low bits."""

from assay.engines.contract import Contract
from assay.model.level import FORMATS

CONTRACT = Contract(
    name="plain", layout="plain", since="any", formats=tuple(FORMATS), sums=True, head=True,
    embedding=True, experts=True, transposed=True,
)  # fmt: skip
