// What the sources share: memory that a thread keeps, numbers in fp32, products of matrices.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "watched.h"

namespace {

using at::BFloat16;
using i64 = int64_t;
using Block = int32_t;  // the number of a block in a list
using Word = uint32_t __attribute__((may_alias));  // two numbers of bf16, or one of fp32

constexpr i64 LANES = 16;  // columns that a product makes at once; a rest costs as much as many
constexpr i64 AHEAD = 12;  // rows that are asked for before they are read
constexpr size_t KEPT = size_t(64) << 20;  // bytes that a thread keeps from call to call
constexpr float LOW = -1e30f;
constexpr float LOG2E = 1.4426950408889634f;
// Scores by log2(e) of which no weight can be told by what another pass kept: their own rounding,
// and that of a product summed up in another order, is as large as a weight.
constexpr float VAST = 4096.f;

}  // namespace

// What the last call on this thread failed of.
inline thread_local std::string gen_accel_failure;

namespace {

// 0; 2 where `work` refuses its arguments, 1 where it fails otherwise.
template <typename F>
int guarded(F&& work) try {
  work();
  gen_accel_failure.clear();
  return 0;
} catch (const std::invalid_argument& thrown) {
  gen_accel_failure = thrown.what();
  return 2;
} catch (const std::exception& thrown) {
  gen_accel_failure = thrown.what();
  return 1;
}

// Refuses a number that is not from `low` up to, but not including, `high`: where it counts memory,
// it comes from tensors that anyone may have made.
inline void check_within(i64 x, i64 low, i64 high, const char* what) {
  if (x >= low && x < high) return;
  throw std::invalid_argument(std::string(what) + " must be from " + std::to_string(low) + " to " +
                              std::to_string(high - 1) + ", got " + std::to_string(x));
}

// Refuses slots that do not hold each of N tokens once, beside padding. Of another token nothing
// could be read, and of one without a slot nothing would be written.
inline void check_slots(const i64* slots, i64 S, i64 N) {
  i64 found = 0;
  std::vector<char> held(slots ? N : 0);
  for (i64 s = 0; s < S && slots; s++) {
    if (slots[s] == -1) continue;
    check_within(slots[s], -1, N, "a slot");
    found += !held[slots[s]];
    if (held[slots[s]]++)
      throw std::invalid_argument("token " + std::to_string(slots[s]) + " lies in two slots");
  }
  if (!slots) found = S;
  if (found != N)
    throw std::invalid_argument("slots must hold each of " + std::to_string(N) +
                                " tokens once, they hold " + std::to_string(found));
}

// Runs `work(n)` for n below `total` on all threads, each with what `make` gives it. A thread takes
// the next n when it is done with its own: some are longer than others.
template <typename Make>
void each(i64 total, Make&& make) {
  std::atomic<i64> next{0};
  at::parallel_for(0, std::min<i64>(at::get_num_threads(), total), 1, [&](i64, i64) {
    auto work = make();
    for (i64 n; (n = next++) < total;) work(n);
  });
}

// Calls `work` with a number of the type that `dtype` names: 0 fp32, 1 bf16, 2 fp16.
template <typename F>
void with_type(int dtype, F&& work) {
  if (dtype == 0) work(float());
  else if (dtype == 1) work(BFloat16());
  else work(at::Half());
}

// Memory of a thread for one purpose, kept for its next call: mapped in anew it would cost as much
// as the products.
class Room {
 public:
  template <typename T>
  T* of(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      release();
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    allow(data_, count * sizeof(T), size_);
    return static_cast<T*>(data_);
  }
  void trim() {
    if (size_ > KEPT) release();
  }
  ~Room() { release(); }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out parts of one allocation, each on a cache line of its own.
class Arena {
 public:
  template <typename T>
  void want(T*& part, size_t count) {
    size_t bytes = count * sizeof(T), room = (bytes + 63) / 64 * 64 + GAP;
    slots_.push_back({reinterpret_cast<void**>(&part), total_, bytes, room});
    total_ += room;
  }
  void fill(Room& room) {
    char* base = room.of<char>(std::max<size_t>(total_, 64));
    for (auto& slot : slots_) {
      *slot.part = base + slot.at;
      allow(base + slot.at, slot.bytes, slot.room);
    }
  }

