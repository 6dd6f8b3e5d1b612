// Block-sparse attention on the CPU, forward and backward: FlashAttention over lists of key blocks.
//
// Keys and values are laid out once a head as the products read them. Then a thread takes a piece
// of a query block, or of token-routed queries those that picked a group, and runs over its key
// blocks in tiles that stay in its cache, with the softmax carried from tile to tile. Products are
// those of torch's oneDNN: of bf16 where the processor multiplies it faster, else of fp32.
//
// Called through ctypes. Letters as in plan.py and blocks.h.

#include "blocks.h"

#include <numeric>

namespace {

constexpr i64 COLS = 512;        // keys of a tile
constexpr i64 SUMMED = 256;      // of them, summed up at once
constexpr i64 WIDE = COLS + 16;  // room of a row of scores
constexpr i64 MOST_SUMS = i64(1) << 30;  // bytes of gradients of keys and values, of all threads

// The highest score of a query, unless it saw nothing: then any number far above LOW, which it has.
inline float shown(float high) { return high > LOW / 2 ? high : 0.f; }

// Rows of a product of compressed queries: few shapes, few kernels.
template <typename T>
constexpr i64 STEP = sizeof(T) == 2 ? 16 : 8;

// Columns of one, in the backward pass.
constexpr i64 COLUMNS = 32;

template <typename In, typename T>
struct Forward {
  Problem<In, T> p;
  T *keys, *values;  // of each head and block: K transposed (Dp, bkp) and V (bkp, D), interleaved

  explicit Forward(const Args& a) : p(a) {}

  struct Worker {
    const Forward& f;
    const Problem<In, T>& p = f.p;
    i64 most = p.a.picks ? ROUTED : up(std::min(ROWS, p.a.block_q), EVEN<T>);
    i64 step = p.together ? PAIR<T> : EVEN<T>;   // columns of a part
    i64 step_q = p.a.picks ? STEP<T> : EVEN<T>;  // rows of a product
    T *q, *some_q, *weights, *some_keys, *some_values;
    float *scores, *o, *some_o, *high, *sum, *before, *excess;
    std::vector<uint16_t> rows;  // from the slot of a piece on
    Seeing seeing{p.a.picks ? p.a.C : 0, ROUTED};

    explicit Worker(const Forward& forward) : f(forward), rows(most) {
      static thread_local Room room;
      Arena arena;
      i64 stripe = std::min(ROWS, most), some = p.a.picks ? stripe : 0;
      arena.want(q, most * p.Dp);
      arena.want(some_q, some * p.Dp);
      arena.want(weights, stripe * WIDE);
      arena.want(some_keys, COLS * p.Dp);
      arena.want(some_values, COLS * p.D);
      arena.want(scores, stripe * WIDE);
      arena.want(o, most * p.D);
      arena.want(some_o, some * p.D);
      arena.want(high, most);
      arena.want(sum, most);
      arena.want(before, most);
      arena.want(excess, COLS);
      arena.fill(room);
    }
    Worker(const Worker&) = delete;
    ~Worker() { finish(q); }

    void operator()(i64 bh, i64 slot, i64 count) {
      if (p.a.picks) {
        p.rows(p.q, bh, slot, count, q);
        start(count);
        seeing.look(p.picks(bh) + slot * p.a.C, count);
        for (i64 g = 0; g < p.a.C; g++) routed(bh, slot, g);
        for (i64 i = 0; i < count; i++) rows[i] = i;
      } else {
        i64 block = slot / p.a.block_q, masked, held = 0;
        for (i64 i = 0; i < count; i++) {
          i64 t = p.token(slot + i);
          if (t < 0) continue;
          if (p.a.slots && i + AHEAD < count) foresee(p.q, bh, slot + i + AHEAD);
          p.row(p.q, bh, t, q + held * p.Dp);
          rows[held++] = i;
        }
        count = held;
        start(count);
        const i64* total = p.counts(bh, block, &masked);
        if (count)
          tiles(p.blocks(bh, block), *total, masked, nullptr, p.Kk, p.bk, step, COLS,
                [&](auto& parts, i64 width) {
                  tile(bh, slot, rows.data(), count, parts, width, q, p.gains(bh, block));
                });
      }
      for (i64 i = 0; i < count; i++) {
        i64 t = p.token(slot + rows[i]);
        if (t < 0) continue;
        float inverse = sum[i] > 0.f || sum[i] != sum[i] ? 1.f / sum[i] : 0.f;
        for (i64 d = 0; d < p.D; d++) o[i * p.D + d] *= inverse;
        answer<In>(p.a, bh, t, o + i * p.D, high[i] * p.by, sum[i]);
        // Kept apart: in their sum, the logsumexp, as much is rounded off as the highest is large.
        float* stats = p.a.stats + bh * p.a.N + t;
        stats[0] = inverse == 0.f ? 0.f : high[i];
        stats[p.BH * p.a.N] = inverse;
      }
    }

