// The rest of a plan on the CPU, forward and backward: each key block that a query block does not
// keep comes back as one pooled key and one pooled value, which continue the softmax of the kept
// keys. See `Rest` in plan.py for the mathematics.
//
// Pooled around keys, the mean keys and values of a head are made once. Around queries they belong
// to a pair of blocks: a thread takes a group of query blocks, pools a chunk of key blocks around
// all their mean queries by one product each, and runs each query block against its pooled keys
// and values while they are in its cache. Backward they are made anew.
//
// Called through ctypes.

#include "rest.h"

namespace {

constexpr i64 CHUNK = 16;  // key blocks at once
constexpr i64 CHUNK_KEYS = 64;  // the same around keys
constexpr i64 SUMMED = 128;     // queries, summed up at once
constexpr i64 MOST_SUMS = i64(1) << 30;  // bytes of gradients of keys and values, of all threads
static_assert(CHUNK % LANES == 0 && CHUNK_KEYS % LANES == 0);

// Who of a group leaves out what, chunk by chunk.
template <typename P>
struct Left {
  const P& p;
  i64 chunk;
  std::vector<char> who = std::vector<char>(GROUP * chunk);
  char some[GROUP];

  // Calls `one` with each of n key blocks from j on, by its number and whether any of `count`
  // query blocks from `first` on leaves it out. False where none is left out.
  template <typename F>
  bool find(i64 bh, i64 first, i64 count, i64 j, i64 n, F&& one) {
    std::vector<char> any(n);
    bool found = false;
    for (i64 g = 0; g < count; g++) {
      some[g] = false;
      for (i64 c = 0; c < n; c++) {
        bool out = p.leaves_out(bh, first + g, j + c);
        who[g * chunk + c] = out;
        some[g] |= out;
        any[c] |= out;
      }
      found |= some[g];
    }
    for (i64 c = 0; c < n && found; c++) one(c, any[c]);
    return found;
  }
  const char* of(i64 g) const { return who.data() + g * chunk; }
};

template <typename In, typename T>
struct Forward {
  RestProblem<In, T> p;
  Laid<In, T> laid{p, false};

  struct Worker {
    const Forward& f;
    const RestProblem<In, T>& p = f.p;
    i64 chunk = p.a.around_queries ? CHUNK : CHUNK_KEYS, rows = p.bqp;
    Pool<In, T> pool{f.laid, chunk};
    Left<RestProblem<In, T>> left{p, chunk};
    // Of the query blocks of a group: queries in columns, what is carried.
    T* q;
    float *o, *high, *sum, *kept;
    T *row, *weights;
    float *scores, *top;

    explicit Worker(const Forward& forward) : f(forward) {
      static thread_local Room room;
      Arena arena;
      arena.want(q, p.group * rows * p.Dp);
      arena.want(o, p.group * rows * p.D);
      arena.want(high, p.group * rows);
      arena.want(sum, p.group * rows);
      arena.want(kept, p.group * rows);
      arena.want(row, rows * p.Dp);
      arena.want(weights, rows * chunk);
      arena.want(scores, chunk * rows);
      arena.want(top, rows);
      if (p.a.around_queries) pool.want(arena);
      arena.fill(room);
    }
    Worker(const Worker&) = delete;
    ~Worker() { finish(q); }

    void operator()(i64 n) {
      i64 bh = n / p.groups, first = n % p.groups * p.group;
      i64 count = std::min(p.group, p.Kq - first);
      if (p.a.around_queries) pool.begin(bh, first, count);
      for (i64 g = 0; g < count; g++) begin(bh, first + g, g);
      std::vector<char> touched(count);
      for (i64 j = 0; j < p.Kk; j += chunk) {
        i64 some = std::min(chunk, p.Kk - j);
        bool found = left.find(bh, first, count, j, some, [&](i64 c, bool any) {
          if (!p.a.around_queries) return;
          if (any) pool(bh, count, j + c, c);
          else pool.blank(count, c);
        });
        for (i64 g = 0; g < count && found; g++) {
          if (!left.some[g]) continue;
          fold(g, some, p.a.around_queries ? pool.tile(g, some) : f.laid.tile(bh, j), !touched[g]);
          touched[g] = true;
        }
      }
      for (i64 g = 0; g < count; g++) end(bh, first + g, g, touched[g]);
    }

