// Attention of a few queries to key blocks by products of 8 bits, for int8.cpp and piecewise.cpp.
//
// Once a head, the mean key of each block is taken off its keys and the mean value off its values,
// and what is left becomes numbers of 8 bits, keys at a scale for each token, values at a scale for
// each channel of a block. A query becomes 8 bits too. What the means add is added in fp32: the
// product of the query as it was with the mean key, and the mean value by the weight of its block.
// Both products run on the processor's sums of four products of bytes (VNNI), a few queries at a
// time against a tile of keys: scores, weights and results of those queries stay in the L1 cache.
// Weights are rounded to 1/255 of the largest of their query and block.
//
// A "panel" is a few queries.

#pragma once

#include "blocks.h"

#include <functional>

namespace {

constexpr i64 AT_ONCE = 6;     // queries of a panel
constexpr i64 KEYS = 1024;     // of a tile
constexpr i64 TILED = KEYS / LANES;  // parts of a tile
constexpr i64 BYTES = 4;       // that are multiplied and added up in a lane
constexpr float MOST = 127.f;  // of 8 bits with a sign
constexpr float NONE = 1e-30f;  // a range below is of nothing but zeros
constexpr float STEPS = 255.f;  // of weights
constexpr float LOG2_255 = 7.994353436858858f;

using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(64)));
#define INLINE __attribute__((always_inline))

