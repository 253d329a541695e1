"""What the kernels of `packed_attention` share: whose tile a program has, and how it is read.

Nothing here is launched by itself.
"""

import triton
import triton.language as tl


@triton.jit
def _place(cu_seqlens, heads, blocks):
    """(head, block, first token of the segment, its length) of this program."""
    program = tl.program_id(0)
    s = program // heads // blocks
    begin = tl.load(cu_seqlens + s)
    length = tl.load(cu_seqlens + s + 1) - begin
    return program % heads, program // heads % blocks, begin.to(tl.int64), length


@triton.jit
def _tile(x, token_stride, begin, row, there, head_dim, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, WIDTH] of one head; 0 where there is nothing."""
    d = tl.arange(0, WIDTH)
    at = x + (begin + row)[:, None] * token_stride + d[None, :]
    tile = tl.load(at, mask=there[:, None] & (d < head_dim)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _put(x, token_stride, begin, row, there, head_dim, tile, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    at = x + (begin + row)[:, None] * token_stride + d[None, :]
    tl.store(at, tile, mask=there[:, None] & (d < head_dim)[None, :])


@triton.jit
def _sees(query, key, length, window, WINDOWED: tl.constexpr):
    """Whether a query sees a key; of any shapes that broadcast."""
    seen = (key <= query) & (query < length)
    if WINDOWED:
        seen = seen & (query - key < window)
    return seen
