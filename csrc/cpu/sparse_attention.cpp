// Attention under a SparseIndex: one task per query head and tile, an online softmax over key tiles of 128.
#include "single_keys.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace minference {
namespace {

// Sums are rescaled only when a row's maximum (in units of log2) has grown by more than this since the last time.
constexpr float kRescale = 8.0f;
// Column codes per factor of two of the weight.
constexpr float kCodesPerBit = 6.0f;

struct alignas(64) Workspace {
  alignas(64) Packed keys[kMaxHead / kPack * kKeyTile];
  alignas(64) Packed values[kKeyTile / kPack * kMaxHead];
  alignas(64) int32_t position[kKeyTile];
  alignas(64) float more[kKeyTile];  // added to the scores of columns, before `scale`
  alignas(64) float scores[kProductRows * kKeyTile];
  alignas(64) Factor weights[kProductRows * kKeyTile];
  std::vector<Factor> query;
  std::vector<float> out, maximum, sum;
};

// T: elements of the cache, the queries and the output.
template <typename T>
class TileTask {
 public:
  TileTask(const AttendArguments& arguments, const Columns<T>& columns, Workspace& space, int head, int tile)
      : a_(arguments), columns_(columns), w_(space), head_(head), dim_(arguments.cache.head_size) {
    start_ = a_.tile_starts[tile];
    rows_ = static_cast<int>(a_.tile_starts[tile + 1] - start_);
    row_of_query_ = start_ - a_.tile_starts[0];
    kv_head_ = head / (a_.heads / a_.cache.num_kv_heads);
    slot_ = static_cast<int64_t>(head) * a_.tiles + tile;
  }

  void run() {
    load_query();
    const int32_t* blocks = a_.blocks + slot_ * a_.max_blocks;
    const int count = a_.num_blocks[slot_];
    const int size = a_.cache.block_size;
    // The tile's own blocks are the last. They are attended first, so that every row has a finite maximum.
    int own = count;
    while (own > 0 && static_cast<int64_t>(blocks[own - 1] + 1) * size > start_) --own;
    filled_ = 0;
    for (int i = own; i < count; ++i) add_block(blocks[i]);
    flush();
    for (int i = 0; i < own; ++i) add_block(blocks[i]);
    flush();
    add_columns();
    write_out();
  }

 private:
  void load_query() {
    const size_t padded = (rows_ + kProductRows - 1) / kProductRows * kProductRows;
    w_.query.assign(padded * kQueryStride, 0);
    clear_padding(w_.keys, dim_);
    w_.out.assign(padded * dim_, 0.0f);
    w_.maximum.assign(rows_, -kInfinity);
    w_.sum.assign(rows_, 0.0f);
    const T* query = static_cast<const T*>(a_.query);
    for (int r = 0; r < rows_; ++r) {
      copy_factors(query + (row_of_query_ + r) * a_.query_token_stride + head_ * a_.query_head_stride,
                   w_.query.data() + static_cast<size_t>(r) * kQueryStride, dim_);
    }
  }

  void add_block(int32_t block) {
    const int size = a_.cache.block_size;
    for (int slot = 0; slot < size;) {
      const int count = std::min(size - slot, kKeyTile - filled_);
      pack_keys<T>(a_.cache, a_.pages[block], kv_head_, slot, count, w_.keys, filled_);
      pack_values<T>(a_.cache, a_.pages[block], kv_head_, slot, count, w_.values, filled_);
      for (int i = 0; i < count; ++i) w_.position[filled_ + i] = block * size + slot + i;
      // Slots past the sequence's end can hold anything, NaN included, and a weight of zero times NaN is NaN.
      const int64_t valid = a_.seq_len - (static_cast<int64_t>(block) * size + slot);
      for (int i = static_cast<int>(std::clamp<int64_t>(valid, 0, count)); i < count; ++i) clear_value(filled_ + i);
      filled_ += count;
      slot += count;
      if (filled_ == kKeyTile) flush();
    }
  }

  void clear_value(int key) {
    Factor* packed = reinterpret_cast<Factor*>(w_.values + static_cast<size_t>(key / kPack) * dim_) + key % kPack;
    for (int d = 0; d < dim_; ++d) packed[kPack * d] = 0;
  }