// LANES numbers of 32 bits, each four bytes or their sum, and panels of them in a row: as many as
// registers hold sums for.
// GEN_ACCEL_NARROW: 256 bits at once where 512 would go, so that a test can run this too.
#if defined(__AVX512VNNI__) && !defined(GEN_ACCEL_NARROW)
constexpr i64 WIDEST = 4;
struct Words {
  Ints x;  // as __m512i, GCC would move each sum from register to register
};
inline Words words(int32_t x) { return {(Ints)_mm512_set1_epi32(x)}; }
inline Words words_at(const void* from) { return {(Ints)_mm512_loadu_si512(from)}; }
inline Words dot(Words sum, Words plain, Words with_sign) {
  return {(Ints)_mm512_dpbusd_epi32((__m512i)sum.x, (__m512i)plain.x, (__m512i)with_sign.x)};
}
inline Floats floats(Words sum) { return __builtin_convertvector(sum.x, Floats); }
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr i64 WIDEST = 1;
struct Words {
  __m256i low, high;
};
inline Words words(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Words words_at(const void* from) {
  const __m256i* at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Words dot(Words sum, Words plain, Words with_sign) {
  return {_mm256_dpbusd_epi32(sum.low, plain.low, with_sign.low),
          _mm256_dpbusd_epi32(sum.high, plain.high, with_sign.high)};
}
inline Floats floats(Words sum) {
  __m256 halves[2] = {_mm256_cvtepi32_ps(sum.low), _mm256_cvtepi32_ps(sum.high)};
  Floats all;
  std::memcpy(&all, halves, sizeof all);
  return all;
}
#else
constexpr i64 WIDEST = 1;
struct Words {
  Ints x;
};
inline Words words(int32_t x) { return {Ints{} + x}; }
inline Words words_at(const void* from) {
  Words made;
  std::memcpy(&made, from, sizeof made);
  return made;
}
inline Words dot(Words sum, Words plain, Words with_sign) {
  for (int at = 0; at < 32; at += 8)
    sum.x += (plain.x >> at & 0xff) * (with_sign.x << (24 - at) >> 24);
  return sum;
}
inline Floats floats(Words sum) { return __builtin_convertvector(sum.x, Floats); }
#endif
inline Floats floats_at(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void put_at(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

// Calls `work` with n, 1 to N, as a constant.
template <i64 N, typename F>
void as_constant(i64 n, F&& work) {
  if constexpr (N > 1) {
    if (n < N) return as_constant<N - 1>(n, work);
  }
  work(std::integral_constant<i64, N>());
}

// Calls `work` with 0 to N - 1 as constants: loops written out, so that sums stay in registers.
template <i64 N, typename F>
INLINE inline void unrolled(F&& work) {
  [&]<i64... I>(std::integer_sequence<i64, I...>) INLINE {
    (work(std::integral_constant<i64, I>()), ...);
  }(std::make_integer_sequence<i64, N>());
}

// Sums of products of R rows with C panels of LANES columns. SIGNED: it is the rows that have a
// sign. steps: numbers in a row by BYTES; stride: bytes of a panel.
template <bool SIGNED, i64 R, i64 C, typename Row>
INLINE inline void multiply(const Row* const (&rows)[R], const void* panels,
                                            i64 stride, i64 steps, Words (&sums)[R][C]) {
  const char* from = static_cast<const char*>(panels);
  for (i64 t = 0; t < steps; t++, from += LANES * BYTES) {
    Words right[C];
    unrolled<C>([&](auto c) INLINE { right[c] = words_at(from + c * stride); });
    unrolled<R>([&](auto r) INLINE {
      int32_t four;
      std::memcpy(&four, rows[r] + t * BYTES, sizeof four);
      Words left = words(four);
      unrolled<C>([&](auto c) INLINE {
        sums[r][c] = SIGNED ? dot(sums[r][c], right[c], left) : dot(sums[r][c], left, right[c]);
      });
    });
  }
}

// 0, or NaN where a number of the row is none or infinite.
inline float flaw(const float* x, i64 n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 d = 0; d < n; d++) sum += x[d] * 0.f;
  return sum;
}

inline float range(const float* x, i64 n) {
  float most = 0.f;
#pragma omp simd reduction(max : most)
  for (i64 d = 0; d < n; d++) most = std::max(most, std::fabs(x[d]));
  return most;
}

// Nearest whole numbers to x times, of which the low byte is kept; ties go to the even one.
inline void rounded_bytes(const float* x, i64 n, float times, int32_t shift, uint8_t* to) {
#pragma omp simd
  for (i64 d = 0; d < n; d++) {
    float magic = x[d] * times + 12582912.f;
    uint32_t bits;
    std::memcpy(&bits, &magic, 4);
    to[d] = static_cast<uint8_t>(bits + shift);
  }
}

// Weights 2^(s - high) of n scores as bytes in units of 1/255, and zeros to whole LANES; returns the
// sum of the weights in these units, before the rounding.
inline float weigh_bytes(const float* s, i64 n, float high, uint8_t* to) {
#ifdef __AVX512F__
  __m512 sum = _mm512_setzero_ps(), less = _mm512_set1_ps(high), more = _mm512_set1_ps(LOG2_255);
  for (i64 j = 0; j < n; j += LANES) {
    __mmask16 mask = n - j < LANES ? (1u << (n - j)) - 1 : 0xffff;
    // In this order: a huge highest swallows what is added to it.
    __m512 x = _mm512_sub_ps(_mm512_loadu_ps(s + j), less);
    __m512 w = exp2_of(_mm512_add_ps(x, more), true);
    w = _mm512_maskz_mov_ps(mask, w);
    sum = _mm512_add_ps(sum, w);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                     _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32(w)));
  }
  return _mm512_reduce_add_ps(sum);
#else
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; j++) {
    float w = exp2_of((s[j] - high) + LOG2_255);
    sum += w;
    to[j] = static_cast<uint8_t>(std::min(255.f, w) + 0.5f);  // of a NaN the first
  }
  std::fill(to + n, to + up(n, LANES), 0);
  return sum;
#endif
}

// Blocks of keys and values as the products read them, of each head and block.
struct Laid {
  i64 D, bk, bkp, steps, Dv;
  uint8_t* keys;             // (bkp / LANES, steps, LANES, BYTES), 128 more than they are
  float *key_scale, *means;  // (bkp,), (D,)
  int8_t* values;            // (Dv / LANES, bkp / BYTES, LANES, BYTES)
  float *value_scale, *value_means;  // (Dv,) each

