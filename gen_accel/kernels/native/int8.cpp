// Block-sparse attention with products of 8 bits on the CPU, forward alone: SageAttention over
// lists of key blocks, see bytes.h.
//
// Called through ctypes. Letters as in plan.py and blocks.h.

#include "bytes.h"

namespace {

template <typename In>
struct Int8 {
  Problem<In, float> p;
  Laid laid;

  explicit Int8(const Args& a) : p(a), laid(a.D, a.block_k) {}

  struct Worker {
    const Int8& f;
    const Problem<In, float>& p = f.p;
    i64 most = p.a.picks ? ROUTED : std::min(ROWS, p.a.block_q), first = 0;
    Piece piece{f.laid, p.Kk, most, p.a.scale, [this](i64 i, const Part& part, float* excess) {
                  hide(p.a, first + i, true, part.block * p.bk + part.first, part.count, excess);
                }};
    std::vector<uint16_t> rows;
    Seeing seeing{p.a.picks ? p.a.C : 0, ROUTED};

    explicit Worker(const Int8& forward) : f(forward), rows(most) {}
    Worker(const Worker&) = delete;

    void operator()(i64 bh, i64 slot, i64 count) {
      i64 held = 0;
      first = slot;
      for (i64 i = 0; i < count; i++) {
        i64 t = p.token(slot + i);
        if (t < 0) continue;
        if (p.a.slots && i + AHEAD < count) foresee(p.q, bh, slot + i + AHEAD);
        p.row(p.q, bh, t, piece.exact + i * p.D);
        piece.begin(i);
        rows[held++] = i;
      }
      if (p.a.picks) {
        seeing.look(p.picks(bh) + slot * p.a.C, count);
        for (i64 g = 0; g < p.a.C; g++) {
          const auto& blocks = p.members[g];
          if (!seeing.found(g) || blocks.empty()) continue;
          tiles(blocks.data(), blocks.size(), 0, p.padded.data(), p.Kk, p.bk, LANES, KEYS,
                [&](auto& parts, i64) {
                  piece.tile(bh, seeing.rows(g), seeing.found(g), parts, nullptr);
                });
        }
      } else if (held) {
        i64 block = slot / p.a.block_q, masked;
        const i64* total = p.counts(bh, block, &masked);
        tiles(p.blocks(bh, block), *total, masked, nullptr, p.Kk, p.bk, LANES, KEYS,
              [&](auto& parts, i64) {
                piece.tile(bh, rows.data(), held, parts, p.gains(bh, block));
              });
      }
      for (i64 n = 0; n < held; n++) {
        i64 i = rows[n];
        answer<In>(p.a, bh, p.token(slot + i), piece.finished(i), piece.high[i],
                   piece.sum[i] / STEPS);
      }
    }
  };

  void run() {
    static thread_local Room room;
    Arena arena;
    laid.want(arena, p.BH * p.Kk);
    arena.fill(room);
    at::parallel_for(0, p.BH * p.Kk, 1, [&](i64 begin, i64 end) {
      Layer layer(laid);
      for (i64 n = begin; n < end; n++) layer.block(n, p.k, p.v, n / p.Kk, n % p.Kk * p.bk);
    });
    Pieces pieces(p, p.a.picks ? ROUTED : ROWS);
    each(p.BH * pieces.per_head, [&] {
      return [&, worker = std::make_unique<Worker>(*this)](i64 n) mutable {
        pieces.with(n % pieces.per_head,
                    [&](i64 slot, i64 count) { (*worker)(n / pieces.per_head, slot, count); });
      };
    });
    room.trim();
  }
};

}  // namespace

extern "C" {

// What keeps this processor from it, in words; null where it runs.
const char* gen_accel_int8_lacks() {
#if defined(__AVX512VNNI__)
  return __builtin_cpu_supports("avx512vnni") ? nullptr : "AVX512_VNNI";
#elif defined(__AVXVNNI__)
  return __builtin_cpu_supports("avx2") ? nullptr : "AVX_VNNI";
#else
  return "AVX512_VNNI and AVX_VNNI";
#endif
}

int gen_accel_int8(const Args* a, int dtype) {
  return guarded([&] { with_type(dtype, [&](auto in) { Int8<decltype(in)>(*a).run(); }); });
}
}
