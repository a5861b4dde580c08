// Keys in few dimensions as int8, straight from the pages: quantize_keys in minference_vllm/selection/projection.py.
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace minference {
namespace {

// The projection's columns as rows of factors. If factors are bf16, each float is split into the nearest bf16 and the
// rounding error as another bf16, so that products are as accurate as in float32.
struct Projection {
  std::vector<Factor> nearest, missing;

  Projection(const float* to_key, int dim, int rank) : nearest(rank * kQueryStride), missing(rank * kQueryStride) {
    for (int k = 0; k < rank; ++k) {
      for (int d = 0; d < dim; ++d) {
        const float x = to_key[d * rank + k];
        const Factor rounded = to_factor(x);
        nearest[k * kQueryStride + d] = rounded;
        missing[k * kQueryStride + d] = to_factor(x - to_float(rounded));
      }
    }
  }
};

struct alignas(64) Workspace {
  alignas(64) Packed keys[kMaxHead / kPack * kKeyTile];
  alignas(64) float low[kMaxHead * kKeyTile];    // [rank][keys]
  alignas(64) int8_t codes[kMaxHead * kKeyTile];  // likewise
};

template <bool kAdd>
void multiply(const Factor* projection, Workspace& w, int rank, int dim) {
  for (int k = 0; k < rank; k += kProductRows) {
    product_rows<kQueryStride, kAdd>(std::min(kProductRows, rank - k), projection + k * kQueryStride, w.keys, kKeyTile,
                                     w.low + k * kKeyTile, kKeyTile, padded_depth(dim), kKeyTile);
  }
}

// Centred, shortened to max_norm, rounded.
void quantize(const KeyCodeArguments& a, const float* center, Workspace& w) {
  for (int n = 0; n < kKeyTile; n += kLanes) {
    Floats square = repeat(0.0f);
    for (int k = 0; k < a.rank; ++k) {
      float* low = w.low + k * kKeyTile + n;
      const Floats x = load(low) - repeat(center[k]);
      store(low, x);
      square += x * x;
    }
    const Floats shorten = repeat(a.max_norm) / max(square_root(square), repeat(a.max_norm));
    const Floats most = repeat(static_cast<float>(a.max_code));
    for (int k = 0; k < a.rank; ++k) {
      const Floats x = load(w.low + k * kKeyTile + n) * shorten;
      store_bytes(w.codes + k * kKeyTile + n, max(min(x, most), repeat(0.0f) - most));
    }
  }
}

void run_task(const KeyCodeArguments& a, const Projection& projection, Workspace& w, int head, int64_t first) {
  const int kv_head = a.heads[head] / (a.num_heads / a.cache.num_kv_heads);
  pack_sequence(a.cache, a.pages, a.seq_len, kv_head, first, w.keys);
  multiply<false>(projection.nearest.data(), w, a.rank, a.cache.head_size);
  if (sizeof(Factor) < sizeof(float)) multiply<true>(projection.missing.data(), w, a.rank, a.cache.head_size);
  quantize(a, a.center + static_cast<int64_t>(head) * a.rank, w);
  const int here = static_cast<int>(std::min<int64_t>(kKeyTile, a.seq_len - first));
  int8_t* out = a.codes + (head * a.seq_len + first) * a.rank;
  for (int n = 0; n < here; ++n) {
    for (int k = 0; k < a.rank; ++k) out[n * a.rank + k] = w.codes[k * kKeyTile + n];
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_key_codes(const minference::KeyCodeArguments* arguments) {
  using namespace minference;
  const KeyCodeArguments& a = *arguments;
  const int64_t key_tiles = (a.seq_len + kKeyTile - 1) / kKeyTile, tasks = a.num_wanted * key_tiles;
  const int64_t size = static_cast<int64_t>(a.cache.head_size) * a.rank;
  std::vector<Projection> projections;
  for (int i = 0; i < a.num_wanted; ++i) projections.emplace_back(a.to_key + i * size, a.cache.head_size, a.rank);
#pragma omp parallel num_threads(a.threads)
  {
    auto& w = thread_workspace<Workspace>();
    const ProductUnit unit;
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < tasks; ++task) {
      const int head = static_cast<int>(task / key_tiles);
      run_task(a, projections[head], w, head, task % key_tiles * kKeyTile);
    }
  }
}
