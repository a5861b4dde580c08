// From score bins: attention per bin, thresholds, and the keys at or above a threshold.
#include "score_bins.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace minference {
namespace {

// Calls use(task, bins, threshold) for every head and tile; task is head * tiles + tile.
template <typename Use>
void for_tiles(const KeyArguments& a, const Use& use) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.tiles; ++task) {
    use(task, a.bins + task * a.seq_len, static_cast<uint8_t>(a.threshold[task / a.tiles]));
  }
}

// One row's attention per bin.
class Mass {
 public:
  // `count`: keys of the row, whose weights sum to 1. `squared`: the squares of the weights are summed.
  Mass(int64_t count, bool squared) : negligible_(1e-3f / static_cast<float>(count)), squared_(squared) {}

  // Adds neighbouring keys, each to its bin. Groups of kLanes whose weights are all negligible are not looked up and
  // count for bin 0, which is at most 1e-3 of the row. Neighbouring keys go to separate sums, since additions to one
  // sum wait for each other.
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

// Share of some rows' attention at or above each bin.
class Coverage {
 public:
  explicit Coverage(const float* mass) : mass_(mass) {}

  // The largest bin at or above which the rows' mean share, minus `errors` standard errors, reaches `share`; else 0.
  int of_mean(const int64_t* rows, int count, float share, float errors) const {
    std::array<double, kBins> sum{}, squares{};
    for (int r = 0; r < count; ++r) {
      const auto covered = of_row(rows[r]);
      for (int bin = 0; bin < kBins; ++bin) sum[bin] += covered[bin], squares[bin] += covered[bin] * covered[bin];
    }
    for (int bin = kBins - 1; bin > 0; --bin) {
      const double mean = sum[bin] / count, variance = std::max(0.0, squares[bin] / count - mean * mean);
      if (mean - errors * std::sqrt(variance / count) >= share) return bin;
    }
    return 0;
  }

  // The largest bin at or above which every row has at least `share`; else 0.
  int of_every(const int64_t* rows, int count, float share) const {
    int found = kBins - 1;
    for (int r = 0; r < count; ++r) {
      const auto covered = of_row(rows[r]);
      while (found > 0 && !(covered[found] >= share)) --found;
    }
    return found;
  }

 private:
  // A row's share at or above each bin. For a row without attention it is NaN, which never suffices.
  std::array<double, kBins> of_row(int64_t row) const {
    std::array<double, kBins> covered;
    double sum = 0.0;
    for (int bin = kBins - 1; bin >= 0; --bin) covered[bin] = sum += mass_[row * kBins + bin];
    for (double& one : covered) one /= sum;
    return covered;
  }

  const float* mass_;
};

}  // namespace
}  // namespace minference

extern "C" void minference_mass_by_bin(const minference::BinMassArguments* arguments) {
  using namespace minference;
  const BinMassArguments& a = *arguments;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.rows; ++task) {
    const uint8_t* bins = a.bins + (task / a.rows * a.tiles + a.tile_of_row[task % a.rows]) * a.seq_len;
    Mass mass(a.seq_len, a.squared != 0);
    mass.add(a.weights + task * a.seq_len, bins, a.seq_len);
    mass.write(a.mass + task * kBins);
  }
}

extern "C" void minference_threshold(const minference::ThresholdArguments* arguments) {
  using namespace minference;
  const ThresholdArguments& a = *arguments;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t head = 0; head < a.heads; ++head) {
    const int64_t* places = a.places + head * a.places_per_head;
    const Coverage coverage(a.mass + head * a.rows * kBins);
    const int ends[] = {a.sampled, a.sampled + a.first, a.places_per_head};
    int found = kBins - 1, begin = 0;
    for (const int end : ends) {
      const float errors = begin == 0 ? a.errors : 0.0f;
      if (end > begin) found = std::min(found, coverage.of_mean(places + begin, end - begin, a.share, errors));
      begin = end;
    }
    const int alone = a.places_per_head - a.sampled;
    if (alone > 0) found = std::min(found, coverage.of_every(places + a.sampled, alone, a.row_share));
    a.threshold[head] = found;
  }
}

extern "C" void minference_page_counts(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* bins, uint8_t threshold) {
    for (int64_t page = 0; page < pages; ++page) {
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      int32_t count = 0;
      for (int64_t key = first; key < end; ++key) count += bins[key] >= threshold;
      a.counts[task * pages + page] = count;
    }
  });
}

extern "C" void minference_keys_above(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* bins, uint8_t threshold) {
    int32_t* next = a.columns + task * a.max_columns;
    int32_t* const end_of_columns = next + a.max_columns;
    for (int64_t page = 0; page < pages; ++page) {
      if (!a.listed_pages[task * pages + page] || a.counts[task * pages + page] == 0) continue;
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      for (int64_t key = first; key < end; ++key) {
        if (bins[key] >= threshold) *next++ = static_cast<int32_t>(key);
      }
    }
    std::fill(next, end_of_columns, -1);
  });
}

extern "C" void minference_sampled_keys(const minference::SampleArguments* arguments) {
  const minference::SampleArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.tiles; ++task) {
    const int64_t tile = task % a.tiles, own = a.own_keys[tile];
    const uint8_t* bins = a.bins + task * a.seq_len;
    const int threshold = a.threshold[task / a.tiles];
    const bool* listed = a.listed_pages + task * pages;
    int32_t* columns = a.columns == nullptr ? nullptr : a.columns + task * a.max_columns;
    uint8_t* codes = a.codes + task * a.max_columns;
    // Systematic sampling: the keys' increments are summed, and a key that carries the sum past a multiple of 65536 is
    // taken.
    uint32_t sum = static_cast<uint32_t>(tile) * 40503 & 0xffff;
    int32_t count = 0;
    const auto take = [&](int64_t key, int code) {
      if (!listed[key / a.block_size]) return;
      if (columns != nullptr) columns[count] = static_cast<int32_t>(key), codes[count] = static_cast<uint8_t>(code);
      ++count;
    };
    for (int64_t key = a.first_keys[tile]; key < own; ++key) {
      if (bins[key] >= threshold) {
        take(key, 0);
        continue;
      }
      const int code = std::min(threshold - bins[key], a.max_code);
      sum += static_cast<uint32_t>(a.increments[code]);
      if (sum < 0x10000) continue;
      sum -= 0x10000;
      take(key, code);
    }
    a.num_columns[task] = count;
    if (columns != nullptr) std::fill(columns + count, columns + a.max_columns, -1);
  }
}
