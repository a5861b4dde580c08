// Vectors and packing on processors with AVX2 and FMA (x86-64-v3); avx512bf16.h has the same names for newer ones.
//
// bf16 and fp16 are converted to float32, which is exact, when keys and values are packed; products and weights are
// float32. Caches of float32 are supported too. fp16 needs F16C, which every processor with AVX2 has.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "interface.h"

namespace minference {

using Floats = __m256;
using Factor = float;  // element of the matrices that are multiplied
using Packed = float;  // one factor: float32 has no instruction for pairs

constexpr int kLanes = 8;
constexpr int kPack = 1;  // factors in one Packed
constexpr int kRows = 6;  // query rows per register tile: 6 x 2 accumulators + 3 operands fit 16 registers

inline Floats load(const float* in) { return _mm256_loadu_ps(in); }
inline void store(float* out, Floats x) { _mm256_storeu_ps(out, x); }
inline Floats repeat(float x) { return _mm256_set1_ps(x); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
inline Factor to_factor(float x) { return x; }
inline float to_float(Factor x) { return x; }

// Rounded to nearest, ties to even; from -128 to 127.
inline void store_bytes(int8_t* out, Floats x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(shorts, shorts));
}

inline float reduce_max(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline float reduce_add(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// x where position <= limit, -inf elsewhere.
inline Floats hide_after(Floats x, const int32_t* position, int32_t limit) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
  const __m256 hidden = _mm256_castsi256_ps(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(limit)));
  return _mm256_blendv_ps(x, _mm256_set1_ps(-std::numeric_limits<float>::infinity()), hidden);
}

// x where position >= first, -inf elsewhere.
inline Floats hide_before(Floats x, const int32_t* position, int32_t first) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
  const __m256 hidden = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), at));
  return _mm256_blendv_ps(x, _mm256_set1_ps(-std::numeric_limits<float>::infinity()), hidden);
}

// 2^x for x < 128, relative error 2e-7; 0 where the result is below 2^-126 (subnormal).
inline Floats exp2(Floats x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-127.0f));
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, whole);
  __m256 p = _mm256_set1_ps(1.5403530e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3333558e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline Floats load_packed(const Packed* in) { return _mm256_loadu_ps(in); }

// The kPack factors at `in`, in every lane.
inline Floats repeat_factors(const Factor* in) { return _mm256_broadcast_ss(in); }

inline Floats multiply_add(Floats left, Floats right, Floats sum) { return _mm256_fmadd_ps(left, right, sum); }

// A bf16 is the upper half of the float32 of the same value.
inline Floats widen(const bf16* in) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}

inline Floats widen(const fp16* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

inline Floats widen(const float* in) { return load(in); }

template <typename T>
inline void copy_factors(const T* in, Factor* out, int count) {
  for (int i = 0; i < count; i += 8) store(out + i, widen(in + i));
}

// 2 * kLanes factors.
inline void store_factors(Factor* out, Floats low, Floats high) {
  store(out, low);
  store(out + kLanes, high);
}

// Rounds to nearest, ties to even. A NaN that comes from a bf16 stays NaN: the lower half of its bits is zero, so that
// rounding cannot overflow into the sign.
inline void store_element(bf16* out, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i upper = _mm256_srli_epi32(rounded, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

inline void store_element(fp16* out, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_element(float* out, Floats x) { store(out, x); }

// Two neighbouring rows of the right-hand side. `count` is a multiple of 8.
template <typename T>
inline void pack_two_rows(const T* low, const T* high, Packed* out, int64_t stride, int count) {
  copy_factors(low, out, count);
  copy_factors(high, out + stride, count);
}

// The same from 8 pairs of a page.
inline void pack_eight_pairs(__m256i pairs, Packed* out, int64_t stride) {
  store(out, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
  store(out + stride, _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))));
}

// The same from 16 pairs of a page.
inline void pack_pairs(const pair* in, Packed* out, int64_t stride) {
  for (int i = 0; i < 16; i += 8) {
    pack_eight_pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)), out + i, stride);
  }
}