    void start(i64 count) {
      std::fill(q + count * p.Dp, q + up(count, EVEN<T>) * p.Dp, T(0));
      std::fill(o, o + up(count, EVEN<T>) * p.D, 0.f);
      std::fill(high, high + count, LOW);
      std::fill(sum, sum + count, 0.f);
    }

    // The queries of a piece that see a group, and its keys.
    void routed(i64 bh, i64 slot, i64 g) {
      const auto& blocks = p.members[g];
      if (blocks.empty()) return;
      for (i64 first = 0; first < seeing.found(g); first += ROWS) {
        const uint16_t* which = seeing.rows(g) + first;
        i64 count = std::min(ROWS, seeing.found(g) - first);
        for (i64 i = 0; i < count; i++)
          std::memcpy(some_q + i * p.Dp, q + which[i] * p.Dp, p.Dp * sizeof(T));
        std::fill(some_q + count * p.Dp, some_q + up(count, step_q) * p.Dp, T(0));
        tiles(blocks.data(), blocks.size(), 0, p.padded.data(), p.Kk, p.bk, step, COLS,
              [&](auto& parts, i64 width) {
                tile(bh, slot, which, count, parts, width, some_q, nullptr);
              });
      }
    }

    // Some queries against a tile. Row i of `some` is that of slot + which[i]; what is carried lies
    // at i, of routed queries at which[i].
    void tile(i64 bh, i64 slot, const uint16_t* which, i64 count, const std::vector<Part>& parts,
              i64 width, const T* some, const float* gains) {
      const T *K = f.keys + bh * p.Kk * p.bkp * p.Dp, *V = f.values + bh * p.Kk * p.bkp * p.D;
      scored(parts, width, count, some, K);
      bool routed = p.a.picks;
      i64 wide = p.together ? up(width, LANES) : width;
      // Before anything is read: what was just written in parts is slow to read whole.
      for (i64 i = 0; i < count; i++) {
        for (const Part& x : parts)
          for (i64 j = x.count; j < up(x.count, step); j++) scores[i * WIDE + x.column + j] = LOW;
        for (i64 j = width; j < wide; j++) scores[i * WIDE + j] = LOW;
      }
      for (i64 i = 0; i < count; i++) {
        float* s = scores + i * WIDE;
        for (const Part& x : parts) {
          float* t = s + x.column;
          if (!p.raw) dampen(t, x.count, p.a.scale, gains ? gains[x.block] : 1.f);
          if (!x.masked) continue;
          hide(p.a, slot + which[i], true, x.block * p.bk + x.first, x.count, excess);
          conceal(t, x.count, excess);
        }
        i64 at = routed ? which[i] : i;
        float top = highest(s, wide, high[at]);
        float total = weigh(s, wide, p.by, shown(top), weights + i * WIDE);
        before[i] = exp2_of((high[at] - top) * p.by);
        sum[at] = sum[at] * before[i] + total;
        high[at] = top;
        if (routed || before[i] == 1.f) continue;
        for (i64 d = 0; d < p.D; d++) o[i * p.D + d] *= before[i];
      }
      if (!routed) {
        weighed(parts, width, count, V, o, true);
        return;
      }
      for (i64 i = count; i < up(count, step_q); i++)
        std::fill(weights + i * WIDE, weights + i * WIDE + wide, T(0));
      weighed(parts, width, count, V, some_o, false);
      for (i64 i = 0; i < count; i++) {
        float *to = o + which[i] * p.D, *more = some_o + i * p.D, by = before[i];
#pragma omp simd
        for (i64 d = 0; d < p.D; d++) to[d] = to[d] * by + more[d];
      }
    }

