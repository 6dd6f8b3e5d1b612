// Attention over the kept blocks of a plan and the rest around mean queries, in one pass on the CPU
// and without a gradient. See `Rest` in plan.py for the mathematics; rest.cpp has both passes of a
// rest alone.
//
// Statistics of queries and keys are made once a head, where keys and values are laid out. Then a
// thread takes a group of query blocks, pools all key blocks around their mean queries by one
// product each, and runs each query block against its kept blocks and its pooled keys in one
// softmax. Which blocks are kept is given, or chosen by what was pooled; or the answer is what the
// pooled keys weigh, by which others choose. Scores lie with the keys along rows and the queries
// along columns: what is carried from tile to tile is a row, and weights are the right factor of the
// next product as they are. Kept blocks may be computed by products of 8 bits, see bytes.h, from
// which the softmax then goes on.
//
// Called through ctypes. Letters as in plan.py.

#include "bytes.h"

#include <limits>

namespace {

constexpr i64 MOST_GROUP = 3 * LANES;  // query blocks whose mean queries are columns of a product
constexpr i64 CHUNK = 64;              // pooled keys of a tile
constexpr i64 PARTS = 16;              // of the key blocks of a head, whose sums are made at once
constexpr size_t MOST_POOLED = size_t(32) << 20;  // bytes of the pooled keys and values of a group
// That a score may rise above the level of its query, to base 2, before sums are scaled anew.
constexpr float RISE = 8.f;

struct OnePass {
  const void *q, *k, *v;
  void* o;       // null where blocks are chosen or weighed, and nothing more
  float* total;  // (B, H, N), log-sum-exps
  i64 q_strides[3], k_strides[3], v_strides[3];
  const i64* slots;            // (S,), -1 for padding; null where slot = token
  const uint8_t* keep;         // (PB, PH, Kq, Kk), bools of any bytes; null where it is chosen
  uint8_t* chosen;             // (B, H, Kq, Kk), what is chosen
  float* shares;               // (B, H, Kq, Kk), logarithms of the mean weights of pooled keys
  const uint8_t *always, *ranked;  // (Kq, Kk), what is kept without being chosen; (Kk,), what may be
  const i64* counts;               // (H,), how many are chosen
  const float *of_q, *of_k;        // (Kq,) and (Kk,), how often each block counts in a curve
  i64 B, H, N, D, S, block_q, block_k, PB, PH, order, score;
  i64 bytes;  // whether kept blocks are computed by products of 8 bits
  float scale, most, curvature;  // most: that a curve adds to a score
};

// How well a key block scores for a query block, see `Piecewise`.
enum Score { SPREAD, LOSS, POOLED };

// A cursor over the memory that is read next, a line at a time.
struct Ahead {
  const char *from[2] = {}, *to[2] = {};
  template <typename T>
  void add(const T* part, i64 n) {
    int at = from[0] ? 1 : 0;
    from[at] = reinterpret_cast<const char*>(part);
    to[at] = reinterpret_cast<const char*>(part + n);
  }
  void ask() {
    for (int at : {0, 1}) {
      if (from[at] >= to[at]) continue;
      __builtin_prefetch(from[at]);
      from[at] += 64;
    }
  }
};

// The highest of some rows in each of LANES columns, and `top`; NaN is passed over. `seen` says
// which rows count, null for all.
inline void highest_of(const float* s, i64 n, i64 ld, const uint8_t* seen, const float* level,
                       float* top) {
#ifdef __AVX512F__
  __m512 most = _mm512_loadu_ps(level);
  for (i64 r = 0; r < n; r++)
    if (!seen || seen[r]) most = _mm512_max_ps(_mm512_loadu_ps(s + r * ld), most);
  _mm512_storeu_ps(top, most);
#else
  std::copy(level, level + LANES, top);
  for (i64 r = 0; r < n; r++) {
    if (seen && !seen[r]) continue;
#pragma omp simd
    for (i64 c = 0; c < LANES; c++) top[c] = s[r * ld + c] > top[c] ? s[r * ld + c] : top[c];
  }
#endif
}

// Weights 2^((s - level) by) of LANES columns, added to `sum`, as a right factor of ld columns.
template <typename T>
void weigh_lanes(float* s, i64 n, i64 ld, const uint8_t* seen, const float* level, float by,
                 float* sum, T* to, Ahead& ahead) {
#ifdef __AVX512F__
  const __m512 less = _mm512_loadu_ps(level), times = _mm512_set1_ps(by);
  const __m512 bound = _mm512_set1_ps(RISE + 1.f);
  __m512 all = _mm512_setzero_ps();  // of a long sum in a row more is rounded off than of its parts
  auto weight = [&](i64 r) {
    if (r >= n || (seen && !seen[r])) return _mm512_setzero_ps();
    __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + r * ld), less), times);
    __m512 w = exp2_of(_mm512_min_ps(bound, x), sizeof(T) == 2);  // of a NaN the second
    all = _mm512_add_ps(all, w);
    return w;
  };
  if constexpr (sizeof(T) == 4) {
    for (i64 r = 0; r < n; r++) {
      _mm512_storeu_ps(to + r * ld, weight(r));
      ahead.ask();
    }
  } else {
    for (i64 r = 0; r < up(n, EVEN<T>); r += 2) {
      alignas(64) T both[2 * LANES];
      put(both, 0xffff, weight(r));
      put(both + LANES, 0xffff, weight(r + 1));
      pair_up(both, both + LANES, LANES, to + r * ld);
      ahead.ask();
      ahead.ask();
    }
  }
  _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), all));
