// Vectors of floats and what is done with them, for the files of this folder. Vector extensions of
// GCC and Clang: the compiler divides them into registers of the machine.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <functional>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// One register of the machine: what is wider the compiler keeps in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__SSE__) && !defined(__AVX512F__)
constexpr int kRegisters = 16;
#else
constexpr int kRegisters = 32;
#endif

// may_alias and not aligned: loads and stores at any address.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));

// Vectors of other widths.
template <int lanes>
struct Wide {
  typedef float Value __attribute__((vector_size(4 * lanes)));
  typedef float Any __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  static Value load(const float* at) { return *reinterpret_cast<const Any*>(at); }
};

struct BFloat16 {
  uint16_t bits;
};

inline Lanes load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }

inline Lanes load(const BFloat16* at) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Shorts*>(at), Words) << 16);
}

inline float read(const float* at) { return *at; }

inline float read(const BFloat16* at) {
  uint32_t word = uint32_t(at->bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline void write(float* at, float value) { *at = value; }

inline void write(BFloat16* at, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  // To nearest, ties to even; what is not a number stays one.
  at->bits = value == value ? uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16) : 0x7fc0;
}

#ifdef __FLT16_MANT_DIG__
#define REASONALLOC_HALF 1
typedef _Float16 Halves __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
inline Lanes load(const _Float16* at) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__AVX__) && defined(__F16C__)
  return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Lanes);
#endif
}
inline float read(const _Float16* at) { return float(*at); }
inline void write(_Float16* at, float value) { *at = _Float16(value); }
#endif

inline void store(float* at, Lanes x) { *reinterpret_cast<Unaligned*>(at) = x; }

// Asks for a value in a register: compilers like to read it again for every use.
template <typename Vector>
inline void hold(Vector& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE__)
  asm("" : "+x"(x));
#endif
}

inline Lanes splat(float x) { return x - Lanes{}; }

// One number of all lanes: `f` of two vectors of four, until one is left, then of pairs of its
// lanes.
template <typename Vector, typename F>
inline auto folded(Vector x, F f) {
  typedef std::remove_reference_t<decltype(x[0])> Element;
  typedef Element Quarter __attribute__((vector_size(16)));
  Quarter parts[kLanes / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = f(parts[0], parts[i]);
  Quarter last = parts[0];
  return f(f(last[0], last[2]), f(last[1], last[3]));
}

constexpr auto kLarger = [](auto x, auto y) { return x > y ? x : y; };

inline float largest_of(Lanes x) { return folded(x, kLarger); }

inline float sum(Lanes x) {
  return folded(x, [](auto x, auto y) { return x + y; });
}

// The sums of several vectors, each as `sum` has it.
template <int count>
inline void sums_of(const Lanes* x, float* out) {
#if defined(__AVX__)
  if constexpr (count == 4) {
    __m128 fours[4];
    for (int r = 0; r < 4; ++r) {
      __m128 parts[kLanes / 4];
      std::memcpy(parts, x + r, sizeof x[r]);
      fours[r] = parts[0];
      for (int i = 1; i < kLanes / 4; ++i) fours[r] = fours[r] + parts[i];
    }
    _MM_TRANSPOSE4_PS(fours[0], fours[1], fours[2], fours[3]);
    _mm_storeu_ps(out, (fours[0] + fours[2]) + (fours[1] + fours[3]));
    return;
  }
#endif
  for (int r = 0; r < count; ++r) out[r] = sum(x[r]);
}

// exp of numbers that are at most 0, to 2 units in the last place; 0 below -87; NaN of NaN.
inline Lanes exp_of_negative(Lanes x) {
  Ints dead = x < -87.0f;
  x = dead ? splat(-87.0f) : x;
  Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // cut off: the nearest
  Lanes n = __builtin_convertvector(power, Lanes);
  Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y *= (Lanes)((power + 127) << 23);
  return dead ? Lanes{} : y;
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// `count` up to a whole vector.
inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Replaces `count` logits by exp(logit - largest), up to the next whole vector by zeros.
// Returns the sum and gives the largest; logits of nothing but -inf weigh nothing.
inline float exponentiate(float* logits, int64_t count, float* largest) {
  const int64_t padded = whole_vectors(count);
  for (int64_t j = count; j < padded; ++j) logits[j] = kLowest;
  Lanes most = splat(kLowest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    most = kLarger(load(logits + j), most);
  }
  *largest = largest_of(most);
  const float base = *largest == kLowest ? 0.0f : *largest;
  Lanes sums = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    Lanes x = exp_of_negative(load(logits + j) - base);
    store(logits + j, x);
    sums += x;
  }
  return sum(sums);
}

// cap * tanh(x / cap)
inline Lanes softly_capped(Lanes x, float cap) {
  Lanes y = x / cap;
  Ints negative = y < 0.0f;
  Lanes e = exp_of_negative(-2.0f * (negative ? -y : y));
  Lanes tanh = (1.0f - e) / (1.0f + e);
  return (negative ? -tanh : tanh) * cap;
}

// Calls `run` with a zero of an element type: 0 float, 1 bfloat16, 2 half. Returns whether this
// compiler knows the type.
template <typename Run>
bool by_kind(int kind, Run run) {
  if (kind == 0) {
    run(0.0f);
  } else if (kind == 1) {
    run(BFloat16{});
#ifdef REASONALLOC_HALF
  } else if (kind == 2) {
    run(_Float16(0));
#endif
  } else {
    return false;
  }
  return true;
}

// The codes of check.py's `failure`.
enum Failure { kDone = 0, kNoMemory = 1, kFull = 2, kBadIndex = 3, kOutside = 4 };

// Thrown where a number points outside of what it counts.
struct Outside {};

// Calls `run(row)` for every row, by several threads; returns a `Failure`.
template <typename Run>
int for_rows(int64_t rows, int threads, Run run) {
  int failed = kDone;
  auto one = [&](int64_t row) {
    try {
      run(row);
    } catch (const std::bad_alloc&) {
      failed = kNoMemory;
    } catch (const Outside&) {
      failed = kOutside;
    }
  };
  if (threads <= 1) {  // no team at all: one inside another would be made anew every time
    for (int64_t row = 0; row < rows; ++row) one(row);
    return failed;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t row = 0; row < rows; ++row) one(row);
  return failed;
}

}  // namespace

extern "C" int reasonalloc_knows(int kind) {
  return by_kind(kind, [](auto) {});
}