 private:
  struct Slot {
    void** part;
    size_t at, bytes, room;
  };
  std::vector<Slot> slots_;
  size_t total_ = 0;
};

template <typename T>
constexpr i64 PAIR = sizeof(T) == 2 ? 2 : 1;  // rows that a product reads interleaved
template <typename T>
constexpr i64 EVEN = sizeof(T) == 2 ? 4 : 1;  // rows of which it takes any number at full speed

i64 up(i64 n, i64 step) { return (n + step - 1) / step * step; }

inline float load(const float* x) { return *x; }
inline float load(const BFloat16* x) { return static_cast<float>(*x); }
inline float load(const at::Half* x) { return static_cast<float>(*x); }

// Asks for a row before it is read: where tokens lie apart the processor does not foresee it.
template <typename Rows>
void foresee(const Rows& rows, i64 bh, i64 slot) {
  if (i64 t = rows.token(slot); t >= 0) {
    auto from = rows.row(bh, t);
    for (i64 d = 0; d < rows.D; d += 64 / i64(sizeof(*from))) __builtin_prefetch(from + d);
  }
}

// Numbers of a token, or of many, in the order of the slots: (B, H, N, D) with those of a token in
// a row.
template <typename In>
struct Tokens {
  const void* x;
  const i64* strides;
  const i64* slots;  // the token of each slot, -1 for padding; null where slot = token
  i64 H, D;

  i64 token(i64 slot) const { return slots ? slots[slot] : slot; }
  const In* row(i64 bh, i64 token) const {
    return static_cast<const In*>(x) + bh / H * strides[0] + bh % H * strides[1] +
           token * strides[2];
  }
  // A token as `wide` numbers, of which those after D are zero.
  template <typename T>
  void one(i64 bh, i64 token, T* to, i64 wide) const {
    const In* from = row(bh, token);
    if constexpr (std::is_same_v<In, T>) {
      std::memcpy(to, from, D * sizeof(T));
    } else {
#pragma omp simd
      for (i64 d = 0; d < D; d++) to[d] = load(from + d);
    }
    std::fill(to + D, to + wide, T(0));
  }
  // Those of some slots, (count, wide); zeros for padding.
  template <typename T>
  void read(i64 bh, i64 slot, i64 count, T* to, i64 wide) const {
    for (i64 i = 0; i < count; i++, to += wide) {
      if (slots && i + AHEAD < count) foresee(*this, bh, slot + i + AHEAD);
      if (i64 t = token(slot + i); t < 0) std::fill(to, to + wide, T(0));
      else one(bh, t, to, wide);
    }
  }
};

inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : even;
}

inline void store(float* to, const float* from, i64 n) { std::memcpy(to, from, n * 4); }
inline void store(at::Half* to, const float* from, i64 n) {
  for (i64 i = 0; i < n; i++) to[i] = from[i];
}
inline void store(BFloat16* to, const float* from, i64 n) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
  for (i64 i = 0; i < n; i++) bits[i] = rounded(from[i]);
}