    void scored(const std::vector<Part>& parts, i64 width, i64 count, const T* q, const T* K) {
      constexpr i64 P = PAIR<T>;
      i64 rows = up(count, step_q), wide = up(width, LANES);
      if (!p.together) {
        // What a product makes too much is in the place of the next one, or past the end.
        for (const Part& x : parts)
          product(rows, up(x.count, LANES), p.Dp, q, p.Dp,
                  K + x.block * p.bkp * p.Dp + x.first * P, p.bkp, scores + x.column, WIDE, false);
        return;
      }
      for (const Part& x : parts)
        for (i64 d = 0; d < p.Dp / P; d++)
          copy(K + x.block * p.bkp * p.Dp + d * p.bkp * P, up(p.bk, P) * P,
               some_keys + (d * wide + x.column) * P);
      product(rows, wide, p.Dp, q, p.Dp, some_keys, wide, scores, WIDE, false);
    }

    void weighed(const std::vector<Part>& parts, i64 width, i64 count, const T* V, float* o,
                 bool add) {
      i64 rows = up(count, step_q), some = up(width, EVEN<T>);
      if (!p.together) {
        for (const Part& x : parts)
          product(rows, p.D, up(x.count, step), weights + x.column, WIDE,
                  V + (x.block * p.bkp + x.first) * p.D, p.D, o, p.D, add || x.column > 0);
        return;
      }
      for (const Part& x : parts)
        std::memcpy(some_values + x.column * p.D, V + x.block * p.bkp * p.D,
                    up(p.bk, PAIR<T>) * p.D * sizeof(T));
      std::fill(some_values + width * p.D, some_values + some * p.D, T(0));
      // A long sum in a row rounds off more than its parts do.
      for (i64 j = 0; j < some; j += SUMMED)
        product(rows, p.D, std::min(SUMMED, some - j), weights + j, WIDE, some_values + j * p.D,
                p.D, o, p.D, add || j > 0);
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    arena.want(keys, p.BH * p.Kk * p.bkp * p.Dp);
    arena.want(values, p.BH * p.Kk * p.bkp * p.D);
    arena.fill(room);
    at::parallel_for(0, p.BH * p.Kk, 1, [&](i64 begin, i64 end) {
      std::vector<T> rows(p.bk * p.Dp);
      for (i64 n = begin; n < end; n++) {
        i64 bh = n / p.Kk, slot = n % p.Kk * p.bk;
        p.rows(p.k, bh, slot, p.bk, rows.data());
        interleave_transposed(rows.data(), p.Dp, p.Dp, p.bk, p.bkp, keys + n * p.bkp * p.Dp);
        p.rows(p.v, bh, slot, p.bk, rows.data());
        interleave(rows.data(), p.Dp, p.bk, p.bkp, p.D, values + n * p.bkp * p.D);
      }
    });
    Pieces pieces(p, p.a.picks ? ROUTED : ROWS);
    each(p.BH * pieces.per_head, [&] {
      return [&, worker = Worker(*this)](i64 n) mutable {
        pieces.with(n % pieces.per_head,
                    [&](i64 slot, i64 count) { worker(n / pieces.per_head, slot, count); });
      };
    });
    room.trim();
  }
};

// Scores are made anew, keys along rows and queries along columns, so that a row of scores needs
// what is known of all queries side by side, and the products into dk and dv no transposition.
template <typename In, typename T>
struct Backward {
  Problem<In, T> p;
  T *keys, *values;  // (Kk, bk, Dp) of each head
  T* turned;         // (Kk, D, bkp) of each head: K transposed, rows
  float *dk, *dv;    // (parts, B x H, S, D)
  i64 parts;

