"""Greedy OBS on many rows at once, each with an inverse Hessian of its own.

Every row is brought to zero weight by weight, the cheapest next:

    q = argmin w_q^2 / [H^-1]_qq,   w <- w - w_q / [H^-1]_qq (H^-1)_:q,   H^-1 <- H^-1 - u u^T,   u = (H^-1)_:q / [H^-1]_qq^(1/2).

Rank-one updates are collected for ``PANEL`` steps and carried out as one matrix product (the delayed updates of a blocked
factorisation): meanwhile (H^-1)_q: is the stored row less u_q u^T of the collected steps, and the diagonal is kept current.
After t steps the weights are the joint minimiser under "the first t of the order are zero", so only the order and the errors
are recorded here; ``settle`` computes the weights of any length afterwards, by one Cholesky solve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 32
WORKSPACE = 2**26  # bytes of inverse Hessians that are worked on at once
TINY = 2.0**-50  # a pivot below this share of its first value is rounding


class Trace(NamedTuple):
    """The greedy order of every row.

    Attributes:
        order: column removed at step t, shape (rows, K).
        errors: w_q^2 / (2 [H^-1]_qq) at that step, shape (rows, K).
    """

    order: Tensor
    errors: Tensor


def rows_at_once(columns: int) -> int:
    """How many rows of ``columns`` weights a call of ``sweep`` should get."""
    return max(1, WORKSPACE // (8 * columns * columns))


def sweep(weight: Tensor, inverses: Tensor) -> Trace:
    """Greedy deletion to the end.

    Args:
        weight: (rows, K).
        inverses: H^-1, (rows, K, K), overwritten.
    """
    w, (rows, columns), every = weight.clone(), weight.shape, torch.arange(len(weight), device=weight.device)
    diagonal = inverses.diagonal(dim1=1, dim2=2).clone()
    least = TINY * diagonal
    panel = w.new_zeros(rows, PANEL, columns)
    cost = torch.empty_like(w)
    order, errors = torch.zeros(rows, columns, dtype=torch.long, device=w.device), torch.zeros_like(w)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for step in range(columns):
        used = step % PANEL
        if step and used == 0:
            inverses.baddbmm_(panel.mT, panel, alpha=-1)
        torch.div(w.square(), diagonal, out=cost).masked_fill_(gone, torch.inf)
        q = cost.argmin(1)
        order[:, step], errors[:, step] = q, cost[every, q] / 2
        row = inverses[every, q]
        if used:
            row -= torch.bmm(panel[every, :used, q].unsqueeze(1), panel[:, :used])[:, 0]
        pivot = diagonal[every, q]
        w -= row * (w[every, q] / pivot)[:, None]
        panel[:, used] = row / pivot.sqrt()[:, None]
        diagonal = torch.maximum(diagonal - panel[:, used].square(), least)
        gone[every, q] = True
        w[every, q] = 0
    return Trace(order, errors)


def settle(weight: Tensor, hessian: Tensor, going: Tensor) -> Tensor:
    """The minimiser of (v - w)^T H (v - w) with v = 0 where ``going``, for one row, shape (K,).

    With K what stays and P what goes, v_K = w_K + H_KK^-1 H_KP w_P.
    """
    stay = ~going
    moved = weight * stay
    if bool(going.any()) and bool(stay.any()):
        factor = torch.linalg.cholesky(hessian[stay][:, stay])
        moved[stay] += torch.cholesky_solve((hessian[stay][:, going] @ weight[going])[:, None], factor)[:, 0]
    return moved
