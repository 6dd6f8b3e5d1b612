// Which key blocks a query sees, on the CPU: sums over blocks of tokens, and the chunks that queries
// pick by their scores. What block_mixture.py says in torch, in a few passes over the scores.
//
// A cut is found as there, by the upper half of the keys' bits and then by the lower: the mass is
// counted in bins, and nothing is sorted but short rows. Masses are summed in fp64. What scores that
// are NaN pick is not what they pick there.

#include "common.h"

namespace {

constexpr i64 AT_ONCE = i64(1) << 26;  // scores that are held at once; at least those of one scope
constexpr i64 TILE = 64;               // rows of a product
constexpr i64 BINS = 1 << 16;

struct Sums {
  const void* x;
  i64 x_strides[3];
  const i64* slots;
  float* out;  // (B, H, S / block, D)
  i64 B, H, N, D, S, block;
};

template <typename In>
void sum_blocks(const Sums& a) {
  check_slots(a.slots, a.S, a.N);
  Tokens<In> tokens{a.x, a.x_strides, a.slots, a.H, a.D};
  i64 K = a.S / a.block;
  at::parallel_for(0, a.B * a.H * K, 1, [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; n++) {
      float* to = a.out + n * a.D;
      std::fill(to, to + a.D, 0.f);
      for (i64 s = n % K * a.block; s < (n % K + 1) * a.block; s++) {
        if (a.slots && s + AHEAD < a.S) foresee(tokens, n / K, s + AHEAD);
        i64 t = tokens.token(s);
        if (t < 0) continue;
        const In* from = tokens.row(n / K, t);
#pragma omp simd
        for (i64 d = 0; d < a.D; d++) to[d] += load(from + d);
      }
    }
  });
}

struct Kept {
  const uint8_t *keep, *whole;  // (rows, K), bools
  Block* index;                 // (rows, most), those that need a mask before the whole ones
  i64* counts;                  // (2, rows), all and those that need a mask
  i64 rows, K, most;
};

void list_row(const Kept& a, i64 row) {
  const uint8_t *keep = a.keep + row * a.K, *whole = a.whole + row * a.K;
  if (!a.index) {
    i64 all = 0, masked = 0;
    for (i64 j = 0; j < a.K; j++) {
      all += keep[j] != 0;
      masked += keep[j] && !whole[j];
    }
    a.counts[row] = all;
    a.counts[a.rows + row] = masked;
    return;
  }
  Block *first = a.index + row * a.most, *then = first + a.counts[a.rows + row];
  for (i64 j = 0; j < a.K; j++)
    if (keep[j]) *(whole[j] ? then : first)++ = static_cast<Block>(j);
}

enum Scope { QUERY_HEAD, HEAD_GLOBAL, OVERALL, BLOCK };

struct Picks {
  const void* rows;  // (B, H, N, D)
  i64 rows_strides[3];
  const i64* slots;    // (R,), the row of each slot
  const i64* home;     // (R,), the own chunk; from C on: sees all
  const float* means;  // (B, H, C, D)
  bool* picks;         // (B, H, R, C + 1), the last always; none for padding
  bool* touched;       // (B, H, R / block, C + 1), what any row of a block picked
  double threshold;
  i64 B, H, N, D, R, C, block, scope, topk;  // topk: 0 with a threshold
};

// Numbers whose order is that of the floats.
inline uint32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
}

constexpr uint32_t TOP = 0xffffffffu;

// The greatest key from which upwards the entries hold `need`; 0 where all together do not.
// `visit(part, f)` calls f(key, mass) for the entries of a part.
template <typename Visit>
uint32_t least_taken(double need, i64 parts, Visit&& visit) {
  std::vector<double> bins(parts * BINS);
  uint32_t upper = 0;
  for (bool lower : {false, true}) {
    std::fill(bins.begin(), bins.end(), 0.);
    at::parallel_for(0, parts, 1, [&](i64 begin, i64 end) {
      for (i64 part = begin; part < end; part++) {
        double* mine = bins.data() + part * BINS;
        if (lower) {
          visit(part, [&](uint32_t key, double mass) {
            if (key >> 16 == upper) mine[key & 0xffff] += mass;
          });
        } else {
          visit(part, [&](uint32_t key, double mass) { mine[key >> 16] += mass; });
        }
      }
    });
    double held = 0;
    i64 bin = BINS - 1;
    for (; bin >= 0; bin--) {
      double both = held;
      for (i64 part = 0; part < parts; part++) both += bins[part * BINS + bin];
      if (both >= need) break;
      held = both;
    }
    if (bin < 0) return lower ? upper << 16 : 0;
    if (lower) return upper << 16 | static_cast<uint32_t>(bin);
    upper = static_cast<uint32_t>(bin);
    need -= held;
  }
  return 0;
}