  Laid(i64 D, i64 bk)
      : D(D), bk(bk), bkp(up(bk, LANES)), steps(up(D, BYTES) / BYTES), Dv(up(D, LANES)) {}

  void want(Arena& arena, i64 blocks) {
    arena.want(keys, blocks * bkp * steps * BYTES);
    arena.want(key_scale, blocks * bkp);
    arena.want(means, blocks * D);
    arena.want(values, blocks * bkp * Dv);
    arena.want(value_scale, blocks * Dv);
    arena.want(value_means, blocks * Dv);
  }
};

// Lays out one block after the other.
class Layer {
 public:
  explicit Layer(const Laid& laid)
      : to_(laid), bytes_(BYTES * std::max(laid.Dv, laid.steps * BYTES)), range_(laid.Dv),
        count_(laid.D), rows_(laid.bk * laid.D), real_(laid.bk) {}

  // Number n of the blocks, from slot `slot` of head `bh` on.
  template <typename In>
  void block(i64 n, const Tokens<In>& k, const Tokens<In>& v, i64 bh, i64 slot) {
    for (i64 s = 0; s < to_.bk; s++) real_[s] = k.token(slot + s) >= 0;
    k.read(bh, slot, to_.bk, rows_.data(), to_.D);
    keys(n, rows_.data(), real_.data());
    v.read(bh, slot, to_.bk, rows_.data(), to_.D);
    values(n, rows_.data(), real_.data());
  }

 private:
  // rows: (bk, D), which are overwritten; real: whether a slot holds a token.
  void keys(i64 block, float* rows, const char* real) {
    float* mean = to_.means + block * to_.D;
    take_mean(rows, real, mean);
    Word* target = reinterpret_cast<Word*>(to_.keys) + block * to_.bkp * to_.steps;
    const Word* four = reinterpret_cast<const Word*>(bytes_.data());
    for (i64 s = 0; s < to_.bkp; s++) {
      float scale = 0.f;
      std::fill(bytes_.begin(), bytes_.end(), 128);
      if (s < to_.bk && real[s]) {
        float* row = rows + s * to_.D;
        float most = range(row, to_.D), bad = flaw(row, to_.D);
        if (most > NONE && bad == 0.f) rounded_bytes(row, to_.D, MOST / most, 128, bytes_.data());
        scale = most / MOST + bad;
      }
      to_.key_scale[block * to_.bkp + s] = scale;
      Word* lane = target + s / LANES * to_.steps * LANES + s % LANES;
      for (i64 t = 0; t < to_.steps; t++) lane[t * LANES] = four[t];
    }
  }

  void values(i64 block, float* rows, const char* real) {
    float* mean = to_.value_means + block * to_.Dv;
    std::fill(mean, mean + to_.Dv, 0.f);
    take_mean(rows, real, mean);
    float* scale = to_.value_scale + block * to_.Dv;
    std::fill(scale, scale + to_.Dv, 0.f);
    std::fill(range_.begin(), range_.end(), 0.f);
    for (i64 s = 0; s < to_.bk; s++) {
      const float* row = rows + s * to_.D;
#pragma omp simd
      for (i64 d = 0; d < to_.D; d++) {
        range_[d] = std::max(range_[d], std::fabs(row[d]));
        scale[d] += row[d] * 0.f;
      }
    }
    for (i64 d = 0; d < to_.D; d++) {
      bool some = range_[d] > NONE && scale[d] == 0.f;
      scale[d] += range_[d] / MOST;
      range_[d] = some ? MOST / range_[d] : 0.f;
    }
    Word* target = reinterpret_cast<Word*>(to_.values + block * to_.bkp * to_.Dv);
    for (i64 s = 0; s < to_.bkp; s += BYTES) {
      std::fill(bytes_.begin(), bytes_.end(), 0);
      for (i64 n = 0; n < BYTES && s + n < to_.bk; n++) channels(rows + (s + n) * to_.D, n);
      const uint8_t* four = bytes_.data();
      for (i64 d = 0; d < to_.Dv; d += LANES) {
        Word* lanes = target + (d / LANES * to_.bkp + s) / BYTES * LANES;
        for (i64 l = 0; l < LANES; l++) {
          uint32_t a = four[d + l], b = four[to_.Dv + d + l];
          uint32_t c = four[2 * to_.Dv + d + l], e = four[3 * to_.Dv + d + l];
          lanes[l] = a | b << 8 | c << 16 | e << 24;
        }
      }
    }
  }

