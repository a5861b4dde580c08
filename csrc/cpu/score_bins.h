// Score bins (minference_vllm/selection/score_bins.py).
#pragma once

#include "tiles.h"

namespace minference {

constexpr int kBins = 256;
constexpr int kTopBin = 254;        // the largest bin of a key outside the tile's own pages
constexpr uint8_t kLocalBin = 255;  // of keys in the tile's own pages

}  // namespace minference
