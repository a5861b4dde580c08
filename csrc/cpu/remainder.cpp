// The remainder of each tile: of_heads in minference_vllm/prefill/remainder.py.
//
// A task computes the softmax over kPart of a KV head's sampled keys for all of its query heads and tiles that leave
// something out. The parts are then added in a fixed order, so that results do not depend on the number of threads.
#include "single_keys.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace minference {
namespace {

constexpr int kPart = 384;          // sampled keys of a task: a multiple of 64 and of kRows
constexpr int kWidth = 2 * kLanes;  // rows (see Group) handled together
static_assert(kPart % 64 == 0 && kPart % kRows == 0);

struct alignas(64) Workspace {
  alignas(64) float scores[kPart * kWidth];  // [keys][rows], then the weights
  std::vector<float> rows;                   // [keys][2 * head_size], a key and its value side by side
};

// A query head and one of its tiles.
struct Row {
  int head, tile;
  int first, last;  // range of the sampled keys before the tile that all its queries see
};

// The rows of one KV head that may leave something out, ordered by tile; each row is one vector lane.
struct Group {
  int kv_head = 0;
  int64_t width = 0;  // number of rows, rounded up to whole vectors
  std::vector<Row> rows;
  std::vector<float> query;         // [head_size][width], mean queries times to_score
  std::vector<uint64_t> hidden;     // [rows][words], a bit for each sampled key that is not left out
  std::vector<float> maximum, sum;  // [parts][width], of scores, and of the weights exp2((score - maximum) * to_log2)
  std::unique_ptr<float[]> total;   // [parts][rows][2 * head_size], sums of keys and values with these weights

  int size() const { return static_cast<int>(rows.size()); }
};

// c[R][kLanes V] = a x b[depth][kLanes V], where a[r][k] lies at r * row_step + k * step.
template <int R, int V>
void multiply(const float* a, int64_t row_step, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc,
              int depth) {
  Floats sum[R][V];
  unrolled<R>([&]<int r>() { unrolled<V>([&]<int v>() { sum[r][v] = repeat(0.0f); }); });
  for (int k = 0; k < depth; ++k) {
    Floats right[V];
    unrolled<V>([&]<int v>() { right[v] = load(b + k * ldb + kLanes * v); });
    unrolled<R>([&]<int r>() {
      const Floats left = repeat(a[r * row_step + k * step]);
      unrolled<V>([&]<int v>() { sum[r][v] += left * right[v]; });
    });
  }
  unrolled<R>([&]<int r>() { unrolled<V>([&]<int v>() { store(c + r * ldc + kLanes * v, sum[r][v]); }); });
}

class LeftOut {
 public:
  explicit LeftOut(const RemainderArguments& arguments)
      : a_(arguments),
        dim_(a_.cache.head_size),
        to_score_(a_.softcap == 0.0f ? a_.scale * kLog2e : a_.scale),
        to_log2_(a_.softcap == 0.0f ? 1.0f : kLog2e) {
    // No row sees keys before the first row's window, and their pages may be another request's. The last tile's own
    // keys and later ones are never left out.
    const int64_t oldest = a_.window == 0 ? 0 : a_.tile_starts[0] - a_.window + 1;
    const int64_t* end = a_.sampled + a_.num_sampled;
    sampled_ = std::lower_bound(a_.sampled, end, oldest);
    count_ = static_cast<int>(std::lower_bound(sampled_, end, a_.tile_starts[a_.tiles - 1]) - sampled_);
    parts_ = (count_ + kPart - 1) / kPart;
    words_ = parts_ * (kPart / 64);
    list_places();
    make_groups();
  }

  int64_t rows() const { return num_rows_; }
  int64_t tasks() const { return static_cast<int64_t>(groups_.size()) * parts_; }

  // Computes the mean query of a row, and marks the keys that it does not leave out.
  void prepare(int64_t number) {
    auto [group, row] = find(number);
    with_element(a_.cache.element, [&, &group = group, row = row]<typename T>() { average<T>(group, row); });
    mark(group.rows[row], group.hidden.data() + static_cast<int64_t>(row) * words_);
  }