  // Takes the mean of the real rows off each of them. What is no number or infinite has no part in
  // it.
  void take_mean(float* rows, const char* real, float* mean) {
    std::fill(mean, mean + to_.D, 0.f);
    std::fill(count_.begin(), count_.end(), 0.f);
    for (i64 s = 0; s < to_.bk; s++) {
      const float* row = rows + s * to_.D;
#pragma omp simd
      for (i64 d = 0; d < to_.D; d++) {
        bool counts = real[s] && row[d] * 0.f == 0.f;
        mean[d] += counts ? row[d] : 0.f;
        count_[d] += counts ? 1.f : 0.f;
      }
    }
    for (i64 d = 0; d < to_.D; d++) mean[d] /= std::max(count_[d], 1.f);
    for (i64 s = 0; s < to_.bk; s++)
      for (i64 d = 0; d < to_.D && real[s]; d++) rows[s * to_.D + d] -= mean[d];
  }

  void channels(const float* row, i64 n) {
    uint8_t* to = bytes_.data() + n * to_.Dv;
#pragma omp simd
    for (i64 d = 0; d < to_.D; d++) {
      float magic = (range_[d] > 0.f ? row[d] * range_[d] : 0.f) + 12582912.f;
      uint32_t bits;
      std::memcpy(&bits, &magic, 4);
      to[d] = static_cast<uint8_t>(bits);
    }
  }

  const Laid& to_;
  std::vector<uint8_t> bytes_;
  std::vector<float> range_, count_, rows_;
  std::vector<char> real_;
};

// Says by how much a query, a number of a piece, does not see each key of a part.
using Hides = std::function<void(i64 query, const Part& part, float* excess)>;

// The queries of a piece, against tiles of keys.
struct Piece {
  const Laid& laid;
  i64 Kk, most;  // key blocks of a head; queries
  float scale;
  Hides hides;
  // Of each query: as bytes, their sum by -128, what a product of bytes is worth; as it was, by
  // scale and log2(e); what is carried.
  int8_t* q;
  int32_t* start;
  float *worth, *exact, *o, *high, *sum;
  // Of a panel: scores, weights, and by parts of a tile what the mean keys add to the scores, the
  // factor of the weights and their sum.
  float *scores, *shift, *factor, *mass;
  uint8_t* weights;
  float *turned, *excess;  // the mean keys of a tile, (TILED / LANES, D, LANES); (KEYS,)

  Piece(const Laid& blocks, i64 Kk, i64 most, float scale, Hides hides)
      : laid(blocks), Kk(Kk), most(most), scale(scale), hides(std::move(hides)) {
    static thread_local Room room;
    Arena arena;
    arena.want(q, most * laid.steps * BYTES);
    arena.want(start, most);
    arena.want(worth, most);
    arena.want(exact, most * laid.D);
    arena.want(o, most * laid.Dv);
    arena.want(high, most);
    arena.want(sum, most);
    arena.want(scores, AT_ONCE * KEYS);
    arena.want(shift, AT_ONCE * TILED);
    arena.want(factor, AT_ONCE * TILED);
    arena.want(mass, AT_ONCE * TILED);
    arena.want(weights, AT_ONCE * KEYS);
    arena.want(turned, TILED * laid.D);
    arena.want(excess, KEYS);
    arena.fill(room);
  }
  Piece(const Piece&) = delete;

