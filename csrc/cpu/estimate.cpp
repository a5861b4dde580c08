// Exact attention of some of a chunk's queries: every key's share of it, or the weights summed per column and per
// diagonal, in two passes over K. minference_vllm/selection/low_rank.py and probe_queries.py say which queries and what
// for.
#include "rows.h"

namespace minference {
namespace {

// `count` floats as bf16; whole vectors are read.
void store_as_bf16(bf16* out, const float* in, int64_t count) {
  for (int64_t n = 0; n < count; n += kLanes) {
    if (n + kLanes <= count) {
      store_element(out + n, load(in + n));
    } else {
      bf16 rest[kLanes];
      store_element(rest, load(in + n));
      std::memcpy(out + n, rest, (count - n) * sizeof(bf16));
    }
  }
}

}  // namespace
}  // namespace minference

// Shares of a tile of keys are stored relative to the row's maximum so far, and rescaled when the row's log-sum-exp is
// known: one exponential per share.
extern "C" void minference_row_shares(const minference::RowShareArguments* arguments) {
  using namespace minference;
  const RowArguments& a = arguments->row_arguments;
  const RowScores scores(a);
  Normalizers normalizers(a, scores.parts);
  std::vector<float> normalizer;
  const int num_rows = a.num_wanted * a.rows;
  std::vector<float> relative_to(static_cast<size_t>(num_rows) * scores.key_tiles);
#pragma omp parallel num_threads(a.threads)
  {
    auto& w = thread_workspace<RowWorkspace>();
    const ProductUnit unit;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < scores.tasks(); ++task) {
      scores.run(task, w, [&](int i, int64_t tile) {
        const int64_t first_key = tile * kKeyTile, here = std::min<int64_t>(kKeyTile, a.seq_len - first_key);
        const float* log_norms = arguments->log_norms + i * a.seq_len + first_key;
        for (int r = 0; r < a.rows; ++r) {
          for (int64_t n = 0; n < here; ++n) w.row(r)[n] += log_norms[n];
        }
        normalizers.add(w, i, task % scores.parts);
        for (int r = 0; r < a.rows; ++r) {
          const int64_t row = static_cast<int64_t>(i) * a.rows + r;
          relative_to[row * scores.key_tiles + tile] = w.largest[r];
          store_as_bf16(arguments->shares + row * a.seq_len + first_key, w.row(r), here);
        }
      });
    }
#pragma omp single
    normalizer = normalizers.result();
#pragma omp for schedule(static)
    for (int row = 0; row < num_rows; ++row) {
      for (int64_t tile = 0; tile < scores.key_tiles; ++tile) {
        bf16* shares = arguments->shares + row * a.seq_len + tile * kKeyTile;
        const int64_t here = std::min<int64_t>(kKeyTile, a.seq_len - tile * kKeyTile);
        const float factor = std::exp2(relative_to[row * scores.key_tiles + tile] - normalizer[row]);
        alignas(64) bf16 relative[kKeyTile];
        alignas(64) float scaled[kKeyTile];
        std::memcpy(relative, shares, here * sizeof(bf16));
        for (int n = 0; n < kKeyTile; n += kLanes) store(scaled + n, widen(relative + n) * repeat(factor));
        store_as_bf16(shares, scaled, here);
      }
    }
  }
}

extern "C" void minference_column_diagonal_scores(const minference::ColumnDiagonalArguments* arguments) {
  using namespace minference;
  const RowArguments& a = arguments->row_arguments;
  const RowScores scores(a);
  Normalizers normalizers(a, scores.parts);
  std::vector<float> normalizer;
  const int row_groups = arguments->num_groups;
  const int32_t* group_starts = arguments->group_starts;
  const int64_t parts = scores.parts;
  // Diagonals are first summed by place: for key n and row r of a group, n + (last row of the group) - r. The keys of
  // one part reach up to kMaxRows places into the next part's range. Another thread may be writing there, so these
  // sums go to `spill` and are added at the end.
  const int64_t places = scores.key_tiles * kKeyTile;
  std::vector<float> by_place(static_cast<size_t>(a.num_wanted) * row_groups * places, 0.0f);
  std::vector<float> spill(static_cast<size_t>(a.num_wanted) * row_groups * parts * kMaxRows, 0.0f);

#pragma omp parallel num_threads(a.threads)
  {
    auto& w = thread_workspace<RowWorkspace>();
    const ProductUnit unit;
    std::memset(w.scores, 0, sizeof w.scores);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < scores.tasks(); ++task) {
      scores.run(task, w, [&](int i, int64_t) { normalizers.add(w, i, task % parts); });
    }
#pragma omp single
    normalizer = normalizers.result();
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < scores.tasks(); ++task) {
      const int64_t part = task % parts;
      const int64_t end_place = std::min((part + 1) * kTilesPerTask * kKeyTile, places);
      scores.run(task, w, [&](int i, int64_t tile) {
        const int64_t first_key = tile * kKeyTile;
        alignas(64) float column[kKeyTile];
        for (int n = 0; n < kKeyTile; n += kLanes) {
          Floats total = repeat(0.0f);
          for (int r = 0; r < a.rows; ++r) {
            const Floats weight = exp2(load(w.row(r) + n) - repeat(normalizer[static_cast<size_t>(i) * a.rows + r]));
            store(w.row(r) + n, weight);
            total += weight;
          }
          store(column + n, total);
        }
        const int64_t here = std::min<int64_t>(kKeyTile, a.seq_len - first_key);
        std::memcpy(arguments->columns + i * a.seq_len + first_key, column, here * sizeof(float));
        for (int group = 0; group < row_groups; ++group) {
          const size_t series = static_cast<size_t>(i) * row_groups + group;
          float* place = by_place.data() + series * places;
          float* beyond = spill.data() + (series * parts + part) * kMaxRows;
          for (int p = 0; p < kKeyTile + kMaxRows; p += kLanes) {
            Floats total = repeat(0.0f);
            const int end = group_starts[group + 1];
            for (int r = group_starts[group]; r < end; ++r) total += load(w.row(r) + p - (end - 1 - r));
            float* target = first_key + p < end_place ? place + first_key + p : beyond + (first_key + p - end_place);
            store(target, load(target) + total);
          }
        }
      });
    }
#pragma omp for schedule(static)
    for (int i = 0; i < a.num_wanted; ++i) {
      float* out = arguments->diagonals + i * a.seq_len;
      std::fill(out, out + a.seq_len, kInfinity);
      for (int group = 0; group < row_groups; ++group) {
        const size_t series = static_cast<size_t>(i) * row_groups + group;
        float* place = by_place.data() + series * places;
        for (int64_t part = 0; part + 1 < parts; ++part) {
          const float* beyond = spill.data() + (series * parts + part) * kMaxRows;
          for (int n = 0; n < kMaxRows; ++n) place[(part + 1) * kTilesPerTask * kKeyTile + n] += beyond[n];
        }
        // The smallest of the groups' diagonals; groups whose last row is nearer to the start than `distance` are left
        // out. Weights are scaled as if the group had all rows.
        const int rows = group_starts[group + 1] - group_starts[group];
        const int64_t last = a.context_len + a.row_index[group_starts[group + 1] - 1];
        const float weight = static_cast<float>(a.rows) / static_cast<float>(rows);
        for (int64_t distance = 0; distance <= last; ++distance) {
          out[distance] = std::min(out[distance], weight * place[last - distance]);
        }
      }
    }
  }
}
