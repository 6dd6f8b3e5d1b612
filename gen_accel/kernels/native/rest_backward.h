// The gradients of rest.cpp. What the forward pass pooled is made anew.

#pragma once

#include "rest.h"

namespace {

constexpr i64 SUMMED = 128;              // queries, summed up at once
constexpr i64 MOST_SUMS = i64(1) << 30;  // bytes of gradients of keys and values, of all threads

template <typename In, typename T>
struct Backward {
  RestProblem<In, T> p;
  Laid<In, T> laid{p, true};
  i64 length = (p.a.around_queries ? p.a.S : p.Kk) * p.D;  // of a head's sums
  i64 parts = some_parts();
  float *dk, *dv;  // (parts, B x H, length)
  float* dweight;  // (parts, B x H, D), where there is a curve

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
    std::vector<char> needed = std::vector<char>(chunk);  // key blocks of a chunk
    // Of the query blocks of a group: queries and what comes from above, in columns and as right
    // factors, log-sum-exps, and what is taken off the gradients of weights.
    T *q, *g, *q_pairs, *g_pairs;
    float *dq, *level, *delta;
    // What weights relative to `level` are divided by, and what is summed up while scores are
    // looked through.
    float *inverse, *sum, *mean;
    // Of a query block against a chunk.
    T *row, *weights, *slopes, *turned;
    float *scores, *above;
    // Of the pooled keys, pooled values and scores of a chunk, and of the mean queries.
    float *dkeys, *dvalues, *dlevel, *dmeans;
    // Of a curve: what the queries of a group rise by and its gradient, and of spans of a chunk.
    float *rise, *drise, *dspans;
    // Of a key block.
    T *low, *columns, *right, *both, *of_shares;
    float* dshares;

    explicit Worker(const Backward& backward) : f(backward) {
      static thread_local Room room;
      Arena arena;
      for (T** x : {&q, &g, &q_pairs, &g_pairs}) arena.want(*x, p.group * rows * p.Dp);
      arena.want(dq, p.group * rows * p.D);
      for (float** x : {&level, &delta, &inverse, &sum, &mean})
        arena.want(*x, p.group * rows);
      arena.want(row, rows * p.Dp);
      for (T** x : {&weights, &slopes, &turned}) arena.want(*x, rows * chunk);
      for (float** x : {&scores, &above}) arena.want(*x, rows * chunk);
      arena.want(dlevel, p.columns * chunk);
      for (float** x : {&rise, &drise}) arena.want(*x, p.curved ? p.group * rows : 0);
      arena.want(dspans, p.curved ? p.columns * chunk : 0);
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
      float* dweight = p.curved ? f.dweight + (part * p.BH + bh) * p.D : nullptr;
      if (p.a.around_queries) begin_pool(bh, first, count);
      bool vast = false;
      for (i64 n = 0; n < count; n++) vast |= begin(bh, first + n, n);
      if (vast) {
        for (i64 n = 0; n < count; n++) begin_look(bh, first + n, n);
        chunks(bh, first, count, [&](i64 j, i64 some) {
          for (i64 n = 0; n < count; n++)
            if (left.some[n]) look(n, some, tile(bh, n, j, some));
        });
        for (i64 n = 0; n < count; n++) settle(bh, first + n, n);
      }
      std::vector<char> touched(count);
      chunks(bh, first, count, [&](i64 j, i64 some) {
        for (i64 n = 0; n < count; n++) {
          if (!left.some[n]) {
            if (p.a.around_queries) nothing(n, some);
            continue;
          }
          if (p.a.around_queries) around_query(bh, n, j, some, !touched[n], dweight);
          else fold(n, some, tile(bh, n, j, some), dk + j * p.D, dv + j * p.D, p.D, !touched[n]);
          touched[n] = true;
        }
        for (i64 c = 0; c < some && p.a.around_queries; c++)
          if (needed[c]) unpool(bh, count, j + c, c, dk, dv, dweight);
      });
      for (i64 n = 0; n < count; n++) end(bh, first + n, n, touched[n], vast);
    }

    // Calls `f` with the first key block and the length of each chunk of which any is left out, the
    // keys pooled.
    template <typename F>
    void chunks(i64 bh, i64 first, i64 count, F&& f) {
      for (i64 j = 0; j < p.Kk; j += chunk) {
        i64 some = std::min(chunk, p.Kk - j);
        bool found = left.find(bh, first, count, j, some, [&](i64 c, bool any) {
          needed[c] = any;
          if (!p.a.around_queries) return;
          if (any) pool(bh, count, j + c, c);
          else pool.blank(count, c);
        });
        if (found) f(j, some);
      }
    }

    Tile<T> tile(i64 bh, i64 n, i64 j, i64 some) {
      return p.a.around_queries ? pool.tile(n, some) : f.laid.tile(bh, j);
    }

    // What a query's kept keys weigh it by, by log2(e); LOW where it sees none.
    float kept(i64 at) const {
      return p.a.lse[at] == -INFINITY ? LOW : p.a.lse[at] * LOG2E;
    }

