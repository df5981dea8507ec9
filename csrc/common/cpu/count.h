// A small number that is known at run time as a constant of the compiler.
#pragma once
namespace deepseek_kernels {
namespace {

// body(tag) with a tag whose static `kCount` is m, 1 <= m <= kMost.
template <int kValue>
struct CountTag {
  static constexpr int kCount = kValue;
};
template <int kMost, class Body>
inline void with_count(int m, const Body& body) {
  if constexpr (kMost > 1) {
    if (m < kMost) return with_count<kMost - 1>(m, body);
  }
  body(CountTag<kMost>{});
}

}  // namespace
}  // namespace deepseek_kernels