  void run(int64_t task, Workspace& w) {
    Group& group = groups_[task / parts_];
    const int part = static_cast<int>(task % parts_);
    // Rows are in the order of their tiles, so that the last one sees the latest keys.
    const int count = std::min(kPart, group.rows.back().last - part * kPart);
    if (count <= 0 || group.rows.front().first >= (part + 1) * kPart) return;
    with_element(a_.cache.element, [&]<typename T>() { gather<T>(group.kv_head, part * kPart, count, w); });
    int row = 0;
    for (; row + kWidth <= group.width; row += kWidth) attend<2>(group, part, row, w);
    if (row < group.width) attend<1>(group, part, row, w);
  }

  // Adds the parts of a row and writes its remainder.
  void write(int64_t number) {
    const auto [group, row] = find(number);
    const int64_t out = static_cast<int64_t>(group.rows[row].head) * a_.tiles + group.rows[row].tile;
    float best = -kInfinity, total = 0.0f;
    for (int part = 0; part < parts_; ++part) best = std::max(best, group.maximum[part * group.width + row]);
    if (best == -kInfinity) return;
    float *key = a_.key + out * dim_, *value = a_.value + out * dim_;
    for (int part = 0; part < parts_; ++part) {
      const float maximum = group.maximum[part * group.width + row];
      if (maximum == -kInfinity) continue;
      const float weight = std::exp2((maximum - best) * to_log2_);
      total += weight * group.sum[part * group.width + row];
      const float* found = group.total.get() + (static_cast<int64_t>(part) * group.size() + row) * 2 * dim_;
      add(key, found, weight);
      add(value, found + dim_, weight);
    }
    float at_mean = 0.0f;
    for (int d = 0; d < dim_; ++d) {
      key[d] /= total;
      value[d] /= total;
      at_mean += group.query[d * group.width + row] * key[d];
    }
    if (a_.softcap != 0.0f) at_mean = a_.softcap * std::tanh(at_mean / a_.softcap);
    a_.bias[out] = ((best - at_mean) * to_log2_ + std::log2(total)) * kLn2 + a_.log_step;
  }

 private:
  // The index among the sampled keys of each position, and of the first one of each block.
  void list_places() {
    place_.assign(a_.seq_len, -1);
    const int64_t blocks = (a_.seq_len + a_.cache.block_size - 1) / a_.cache.block_size;
    first_of_block_.assign(blocks + 1, count_);
    int64_t block = 0;
    for (int i = 0; i < count_; ++i) {
      place_[sampled_[i]] = static_cast<int16_t>(i);
      for (; block * a_.cache.block_size <= sampled_[i]; ++block) first_of_block_[block] = i;
    }
  }

  void make_groups() {
    const int per_kv_head = a_.num_heads / a_.cache.num_kv_heads;
    for (int i = 0; i < a_.num_wanted;) {
      const int kv_head = a_.heads[i] / per_kv_head;
      int end = i;
      while (end < a_.num_wanted && a_.heads[end] / per_kv_head == kv_head) ++end;
      Group group;
      group.kv_head = kv_head;
      for (int tile = 0; tile < a_.tiles; ++tile) {
        for (int of_group = i; of_group < end; ++of_group) add_row(group, a_.heads[of_group], tile);
      }
      if (group.size() > 0) complete(group);
      i = end;
    }
  }

  int place_from(int64_t position) const {
    return static_cast<int>(std::lower_bound(sampled_, sampled_ + count_, position) - sampled_);
  }

  void add_row(Group& group, int head, int tile) const {
    if (a_.blocks[list_of(head, tile) * a_.max_blocks] < 0) return;  // it attends everything
    const int last = place_from(a_.tile_starts[tile]);
    const int first = a_.window == 0 ? 0 : place_from(a_.tile_starts[tile + 1] - a_.window);
    if (first < last) group.rows.push_back({head, tile, first, last});
  }