    // Highest score, sum of weights and what comes from above by their means, anew, where `total`
    // says too little of them: see VAST. At first of the kept keys alone.
    void begin_look(i64 bh, i64 i, i64 n) {
      for (i64 r = 0; r < rows; r++) {
        i64 t = r < p.bq ? p.q.token(i * p.bq + r) : -1, at = bh * p.a.N + t, x = n * rows + r;
        sum[x] = mean[x] = 0.f;
        if (t < 0) continue;
        level[x] = kept(at);
        if (level[x] == LOW) continue;
        sum[x] = 1.f;
        mean[x] = dot_of(p.a.out + at * p.D, p.grad.row(bh, t), p.D);
      }
    }

    // Takes the pooled keys in that query block n leaves out.
    void look(i64 n, i64 some, const Tile<T>& tile) {
      const char* out = left.of(n);
      float *high = level + n * rows, *all = sum + n * rows, *by_mean = mean + n * rows;
      products(n, some, tile);
      std::vector<float> top(high, high + rows);
      for (i64 c = 0; c < some; c++)
        if (out[c]) scored(scores + c * rows, tile, c, n, top.data());
      for (i64 r = 0; r < rows; r++) {
        float before = exp2_of(high[r] - top[r]);
        all[r] *= before, by_mean[r] *= before, high[r] = top[r];
      }
      for (i64 c = 0; c < some; c++) {
        const float *s = scores + c * rows, *d = above + c * rows;
        for (i64 r = 0; r < rows && out[c]; r++) {
          float w = exp2_of(s[r] - high[r]);
          all[r] += w, by_mean[r] += w * d[r];
        }
      }
    }

