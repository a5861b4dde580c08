// Matrix products by vector instructions; amx_products.h has the same names for processors with AMX.
#pragma once

#include <algorithm>

#include "unroll.h"

namespace minference {

constexpr int kProductRows = kRows;  // maximum rows of product_rows; its buffers are padded to a multiple
constexpr int kDepthStep = 16;       // its depth is a multiple of this

// Vector instructions need no configuration per thread.
struct ProductUnit {
  explicit ProductUnit(int /*bytes*/ = 64) {}
};
constexpr int byte_step(int bytes) { return bytes; }

// c[R][kLanes V] (+)= a[R][depth] x b[depth / kPack][kLanes V]; a has the constant row stride LDA.
template <int R, int V, int LDA, bool kAdd>
inline void product(const Factor* a, const Packed* b, int64_t ldb, float* c, int64_t ldc, int depth) {
  Floats sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = kAdd ? load(c + r * ldc + kLanes * v) : repeat(0.0f);
  }
  for (int k = 0; k < depth / kPack; ++k) {
    Floats right[V];
    for (int v = 0; v < V; ++v) right[v] = load_packed(b + k * ldb + kLanes * v);
    for (int r = 0; r < R; ++r) {
      const Floats left = repeat_factors(a + r * LDA + kPack * k);
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(c + r * ldc + kLanes * v, sum[r][v]);
  }
}

// c[rows][width] (+)= a[rows][depth] x b[depth / kPack][width], for at most kProductRows rows and a width that is a
// multiple of 16.
template <int LDA, bool kAdd>
inline void product_rows(int rows, const Factor* a, const Packed* b, int64_t ldb, float* c, int64_t ldc, int depth,
                         int width) {
  with_rows<kRows>(rows, [&]<int R>() {
    int n = 0;
    for (; n + 2 * kLanes <= width; n += 2 * kLanes) product<R, 2, LDA, kAdd>(a, b + n, ldb, c + n, ldc, depth);
    if (n < width) product<R, 1, LDA, kAdd>(a, b + n, ldb, c + n, ldc, depth);
  });
}

}  // namespace minference
