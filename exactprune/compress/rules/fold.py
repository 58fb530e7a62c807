"""Rule ``fold``: a layer all of whose neurons are stably active is an affine map and disappears into the next one.

Then relu(W_1 x + b_1) = W_1 x + b_1 on the domain, and the layer after sees W_2 W_1 x + (W_2 b_1 + b_2): one affine
map with m n weights where there were k (n + m). Level: ``certified(eps)``, eps from rounding the product to the
network's dtype (``exact`` when nothing rounds). Taken when it leaves fewer parameters than r linear units
(``rules.merge``), which need r (n + m).
"""

from __future__ import annotations

import numpy as np

from exactprune.compress.block import Block, Units, placed


def folded(block: Block) -> Units:
    """The product as stored weights: V is W_out W_in rounded, U the identity (exact, and not stored)."""
    with np.errstate(over="ignore"):
        stored = block.product.astype(block.dtype)
    return placed(block, stored, np.eye(len(stored), dtype=block.dtype), tune=False)
