"""Rule ``merge`` (output side): k stably active neurons become r <= min(k, n, m) linear units.

What the next layer sees of the k neurons is the product P = W_out W_in (m x n), so r = rank P units are enough, however
many rows of W_in are independent (the row-dependence rule of Serra, Yu, Kumar and Ramalingam 2021, "Scaling Up Exact
Neural Network Compression by ReLU Stability", needs the rank of W_in itself). Numerical rank is never tested: the
units come from a singular value decomposition of G P diag(rad), with G the gains of the outputs and rad the radius of
what the neurons read (directions that do not vary on the domain cost nothing), are rounded to the network's dtype, and
the deviation of what is actually stored is certified (``compress.block``). Units beyond the spectrum's gap are spent
on the residual of the rounded ones, so precision can be bought with units.

Level: ``certified(eps)``, eps from the block's deviation, propagated to the output. Each unit stays stably active: its
bias is at least minus a sound lower bound of V x on the domain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, repeat

import numpy as np

from exactprune.compress.block import Block, Units, placed


def mergers(block: Block, budget: float, limit: int) -> Iterator[Units]:
    """Units for a block, by growing count, until ``limit``.

    First the leading directions of the product, as many as clearly stand out; then, one by one and later a few at a
    time, the leading directions of what the stored units leave, so that their rounding is made good along with the
    rest. Counts that cannot meet the budget whatever their rounding are skipped. Where numbers overflow the dtype or a
    decomposition does not converge, there are no more offers.
    """
    with suppress(np.linalg.LinAlgError):
        for v, u in _factors(block, budget, limit):
            if not (np.isfinite(v).all() and np.isfinite(u).all()):
                return
            yield placed(block, v, u)


def _factors(block: Block, budget: float, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(V, U) as stored, of one candidate after the other."""
    vectors, values = directions(block)
    least = int((values > budget * np.sqrt(len(block.w_out))).sum())
    floor = values[0] * 2.0**(4 - np.finfo(block.dtype).nmant) if values.size else 0.0
    certain = min(max(int((values > max(budget / 8, floor)).sum()), 1), limit)
    if least == 0:
        yield _nothing(block)
    for count in counts(max(least, 1), certain) if least <= certain else ():
        yield _stored(block, vectors[:count])
    yield from _corrected(block, vectors[:certain], least, limit)


def _corrected(block: Block, v: np.ndarray, least: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Add directions of the rest until ``limit``."""
    v, u = _stored(block, v)
    for step in chain([1] * 8, [2] * 8, repeat(16)):
        more = min(step, limit - len(v))
        if more <= 0 or not (np.isfinite(v).all() and np.isfinite(u).all()):
            return
        rest = np.asarray(block.product - u.astype(block.work) @ v.astype(block.work), np.float64)
        v, u = _stored(block, np.concatenate([v, leading(block, rest, more)]))
        if len(v) >= least:
            yield v, u


def _weights(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each row, (q, 1), and of each column, (n,)."""
    return np.maximum(block.gain, 1e-30)[block.owner, None], block.rad.astype(np.float64)


def directions(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Directions in x that the weighted product depends on, (at most k, n), with its singular values.

    Both factors are reduced by QR first, so that the decomposition is of a k x k matrix, whatever q and n are.
    """
    rows, columns = _weights(block)
    left = np.linalg.qr(np.asarray(block.w_out, np.float64) * rows, mode="r")
    basis, right = np.linalg.qr((np.asarray(block.w_in, np.float64) * columns).T)
    _, values, core = np.linalg.svd(left @ right.T, full_matrices=False)
    return _scaled(core @ basis.T, columns), values


def leading(block: Block, rest: np.ndarray, count: int, rounds: int = 6) -> np.ndarray:
    """About the first ``count`` directions, by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    rows, columns = _weights(block)
    weighted = rest * rows * columns
    basis = np.random.default_rng(0).standard_normal((len(columns), min(count + 8, len(columns))))
    for _ in range(rounds):
        basis = np.linalg.qr(weighted.T @ np.linalg.qr(weighted @ basis)[0])[0]
    _, _, right = np.linalg.svd(weighted @ basis, full_matrices=False)
    return _scaled((basis @ right.T).T[:count], columns)


def _scaled(right: np.ndarray, rad: np.ndarray) -> np.ndarray:
    """Rows with diag(rad) divided out, and a range of about 1 on the domain."""
    v = np.divide(right, rad, out=np.zeros_like(right), where=rad > max(1e-20 * rad.max(initial=0), 1e-200))
    return v / np.maximum(np.abs(v) @ rad, 1e-300)[:, None]


def _nothing(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """No unit; one that is 0 where the layer would be empty otherwise (the exact rules then leave a constant)."""
    r = int(block.linear)
    return np.zeros((r, block.w_in.shape[1]), block.dtype), np.zeros((len(block.w_out), r), block.dtype)


def _stored(block: Block, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V (r, n) and U (q, r) in the network's dtype, with U V close to the product; U fits V as it is stored."""
    v = _better_side(block, v.astype(block.dtype))
    rad = block.rad.astype(np.float64)
    target = np.asarray(block.product, np.float64) * rad
    with np.errstate(over="ignore"):
        u = np.linalg.lstsq((v * rad).T, target.T, rcond=None)[0].T.astype(block.dtype)
    return v, u


def _better_side(block: Block, v: np.ndarray) -> np.ndarray:
    """Turn units round where that needs the smaller constant: max V x below minus min V x."""
    mid, rad = block.mid.astype(np.float64), block.rad.astype(np.float64)
    wide = v.astype(np.float64)
    low, high = wide @ mid - np.abs(wide) @ rad, wide @ mid + np.abs(wide) @ rad
    return np.where((np.abs(high) < np.abs(low))[:, None], -v, v)


def counts(low: int, high: int) -> Iterator[int]:
    """Numbers of units to try: every one at first, then in growing steps."""
    step, units = 1, low
    while units < high:
        yield units
        units += step
        step = step if units < low + 8 else 2 * step
    yield high
