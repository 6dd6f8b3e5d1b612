// How much each key block would weigh to a mean query, on the CPU: the log-sum-exps that kernels/
// spread.py speaks of, in one pass over the keys. A product has the keys of a block as its rows
// and mean queries as its columns, in fp32.
//
// Called through ctypes. Letters as in plan.py.

#include "common.h"

namespace {

constexpr i64 WIDE = 64;  // mean queries at once

struct Spread {
  const float* means;  // (B, H, Kq, D)
  const void* k;
  i64 k_strides[3];
  const i64* slots;
  float* out;  // (B, H, Kq, Kk)
  i64 B, H, N, D, S, Kq, block;
  float scale;
};

template <typename In>
void spread(const Spread& a) {
  check_slots(a.slots, a.S, a.N);
  i64 Kk = a.S / a.block, columns = up(a.Kq, LANES), BH = a.B * a.H;
  Tokens<In> k{a.k, a.k_strides, a.slots, a.H, a.D};
  static thread_local Room room;
  float* turned = room.of<float>(BH * a.D * columns);
  std::fill(turned, turned + BH * a.D * columns, 0.f);
  at::parallel_for(0, BH, 1, [&](i64 begin, i64 end) {
    for (i64 bh = begin; bh < end; bh++)
      interleave_transposed(a.means + bh * a.Kq * a.D, a.D, a.D, a.Kq, columns,
                            turned + bh * a.D * columns);
  });
  at::parallel_for(0, BH * Kk, 1, [&](i64 begin, i64 end) {
    std::vector<float> rows(a.block * a.D), scores(a.block * WIDE);
    for (i64 n = begin; n < end; n++) {
      i64 bh = n / Kk, j = n % Kk;
      k.read(bh, j * a.block, a.block, rows.data(), a.D);
      for (i64 i = 0; i < columns; i += WIDE) {
        i64 wide = std::min(WIDE, columns - i);
        float top[WIDE], sum[WIDE] = {};
        std::fill(top, top + WIDE, LOW);
        product(a.block, wide, a.D, rows.data(), a.D, turned + bh * a.D * columns + i, columns,
                scores.data(), WIDE, false);
        for (i64 t = 0; t < a.block; t++)
          if (k.token(j * a.block + t) >= 0)
            raise(scores.data() + t * WIDE, wide, a.scale * LOG2E, 0.f, top);
        for (i64 t = 0; t < a.block; t++)
          if (k.token(j * a.block + t) >= 0)
            weigh_columns(scores.data() + t * WIDE, wide, top, sum, false);
        for (i64 c = 0; c < std::min(wide, a.Kq - i); c++)
          a.out[(bh * a.Kq + i + c) * Kk + j] = (top[c] + std::log2(sum[c])) / LOG2E;
      }
    }
  });
  room.trim();
}

}  // namespace

extern "C" {

int gen_accel_spread_size() { return sizeof(Spread); }

int gen_accel_spread(const Spread* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { spread<decltype(in)>(*a); }); });
}
}
