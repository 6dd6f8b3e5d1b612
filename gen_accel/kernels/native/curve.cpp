// Second order of a rest around queries, as rest.cpp takes it, and its gradients: see
// kernels/rest.py. Forward it reads q twice and k once.
//
// Called through ctypes. Letters as in plan.py.

#include "common.h"

namespace {

struct Curve {
  const void *q, *k;
  i64 q_strides[3], k_strides[3];
  const i64* slots;                // (S,), -1 for padding; null where slot = token
  const float *of_q, *of_k;        // (B, H, Kq) and (B, H, Kk), how often each block counts
  float *rise, *weight, *by;       // (B, H, N), (B, H, D) and (B, H, D): mean squares of k
  const float *of_rise, *of_weight;  // their gradients
  void *dq, *dk;
  i64 B, H, N, D, S, block_q, block_k;
  float factor;  // of the curvature
};

// Squares of what the tokens of one side are off the mean of their block.
template <typename In>
struct Side {
  const Curve& a;
  Tokens<In> x;
  const float* counts;
  i64 block, blocks = a.S / block, BH = a.B * a.H;
  std::vector<i64> tokens = held(a.slots, a.S, block);

  // Calls `one` with each token of a block and what it is off the mean.
  template <typename F>
  void each(i64 bh, i64 j, std::vector<float>& mean, std::vector<float>& off, F&& one) const {
    mean_of(x, bh, j * block, block, tokens[j], mean.data(), a.D);
    for (i64 s = j * block; s < (j + 1) * block; s++) {
      i64 t = x.token(s);
      if (t < 0) continue;
      const In* row = x.row(bh, t);
#pragma omp simd
      for (i64 d = 0; d < a.D; d++) off[d] = load(row + d) - mean[d];
      one(t, off.data());
    }
  }

  // Calls `one` with each block of all heads, and memory for its mean and what a token is off it.
  template <typename F>
  void blocks_of_all(F&& one) const {
    at::parallel_for(0, BH * blocks, 1, [&](i64 begin, i64 end) {
      std::vector<float> mean(a.D), off(a.D);
      for (i64 n = begin; n < end; n++) one(n / blocks, n % blocks, mean, off);
    });
  }

  // How many tokens a head counts, at least one.
  float total(i64 bh) const {
    double sum = 0;
    for (i64 j = 0; j < blocks; j++) sum += double(counts[bh * blocks + j]) * tokens[j];
    return std::max(sum, 1.0);
  }

  // (B x H, D): the sums over all tokens of a head, each times what `weigh` gives for it.
  template <typename F>
  std::vector<float> sums(F&& weigh) const {
    std::vector<float> parts(BH * blocks * a.D), made(BH * a.D);
    blocks_of_all([&](i64 bh, i64 j, auto& mean, auto& off) {
      float* to = parts.data() + (bh * blocks + j) * a.D;
      each(bh, j, mean, off, [&](i64 t, const float* x) {
        float by = weigh(bh, j, t);
#pragma omp simd
        for (i64 d = 0; d < a.D; d++) to[d] += by * x[d] * x[d];
      });
    });
    for (i64 n = 0; n < BH * blocks; n++)
      for (i64 d = 0; d < a.D; d++) made[n / blocks * a.D + d] += parts[n * a.D + d];
    return made;
  }

  void mean_squares(float* to) const {
    auto made = sums([&](i64 bh, i64 j, i64) { return counts[bh * blocks + j]; });
    for (i64 bh = 0; bh < BH; bh++) {
      float all = total(bh);
      for (i64 n = bh * a.D; n < (bh + 1) * a.D; n++) to[n] = made[n] / all;
    }
  }

  // Gradients of x: 2 off by what `weigh` gives each channel of a token, less their mean.
  template <typename F>
  void gradients(void* to, F&& weigh) const {
    blocks_of_all([&](i64 bh, i64 j, auto& mean, auto& off) {
      std::vector<float> rows(block * a.D), sum(a.D);
      std::vector<i64> places;
      each(bh, j, mean, off, [&](i64 t, const float* x) {
        float* row = rows.data() + i64(places.size()) * a.D;
        places.push_back(t);
        weigh(bh, j, t, row);
        for (i64 d = 0; d < a.D; d++) sum[d] += row[d] *= 2.f * x[d];
      });
      for (i64 r = 0; r < i64(places.size()); r++) {
        float* row = rows.data() + r * a.D;
        for (i64 d = 0; d < a.D; d++) row[d] -= sum[d] / tokens[j];
        store(static_cast<In*>(to) + (bh * a.N + places[r]) * a.D, row, a.D);
      }
    });
  }
};

// 1 / (w . u), or 0.
float inverse(const Curve& a, i64 bh) {
  float both = dot(a.weight + bh * a.D, a.by + bh * a.D, a.D);
  return both > 0.f ? 1.f / both : 0.f;
}

template <typename In>
struct Sides {
  const Curve& a;
  Side<In> q{a, {a.q, a.q_strides, a.slots, a.H, a.D}, a.of_q, a.block_q};
  Side<In> k{a, {a.k, a.k_strides, a.slots, a.H, a.D}, a.of_k, a.block_k};

  void forward() {
    check_slots(a.slots, a.S, a.N);
    q.mean_squares(a.weight);
    k.mean_squares(a.by);
    q.blocks_of_all([&](i64 bh, i64 i, auto& mean, auto& off) {
      float factor = a.factor * inverse(a, bh);
      const float* by = a.by + bh * a.D;
      q.each(bh, i, mean, off, [&](i64 t, const float* x) {
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (i64 d = 0; d < a.D; d++) sum += by[d] * x[d] * x[d];
        a.rise[bh * a.N + t] = factor * sum;
      });
    });
  }

  void backward() {
    check_slots(a.slots, a.S, a.N);
    auto by_rise = q.sums([&](i64 bh, i64, i64 t) { return a.of_rise[bh * a.N + t]; });
    std::vector<float> factors(q.BH), dweight(q.BH * a.D), dby(q.BH * a.D);
    for (i64 bh = 0; bh < q.BH; bh++) {
      i64 at = bh * a.D;
      float over = inverse(a, bh), factor = factors[bh] = a.factor * over;
      float own = factor * dot(by_rise.data() + at, a.by + at, a.D) * over;
      float of_q = q.total(bh), of_k = k.total(bh);
      for (i64 d = at; d < at + a.D; d++) {
        dweight[d] = (a.of_weight[d] - own * a.by[d]) / of_q;
        dby[d] = (factor * by_rise[d] - own * a.weight[d]) / of_k;
      }
    }
    q.gradients(a.dq, [&](i64 bh, i64 i, i64 t, float* row) {
      float slope = factors[bh] * a.of_rise[bh * a.N + t], count = a.of_q[bh * q.blocks + i];
      for (i64 d = 0; d < a.D; d++)
        row[d] = slope * a.by[bh * a.D + d] + count * dweight[bh * a.D + d];
    });
    k.gradients(a.dk, [&](i64 bh, i64 j, i64, float* row) {
      for (i64 d = 0; d < a.D; d++) row[d] = a.of_k[bh * k.blocks + j] * dby[bh * a.D + d];
    });
  }
};

}  // namespace

extern "C" {

int gen_accel_curve_size() { return sizeof(Curve); }

int gen_accel_curve_forward(const Curve* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { Sides<decltype(in)>{*a}.forward(); }); });
}
int gen_accel_curve_backward(const Curve* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { Sides<decltype(in)>{*a}.backward(); }); });
}
}
