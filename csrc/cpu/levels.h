// Attention weights of a row, to be added up by the levels of their keys.
#pragma once

#include "tiles.h"

namespace minference {

constexpr int kLevels = 256;

// Calls use(key, weight) for the weights of one row that count, and returns the sum of the others, a thousandth of its
// attention at the most.
template <typename Use>
inline float for_weights(const float* weights, int64_t count, const Use& use) {
  const float nothing = 1e-3f / static_cast<float>(count);
  Floats rest = repeat(0.0f);
  int64_t key = 0;
  for (; key + kLanes <= count; key += kLanes) {
    const Floats here = load(weights + key);
    if (reduce_max(here) < nothing) {
      rest += here;
      continue;
    }
    for (int i = 0; i < kLanes; ++i) use(key + i, weights[key + i]);
  }
  for (; key < count; ++key) use(key, weights[key]);
  return reduce_add(rest);
}

}  // namespace minference