#else
  float w[2][LANES], all[LANES] = {};
  for (i64 r = 0; r < up(n, EVEN<T>); r += PAIR<T>) {
    for (i64 i = 0; i < PAIR<T>; i++) {
      bool some = r + i < n && !(seen && !seen[r + i]);
#pragma omp simd
      for (i64 c = 0; c < LANES; c++) {
        float x = some ? (s[(r + i) * ld + c] - level[c]) * by : -1000.f;
        w[i][c] = exp2_of(x > RISE + 1.f ? RISE + 1.f : x);
        all[c] += w[i][c];
      }
      ahead.ask();
    }
    T low[2 * LANES];
    for (i64 i = 0; i < PAIR<T>; i++) store(low + i * LANES, w[i], LANES);
    pair_up(low, low + LANES, LANES, to + r * ld);
  }
  for (i64 c = 0; c < LANES; c++) sum[c] += all[c];
#endif
}

template <typename In, typename T>
struct Passed {
  const OnePass& a;
  i64 Kq = a.S / a.block_q, Kk = a.S / a.block_k, D = a.D, bq = a.block_q, bk = a.block_k;
  i64 BH = a.B * a.H, Dp = up(D, PAIR<T>), Dl = up(D, LANES), R = up(bq, LANES);
  i64 bkp = up(bk, LANES), Kkp = up(Kk, LANES) + LANES;  // no power of two
  bool attends = a.o != nullptr, chooses = a.chosen != nullptr, weighs = a.shares != nullptr;
  bool sloped = a.order > 0 && attends, curved = a.order > 1;
  bool by_values = chooses && a.score != SPREAD;
  bool by_shares = weighs || (chooses && a.score == POOLED);
  bool by_bytes = attends && a.bytes;
  float by = a.scale * LOG2E;
  Tokens<In> q{a.q, a.q_strides, a.slots, a.H, D}, k{a.k, a.k_strides, a.slots, a.H, D};
  Tokens<In> v{a.v, a.v_strides, a.slots, a.H, D};
  std::vector<i64> held_q = held(a.slots, a.S, bq), held_k = held(a.slots, a.S, bk);
  std::vector<uint8_t> real;  // (S,), whether a slot holds a token
  std::vector<char> padded = std::vector<char>(Kk);  // whether some slot of a key block holds none
  i64 size, groups;           // query blocks of a group

  T *keys, *values;  // of each block of a head, (bkp, Dp) and (D, bkp)
  T* pairs;          // of bf16, keys as a right factor
  float *means, *centres, *squares;  // of q and k by block; of each key slot, weighed
  float* losses;                     // (BH, Kk), what a score gains by the values of a block
  std::vector<float> weight, rises;  // (BH, D), what a variance weighs and what an offset rises by
  std::vector<T> slopes;             // (BH, D, Dp), transposed
  Laid laid{D, bk};                  // keys and values of 8 bits, where they are asked for

  explicit Passed(const OnePass& args) : a(args), real(a.S) {
    for (i64 s = 0; s < a.S; s++) real[s] = q.token(s) >= 0;
    for (i64 j = 0; j < Kk; j++) padded[j] = held_k[j] < bk;
    // The fewest columns that the groups' products have in all, in parts enough for all threads.
    i64 least = std::min<i64>(Kq, (2 * at::get_num_threads() + BH - 1) / std::max<i64>(BH, 1));
    i64 most = MOST_POOLED / (Kk * (Dp + D) * sizeof(T));
    most = std::clamp<i64>(most, 1, MOST_GROUP);
    i64 best = 0;
    groups = Kq;
    for (i64 n = std::max((Kq + most - 1) / most, least); n <= Kq; n++) {
      i64 columns = n * (up((Kq + n - 1) / n, LANES) + LANES / 2);
      if (best && columns >= best) continue;
      best = columns, groups = n;
    }
    size = (Kq + groups - 1) / groups;
    groups = (Kq + size - 1) / size;
  }