  void add_columns() {
    const int32_t* columns = a_.columns + slot_ * a_.max_columns;
    const uint8_t* codes = a_.column_codes == nullptr ? nullptr : a_.column_codes + slot_ * a_.max_columns;
    const int count = a_.num_columns[slot_];
    const T *keys[kKeyTile], *values[kKeyTile];
    const float of_code = kLn2 / kCodesPerBit / (a_.softcap == 0.0f ? a_.scale : 1.0f);
    for (int first = 0; first < count; first += kKeyTile) {
      const int here = std::min(kKeyTile, count - first);
      const int padded = (here + 31) / 32 * 32;
      for (int i = 0; i < padded; ++i) {
        // Padding repeats the last column, at a position that no row sees.
        const int32_t column = columns[first + std::min(i, here - 1)];
        keys[i] = columns_.key(kv_head_, column);
        values[i] = columns_.value(kv_head_, column);
        w_.position[i] = i < here ? column : std::numeric_limits<int32_t>::max();
        if (codes != nullptr) w_.more[i] = of_code * static_cast<float>(codes[first + std::min(i, here - 1)]);
      }
      pack_key_rows(keys, padded, dim_, w_.keys, 0);
      pack_value_rows(values, padded, dim_, w_.values, 0);
      filled_ = padded;
      flush(codes != nullptr);
    }
  }

  // Attends the packed keys and empties the buffers. `counted`: w_.more is added to the scores.
  void flush(bool counted = false) {
    if (filled_ == 0) return;
    int32_t latest = 0, earliest = std::numeric_limits<int32_t>::max();
    for (int i = 0; i < filled_; ++i) {
      latest = std::max(latest, w_.position[i]);
      earliest = std::min(earliest, w_.position[i]);
    }
    const bool masked = latest > start_;
    // Whether the last row's window begins after some of these keys.
    const bool cut = a_.window != 0 && earliest < first_seen(rows_ - 1);
    for (int r = 0; r < rows_; r += kProductRows) {
      const int rows = std::min(kProductRows, rows_ - r);
      if (start_ + r + rows - 1 < earliest || (cut && latest < first_seen(r))) continue;
      attend_rows(r, rows, masked, cut, counted);
    }
    filled_ = 0;
  }

  // The first key in the window of a row of the tile.
  int64_t first_seen(int row) const { return start_ + row - a_.window + 1; }

  void attend_rows(int r, int rows, bool masked, bool cut, bool counted) {
    const int keys = filled_;
    product_rows<kQueryStride, false>(rows, w_.query.data() + static_cast<size_t>(r) * kQueryStride, w_.keys, kKeyTile,
                                      w_.scores, kKeyTile, padded_depth(dim_), keys);
    float* out = w_.out.data() + static_cast<size_t>(r) * dim_;
    if (a_.softcap != 0.0f) {
      for (int i = 0; i < rows; ++i) soft_cap_row(w_.scores + i * kKeyTile, keys, a_.scale, a_.softcap);
    }
    for (int i = 0; counted && i < rows; ++i) {
      float* scores = w_.scores + i * kKeyTile;
      for (int n = 0; n < keys; n += kLanes) store(scores + n, load(scores + n) + load(w_.more + n));
    }
    if (cut) {
      for (int i = 0; i < rows; ++i) hide_before_window(w_.scores + i * kKeyTile, keys, r + i);
    }
    for (int i = 0; i < rows; ++i) softmax_row(r + i, i, keys, masked, out + static_cast<size_t>(i) * dim_);
    product_rows<kKeyTile, true>(rows, w_.weights, w_.values, dim_, out, dim_, keys, dim_);
  }

  void hide_before_window(float* scores, int keys, int row) const {
    const auto first = static_cast<int32_t>(first_seen(row));
    for (int n = 0; n < keys; n += kLanes) store(scores + n, hide_before(load(scores + n), w_.position + n, first));
  }

  void softmax_row(int row, int i, int keys, bool masked, float* out) {
    float* scores = w_.scores + i * kKeyTile;
    Factor* weights = w_.weights + i * kKeyTile;
    const float to_log2 = a_.softcap == 0.0f ? a_.scale * kLog2e : kLog2e;
    Floats largest = repeat(-kInfinity);
    for (int n = 0; n < keys; n += kLanes) {
      Floats x = load(scores + n);
      if (masked) {
        x = hide_after(x, w_.position + n, static_cast<int32_t>(start_ + row));
        store(scores + n, x);
      }
      largest = max(largest, x);
    }
    const float found = reduce_max(largest) * to_log2;
    float& maximum = w_.maximum[row];
    float& sum = w_.sum[row];
    if (found > maximum + kRescale || maximum == -kInfinity) {
      const float shrink = maximum == -kInfinity ? 0.0f : std::exp2(maximum - found);
      maximum = found;
      sum *= shrink;
      const Floats factor = repeat(shrink);
      for (int d = 0; d < dim_; d += kLanes) store(out + d, load(out + d) * factor);
    }
    const Floats shift = repeat(maximum == -kInfinity ? 0.0f : maximum);
    const Floats unit = repeat(to_log2);
    Floats total = repeat(0.0f);
    for (int n = 0; n < keys; n += 2 * kLanes) {
      const Floats low = exp2(load(scores + n) * unit - shift);
      const Floats high = exp2(load(scores + n + kLanes) * unit - shift);
      total += low + high;
      store_factors(weights + n, low, high);
    }
    sum += reduce_add(total);
  }

