// Attention weights of a row, to be added up by the levels of their keys.
#pragma once

#include "tiles.h"

namespace minference {

constexpr int kLevels = 256;

// Calls use(key, weight) for the weights of one row that count: without the others a thousandth of its attention may
// be missing.
template <typename Use>
inline void for_weights(const float* weights, int64_t count, const Use& use) {
  const float nothing = 1e-3f / static_cast<float>(count);
  int64_t key = 0;
  for (; key + kLanes <= count; key += kLanes) {
    if (reduce_max(load(weights + key)) < nothing) continue;
    for (int i = 0; i < kLanes; ++i) {
      if (weights[key + i] >= nothing) use(key + i, weights[key + i]);
    }
  }
  for (; key < count; ++key) use(key, weights[key]);
}

}  // namespace minference
