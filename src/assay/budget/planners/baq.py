"""The closed form: bits = constant + log2(cost) / 2, clipped to what a decision offers and rounded to its levels.

Damage falls as cost · 4^-bits, so at the best split of the bits all weights do equal damage (reverse water-filling; BAQ:
Efficient Bit Allocation Quantization for Large Language Models, 2025). The paper splits bits among the columns of a matrix;
here they are split among matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import lagrange, refuse_impossible, uniform
from assay.budget.table import Floats, Ints, Table


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The closed form's bits rounded to the nearest options, all shifted alike until they fit `budget` bytes.

    What is left goes to single upgrades. Never more damage than the best uniform level that fits. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    table = Table.of(decisions)
    choice = _rounded(table, budget)
    choice = lagrange.fill(decisions, table, choice, budget - table.bytes_of(choice))
    return uniform.or_better(table, choice, budget).tolist()


def closed_form(cost: Floats, weights: Ints, low: Floats, high: Floats, bits: float) -> Floats:
    """Bits per weight [decisions] of least total damage sum(weights · cost · 4^-bits) within `bits` in all.

    cost, weights: positive, [decisions]; low, high: bits per weight between which a decision may lie; bits: of all weights
    together, between those of `low` and of `high`.
    """
    start = np.log2(cost) / 2
    edges, change = np.concatenate([low - start, high - start]), np.concatenate([weights, -weights])
    order = np.argsort(edges, kind="stable")
    edges, slope = edges[order], np.cumsum(change[order])[:-1]
    total = float(weights @ low) + np.concatenate([[0.0], np.cumsum(slope * np.diff(edges))])
    return np.clip(np.interp(bits, total, edges) + start, low, high)


def costs(table: Table) -> Floats:
    """Cost per weight [decisions], such that damage per weight is cost · 4^-bits; the geometric mean over the options.

    Zero where no option does damage.
    """
    own = np.arange(table.damage.shape[1]) < table.count[:, None]
    lossy = own & (table.damage > 0)
    weights = np.maximum(table.weights, 1)[:, None]
    log = np.log2(np.where(lossy, table.damage, 1.0) / weights) + 2 * _bits(table)
    mean = np.where(lossy, log, 0.0).sum(1) / np.maximum(lossy.sum(1), 1)
    return np.where(lossy.any(1), np.exp2(np.minimum(mean, 1000.0)), 0.0)


def _bits(table: Table) -> Floats:
    return 8 * table.nbytes / np.maximum(table.weights, 1)[:, None]


def _rounded(table: Table, budget: int) -> Ints:
    """The nearest options for the highest constant at which they fit.

    As the constant rises, a decision changes options where its bits pass the middle between two of them.
    """
    start = np.log2(np.maximum(costs(table), 1e-300)) / 2
    bits = _bits(table)
    owner, option = np.nonzero(
        (np.arange(1, bits.shape[1]) < table.count[:, None]) & (table.damage[:, 1:] < table.damage[:, :-1])
    )
    at = (bits[owner, option] + bits[owner, option + 1]) / 2 - start[owner]
    order = np.lexsort((option, owner, at))
    owner, option = owner[order], option[order] + 1
    extra = table.nbytes[owner, option] - table.nbytes[owner, option - 1]
    choice = np.zeros_like(table.count)
    fit = int(np.searchsorted(np.cumsum(extra), budget - table.bytes_of(choice), side="right"))
    np.maximum.at(choice, owner[:fit], option[:fit])
    return choice