  explicit Backward(const Args& a) : p(a) {
    // A part of the queries of a head adds into gradients of its own: as many as keep all busy.
    i64 threads = at::get_num_threads(), even = p.BH % threads == 0 || p.BH >= 4 * threads;
    i64 queries = p.a.S / (p.a.picks ? ROUTED : p.a.block_q) + 1, both = 8 * p.BH * p.a.S * p.D;
    parts = even ? 1 : (2 * threads + p.BH - 1) / p.BH;
    parts = std::max<i64>(1, std::min({parts, queries, MOST_SUMS / std::max<i64>(1, both)}));
  }

  // Queries of a piece and the key blocks that they all see, as `tiles` takes them.
  struct Seen {
    const uint16_t* rows;
    i64 count;
    const Block* blocks;
    i64 total, masked;
    const char* padded;
    const float* gains;
  };

  // Of the queries of a piece: highest score, sum of weights, and what comes from above, weighed.
  struct Levels {
    std::vector<float> high, sum, mean;
    explicit Levels(i64 count) : high(count, LOW), sum(count), mean(count) {}
  };

  struct Worker {
    const Backward& f;
    const Problem<In, T>& p = f.p;
    i64 most = up(p.a.picks ? ROWS : std::min(ROWS, p.a.block_q), COLUMNS);
    i64 M = 0;  // columns of what follows, queries and zeros
    T *q, *g, *out, *q_turned, *g_turned, *q_pairs, *g_pairs, *weights, *ds, *ds_pairs;
    float *scores, *above, *dq, *high, *inverse, *delta, *excess, *row;
    float *known_high, *known_inverse, *known_delta;  // of all queries of a piece
    std::vector<uint16_t> whole;  // the rows of a piece whose queries are not routed
    std::vector<i64> tokens;
    Seeing seeing{p.a.picks ? p.a.C : 0, ROUTED};

    explicit Worker(const Backward& backward) : f(backward), whole(most), tokens(most) {
      static thread_local Room room;
      Arena arena;
      for (T** x : {&q, &g, &out, &q_turned, &g_turned, &q_pairs, &g_pairs})
        arena.want(*x, most * p.Dp);
      for (T** x : {&weights, &ds, &ds_pairs}) arena.want(*x, COLS * most);
      arena.want(scores, COLS * most);
      arena.want(above, COLS * most);
      arena.want(dq, p.D * most);
      arena.want(high, most);
      arena.want(inverse, most);
      arena.want(delta, most);
      arena.want(excess, most);
      arena.want(row, p.D);
      for (float** x : {&known_high, &known_inverse, &known_delta})
        arena.want(*x, p.a.picks ? ROUTED : most);
      arena.fill(room);
      std::iota(whole.begin(), whole.end(), 0);
    }

    Worker(const Worker&) = delete;
    ~Worker() { finish(q); }

    void operator()(i64 bh, i64 part, i64 slot, i64 count) {
      bool vast = begin(bh, slot, count);
      if (vast) {
        Levels found(count);
        visit(bh, slot, count, [&](const Seen& seen) { look(bh, slot, seen, found); });
        settle(bh, slot, count, found);
      }
      visit(bh, slot, count, [&](const Seen& seen) { some(bh, part, slot, seen); });
    }

    // What is known of the queries of a piece; whether their scores are vast.
    bool begin(i64 bh, i64 slot, i64 count) {
      bool vast = false;
      for (i64 i = 0; i < count; i++) {
        known_high[i] = known_inverse[i] = known_delta[i] = 0.f;
        i64 t = p.token(slot + i), at = bh * p.a.N + t;
        if (t < 0) continue;
        const In* up = p.grad.row(bh, t);
        float sum = p.a.wide ? dot_of(static_cast<const float*>(p.a.out) + at * p.D, up, p.D)
                             : dot_of(static_cast<const In*>(p.a.out) + at * p.D, up, p.D);
        known_delta[i] = sum - (p.a.of_lse ? p.a.of_lse[at] : 0.f);
        known_high[i] = p.a.stats[at];
        known_inverse[i] = p.a.stats[p.BH * p.a.N + at];
        vast |= std::fabs(known_high[i] * p.by) > VAST;
      }
      return vast;
    }

