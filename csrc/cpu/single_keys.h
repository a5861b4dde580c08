// Single keys and values, copied from their pages as rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "tiles.h"

namespace minference {

// Copies keys of one page, from slots slot[0 .. count), to out + i * stride. In the transposed layout the keys of a
// page share cache lines, so copy them together.
template <typename T>
void copy_keys(const Cache& cache, int64_t page, int kv_head, const int* slot, int count, T* out, int64_t stride) {
  const T* base = static_cast<const T*>(cache.key) + page * cache.page_stride + kv_head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  if (cache.layout == Layout::rows) {
    for (int i = 0; i < count; ++i) std::memcpy(out + i * stride, base + slot[i] * cache.row_stride, dim * sizeof(T));
  } else if (cache.layout == Layout::transposed) {
    for (int d = 0; d < dim; ++d) {
      for (int i = 0; i < count; ++i) out[i * stride + d] = base[d * size + slot[i]];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      const T* first = base + slot[i] / 16 * (dim * 16) + slot[i] % 16 * 2;
      for (int d = 0; d < dim; d += 2) std::memcpy(out + i * stride + d, first + d * 16, 2 * sizeof(T));
    }
  }
}

// The same for values.
template <typename T>
void copy_values(const Cache& cache, int64_t page, int kv_head, const int* slot, int count, T* out, int64_t stride) {
  const T* base = static_cast<const T*>(cache.value) + page * cache.page_stride + kv_head * cache.head_stride;
  const int size = cache.block_size, dim = cache.head_size;
  const int64_t row_stride = cache.layout == Layout::rows ? cache.row_stride : dim;
  for (int i = 0; i < count; ++i, out += stride) {
    if (cache.layout != Layout::amx) {
      std::memcpy(out, base + slot[i] * row_stride, dim * sizeof(T));
      continue;
    }
    for (int d = 0; d < dim; d += 16) {
      const T* first = base + d * size + slot[i] / 2 * 32 + slot[i] % 2;
      for (int of_tile = 0; of_tile < 16; ++of_tile) out[d + of_tile] = first[2 * of_tile];
    }
  }
}

// The columns of an index: each key that any tile of a KV head's query heads lists is copied once. Call mark for every
// KV head, then number, then copy for every page of every KV head.
template <typename T>
class Columns {
 public:
  explicit Columns(const AttendArguments& arguments)
      : a_(arguments),
        blocks_((a_.seq_len + a_.cache.block_size - 1) / a_.cache.block_size),
        row_(static_cast<size_t>(a_.cache.num_kv_heads) * a_.seq_len, 0),
        first_(a_.cache.num_kv_heads * blocks_ + 1) {}

  // Sets row_ to 1 for the listed keys of a KV head, and counts them per page.
  void mark(int kv_head) {
    const int64_t lists = static_cast<int64_t>(a_.heads / a_.cache.num_kv_heads) * a_.tiles;
    int32_t* row = row_.data() + kv_head * a_.seq_len;
    for (int64_t list = kv_head * lists; list < (kv_head + 1) * lists; ++list) {
      const int32_t* columns = a_.columns + list * a_.max_columns;
      for (int i = 0; i < a_.num_columns[list]; ++i) row[columns[i]] = 1;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t begin = block * a_.cache.block_size, end = std::min(begin + a_.cache.block_size, a_.seq_len);
      int64_t count = 0;
      for (int64_t key = begin; key < end; ++key) count += row[key];
      first_[kv_head * blocks_ + block + 1] = count;
    }
  }

  void number() {
    for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    const size_t size = first_.back() * a_.cache.head_size;
    keys_.reset(new T[size]);
    values_.reset(new T[size]);
  }

  int64_t num_pages() const { return static_cast<int64_t>(first_.size()) - 1; }

  // Copies the listed keys of one KV head and page.
  void copy(int64_t task) {
    constexpr int kTogether = 64;
    const int dim = a_.cache.head_size, kv_head = static_cast<int>(task / blocks_);
    const int64_t block = task % blocks_, begin = block * a_.cache.block_size;
    int32_t* row = row_.data() + kv_head * a_.seq_len;
    int64_t next = first_[task];
    int slots[kTogether], count = 0;
    const auto flush = [&] {
      copy_keys(a_.cache, a_.pages[block], kv_head, slots, count, keys_.get() + next * dim, dim);
      copy_values(a_.cache, a_.pages[block], kv_head, slots, count, values_.get() + next * dim, dim);
      next += count;
      count = 0;
    };
    if (next == first_[task + 1]) return;
    for (int64_t key = begin; key < std::min(begin + a_.cache.block_size, a_.seq_len); ++key) {
      if (row[key] == 0) continue;
      row[key] = static_cast<int32_t>(next + count);
      slots[count++] = static_cast<int>(key - begin);
      if (count == kTogether) flush();
    }
    flush();
  }

  const T* key(int kv_head, int32_t position) const { return keys_.get() + row_of(kv_head, position); }
  const T* value(int kv_head, int32_t position) const { return values_.get() + row_of(kv_head, position); }

 private:
  int64_t row_of(int kv_head, int32_t position) const {
    return static_cast<int64_t>(row_[kv_head * a_.seq_len + position]) * a_.cache.head_size;
  }

  const AttendArguments& a_;
  int64_t blocks_;
  std::vector<int32_t> row_;    // [kv heads][seq_len], row of a listed key in keys_ and values_
  std::vector<int64_t> first_;  // [kv heads][blocks] + 1, the row of the first listed key of each page
  std::unique_ptr<T[]> keys_, values_;
};

}  // namespace minference
