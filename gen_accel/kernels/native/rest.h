// What both passes of rest.cpp share: a call, its keys laid out, and the pooling around the mean
// queries of a group of query blocks.
//
// Letters as in plan.py. Scores are to base 2, and lie with the queries in a row.

#pragma once

#include "common.h"

namespace {

constexpr i64 GROUP = 2 * LANES;  // query blocks whose mean queries are the columns of a product
constexpr i64 MOST_ROWS = 2048;   // queries of a group
constexpr i64 CHUNK = 16;  // key blocks at once
constexpr i64 CHUNK_KEYS = 64;  // the same around keys
static_assert(CHUNK % LANES == 0 && CHUNK_KEYS % LANES == 0);

struct RestArgs {
  const void *q, *k, *v, *grad;  // grad: of o
  const float *out, *lse, *of_total;  // of the kept keys; the gradient of `total`
  void* o;
  float* total;
  void *dq, *dk, *dv;
  float *dout, *dlse;
  const float *rise, *weight;  // (B, H, N) and (B, H, D), see curve.cpp; null without a curve
  float *drise, *dweight;
  i64 q_strides[3], k_strides[3], v_strides[3], grad_strides[3];
  const i64* slots;  // (S,), -1 for padding; null where slot = token
  const uint8_t* keep;  // (PB, PH, Kq, Kk), bools of any bytes
  i64 B, H, N, D, S, block_q, block_k, PB, PH;
  i64 around_queries;
  float scale;
  float most;  // that a curve adds to a score
  const float* slope;  // (B, H, D, D), H of `Rest`, see slope.cpp; null in zeroth order
  float* shares;       // (B, H, N), what the rest weighs; null likewise
  const float* gained;  // (B, H, N), what the slope adds to o, which is no part of the softmax,
                        // times grad; null likewise
  float factor;        // that the slope counts by
};

// x as the products read it, and what that is times y, summed.
inline float rounded_dot(const float* x, const float* y, i64 n, BFloat16* to) {
#ifdef __AVX512BF16__
  __m512 sum = _mm512_setzero_ps();
  for (i64 j = 0; j < n; j += 16) {
    __mmask16 mask = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
    __m256bh low = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + j));
    _mm256_mask_storeu_epi16(to + j, mask, (__m256i)low);
    __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)low), 16);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(bits), _mm512_maskz_loadu_ps(mask, y + j), sum);
  }
  return _mm512_reduce_add_ps(sum);
#else
  float sum = 0.f;
  store(to, x, n);
  for (i64 j = 0; j < n; j++) sum += load(to + j) * y[j];
  return sum;
#endif
}

// What both passes know of a call.
template <typename In, typename T>
struct RestProblem {
  const RestArgs& a;
  i64 Kq = a.S / a.block_q, Kk = a.S / a.block_k, D = a.D, bq = a.block_q, bk = a.block_k;
  i64 BH = a.B * a.H, Dp = up(D, PAIR<T>), bqp = up(bq, LANES), bkp = up(bk, LANES);
  i64 bke = up(bk, EVEN<T>);
  i64 group = a.around_queries ? std::clamp<i64>(MOST_ROWS / bq, 1, GROUP) : 1;
  i64 groups = (Kq + group - 1) / group;
  i64 columns = up(group, LANES);
  bool curved = a.rise != nullptr;
  float by = a.scale * LOG2E, most = a.most * LOG2E;
  Tokens<In> q{a.q, a.q_strides, a.slots, a.H, D}, k{a.k, a.k_strides, a.slots, a.H, D};
  Tokens<In> v{a.v, a.v_strides, a.slots, a.H, D}, grad{a.grad, a.grad_strides, a.slots, a.H, D};
  std::vector<i64> held_q = held(a.slots, a.S, bq), held_k = held(a.slots, a.S, bk);

  bool leaves_out(i64 bh, i64 i, i64 j) const {
    return !a.keep[(pattern_of(bh, a.H, a.PB, a.PH) * Kq + i) * Kk + j] && held_k[j];
  }

  // What the queries of block i rise by, bqp numbers.
  void rises(i64 bh, i64 i, float* to) const {
    std::fill(to, to + bqp, 0.f);
    for (i64 r = 0; r < bq; r++)
      if (i64 t = q.token(i * bq + r); t >= 0) to[r] = a.rise[bh * a.N + t];
  }
};

