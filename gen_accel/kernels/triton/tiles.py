"""Tiles of tokens: cut from a block or a list of blocks, loaded, multiplied, masked, stored.

Tokens are addressed through the plan's slots. The blocks of a list are laid end to end and cut
into tiles, so that the lengths of blocks and tiles are independent.

Prefixes: i_ index of a program, block or place, o_ offsets, m_ masks, b_ tiles of values.
"""

# Kernels are a language of their own, which a checker of Python misreads.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))

# Sizes that change from clip to clip: one compiled kernel serves all.
SIZES = (
    *("pattern_b", "pattern_h", "route_b", "route_h", "gain_b", "gain_h"),
    *("entries", "H", "N", "S", "C"),
)

# The kinds of rule on token pairs.
NONE, WINDOWS, ROUTE, BITS = (tl.constexpr(kind) for kind in range(4))

WORD = tl.constexpr(32)  # pairs in a number of BITS


@triton.jit
def place_of_chunk(H, D: tl.constexpr, CHUNK: tl.constexpr):
    """Return the block, the chunk of columns, the sample and the head of a program."""
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    i_block, i_chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    return i_block, i_chunk, i_b, i_h


@triton.jit
def of_head(x, i_b, i_h):
    """Return the rows of one head: where they start, and how far apart they are.

    Args:
        x: (B, H, N, D) as `launch.rows` passes it.
    """
    start, stride_b, stride_h, stride_n = x
    return start + i_b * stride_b + i_h * stride_h, stride_n


@triton.jit
def own_tile(slots, i_block, i_tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Load slots and tokens of one tile of one block; token -1 for padding and past the block."""
    o_r = i_tile * TILE + tl.arange(0, TILE)
    o_s = i_block * BLOCK + tl.minimum(o_r, BLOCK - 1)
    return o_s, tl.where(o_r < BLOCK, tl.load(slots + o_s), -1)


INTERPRETED = tl.constexpr(not isinstance(own_tile, JITFunction))


@triton.jit
def dot(b_x, b_y, b_acc=None):
    """Compute x y + acc in fp32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def int8_dot(b_x, b_y):
    """Compute x y of int8 in int32."""
    return tl.dot(b_x, b_y, out_dtype=tl.int32)


@triton.jit
def half_dot(b_x, b_y):
    """Compute x y of fp16 with sums in fp16, which cards for games add twice as fast as in
    fp32."""
    return tl.dot(b_x, b_y, out_dtype=tl.float16)


@triton.jit
def mixed_dot(b_x, b_y, b_acc):
    """Compute x y + acc. TF32 where one is fp32: sums over many keys are beyond fp16's range."""
    if b_x.dtype == tl.float32 and b_y.dtype == tl.float32:
        return tl.dot(b_x, b_y, b_acc, input_precision="ieee")
    elif INTERPRETED or b_x.dtype != b_y.dtype:
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision="tf32")
    else:
        return tl.dot(b_x, b_y, b_acc)


@triton.jit
def dampened(b_s, b_gain, PACKED: tl.constexpr):
    """Multiply the positive scores by a gain, at most 1. Both forms give the same; each takes the
    fewest instructions in its loop, by compile_matrix."""
    if PACKED:
        return tl.minimum(b_s, b_s * b_gain)
    else:
        return tl.where(b_s > 0, b_s * b_gain, b_s)


@triton.jit
def listed_blocks(index, counts, i_pattern, i_turn, K, entries, BLOCK: tl.constexpr):
    """Load the block of a turn, out of the K of a pattern, its list, and the number of places that
    need a mask and of all places in the list, in slots of the listed blocks."""
    counts += i_pattern * K * 4
    i_block = tl.load(counts + 4 * i_turn + 3)
    counts += 4 * i_block
    index += i_pattern * entries + tl.load(counts + 2)
    return i_block, index, tl.load(counts) * BLOCK, tl.load(counts + 1) * BLOCK