template <typename In>
struct Picking {
  const Picks& a;
  Tokens<In> tokens;
  i64 ld;  // of a row of scores
  std::vector<char> counted;  // rows that hold a query of the video
  i64 queries = 0;

  explicit Picking(const Picks& args)
      : a(args), tokens{args.rows, args.rows_strides, args.slots, args.H, args.D},
        ld(up(args.C, LANES)), counted(args.R) {
    check_slots(a.slots, a.R, a.N);
    check_within(a.scope, QUERY_HEAD, BLOCK + 1, "the scope");
    check_within(a.topk, 0, a.C + 1, "topk");
    for (i64 r = 0; r < a.R; r++) {
      if (tokens.token(r) >= 0) check_within(a.home[r], 0, INT64_MAX, "the own chunk of a row");
      counted[r] = tokens.token(r) >= 0 && a.home[r] < a.C;
      queries += counted[r];
    }
  }

  // Many samples are shared out whole, each to one thread, where calls below run alone: a region of
  // all threads for each step of each sample would cost more than small steps, and on a busy machine
  // a time slice. Few samples are worked off one by one, by all threads together.
  void run() {
    bool within = a.scope == QUERY_HEAD || a.scope == HEAD_GLOBAL;
    i64 threads = at::get_num_threads(), row = a.H * a.R * ld;
    if (a.B >= 2 * threads && threads * row <= AT_ONCE) {
      each(a.B, [&] { return [&](i64 b) { sample(b, a.H); }; });
      return;
    }
    i64 heads = within ? std::max<i64>(1, std::min(AT_ONCE / (a.R * ld + 1), a.H)) : a.H;
    for (i64 b = 0; b < a.B; b++) sample(b, heads);
  }

  // `heads` at once.
  void sample(i64 b, i64 heads) {
    static thread_local Room room;
    float* scores = room.of<float>(heads * a.R * ld);
    for (i64 h = 0; h < a.H; h += heads) {
      i64 count = std::min(heads, a.H - h);
      score(b * a.H + h, count, scores);
      if (a.scope == QUERY_HEAD) each_row(b * a.H + h, count, scores);
      else scopes(b * a.H + h, count, scores);
    }
    room.trim();
  }

  // (count, R, ld): the products of queries and chunks of some heads.
  void score(i64 first, i64 count, float* scores) {
    std::vector<float> turned(count * a.D * ld);
    for (i64 n = 0; n < count; n++)
      for (i64 c = 0; c < a.C; c++)
        for (i64 d = 0; d < a.D; d++)
          turned[(n * a.D + d) * ld + c] = a.means[((first + n) * a.C + c) * a.D + d];
    i64 cuts = (a.R + TILE - 1) / TILE;
    at::parallel_for(0, count * cuts, 1, [&](i64 begin, i64 end) {
      std::vector<float> rows(TILE * a.D);
      for (i64 n = begin; n < end; n++) {
        i64 row = n % cuts * TILE, height = std::min(TILE, a.R - row);
        tokens.read(first + n / cuts, row, height, rows.data(), tokens.D);
        product(height, ld, a.D, rows.data(), a.D, turned.data() + n / cuts * a.D * ld, ld,
                scores + (n / cuts * a.R + row) * ld, ld, false);
      }
    });
  }