    // Calls `f` with the queries of a piece and the key blocks that they see, some after others.
    template <typename F>
    void visit(i64 bh, i64 slot, i64 count, F&& f) {
      if (!p.a.picks) {
        i64 block = slot / p.a.block_q, masked;
        const i64* total = p.counts(bh, block, &masked);
        f(Seen{whole.data(), count, p.blocks(bh, block), *total, masked, nullptr,
               p.gains(bh, block)});
        return;
      }
      seeing.look(p.picks(bh) + slot * p.a.C, count);
      for (i64 g = 0; g < p.a.C; g++) {
        const auto& blocks = p.members[g];
        i64 found = seeing.found(g);
        for (i64 i = 0; i < found && !blocks.empty(); i += ROWS)
          f(Seen{seeing.rows(g) + i, std::min(ROWS, found - i), blocks.data(),
                 i64(blocks.size()), 0, p.padded.data(), nullptr});
      }
    }

    // Highest score, sum of weights and what comes from above by their means, anew: of vast scores
    // those of the forward pass, whose products are summed up in another order, are of others.
    void look(i64 bh, i64 slot, const Seen& x, Levels& found) {
      gather(bh, slot, x);
      std::vector<float> top(M, LOW), sum(M), mean(M);
      for (i64 i = 0; i < x.count; i++) {
        i64 r = x.rows[i];
        top[i] = found.high[r], sum[i] = found.sum[r], mean[i] = found.mean[r];
      }
      each_part(x, [&](const Part& part) {
        scored(bh, slot, x, part);
        std::vector<float> high = top;
        for (i64 j = 0; j < part.count; j++)
          raise(scores + part.column * M + j * M, M, 1.f, 0.f, high.data());
        for (i64 i = 0; i < M; i++) {
          float before = exp2_of((top[i] - high[i]) * p.by);
          sum[i] *= before, mean[i] *= before, top[i] = high[i];
        }
        for (i64 j = 0; j < part.count; j++) {
          const float *s = scores + (part.column + j) * M, *d = above + (part.column + j) * M;
          for (i64 i = 0; i < M; i++) {
            float w = exp2_of((s[i] - shown(top[i])) * p.by);
            sum[i] += w, mean[i] += w * d[i];
          }
        }
      });
      for (i64 i = 0; i < x.count; i++) {
        i64 r = x.rows[i];
        found.high[r] = top[i], found.sum[r] = sum[i], found.mean[r] = mean[i];
      }
    }

    void settle(i64 bh, i64 slot, i64 count, const Levels& found) {
      for (i64 i = 0; i < count; i++) {
        i64 t = p.token(slot + i);
        if (t < 0 || found.sum[i] == 0.f) continue;
        known_high[i] = found.high[i];
        known_inverse[i] = 1.f / found.sum[i];
        known_delta[i] = found.mean[i] / found.sum[i];
        if (p.a.of_lse) known_delta[i] -= p.a.of_lse[bh * p.a.N + t];
      }
    }

    // Rows of queries as the products read them.
    void gather(i64 bh, i64 slot, const Seen& x) {
      M = up(x.count, p.a.picks ? COLUMNS : LANES);
      for (i64 i = 0; i < M; i++) {
        tokens[i] = i < x.count ? p.token(slot + x.rows[i]) : -1;
        for (T* to : {q, g}) std::fill(to + i * p.Dp, to + (i + 1) * p.Dp, T(0));
        high[i] = inverse[i] = delta[i] = 0.f;
        if (tokens[i] < 0) continue;
        p.row(p.q, bh, tokens[i], q + i * p.Dp);
        p.row(p.grad, bh, tokens[i], g + i * p.Dp);
        i64 r = x.rows[i];
        high[i] = known_high[r], inverse[i] = known_inverse[r], delta[i] = known_delta[r];
      }
      interleave_transposed(q, p.Dp, p.Dp, M, M, q_turned);
      interleave_transposed(g, p.Dp, p.Dp, M, M, g_turned);
    }

