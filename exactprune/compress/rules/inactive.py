"""Rule ``inactive``: a stably inactive neuron is 0 on the domain and goes.

Applies: the verdict is *inactive* (z_hat <= 0 on D), so relu(z_hat) = 0 there and nothing that reads it changes when
it is left out. A channel goes only when it is inactive at every position. Level: ``exact``, deviation 0. Verdicts
*unknown* never apply.
"""

from __future__ import annotations

import numpy as np

from exactprune.claim import LayerVerdict, Status


def inactive_units(verdict: LayerVerdict, axis: int) -> np.ndarray:
    """Booleans: units (slices along ``axis`` of the layer's shape) all of whose neurons are stably inactive."""
    mask = (verdict.status == Status.INACTIVE).reshape(verdict.shape)
    return np.moveaxis(mask, axis, 0).reshape(verdict.shape[axis], -1).all(axis=1)