// 2^x for x <= 0 or near it: 0 below -126; NaN stays NaN. Cephes' polynomial, 1 in the last place.
inline float exp2_of(float x) {
  float t = x < -126.f ? -126.f : x;
  float shifted = t + 12582912.f;
  int32_t n;
  std::memcpy(&n, &shifted, 4);
  float f = t - (shifted - 12582912.f);
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  uint32_t bits = static_cast<uint32_t>(n - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  float y = p * power;
  return x < -126.f ? 0.f : y;
}

#ifdef __AVX512F__
// The same of 16 numbers; where they are rounded to bf16, to 4e-6.
inline __m512 exp2_of(__m512 x, bool brief) {
  auto num = [](float value) { return _mm512_set1_ps(value); };
  __mmask16 some = _mm512_cmp_ps_mask(x, num(-126.f), _CMP_NLT_UQ);
  x = _mm512_max_ps(num(-126.f), x);  // of a NaN the second; numbers too small to be normal are slow
  __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n), p;
  if (brief) {
    p = _mm512_fmadd_ps(num(9.570099447e-03f), f, num(5.591786013e-02f));
    p = _mm512_fmadd_ps(p, f, num(2.402474489e-01f));
    p = _mm512_fmadd_ps(p, f, num(6.931218148e-01f));
    p = _mm512_fmadd_ps(p, f, num(9.999992614e-01f));
  } else {
    p = _mm512_fmadd_ps(num(1.535336188319500e-4f), f, num(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, num(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, num(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, num(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, num(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, num(1.f));
  }
  return _mm512_maskz_scalef_ps(some, p, n);
}

inline void put(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
inline void put(BFloat16* to, __mmask16 mask, __m512 x) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm512_mask_cvtepi32_storeu_epi16(to, mask, _mm512_srli_epi32(bits, 16));
#endif
}
#endif

// Weights 2^((s - top) by) of scores; their sum. The difference comes first: of huge scores, a
// product would be off the one with the highest by more than a weight has.
template <typename T>
float weigh(const float* s, i64 n, float by, float top, T* to) {
#ifdef __AVX512F__
  __m512 sum = _mm512_setzero_ps(), times = _mm512_set1_ps(by), less = _mm512_set1_ps(top);
  for (i64 j = 0; j < n; j += 16) {
    __mmask16 mask = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
    __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + j), less), times);
    x = _mm512_min_ps(_mm512_set1_ps(1.f), x);  // of a NaN the second
    __m512 w = exp2_of(x, sizeof(T) == 2);
    sum = _mm512_mask_add_ps(sum, mask, sum, w);
    put(to + j, mask, w);
  }
  return _mm512_reduce_add_ps(sum);
#else
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; j++) {
    float x = (s[j] - top) * by;
    float w = exp2_of(x > 1.f ? 1.f : x);
    sum += w;
    if constexpr (sizeof(T) == 2) reinterpret_cast<uint16_t*>(to)[j] = rounded(w);
    else to[j] = w;
  }
  return sum;
#endif
}

// The highest of n numbers and `top`; NaN is passed over.
inline float highest(const float* x, i64 n, float top) {
#ifdef __AVX512F__
  __m512 most = _mm512_set1_ps(top);
  for (i64 j = 0; j < n; j += 16) {
    __mmask16 mask = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
    most = _mm512_mask_max_ps(most, mask, _mm512_maskz_loadu_ps(mask, x + j), most);
  }
  return _mm512_reduce_max_ps(most);
#else
#pragma omp simd reduction(max : top)
  for (i64 j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
  return top;
#endif
}

// Of each of n columns: x by a factor and more; the highest to `top`, unless it is NaN.
inline void raise(float* x, i64 n, float by, float more, float* top) {
#pragma omp simd
  for (i64 j = 0; j < n; j++) {
    float y = x[j] * by + more;
    x[j] = y;
    top[j] = y > top[j] ? y : top[j];
  }
}

// Of each of n columns, a whole number of LANES: weights 2^(x - top) in the place of x, added to
// `sum`. `brief`: they will be rounded to bf16.
inline void weigh_columns(float* x, i64 n, const float* top, float* sum, bool brief) {
#ifdef __AVX512F__
  for (i64 j = 0; j < n; j += 16) {
    __m512 y = _mm512_sub_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(top + j));
    __m512 w = exp2_of(_mm512_min_ps(_mm512_set1_ps(1.f), y), brief);  // of a NaN the second
    _mm512_storeu_ps(x + j, w);
    _mm512_storeu_ps(sum + j, _mm512_add_ps(_mm512_loadu_ps(sum + j), w));
  }
#else
#pragma omp simd
  for (i64 j = 0; j < n; j++) {
    float y = x[j] - top[j], w = exp2_of(y > 1.f ? 1.f : y);
    x[j] = w;
    sum[j] += w;
  }
#endif
}

inline float dot(const float* x, const float* y, i64 n) {
#ifdef __AVX512F__
  __m512 sum = _mm512_setzero_ps();
  for (i64 j = 0; j < n; j += 16) {
    __mmask16 mask = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
    __m512 one = _mm512_maskz_loadu_ps(mask, x + j), other = _mm512_maskz_loadu_ps(mask, y + j);
    sum = _mm512_fmadd_ps(one, other, sum);
  }
  return _mm512_reduce_add_ps(sum);
#else
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; j++) sum += x[j] * y[j];
  return sum;
#endif
}

