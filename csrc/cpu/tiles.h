// Building blocks of the CPU kernels: packing keys and values from pages, small matrix products. The compiler's flags
// choose the header with the vector instructions. No Python or torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "interface.h"

#ifdef __AVX512BF16__
#include "avx512bf16.h"
#else
#include "avx2.h"
#endif
#include "unroll.h"
#ifdef __AMX_BF16__
#include "amx_products.h"
#else
#include "vector_products.h"
#endif

namespace minference {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kKeyTile = 128;      // keys handled together
constexpr int kMaxHead = 256;      // largest head size
constexpr int kQueryStride = 288;  // row stride of copied queries; a power of two would cause cache set conflicts

// The calling thread's workspace, reused across calls so that it stays in its core's caches. Not inlined: the compiler
// would look up the thread-local address repeatedly, with a call each time. Static, since a process may load several
// builds whose workspaces have the same name and different sizes.
template <typename Workspace>
[[gnu::noinline]] static Workspace& thread_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// Depth of queries and packed keys in product_rows: the head size, padded with zeros.
inline int padded_depth(int dim) { return (dim + kDepthStep - 1) / kDepthStep * kDepthStep; }

inline void clear_padding(Packed* keys, int dim) {
  std::memset(keys + dim / kPack * kKeyTile, 0, (padded_depth(dim) - dim) / kPack * kKeyTile * sizeof(Packed));
}

// Keys as rows -> packed[d / kPack][kKeyTile] from column `at` on. `count` is a multiple of 16.
template <typename T>
inline void pack_key_rows(const T* const* rows, int count, int dim, Packed* packed, int at) {
  pack_columns(rows, count, dim, packed + at, kKeyTile);
}

// Values as rows -> packed[(at + n) / kPack][dim]. `count` and `at` are even.
template <typename T>
inline void pack_value_rows(const T* const* rows, int count, int dim, Packed* packed, int at) {
  for (int n = 0; n < count; n += 2) {
    pack_two_rows(rows[n], rows[n + 1], packed + (at + n) / kPack * dim, dim, dim);
  }
}

// Keys of slots [slot, slot + count) of one page; count and slot are multiples of 32.
template <typename T>
inline void pack_keys(const Cache& cache, int64_t page, int head, int slot, int count, Packed* packed, int at) {
  const T* base = static_cast<const T*>(cache.key) + page * cache.page_stride + head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  if (cache.layout == Layout::transposed) {
    for (int d = 0; d < dim; d += 2) {
      const T* row = base + d * size + slot;
      pack_two_rows(row, row + size, packed + d / kPack * kKeyTile + at, kKeyTile, count);
    }
  } else if (cache.layout == Layout::amx) {
    const pair* source = reinterpret_cast<const pair*>(base);
    for (int n = 0; n < count; n += 16) {
      for (int d = 0; d < dim; d += 2) {
        const pair* keys = source + ((slot + n) / 16 * (dim / 2) + d / 2) * 16;
        pack_pairs(keys, packed + d / kPack * kKeyTile + at + n, kKeyTile);
      }
    }
  } else {
    const T* rows[kKeyTile];
    for (int n = 0; n < count; ++n) rows[n] = base + (slot + n) * cache.row_stride;
    pack_key_rows(rows, count, dim, packed, at);
  }
}

// Keys [first, first + kKeyTile) of a sequence; zeros for those past its last page.
inline void pack_sequence(const Cache& cache, const int64_t* pages, int64_t seq_len, int head, int64_t first,
                          Packed* packed) {
  const int size = cache.block_size;
  clear_padding(packed, cache.head_size);
  int at = 0;
  while (at < kKeyTile) {
    const int64_t key = first + at;
    if (key >= seq_len) {
      for (int k = 0; k < cache.head_size / kPack; ++k) {
        std::memset(packed + k * kKeyTile + at, 0, (kKeyTile - at) * sizeof(Packed));
      }
      return;
    }
    const int slot = static_cast<int>(key % size);
    const int count = std::min(size - slot, kKeyTile - at);
    with_element(cache.element, [&]<typename T>() {
      pack_keys<T>(cache, pages[key / size], head, slot, count, packed, at);
    });
    at += count;
  }
}

template <typename T>
inline void pack_values(const Cache& cache, int64_t page, int head, int slot, int count, Packed* packed, int at) {
  const T* base = static_cast<const T*>(cache.value) + page * cache.page_stride + head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  if (cache.layout == Layout::amx) {
    const pair* source = reinterpret_cast<const pair*>(base);
    for (int n = 0; n < count; n += 2) {
      for (int d = 0; d < dim; d += 16) {
        const pair* values = source + (d / 16 * (size / 2) + (slot + n) / 2) * 16;
        pack_pairs(values, packed + (at + n) / kPack * dim + d, dim);
      }
    }
  } else {
    const int64_t stride = cache.layout == Layout::rows ? cache.row_stride : dim;
    const T* rows[kKeyTile];
    for (int n = 0; n < count; ++n) rows[n] = base + (slot + n) * stride;
    pack_value_rows(rows, count, dim, packed, at);
  }
}

// cap * tanh(x / cap), with a relative error of 3e-7. Near zero, where 1 - 2 / (e^2y + 1) cancels, tanh is y times a
// polynomial in y^2 (least squares, error 1e-7).
inline Floats soft_cap(Floats x, Floats cap, Floats inverse_cap) {
  const Floats y = x * inverse_cap, square = y * y;
  Floats p = repeat(-5.7040425e-3f);
  p = p * square + repeat(2.0637862e-2f);
  p = p * square + repeat(-5.3739157e-2f);
  p = p * square + repeat(1.3331432e-1f);
  p = p * square + repeat(-3.3333281e-1f);
  const Floats near = y + y * square * p;
  // Beyond 10, tanh is 1 in float32.
  const Floats bounded = max(repeat(-10.0f), repeat(0.0f) - max(repeat(-10.0f), repeat(0.0f) - y));
  const Floats far = repeat(1.0f) - repeat(2.0f) / (exp2(bounded * repeat(2.0f * kLog2e)) + repeat(1.0f));
  return cap * (square < repeat(0.390625f) ? near : far);
}

// Products of one row -> scores with a soft cap, in place. `count` is a multiple of 16.
inline void soft_cap_row(float* products, int count, float scale, float cap) {
  const Floats to_score = repeat(scale), caps = repeat(cap), inverse_cap = repeat(1.0f / cap);
  for (int n = 0; n < count; n += kLanes) store(products + n, soft_cap(load(products + n) * to_score, caps, inverse_cap));
}

}  // namespace minference
