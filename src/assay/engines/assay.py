"""Assay's own layout: every format, exact weights and low-rank terms; `assay.load` decodes it into a transformers model."""

from assay.engines.contract import Contract
from assay.model.level import FORMATS

CONTRACT = Contract(
    name="assay", layout="assay", since="this version", formats=tuple(FORMATS), sums=True, head=True, embedding=True,
    experts=True, transposed=True,
)  # fmt: skip