    template <typename F>
    void each_part(const Seen& x, F&& f) {
      tiles(x.blocks, x.total, x.masked, x.padded, p.Kk, p.bk, EVEN<T>, COLS,
            [&](auto& cut, i64) {
              for (const Part& part : cut) f(part);
            });
    }

    // Some queries of a piece, and the key blocks that they see.
    void some(i64 bh, i64 part, i64 slot, const Seen& x) {
      gather(bh, slot, x);
      interleave(q, p.Dp, M, M, p.D, q_pairs);
      interleave(g, p.Dp, M, M, p.D, g_pairs);
      std::fill(dq, dq + p.D * M, 0.f);
      each_part(x, [&](const Part& cut) {
        scored(bh, slot, x, cut);
        fold(bh, part, cut, x.gains ? x.gains[cut.block] : 1.f);
      });
      In* to = static_cast<In*>(p.a.dq) + bh * p.a.N * p.D;
      for (i64 i = 0; i < x.count; i++) {
        if (tokens[i] < 0) continue;
        if (p.a.picks) {
          // Groups add up in a buffer of floats, see run().
          float* sum = f.dq_sums + (bh * p.a.N + tokens[i]) * p.D;
          for (i64 d = 0; d < p.D; d++) sum[d] += dq[d * M + i];
        } else {
          for (i64 d = 0; d < p.D; d++) row[d] = dq[d * M + i];
          store(to + tokens[i] * p.D, row, p.D);
        }
      }
    }

    // Scores of the keys of a part, and what comes from above by their values, (count, M) each.
    void scored(i64 bh, i64 slot, const Seen& seen, const Part& x) {
      i64 at = (bh * p.Kk * p.bk + x.block * p.bk + x.first) * p.Dp, from = x.column * M;
      product(x.count, M, p.Dp, f.keys + at, p.Dp, q_turned, M, scores + from, M, false);
      product(x.count, M, p.Dp, f.values + at, p.Dp, g_turned, M, above + from, M, false);
      for (i64 j = 0; j < x.count; j++) {
        float* s = scores + from + j * M;
        if (!p.raw)
          dampen(s, seen.count, p.a.scale, seen.gains ? seen.gains[x.block] : 1.f);
        if (!x.masked) continue;
        hide(p.a, x.block * p.bk + x.first + j, false, slot, seen.count, excess);
        conceal(s, seen.count, excess);
      }
    }

    // Their weights, and what these add to the gradients.
    void fold(i64 bh, i64 part, const Part& x, float gain) {
      float* dk = f.dk + (part * p.BH + bh) * p.a.S * p.D;
      float* dv = f.dv + (part * p.BH + bh) * p.a.S * p.D;
      i64 from = x.column * M;
      for (i64 j = 0; j < x.count; j++) {
        float *s = scores + from + j * M, *d = above + from + j * M;
        slopes(s, d, gain);
        store(weights + from + j * M, s, M);
        store(ds + from + j * M, d, M);
      }
      i64 keys = up(x.count, EVEN<T>);
      if (keys > x.count) std::fill(ds + from + x.count * M, ds + from + keys * M, T(0));
      const T* d = ds + from;
      if (PAIR<T> > 1) {
        for (i64 j = 0; j < keys; j += 2) pair_up(d + j * M, d + j * M + M, M, ds_pairs + j * M);
        d = ds_pairs;
      }
      const T* KT = f.turned + (bh * p.Kk + x.block) * p.D * p.bkp + x.first;
      product(p.D, M, keys, KT, p.bkp, d, M, dq, M, true);
      i64 row = (x.block * p.bk + x.first) * p.D;
      product(x.count, p.D, M, weights + from, M, g_pairs, p.D, dv + row, p.D, true);
      product(x.count, p.D, M, ds + from, M, q_pairs, p.D, dk + row, p.D, true);
    }

