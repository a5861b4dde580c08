// Loops over arrays of vectors that stay in registers.
#pragma once

#include <utility>

namespace minference {

// Calls body.template operator()<I>() for I = 0 .. N - 1. gcc 12 keeps arrays in memory whose indices become constants
// only when it unrolls a loop.
template <int N, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (body.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, N>());
}

// Calls body.template operator()<R>() for the run-time number of rows 1 .. R.
template <int R, typename Body>
inline void with_rows(int rows, const Body& body) {
  if constexpr (R == 1) {
    body.template operator()<1>();
  } else if (rows == R) {
    body.template operator()<R>();
  } else {
    with_rows<R - 1>(rows, body);
  }
}

}  // namespace minference
