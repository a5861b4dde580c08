// Score bins of all keys per query tile, and the attention of some rows per bin, from queries and keys of few
// dimensions in int8.
//
// tile_score_bins has one task per head and tile, with two passes over the keys: the first finds the largest products
// and approx_lse, the second multiplies again only the rows and blocks whose largest product reaches `min_bin`. The
// first has rows in the lanes, the second keys, so that no maximum needs shuffles.
#include "byte_rows.h"

namespace minference {
namespace {

// The bin of a key that is `bins` above approx_lse.
int to_bin(int bins) { return std::clamp(kTopBin + bins, 0, kTopBin); }

class TileTask {
 public:
  TileTask(const TileScoreBinArguments& arguments, const KeysInLanes& keys, ByteWorkspace& space, int head, int tile)
      : qk_(arguments.qk), keys_(keys), w_(space), rows_(arguments.qk, space, head), head_(head) {
    const int64_t chunk_start = arguments.tile_starts[0], seq_len = qk_.seq_len;
    const int64_t start = arguments.tile_starts[tile], end = arguments.tile_starts[tile + 1];
    const int64_t local = start / arguments.tile * arguments.tile;  // the first key in the tile's own pages
    uint8_t* bins = arguments.bins + (static_cast<int64_t>(head) * arguments.tiles + tile) * seq_len;
    rows_.load_rows(static_cast<int>(end - start), [&](int r) { return start - chunk_start + r; });
    rows_.find_approx_lse();
    const int min_bin = arguments.min_bin[head];
    for (int64_t first = 0; first < local; first += kPeakKeys) {
      alignas(64) int16_t found[kPeakKeys];
      find_bins(first / kPeakKeys, min_bin, found);
      for (int64_t n = 0; n < std::min<int64_t>(kPeakKeys, local - first); ++n) {
        const int bin = to_bin(found[n]);
        bins[first + n] = static_cast<uint8_t>(bin < min_bin ? 0 : bin);
      }
    }
    std::memset(bins + local, kLocalBin, end - local);
    std::memset(bins + end, 0, seq_len - end);
  }

 private:
  // The largest bins of a block's keys, less kTopBin, over the rows that give one of them min_bin or more. Every row
  // sees all keys before the tile's own pages.
  void find_bins(int64_t block, int min_bin, int16_t* found) {
    Shorts best[kKeyVectors];
    std::fill(best, best + kKeyVectors, repeat(kMin));
    const int16_t* peaks = w_.peaks.data() + block * rows_.padded;
    const int8_t* keys = keys_.block(head_, block);
    for (int64_t r = 0; r < rows_.padded; r += kShorts) {
      const Shorts lse = load(w_.approx_lse.data() + r), scale = load(w_.dequant_scale.data() + r);
      const Shorts most = scaled_difference(load(peaks + r), lse, scale);
      rows_.raise_bins(r, at_least(most, static_cast<int16_t>(min_bin - kTopBin)), keys, best);
    }
    for (int v = 0; v < kKeyVectors; ++v) store(found + v * kShorts, best[v]);
  }

  const QuantizedQK& qk_;
  const KeysInLanes& keys_;
  ByteWorkspace& w_;
  ByteRows rows_;
  int head_;
};

// The attention of some rows of one head per bin, where each row gives the keys their bins by itself.
void find_row_mass(const RowMassArguments& a, const KeysInLanes& keys, ByteWorkspace& w, int head, int first_row,
                   int rows) {
  const QuantizedQK& qk = a.qk;
  ByteRows part(qk, w, head);
  part.load_rows(rows, [&](int r) { return a.rows[first_row + r]; });
  part.find_approx_lse();
  for (int r = 0; r < rows; ++r) {
    const int64_t local = w.position[r] / a.tile * a.tile;
    const int64_t place = static_cast<int64_t>(head) * a.num_rows + first_row + r;
    const bf16* weights = a.weights + place * qk.seq_len;
    Mass mass(qk.seq_len, a.squared != 0);
    for (int64_t first = 0; first < qk.seq_len; first += kPeakKeys) {
      const int64_t count = std::min<int64_t>(kPeakKeys, qk.seq_len - first);
      if (count == kPeakKeys && mass.add_negligible(weights + first, count)) continue;
      Shorts shorts[kKeyVectors];
      part.bins_of_row(r, keys.block(head, first / kPeakKeys), shorts);
      alignas(64) int16_t found[kPeakKeys];
      for (int v = 0; v < kKeyVectors; ++v) store(found + v * kShorts, shorts[v]);
      uint8_t bins[kPeakKeys];
      for (int n = 0; n < kPeakKeys; ++n) bins[n] = static_cast<uint8_t>(to_bin(found[n]));
      for (int64_t key = std::max(first, local); key < first + count; ++key) bins[key - first] = kLocalBin;
      mass.add(weights + first, bins, count);
    }
    mass.write(a.mass + place * kBins);
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_tile_score_bins(const minference::TileScoreBinArguments* arguments) {
  const int heads = arguments->qk.heads, tasks = heads * arguments->tiles;
  minference::KeysInLanes keys(arguments->qk);
#pragma omp parallel num_threads(arguments->qk.threads)
  {
    auto& space = minference::thread_workspace<minference::ByteWorkspace>();
    const minference::ProductUnit unit(minference::byte_step(arguments->qk.rank));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < keys.tasks(); ++task) keys.fill(task);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      minference::TileTask(*arguments, keys, space, task % heads, task / heads);
    }
  }
}

extern "C" void minference_row_mass(const minference::RowMassArguments* arguments) {
  using namespace minference;
  const RowMassArguments& a = *arguments;
  const int parts = (a.num_rows + kRowBlock - 1) / kRowBlock;
  KeysInLanes keys(a.qk);
#pragma omp parallel num_threads(a.qk.threads)
  {
    auto& space = thread_workspace<ByteWorkspace>();
    const ProductUnit unit(byte_step(a.qk.rank));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < keys.tasks(); ++task) keys.fill(task);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < a.qk.heads * parts; ++task) {
      const int first_row = task % parts * kRowBlock;
      find_row_mass(a, keys, space, task / parts, first_row, std::min(kRowBlock, a.num_rows - first_row));
    }
  }
}
