"""Rule ``duplicate``: neurons whose pre-activations are proportional become one.

If z_j = t z_i on the domain with t > 0, then relu(z_j) = t relu(z_i), so j goes and i's outgoing weights become
w_i + t w_j. This holds for channels as well, under zero padding and through pools, because a positive factor commutes
with all of them. Up to a deviation: with abs(z_j - t z_i) <= gap on the domain and stored weights w' for w_i + t w_j,
the next layer changes by at most abs(w_j) gap + abs(w' - w_i - t w_j) max relu(z_i).

Pairs are found by the cosine of their coefficient vectors (weighted by the domain's radius); what is claimed is bounded
afterwards, in the working type with a priori error terms. Level: ``exact`` where the coefficients are proportional as
rationals, t is a float and no new weight rounds; else ``certified(eps)``. Related: Serra et al. 2021 (identical
neurons are the rank-one case of linear dependence), but here the neurons need not be stable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exactprune.compress.block import Block
from exactprune.compress.deviation import gamma, inflated
from exactprune.compress.exact import exact_product, exact_sum

_NEAR = 1e-6  # 1 - cosine of pairs that are looked at


@dataclass(frozen=True, eq=False)
class Twin:
    """Neuron ``gone`` is ``ratio`` times neuron ``kept``, up to ``gap`` on the domain (0: exactly, as rationals)."""

    kept: int
    gone: int
    ratio: float
    gap: float


def twins(block: Block, budget: float, spared: np.ndarray, sign: int = 1) -> Iterator[Twin]:
    """Pairs of proportional neurons; every neuron goes at most once, and one that something goes into stays.

    Args:
        block: the layer.
        budget: deviation of the network's output that is allowed (0: exact pairs only).
        spared: (k,) booleans, neurons to leave alone.
        sign: of the ratio; -1 for opposite neurons (``rules.opposite``).
    """
    near = _near(block, sign)
    near[spared] = near[:, spared] = False
    gone: set[int] = set()
    taken: set[int] = set()
    for i in np.flatnonzero(near.any(axis=1)).tolist():
        others = np.array([j for j in np.flatnonzero(near[i]).tolist() if j not in gone and j not in taken], int)
        for j in () if i in gone else _plausible(block, i, others, budget):
            found = _twin(block, i, j, sign)
            if found is not None and found.gap and i not in taken:
                back = _twin(block, j, i, sign)
                found = back if back is not None and not back.gap else found
            if found is not None:
                gone.add(found.gone)
                taken.add(found.kept)
                yield found
            if i in gone:
                break


def _near(block: Block, sign: int) -> np.ndarray:
    """Booleans (k, k), above the diagonal: coefficient vectors that point the same (or the opposite) way on D."""
    mid, rad = block.mid.astype(np.float64), block.rad.astype(np.float64)
    w_in = block.w_in.astype(np.float64)
    rows = np.concatenate([w_in * rad, (w_in @ mid + block.b_in)[:, None]], axis=1)
    size = np.linalg.norm(rows, axis=1)
    unit = np.divide(rows, size[:, None], out=np.zeros_like(rows), where=(size > 0)[:, None])
    return np.triu(sign * (unit @ unit.T) > 1 - _NEAR, 1)


def _plausible(block: Block, i: int, others: np.ndarray, budget: float) -> list[int]:
    """Those of some neurons that may be multiples of neuron i at this budget; a quick look that decides nothing."""
    w_in, rad = block.w_in.astype(np.float64), block.rad.astype(np.float64)
    pivot = int(np.abs(w_in[i] * rad).argmax())
    if not others.size or not w_in[i, pivot]:
        return others.tolist()
    ratio = (w_in[others, pivot] / w_in[i, pivot])[:, None]
    difference = np.abs(w_in[others] - ratio * w_in[i])
    same = (difference <= 1e-12 * np.abs(w_in[others])).all(axis=1)
    shift = w_in[others] @ block.mid + block.b_in[others] - ratio[:, 0] * (w_in[i] @ block.mid + block.b_in[i])
    weight = (np.abs(block.w_out[:, others]) * block.gain[block.owner, None]).max(axis=0)
    cost = (difference @ rad + np.abs(shift)) * weight
    return others[same | (cost <= budget)].tolist()


def _twin(block: Block, i: int, j: int, sign: int) -> Twin | None:
    a, b = np.append(block.w_in[i], block.b_in[i]), np.append(block.w_in[j], block.b_in[j])
    pivot = int(np.abs(a * np.append(block.rad, 1.0)).argmax())
    ratio = float(b[pivot]) / float(a[pivot]) if a[pivot] else 0.0
    if not (np.isfinite(ratio) and sign * ratio > 0):
        return None
    return Twin(i, j, ratio, 0.0 if _proportional(a, b, ratio) else _gap(block, i, j, ratio))


def _proportional(a: np.ndarray, b: np.ndarray, ratio: float) -> bool:
    """b = ratio a, exactly: every product is exact in float64 and equal (b is a float, so a product that rounds differs)."""
    product, exact = exact_product(a.astype(np.float64), np.full(len(a), ratio))
    return bool((exact & (product == b)).all())


def _gap(block: Block, i: int, j: int, ratio: float) -> float:
    """Sound bound on abs(z_j - ratio z_i) over the enclosure."""
    t = block.work(ratio)
    w_i, w_j = block.w_in[i].astype(block.work), block.w_in[j].astype(block.work)
    b_i, b_j = block.work(block.b_in[i]), block.work(block.b_in[j])
    difference = w_j - t * w_i
    size = (np.abs(w_j) + abs(t) * np.abs(w_i)) @ (np.abs(block.mid) + block.rad) + abs(b_j) + abs(t * b_i)
    value = abs(difference @ block.mid + (b_j - t * b_i)) + np.abs(difference) @ block.rad
    bound = value + 2 * gamma(2 * len(w_i) + 16, block.unit) * (size + value)
    return float(np.nextafter(np.float64(bound), np.inf))


def absorbed(block: Block, found: Sequence[Twin], reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """New outgoing weights (q, k), and a bound on the change at each output (m,).

    Args:
        block: the layer.
        found: twins to carry out.
        reach: (k,) upper bound of relu(z) of each neuron.
    """
    by_kept: dict[int, list[Twin]] = {}
    for twin in found:
        by_kept.setdefault(twin.kept, []).append(twin)
    stored, rows = block.w_out.copy(), np.zeros(len(block.w_out))
    for kept, gone in by_kept.items():
        stored[:, kept], change = taken_over(block, kept, gone, float(reach[kept]))
        rows = rows + change
    return stored, inflated(block.summed(rows), len(by_kept) + len(rows))


def taken_over(block: Block, kept: int, gone: Sequence[Twin], reach: float) -> tuple[np.ndarray, np.ndarray]:
    """The outgoing weights of a neuron with its twins' taken over, and a bound on the change of each row."""
    total = block.w_out[:, kept].astype(np.float64)
    exact, size, gaps = np.ones(len(total), bool), np.abs(total), np.zeros(len(total))
    for twin in gone:
        weight = block.w_out[:, twin.gone].astype(np.float64)
        part, fine = exact_product(weight, np.full(len(total), twin.ratio))
        total, also = exact_sum(total, part)
        exact &= fine & also
        size, gaps = size + np.abs(part), gaps + np.abs(weight) * twin.gap
    with np.errstate(over="ignore"):
        stored = total.astype(block.dtype)
    rounding = np.abs(stored.astype(np.float64) - total) + np.where(exact, 0.0, gamma(3 * len(gone) + 4) * size)
    return stored, inflated(rounding * reach + gaps, len(gone) + 4)
