"""Transposed convolutions of many images at once without gathering a window.

Images lie (height, width, channels, images): what a kernel's row reads at one place, all its taps in x with all their channels,
is one contiguous matrix (taps * channels, images), and the one at the next place starts ``channels * images`` later. So the
windows of a whole row of places are a strided batch of overlapping matrices over the image as it lies, and a kernel's row is one
batched GEMM, added onto the row of the output (im2col without the copy; compare Cho and Brand, "MEC: memory-efficient
convolution for deep neural network", ICML 2017). With stride s the s places of a block are rows of the same GEMM (polyphase
form), and kernel rows that a place does not see are left out. Only the sides of an image need zeros; they are part of the buffer
(``ColumnConv.empty``).

Every output is a sum of the products of a dot product in some order, so gamma_n |a|.|b| bounds its rounding as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from exactprune.bounds.linear_maps import ConvMap


@dataclass(frozen=True, eq=False)
class ColumnConv:
    """A transposed convolution, ready for images that lie (height, width, channels, images).

    Attributes:
        shape: (height, width, channels) of what goes in.
        sides: columns of zeros left and right of it in the buffer.
        first: the buffer's column where the first block's window begins.
        stride: places of a block.
        blocks: blocks of places in a row of what comes out.
        cut: places to leave off the first block.
        into: (height, width, channels) of what comes out.
        steps: row coming out -> (row going in, matrix (blocks, places of a block * channels, taps * channels)), the same for
            each block.
    """

    shape: tuple[int, int, int]
    sides: tuple[int, int]
    first: int
    stride: int
    blocks: int
    cut: int
    into: tuple[int, int, int]
    steps: tuple[tuple[tuple[int, Tensor], ...], ...]

    @cached_property
    def products(self) -> int:
        """Multiplications an image."""
        return sum(m.numel() for row in self.steps for _, m in row)

    def empty(self, like: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """(buffer, the part of it to be filled); the rest is 0."""
        (height, width, channels), (left, right) = self.shape, self.sides
        buffer = like.new_empty(height, left + width + right, channels, images)
        if left:
            buffer[:, :left].zero_()
        if right:
            buffer[:, left + width :].zero_()
        return buffer, buffer[:, left : left + width] if left or right else buffer

    def __call__(self, buffer: Tensor) -> Tensor:
        """The product, (height, width, channels, images); ``buffer`` is one from ``empty``, filled."""
        images, span = buffer.shape[-1], buffer.shape[2] * buffer.shape[3]
        (height, width, channels), stride = self.into, self.stride
        out = buffer.new_empty(height, self.blocks, stride * channels, images)
        line, begin = buffer.stride(0), buffer.storage_offset() + self.first * span
        for y, steps in enumerate(self.steps):
            row, fresh = out[y], True
            for source, matrix in steps:
                windows = buffer.as_strided((self.blocks, matrix.shape[2], images), (span, images, 1), begin + source * line)
                row.baddbmm_(matrix, windows, beta=0 if fresh else 1)
                fresh = False
            if fresh:
                row.zero_()
        out = out.view(height, self.blocks * stride, channels, images)
        return out if out.shape[1] == width else out[:, self.cut : self.cut + width].contiguous()


def column_conv(mapping: ConvMap) -> ColumnConv:
    """The transposed map of a convolution that gathers."""
    channels, height, width = mapping.shape_out
    (y0, _, cut_y), (x0, x1, cut_x) = mapping.blocks(0), mapping.blocks(1)
    stride_y, (taps_y, taps_x) = mapping.stride[0], mapping.taps
    left = taps_x - 1 - x0
    sides = (max(left, 0), max(x1 - width, 0))
    into = (mapping.shape_in[1], mapping.shape_in[2], mapping.shape_in[0])
    steps = []
    for y in range(into[0]):
        block, phase = divmod(y + cut_y, stride_y)
        rows = ((block + tap + y0 - taps_y + 1, mapping.kernel_row(tap, phase)) for tap in range(taps_y))
        steps.append(tuple((source, m.expand(x1 - x0, -1, -1)) for source, m in rows if m is not None and 0 <= source < height))
    return ColumnConv((height, width, channels), sides, sides[0] - left, mapping.stride[1], x1 - x0, cut_x, into, tuple(steps))
