// Building blocks of the CPU kernels: packing keys and values for vdpbf16ps, small matrix products, exp2.
//
// vdpbf16ps multiplies pairs of bf16 along the reduced dimension, so the right-hand side of a product [K] x [N] is
// kept as [K / 2][N] 32-bit pairs. Needs AVX512-F/BW/VL/DQ/BF16; no torch headers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace minference {

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the lower index in the low half

constexpr int kKeyTile = 128;      // keys handled together
constexpr int kRows = 12;          // query rows per register tile: 12 x 2 accumulators + 2 operands fit 32 registers
constexpr int kMaxHead = 256;      // largest head size
constexpr int kQueryStride = 288;  // row stride of copied queries: a constant, and not a power of two (cache sets)

enum class Layout : int32_t { rows = 0, transposed = 1, amx = 2 };

// Keys and values of one layer in pages. A page of one KV head starts at page * page_stride + head * head_stride.
struct Cache {
  const bf16* key;
  const bf16* value;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;  // layout `rows` only: from one token to the next
  int32_t block_size;
  int32_t head_size;
  int32_t num_kv_heads;
  Layout layout;
};

// out[i] = pair(low[i], high[i]) for i < count.
inline void interleave(const bf16* low, const bf16* high, pair* out, int count) {
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

// Keys as rows -> packed[d / 2][kKeyTile] from column `at` on. `count` is a multiple of 16.
inline void pack_key_rows(const bf16* const* rows, int count, int dim, pair* packed, int at) {
  for (int n = 0; n < count; n += 16) {
    const pair* source[16];
    for (int k = 0; k < dim / 2; k += 16) {
      for (int i = 0; i < 16; ++i) source[i] = reinterpret_cast<const pair*>(rows[n + i]) + k;
      transpose16(source, dim / 2 - k, packed + k * kKeyTile + at + n, kKeyTile);
    }
  }
}

// Values as rows -> packed[(at + n) / 2][dim]. `count` and `at` are even.
inline void pack_value_rows(const bf16* const* rows, int count, int dim, pair* packed, int at) {
  for (int n = 0; n < count; n += 2) interleave(rows[n], rows[n + 1], packed + (at + n) / 2 * dim, dim);
}

// Keys of slots [slot, slot + count) of one page; count and slot are multiples of 32.
inline void pack_keys(const Cache& cache, int64_t page, int head, int slot, int count, pair* packed, int at) {
  const bf16* base = cache.key + page * cache.page_stride + head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  if (cache.layout == Layout::transposed) {
    for (int k = 0; k < dim / 2; ++k) {
      const bf16* row = base + 2 * k * size + slot;
      interleave(row, row + size, packed + k * kKeyTile + at, count);
    }
  } else if (cache.layout == Layout::amx) {
    const pair* source = reinterpret_cast<const pair*>(base);
    for (int n = 0; n < count; n += 16) {
      for (int k = 0; k < dim / 2; ++k) {
        const __m512i keys = _mm512_loadu_si512(source + ((slot + n) / 16 * (dim / 2) + k) * 16);
        _mm512_storeu_si512(packed + k * kKeyTile + at + n, keys);
      }
    }
  } else {
    const bf16* rows[kKeyTile];
    for (int n = 0; n < count; ++n) rows[n] = base + (slot + n) * cache.row_stride;
    pack_key_rows(rows, count, dim, packed, at);
  }
}

inline void pack_values(const Cache& cache, int64_t page, int head, int slot, int count, pair* packed, int at) {
  const bf16* base = cache.value + page * cache.page_stride + head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  if (cache.layout == Layout::amx) {
    const pair* source = reinterpret_cast<const pair*>(base);
    for (int n = 0; n < count; n += 2) {
      for (int d = 0; d < dim; d += 16) {
        const __m512i values = _mm512_loadu_si512(source + (d / 16 * (size / 2) + (slot + n) / 2) * 16);
        _mm512_storeu_si512(packed + (at + n) / 2 * dim + d, values);
      }
    }
  } else {
    const int64_t stride = cache.layout == Layout::rows ? cache.row_stride : dim;
    const bf16* rows[kKeyTile];
    for (int n = 0; n < count; ++n) rows[n] = base + (slot + n) * stride;
    pack_value_rows(rows, count, dim, packed, at);
  }
}

// c[R][16 V] (+)= a[R][2 * pairs] x b[pairs][16 V]; a has the constant row stride LDA.
template <int R, int V, int LDA, bool kAdd>
inline void product(const bf16* a, const pair* b, int64_t ldb, float* c, int64_t ldc, int pairs) {
  __m512 sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = kAdd ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
  }
  for (int k = 0; k < pairs; ++k) {
    __m512bh right[V];
    for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * v);
    for (int r = 0; r < R; ++r) {
      int32_t left;
      __builtin_memcpy(&left, a + r * LDA + 2 * k, sizeof left);
      const __m512bh repeated = (__m512bh)_mm512_set1_epi32(left);
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], repeated, right[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, sum[r][v]);
  }
}

// The same for any width (a multiple of 16).
template <int R, int LDA, bool kAdd>
inline void product_rows(const bf16* a, const pair* b, int64_t ldb, float* c, int64_t ldc, int pairs, int width) {
  int n = 0;
  for (; n + 32 <= width; n += 32) product<R, 2, LDA, kAdd>(a, b + n, ldb, c + n, ldc, pairs);
  if (n < width) product<R, 1, LDA, kAdd>(a, b + n, ldb, c + n, ldc, pairs);
}

// Calls body.template operator()<R>() for the run-time number of rows 1 .. kRows.
template <int R = kRows, typename Body>
inline void with_rows(int rows, const Body& body) {
  if constexpr (R == 1) {
    body.template operator()<1>();
  } else if (rows == R) {
    body.template operator()<R>();
  } else {
    with_rows<R - 1>(rows, body);
  }
}

// 2^x to 2e-7 relative; -inf gives 0.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(_mm512_max_ps(x, _mm512_set1_ps(-200.0f)), _mm512_max_ps(whole, _mm512_set1_ps(-200.0f)));
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, _mm512_max_ps(whole, _mm512_set1_ps(-200.0f)));
}

}  // namespace minference
