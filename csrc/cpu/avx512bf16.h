// Vectors and packing on processors with AVX512-F/BW/VL/DQ/VNNI/BF16; avx2.h has the same names for all others.
//
// vdpbf16ps multiplies pairs of bf16 along the reduced dimension, so the right-hand side of a product [K] x [N] is
// kept as [K / 2][N] 32-bit pairs.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "interface.h"

namespace minference {

using Floats = __m512;
using Factor = bf16;  // element of the matrices that are multiplied
using Packed = pair;  // neighbouring factors along the reduced dimension

constexpr int kLanes = 16;
constexpr int kPack = 2;   // factors in one Packed
constexpr int kRows = 12;  // query rows per register tile: 12 x 2 accumulators + 2 operands fit 32 registers

inline Floats load(const float* in) { return _mm512_loadu_ps(in); }
inline void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
inline Floats repeat(float x) { return _mm512_set1_ps(x); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }

// x where position <= limit, -inf elsewhere.
inline Floats hide_after(Floats x, const int32_t* position, int32_t limit) {
  const __mmask16 visible = _mm512_cmple_epi32_mask(_mm512_loadu_si512(position), _mm512_set1_epi32(limit));
  return _mm512_mask_blend_ps(visible, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), x);
}

// x where position >= first, -inf elsewhere.
inline Floats hide_before(Floats x, const int32_t* position, int32_t first) {
  const __mmask16 visible = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(position), _mm512_set1_epi32(first));
  return _mm512_mask_blend_ps(visible, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), x);
}

// 2^x, relative error 2e-7; 0 if the result is below 2^-126, also for -inf: on Intel's processors a subnormal result
// takes a hundred cycles.
inline Floats exp2(Floats x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x - round(x)
  __m512 p = _mm512_set1_ps(1.326472722e-03f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671512812e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733745e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402224208e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931469776e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, _mm512_sub_ps(x, f));
}

inline Floats load_packed(const Packed* in) { return _mm512_loadu_ps(in); }

// The kPack factors at `in`, in every lane.
inline Floats repeat_factors(const Factor* in) {
  int32_t factors;
  std::memcpy(&factors, in, sizeof factors);
  return _mm512_castsi512_ps(_mm512_set1_epi32(factors));
}

inline Floats multiply_add(Floats left, Floats right, Floats sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

inline Floats widen(const bf16* in) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

// Rounded to nearest, ties to even.
inline Factor to_factor(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<Factor>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float to_float(Factor x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to nearest, ties to even; from -128 to 127.
inline void store_bytes(int8_t* out, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline void copy_factors(const bf16* in, Factor* out, int count) { std::memcpy(out, in, count * sizeof(Factor)); }

// 2 * kLanes factors.
inline void store_factors(Factor* out, Floats low, Floats high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline void store_element(bf16* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}

// Two neighbouring rows of the right-hand side.
inline void pack_two_rows(const bf16* low, const bf16* high, Packed* out, int64_t /*stride*/, int count) {
  alignas(64) static const uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kOrder);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int i = 0; i < count; i += 32) {
    const int left = std::min(32, count - i);
    const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(mask, low + i);
    const __m512i b = _mm512_maskz_loadu_epi16(mask, high + i);
    _mm512_mask_storeu_epi32(out + i, static_cast<__mmask16>(mask), _mm512_permutex2var_epi16(a, first, b));
    if (left > 16) {
      _mm512_mask_storeu_epi32(out + i + 16, static_cast<__mmask16>(mask >> 16),
                               _mm512_permutex2var_epi16(a, second, b));
    }
  }
}

// The same from 16 pairs of a page.
inline void pack_pairs(const pair* in, Packed* out, int64_t /*stride*/) {
  _mm512_storeu_si512(out, _mm512_loadu_si512(in));
}

// 16 rows of up to 16 pairs each -> up to 16 rows (stride `stride`) of 16 pairs.
inline void transpose16(const pair* const* rows, int width, pair* out, int64_t stride) {
  const __mmask16 mask = width >= 16 ? 0xffff : static_cast<__mmask16>((1u << width) - 1);
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, rows[i]);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 a + b] holds, in 128-bit lane c, column 4 c + b of rows 4 a .. 4 a + 3.
  for (int b = 0; b < 4; ++b) {
    const __m512i x = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88);
    const __m512i y = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
    const __m512i z = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd);
    const __m512i w = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
    const __m512i column[4] = {_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(z, w, 0x88),
                               _mm512_shuffle_i32x4(x, y, 0xdd), _mm512_shuffle_i32x4(z, w, 0xdd)};
    for (int c = 0; c < 4; ++c) {
      if (4 * c + b < width) _mm512_storeu_si512(out + (4 * c + b) * stride, column[c]);
    }
  }
}

// `count` rows (a multiple of 16) of `dim` elements -> columns of the right-hand side.
inline void pack_columns(const bf16* const* rows, int count, int dim, Packed* out, int64_t stride) {
  for (int n = 0; n < count; n += 16) {
    const pair* source[16];
    for (int k = 0; k < dim / 2; k += 16) {
      for (int i = 0; i < 16; ++i) source[i] = reinterpret_cast<const pair*>(rows[n + i]) + k;
      transpose16(source, dim / 2 - k, out + k * stride + n, stride);
    }
  }
}

// Calls body.template operator()<T>() with the type of a cache's elements: always bf16, the only type that this build
// multiplies.
template <typename Body>
inline void with_element(Element, const Body& body) {
  body.template operator()<bf16>();
}

inline Floats to_floats(const int16_t* in) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
}

// Sums of products of int8 with uint8, kBytes of them at a time.
using Sum = int32_t;
using Sums = __m512i;

constexpr int kBytes = 4;
constexpr int kSums = 16;

inline Sums load(const Sum* in) { return _mm512_loadu_si512(in); }
inline void store(Sum* out, Sums x) { _mm512_storeu_si512(out, x); }
inline Sums load_bytes(const int8_t* in) { return _mm512_loadu_si512(in); }
inline Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums max_sums(Sums a, Sums b) { return _mm512_max_epi32(a, b); }
inline Sum reduce_max_sums(Sums x) { return _mm512_reduce_max_epi32(x); }
inline Sums repeat_sum(Sum x) { return _mm512_set1_epi32(x); }
inline Sums repeat_bytes(int32_t bytes) { return _mm512_set1_epi32(bytes); }

// kBytes int8 as the argument of repeat_bytes.
inline int32_t to_repeat(const int8_t* in) {
  int32_t bytes;
  std::memcpy(&bytes, in, sizeof bytes);
  return bytes;
}

// sum + the products of kBytes uint8 with as many int8, in every lane.
inline Sums multiply_add_bytes(Sums left, Sums right, Sums sum) { return _mm512_dpbusd_epi32(sum, left, right); }

// The start of a sum with `offset`, and its end. 32 bits hold both, so `less` is subtracted at the start.
inline Sum begin_of_sum(Sum offset, Sum less) { return offset - less; }
inline Sums end_of_sum(Sums sum, Sum /*less*/) { return sum; }

}  // namespace minference
