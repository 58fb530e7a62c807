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

import numpy as np

from exactprune.compress.block import Block, Units, placed


def spectrum(block: Block) -> np.ndarray:
    """Singular values of the weighted product."""
    return np.linalg.svd(_weighted(block, _product(block)), compute_uv=False)


def _product(block: Block) -> np.ndarray:
    return np.asarray(block.w_out, np.float64) @ np.asarray(block.w_in, np.float64)


def _rows(block: Block) -> np.ndarray:
    """Weight of each row, (q, 1)."""
    return np.maximum(block.gain, 1e-30)[block.owner, None]


def _weighted(block: Block, product: np.ndarray) -> np.ndarray:
    return product * _rows(block) * block.rad.astype(np.float64)


def merged(block: Block, units: int, certain: int) -> Units:
    """``units`` units for a block: at most ``certain`` for the product, the others for what their rounding left."""
    if not units:
        return placed(block, *_nothing(block))
    base = min(units, certain)
    v, u = _factors(block, _product(block), base)
    if units > base:
        wide_u, wide_v = u.astype(block.work), v.astype(block.work)
        rest = block.w_out.astype(block.work) @ block.w_in.astype(block.work) - wide_u @ wide_v
        more_v, more_u = _factors(block, np.asarray(rest, np.float64), units - base)
        v, u = np.concatenate([v, more_v]), np.concatenate([u, more_u], axis=1)
    return placed(block, v, u)


def _nothing(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """No unit; one that is 0 where the layer would be empty otherwise (the exact rules then leave a constant)."""
    r = int(block.linear)
    return np.zeros((r, block.w_in.shape[1]), block.dtype), np.zeros((len(block.w_out), r), block.dtype)


def _factors(block: Block, product: np.ndarray, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded V (r, n) and U (q, r) with U V close to a product; every row of V has range about 1 on the domain."""
    rad = block.rad.astype(np.float64)
    _, _, right = np.linalg.svd(_weighted(block, product), full_matrices=False)
    v = np.divide(right[:units], rad, out=np.zeros_like(right[:units]), where=rad > 1e-20 * rad.max(initial=0))
    v = v / np.maximum(np.abs(v) @ rad, 1e-300)[:, None] if units else v
    stored = _better_side(block, v.astype(block.dtype))
    return stored, _refitted(product * rad, stored * rad, units).astype(block.dtype)


def _better_side(block: Block, v: np.ndarray) -> np.ndarray:
    """Turn units round where that needs the smaller constant: max V x below minus min V x."""
    mid, rad = block.mid.astype(np.float64), block.rad.astype(np.float64)
    wide = v.astype(np.float64)
    low, high = wide @ mid - np.abs(wide) @ rad, wide @ mid + np.abs(wide) @ rad
    return np.where((np.abs(high) < np.abs(low))[:, None], -v, v)


def _refitted(product: np.ndarray, v: np.ndarray, units: int) -> np.ndarray:
    """U that fits the product best, given V as it is stored (least squares)."""
    if not units:
        return np.zeros((len(product), 0))
    return np.linalg.lstsq(v.T, product.T, rcond=None)[0].T


def counts(low: int, high: int) -> Iterator[int]:
    """Numbers of units to try: every one at first, then in growing steps."""
    step, units = 1, low
    while units < high:
        yield units
        units += step
        step = step if units < low + 8 else 2 * step
    yield high
