// Keys and values of one layer, as Python hands them over: vLLM's pages.
#pragma once

#include <cstdint>

namespace minference {

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the lower index in the low half

enum class Layout : int32_t { rows = 0, transposed = 1, amx = 2 };
enum class Element : int32_t { bfloat16 = 0, float32 = 1 };

// Elements of queries and outputs are those of the cache. A page of one KV head starts at page * page_stride + head *
// head_stride, in elements.
struct Cache {
  const void* key;
  const void* value;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;  // layout `rows` only: from one token to the next
  int32_t block_size;
  int32_t head_size;
  int32_t num_kv_heads;
  Layout layout;
  Element element;
};

}  // namespace minference
