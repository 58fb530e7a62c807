"""Which neuron of B does what a neuron of A does: partners for ``bounds.difference``, guessed from sampled points.

Both networks are run on random points of the box. Neurons that stem from each other have proportional pre-activations,
so for every unit j of a layer of B the unit i of a layer of A with the largest cosine is taken, with the least-squares
ratio r = <z_i, z_j> / <z_i, z_i> (1 where it is within a thousandth of it), if what is left, |z_j - r z_i|, is small next
to |z_j|. A unit of an image is a channel, all its places together. A layer of B is paired with the layer of A that has
partners for most of its units. This is a guess and may be: ``bounds.difference`` proves what follows for any partners.
"""

from __future__ import annotations

import numpy as np
import torch

from exactprune.bounds.difference import Partners
from exactprune.bounds.forward import Forward
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Shape

POINTS = 256
PLACES = 1 << 22  # numbers of one layer that are looked at
CLOSE = 0.3  # of |z_j|: what may be left over
ONE = 1e-3


def find_partners(a: Network, b: Network, box: Box, *, points: int = POINTS, seed: int = 0) -> dict[int, Partners]:
    """Partners for the layers of B that have some, by layer of B.

    Args:
        a, b: as many input values.
        box: where to sample.
        points: how many.
        seed: of the points.
    """
    rng = np.random.default_rng(seed)
    x = np.concatenate([box.sample(points - points // 2, rng), box.corners(points // 2, rng)]).reshape(points, -1)
    ours, theirs = _units(a, x), _units(b, x)
    shapes_a, shapes_b = _shapes(a), _shapes(b)
    found = {}
    for k, own in enumerate(theirs):
        tried = [_pair(i, z, own) for i, z in enumerate(ours) if _comparable(shapes_a[i], shapes_b[k])]
        best = max(tried, key=lambda p: int((p.source >= 0).sum()), default=None)
        if best is not None and (best.source >= 0).any():
            found[k] = best
    return found


def _shapes(network: Network) -> list[Shape]:
    return [network.shapes[i] for i in network.relus]


def _comparable(of: Shape, shape: Shape) -> bool:
    return len(of) == len(shape) and of[1:] == shape[1:] and len(of) in (1, 3)


def _units(network: Network, x: np.ndarray) -> list[np.ndarray]:
    """Pre-activations of every ReLU layer, (units, points x places), fewer points for large images."""
    found = []
    with torch.no_grad():
        for shape, z in zip(_shapes(network), Forward(network).preactivations(x), strict=True):
            rows = z.numpy()[: max(8, PLACES // max(1, z.shape[1]))]
            units = shape[0] if shape else 1
            found.append(rows.reshape(len(rows), units, -1).transpose(1, 0, 2).reshape(units, -1))
    return found


def _pair(layer: int, z: np.ndarray, own: np.ndarray) -> Partners:
    if not len(z):
        return Partners(layer, np.full(len(own), -1), np.ones(len(own)))
    with np.errstate(all="ignore"):  # what overflows has no partner
        return _nearest(layer, z, own)


def _nearest(layer: int, z: np.ndarray, own: np.ndarray) -> Partners:
    size, norm = (np.sqrt((t * t).sum(axis=1)) for t in (own, z))
    products = own @ z.T
    cosine = np.nan_to_num(products / (size[:, None] * norm), nan=-1.0, posinf=-1.0, neginf=-1.0)
    best = cosine.argmax(axis=1)
    ratio = products[np.arange(len(own)), best] / norm[best] ** 2
    ratio = np.where(np.abs(ratio - 1) <= ONE, 1.0, ratio)
    ratio = np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    left = np.sqrt(((own - ratio[:, None] * z[best]) ** 2).sum(axis=1))
    apart = np.divide(left, size, out=np.full(len(own), np.inf), where=size > 0)
    return Partners(layer, np.where(apart <= CLOSE, best, -1), ratio, apart)
