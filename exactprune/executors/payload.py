"""Shared payloads in workers: each is unpickled once per process and found again by the hash of its bytes."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

KEPT = 2
_loaded: OrderedDict[str, Any] = OrderedDict()


def pack(shared: Any) -> tuple[str, bytes]:
    """(key, bytes) of a payload; equal bytes have equal keys."""
    data = pickle.dumps(shared, protocol=5)
    return hashlib.sha256(data).hexdigest()[:32], data


def unpack(key: str, read: Callable[[], bytes]) -> Any:
    """The payload of ``key`` in this process; ``read`` fetches its bytes the first time."""
    if key not in _loaded:
        _loaded[key] = pickle.loads(read())
        while len(_loaded) > KEPT:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]