    void settle(i64 bh, i64 i, i64 n) {
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r), x = n * rows + r;
        if (t < 0 || sum[x] == 0.f) continue;
        inverse[x] = 1.f / sum[x];
        delta[x] = mean[x] * inverse[x] - p.a.of_total[bh * p.a.N + t];
      }
    }

    // Takes query block i as number n of the group; whether its scores are vast.
    bool begin(i64 bh, i64 i, i64 n) {
      bool vast = false;
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
      std::fill(inverse + n * rows, inverse + (n + 1) * rows, 1.f);
      if (p.curved) {
        p.rises(bh, i, rise + n * rows);
        std::fill(drise + n * rows, drise + (n + 1) * rows, 0.f);
      }
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r), at = bh * p.a.N + t;
        if (t < 0) continue;
        level[n * rows + r] = p.a.total[at] * LOG2E;
        vast |= std::fabs(level[n * rows + r]) > VAST && p.a.total[at] != -INFINITY;
        const In* x = p.grad.row(bh, t);
        float sum = dot_of(static_cast<const In*>(p.a.o) + at * p.D, x, p.D);
        delta[n * rows + r] = sum - (p.a.gained ? p.a.gained[at] : 0.f) - p.a.of_total[at];
      }
      return vast;
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
      if (p.curved) std::fill(dspans + n * chunk, dspans + n * chunk + some, 0.f);
    }

    // Query block n against its pooled keys: their gradients, and what the mean query gets of the
    // scores, which lie around it.
    void around_query(i64 bh, i64 n, i64 j, i64 some, bool first, float* dweight) {
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
        if (p.curved) off_centre(bh, j + c, pool.keys + n * pool.apart + c * p.D, of_k,
                                 dspans[n * chunk + c], dweight);
      }
    }

    // What a span takes from the gradients of its pooled key and of the weight, by its own.
    void off_centre(i64 bh, i64 j, const float* key, float* of_k, float by, float* dweight) const {
      const float* centre = f.laid.centres + (bh * p.Kk + j) * p.Dp;
      const float* weight = p.a.weight + bh * p.D;
      for (i64 d = 0; d < p.D; d++) {
        float off = key[d] - centre[d];
        of_k[d] -= 2.f * by * weight[d] * off;
        dweight[d] -= by * off * off;
      }
    }

    // Query block n against `some` pooled keys: scores, and what comes from above by their values.
    void products(i64 n, i64 some, const Tile<T>& tile) {
      i64 at = n * rows * p.Dp;
      product(some, rows, p.Dp, tile.keys, p.Dp, q + at, rows, scores, rows, false);
      product(some, rows, p.Dp, tile.values, p.Dp, g + at, rows, above, rows, false);
    }

    // Scores of key c of a tile, by log2(e), in the place of products; the highest to `top`.
    void scored(float* s, const Tile<T>& tile, i64 c, i64 n, float* top) const {
      if (!tile.spans) raise(s, rows, p.by, tile.bias[c], top);
      else raise(s, rows, p.by, tile.bias[c], tile.spans[c] * LOG2E, rise + n * rows, p.most, top);
    }

    // Query block n against `some` pooled keys. The gradients of these, by scale, and of their
    // values go to (some, D); they are added where `add`.
    void fold(i64 n, i64 some, const Tile<T>& tile, float* of_k, float* of_v, bool add,
              bool first) {
      const char* out = left.of(n);
      i64 at = n * rows * p.Dp, wide = up(some, LANES);
      products(n, some, tile);
      std::vector<float> top(rows, LOW);
      for (i64 c = 0; c < wide; c++) {
        float *s = scores + c * rows, *d = above + c * rows;
        if (c < some && out[c]) {
          scored(s, tile, c, n, top.data());
          slope(s, d, n);
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
        if (tile.spans && c < some) of_span(d, tile.spans[c], n, dspans[n * chunk + c]);
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
    void slope(float* s, float* d, i64 n) const {
      const float *high = level + n * rows, *off = delta + n * rows, *by = inverse + n * rows;
#pragma omp simd
      for (i64 r = 0; r < rows; r++) {
        float x = s[r] - high[r];
        float w = exp2_of(x > 1.f ? 1.f : x) * by[r];
        d[r] = w * (d[r] - off[r]);
        s[r] = w;
      }
    }

    // From gradients of scores those of what the queries of block n rise by, and of the span.
    void of_span(const float* d, float span, i64 n, float& dspan) {
      const float* rises = rise + n * rows;
      float *to = drise + n * rows, sum = 0.f, more = span * LOG2E, most = p.most;
#pragma omp simd reduction(+ : sum)
      for (i64 r = 0; r < rows; r++) {
        float slope = more * rises[r] < most ? d[r] : 0.f;
        to[r] += span * slope;
        sum += rises[r] * slope;
      }
      dspan = sum;
    }

    // The gradients of key block j, number c of the chunk, and of the mean queries through it.
    void unpool(i64 bh, i64 count, i64 j, i64 c, float* dk, float* dv, float* dweight) {
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
      if (p.curved) unpool_spans(bh, j, c, dk + j * p.bk * p.D, dweight);
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

    // What spans give: to the gradients of shares, of keys off their centre and of the weight.
    void unpool_spans(i64 bh, i64 j, i64 c, float* dk, float* dweight) {
      const float *share = pool.shares + c * pool.each, *squares = f.laid.squares + bh * p.a.S;
      const float *centre = f.laid.centres + (bh * p.Kk + j) * p.Dp, *weight = p.a.weight + bh * p.D;
      for (i64 t = 0; t < p.bk; t++, share += p.columns) {
        i64 token = p.k.token(j * p.bk + t);
        if (token < 0) continue;
        float sum = 0.f, *x = dshares + t * p.columns;
        for (i64 n = 0; n < p.columns; n++) {
          float by = dspans[n * chunk + c];
          x[n] += by * squares[j * p.bk + t];
          sum += share[n] * by;
        }
        const In* key = p.k.row(bh, token);
        for (i64 d = 0; d < p.D; d++) {
          float off = load(key + d) - centre[d];
          dk[t * p.D + d] += 2.f * sum * weight[d] * off;
          dweight[d] += sum * off * off;
        }
      }
    }

    void narrow(const float* from, T* to) const {
      store(to, from, p.D);
      std::fill(to + p.D, to + p.Dp, T(0));
    }

    void end(i64 bh, i64 i, i64 n, bool touched, bool vast) {
      std::vector<float> x(p.D);
      for (i64 r = 0; r < p.bq; r++) {
        i64 t = p.q.token(i * p.bq + r), at = bh * p.a.N + t;
        if (t < 0) continue;
        const float *own = p.a.out + at * p.D, *dmean = dmeans + n * p.D;
        const float* slope = dq + (n * rows + r) * p.D;
        float share = std::exp(p.a.lse[at] - p.a.total[at]), even = 1.f / p.held_q[i];
        if (vast) share = exp2_of(kept(at) - level[n * rows + r]) * inverse[n * rows + r];
        if (!touched) share = 1.f;
        for (i64 d = 0; d < p.D; d++) {
          x[d] = touched ? p.a.scale * slope[d] : 0.f;
          if (touched && p.a.around_queries) x[d] += dmean[d] * even;
          p.a.dout[at * p.D + d] = share * load(p.grad.row(bh, t) + d);
        }
        store(static_cast<In*>(p.a.dq) + at * p.D, x.data(), p.D);
        float off = share > 0.f ? dot_of(own, p.grad.row(bh, t), p.D) - delta[n * rows + r] : 0.f;
        p.a.dlse[at] = touched ? share * off : p.a.of_total[at];
        if (p.curved) p.a.drise[at] = drise[n * rows + r];
      }
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    laid.want(arena);
    for (float** x : {&dk, &dv}) arena.want(*x, parts * p.BH * length);
    arena.want(dweight, p.curved ? parts * p.BH * p.D : 0);
    arena.fill(room);
    laid.fill();
    at::parallel_for(0, parts * p.BH * length, 1 << 14, [&](i64 begin, i64 end) {
      for (float* x : {dk, dv}) std::fill(x + begin, x + end, 0.f);
    });
    if (p.curved) std::fill(dweight, dweight + parts * p.BH * p.D, 0.f);
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
    if (p.curved) {
      i64 numbers = p.BH * p.D;
      std::copy(dweight, dweight + numbers, p.a.dweight);
      for (i64 n = numbers; n < parts * numbers; n++) p.a.dweight[n % numbers] += dweight[n];
    }
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

}  // namespace