// Asks for n numbers before they are read.
template <typename T>
void ask(const T* from, i64 n) {
  for (i64 d = 0; d < n; d += 64 / i64(sizeof(T))) __builtin_prefetch(from + d, 0, 2);
}

// `raise` of common.h of scores that also gain `span` times what `rise` has for each, at most
// `most`.
inline void raise(float* x, i64 n, float by, float more, float span, const float* rise, float most,
                  float* top) {
#pragma omp simd
  for (i64 j = 0; j < n; j++) {
    float gained = span * rise[j];
    float y = x[j] * by + more + (gained < most ? gained : most);
    x[j] = y;
    top[j] = y > top[j] ? y : top[j];
  }
}

// Pooled keys and values of one query block, some key blocks in a row, as the products read them,
// and what their scores gain.
template <typename T>
struct Tile {
  const T *keys, *values, *key_pairs, *value_pairs;
  const float* bias;
  const float* spans;  // weighed variances; null without a curve
};

// Keys, or values, as the products read them: a left factor of Dp numbers a row, and a right factor
// of D. Around queries of all slots, of which a block has bke rows, around keys of block means.
template <typename In, typename T>
struct Side {
  const RestProblem<In, T>& p;
  const Tokens<In>& x;
  bool both;  // whether both factors are asked for, around queries; else the right one alone
  bool means = !p.a.around_queries;
  i64 length = means ? up(p.Kk, EVEN<T>) : p.Kk * p.bke;  // rows of a head
  // Tokens that lie as a left factor does are read there.
  bool lies = std::is_same_v<In, T> && !means && !x.slots && x.strides[2] == p.D && p.D == p.Dp;
  T *rows, *pairs;

  void want(Arena& arena) {
    bool reads = means || (!lies && (both || PAIR<T> == 1));
    arena.want(rows, reads ? p.BH * length * p.Dp : 0);
    arena.want(pairs, PAIR<T> > 1 ? p.BH * length * p.D : 0);
  }

  const T* left(i64 bh, i64 j) const {
    if (lies) return reinterpret_cast<const T*>(x.row(bh, j * p.bk));
    return rows + (bh * length + (means ? j : j * p.bke)) * p.Dp;
  }
  const T* right(i64 bh, i64 j) const {
    if (PAIR<T> == 1) return left(bh, j);
    return pairs + (bh * length + (means ? j : j * p.bke)) * p.D;
  }

  // `some`: memory of one block, or one mean.
  void lay(i64 bh, i64 j, std::vector<T>& some, std::vector<float>& mean) const {
    if (means) {
      mean_of(x, bh, j * p.bk, p.bk, p.held_k[j], mean.data(), p.Dp);
      store(const_cast<T*>(left(bh, j)), mean.data(), p.Dp);
      return;
    }
    bool kept = both || PAIR<T> == 1;
    T* to = const_cast<T*>(lies || kept ? left(bh, j) : some.data());
    if (!lies) x.read(bh, j * p.bk, p.bk, to, p.Dp);
    if (PAIR<T> > 1)
      interleave(to, p.Dp, p.bk, p.bke, p.D, const_cast<T*>(right(bh, j)));
  }

  // Of the means of a head, when they are there.
  void lay_all(i64 bh) const {
    T* to = const_cast<T*>(left(bh, 0));
    std::fill(to + p.Kk * p.Dp, to + length * p.Dp, T(0));
    if (PAIR<T> > 1) interleave(to, p.Dp, p.Kk, length, p.D, const_cast<T*>(right(bh, 0)));
  }
};

template <typename In, typename T>
struct Laid {
  const RestProblem<In, T>& p;
  bool backward;
  Side<In, T> keys{p, p.k, true}, values{p, p.v, backward};
  std::vector<float> bias = std::vector<float>(p.Kk);  // of the scores with the mean of each block
  // Of a curve: what each slot is off the mean of its block, squared and weighed, and the means.
  float *squares, *centres;

  void want(Arena& arena) {
    keys.want(arena);
    values.want(arena);
    arena.want(squares, p.curved ? p.BH * p.a.S : 0);
    arena.want(centres, p.curved ? p.BH * p.Kk * p.Dp : 0);
  }

