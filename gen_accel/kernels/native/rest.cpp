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

#include "rest_backward.h"

namespace {

template <typename In, typename T>
struct Forward {
  RestProblem<In, T> p;
  Laid<In, T> laid{p, false};
  std::vector<T> slopes;  // of each head, as the products read it

  // What the values of a head rise by with the query.
  const T* slope(i64 bh) const { return slopes.data() + bh * p.Dp * p.D; }

  void lay_slopes() {
    if (!p.a.slope) return;
    slopes.resize(p.BH * p.Dp * p.D);
    at::parallel_for(0, p.BH, 1, [&](i64 begin, i64 end) {
      std::vector<T> low(p.D * p.D);
      for (i64 bh = begin; bh < end; bh++) {
        store(low.data(), p.a.slope + bh * p.D * p.D, p.D * p.D);
        interleave(low.data(), p.D, p.D, p.Dp, p.D, slopes.data() + bh * p.Dp * p.D);
      }
    });
  }

  struct Worker {
    const Forward& f;
    const RestProblem<In, T>& p = f.p;
    i64 chunk = p.a.around_queries ? CHUNK : CHUNK_KEYS, rows = p.bqp;
    Pool<In, T> pool{f.laid, chunk};
    Left<RestProblem<In, T>> left{p, chunk};
    // Of the query blocks of a group: queries in columns, what is carried.
    T* q;
    float *o, *high, *sum, *kept, *rise;
    T *row, *weights;
    float *scores, *top, *sloped;

    explicit Worker(const Forward& forward) : f(forward) {
      static thread_local Room room;
      Arena arena;
      arena.want(q, p.group * rows * p.Dp);
      arena.want(o, p.group * rows * p.D);
      arena.want(high, p.group * rows);
      arena.want(sum, p.group * rows);
      arena.want(kept, p.group * rows);
      arena.want(rise, p.curved ? p.group * rows : 0);
      arena.want(row, rows * p.Dp);
      arena.want(weights, rows * chunk);
      arena.want(scores, chunk * rows);
      arena.want(top, rows);
      arena.want(sloped, p.a.slope ? rows * p.D : 0);
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
      if (p.curved) p.rises(bh, i, rise + g * rows);
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
      for (i64 c = 0; c < n; c++) {
        float* s = scores + c * rows;
        if (!out[c]) continue;
        if (tile.spans) raise(s, rows, p.by, tile.bias[c], tile.spans[c] * LOG2E, rise + g * rows, p.most,
                             top);
        else raise(s, rows, p.by, tile.bias[c], top);
      }
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

    // What the values of query block i gain for each query, where the rest weighs all.
    void rise_by_slope(i64 bh, i64 i, i64 g) {
      const float* mean = pool.means + g * p.Dp;
      std::vector<float> off(p.Dp);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r);
        std::fill(off.begin(), off.end(), 0.f);
        if (t >= 0) p.q.one(bh, t, off.data(), p.Dp);
        for (i64 d = 0; d < p.D && t >= 0 && p.a.around_queries; d++) off[d] -= mean[d];
        store(row + r * p.Dp, off.data(), p.Dp);
      }
      product(up(p.bq, EVEN<T>), p.D, p.Dp, row, p.Dp, f.slope(bh), p.D, sloped, p.D, false);
    }

    void end(i64 bh, i64 i, i64 g, bool touched) {
      if (p.a.slope && touched) rise_by_slope(bh, i, g);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r);
        if (t < 0) continue;
        i64 at = bh * p.a.N + t;
        if (!touched) {
          if (p.a.slope) p.a.shares[at] = 0.f;
          put(at, p.a.out + at * p.D);
          p.a.total[at] = p.a.lse[at];
          continue;
        }
        float *x = o + (g * rows + r) * p.D, all = sum[g * rows + r], inverse = 1.f / all;
        const float* own = p.a.out + at * p.D;
        float share = exp2_of(kept[g * rows + r] - high[g * rows + r]) * inverse;
        for (i64 d = 0; d < p.D; d++) x[d] = x[d] * inverse + own[d] * share;
        if (p.a.slope) {
          p.a.shares[at] = 1.f - share;
          float by = p.a.factor * (1.f - share);
          for (i64 d = 0; d < p.D; d++) x[d] += by * sloped[r * p.D + d];
        }
        put(at, x);
        p.a.total[at] = (high[g * rows + r] + std::log2(all)) / LOG2E;
      }
    }

    void put(i64 at, const float* x) {
      store(static_cast<In*>(p.a.o) + at * p.D, x, p.D);
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    laid.want(arena);
    arena.fill(room);
    laid.fill();
    lay_slopes();
    each(p.BH * p.groups, [&] {
      return [worker = Worker(*this)](i64 n) mutable { worker(n); };
    });
    room.trim();
  }
};

template <template <typename, typename> class Pass>
int dispatch_rest(const RestArgs& a, int dtype, bool halves) {
  return guarded([&] {
    check_slots(a.slots, a.S, a.N);
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