    void begin(i64 bh, i64 i, i64 g) {
      std::fill(row + p.bq * p.Dp, row + rows * p.Dp, T(0));
      p.q.read(bh, i * p.bq, p.bq, row, p.Dp);
      if (p.a.around_queries) pool.center(g, row);
      interleave_transposed(row, p.Dp, p.Dp, rows, rows, q + g * rows * p.Dp);
      float *level = high + g * rows, *all = sum + g * rows, *own = kept + g * rows;
      std::fill(level, level + rows, LOW);
      std::fill(all, all + rows, 0.f);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r);
        if (t < 0) continue;
        float lse = p.a.lse[bh * p.a.N + t];
        if (lse == -INFINITY) continue;
        level[r] = lse * LOG2E;
        all[r] = 1.f;
      }
      std::copy(level, level + rows, own);
    }

    // Query block g against n pooled keys.
    void fold(i64 g, i64 n, const Tile<T>& tile, bool first) {
      const char* out = left.of(g);
      float *to = o + g * rows * p.D, *level = high + g * rows, *all = sum + g * rows;
      product(n, rows, p.Dp, tile.keys, p.Dp, q + g * rows * p.Dp, rows, scores, rows, false);
      std::copy(level, level + rows, top);
      for (i64 c = 0; c < n; c++)
        if (out[c]) raise(scores + c * rows, rows, p.by, tile.bias[c], top);
      for (i64 r = 0; r < rows; r++) {
        level[r] = exp2_of(level[r] - top[r]);
        all[r] *= level[r];
      }
      for (i64 r = 0; r < p.bq && !first; r++) {
        float by = level[r];
        if (by == 1.f) continue;
        for (i64 d = 0; d < p.D; d++) to[r * p.D + d] *= by;
      }
      std::copy(top, top + rows, level);
      for (i64 c = 0; c < up(n, LANES); c++) {
        float* s = scores + c * rows;
        if (c < n && out[c]) weigh_columns(s, rows, top, all, PAIR<T> > 1);
        else std::fill(s, s + rows, 0.f);
      }
      turn(scores, rows, up(n, LANES), rows, weights, chunk);
      product(up(p.bq, EVEN<T>), p.D, up(n, EVEN<T>), weights, chunk, tile.value_pairs, p.D, to,
              p.D, !first);
    }

    void end(i64 bh, i64 i, i64 g, bool touched) {
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r);
        if (t < 0) continue;
        i64 at = bh * p.a.N + t;
        if (!touched) {
          put(at, p.a.out + at * p.D);
          p.a.total[at] = p.a.lse[at];
          continue;
        }
        float *x = o + (g * rows + r) * p.D, all = sum[g * rows + r], inverse = 1.f / all;
        const float* own = p.a.out + at * p.D;
        float share = exp2_of(kept[g * rows + r] - high[g * rows + r]) * inverse;
        for (i64 d = 0; d < p.D; d++) x[d] = x[d] * inverse + own[d] * share;
        put(at, x);
        p.a.total[at] = (high[g * rows + r] + std::log2(all)) / LOG2E;
      }
    }

    void put(i64 at, const float* x) {
      if (p.a.wide) store(static_cast<float*>(p.a.o) + at * p.D, x, p.D);
      else store(static_cast<In*>(p.a.o) + at * p.D, x, p.D);
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    laid.want(arena);
    arena.fill(room);
    laid.fill();
    each(p.BH * p.groups, [&] {
      return [worker = Worker(*this)](i64 n) mutable { worker(n); };
    });
    room.trim();
  }
};