  // Each row is a scope of its own.
  void each_row(i64 first, i64 count, const float* scores) {
    at::parallel_for(0, count * a.R, 64, [&](i64 begin, i64 end) {
      std::vector<float> weights(a.C), sorted(a.C);
      for (i64 n = begin; n < end; n++) {
        const float* s = scores + n * ld;
        i64 home = a.home[n % a.R];
        float cut = 0.f;
        if (!counted[n % a.R]) {
          std::copy(s, s + a.C, weights.begin());
        } else if (a.topk) {
          std::copy(s, s + a.C, weights.begin());
          weights[home] = INFINITY;
          sorted = weights;
          std::nth_element(sorted.begin(), sorted.begin() + a.topk - 1, sorted.end(),
                           std::greater<float>());
          cut = sorted[a.topk - 1];
        } else {
          auto [low, high] = std::minmax_element(s, s + a.C);
          double total = 0;
          for (i64 c = 0; c < a.C; c++) total += weights[c] = weight(s[c], *low, *high);
          double need = std::max(0., a.threshold * total - weights[home]);
          sorted = weights;
          sorted.erase(sorted.begin() + home);
          std::sort(sorted.begin(), sorted.end(), std::greater<float>());
          double held = 0;
          cut = -INFINITY;  // never reached: all
          for (float w : sorted) {
            held += w;
            if (held < need) continue;
            cut = w;
            break;
          }
          sorted.resize(a.C);
        }
        take(first * a.R + n, weights.data(), &cut, false);
      }
    });
    touch(first, count);
  }

  static float weight(float s, float low, float high) {
    float w = (s - low) / (high - low);
    return w == w ? w : 1.f;  // all are equal
  }