  // Takes query i, which lies in `exact`.
  void begin(i64 i) {
    float* row = exact + i * laid.D;
    int8_t* bytes = q + i * laid.steps * BYTES;
    float most = range(row, laid.D), bad = flaw(row, laid.D);
    std::fill(bytes, bytes + laid.steps * BYTES, 0);
    if (most > NONE && bad == 0.f)
      rounded_bytes(row, laid.D, MOST / most, 0, reinterpret_cast<uint8_t*>(bytes));
    start[i] = 0;
    for (i64 d = 0; d < laid.D; d++) start[i] -= 128 * bytes[d];
    worth[i] = (most / MOST + bad) * scale * LOG2E;
    for (i64 d = 0; d < laid.D; d++) row[d] *= scale * LOG2E;
    std::fill(o + i * laid.Dv, o + (i + 1) * laid.Dv, 0.f);
    high[i] = LOW;
    sum[i] = 0.f;
  }

  // The answer to it, D numbers.
  const float* finished(i64 i) {
    float inverse = sum[i] > 0.f || sum[i] != sum[i] ? 1.f / sum[i] : 0.f, *row = o + i * laid.Dv;
    for (i64 d = 0; d < laid.D; d++) row[d] *= inverse;
    return row;
  }

  // Some queries, of the numbers `which`, against a tile of head `bh`.
  void tile(i64 bh, const uint16_t* which, i64 count, const std::vector<Part>& parts,
            const float* gains) {
    i64 base = bh * Kk;
    for (i64 n = 0; n < i64(parts.size()); n++) {
      const float* mean = laid.means + (base + parts[n].block) * laid.D;
      float* to = turned + n / LANES * laid.D * LANES + n % LANES;
      for (i64 d = 0; d < laid.D; d++) to[d * LANES] = mean[d];
    }
    for (i64 first = 0; first < count; first += AT_ONCE)
      as_constant<AT_ONCE>(std::min(AT_ONCE, count - first), [&](auto R) {
        panel<R>(base, which + first, parts, gains);
      });
  }

  template <i64 R>
  void panel(i64 base, const uint16_t* which, const std::vector<Part>& parts, const float* gains) {
    i64 count = parts.size();
    for (i64 n = 0; n < count; n += LANES) shifts<R>(which, n);
    for (i64 n = 0; n < count; n++) {
      i64 panels = up(parts[n].count, LANES) / LANES;
      for (i64 c = 0; c < panels; c += WIDEST)
        as_constant<WIDEST>(std::min(WIDEST, panels - c), [&](auto C) {
          score<R, C>(base, which, parts[n], n, c);
        });
    }
    for (i64 r = 0; r < R; r++) weigh_row(r, which[r], parts, gains);
    for (i64 c = 0; c < laid.Dv / LANES; c += WIDEST)
      as_constant<WIDEST>(std::min(WIDEST, laid.Dv / LANES - c), [&](auto C) {
        for (i64 n = 0; n < count; n++) add<R, C>(base, which, parts[n], n, c);
      });
  }

  // What the mean keys of parts n to n + LANES add to the scores.
  template <i64 R>
  void shifts(const uint16_t* which, i64 n) {
    Floats sums[R] = {};
    const float* rows[R];
    unrolled<R>([&](auto r) INLINE { rows[r] = exact + which[r] * laid.D; });
    const float* from = turned + n * laid.D;
    for (i64 d = 0; d < laid.D; d++) {
      Floats mean = floats_at(from + d * LANES);
      unrolled<R>([&](auto r) INLINE { sums[r] += mean * rows[r][d]; });
    }
    unrolled<R>([&](auto r) INLINE { put_at(shift + r * TILED + n, sums[r]); });
  }

