// Linear attention of each query block over its own set of key blocks, on the CPU, forward and
// backward: what linear.py says in torch, features included.
//
//   o = f(q) S / (eps + f(q) . z), S = sum f(k)^T v, z = sum f(k), over the blocks of the set
//
// A key block's S and z are made once, its "state". Those of a set are added up, or those that it
// leaves out taken from the sum of all, whichever are fewer. Products are fp32, sums of states fp64
// where that is needed.

#include "common.h"

namespace {

constexpr i64 AT_ONCE = i64(1) << 27;  // numbers of states that are held at once

enum Map { SOFTMAX, ELU, RELU };

struct Linear {
  const void *q, *k, *v, *grad;
  void *o, *dq, *dk, *dv;
  i64 q_strides[3], k_strides[3], v_strides[3], grad_strides[3];
  const i64* slots;
  const uint8_t* sets;  // (B, H, Kq, Kk), bools of any bytes; null: all
  // Where there are, o is projected by them, (D, D) and (D,), and added to what is at `o`.
  const float *weight, *bias;
  i64 B, H, N, D, S, block_q, block_k, map;
  float eps;
};

void check_linear(const Linear& a) {
  check_slots(a.slots, a.S, a.N);
  check_within(a.map, SOFTMAX, RELU + 1, "the feature map");
}

// f of a row of n numbers.
inline void features(i64 map, const float* x, i64 n, float* to) {
  if (map == SOFTMAX) {
    float inverse = 1.f / weigh(x, n, LOG2E, highest(x, n, x[0]), to);
    for (i64 d = 0; d < n; d++) to[d] *= inverse;
  } else if (map == ELU) {
#pragma omp simd
    for (i64 d = 0; d < n; d++) {
      float e = exp2_of(std::min(x[d], 0.f) * LOG2E);
      to[d] = x[d] > 0.f ? x[d] + 1.f : e;
    }
  } else {
    for (i64 d = 0; d < n; d++) to[d] = x[d] > 0.f ? x[d] : 0.f;
  }
}

// The gradient of x from that of f, in place.
inline void backwards(i64 map, const float* x, const float* f, i64 n, float* grad) {
  if (map == SOFTMAX) {
    float sum = dot(grad, f, n);
    for (i64 d = 0; d < n; d++) grad[d] = f[d] * (grad[d] - sum);
  } else if (map == ELU) {
    for (i64 d = 0; d < n; d++) grad[d] *= x[d] > 0.f ? 1.f : f[d];
  } else {
    for (i64 d = 0; d < n; d++) grad[d] = x[d] > 0.f ? grad[d] : 0.f;
  }
}

void transpose(const float* x, i64 rows, i64 columns, float* to) {
  interleave_transposed(x, columns, columns, rows, rows, to);
}

template <typename In>
struct Attention {
  const Linear& a;
  i64 D = a.D, Kq = a.S / a.block_q, Kk = a.S / a.block_k, size = a.D * a.D + a.D;
  Tokens<In> q{a.q, a.q_strides, a.slots, a.H, a.D};
  Tokens<In> k{a.k, a.k_strides, a.slots, a.H, a.D};
  Tokens<In> v{a.v, a.v_strides, a.slots, a.H, a.D};
  Tokens<In> grad{a.grad, a.grad_strides, a.slots, a.H, a.D};
  i64 dense[3] = {a.H * a.N * a.D, a.N * a.D, a.D};
  Tokens<In> o{a.o, dense, a.slots, a.H, a.D};
  i64 heads = std::max<i64>(1, std::min(AT_ONCE / ((Kk + Kq) * size + 1), a.B * a.H));

  // Rows of tokens, what is made of them, and one state: the memory of a thread.
  struct Scratch {
    std::vector<float> memory;
    std::vector<double> sum;
    float *x, *f, *y, *turned, *above, *low, *of_low, *state, *state_turned;
    Scratch(i64 rows, i64 D) : memory(rows * (5 * D + 2) + D * (2 * D + 1)), sum(D * D + D) {
      float* at = memory.data();
      for (float** part : {&x, &f, &y, &turned, &above}) *part = at, at += rows * D;
      for (float** part : {&low, &of_low}) *part = at, at += rows;
      state = at;
      state_turned = at + D * D + D;
    }
  };

  // f of some tokens; zeros for padding.
  void mapped(const Tokens<In>& tokens, i64 bh, i64 slot, i64 count, float* x, float* f) const {
    tokens.read(bh, slot, count, x, D);
    for (i64 i = 0; i < count; i++) {
      if (tokens.token(slot + i) < 0) std::fill(f + i * D, f + (i + 1) * D, 0.f);
      else features(a.map, x + i * D, D, f + i * D);
    }
  }

  // A state: f^T y (D, D), then the sum of weight x f (D,).
  void state_of(const float* f, const float* y, const float* weights, i64 rows, float* turned,
                float* to) const {
    transpose(f, rows, D, turned);
    product(D, D, rows, turned, rows, y, D, to, D, false);
    float* sum = to + D * D;
    std::fill(sum, sum + D, 0.f);
    for (i64 i = 0; i < rows; i++) {
      float w = weights ? weights[i] : 1.f;
      for (i64 d = 0; d < D; d++) sum[d] += w * f[i * D + d];
    }
  }