  // Adds one key to a row's softmax, with a score in units of log2. Returns the weight for its value.
  float add_key(int row, float score) {
    float& maximum = w_.maximum[row];
    if (score > maximum + kRescale) {
      const float shrink = std::exp2(maximum - score);
      maximum = score;
      w_.sum[row] *= shrink;
      float* out = w_.out.data() + static_cast<size_t>(row) * dim_;
      for (int d = 0; d < dim_; ++d) out[d] *= shrink;
    }
    const float weight = std::exp2(score - maximum);
    w_.sum[row] += weight;
    return weight;
  }

  // Adds the remainder, one key for all that the tile leaves out.
  void add_remainder() {
    const float bias = a_.remainder_bias[slot_];
    if (bias == -kInfinity) return;
    const float* key = a_.remainder_key + slot_ * dim_;
    const float* value = a_.remainder_value + slot_ * dim_;
    for (int r = 0; r < rows_; ++r) {
      const T* query = static_cast<const T*>(a_.query) + (row_of_query_ + r) * a_.query_token_stride +
                       head_ * a_.query_head_stride;
      Floats products = repeat(0.0f);
      for (int d = 0; d < dim_; d += kLanes) products += widen(query + d) * load(key + d);
      float score = reduce_add(products) * a_.scale;
      if (a_.softcap != 0.0f) score = a_.softcap * std::tanh(score / a_.softcap);
      const Floats weight = repeat(add_key(r, (score + bias) * kLog2e));
      float* out = w_.out.data() + static_cast<size_t>(r) * dim_;
      for (int d = 0; d < dim_; d += kLanes) store(out + d, load(out + d) + weight * load(value + d));
    }
  }

  void write_out() {
    if (a_.remainder_bias != nullptr) add_remainder();
    // A sink has no value.
    for (int r = 0; a_.sinks != nullptr && r < rows_; ++r) add_key(r, a_.sinks[head_] * kLog2e);
    for (int r = 0; r < rows_; ++r) {
      const Floats inverse = repeat(1.0f / w_.sum[r]);
      T* out = static_cast<T*>(a_.out) + (row_of_query_ + r) * a_.out_token_stride + head_ * a_.out_head_stride;
      for (int d = 0; d < dim_; d += kLanes) {
        store_element(out + d, load(w_.out.data() + static_cast<size_t>(r) * dim_ + d) * inverse);
      }
      if (a_.lse != nullptr) {
        const int64_t rows = a_.tile_starts[a_.tiles] - a_.tile_starts[0];
        a_.lse[head_ * rows + row_of_query_ + r] = w_.maximum[r] * kLn2 + std::log(w_.sum[r]);
      }
    }
  }

  const AttendArguments& a_;
  const Columns<T>& columns_;
  Workspace& w_;
  int head_, dim_, kv_head_, rows_, filled_ = 0;
  int64_t start_, row_of_query_, slot_;
};

template <typename T>
void attend(const AttendArguments& a) {
  const int tasks = a.heads * a.tiles;
  Columns<T> columns(a);
#pragma omp parallel num_threads(a.threads)
  {
    auto& space = thread_workspace<Workspace>();
    const ProductUnit unit;
#pragma omp for schedule(dynamic, 1)
    for (int kv_head = 0; kv_head < a.cache.num_kv_heads; ++kv_head) columns.mark(kv_head);
#pragma omp single
    columns.number();
#pragma omp for schedule(dynamic, 8)
    for (int64_t page = 0; page < columns.num_pages(); ++page) columns.copy(page);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      // Later tiles have more keys. They are started first, so that threads finish at about the same time.
      const int tile = a.tiles - 1 - task / a.heads;
      TileTask<T>(a, columns, space, task % a.heads, tile).run();
    }
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_attend(const minference::AttendArguments* arguments) {
  minference::with_element(arguments->cache.element, [&]<typename T>() { minference::attend<T>(*arguments); });
}