// The same of numbers of any type.
template <typename X, typename Y>
float dot_of(const X* x, const Y* y, i64 n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; j++) sum += load(x + j) * load(y + j);
  return sum;
}

// C (M, N) = or += A (M, K) B; B interleaved by PAIR: element (k, n) at (k / P * ldb + n) * P + k % P.
template <typename T>
void product(i64 M, i64 N, i64 K, const T* A, i64 lda, const T* B, i64 ldb, float* C, i64 ldc,
             bool add) {
  if constexpr (WATCHED) {
    constexpr i64 P = PAIR<T>;
    for (i64 m = 0; m < M; m++) {
      for (i64 n = 0; n < N; n++) {
        float sum = add ? C[m * ldc + n] : 0.f;
        for (i64 k = 0; k < K; k++)
          sum += load(A + m * lda + k) * load(B + (k / P * ldb + n) * P + k % P);
        C[m * ldc + n] = sum;
      }
    }
  } else {
    at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, PAIR<T> > 1);
  }
}
inline void finish(const float*) {}
inline void finish(const BFloat16*) { at::native::cpublas::brgemm_release(); }

// oneDNN may be told to leave out what the processor has.
inline bool multiplies_bf16() try {
  BFloat16 a[16 * 32] = {}, b[32 * 16] = {};
  float c[16 * 16];
  product<BFloat16>(16, 16, 32, a, 32, b, 16, c, 16, false);
  finish(a);
  return true;
} catch (const std::exception&) {
  return false;
}

// A few numbers, an even count of halves.
template <typename T>
void copy(const T* from, i64 n, T* to) {
#ifdef __AVX512F__
  const float* x = reinterpret_cast<const float*>(from);
  float* y = reinterpret_cast<float*>(to);
  n /= PAIR<T>;
  for (i64 j = 0; j < n; j += 16) {
    __mmask16 mask = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
    _mm512_mask_storeu_ps(y + j, mask, _mm512_maskz_loadu_ps(mask, x + j));
  }
#else
  std::memcpy(to, from, n * sizeof(T));
#endif
}

// Two rows of a right factor as the products read them.
inline void pair_up(const float* a, const float*, i64 n, float* to) { std::memcpy(to, a, n * 4); }
inline void pair_up(const BFloat16* a, const BFloat16* b, i64 n, BFloat16* to) {
  const uint16_t* low = reinterpret_cast<const uint16_t*>(a);
  const uint16_t* high = reinterpret_cast<const uint16_t*>(b);
  Word* both = reinterpret_cast<Word*>(to);
#pragma omp simd
  for (i64 i = 0; i < n; i++) both[i] = uint32_t(high[i]) << 16 | low[i];
}

// The right factor `rows` (K, N), its rows to K_padded filled with zeros.
template <typename T>
void interleave(const T* rows, i64 ld, i64 K, i64 K_padded, i64 N, T* to) {
  i64 k = 0;
  for (; k + PAIR<T> <= K; k += PAIR<T>) pair_up(rows + k * ld, rows + (k + 1) * ld, N, to + k * N);
  std::fill(to + k * N, to + K_padded * N, T(0));
  for (i64 n = 0; n < N && k < K; n++) to[k * N + n * PAIR<T>] = rows[k * ld + n];
}

#ifdef __AVX512F__
// 16 rows of 16 numbers to columns.
inline void transpose(__m512 (&x)[LANES]) {
  __m512 y[LANES];
  for (i64 i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (i64 i = 0; i < 16; i += 4)
    for (i64 j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(y[i + j]), high = _mm512_castps_pd(y[i + 2 + j]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (i64 i = 0; i < 16; i += 8)
    for (i64 j = 0; j < 4; j++) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + 4 + j], 0x88);
      y[i + 4 + j] = _mm512_shuffle_f32x4(x[i + j], x[i + 4 + j], 0xdd);
    }
  for (i64 j = 0; j < 8; j++) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0xdd);
  }
}
#endif