template <typename In, typename T>
struct Backward {
  RestProblem<In, T> p;
  Laid<In, T> laid{p, true};
  i64 length = (p.a.around_queries ? p.a.S : p.Kk) * p.D;  // of a head's sums
  i64 parts = some_parts();
  float *dk, *dv;  // (parts, B x H, length)

  // A part of the query blocks of a head adds into gradients of its own: as many as keep all busy.
  i64 some_parts() const {
    i64 threads = at::get_num_threads(), even = p.BH % threads == 0 || p.BH >= 4 * threads;
    i64 wanted = even ? 1 : (2 * threads + p.BH - 1) / p.BH;
    return std::clamp<i64>(std::min(wanted, MOST_SUMS / (8 * p.BH * length + 1)), 1, p.groups);
  }

  struct Worker {
    const Backward& f;
    const RestProblem<In, T>& p = f.p;
    i64 chunk = p.a.around_queries ? CHUNK : CHUNK_KEYS, rows = p.bqp;
    Pool<In, T> pool{f.laid, chunk};
    Left<RestProblem<In, T>> left{p, chunk};
    // Of the query blocks of a group: queries and what comes from above, in columns and as right
    // factors, log-sum-exps, and what is taken off the gradients of weights.
    T *q, *g, *q_pairs, *g_pairs;
    float *dq, *level, *delta;
    // Of a query block against a chunk.
    T *row, *weights, *slopes, *turned;
    float *scores, *above;
    // Of the pooled keys, pooled values and scores of a chunk, and of the mean queries.
    float *dkeys, *dvalues, *dlevel, *dmeans;
    // Of a key block.
    T *low, *columns, *right, *both, *of_shares;
    float* dshares;

    explicit Worker(const Backward& backward) : f(backward) {
      static thread_local Room room;
      Arena arena;
      for (T** x : {&q, &g, &q_pairs, &g_pairs}) arena.want(*x, p.group * rows * p.Dp);
      arena.want(dq, p.group * rows * p.D);
      for (float** x : {&level, &delta}) arena.want(*x, p.group * rows);
      arena.want(row, rows * p.Dp);
      for (T** x : {&weights, &slopes, &turned}) arena.want(*x, rows * chunk);
      for (float** x : {&scores, &above}) arena.want(*x, rows * chunk);
      arena.want(dlevel, p.columns * chunk);
      if (p.a.around_queries) {
        pool.want(arena);
        for (float** x : {&dkeys, &dvalues}) arena.want(*x, p.columns * pool.apart);
        arena.want(dmeans, p.columns * p.D);
        for (T** x : {&low, &columns, &right}) arena.want(*x, 2 * p.columns * p.Dp);
        for (T** x : {&both, &of_shares}) arena.want(*x, 2 * p.columns * p.bkp);
        arena.want(dshares, p.columns * p.bkp);
      }
      arena.fill(room);
    }
    Worker(const Worker&) = delete;
    ~Worker() { finish(q); }

    void operator()(i64 bh, i64 part, i64 first) {
      i64 count = std::min(p.group, p.Kq - first), sums = (part * p.BH + bh) * f.length;
      float *dk = f.dk + sums, *dv = f.dv + sums;
      if (p.a.around_queries) begin_pool(bh, first, count);
      for (i64 n = 0; n < count; n++) begin(bh, first + n, n);
      std::vector<char> touched(count), needed(chunk);
      for (i64 j = 0; j < p.Kk; j += chunk) {
        i64 some = std::min(chunk, p.Kk - j);
        bool found = left.find(bh, first, count, j, some, [&](i64 c, bool any) {
          needed[c] = any;
          if (!p.a.around_queries) return;
          if (any) pool(bh, count, j + c, c);
          else pool.blank(count, c);
        });
        for (i64 n = 0; n < count && found; n++) {
          if (!left.some[n]) {
            if (p.a.around_queries) nothing(n, some);
            continue;
          }
          if (p.a.around_queries) around_query(n, some, !touched[n]);
          else fold(n, some, f.laid.tile(bh, j), dk + j * p.D, dv + j * p.D, p.D, !touched[n]);
          touched[n] = true;
        }
        for (i64 c = 0; c < some && found && p.a.around_queries; c++)
          if (needed[c]) unpool(bh, count, j + c, c, dk, dv);
      }
      for (i64 n = 0; n < count; n++) end(bh, first + n, n, touched[n]);
    }