  // Scores, by log2(e), of C panels of keys from panel `c` of a part on.
  template <i64 R, i64 C>
  void score(i64 base, const uint16_t* which, const Part& part, i64 n, i64 c) {
    const int8_t* queries[R];
    Words sums[R][C];
    i64 stride = laid.steps * LANES * BYTES, key = (base + part.block) * laid.bkp + part.first;
    unrolled<R>([&](auto r) INLINE {
      queries[r] = q + which[r] * laid.steps * BYTES;
      unrolled<C>([&](auto k) INLINE { sums[r][k] = words(start[which[r]]); });
    });
    key += c * LANES;
    multiply<true, R, C>(queries, laid.keys + key * laid.steps * BYTES, stride, laid.steps, sums);
    unrolled<R>([&](auto r) INLINE {
      float times = worth[which[r]], more = shift[r * TILED + n];
      float* to = scores + r * KEYS + part.column + c * LANES;
      unrolled<C>([&](auto k) INLINE {
        Floats s = floats(sums[r][k]) * floats_at(laid.key_scale + key + k * LANES);
        put_at(to + k * LANES, s * times + more);
      });
    });
  }

  // Scores of a query to weights, part by part, and what is carried of it.
  void weigh_row(i64 r, i64 i, const std::vector<Part>& parts, const float* gains) {
    i64 count = parts.size(), wide = up(count, LANES);
    float *by = factor + r * TILED, *held = mass + r * TILED, top = high[i], total = 0.f;
    for (i64 n = 0; n < count; n++) {
      const Part& x = parts[n];
      float* s = scores + r * KEYS + x.column;
      if (gains) dampen(s, x.count, 1.f, gains[x.block]);
      if (x.masked) {
        hides(i, x, excess);
        conceal(s, x.count, excess);
      }
      by[n] = highest(s, x.count, LOW);
    }
    for (i64 n = 0; n < count; n++) {
      i64 from = r * KEYS + parts[n].column;
      float most = by[n] > LOW / 2 ? by[n] : 0.f;
      held[n] = weigh_bytes(scores + from, parts[n].count, most, weights + from);
    }
    std::fill(by + count, by + wide, LOW);
    std::fill(held + count, held + wide, 0.f);
    top = highest(by, count, top);
#pragma omp simd reduction(+ : total)
    for (i64 n = 0; n < wide; n++) {
      by[n] = exp2_of(by[n] - top);
      held[n] *= by[n];
      total += held[n];
    }
    float before = exp2_of(high[i] - top);
    sum[i] = sum[i] * before + total;
    high[i] = top;
    if (before == 1.f) return;
    for (i64 d = 0; d < laid.Dv; d++) o[i * laid.Dv + d] *= before;
  }

  // Adds the weighted values of a part, C panels of channels from panel `c` on.
  template <i64 R, i64 C>
  void add(i64 base, const uint16_t* which, const Part& part, i64 n, i64 c) {
    const uint8_t* left[R];
    Words sums[R][C];
    unrolled<R>([&](auto r) INLINE {
      left[r] = weights + r * KEYS + part.column;
      unrolled<C>([&](auto k) INLINE { sums[r][k] = words(0); });
    });
    i64 block = base + part.block, stride = laid.bkp * LANES;
    const int8_t* V = laid.values + block * laid.bkp * laid.Dv + c * stride + part.first * LANES;
    multiply<false, R, C>(left, V, stride, up(part.count, BYTES) / BYTES, sums);
    const float* scale = laid.value_scale + block * laid.Dv + c * LANES;
    const float* mean = laid.value_means + block * laid.Dv + c * LANES;
    unrolled<R>([&](auto r) INLINE {
      float by = factor[r * TILED + n], all = mass[r * TILED + n];
      float* to = o + which[r] * laid.Dv + c * LANES;
      unrolled<C>([&](auto k) INLINE {
        Floats more = floats(sums[r][k]) * (floats_at(scale + k * LANES) * by);
        Floats x = floats_at(to + k * LANES) + floats_at(mean + k * LANES) * all;
        put_at(to + k * LANES, x + more);
      });
    });
  }
};

}  // namespace
