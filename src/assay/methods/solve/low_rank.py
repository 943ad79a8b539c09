"""The best product of two thin matrices for a weight or for the error of a quantizer."""

import torch
from torch import Tensor

from assay.methods.solve.curvature import DAMPING, inverse_factor, shrink


def factors(
    matrix: Tensor, rank: int, H: Tensor | None = None, G: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """(A [..., out, rank], B [..., rank, in]), float32, that minimise tr(G D H Dᵀ) for D = matrix - A B.

    matrix: [..., out, in]; H [..., in, in] and G [..., out, out], damped by a fraction of their mean diagonal; None:
    identity. With inv(H) = UᵀU and inv(G) = VᵀV the problem is that of inv(V)ᵀ D inv(U) in the Frobenius norm,
    which the leading singular vectors solve (Eckart and Young, 1936). A and B get equal shares of the singular values.
    """
    rank = min(rank, *matrix.shape[-2:])
    inner, outer = (None if m is None else inverse_factor(shrink(m, 0.0), damping)[0].double() for m in (H, G))
    turned = matrix.double()
    turned = turned if outer is None else torch.linalg.solve_triangular(outer.mT, turned, upper=False)
    turned = turned if inner is None else torch.linalg.solve_triangular(inner, turned, upper=True, left=False)
    left, values, right = _leading(turned, rank)
    share = values.sqrt()
    A, B = left * share[..., None, :], right * share[..., None]
    A = A if outer is None else outer.mT @ A
    B = B if inner is None else B @ inner
    return A.float(), B.float()


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values: [..., m, rank], [..., rank], [..., rank, n].

    By the eigenvectors of the smaller Gram matrix, in float64: the small singular values that it blurs aren't wanted.
    """
    wide = matrix.shape[-1] > matrix.shape[-2]
    tall = matrix.mT if wide else matrix
    right = torch.linalg.eigh(tall.mT @ tall).eigenvectors.flip(-1)[..., :rank]
    moved = tall @ right
    values = moved.norm(dim=-2)
    left = moved / values.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, :]
    return (right, values, left.mT) if wide else (left, values, right.mT)