  // The sum of the states n with `in(n)`; how many those are.
  template <typename F>
  i64 add_up(const float* states, const double* all, i64 count, F&& in, double* sum,
             float* to) const {
    i64 some = 0;
    for (i64 n = 0; n < count; n++) some += in(n);
    bool rest = 2 * some > count;
    if (rest) std::copy(all, all + size, sum);
    else std::fill(sum, sum + size, 0.);
    double sign = rest ? -1. : 1.;
    for (i64 n = 0; n < count; n++) {
      if (in(n) == rest) continue;
      const float* x = states + n * size;
#pragma omp simd
      for (i64 d = 0; d < size; d++) sum[d] += sign * x[d];
    }
    for (i64 d = 0; d < size; d++) to[d] = static_cast<float>(sum[d]);
    return some;
  }

  // The same of the states of keys, summed in fp32 where that is as good: where of no feature, and
  // none is negative, less than a quarter is left.
  template <typename F>
  i64 add_up_keys(const float* states, const double* all, F&& in, double* sum, float* to) const {
    i64 some = 0;
    for (i64 n = 0; n < Kk; n++) some += in(n);
    bool rest = 2 * some > Kk, much = true;
    std::fill(to, to + size, 0.f);
    for (i64 n = 0; n < Kk; n++) {
      if (in(n) == rest) continue;
      const float* x = states + n * size;
#pragma omp simd
      for (i64 d = 0; d < size; d++) to[d] += x[d];
    }
    if (!rest) return some;
    for (i64 d = D * D; d < size; d++) much &= 4 * (all[d] - to[d]) >= all[d];
    if (!much) return add_up(states, all, Kk, in, sum, to);
#pragma omp simd
    for (i64 d = 0; d < size; d++) to[d] = static_cast<float>(all[d] - to[d]);
    return some;
  }

  // The sum of `count` states, for each of some heads.
  void sum_all(const float* states, i64 count, i64 some, double* to) const {
    i64 cuts = 8, length = (size + cuts - 1) / cuts;
    each(some * cuts, [&] {
      return [&](i64 n) {
        i64 first = n % cuts * length, last = std::min(size, first + length);
        double* sum = to + n / cuts * size;
        for (i64 d = first; d < last; d++) sum[d] = 0;
        for (i64 j = 0; j < count; j++) {
          const float* x = states + (n / cuts * count + j) * size;
#pragma omp simd
          for (i64 d = first; d < last; d++) sum[d] += x[d];
        }
      };
    });
  }

  bool has(i64 bh, i64 i, i64 j) const { return !a.sets || a.sets[(bh * Kq + i) * Kk + j] != 0; }

  void key_states(i64 first, i64 some, float* states, double* all) const {
    each(some * Kk, [&] {
      return [&, s = Scratch(a.block_k, D)](i64 n) mutable {
        i64 bh = first + n / Kk, slot = n % Kk * a.block_k;
        mapped(k, bh, slot, a.block_k, s.x, s.f);
        v.read(bh, slot, a.block_k, s.y, D);
        state_of(s.f, s.y, nullptr, a.block_k, s.turned, states + n * size);
      };
    });
    sum_all(states, Kk, some, all);
  }

  // f(q) of a query block, its state, and the denominators in low. False for a block without keys.
  bool queried(i64 bh, i64 i, const float* states, const double* all, Scratch& s) const {
    i64 rows = a.block_q;
    auto in = [&](i64 j) { return has(bh, i, j); };
    bool any = add_up_keys(states, all, in, s.sum.data(), s.state);
    mapped(q, bh, i * rows, rows, s.x, s.f);
    const float* z = s.state + D * D;
    for (i64 r = 0; r < rows; r++) s.low[r] = a.eps + dot(s.f + r * D, z, D);
    return any;
  }

  // The output of a query block.
  void answer(i64 bh, i64 i, const float* states, const double* all, Scratch& s) const {
    i64 rows = a.block_q, slot = i * rows;
    queried(bh, i, states, all, s);
    for (i64 r = 0; r < rows; r++) {
      if (a.weight) foresee(o, bh, slot + r);
      float inverse = 1.f / s.low[r];
      for (i64 d = 0; d < D; d++) s.f[r * D + d] *= inverse;
    }
    product(rows, D, D, s.f, D, s.state, D, s.y, D, false);
    if (!a.weight) {
      put(a.o, bh, slot, rows, s.y);
      return;
    }
    product(rows, D, D, s.y, D, a.weight, D, s.turned, D, false);
    for (i64 r = 0; r < rows; r++) {
      i64 t = o.token(slot + r);
      if (t < 0) continue;
      const In* base = o.row(bh, t);
      float* sum = s.turned + r * D;
#pragma omp simd
      for (i64 d = 0; d < D; d++) sum[d] += a.bias[d] + load(base + d);
    }
    put(a.o, bh, slot, rows, s.turned);
  }