  void complete(Group& group) {
    group.width = (group.size() + kLanes - 1) / kLanes * kLanes;
    group.query.assign(group.width * dim_, 0.0f);
    group.hidden.assign(static_cast<size_t>(group.size()) * words_, 0);
    group.maximum.assign(group.width * parts_, -kInfinity);
    group.sum.assign(group.width * parts_, 0.0f);
    group.total.reset(new float[static_cast<size_t>(group.size()) * parts_ * 2 * dim_]);
    num_rows_ += group.size();
    groups_.push_back(std::move(group));
  }

  // The group of a row, numbered over all groups in order, and the row's number within the group.
  std::pair<Group&, int> find(int64_t row) {
    auto group = groups_.begin();
    for (; row >= group->size(); ++group) row -= group->size();
    return {*group, static_cast<int>(row)};
  }

  int64_t list_of(int head, int tile) const {
    return static_cast<int64_t>(head / a_.heads_per_list) * a_.tiles + tile;
  }

  template <typename T>
  void average(Group& group, int row) const {
    const auto [head, tile, first, last] = group.rows[row];
    const int64_t begin = a_.tile_starts[tile] - a_.tile_starts[0], end = a_.tile_starts[tile + 1] - a_.tile_starts[0];
    alignas(64) float sum[kMaxHead] = {};
    for (int64_t i = begin; i < end; ++i) {
      const T* query = static_cast<const T*>(a_.query) + i * a_.query_token_stride + head * a_.query_head_stride;
      for (int d = 0; d < dim_; d += kLanes) store(sum + d, load(sum + d) + widen(query + d));
    }
    const float factor = to_score_ / static_cast<float>(end - begin);
    for (int d = 0; d < dim_; ++d) group.query[d * group.width + row] = sum[d] * factor;
  }

  void mark(const Row& row, uint64_t* hidden) const {
    const auto hide = [&](int begin, int end) {
      for (int i = begin; i < end; ++i) hidden[i / 64] |= uint64_t{1} << i % 64;
    };
    hide(0, row.first);
    hide(row.last, count_);
    const int64_t list = list_of(row.head, row.tile);
    const int32_t* blocks = a_.blocks + list * a_.max_blocks;
    for (int i = 0; i < a_.num_blocks[list]; ++i) hide(first_of_block_[blocks[i]], first_of_block_[blocks[i] + 1]);
    const int32_t* columns = a_.columns + list * a_.max_columns;
    int16_t named[256];
    for (int first = 0; first < a_.num_columns[list]; first += 256) {
      const int end = std::min(first + 256, a_.num_columns[list]);
      int count = 0;
      for (int i = first; i < end; ++i) {
        named[count] = place_[columns[i]];
        count += named[count] >= 0;  // branch-free: a branch would be mispredicted
      }
      for (int i = 0; i < count; ++i) hide(named[i], named[i] + 1);
    }
  }

  // Copies the keys and values of a part, page by page: in the transposed layout the keys of a page share cache lines.
  template <typename T>
  void gather(int kv_head, int first, int count, Workspace& w) const {
    constexpr int kTogether = 16;
    alignas(64) T copied[kTogether][kMaxHead];
    int slot[kTogether];
    const int size = a_.cache.block_size, stride = 2 * dim_;
    if (w.rows.size() < static_cast<size_t>(kPart * stride)) w.rows.resize(kPart * stride);
    for (int i = 0; i < count;) {
      const int64_t block = sampled_[first + i] / size;
      int here = 0;
      for (; here < kTogether && i + here < count && sampled_[first + i + here] / size == block; ++here) {
        slot[here] = static_cast<int>(sampled_[first + i + here] % size);
      }
      const auto widen_to = [&](float* rows) {
        for (int n = 0; n < here; ++n) {
          for (int d = 0; d < dim_; d += kLanes) store(rows + n * stride + d, widen(copied[n] + d));
        }
      };
      float* rows = w.rows.data() + i * stride;
      copy_keys(a_.cache, a_.pages[block], kv_head, slot, here, copied[0], kMaxHead);
      widen_to(rows);
      copy_values(a_.cache, a_.pages[block], kv_head, slot, here, copied[0], kMaxHead);
      widen_to(rows + dim_);
      i += here;
    }
  }