    // Scores to weights, 2^((s - high) by) over their sum, and what comes from above to the
    // gradients of the products.
    void slopes(float* s, float* d, float gain) const {
      float scale = p.a.scale, by = p.by;
#pragma omp simd
      for (i64 i = 0; i < M; i++) {
        float x = (s[i] - high[i]) * by;  // above 0 by what scores were rounded
        float w = exp2_of(x > 1.f ? 1.f : x) * inverse[i];
        float slope = s[i] > 0.f ? scale * gain : scale;
        d[i] = w * (d[i] - delta[i]) * slope;
        s[i] = w;
      }
    }
  };

  float* dq_sums = nullptr;  // (B x H, N, D), of token-routed queries

  void run() {
    static thread_local Room room;
    Arena arena;
    i64 all = p.BH * p.a.S * p.D, of_q = p.a.picks ? p.BH * p.a.N * p.D : 0;
    arena.want(keys, p.BH * p.a.S * p.Dp);
    arena.want(values, p.BH * p.a.S * p.Dp);
    arena.want(turned, p.BH * p.Kk * p.bkp * p.D);
    arena.want(dk, parts * all);
    arena.want(dv, parts * all);
    arena.want(dq_sums, of_q);
    arena.fill(room);
    at::parallel_for(0, p.BH * p.Kk, 1, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) {
        i64 bh = n / p.Kk, slot = n % p.Kk * p.bk;
        T *K = keys + n * p.bk * p.Dp, *KT = turned + n * p.D * p.bkp;
        p.rows(p.k, bh, slot, p.bk, K);
        p.rows(p.v, bh, slot, p.bk, values + n * p.bk * p.Dp);
        for (i64 d = 0; d < p.D; d++)
          for (i64 s = 0; s < p.bkp; s++) KT[d * p.bkp + s] = s < p.bk ? K[s * p.Dp + d] : T(0);
        for (i64 part = 0; part < parts; part++) {
          i64 first = part * all + n * p.bk * p.D;
          std::fill(dk + first, dk + first + p.bk * p.D, 0.f);
          std::fill(dv + first, dv + first + p.bk * p.D, 0.f);
        }
      }
    });
    std::fill(dq_sums, dq_sums + of_q, 0.f);
    work();
    at::parallel_for(0, p.BH * p.a.S, 64, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) {
        i64 bh = n / p.a.S, t = p.token(n % p.a.S);
        if (t < 0) continue;
        for (i64 part = 1; part < parts; part++)
          for (i64 d = n * p.D; d < (n + 1) * p.D; d++) {
            dk[d] += dk[part * all + d];
            dv[d] += dv[part * all + d];
          }
        i64 to = (bh * p.a.N + t) * p.D;
        store(static_cast<In*>(p.a.dk) + to, dk + n * p.D, p.D);
        store(static_cast<In*>(p.a.dv) + to, dv + n * p.D, p.D);
        if (of_q) store(static_cast<In*>(p.a.dq) + to, dq_sums + to, p.D);
      }
    });
    room.trim();
  }

  void work() {
    Pieces pieces(p, p.a.picks ? ROUTED : ROWS);
    each(p.BH * parts, [&] {
      return [&, worker = Worker(*this)](i64 n) mutable {
        i64 bh = n / parts, part = n % parts;
        for (i64 cut = part; cut < pieces.per_head; cut += parts)
          pieces.with(cut, [&](i64 slot, i64 count) { worker(bh, part, slot, count); });
      };
    });
  }
};

template <template <typename, typename> class Pass>
int dispatch(const Args& a, int dtype, bool halves) {
  return guarded([&] {
    if (dtype == 1 && halves && multiplies_bf16()) Pass<BFloat16, BFloat16>(a).run();
    else with_type(dtype, [&](auto in) { Pass<decltype(in), float>(a).run(); });
  });
}

}  // namespace

extern "C" {

int gen_accel_size() { return sizeof(Args); }

const char* gen_accel_error() { return gen_accel_failure.c_str(); }

// dtype: 0 fp32, 1 bf16, 2 fp16. halves: multiply bf16 as such. Not 0: it failed.
int gen_accel_forward(const Args* a, int dtype, int halves) {
  return dispatch<Forward>(*a, dtype, halves);
}
int gen_accel_backward(const Args* a, int dtype, int halves) {
  return dispatch<Backward>(*a, dtype, halves);
}
}
