// What attention.cpp and bytes.h share: a call, its blocks in tiles, its queries in pieces, and
// what hides a key from a query.
//
// Letters as in plan.py; a "piece" is a run of slots of one block.

#pragma once

#include "common.h"

namespace {

constexpr i64 ROWS = 256;     // queries of a piece
constexpr float TINY = 1e-20f;  // a scale below takes LOW too near to 0
constexpr i64 ROUTED = 1024;  // queries that are looked through at once for those of a group
static_assert(ROUTED <= 1 << 16 && ROWS <= ROUTED, "rows of a piece are numbered by 16 bits");

struct Args {
  const void *q, *k, *v, *out, *grad;
  void *o, *dq, *dk, *dv;
  float* stats;         // (2, B, H, N): highest score, one over the sum of weights
  float* lse;           // (B, H, N), the logarithm of that sum and more; null where nobody asks
  const float* of_lse;  // its gradient, null where it has none
  i64 q_strides[3], k_strides[3], v_strides[3], grad_strides[3];
  const i64* slots;     // (S,), -1 for padding; null where slot = token
  const Block* index;   // (PB, PH, Kq, most)
  const i64* counts;    // (2, PB, PH, Kq): key blocks in all, and those that need a mask
  const float* slack;   // (S,)
  const float *center, *half, *place;  // (axes, S)
  const bool* picks;    // (RB, RH, S, C), whether a query sees a group; null without a route
  const i64* group;     // (Kk,)
  const float* gain;    // (GB, GH, Kq, Kk)
  i64 B, H, N, D, S, block_q, block_k, PB, PH, most, axes, RB, RH, C, GB, GH;
  i64 wide;             // o and out are fp32
  float scale;
};

// What both passes know of a call.
template <typename In, typename T>
struct Problem {
  const Args& a;
  i64 Kq, Kk, D, bk, BH;
  Tokens<In> q, k, v, grad;
  i64 Dp;   // D to whole pairs
  i64 bkp;  // slots of a laid out block
  // Scores are products as they are, which a weight scales in its exponent, where nothing is
  // rounded off; or scaled before. And what a difference of scores is by log2(e).
  bool raw;
  float by;
  bool together;  // blocks that are small or fill their lanes badly, side by side in a product
  std::vector<std::vector<Block>> members;  // key blocks of each group
  std::vector<char> padded;               // key blocks with padding

  explicit Problem(const Args& args)
      : a(args), Kq(a.S / a.block_q), Kk(a.S / a.block_k), D(a.D), bk(a.block_k), BH(a.B * a.H),
        q{a.q, a.q_strides, a.slots, a.H, a.D}, k{a.k, a.k_strides, a.slots, a.H, a.D},
        v{a.v, a.v_strides, a.slots, a.H, a.D}, grad{a.grad, a.grad_strides, a.slots, a.H, a.D},
        Dp(up(a.D, PAIR<T>)), bkp(up(a.block_k, LANES)),
        raw(!a.gain && a.scale > TINY), by(raw ? a.scale * LOG2E : LOG2E),
        together(bk < 64 || (bk <= 128 && 10 * bkp > 11 * bk)) {
    check_slots(a.slots, a.S, a.N);
    if (!a.picks) return;
    members.resize(a.C);
    padded.resize(Kk);
    for (i64 b = 0; b < Kk; b++) {
      check_within(a.group[b], 0, a.C, "the group of a key block");
      members[a.group[b]].push_back(static_cast<Block>(b));
      for (i64 s = 0; s < bk; s++) padded[b] |= a.slack[b * bk + s] < 0;
    }
  }

  i64 token(i64 slot) const { return a.slots ? a.slots[slot] : slot; }

  // A token as Dp numbers.
  void row(const Tokens<In>& x, i64 bh, i64 token, T* to) const { x.one(bh, token, to, Dp); }

  // Those of some slots; zeros for padding.
  void rows(const Tokens<In>& x, i64 bh, i64 slot, i64 count, T* to) const {
    x.read(bh, slot, count, to, Dp);
  }

