// The representative rows of each tile, or all of its candidates: representatives in
// minference_vllm/selection/tile_queries.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace minference {
namespace {

constexpr int kMostRows = 128;  // CANDIDATES in Python

struct alignas(64) RowWorkspace {
  alignas(64) float apart[kMaxHead * kMostRows];  // [rank][rows], queries scaled by the keys' size in each dimension
  alignas(64) float farthest[kMostRows];          // squared distance from the mean, then from the nearest chosen row
};

// Index of the first largest value, or of the first NaN. Values past `count` are below zero.
int largest(const float* values, int count) {
  Floats most = load(values), sum = most;
  for (int i = kLanes; i < count; i += kLanes) most = max(most, load(values + i)), sum += load(values + i);
  const bool numbers = !std::isnan(reduce_add(sum));
  const float best = reduce_max(most);
  for (int i = 0; i < count; ++i) {
    if (numbers ? values[i] == best : std::isnan(values[i])) return i;
  }
  return 0;
}

class TileRows {
 public:
  TileRows(const RepresentativeArguments& a, RowWorkspace& w, int64_t head, int64_t tile) : a_(a), w_(w) {
    begin_ = a.tile_starts[tile] - a.context_len;
    end_ = a.tile_starts[tile + 1] - a.context_len;
    rows_ = static_cast<int>((end_ - begin_ + a.step - 1) / a.step);
    low_ = a.low + head * a.chunk * a.rank;
    const float* key_size = a.key_size + head * a.rank;
    for (int k = 0; k < a.rank; ++k) {
      const float size = std::max(key_size[k], a.least_size);
      float* apart = w.apart + k * kMostRows;
      for (int i = 0; i < rows_; ++i) apart[i] = low_[(begin_ + i * a.step) * a.rank + k] * size;
      std::fill(apart + rows_, apart + kMostRows, 0.0f);
    }
    const bool all = choose();
    const int64_t place = head * a.tiles + tile;
    const int count = all ? rows_ : static_cast<int>(order_.size());
    a.count[place] = count;
    for (int i = 0; i < a.per_tile; ++i) {
      // Repeats the last one past the end.
      const int row = all ? std::min(i, rows_ - 1) : order_[std::min(i, count - 1)];
      const int64_t from = begin_ + row * a.step, to = place * a.per_tile + i;
      std::memcpy(a.out + to * a.rank, low_ + from * a.rank, a.rank * sizeof(float));
      a.position[to] = static_cast<int32_t>(from + a.context_len);
    }
  }

 private:
  // Fills order_ with the representatives; returns whether a row is too far from all of them.
  bool choose() {
    float point[kMaxHead];
    for (int k = 0; k < a_.rank; ++k) {
      const float* apart = w_.apart + k * kMostRows;
      float sum = 0.0f;
      for (int i = 0; i < rows_; ++i) sum += apart[i];
      point[k] = sum / static_cast<float>(rows_);
    }
    nearer(point, true);
    for (int i = 0; i < rows_; ++i) w_.farthest[i] += a_.least_apart;
    for (int taken = 0; taken < std::min(a_.wanted, rows_); ++taken) {
      const int row = largest(w_.farthest, rows_);
      // Rows equal to a chosen one add nothing. NaN counts as different.
      if (w_.farthest[row] <= 0.0f) break;
      order_.push_back(row);
      for (int k = 0; k < a_.rank; ++k) point[k] = w_.apart[k * kMostRows + row];
      nearer(point, taken == 0);
    }
    return w_.farthest[largest(w_.farthest, rows_)] > a_.alike * a_.alike;
  }

  // Lowers `farthest` to the rows' squared distances from a point, or sets it to them if `first`. NaN stays, and so do
  // the values below zero past the last row.
  void nearer(const float* point, bool first) {
    for (int i = 0; i < rows_; i += kLanes) {
      Floats sum = repeat(0.0f);
      for (int k = 0; k < a_.rank; ++k) {
        const Floats difference = load(w_.apart + k * kMostRows + i) - repeat(point[k]);
        sum += difference * difference;
      }
      const Floats before = load(w_.farthest + i);
      store(w_.farthest + i, first ? sum : min(before, sum) + (before - before));
    }
    if (first) std::fill(w_.farthest + rows_, w_.farthest + kMostRows, -1.0f);
  }

  const RepresentativeArguments& a_;
  RowWorkspace& w_;
  const float* low_;
  int64_t begin_, end_;
  int rows_;
  std::vector<int> order_;
};

}  // namespace
}  // namespace minference

extern "C" void minference_representatives(const minference::RepresentativeArguments* arguments) {
  using namespace minference;
  const RepresentativeArguments& a = *arguments;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.tiles; ++task) {
    TileRows(a, thread_workspace<RowWorkspace>(), task / a.tiles, task % a.tiles);
  }
}