    void begin(i64 bh, i64 i, i64 n) {
      for (bool of_q : {true, false}) {
        i64 to = n * rows * p.Dp;
        std::fill(row + p.bq * p.Dp, row + rows * p.Dp, T(0));
        (of_q ? p.q : p.grad).read(bh, i * p.bq, p.bq, row, p.Dp);
        if (of_q && p.a.around_queries) pool.center(n, row);
        interleave_transposed(row, p.Dp, p.Dp, rows, rows, (of_q ? q : g) + to);
        interleave(row, p.Dp, rows, rows, p.D, (of_q ? q_pairs : g_pairs) + to);
      }
      std::fill(level + n * rows, level + (n + 1) * rows, -LOW);
      std::fill(delta + n * rows, delta + (n + 1) * rows, 0.f);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r), at = bh * p.a.N + t;
        if (t < 0) continue;
        level[n * rows + r] = p.a.total[at] * LOG2E;
        const In* x = p.grad.row(bh, t);
        float sum = p.a.wide ? dot_of(static_cast<const float*>(p.a.o) + at * p.D, x, p.D)
                             : dot_of(static_cast<const In*>(p.a.o) + at * p.D, x, p.D);
        delta[n * rows + r] = sum - p.a.of_total[at];
      }
    }

    void begin_pool(i64 bh, i64 first, i64 count) {
      pool.begin(bh, first, count);
      std::fill(dmeans, dmeans + p.columns * p.D, 0.f);
      for (i64 n = count; n < p.columns; n++) nothing(n, chunk);
    }

    // Of a query block that leaves nothing of a chunk out.
    void nothing(i64 n, i64 some) {
      for (float* x : {dkeys, dvalues})
        std::fill(x + n * pool.apart, x + n * pool.apart + some * p.D, 0.f);
      std::fill(dlevel + n * chunk, dlevel + n * chunk + some, 0.f);
    }

    // Query block n against its pooled keys: their gradients, and what the mean query gets of the
    // scores, which lie around it.
    void around_query(i64 n, i64 some, bool first) {
      float *of_k = dkeys + n * pool.apart, *of_v = dvalues + n * pool.apart;
      float *mean = pool.means + n * p.Dp, *dmean = dmeans + n * p.D;
      Tile<T> tile = pool.tile(n, some);
      fold(n, some, tile, of_k, of_v, 0, first);
      for (i64 c = 0; c < some; c++, of_k += p.D) {
        float by = dlevel[n * chunk + c];
        const T* key = tile.keys + c * p.Dp;
        for (i64 d = 0; d < p.D; d++) {
          // In bf16 the queries were as they came, see `tile`.
          of_k[d] = p.a.scale * (PAIR<T> > 1 ? of_k[d] - by * mean[d] : of_k[d]);
          dmean[d] -= p.a.scale * by * load(key + d);
        }
      }
    }

    // Query block n against `some` pooled keys. The gradients of these, by scale, and of their
    // values go to (some, D); they are added where `add`.
    void fold(i64 n, i64 some, const Tile<T>& tile, float* of_k, float* of_v, bool add,
              bool first) {
      const char* out = left.of(n);
      i64 at = n * rows * p.Dp, wide = up(some, LANES);
      product(some, rows, p.Dp, tile.keys, p.Dp, q + at, rows, scores, rows, false);
      product(some, rows, p.Dp, tile.values, p.Dp, g + at, rows, above, rows, false);
      for (i64 c = 0; c < wide; c++) {
        float *s = scores + c * rows, *d = above + c * rows;
        if (c < some && out[c]) {
          slope(s, d, tile.bias[c], level + n * rows, delta + n * rows);
        } else {
          std::fill(s, s + rows, 0.f);
          std::fill(d, d + rows, 0.f);
        }
        store(weights + c * rows, s, rows);
        store(slopes + c * rows, d, rows);
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (i64 r = 0; r < rows; r++) sum += load(slopes + c * rows + r);
        dlevel[n * chunk + c] = sum;
      }
      // A long sum in a row rounds off more than its parts do.
      for (i64 r = 0; r < rows; r += SUMMED) {
        i64 few = std::min(SUMMED, rows - r), from = at + r * p.D;
        bool more = add || r > 0;
        product(some, p.D, few, slopes + r, rows, q_pairs + from, p.D, of_k, p.D, more);
        product(some, p.D, few, weights + r, rows, g_pairs + from, p.D, of_v, p.D, more);
      }
      turn(above, rows, wide, rows, turned, chunk);
      product(up(p.bq, EVEN<T>), p.D, up(some, EVEN<T>), turned, chunk, tile.key_pairs, p.D,
              dq + n * rows * p.D, p.D, !first);
    }

    // Scores to weights, and what comes from above to the gradients of the scores.
    void slope(float* s, float* d, float bias, const float* level, const float* delta) const {
      float by = p.by;
#pragma omp simd
      for (i64 r = 0; r < rows; r++) {
        float x = s[r] * by + bias - level[r];
        float w = exp2_of(x > 1.f ? 1.f : x);
        d[r] = w * (d[r] - delta[r]);
        s[r] = w;
      }
    }

    // The gradients of key block j, number c of the chunk, and of the mean queries through it.
    void unpool(i64 bh, i64 count, i64 j, i64 c, float* dk, float* dv) {
      i64 wide = p.columns;
      const T *keys = f.laid.keys.left(bh, j), *values = f.laid.values.left(bh, j);
      const float* share = pool.shares + c * pool.each;
      T* of_v = low + wide * p.Dp;
      for (i64 n = 0; n < wide; n++) {
        narrow(dkeys + n * pool.apart + c * p.D, low + n * p.Dp);
        narrow(dvalues + n * pool.apart + c * p.D, of_v + n * p.Dp);
      }
      interleave_transposed(low, p.Dp, p.Dp, wide, wide, columns);
      product(p.bk, wide, p.Dp, keys, p.Dp, columns, wide, dshares, wide,
              false);
      interleave_transposed(of_v, p.Dp, p.Dp, wide, wide, columns);
      product(p.bk, wide, p.Dp, values, p.Dp, columns, wide, dshares, wide,
              true);
      interleave(of_v, p.Dp, wide, wide, p.D, right);
      float sum[GROUP];
      for (i64 n = 0; n < wide; n++) sum[n] = -dlevel[n * chunk + c];
      for (i64 t = 0; t < p.bk; t++)
        for (i64 n = 0; n < wide; n++) sum[n] += share[t * wide + n] * dshares[t * wide + n];
      for (i64 t = 0; t < p.bk; t++) {
        float* x = dshares + t * wide;
        for (i64 n = 0; n < wide; n++) x[n] = p.a.scale * share[t * wide + n] * (x[n] - sum[n]);
        store(both + t * 2 * wide, share + t * wide, wide);
        store(both + t * 2 * wide + wide, x, wide);
      }
      std::fill(dshares + p.bk * wide, dshares + p.bkp * wide, 0.f);
      dk += j * p.bk * p.D;
      dv += j * p.bk * p.D;
      product(p.bk, p.D, wide, both, 2 * wide, right, p.D, dv, p.D, true);
      for (i64 n = 0; n < wide; n++) store(of_v + n * p.Dp, pool.means + n * p.Dp, p.Dp);
      interleave(low, p.Dp, 2 * wide, 2 * wide, p.D, right);
      product(p.bk, p.D, 2 * wide, both, 2 * wide, right, p.D, dk, p.D, true);
      turn(dshares, wide, p.bkp, wide, of_shares, p.bkp);
      product(up(count, EVEN<T>), p.D, p.bke, of_shares, p.bkp, f.laid.keys.right(bh, j), p.D,
              dmeans, p.D, true);
    }

    void narrow(const float* from, T* to) const {
      store(to, from, p.D);
      std::fill(to + p.D, to + p.Dp, T(0));
    }

    void end(i64 bh, i64 i, i64 n, bool touched) {
      std::vector<float> x(p.D);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r), at = bh * p.a.N + t;
        if (t < 0) continue;
        const float *own = p.a.out + at * p.D, *dmean = dmeans + n * p.D;
        const float* slope = dq + (n * rows + r) * p.D;
        float share = std::exp(p.a.lse[at] - p.a.total[at]), even = 1.f / p.held_q[i];
        if (!touched) share = 1.f;
        for (i64 d = 0; d < p.D; d++) {
          x[d] = touched ? p.a.scale * slope[d] : 0.f;
          if (touched && p.a.around_queries) x[d] += dmean[d] * even;
          p.a.dout[at * p.D + d] = share * load(p.grad.row(bh, t) + d);
        }
        store(static_cast<In*>(p.a.dq) + at * p.D, x.data(), p.D);
        float off = share > 0.f ? dot_of(own, p.grad.row(bh, t), p.D) - delta[n * rows + r] : 0.f;
        p.a.dlse[at] = touched ? share * off : p.a.of_total[at];
      }
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    laid.want(arena);
    for (float** x : {&dk, &dv}) arena.want(*x, parts * p.BH * length);
    arena.fill(room);
    laid.fill();
    at::parallel_for(0, parts * p.BH * length, 1 << 14, [&](i64 begin, i64 end) {
      for (float* x : {dk, dv}) std::fill(x + begin, x + end, 0.f);
    });
    each(p.BH * parts, [&] {
      return [&, worker = Worker(*this)](i64 n) mutable {
        for (i64 cut = n % parts; cut < p.groups; cut += parts)
          worker(n / parts, n % parts, cut * p.group);
      };
    });
    at::parallel_for(0, p.BH * p.a.S, 64, [&](i64 begin, i64 end) {
      std::vector<float> sum(p.D);
      for (i64 n = begin; n < end; n++) {
        write(n / p.a.S, n % p.a.S, dk, p.a.around_queries ? 1.f : p.a.scale, sum, p.a.dk);
        write(n / p.a.S, n % p.a.S, dv, 1.f, sum, p.a.dv);
      }
    });
    room.trim();
  }

  // What all parts add up to for a slot, times `by`; around keys the even share of the block's.
  void write(i64 bh, i64 slot, const float* sums, float by, std::vector<float>& sum,
             void* to) const {
    i64 t = p.k.token(slot), j = slot / p.bk, row = p.a.around_queries ? slot : j;
    if (t < 0) return;
    if (!p.a.around_queries) by /= p.held_k[j];
    std::fill(sum.begin(), sum.end(), 0.f);
    for (i64 part = 0; part < parts; part++)
      for (i64 d = 0; d < p.D; d++) sum[d] += sums[(part * p.BH + bh) * length + row * p.D + d];
    for (i64 d = 0; d < p.D; d++) sum[d] *= by;
    store(static_cast<In*>(to) + (bh * p.a.N + t) * p.D, sum.data(), p.D);
  }
};

template <template <typename, typename> class Pass>
int dispatch_rest(const RestArgs& a, int dtype, bool halves) {
  return guarded([&] {
    if (dtype == 1 && halves && multiplies_bf16()) Pass<BFloat16, BFloat16>{{a}}.run();
    else with_type(dtype, [&](auto in) { Pass<decltype(in), float>{{a}}.run(); });
  });
}

}  // namespace

extern "C" {

int gen_accel_rest_size() { return sizeof(RestArgs); }

int gen_accel_rest_forward(const RestArgs* a, int dtype, int halves) {
  return dispatch_rest<Forward>(*a, dtype, halves);
}
int gen_accel_rest_backward(const RestArgs* a, int dtype, int halves) {
  return dispatch_rest<Backward>(*a, dtype, halves);
}
}
