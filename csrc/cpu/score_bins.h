// Score bins (minference_vllm/selection/score_bins.py), and the weights of a row to be summed per bin.
#pragma once

#include "tiles.h"

namespace minference {

constexpr int kBins = 256;
constexpr int kTopBin = 254;        // the largest bin of a key outside the tile's own pages
constexpr uint8_t kLocalBin = 255;  // of keys in the tile's own pages

// The attention of one row per bin.
class Mass {
 public:
  // Adds the row's weights, each to the bin that bin_of(key) names; keys ascend. Groups of kLanes keys whose weights are
  // all below 1e-3 / count are not looked up and count for bin 0: a row's weights sum to 1, so that this is 1e-3 at
  // most. Neighbours go to sums of their own, since an addition to a sum waits for the one before.
  template <typename BinOf>
  void add_row(const float* weights, int64_t count, const BinOf& bin_of) {
    const float negligible = 1e-3f / static_cast<float>(count);
    Floats rest = repeat(0.0f);
    int64_t key = 0;
    for (; key + kLanes <= count; key += kLanes) {
      const Floats here = load(weights + key);
      if (reduce_max(here) < negligible) {
        rest += here;
        continue;
      }
      for (int i = 0; i < kLanes; ++i) sum_[i % kSplit][bin_of(key + i)] += weights[key + i];
    }
    for (; key < count; ++key) sum_[0][bin_of(key)] += weights[key];
    sum_[0][0] += reduce_add(rest);
  }

  void write(float* mass) const {
    for (int bin = 0; bin < kBins; ++bin) {
      mass[bin] = 0.0f;
      for (const auto& part : sum_) mass[bin] += part[bin];
    }
  }

 private:
  static constexpr int kSplit = 4;
  float sum_[kSplit][kBins] = {};
};

}  // namespace minference
