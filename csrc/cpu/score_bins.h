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
  // `count`: keys of the row, whose weights sum to 1. `squared`: the squares of the weights are summed.
  Mass(int64_t count, bool squared) : negligible_(1e-3f / static_cast<float>(count)), squared_(squared) {}

  // Adds neighbouring keys, each to its bin. Groups of kLanes whose weights are all negligible are not looked up and
  // count for bin 0: that is 1e-3 of the row at most. Neighbours go to sums of their own, since an addition to a sum
  // waits for the one before.
  void add(const bf16* weights, const uint8_t* bins, int64_t count) {
    int64_t key = 0;
    for (; key + kLanes <= count; key += kLanes) {
      const Floats here = widen(weights + key);
      if (reduce_max(here) < negligible_) {
        rest_ += counted(here);
        continue;
      }
      float weight[kLanes];
      store(weight, counted(here));
      for (int i = 0; i < kLanes; ++i) sum_[i % kSplit][bins[key + i]] += weight[i];
    }
    if (key == count) return;
    bf16 last[kLanes] = {};
    std::memcpy(last, weights + key, (count - key) * sizeof(bf16));
    float weight[kLanes];
    store(weight, counted(widen(last)));
    for (int i = 0; key < count; ++key, ++i) sum_[0][bins[key]] += weight[i];
  }

  void write(float* mass) const {
    for (int bin = 0; bin < kBins; ++bin) {
      mass[bin] = 0.0f;
      for (const auto& part : sum_) mass[bin] += part[bin];
    }
    mass[0] += reduce_add(rest_);
  }

 private:
  static constexpr int kSplit = 4;

  Floats counted(Floats weights) const { return squared_ ? weights * weights : weights; }

  float negligible_;
  bool squared_;
  Floats rest_ = repeat(0.0f);
  float sum_[kSplit][kBins] = {};
};

}  // namespace minference