// 8 rows of 8 pairs of bf16 each -> 16 rows (stride `stride`) of 8 factors.
inline void transpose8(const bf16* const* rows, Packed* out, int64_t stride) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i]));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 a + b] holds, in 128-bit lane c, pair 4 c + b of rows 4 a .. 4 a + 3.
  for (int b = 0; b < 4; ++b) {
    pack_eight_pairs(_mm256_permute2x128_si256(r[b], r[4 + b], 0x20), out + 2 * b * stride, stride);
    pack_eight_pairs(_mm256_permute2x128_si256(r[b], r[4 + b], 0x31), out + (8 + 2 * b) * stride, stride);
  }
}

// 8 rows of 16 elements each, float32 or fp16 -> 16 rows (stride `stride`) of 8.
template <typename T>
inline void transpose8(const T* const* rows, Packed* out, int64_t stride) {
  for (int d = 0; d < 16; d += 8) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = widen(rows[i] + d);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // r[4 a + b] holds, in 128-bit lane c, element 4 c + b of rows 4 a .. 4 a + 3.
    for (int b = 0; b < 4; ++b) {
      store(out + (d + b) * stride, _mm256_permute2f128_ps(r[b], r[4 + b], 0x20));
      store(out + (d + 4 + b) * stride, _mm256_permute2f128_ps(r[b], r[4 + b], 0x31));
    }
  }
}

// `count` rows (a multiple of 16) of `dim` elements -> columns of the right-hand side. The outer loop is over
// dimensions: each cache line of `out` is written in two halves, by successive steps of the inner loop, while it is
// still in L1.
template <typename T>
inline void pack_columns(const T* const* rows, int count, int dim, Packed* out, int64_t stride) {
  for (int d = 0; d < dim; d += 16) {
    for (int n = 0; n < count; n += 8) {
      const T* source[8];
      for (int i = 0; i < 8; ++i) source[i] = rows[n + i] + d;
      transpose8(source, out + d * stride + n, stride);
    }
  }
}

// Calls body.template operator()<T>() with the type of a cache's elements.
template <typename Body>
inline void with_element(Element element, const Body& body) {
  if (element == Element::float32) {
    body.template operator()<float>();
  } else if (element == Element::float16) {
    body.template operator()<fp16>();
  } else {
    body.template operator()<bf16>();
  }
}

inline Floats to_floats(const int16_t* in) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}

// Sums of products of int8 with uint8, kBytes of them at a time, modulo 2^16.
using Sum = int16_t;
using Sums = __m256i;

constexpr int kBytes = 2;
constexpr int kSums = 16;

inline void store(Sum* out, Sums x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x); }
inline Sums load_bytes(const int8_t* in) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)); }
inline Sums max_sums(Sums a, Sums b) { return _mm256_max_epi16(a, b); }
inline Sum reduce_max_sums(Sums x) {
  const __m128i y = _mm_max_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i turned = _mm_minpos_epu16(_mm_xor_si128(y, _mm_set1_epi16(0x7fff)));
  return static_cast<Sum>(_mm_extract_epi16(turned, 0) ^ 0x7fff);
}
inline Sums repeat_sum(Sum x) { return _mm256_set1_epi16(x); }
inline Sums repeat_bytes(int32_t bytes) { return _mm256_set1_epi32(bytes); }

// kBytes int8 as the argument of repeat_bytes, the pair twice, so that it is a broadcast load alone.
inline int32_t to_repeat(const int8_t* in) {
  uint16_t bytes;
  std::memcpy(&bytes, in, sizeof bytes);
  return static_cast<int32_t>(bytes | static_cast<uint32_t>(bytes) << 16);
}

// sum + the products of kBytes uint8 with as many int8 in every lane, modulo 2^16. The latter are from -64 to 63, so
// that no pair of products saturates.
inline Sums multiply_add_bytes(Sums left, Sums right, Sums sum) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(left, right));
}

// The start of a sum with `offset`, and its end, where `less` is subtracted with saturation.
inline Sum begin_of_sum(Sum offset, Sum /*less*/) { return offset; }
inline Sums end_of_sum(Sums sum, Sum less) { return _mm256_subs_epi16(sum, repeat_sum(less)); }

}  // namespace minference
