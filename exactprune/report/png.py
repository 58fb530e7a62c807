"""Pictures of inputs as PNG files in a data URI (W3C PNG, 2nd edition): 8 bits, grey or RGB, one filter-free scan line a row."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def data_uri(values: np.ndarray, low: float = 0.0, high: float = 1.0) -> str:
    """An image as ``data:image/png;base64,...``.

    Args:
        values: (height, width), or (channels, height, width) with 1 or 3 channels.
        low, high: what is black and what is white (full); beyond is cut off.
    """
    pixels = np.asarray(values, np.float64)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    span = high - low if high > low else 1.0
    grey = np.clip(np.nan_to_num((pixels - low) / span), 0.0, 1.0)
    return "data:image/png;base64," + base64.b64encode(_png(np.rint(255 * grey).astype(np.uint8))).decode()


def _png(pixels: np.ndarray) -> bytes:
    """(channels, height, width) of bytes as a file."""
    channels, height, width = pixels.shape
    rows = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
