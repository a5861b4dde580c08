// Exact attention of some of a chunk's queries over all keys: scores by key tile, and the log-sum-exp of each row.
#pragma once

#include "tiles.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace minference {

constexpr int kMaxRows = 64;
constexpr int kTilesPerTask = 8;

// Zeros on both sides of a tile's scores, so that diagonals can be read past it.
constexpr int kScoreStride = kKeyTile + 2 * kMaxRows;

struct alignas(64) RowWorkspace {
  alignas(64) Packed keys[kMaxHead / kPack * kKeyTile];
  alignas(64) float scores[kMaxRows * kScoreStride];
  float largest[kMaxRows];  // maxima that the weights of the last tile in Normalizers::add are relative to

  float* row(int r) { return scores + r * kScoreStride + kMaxRows; }
};

// Scores of all rows. A task is kTilesPerTask key tiles for the wanted heads of one KV head, which share packed keys.
class RowScores {
 public:
  explicit RowScores(const RowArguments& arguments)
      : a_(arguments),
        key_tiles((a_.seq_len + kKeyTile - 1) / kKeyTile),
        parts((key_tiles + kTilesPerTask - 1) / kTilesPerTask),
        query_((static_cast<size_t>(a_.num_wanted) * a_.rows + kProductRows) * kQueryStride) {
    with_element(a_.cache.element, [&]<typename T>() { copy_queries(static_cast<const T*>(a_.query)); });
    for (int i = 0; i < a_.num_wanted; ++i) {
      if (i == 0 || kv_head(i) != kv_head(i - 1)) first_of_group_.push_back(i);
    }
    first_of_group_.push_back(a_.num_wanted);
  }

  int tasks() const { return static_cast<int>((first_of_group_.size() - 1) * parts); }

  // Calls use(wanted head, key tile) with the scores (in units of log2) in w.row(r)[n], for every tile of a task. Keys
  // in the future, past the end or before the row's window score -inf.
  template <typename Use>
  void run(int task, RowWorkspace& w, const Use& use) const {
    const int64_t group = task / parts, first_tile = task % parts * kTilesPerTask;
    for (int64_t tile = first_tile; tile < std::min(first_tile + kTilesPerTask, key_tiles); ++tile) {
      pack_sequence(a_.cache, a_.pages, a_.seq_len, kv_head(first_of_group_[group]), tile * kKeyTile, w.keys);
      for (int i = first_of_group_[group]; i < first_of_group_[group + 1]; ++i) {
        score_tile(query_.data() + static_cast<size_t>(i) * a_.rows * kQueryStride, w, tile * kKeyTile);
        use(i, tile);
      }
    }
  }

 private:
  template <typename T>
  void copy_queries(const T* query) {
    for (int i = 0; i < a_.num_wanted; ++i) {
      for (int r = 0; r < a_.rows; ++r) {
        copy_factors(query + a_.row_index[r] * a_.query_token_stride + a_.heads[i] * a_.query_head_stride,
                     query_.data() + (static_cast<size_t>(i) * a_.rows + r) * kQueryStride, a_.cache.head_size);
      }
    }
  }

  int kv_head(int wanted) const { return a_.heads[wanted] / (a_.num_heads / a_.cache.num_kv_heads); }

  void score_tile(const Factor* query, RowWorkspace& w, int64_t first_key) const {
    static constexpr auto kPlaces = [] {  // 0, 1, .. kKeyTile - 1
      std::array<int32_t, kKeyTile> places{};
      std::iota(places.begin(), places.end(), 0);
      return places;
    }();
    for (int r = 0; r < a_.rows; r += kProductRows) {
      product_rows<kQueryStride, false>(std::min(kProductRows, a_.rows - r), query + r * kQueryStride, w.keys, kKeyTile,
                                        w.row(r), kScoreStride, padded_depth(a_.cache.head_size), kKeyTile);
    }
    const Floats scale = repeat(a_.softcap == 0.0f ? a_.scale * kLog2e : kLog2e);
    for (int r = 0; r < a_.rows; ++r) {
      float* row = w.row(r);
      if (a_.softcap != 0.0f) soft_cap_row(row, kKeyTile, a_.scale, a_.softcap);
      const int64_t visible = a_.context_len + a_.row_index[r] - first_key;  // last visible key of the tile
      const auto limit = static_cast<int32_t>(std::clamp<int64_t>(visible, -1, kKeyTile));
      for (int n = 0; n < kKeyTile; n += kLanes) {
        store(row + n, hide_after(load(row + n) * scale, kPlaces.data() + n, limit));
      }
      if (a_.window != 0) std::fill_n(row, std::clamp<int64_t>(visible - a_.window + 1, 0, kKeyTile), -kInfinity);
    }
  }

  const RowArguments& a_;

 public:
  const int64_t key_tiles, parts;

 private:
  std::vector<Factor> query_;
  std::vector<int> first_of_group_;
};

// Log-sum-exp of each wanted head's rows. It is kept per part of the keys, so that sums do not depend on which thread
// runs which task, and equal inputs give equal results.
class Normalizers {
 public:
  Normalizers(const RowArguments& a, int64_t parts)
      : rows_(a.rows),
        count_(static_cast<size_t>(a.num_wanted) * a.rows),
        maximum_(count_ * parts, -kInfinity),
        sum_(count_ * parts, 0.0f) {}

  // Adds the scores of one head and one tile of a part, and replaces them by weights relative to w.largest.
  void add(RowWorkspace& w, int wanted, int64_t part) {
    for (int r = 0; r < rows_; ++r) {
      float* row = w.row(r);
      Floats largest = load(row);
      for (int n = kLanes; n < kKeyTile; n += kLanes) largest = max(largest, load(row + n));
      const float found = reduce_max(largest);
      if (found == -kInfinity) {
        w.largest[r] = found;
        std::fill_n(row, kKeyTile, 0.0f);
        continue;
      }
      float& best = maximum_[count_ * part + static_cast<size_t>(wanted) * rows_ + r];
      float& total = sum_[count_ * part + static_cast<size_t>(wanted) * rows_ + r];
      if (found > best) {
        total *= best == -kInfinity ? 0.0f : std::exp2(best - found);
        best = found;
      }
      const Floats shift = repeat(w.largest[r] = best);
      Floats added = repeat(0.0f);
      for (int n = 0; n < kKeyTile; n += kLanes) {
        const Floats weight = exp2(load(row + n) - shift);
        store(row + n, weight);
        added += weight;
      }
      total += reduce_add(added);
    }
  }

  // [wanted][rows], in units of log2.
  std::vector<float> result() const {
    std::vector<float> normalizer(count_);
    for (size_t i = 0; i < count_; ++i) {
      float best = -kInfinity, total = 0.0f;
      for (size_t at = i; at < maximum_.size(); at += count_) best = std::max(best, maximum_[at]);
      for (size_t at = i; at < maximum_.size(); at += count_) {
        if (sum_[at] > 0.0f) total += sum_[at] * std::exp2(maximum_[at] - best);
      }
      normalizer[i] = best + std::log2(total);
    }
    return normalizer;
  }

 private:
  int rows_;
  size_t count_;
  std::vector<float> maximum_, sum_;  // [parts][wanted][rows]
};

}  // namespace minference