  const i64* counts(i64 bh, i64 block, i64* masked) const {
    i64 pattern = pattern_of(bh, a.H, a.PB, a.PH) * Kq + block;
    *masked = a.counts[a.PB * a.PH * Kq + pattern];
    check_within(a.counts[pattern], 0, a.most + 1, "a count of key blocks");
    return a.counts + pattern;
  }
  const Block* blocks(i64 bh, i64 block) const {
    return a.index + (pattern_of(bh, a.H, a.PB, a.PH) * Kq + block) * a.most;
  }
  const float* gains(i64 bh, i64 block) const {
    return a.gain ? a.gain + (pattern_of(bh, a.H, a.GB, a.GH) * Kq + block) * Kk : nullptr;
  }
  const bool* picks(i64 bh) const { return a.picks + pattern_of(bh, a.H, a.RB, a.RH) * a.S * a.C; }
};

// Part of a key block in a tile.
struct Part {
  i64 block, first, count, column;
  bool masked;
};

// Cuts key blocks into tiles of at most `most` columns, each part at a multiple of `step`.
template <typename F>
void tiles(const Block* blocks, i64 total, i64 masked, const char* padded, i64 Kk, i64 bk, i64 step,
           i64 most, F&& run) {
  std::vector<Part> parts;
  i64 width = 0;
  for (i64 n = 0; n < total; n++) {
    i64 block = blocks[n];
    check_within(block, 0, Kk, "a key block");
    for (i64 first = 0; first < bk; first += most) {
      i64 count = std::min(most, bk - first), room = up(count, step);
      if (width + room > most) {
        run(parts, width);
        parts.clear();
        width = 0;
      }
      parts.push_back({block, first, count, width, padded ? bool(padded[block]) : n < masked});
      width += room;
    }
  }
  if (width) run(parts, width);
}

// Whether a query does not see a key, for each of `count` slots in a row from `slot`; the other
// side is one slot, `fixed`, and is the query where `fixed_query`.
inline void hide(const Args& a, i64 fixed, bool fixed_query, i64 slot, i64 count, float* excess) {
  if (fixed_query) {
    const float* slack = a.slack + slot;
    if (!a.axes) {
      for (i64 j = 0; j < count; j++) excess[j] = -slack[j];
      return;
    }
    for (i64 x = 0; x < a.axes; x++) {
      const float* place = a.place + x * a.S + slot;
      float center = a.center[x * a.S + fixed], half = a.half[x * a.S + fixed];
#pragma omp simd
      for (i64 j = 0; j < count; j++) {
        float e = std::fabs(place[j] - center) - half;
        excess[j] = x && excess[j] > e ? excess[j] : e;
      }
    }
#pragma omp simd
    for (i64 j = 0; j < count; j++) excess[j] -= slack[j];
    return;
  }
  float slack = a.slack[fixed];
  if (!a.axes) {
    std::fill(excess, excess + count, -slack);
    return;
  }
  for (i64 x = 0; x < a.axes; x++) {
    const float *center = a.center + x * a.S + slot, *half = a.half + x * a.S + slot;
    float place = a.place[x * a.S + fixed];
#pragma omp simd
    for (i64 j = 0; j < count; j++) {
      float e = std::fabs(place - center[j]) - half[j];
      excess[j] = x && excess[j] > e ? excess[j] : e;
    }
  }
#pragma omp simd
  for (i64 j = 0; j < count; j++) excess[j] -= slack;
}

// Scales scores and dampens them by a gain.
inline void dampen(float* s, i64 count, float scale, float gain) {
#pragma omp simd
  for (i64 j = 0; j < count; j++) {
    float x = s[j] * scale;
    s[j] = x > 0.f ? x * gain : x;
  }
}

// Hides the scores that are above 0 in `excess`.
inline void conceal(float* s, i64 count, const float* excess) {
#pragma omp simd
  for (i64 j = 0; j < count; j++) s[j] = excess[j] > 0.f ? LOW : s[j];
}

// Writes the answer to query t of head bh, and its log-sum-exp where that is asked for.
template <typename In>
void answer(const Args& a, i64 bh, i64 t, const float* o, float high, float sum) {
  i64 at = bh * a.N + t;
  if (a.wide) store(static_cast<float*>(a.o) + at * a.D, o, a.D);
  else store(static_cast<In*>(a.o) + at * a.D, o, a.D);
  if (a.lse) a.lse[at] = sum == 0.f ? -INFINITY : (high + std::log2(sum)) / LOG2E;
}

// Calls `f` with the place of each of n bytes that is not 0.
template <typename F>
void each_set(const void* bytes, i64 n, F&& f) {
  for (i64 at = 0; at < n; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, static_cast<const char*>(bytes) + at, std::min<i64>(8, n - at));
    while (word) {
      i64 byte = __builtin_ctzll(word) / 8;
      f(at + byte);
      word &= ~(uint64_t(0xff) << 8 * byte);
    }
  }
}

// Which of some queries see each group, found in one pass over their picks.
class Seeing {
 public:
  Seeing(i64 C, i64 most) : most_(most), rows_(C * most), found_(C) {}

  void look(const bool* picks, i64 count) {
    i64 C = found_.size();
    std::fill(found_.begin(), found_.end(), 0);
    for (i64 i = 0; i < count; i++, picks += C)
      each_set(picks, C, [&](i64 c) { rows_[c * most_ + found_[c]++] = i; });
  }

  i64 found(i64 group) const { return found_[group]; }
  const uint16_t* rows(i64 group) const { return rows_.data() + group * most_; }

 private:
  i64 most_;
  std::vector<uint16_t> rows_;
  std::vector<i64> found_;
};

// Of each head's queries, the pieces that are worked on at once.
struct Pieces {
  i64 block, cuts, length, per_head;

  template <typename P>
  Pieces(const P& p, i64 rows) : block(p.a.picks ? p.a.S : p.a.block_q) {
    cuts = (block + rows - 1) / rows;
    length = (block + cuts - 1) / cuts;
    per_head = p.a.S / block * cuts;
  }

  // Calls `work(slot, count)` with piece n, if there is anything in it.
  template <typename F>
  void with(i64 n, F&& work) const {
    i64 base = n / cuts * block, first = base + n % cuts * length;
    i64 count = std::min(length, base + block - first);
    if (count > 0) work(first, count);
  }
};

}  // namespace