  // Attends the gathered keys of a part for kLanes * V rows, from `row` on.
  template <int V>
  void attend(Group& group, int part, int row, Workspace& w) const {
    constexpr int kHere = kLanes * V;
    const int rows = std::min(kHere, group.size() - row), first = part * kPart, stride = 2 * dim_;
    // Computes whole register tiles; scores past the last key are not used.
    const int begin = std::max(0, group.rows[row].first - first) / kRows * kRows;
    const int end = std::min(kPart, group.rows[row + rows - 1].last - first);
    if (begin >= end) return;
    float* scores = w.scores;
    for (int n = begin; n < end; n += kRows) {
      multiply<kRows, V>(w.rows.data() + n * stride, stride, 1, group.query.data() + row, group.width,
                         scores + n * kHere, kHere, dim_);
    }
    if (a_.softcap != 0.0f) soft_cap_row(scores + begin * kHere, (end - begin) * kHere, 1.0f, a_.softcap);
    for (int r = 0; r < rows; ++r) hide(group.hidden.data() + (row + r) * words_, first, begin, end, scores + r, kHere);
    for (int v = 0; v < kHere; v += kLanes) softmax(scores + v, begin, end, kHere, group, part * group.width + row + v);
    float* total = group.total.get() + (static_cast<int64_t>(part) * group.size() + row) * stride;
    for (int r = 0; r < rows; r += kRows) {
      with_rows<kRows>(std::min(kRows, rows - r), [&]<int R>() {
        for (int d = 0; d < stride; d += 2 * kLanes) {
          multiply<R, 2>(scores + begin * kHere + r, 1, kHere, w.rows.data() + begin * stride + d,
                         stride, total + r * stride + d, stride, end - begin);
        }
      });
    }
  }

  // Sets the scores of the keys [begin, end) of a part that a row does not leave out to -inf.
  static void hide(const uint64_t* hidden, int first, int begin, int end, float* scores, int stride) {
    for (int n = begin / 64 * 64; n < end; n += 64) {
      for (uint64_t bits = hidden[(first + n) / 64]; bits != 0; bits &= bits - 1) {
        scores[(n + std::countr_zero(bits)) * stride] = -kInfinity;
      }
    }
  }

  // Scores of kLanes rows -> weights, in place.
  void softmax(float* scores, int begin, int end, int stride, Group& group, int64_t at) const {
    Floats largest = repeat(-kInfinity);
    for (int n = begin; n < end; ++n) largest = max(largest, load(scores + n * stride));
    store(group.maximum.data() + at, largest);
    const Floats unit = repeat(to_log2_), shift = max(largest, repeat(std::numeric_limits<float>::lowest()));
    Floats sum = repeat(0.0f);
    for (int n = begin; n < end; ++n) {
      const Floats weight = exp2((load(scores + n * stride) - shift) * unit);
      store(scores + n * stride, weight);
      sum += weight;
    }
    store(group.sum.data() + at, sum);
  }

  void add(float* out, const float* found, float weight) const {
    const Floats factor = repeat(weight);
    for (int d = 0; d < dim_; d += kLanes) store(out + d, load(out + d) + factor * load(found + d));
  }

  const RemainderArguments& a_;
  const int dim_;
  const float to_score_;         // factor from query-key products to scores, in units of log2 unless they are capped
  const float to_log2_;          // factor from scores to units of log2
  const int64_t* sampled_;       // [count_], positions of the sampled keys that some tile may leave out
  int count_, parts_, words_;
  int64_t num_rows_ = 0;
  std::vector<int16_t> place_;       // [seq_len], -1: not sampled
  std::vector<int> first_of_block_;  // [blocks + 1]
  std::vector<Group> groups_;
};

}  // namespace
}  // namespace minference

extern "C" void minference_remainder(const minference::RemainderArguments* arguments) {
  minference::LeftOut left_out(*arguments);
#pragma omp parallel num_threads(arguments->threads)
  {
    auto& w = minference::thread_workspace<minference::Workspace>();
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < left_out.rows(); ++row) left_out.prepare(row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < left_out.tasks(); ++task) left_out.run(task, w);
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < left_out.rows(); ++row) left_out.write(row);
  }
}
