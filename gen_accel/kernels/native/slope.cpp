// Slope of the first order of a rest, H of `Rest` in plan.py, and the gradients of what it adds:
//
//   y_t = r_t factor x_t H,  r_t = 1 - exp(lse_t - total_t),  H = sum_t k'_t^T v_t
//
// x is q, around queries q off the mean of its block; k' is k off the mean of its block. Sums over
// tokens are made in parts, always the same ones, so that they do not depend on the threads.
// rest.cpp adds y.
//
// Called through ctypes.

#include "common.h"

namespace {

constexpr i64 PARTS = 16;  // of the blocks of a head

struct Slope {
  const void *q, *k, *v, *grad;
  i64 q_strides[3], k_strides[3], v_strides[3], grad_strides[3];
  const i64* slots;                  // (S,), -1 for padding; null where slot = token
  const float* shares;               // (B, H, N), r
  float* slope;                      // (B, H, D, D), H
  float *dlse, *more;  // gradient of lse, of which that of total is the negative; y . grad
  void *dq, *dk, *dv;
  i64 B, H, N, D, S, block_q, block_k, around_queries;
  float factor;
};

template <typename In>
struct Sloped {
  const Slope& a;
  i64 D = a.D, BH = a.B * a.H, size = a.D * a.D;
  Tokens<In> q{a.q, a.q_strides, a.slots, a.H, a.D};
  Tokens<In> k{a.k, a.k_strides, a.slots, a.H, a.D};
  Tokens<In> v{a.v, a.v_strides, a.slots, a.H, a.D};
  Tokens<In> grad{a.grad, a.grad_strides, a.slots, a.H, a.D};

  // Rows of one block: the memory of a thread.
  struct Scratch {
    std::vector<float> memory;
    float *x, *y, *made, *turned, *by;
    Scratch(i64 rows, i64 D) : memory(rows * (4 * D + 1)) {
      float* at = memory.data();
      for (float** part : {&x, &y, &made, &turned}) *part = at, at += rows * D;
      by = at;
    }
  };

  void centred_keys(i64 bh, i64 j, float* to) const {
    k.read(bh, j * a.block_k, a.block_k, to, D);
    // Twice, as H adds up over all tokens by how much the first mean was rounded.
    for (int n = 0; n < 2; n++) centre(k, j * a.block_k, a.block_k, to);
  }

  void centred_queries(i64 bh, i64 i, float* to) const {
    q.read(bh, i * a.block_q, a.block_q, to, D);
    if (a.around_queries) centre(q, i * a.block_q, a.block_q, to);
  }

  // Writes rows to tokens, (B, H, N, D).
  template <typename Out>
  void write(const Tokens<In>& x, i64 bh, i64 slot, i64 count, const float* rows, Out* to) const {
    for (i64 i = 0; i < count; i++)
      if (i64 t = x.token(slot + i); t >= 0) store(to + (bh * a.N + t) * D, rows + i * D, D);
  }

  // (B x H, D, D): sums over the blocks of each head of x^T y, of which `fill(bh, j, scratch)`
  // makes the rows.
  template <typename F>
  void sums(i64 blocks, i64 block, float* to, F&& fill) const {
    i64 parts = std::min(PARTS, blocks);
    std::vector<float> some(BH * parts * size);
    each(BH * parts, [&] {
      return [&, s = Scratch(block, D)](i64 n) mutable {
        i64 bh = n / parts, part = n % parts;
        for (i64 j = part * blocks / parts; j < (part + 1) * blocks / parts; j++) {
          fill(bh, j, s);
          interleave_transposed(s.x, D, D, block, block, s.turned);
          product(D, D, block, s.turned, block, s.y, D, some.data() + n * size, D, true);
        }
      };
    });
    at::parallel_for(0, BH, 1, [&](i64 begin, i64 end) {
      for (i64 bh = begin; bh < end; bh++) {
        const float* from = some.data() + bh * parts * size;
        std::copy(from, from + size, to + bh * size);
        for (i64 part = 1; part < parts; part++)
          for (i64 n = 0; n < size; n++) to[bh * size + n] += from[part * size + n];
      }
    });
  }

  std::vector<float> turned(const float* x) const {
    std::vector<float> made(BH * size);
    for (i64 bh = 0; bh < BH; bh++)
      interleave_transposed(x + bh * size, D, D, D, D, made.data() + bh * size);
    return made;
  }

  void forward() const {
    check_slots(a.slots, a.S, a.N);
    sums(a.S / a.block_k, a.block_k, a.slope, [&](i64 bh, i64 j, Scratch& s) {
      centred_keys(bh, j, s.x);
      v.read(bh, j * a.block_k, a.block_k, s.y, D);
    });
  }

  void backward() const {
    check_slots(a.slots, a.S, a.N);
    std::vector<float> of_slope(BH * size), slope = turned(a.slope);
    sums(a.S / a.block_q, a.block_q, of_slope.data(), [&](i64 bh, i64 i, Scratch& s) {
      queries_back(bh, i, slope.data() + bh * size, s);
    });
    std::vector<float> back = turned(of_slope.data());
    i64 blocks = a.S / a.block_k;
    each(BH * blocks, [&] {
      return [&, s = Scratch(a.block_k, D)](i64 n) mutable {
        i64 bh = n / blocks, slot = n % blocks * a.block_k;
        centred_keys(bh, n % blocks, s.x);
        v.read(bh, slot, a.block_k, s.y, D);
        product(a.block_k, D, D, s.x, D, of_slope.data() + bh * size, D, s.made, D, false);
        write(k, bh, slot, a.block_k, s.made, static_cast<In*>(a.dv));
        product(a.block_k, D, D, s.y, D, back.data() + bh * size, D, s.made, D, false);
        centre(k, slot, a.block_k, s.made);
        write(k, bh, slot, a.block_k, s.made, static_cast<In*>(a.dk));
      };
    });
  }

  // Gradients of q and lse, and y . grad; leaves r factor x and the gradient of y, from which H has its
  // own.
  void queries_back(i64 bh, i64 i, const float* slope, Scratch& s) const {
    i64 slot = i * a.block_q;
    centred_queries(bh, i, s.x);
    grad.read(bh, slot, a.block_q, s.y, D);
    product(a.block_q, D, D, s.y, D, slope, D, s.made, D, false);
    for (i64 r = 0; r < a.block_q; r++) {
      i64 t = q.token(slot + r), at = bh * a.N + t;
      if (t < 0) continue;
      float *x = s.x + r * D, *made = s.made + r * D, by = a.shares[at], of_share = dot(x, made, D);
      of_share *= a.factor;
      // Where nothing is left out there is no gradient either.
      a.dlse[at] = by > 0.f ? -of_share * (1.f - by) : 0.f;
      a.more[at] = by * of_share;
      by *= a.factor;
#pragma omp simd
      for (i64 d = 0; d < D; d++) x[d] *= by, made[d] *= by;
    }
    if (a.around_queries) centre(q, slot, a.block_q, s.made);
    write(q, bh, slot, a.block_q, s.made, static_cast<In*>(a.dq));
  }
};

}  // namespace

extern "C" {

int gen_accel_slope_size() { return sizeof(Slope); }

int gen_accel_slope_forward(const Slope* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { Sloped<decltype(in)>{*a}.forward(); }); });
}
int gen_accel_slope_backward(const Slope* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { Sloped<decltype(in)>{*a}.backward(); }); });
}
}