  const uint8_t* keep(i64 bh, i64 i) const {
    if (a.chosen) return a.chosen + (bh * Kq + i) * Kk;
    return a.keep + (pattern_of(bh, a.H, a.PB, a.PH) * Kq + i) * Kk;
  }

  // How many tokens of a head count, at least one.
  static float counted(const float* counts, const std::vector<i64>& held) {
    double sum = 0;
    for (size_t j = 0; j < held.size(); j++) sum += double(counts[j]) * held[j];
    return std::max(sum, 1.0);
  }

  // Means of the query blocks, and `weight`.
  void queries() {
    std::vector<float> sums(curved ? BH * Kq * D : 0);
    at::parallel_for(0, BH * Kq, 1, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) {
        float* mean = means + n * Dp;
        mean_of(q, n / Kq, n % Kq * bq, bq, held_q[n % Kq], mean, Dp);
        if (!curved || a.of_q[n % Kq] == 0.f) continue;
        float* to = sums.data() + n * D;
        for (i64 s = n % Kq * bq; s < (n % Kq + 1) * bq; s++) {
          i64 t = q.token(s);
          if (t < 0) continue;
          const In* row = q.row(n / Kq, t);
#pragma omp simd
          for (i64 d = 0; d < D; d++) {
            float off = load(row + d) - mean[d];
            to[d] += off * off;
          }
        }
      }
    });
    if (!curved) return;
    weight.assign(BH * D, 0.f);
    for (i64 bh = 0; bh < BH; bh++) {
      float* to = weight.data() + bh * D;
      for (i64 i = 0; i < Kq; i++)
        for (i64 d = 0; d < D; d++) to[d] += a.of_q[i] * sums[(bh * Kq + i) * D + d];
      float all = counted(a.of_q, held_q);
      for (i64 d = 0; d < D; d++) to[d] /= all;
    }
  }

  // Keys and values as the products read them, their statistics, `rises` and `slopes`.
  void lay() {
    i64 parts = std::min(PARTS, Kk);
    std::vector<float> sums(curved ? BH * Kk * D : 0), slope(sloped ? BH * parts * D * D : 0);
    each(BH * parts, [&] {
      return [&, rows = std::vector<float>(bkp * Dl), low = std::vector<T>(bkp * Dp),
              off = std::vector<float>(bk * D), turned = std::vector<float>(bk * D),
              layer = Layer(laid)](i64 n) mutable {
        i64 bh = n / parts, part = n % parts;
        for (i64 j = part * Kk / parts; j < (part + 1) * Kk / parts; j++) {
          i64 at = bh * Kk + j, slot = j * bk;
          float* mean = centres + at * Dp;
          mean_of(k, bh, slot, bk, held_k[j], mean, Dp);
          k.read(bh, slot, bk, low.data(), Dp);
          std::fill(low.data() + bk * Dp, low.data() + bkp * Dp, T(0));
          std::copy(low.begin(), low.end(), keys + at * bkp * Dp);
          if (PAIR<T> > 1) interleave(low.data(), Dp, bk, bkp, Dp, pairs + at * bkp * Dp);
          if (curved) curve(bh, j, mean, sums.data() + at * D);
          if (attends || by_values) v.read(bh, slot, bk, rows.data(), Dl);
          if (attends) turn(rows.data(), Dl, bkp, Dl, values + at * bkp * Dl, bkp);
          if (by_bytes) layer.block(at, k, v, bh, slot);
          if (chooses) losses[at] = by_values ? loss(rows.data(), held_k[j]) : 0.f;
          if (!sloped) continue;
          k.read(bh, slot, bk, off.data(), D);
          // Twice, as the slope adds up over all tokens by how much the first mean was rounded.
          for (int m = 0; m < 2; m++) centre(k, slot, bk, off.data());
          interleave_transposed(off.data(), D, D, bk, bk, turned.data());
          product(D, D, bk, turned.data(), bk, rows.data(), Dl, slope.data() + n * D * D, D, true);
        }
      };
    });
    rises.assign(curved ? BH * D : 0, 0.f);
    slopes.assign(sloped ? BH * Dl * Dp : 0, T(0));
    for (i64 bh = 0; bh < BH; bh++) {
      if (curved) rise(bh, sums.data() + bh * Kk * D);
      if (!sloped) continue;
      float* whole = slope.data() + bh * parts * D * D;
      for (i64 part = 1; part < parts; part++)
        for (i64 n = 0; n < D * D; n++) whole[n] += whole[part * D * D + n];
      std::vector<float> column(Dp);
      for (i64 d = 0; d < D; d++) {
        for (i64 e = 0; e < D; e++) column[e] = whole[e * D + d];
        store(slopes.data() + (bh * Dl + d) * Dp, column.data(), Dp);
      }
    }
  }

  // ln sqrt(mean |v_t - v_j|^2) of a block. Where values are equal up to rounding, it is that of
  // a 1000th of their size.
  float loss(const float* rows, i64 some) const {
    std::vector<float> mean(D);
    float apart = 0.f, square = 0.f;
    for (i64 s = 0; s < bk; s++)
#pragma omp simd
      for (i64 d = 0; d < D; d++) mean[d] += rows[s * Dl + d];
    for (float& m : mean) m /= std::max<i64>(some, 1);
    for (i64 s = 0; s < bk; s++) {
#pragma omp simd reduction(+ : apart, square)
      for (i64 d = 0; d < D; d++) {
        float x = rows[s * Dl + d], off = x - mean[d];
        apart += off * off;
        square += x * x;
      }
    }
    apart -= (bk - some) * dot(mean.data(), mean.data(), D);  // of padding, which is zeros
    apart = std::max({apart, 1e-6f * square, std::numeric_limits<float>::min()});
    return std::log(apart / std::max<i64>(some, 1)) / 2;
  }

  // What the keys of a block are off their mean, squared: weighed of each, and the sum.
  void curve(i64 bh, i64 j, const float* mean, float* sum) {
    float* to = squares + bh * a.S + j * bk;
    for (i64 s = 0; s < bk; s++) {
      i64 t = k.token(j * bk + s);
      to[s] = 0.f;
      if (t < 0) continue;
      const In* row = k.row(bh, t);
      to[s] = distance(row, 1.f, mean, weight.data() + bh * D, D);
#pragma omp simd
      for (i64 d = 0; d < D; d++) {
        float off = load(row + d) - mean[d];
        sum[d] += off * off;
      }
    }
  }

  void rise(i64 bh, const float* sums) {
    float *to = rises.data() + bh * D, all = counted(a.of_k, held_k);
    for (i64 j = 0; j < Kk; j++)
      for (i64 d = 0; d < D; d++) to[d] += a.of_k[j] * sums[j * D + d];
    for (i64 d = 0; d < D; d++) to[d] /= all;
    float both = dot(weight.data() + bh * D, to, D);
    // In units of products of q and k, as all scores here.
    float factor = both > 0.f ? a.curvature * a.scale / both : 0.f;
    for (i64 d = 0; d < D; d++) to[d] *= factor;
  }

  struct Worker {
    const Passed& f;
    i64 D = f.D, Dp = f.Dp, Dl = f.Dl, R = f.R, bkp = f.bkp, Kk = f.Kk, Kkp = f.Kkp;
    i64 columns = up(f.size, LANES), rows = std::max(bkp, CHUNK), Kkc = up(Kk, EVEN<T>);
    i64 each_key = Kkp * Dp + 2 * LANES, each_value = D * Kkp + 2 * LANES;
    // Of a group: mean queries as a right factor; pooled keys (Kkp, Dp) and values (D, Kkp) of each
    // query block, what their scores gain, and the variances of their keys.
    T *mean, *keys, *values;
    float *bias, *spans, *ranks;
    // Of the key block that is pooled: shares by token and query block, and the same turned; pooled
    // keys (columns, Dp), and values (D, columns) of LANES blocks.
    float *shares, *pooled, *some_values;
    T *share_pairs, *turned;
    // Of a query block: queries as a right factor, as they are and off their mean; scores of a key
    // block, weights, scores of all pooled keys, their shares; the answer (D, R) so far; levels,
    // sums of weights, those of the kept keys alone, rises.
    float *row, *off, *scores, *all_scores, *parts, *out, *gain, *level, *top, *sum, *own, *rise;
    T *q, *around, *weights, *lines;
    std::vector<uint8_t> left, held;
    std::vector<std::pair<float, i64>> best;
    std::unique_ptr<Piece> piece;  // the queries of a block, with products of 8 bits
    std::vector<uint16_t> real_rows;
    std::vector<Block> kept;

    explicit Worker(const Passed& passed) : f(passed), left(Kkp), held(Kk) {
      if (f.by_bytes)
        piece = std::make_unique<Piece>(
            f.laid, Kk, f.bq, f.a.scale, [this](i64, const Part& part, float* excess) {
              const uint8_t* seen = f.real.data() + part.block * f.bk + part.first;
              for (i64 n = 0; n < part.count; n++) excess[n] = seen[n] ? -1.f : 1.f;
            });
      for (i64 j = 0; j < Kk; j++) held[j] = f.held_k[j] > 0;
      static thread_local Room room;
      Arena arena;
      arena.want(mean, columns * Dp);
      arena.want(keys, f.size * each_key);
      arena.want(values, f.attends ? f.size * each_value : 0);
      arena.want(bias, f.size * Kkp);
      arena.want(spans, f.curved ? f.size * Kkp : 0);
      arena.want(ranks, f.chooses ? f.size * Kkp : 0);
      arena.want(shares, bkp * columns);
      arena.want(pooled, columns * Dp);
      arena.want(some_values, f.attends ? LANES * D * columns : 0);
      arena.want(share_pairs, PAIR<T> > 1 && f.attends ? bkp * columns : 0);
      arena.want(turned, columns * bkp);
      arena.want(row, R * Dl);
      arena.want(off, R * Dl);
      arena.want(scores, rows * R);
      arena.want(all_scores, Kkc * R);
      arena.want(parts, f.by_shares ? Kkc * R : 0);
      arena.want(out, Dl * R);
      arena.want(gain, f.sloped ? Dl * R : 0);
      for (float** x : {&level, &top, &sum, &own, &rise}) arena.want(*x, R);
      arena.want(q, R * Dp);
      arena.want(around, R * Dp);
      arena.want(weights, PAIR<T> > 1 ? rows * R : 0);
      arena.want(lines, R * Dp);
      arena.fill(room);
      if (PAIR<T> == 1) share_pairs = reinterpret_cast<T*>(shares);
    }
    Worker(const Worker&) = delete;
    ~Worker() { finish(q); }

    void operator()(i64 n) {
      i64 bh = n / f.groups, first = n % f.groups * f.size;
      i64 count = std::min(f.size, f.Kq - first);
      bool some = false;
      for (i64 i = first; i < first + count; i++) {
        i64 row = (bh * f.Kq + i) * Kk;
        if (f.chooses) std::copy_n(f.a.always + i * Kk, Kk, f.a.chosen + row);
        if (f.weighs) std::fill_n(f.a.shares + row, Kk, -INFINITY);
        some |= pools(bh, i);
      }
      if (some) pool(bh, first, count);
      for (i64 g = 0; g < count; g++) block(bh, first + g, g);
    }

    // Whether query block i needs pooled keys.
    bool pools(i64 bh, i64 i) const {
      if (f.weighs) return f.held_q[i] > 0;
      const uint8_t* keep = f.keep(bh, i);
      for (i64 j = 0; j < Kk; j++)
        if (!keep[j] && held[j]) return f.held_q[i] > 0;
      return false;
    }

    // All key blocks around the mean queries of a group.
    void pool(i64 bh, i64 first, i64 count) {
      std::vector<T> rows(columns * Dp, T(0));
      for (i64 g = 0; g < count; g++)
        store(rows.data() + g * Dp, f.means + (bh * f.Kq + first + g) * Dp, Dp);
      interleave_transposed(rows.data(), Dp, Dp, columns, columns, mean);
      for (i64 j = 0; j < Kk; j++) {
        if (f.held_k[j]) one(bh, j, count, rows.data());
        if (!f.attends) continue;
        if (!f.held_k[j])
          for (i64 d = 0; d < D; d++)
            std::fill_n(some_values + (j % LANES * D + d) * columns, columns, 0.f);
        if (j % LANES < LANES - 1 && j + 1 < Kk) continue;
        // Zeros after the last block: they are multiplied by zeros.
        for (i64 c = j % LANES + 1; c < LANES; c++)
          std::fill_n(some_values + c * D * columns, D * columns, 0.f);
        for (i64 d = 0; d < D; d++)
          for (i64 g = 0; g < count; g += LANES) turn_values(d, g, count, j / LANES * LANES);
      }
    }

    // Number d of the values of LANES blocks, for LANES query blocks.
    void turn_values(i64 d, i64 first, i64 count, i64 j) {
      alignas(64) T made[LANES * LANES];
      turn(some_values + d * columns + first, D * columns, LANES, LANES, made, LANES);
      for (i64 g = first; g < std::min(count, first + LANES); g++)
        std::copy_n(made + (g - first) * LANES, LANES, values + g * each_value + d * Kkp + j);
    }

    // Key block j, pooled.
    void one(i64 bh, i64 j, i64 count, const T* means) {
      i64 at = bh * Kk + j, bk = f.bk;
      const T* rows = f.keys + at * bkp * Dp;
      const uint8_t* seen = f.held_k[j] < bk ? f.real.data() + j * bk : nullptr;
      float high[MOST_GROUP], all[MOST_GROUP] = {};
      Ahead ahead;
      if (f.attends) ahead.add(f.values + at * bkp * Dl, D * bkp);
      if (j + 1 < Kk) ahead.add(rows + bkp * Dp, bkp * Dp);
      product(bk, columns, Dp, rows, Dp, mean, columns, shares, columns, false);
      for (i64 c = 0; c < columns; c += LANES) {
        float none[LANES];
        std::fill(none, none + LANES, LOW);
        highest_of(shares + c, bk, columns, seen, none, high + c);
        weigh_lanes(shares + c, bk, columns, seen, high + c, f.by, all + c, shares + c, ahead);
      }
      std::fill(shares + bk * columns, shares + bkp * columns, 0.f);
      for (i64 c = 0; c < columns; c++) {
        if (c < count) bias[c * Kkp + j] = high[c] + std::log2(all[c]) / f.by;
        if (c < count && f.chooses)
          ranks[c * Kkp + j] = bias[c * Kkp + j] * f.a.scale + f.losses[at];
        all[c] = 1.f / all[c];
      }
      for (i64 t = 0; t < bk; t++)
#pragma omp simd
        for (i64 c = 0; c < columns; c++) shares[t * columns + c] *= all[c];
      turn(shares, columns, bkp, columns, turned, bkp);
      const T* right = PAIR<T> > 1 ? f.pairs + at * bkp * Dp : rows;
      product(up(count, EVEN<T>), Dp, up(bk, EVEN<T>), turned, bkp, right, Dp, pooled, Dp, false);
      for (i64 g = 0; g < count; g++) keep_key(bh, j, g, means + g * Dp);
      if (f.attends) pool_values(at);
    }

    // The values of block `at`, pooled by `shares`.
    void pool_values(i64 at) {
      if constexpr (PAIR<T> > 1) {
        // As the products read them: weights along pairs of rows.
        std::vector<T> rounded(2 * columns);
        for (i64 t = 0; t < bkp; t += 2) {
          for (i64 i = 0; i < 2; i++)
            store(rounded.data() + i * columns, shares + (t + i) * columns, columns);
          pair_up(rounded.data(), rounded.data() + columns, columns, share_pairs + t * columns);
        }
      }
      product(D, columns, up(f.bk, EVEN<T>), f.values + at * bkp * Dl, bkp, share_pairs, columns,
              some_values + at % Kk % LANES * D * columns, columns, false);
    }

    // The pooled key of block j for query block g, and what belongs to it. Of bf16 the bias takes
    // off the product with the mean query of the key as it was rounded: what is lost by that weighs
    // as much as a query is off the mean.
    void keep_key(i64 bh, i64 j, i64 g, const T* query) {
      const float* from = pooled + g * Dp;
      T* to = keys + g * each_key + j * Dp;
      store(to, from, Dp);
      if constexpr (PAIR<T> > 1) bias[g * Kkp + j] -= dot_of(to, query, D);
      if (!f.curved) return;
      // The variance of the keys under the shares as they were multiplied, whose sum is not 1 in
      // bf16; a difference that rounds below 0 would be multiplied by the square of the scale.
      const float *weight = f.weight.data() + bh * D, *squares = f.squares + bh * f.a.S + j * f.bk;
      const T* share = turned + g * bkp;
      float sum = 0.f, all = 0.f;
#pragma omp simd reduction(+ : sum, all)
      for (i64 t = 0; t < f.bk; t++) {
        all += load(share + t);
        sum += load(share + t) * squares[t];
      }
      float off = distance(from, 1.f / all, f.centres + (bh * Kk + j) * Dp, weight, D);
      spans[g * Kkp + j] = std::max(0.f, sum / all - off);
    }

    // Query block i, number g of its group.
    void block(i64 bh, i64 i, i64 g) {
      if (!f.held_q[i]) return;
      begin(bh, i);
      if (pools(bh, i)) {
        for (i64 j = 0; j < Kk; j += CHUNK) {
          i64 n = std::min(CHUNK, Kk - j);
          const T* right = PAIR<T> > 1 ? q : around;
          product(n, R, Dp, keys + g * each_key + j * Dp, Dp, right, R, all_scores + j * R, R,
                  false);
        }
        gained(g);
        if (f.by_shares) rank(bh, i, g);
        if (f.chooses) choose(bh, i, g);
      }
      if (!f.attends) return;
      const uint8_t* keep = f.keep(bh, i);
      bool any = false;
      for (i64 j = 0; j < Kk; j++) any |= left[j] = held[j] && !keep[j];
      kept.clear();
      for (i64 j = 0; j < Kk; j++)
        if (keep[j] && held[j]) kept.push_back(j);
      bool first = kept.empty();
      if (f.by_bytes && !first) multiply_bytes(bh, i);
      for (size_t n = 0; n < kept.size() && !f.by_bytes; n++) {
        i64 j = kept[n];
        Ahead ahead;
        if (n + 1 < kept.size()) {
          i64 next = bh * Kk + kept[n + 1];
          ahead.add(f.keys + next * bkp * Dp, bkp * Dp);
          ahead.add(f.values + next * bkp * Dl, D * bkp);
        }
        const uint8_t* seen = f.held_k[j] < f.bk ? f.real.data() + j * f.bk : nullptr;
        product(f.bk, R, Dp, f.keys + (bh * Kk + j) * bkp * Dp, Dp, q, R, scores, R, false);
        fold(scores, f.bk, seen, f.values + (bh * Kk + j) * bkp * Dl, bkp, n == 0, ahead);
      }
      std::copy(sum, sum + R, own);
      for (i64 j = 0; j < Kk && any; j += CHUNK) {
        i64 n = std::min(CHUNK, Kk - j);
        if (!std::count(left.begin() + j, left.begin() + j + n, 1)) continue;
        Ahead ahead;
        fold(all_scores + j * R, n, left.data() + j, values + g * each_value + j, Kkp, first, ahead);
        first = false;
      }
      end(bh, i, first, any);
    }

    // The softmax of query block i over its kept blocks, by products of 8 bits.
    void multiply_bytes(i64 bh, i64 i) {
      real_rows.clear();
      std::fill(out, out + Dl * R, 0.f);
      for (i64 r = 0; r < f.bq; r++) {
        if (!f.real[i * f.bq + r]) continue;
        std::copy_n(row + r * Dl, D, piece->exact + r * D);
        piece->begin(r);
        real_rows.push_back(r);
      }
      tiles(kept.data(), kept.size(), 0, f.padded.data(), Kk, f.bk, LANES, KEYS,
            [&](auto& parts, i64) {
              piece->tile(bh, real_rows.data(), real_rows.size(), parts, nullptr);
            });
      for (i64 r : real_rows) {
        level[r] = piece->high[r] / f.by;
        sum[r] = piece->sum[r] / STEPS;
        for (i64 d = 0; d < D; d++) out[d * R + r] = piece->o[r * f.laid.Dv + d] / STEPS;
      }
    }

    // Takes the key blocks that score best for query block i.
    void choose(i64 bh, i64 i, i64 g) {
      best.clear();
      for (i64 j = 0; j < Kk; j++) {
        float score = ranks[g * Kkp + j];
        if (f.a.ranked[j]) best.emplace_back(score == score ? -score : -INFINITY, j);
      }
      i64 count = std::min<i64>(f.a.counts[bh % f.a.H], best.size());
      if (count < i64(best.size()))
        std::nth_element(best.begin(), best.begin() + count, best.end());
      for (i64 n = 0; n < count; n++) f.a.chosen[(bh * f.Kq + i) * Kk + best[n].second] = 1;
    }

    // The mean of the queries' shares of key blocks, as they are pooled; scores by them.
    void rank(i64 bh, i64 i, i64 g) {
      Ahead none;
      i64 some = 0;
      std::fill(sum, sum + R, 0.f);
      for (i64 c = 0; c < R; c += LANES) {
        highest_of(all_scores + c, Kk, R, held.data(), level + c, top + c);
        weigh_lanes(all_scores + c, Kk, R, held.data(), top + c, f.by, sum + c, parts + c, none);
      }
      for (i64 r = 0; r < R; r++) {
        bool real = r < f.bq && f.real[i * f.bq + r];
        some += real;
        sum[r] = real ? 1.f / sum[r] : 0.f;
      }
      for (i64 j = 0; j < Kk; j++) {
        float share = std::log(dot(parts + j * R, sum, R) / some);
        if (f.weighs) f.a.shares[(bh * f.Kq + i) * Kk + j] = share;
        if (f.chooses) ranks[g * Kkp + j] = share + f.losses[bh * Kk + j];
      }
      std::fill(sum, sum + R, 0.f);
    }

    void begin(i64 bh, i64 i) {
      const float* mean = f.means + (bh * f.Kq + i) * Dp;
      std::fill(row + f.bq * Dl, row + R * Dl, 0.f);
      f.q.read(bh, i * f.bq, f.bq, row, Dl);
      for (i64 r = 0; r < R; r++) {
        float *x = row + r * Dl, *y = off + r * Dl, all = 0.f;
        bool some = r < f.bq && f.real[i * f.bq + r];
        for (i64 d = 0; d < D; d++) y[d] = some ? x[d] - mean[d] : 0.f;
        if (f.curved)
          for (i64 d = 0; d < D; d++) all += f.rises[bh * D + d] * y[d] * y[d];
        rise[r] = all;
        store(lines + r * Dp, x, Dp);
      }
      interleave_transposed(lines, Dp, Dp, R, R, q);
      std::fill(sum, sum + R, 0.f);
      std::fill(level, level + R, LOW);
      if (PAIR<T> > 1 && !f.sloped) return;
      for (i64 r = 0; r < R; r++) store(lines + r * Dp, off + r * Dl, Dp);
      interleave_transposed(lines, Dp, Dp, R, R, around);
    }

    // What the scores of pooled keys gain, in units of products.
    void gained(i64 g) {
      float most = f.a.most / f.a.scale;
      for (i64 j = 0; j < Kk; j++) {
        if (!held[j]) continue;
        float *s = all_scores + j * R, more = bias[g * Kkp + j];
        if (f.curved) {
          float span = spans[g * Kkp + j];
#pragma omp simd
          for (i64 r = 0; r < R; r++) {
            float by = span * rise[r];
            s[r] += more + (by < most ? by : most);
          }
        } else {
#pragma omp simd
          for (i64 r = 0; r < R; r++) s[r] += more;
        }
      }
    }

    // Scores of n keys: on to the answer. They may be overwritten.
    void fold(float* s, i64 n, const uint8_t* seen, const T* values, i64 ld, bool first,
              Ahead& ahead) {
      bool rises = false;
      T* to = PAIR<T> > 1 ? weights : reinterpret_cast<T*>(s);
      for (i64 c = 0; c < R; c += LANES) {
        highest_of(s + c, n, R, seen, level + c, top + c);
        for (i64 r = c; r < c + LANES; r++) rises |= (top[r] - level[r]) * f.by > RISE;
      }
      if (first) std::copy(top, top + R, level);
      else if (rises) lift();
      for (i64 c = 0; c < R; c += LANES)
        weigh_lanes(s + c, n, R, seen, level + c, f.by, sum + c, to + c * PAIR<T>, ahead);
      product(D, R, up(n, EVEN<T>), values, ld, to, R, out, R, !first);
    }

    // Raises the levels to `top`.
    void lift() {
      for (i64 r = 0; r < R; r++) {
        float by = exp2_of((level[r] - top[r]) * f.by);
        level[r] = top[r];
        top[r] = by;
        sum[r] *= by;
        own[r] *= by;
      }
      for (i64 d = 0; d < D; d++)
#pragma omp simd
        for (i64 r = 0; r < R; r++) out[d * R + r] *= top[r];
    }

    void end(i64 bh, i64 i, bool none, bool any) {
      if (none) std::fill(out, out + Dl * R, 0.f);
      bool adds = f.sloped && any;
      if (adds)
        product(D, R, Dp, f.slopes.data() + bh * Dl * Dp, Dp, around, R, gain, R, false);
      for (i64 r = 0; r < R; r++) {
        top[r] = sum[r] > 0.f || sum[r] != sum[r] ? 1.f / sum[r] : 0.f;
        own[r] = (1.f - own[r] * top[r]) * f.a.scale / f.a.N;
      }
      for (i64 d = 0; d < D; d++) {
        float *x = out + d * R, *more = gain + d * R;
        if (adds)
#pragma omp simd
          for (i64 r = 0; r < R; r++) x[r] = x[r] * top[r] + more[r] * own[r];
        else
#pragma omp simd
          for (i64 r = 0; r < R; r++) x[r] *= top[r];
      }
      turn(out, R, Dl, R, row, Dl);
      for (i64 r = 0; r < f.bq; r++) {
        i64 t = f.q.token(i * f.bq + r);
        if (t < 0) continue;
        i64 at = bh * f.a.N + t;
        store(static_cast<In*>(f.a.o) + at * D, row + r * Dl, D);
        f.a.total[at] =
            sum[r] == 0.f ? -INFINITY : (level[r] * f.by + std::log2(sum[r])) / LOG2E;
      }
    }
  };

  void run() {
    check_slots(a.slots, a.S, a.N);
    for (i64 h = 0; h < a.H && chooses; h++)
      check_within(a.counts[h], 0, Kk + 1, "a count of key blocks");
    static thread_local Room room;
    Arena arena;
    arena.want(keys, BH * Kk * bkp * Dp);
    arena.want(pairs, PAIR<T> > 1 ? BH * Kk * bkp * Dp : 0);
    arena.want(values, attends ? BH * Kk * bkp * Dl : 0);
    arena.want(means, BH * Kq * Dp);
    arena.want(centres, BH * Kk * Dp);
    arena.want(squares, curved ? BH * a.S : 0);
    arena.want(losses, chooses ? BH * Kk : 0);
    if (by_bytes) laid.want(arena, BH * Kk);
    arena.fill(room);
    queries();
    lay();
    each(BH * groups, [&] {
      return [worker = std::make_unique<Worker>(*this)](i64 n) mutable { (*worker)(n); };
    });
    room.trim();
  }
};

}  // namespace

extern "C" {

int gen_accel_one_pass_size() { return sizeof(OnePass); }

int gen_accel_one_pass(const OnePass* a, int dtype, int halves) {
  return guarded([&] {
    if (dtype == 1 && halves && multiplies_bf16()) Passed<BFloat16, BFloat16>{*a}.run();
    else with_type(dtype, [&](auto in) { Passed<decltype(in), float>{*a}.run(); });
  });
}
}
