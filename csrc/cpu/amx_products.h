// Matrix products by the AMX unit, in tiles of 16 rows of 64 bytes; vector_products.h has the same names for
// processors without AMX.
//
// A product C += A x B takes A in rows, and B as Packed: pairs of bf16 (or groups of four bytes) along the reduced
// dimension are adjacent. Two rows and two columns of tiles are multiplied at once: C in tiles 0 to 3, A in 4 and 5, B
// in 6 and 7.
#pragma once

#include <immintrin.h>

namespace minference {

constexpr int kProductRows = 32;  // maximum rows of product_rows; its buffers are padded to a multiple
constexpr int kDepthStep = 32;    // its depth is a multiple of this

// Configures the calling thread's tiles until the end of the scope. An earlier configuration is not restored.
class ProductUnit {
 public:
  // bytes: length of a row of A, a multiple of 4, at most 64; B has bytes / 4 rows.
  explicit ProductUnit(int bytes = 64) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } tiles;
    for (int i = 0; i < 8; ++i) {
      tiles.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? bytes : 64);
      tiles.rows[i] = static_cast<uint8_t>(i < 6 ? 16 : bytes / 4);
    }
    _tile_loadconfig(&tiles);
  }
  ~ProductUnit() { _tile_release(); }
  ProductUnit(const ProductUnit&) = delete;
  ProductUnit& operator=(const ProductUnit&) = delete;
};

// c[16 R][16 V] (+)= a[16 R][depth] x b[depth / 2][16 V]; strides in bytes.
template <int R, int V, bool kAdd>
inline void tile_product(const Factor* a, int64_t a_stride, const Packed* b, int64_t b_stride, float* c,
                         int64_t c_stride, int depth) {
  constexpr int64_t kFloat = sizeof(float), kPacked = sizeof(Packed), kFactor = sizeof(Factor);
  // gcc does not know that _tile_loadd reads memory.
  asm volatile("" ::: "memory");
  float* below = c + 16 * c_stride / kFloat;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_stride);
    if constexpr (V == 2) _tile_loadd(1, c + 16, c_stride);
    if constexpr (R == 2) _tile_loadd(2, below, c_stride);
    if constexpr (R == 2 && V == 2) _tile_loadd(3, below + 16, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (V == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && V == 2) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += kDepthStep, a += kDepthStep, b += 16 * b_stride / kPacked) {
    _tile_loadd(6, b, b_stride);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, b + 16, b_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * a_stride / kFactor, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (V == 2) _tile_stored(1, c + 16, c_stride);
  if constexpr (R == 2) _tile_stored(2, below, c_stride);
  if constexpr (R == 2 && V == 2) _tile_stored(3, below + 16, c_stride);
}

// c[rows][width] (+)= a[rows][depth] x b[depth / kPack][width], for at most kProductRows rows and a width that is a
// multiple of 16. Rows up to the next multiple of 16 are read and written, too.
template <int LDA, bool kAdd>
inline void product_rows(int rows, const Factor* a, const Packed* b, int64_t ldb, float* c, int64_t ldc, int depth,
                         int width) {
  constexpr int64_t kStride = LDA * sizeof(Factor), kPacked = sizeof(Packed), kFloat = sizeof(float);
  const int64_t b_stride = ldb * kPacked, c_stride = ldc * kFloat;
  int n = 0;
  for (; n + 32 <= width; n += 32) {
    if (rows > 16) {
      tile_product<2, 2, kAdd>(a, kStride, b + n, b_stride, c + n, c_stride, depth);
    } else {
      tile_product<1, 2, kAdd>(a, kStride, b + n, b_stride, c + n, c_stride, depth);
    }
  }
  if (n == width) return;
  if (rows > 16) {
    tile_product<2, 1, kAdd>(a, kStride, b + n, b_stride, c + n, c_stride, depth);
  } else {
    tile_product<1, 1, kAdd>(a, kStride, b + n, b_stride, c + n, c_stride, depth);
  }
}

// The largest ProductUnit row, in bytes, that divides a row of A of this length.
inline int byte_step(int bytes) {
  int parts = (bytes + 63) / 64;
  while (bytes % (4 * parts) != 0) ++parts;
  return bytes / parts;
}

// out[32][32] = a[32][bytes] x b[bytes / 4][32][4], of int8 and uint8, with a ProductUnit(byte_step(bytes)); strides in
// bytes.
inline void byte_products(const int8_t* a, int64_t a_stride, const int8_t* b, int bytes, int32_t* out) {
  asm volatile("" ::: "memory");
  constexpr int64_t kRight = 32 * 4, kOut = 32 * sizeof(int32_t);
  const int step = byte_step(bytes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < bytes; k += step, a += step, b += step / 4 * kRight) {
    _tile_loadd(6, b, kRight);
    _tile_loadd(4, a, a_stride);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, b + 64, kRight);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, a + 16 * a_stride, a_stride);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, out, kOut);
  _tile_stored(1, out + 16, kOut);
  _tile_stored(2, out + 16 * 32, kOut);
  _tile_stored(3, out + 16 * 32 + 16, kOut);
}

}  // namespace minference