@triton.jit
def listed_tile(index, slots, i_p, stop, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Load slots and tokens of a tile that starts at place i_p of the listed blocks, laid end to
    end.

    Token -1 for padding and from place `stop` on. A tile past the end is read, never used.
    """
    if BLOCK % TILE == 0:
        i_p = tl.maximum(tl.minimum(i_p, stop - TILE), 0)
        o_s = tl.load(index + i_p // BLOCK) * BLOCK + i_p % BLOCK + tl.arange(0, TILE)
        o_t = tl.load(slots + o_s)
    else:
        o_p = i_p + tl.arange(0, TILE)
        o_in = tl.maximum(tl.minimum(o_p, stop - 1), 0)
        o_s = tl.load(index + o_in // BLOCK) * BLOCK + o_in % BLOCK
        o_t = tl.where(o_p < stop, tl.load(slots + o_s), -1)
    return o_s, o_t


@triton.jit
def load_rows(x, o_t, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr):
    """Load [tile, BLOCK_D] rows of tokens o_t; zeros for token -1, which only a PADDED tile
    holds. x is as `of_head` returns it, here and below."""
    start, stride = x
    o_d = tl.arange(0, BLOCK_D)
    p_x = start + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    if PADDED and D < BLOCK_D:
        return tl.load(p_x, mask=(o_t >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    elif PADDED:
        return tl.load(p_x, mask=(o_t >= 0)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def one_row(x, i_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a row of a contiguous (rows, D), [BLOCK_D]; zeros past D."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(x + i_row * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_rows(x, o_t, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_columns(x, o_t, tl.arange(0, BLOCK_D), b_x, D)


@triton.jit
def load_columns(x, o_t, o_d, D: tl.constexpr):
    """Load [len(o_t), len(o_d)] of tokens, zeros for token -1 and past D."""
    start, stride = x
    p_x = start + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_x, mask=(o_t >= 0)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def matrix(x, o_r, o_c, D: tl.constexpr):
    """Load [len(o_r), len(o_c)] of a matrix (D, D); zeros past D."""
    mask = (o_r < D)[:, None] & (o_c < D)[None, :]
    return tl.load(x + o_r[:, None] * D + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(x, o_t, o_d, b_x, D: tl.constexpr):
    start, stride = x
    p_x = start + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = (o_t >= 0)[:, None] & (o_d < D)[None, :]
    tl.store(p_x, b_x.to(start.dtype.element_ty), mask=mask)


@triton.jit
def obey(b_s, o_q, o_k, o_block, rule, more, S, C, RULE: tl.constexpr, AXES: tl.constexpr):
    """Set scores to -inf where the rule hides a key.

    o_q and o_k have the two axes of the scores, one of them of size 1. o_block is the key block: a
    scalar for all keys, or one for each, like o_k.
    """
    if RULE == ROUTE:
        o_c = tl.load(more + o_block)
        m_s = tl.load(rule + o_q.to(tl.int64) * C + o_c) != 0
        b_s = tl.where(m_s, b_s, -float("inf"))
    if RULE == WINDOWS:
        m_k = tl.load(more + o_k) != 0
        # The first axis is compared twice, to start from a mask in the shape of the scores.
        m_s = tl.load(rule + o_q) <= tl.load(rule + 2 * AXES * S + o_k)
        for a in tl.static_range(AXES):
            b_place = tl.load(rule + (2 * AXES + a) * S + o_k)
            m_s &= tl.load(rule + a * S + o_q) <= b_place
            m_s &= b_place <= tl.load(rule + (AXES + a) * S + o_q)
        b_s = tl.where(m_s | m_k, b_s, -float("inf"))
    return b_s


@triton.jit
def own_bits(words, first, i_own, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """Pointer to the bits of the first pair of blocks of a list.

    Args:
        words: int32, (LISTED / WORD, BLOCK) words for each pair that needs a mask: a row of the
            own block has a bit for each row of the listed block.
        first: int32, the first pair of each list.
    """
    return words + tl.load(first + i_own).to(tl.int64) * (BLOCK * LISTED // WORD)


@triton.jit
def own_list(
    index,
    counts,
    rule,
    more,
    gain,
    i_pattern,
    i_route,
    i_gain,
    entries,
    S,
    C,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLACES: tl.constexpr,
    TILES: tl.constexpr,
    RULE: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Find the query block of this program, TILES programs to a block: its number, its list with
    the places that need a mask and all places, and the rule and the gain of its row."""
    K = S // BLOCK_Q
    i_turn = tl.program_id(0) // TILES
    i_block, index, masked, total = listed_blocks(
        index, counts, i_pattern, i_turn, K, entries, PLACES
    )
    if RULE == BITS:
        rule = own_bits(rule, more, i_pattern * K + i_block, BLOCK_Q, BLOCK_K)
    else:
        rule += i_route * S * C
    if GAIN:
        gain += (i_gain * K + i_block) * (S // BLOCK_K)
    return i_block, index, masked, total, rule, gain


@triton.jit
def listed_words(
    words, o_r, i_p, stop, BLOCK: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr
):
    """Load for each pair the word that holds its bit, [rows, TILE] int32, see `obey_bits`.

    o_r are the rows' places in the own block of length BLOCK. The columns are a tile of the listed
    blocks of length LISTED from place i_p on.
    """
    o_c = tl.arange(0, TILE)
    if LISTED % TILE == 0:
        p_w = words + i_p // WORD * BLOCK + o_r
        b_w = tl.load(p_w)[:, None]
        for i in tl.static_range(1, TILE // WORD):
            b_next = tl.load(p_w + i * BLOCK)[:, None]
            b_w = tl.where((o_c < i * WORD)[None, :], b_w, b_next)
        if TILE < WORD:  # half a word: the smallest tile
            b_w = b_w >> (i_p // TILE % 2 * TILE)
    else:
        o_in = tl.minimum(i_p + o_c, stop - 1)
        b_w = tl.load(words + (o_in // WORD * BLOCK)[None, :] + o_r[:, None])
    return b_w


@triton.jit
def obey_bits(b_s, b_w, i_p, stop, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Set scores to -inf where the bit of a pair is 0 and from place `stop` on."""
    o_c = tl.arange(0, TILE)
    if LISTED % TILE == 0:
        m_s = (b_w & (1 << o_c % WORD)[None, :]) != 0
    else:
        o_p = i_p + o_c
        m_s = ((b_w & (1 << o_p % WORD)[None, :]) != 0) & (o_p < stop)[None, :]
    return tl.where(m_s, b_s, -float("inf"))


@triton.jit
def listed_block(index, o_s, i_p, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Load the block of the tile at place i_p if there is one, else each column's."""
    if BLOCK % TILE == 0:
        return tl.load(index + i_p // BLOCK)
    else:
        return o_s[None, :] // BLOCK


@triton.jit
def listed_load(index, i_p, BLOCK: tl.constexpr, LOAD: tl.constexpr):
    """Return the block and the first slot of the i_p-th load of the listed blocks, laid end to
    end; LOAD divides BLOCK."""
    i_block = tl.load(index + i_p // (BLOCK // LOAD))
    return i_block, i_block * BLOCK + i_p % (BLOCK // LOAD) * LOAD


@triton.jit
def packed_tile(x, i_b, i_h, i_s, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [TILE, BLOCK_D] rows of one head from slot i_s on, by a descriptor of (B, H, S, D);
    zeros past D."""
    return x.load([i_b.to(tl.int32), i_h.to(tl.int32), i_s, 0]).reshape(TILE, BLOCK_D)


@triton.jit
def block_mean(x, slots, i_block, o_d, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Compute columns o_d of the mean of a block's tokens, fp32, and their number, at least 1."""
    b_sum = tl.zeros([o_d.shape[0]], tl.float32)
    b_held = tl.full((), 0, tl.int32)
    for i_tile in range((BLOCK + TILE - 1) // TILE):
        _, o_t = own_tile(slots, i_block, i_tile, BLOCK, TILE)
        b_sum += tl.sum(load_columns(x, o_t, o_d, D).to(tl.float32), 0)
        b_held += tl.sum((o_t >= 0).to(tl.int32), 0)
    b_held = tl.maximum(b_held, 1).to(tl.float32)
    return b_sum / b_held, b_held


@triton.jit
def off_mean(x, o_t, o_d, b_mean, D: tl.constexpr):
    """Offsets of tokens o_t from the mean of their block, [len(o_t), len(o_d)] fp32; 0 for token
    -1."""
    b_x = load_columns(x, o_t, o_d, D).to(tl.float32)
    return tl.where((o_t >= 0)[:, None], b_x - b_mean[None, :], 0.0)