  void fill() {
    at::parallel_for(0, p.BH * p.Kk, 1, [&](i64 begin, i64 end) {
      std::vector<T> some(p.bk * p.Dp);
      std::vector<float> mean(p.Dp);
      for (i64 n = begin; n < end; n++) {
        for (auto* x : {&keys, &values}) x->lay(n / p.Kk, n % p.Kk, some, mean);
        if (p.curved) centre(n / p.Kk, n % p.Kk);
      }
    });
    if (p.a.around_queries) return;
    for (i64 j = 0; j < p.Kk; j++) bias[j] = std::log2(std::max<float>(p.held_k[j], 1));
    for (i64 bh = 0; bh < p.BH; bh++)
      for (auto* x : {&keys, &values}) x->lay_all(bh);
  }

  void centre(i64 bh, i64 j) const {
    float *mean = centres + (bh * p.Kk + j) * p.Dp, *to = squares + bh * p.a.S + j * p.bk;
    mean_of(p.k, bh, j * p.bk, p.bk, p.held_k[j], mean, p.Dp);
    for (i64 s = 0; s < p.bk; s++) {
      i64 t = p.k.token(j * p.bk + s);
      to[s] = t < 0 ? 0.f : distance(p.k.row(bh, t), 1.f, mean, p.a.weight + bh * p.D, p.D);
    }
  }

  // From block j on, where these are means.
  Tile<T> tile(i64 bh, i64 j) const {
    return {keys.left(bh, j), values.left(bh, j), keys.right(bh, j), values.right(bh, j),
            bias.data() + j, nullptr};
  }
};

// Key blocks pooled around the mean queries of a group, a chunk of them at once.
template <typename In, typename T>
struct Pool {
  const Laid<In, T>& laid;
  i64 chunk;
  const RestProblem<In, T>& p = laid.p;
  i64 each = laid.backward ? p.bkp * p.columns : 0;  // numbers of `shares` from block to block
  // Of pooled keys from query block to query block: no power of two, or they would take the same
  // places of a cache.
  i64 apart = chunk * p.D + 2 * LANES;
  float *means, *shares, *keys, *values, *level, *bias, *spans;
  T *turned, *weights, *low_keys, *low_values, *pairs;

  void want(Arena& arena) {
    arena.want(means, p.columns * p.Dp);  // as the products read them
    arena.want(turned, p.columns * p.Dp);
    // (chunk, bkp, columns), what each token of a block has in its pooled key; forward of one block
    arena.want(shares, std::max<i64>(p.bkp * p.columns, chunk * each));
    arena.want(weights, p.columns * p.bkp);
    for (float** x : {&keys, &values}) arena.want(*x, p.columns * apart);
    arena.want(level, p.columns * chunk);
    arena.want(bias, chunk);
    arena.want(spans, p.curved ? p.columns * chunk : 0);
    if (PAIR<T> == 1) return;
    for (T** x : {&low_keys, &low_values, &pairs}) arena.want(*x, chunk * p.Dp);
  }

  // Takes the mean queries of `count` query blocks from `first` on.
  void begin(i64 bh, i64 first, i64 count) {
    std::vector<T> rows(p.columns * p.Dp, T(0));
    std::fill(means, means + p.columns * p.Dp, 0.f);
    for (i64 g = 0; g < count; g++) {
      float* mean = means + g * p.Dp;
      mean_of(p.q, bh, (first + g) * p.bq, p.bq, p.held_q[first + g], mean, p.Dp);
      store(rows.data() + g * p.Dp, mean, p.Dp);
      for (i64 d = 0; d < p.Dp; d++) mean[d] = load(rows.data() + g * p.Dp + d);
    }
    interleave_transposed(rows.data(), p.Dp, p.Dp, p.columns, p.columns, turned);
  }