// The transpose of (rows, columns), whole numbers of LANES both.
template <typename T>
void turn(const float* from, i64 ld, i64 rows, i64 columns, T* to, i64 ld_to) {
  for (i64 r = 0; r < rows; r += LANES)
    for (i64 c = 0; c < columns; c += LANES) {
#ifdef __AVX512F__
      __m512 x[LANES];
      for (i64 i = 0; i < LANES; i++) x[i] = _mm512_loadu_ps(from + (r + i) * ld + c);
      transpose(x);
      for (i64 i = 0; i < LANES; i++) put(to + (c + i) * ld_to + r, 0xffff, x[i]);
#else
      float row[LANES];
      for (i64 i = 0; i < LANES; i++) {
        for (i64 j = 0; j < LANES; j++) row[j] = from[(r + j) * ld + c + i];
        store(to + (c + i) * ld_to + r, row, LANES);
      }
#endif
    }
}

// The right factor whose transpose is `rows` (N, K), K a whole number of pairs.
template <typename T>
void interleave_transposed(const T* rows, i64 ld, i64 K, i64 N, i64 N_ld, T* to) {
  // A pair stays together, in 32 bits.
  constexpr i64 P = PAIR<T>;
  const Word* from = reinterpret_cast<const Word*>(rows);
  Word* target = reinterpret_cast<Word*>(to);
  K /= P, ld /= P;
  for (i64 n0 = 0; n0 < N; n0 += LANES) {
    i64 k0 = 0;
#ifdef __AVX512F__
    for (; n0 + LANES <= N && k0 + LANES <= K; k0 += LANES) {
      __m512 x[LANES];
      for (i64 i = 0; i < LANES; i++) x[i] = _mm512_loadu_ps(from + (n0 + i) * ld + k0);
      transpose(x);
      for (i64 i = 0; i < LANES; i++) _mm512_storeu_ps(target + (k0 + i) * N_ld + n0, x[i]);
    }
#endif
    for (i64 k = k0; k < K; k++)
      for (i64 n = n0; n < std::min(N, n0 + LANES); n++)
        target[k * N_ld + n] = from[n * ld + k];
  }
}

// How many tokens each block holds.
inline std::vector<i64> held(const i64* slots, i64 S, i64 block) {
  std::vector<i64> counts(S / block);
  for (i64 s = 0; s < S; s++) counts[s / block] += !slots || slots[s] >= 0;
  return counts;
}

// Number of the pattern of a head, of PB x PH, where one may stand for all samples or all heads.
inline i64 pattern_of(i64 bh, i64 H, i64 PB, i64 PH) {
  return (PB > 1 ? bh / H : 0) * PH + (PH > 1 ? bh % H : 0);
}

// sum_d weight_d (by x_d - y_d)^2.
template <typename T>
float distance(const T* x, float by, const float* y, const float* weight, i64 n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (i64 d = 0; d < n; d++) {
    float off = load(x + d) * by - y[d];
    sum += weight[d] * off * off;
  }
  return sum;
}

// The mean of `held` tokens in some slots, `wide` numbers; zeros where there are none.
template <typename In>
void mean_of(const Tokens<In>& x, i64 bh, i64 slot, i64 count, i64 held, float* to, i64 wide) {
  std::fill(to, to + wide, 0.f);
  for (i64 s = slot; s < slot + count; s++) {
    i64 t = x.token(s);
    if (t < 0) continue;
    const In* from = x.row(bh, t);
#pragma omp simd
    for (i64 d = 0; d < x.D; d++) to[d] += load(from + d);
  }
  for (i64 d = 0; d < x.D && held; d++) to[d] /= held;
}

// Takes the mean of the rows of a block, (count, D) of its slots, from each that holds a token; the
// others are zeros.
template <typename In>
void centre(const Tokens<In>& x, i64 slot, i64 count, float* rows) {
  std::vector<float> mean(x.D);
  i64 held = 0;
  for (i64 i = 0; i < count; i++) {
    const float* row = rows + i * x.D;
    held += x.token(slot + i) >= 0;
#pragma omp simd
    for (i64 d = 0; d < x.D; d++) mean[d] += row[d];
  }
  for (float& m : mean) m /= std::max<i64>(held, 1);
  for (i64 i = 0; i < count; i++) {
    if (x.token(slot + i) < 0) continue;
    float* row = rows + i * x.D;
#pragma omp simd
    for (i64 d = 0; d < x.D; d++) row[d] -= mean[d];
  }
}

}  // namespace
