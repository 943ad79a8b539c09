"""Decoded weights in the source's dtype: every level, no smaller; to simulate, and for engines without low bits."""

from assay.engines.contract import Contract

CONTRACT = Contract(
    name="plain", layout="plain", since="any", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128, None),
    symmetric=(False, True), head=True, embedding=True, experts=True, transposed=True,
)  # fmt: skip