  // Pools key block j as number c of the chunk.
  void operator()(i64 bh, i64 count, i64 j, i64 c) {
    i64 wide = p.columns;
    float *s = shares + c * each, top[GROUP], sum[GROUP] = {}, inverse[GROUP];
    std::fill(top, top + wide, LOW);
    auto real = [&](i64 t) { return p.held_k[j] == p.bk || p.k.token(j * p.bk + t) >= 0; };
    // What is read next is asked for while a product runs.
    ask(laid.values.right(bh, j), p.bk * p.D);
    if (PAIR<T> > 1) ask(laid.keys.right(bh, j), p.bk * p.D);
    const T* rows = laid.keys.left(bh, j);
    product(p.bk, wide, p.Dp, rows, p.Dp, turned, wide, s, wide, false);
    for (i64 t = 0; t < p.bk; t++)
      if (real(t)) raise(s + t * wide, wide, p.by, 0.f, top);
    for (i64 t = 0; t < p.bk; t++) {
      if (real(t)) weigh_columns(s + t * wide, wide, top, sum, PAIR<T> > 1);
      else std::fill(s + t * wide, s + (t + 1) * wide, 0.f);
    }
    std::fill(s + p.bk * wide, s + p.bkp * wide, 0.f);
    for (i64 g = 0; g < wide; g++) inverse[g] = 1.f / sum[g];
    for (i64 g = 0; g < count; g++) level[g * chunk + c] = top[g] + std::log2(sum[g]);
    for (i64 t = 0; t < p.bk; t++)
      for (i64 g = 0; g < wide; g++) s[t * wide + g] *= inverse[g];
    turn(s, wide, p.bkp, wide, weights, p.bkp);
    if (j + 1 < p.Kk) ask(laid.keys.left(bh, j + 1), p.bk * p.Dp);
    for (bool is_key : {true, false}) {
      const T* right = (is_key ? laid.keys : laid.values).right(bh, j);
      float* to = (is_key ? keys : values) + c * p.D;
      product(up(count, EVEN<T>), p.D, p.bke, weights, p.bkp, right, p.D, to, apart, false);
    }
    if (p.curved) span(bh, count, j, c);
  }

  // The variance of the keys of block j under the shares of each mean query, weighed. Of the shares
  // as the product read them, whose sum is not 1 in bf16. A difference that rounds below 0 would be
  // multiplied by the square of the scale.
  void span(i64 bh, i64 count, i64 j, i64 c) {
    const float *squares = laid.squares + bh * p.a.S + j * p.bk, *weight = p.a.weight + bh * p.D;
    const float* mean = laid.centres + (bh * p.Kk + j) * p.Dp;
    for (i64 g = 0; g < count; g++) {
      const T* share = weights + g * p.bkp;
      float sum = 0.f, all = 0.f;
#pragma omp simd reduction(+ : sum, all)
      for (i64 t = 0; t < p.bk; t++) {
        all += load(share + t);
        sum += load(share + t) * squares[t];
      }
      float off = distance(keys + g * apart + c * p.D, 1.f / all, mean, weight, p.D);
      spans[g * chunk + c] = std::max(0.f, sum / all - off);
    }
  }

  // Number c of the chunk, of which nobody asks: numbers that do no harm.
  void blank(i64 count, i64 c) {
    for (i64 g = 0; g < count; g++) {
      i64 at = g * apart + c * p.D;
      for (float* x : {keys, values}) std::fill(x + at, x + at + p.D, 0.f);
      level[g * chunk + c] = 0.f;
      if (p.curved) spans[g * chunk + c] = 0.f;
    }
  }

  // Takes the mean off (bq, Dp) queries of query block g: of fp32 that is exact enough to come
  // first, of bf16 see `tile`.
  void center(i64 g, T* rows) const {
    if constexpr (PAIR<T> == 1)
      for (i64 r = 0; r < p.bq; r++)
        for (i64 d = 0; d < p.D; d++) rows[r * p.Dp + d] -= means[g * p.Dp + d];
  }

  // n of the chunk for query block g, until the next one is asked for. In bf16 the bias takes the
  // product with the mean query off, of the pooled key as it was rounded: what is lost by that
  // weighs as much as a query is off the mean.
  Tile<T> tile(i64 g, i64 n) {
    float *k = keys + g * apart, *v = values + g * apart;
    const float *mean = means + g * p.Dp, *curve = p.curved ? spans + g * chunk : nullptr;
    if constexpr (PAIR<T> == 1) {
      return {k, v, k, v, level + g * chunk, curve};
    } else {
      for (i64 c = 0; c < n; c++) {
        T *low = low_keys + c * p.Dp, *value = low_values + c * p.Dp;
        bias[c] = level[g * chunk + c] - p.by * rounded_dot(k + c * p.D, mean, p.D, low);
        store(value, v + c * p.D, p.D);
        std::fill(low + p.D, low + p.Dp, T(0));
        std::fill(value + p.D, value + p.Dp, T(0));
      }
      interleave(laid.backward ? low_keys : low_values, p.Dp, n, up(n, EVEN<T>), p.D, pairs);
      return {low_keys, low_values, pairs, pairs, bias, curve};
    }
  }
};

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

}  // namespace
