#include "convert.h"

#include "common/cpu/vec.h"

namespace deepseek_kernels::DSK_ISA {
namespace {

template <class From, class To, class One, class Register>
void apply(const ConvertParams& p, const One& one, const Register& whole) {
  const From* from = static_cast<const From*>(p.from);
  To* to = static_cast<To*>(p.to);
  for (int64_t i = 0; i < p.count; i += kLanes) {
    if (p.scalar)
      for (int64_t l = i; l < i + kLanes; ++l) to[l] = one(from[l]);
    else
      whole(from + i, to + i);
  }
}

}  // namespace

void convert(const ConvertCall& c, int) {
  ConvertParams& p = *c.call;
  const auto is = [&](const char* name) { return std::strcmp(p.function, name) == 0; };
  p.known = true;
  if (is("from_fp16")) {
    apply<uint16_t, float>(p, from_fp16, [](const uint16_t* a, float* b) { store(b, load_fp16(a)); });
  } else if (is("from_bf16")) {
    apply<uint16_t, float>(p, from_bf16, [](const uint16_t* a, float* b) { store(b, load_bf16(a)); });
  } else if (is("from_e4m3")) {
    apply<uint8_t, float>(p, from_e4m3, [](const uint8_t* a, float* b) { store(b, load_e4m3(a)); });
  } else if (is("to_fp16")) {
    apply<float, uint16_t>(p, to_fp16, [](const float* a, uint16_t* b) { store_fp16(b, load(a)); });
  } else if (is("to_bf16")) {
    apply<float, uint16_t>(p, to_bf16, [](const float* a, uint16_t* b) { store_bf16(b, load(a)); });
  } else if (is("to_e4m3")) {
    apply<float, uint8_t>(p, to_e4m3, [](const float* a, uint8_t* b) {
      for (int i = 0; i < kLanes; ++i) b[i] = to_e4m3(a[i]);
    });
  } else if (is("exp")) {
    const auto whole = [](const float* a, float* b) { store(b, exp(load(a))); };
    apply<float, float>(p, [](float x) { return x; }, whole);
  } else {
    p.known = false;
  }
}

}  // namespace deepseek_kernels::DSK_ISA