  // Scopes that span rows: one a head, one of all heads, or one a chunk.
  void scopes(i64 first, i64 count, float* scores) {
    i64 lines = a.scope == HEAD_GLOBAL ? a.R : count * a.R;
    i64 total = a.scope == BLOCK ? a.C : count * a.R / lines;
    i64 threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    std::vector<float> cuts(total);
    auto one = [&](i64 n, i64 parts) {
      float* own = a.scope == BLOCK ? scores : scores + n * lines * ld;
      i64 from = a.scope == BLOCK ? n : 0, to = a.scope == BLOCK ? n + 1 : a.C;
      cuts[n] = a.topk ? cut_of_best(own, lines, from, to, parts)
                       : cut_of_share(own, lines, from, to, parts);
    };
    if (total >= threads) {
      at::parallel_for(0, total, 1, [&](i64 begin, i64 end) {
        for (i64 n = begin; n < end; n++) one(n, 1);
      });
    } else {
      for (i64 n = 0; n < total; n++) one(n, threads);
    }
    at::parallel_for(0, count * a.R, 64, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) {
        const float* cut = a.scope == BLOCK ? cuts.data() : cuts.data() + n / lines;
        take(first * a.R + n, scores + n * ld, cut, a.scope == BLOCK);
      }
    });
    touch(first, count);
  }

  // Runs `f(line, row)` for the lines of a part that count.
  template <typename F>
  void counting(i64 lines, i64 part, i64 parts, F&& f) const {
    for (i64 l = lines * part / parts; l < lines * (part + 1) / parts; l++)
      if (counted[l % a.R]) f(l, l % a.R);
  }

  // The score from which upwards there are `topk` for each query, the own chunk before all.
  float cut_of_best(const float* scores, i64 lines, i64 from, i64 to, i64 parts) const {
    double need = double(a.topk) * queries * (lines / a.R);
    uint32_t cut = least_taken(need, parts, [&](i64 part, auto&& add) {
      counting(lines, part, parts, [&](i64 l, i64 r) {
        for (i64 c = from; c < to; c++) add(a.home[r] == c ? TOP : ordered(scores[l * ld + c]), 1.);
      });
    });
    return back(cut);
  }

  // Scores become weights in [0, 1], in place; the weight from which upwards those of other chunks
  // hold, with the own ones, `threshold` of all.
  float cut_of_share(float* scores, i64 lines, i64 from, i64 to, i64 parts) const {
    struct Part {
      float low = INFINITY, high = -INFINITY, most = -INFINITY;
      double total = 0, own = 0;
    };
    std::vector<Part> found(parts);
    at::parallel_for(0, parts, 1, [&](i64 begin, i64 end) {
      for (i64 part = begin; part < end; part++) {
        float low = INFINITY, high = -INFINITY;
        counting(lines, part, parts, [&](i64 l, i64) {
          const float* s = scores + l * ld;
#pragma omp simd reduction(min : low) reduction(max : high)
          for (i64 c = from; c < to; c++) {
            low = s[c] < low ? s[c] : low;
            high = s[c] > high ? s[c] : high;
          }
        });
        found[part].low = low;
        found[part].high = high;
      }
    });
    Part all;
    for (const Part& x : found) {
      all.low = std::min(all.low, x.low);
      all.high = std::max(all.high, x.high);
    }
    at::parallel_for(0, parts, 1, [&](i64 begin, i64 end) {
      for (i64 part = begin; part < end; part++) {
        Part mine;
        counting(lines, part, parts, [&](i64 l, i64 r) {
          float* s = scores + l * ld;
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (i64 c = from; c < to; c++) sum += s[c] = weight(s[c], all.low, all.high);
          mine.total += sum;
          for (i64 c = from; c < to; c++) {
            if (a.home[r] == c) mine.own += s[c];
            else mine.most = std::max(mine.most, s[c]);
          }
        });
        found[part].total = mine.total;
        found[part].own = mine.own;
        found[part].most = mine.most;
      }
    });
    for (const Part& x : found) {
      all.total += x.total;
      all.own += x.own;
      all.most = std::max(all.most, x.most);
    }
    double need = std::max(0., a.threshold * all.total - all.own);
    uint32_t cut = least_taken(need, parts, [&](i64 part, auto&& add) {
      counting(lines, part, parts, [&](i64 l, i64 r) {
        for (i64 c = from; c < to; c++)
          if (a.home[r] != c) add(ordered(scores[l * ld + c]), scores[l * ld + c]);
      });
    });
    return std::min(back(cut), all.most);  // at least one
  }

  // What `ordered` made of it; below all where nothing was.
  static float back(uint32_t key) {
    if (key == 0) return -INFINITY;
    if (key == TOP) return INFINITY;
    int32_t bits = static_cast<int32_t>(key ^ 0x80000000u);
    bits ^= (bits >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  // The picks of one row: chunks from `cut` on, one for all or `each` its own, and the row's chunk;
  // all for text.
  void take(i64 row, const float* s, const float* cut, bool each) {
    bool* to = a.picks + row * (a.C + 1);
    i64 r = row % a.R;
    if (!counted[r]) {
      std::fill(to, to + a.C + 1, tokens.token(r) >= 0);
      return;
    }
    for (i64 c = 0; c < a.C; c++) to[c] = s[c] >= cut[each ? c : 0];
    to[a.home[r]] = true;
    to[a.C] = true;
  }

  void touch(i64 first, i64 count) {
    i64 blocks = a.R / a.block, wide = a.C + 1;
    at::parallel_for(0, count * blocks, 8, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) {
        bool* to = a.touched + (first * blocks + n) * wide;
        std::fill(to, to + wide, false);
        for (i64 i = 0; i < a.block; i++) {
          const bool* from = a.picks + (first * a.R + n * a.block + i) * wide;
          for (i64 c = 0; c < wide; c++) to[c] |= from[c];
        }
      }
    });
  }
};

}  // namespace

extern "C" {

int gen_accel_sums_size() { return sizeof(Sums); }
int gen_accel_picks_size() { return sizeof(Picks); }
int gen_accel_kept_size() { return sizeof(Kept); }

int gen_accel_block_sums(const Sums* a, int dtype) {
  return guarded([&] {
    with_type(dtype, [&](auto in) { sum_blocks<decltype(in)>(*a); });
  });
}
// Without `index`, the counts alone.
int gen_accel_kept(const Kept* a) {
  return guarded([&] {
    at::parallel_for(0, a->rows, 64, [&](i64 begin, i64 end) {
      for (i64 n = begin; n < end; n++) list_row(*a, n);
    });
  });
}
int gen_accel_picks(const Picks* a, int dtype) {
  return guarded([&] {
    with_type(dtype, [&](auto in) { Picking<decltype(in)>(*a).run(); });
  });
}
}
