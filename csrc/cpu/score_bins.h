// Score bins (minference_vllm/selection/score_bins.py), and the weights of a row to be summed per bin.
#pragma once

#include "tiles.h"

namespace minference {

constexpr int kBins = 256;
constexpr int kTopBin = 254;        // the largest bin of a key outside the tile's own pages
constexpr uint8_t kLocalBin = 255;  // of keys in the tile's own pages

// Calls use(key, weight) for the weights of one row, except for groups of kLanes keys whose weights are all below
// 1e-3 / count; returns the sum of those. A row's weights sum to 1, so that this is 1e-3 at most.
template <typename Use>
inline float for_weights(const float* weights, int64_t count, const Use& use) {
  const float negligible = 1e-3f / static_cast<float>(count);
  Floats rest = repeat(0.0f);
  int64_t key = 0;
  for (; key + kLanes <= count; key += kLanes) {
    const Floats here = load(weights + key);
    if (reduce_max(here) < negligible) {
      rest += here;
      continue;
    }
    for (int i = 0; i < kLanes; ++i) use(key + i, weights[key + i]);
  }
  for (; key < count; ++key) use(key, weights[key]);
  return reduce_add(rest);
}

}  // namespace minference