  void forward() const {
    static thread_local Room room;
    Arena arena;
    float* states;
    double* all;
    arena.want(states, heads * Kk * size);
    arena.want(all, heads * size);
    arena.fill(room);
    for (i64 first = 0; first < a.B * a.H; first += heads) {
      i64 some = std::min(heads, a.B * a.H - first);
      key_states(first, some, states, all);
      each(some * Kq, [&] {
        return [&, s = Scratch(a.block_q, D)](i64 n) mutable {
          i64 head = n / Kq;
          answer(first + head, n % Kq, states + head * Kk * size, all + head * size, s);
        };
      });
    }
    room.trim();
  }

  // Rows into a contiguous (B, H, N, D).
  void put(void* to, i64 bh, i64 slot, i64 count, const float* rows) const {
    for (i64 r = 0; r < count; r++)
      if (i64 t = q.token(slot + r); t >= 0)
        store(static_cast<In*>(to) + (bh * a.N + t) * D, rows + r * D, D);
  }

  // dq of a query block, and the gradient of its state.
  void queries_back(i64 bh, i64 i, const float* states, const double* all, Scratch& s,
                    float* slope) const {
    i64 rows = a.block_q, slot = i * rows;
    bool any = queried(bh, i, states, all, s);
    product(rows, D, D, s.f, D, s.state, D, s.y, D, false);
    grad.read(bh, slot, rows, s.above, D);
    // Nothing over eps has no slope, and in the sum of all it would swamp the others.
    if (!any) std::fill(s.above, s.above + rows * D, 0.f);
    for (i64 r = 0; r < rows; r++) {
      float inverse = 1.f / s.low[r], *g = s.above + r * D, sum = dot(g, s.y + r * D, D);
      for (i64 d = 0; d < D; d++) g[d] *= inverse;
      s.of_low[r] = -sum * inverse * inverse;
    }
    state_of(s.f, s.above, s.of_low, rows, s.turned, slope);
    transpose(s.state, D, D, s.state_turned);
    product(rows, D, D, s.above, D, s.state_turned, D, s.y, D, false);
    const float* z = s.state + D * D;
    for (i64 r = 0; r < rows; r++) {
      for (i64 d = 0; d < D; d++) s.y[r * D + d] += s.of_low[r] * z[d];
      backwards(a.map, s.x + r * D, s.f + r * D, D, s.y + r * D);
    }
    put(a.dq, bh, slot, rows, s.y);
  }

  // dk and dv of a key block.
  void keys_back(i64 bh, i64 j, const float* slopes, const double* all, Scratch& s) const {
    i64 rows = a.block_k, slot = j * rows;
    auto in = [&](i64 i) { return has(bh, i, j); };
    add_up(slopes, all, Kq, in, s.sum.data(), s.state);
    mapped(k, bh, slot, rows, s.x, s.f);
    v.read(bh, slot, rows, s.y, D);
    product(rows, D, D, s.f, D, s.state, D, s.turned, D, false);
    put(a.dv, bh, slot, rows, s.turned);
    transpose(s.state, D, D, s.state_turned);
    product(rows, D, D, s.y, D, s.state_turned, D, s.turned, D, false);
    const float* z = s.state + D * D;
    for (i64 r = 0; r < rows; r++) {
      for (i64 d = 0; d < D; d++) s.turned[r * D + d] += z[d];
      backwards(a.map, s.x + r * D, s.f + r * D, D, s.turned + r * D);
    }
    put(a.dk, bh, slot, rows, s.turned);
  }

  void backward() const {
    static thread_local Room room;
    Arena arena;
    float *states, *slopes;
    double *all, *all_slopes;
    arena.want(states, heads * Kk * size);
    arena.want(slopes, heads * Kq * size);
    arena.want(all, heads * size);
    arena.want(all_slopes, heads * size);
    arena.fill(room);
    for (i64 first = 0; first < a.B * a.H; first += heads) {
      i64 some = std::min(heads, a.B * a.H - first);
      key_states(first, some, states, all);
      each(some * Kq, [&] {
        return [&, s = Scratch(a.block_q, D)](i64 n) mutable {
          i64 head = n / Kq;
          queries_back(first + head, n % Kq, states + head * Kk * size, all + head * size, s,
                       slopes + n * size);
        };
      });
      sum_all(slopes, Kq, some, all_slopes);
      each(some * Kk, [&] {
        return [&, s = Scratch(a.block_k, D)](i64 n) mutable {
          i64 head = n / Kk;
          keys_back(first + head, n % Kk, slopes + head * Kq * size, all_slopes + head * size, s);
        };
      });
    }
    room.trim();
  }
};

}  // namespace

extern "C" {

int gen_accel_linear_size() { return sizeof(Linear); }

int gen_accel_linear_forward(const Linear* a, int dtype) {
  return guarded([&] {
    check_linear(*a);
    with_type(dtype, [&](auto in) { Attention<decltype(in)>{*a}.forward(); });
  });
}
int gen_accel_linear_backward(const Linear* a, int dtype) {
  return guarded([&] {
    check_linear(*a);
    with_type(dtype, [&](auto in) { Attention<decltype(in)>{*a}.backward(); });
  });
}
}
