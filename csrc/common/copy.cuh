// Rows of elements moved 16 at a time, in 16-byte loads and stores where the address allows.
#pragma once
#include "device.cuh"

namespace deepseek_kernels {

DEVICE_FN uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
// A plain assignment may be split into four stores.
DEVICE_FN void store16(void* p, uint4 value) { __stwb(static_cast<uint4*>(p), value); }

template <class T, int kCount>
struct alignas(16) Pack {
  static constexpr int kWords = kCount * sizeof(T) / 16;
  uint4 words[kWords];

  // p[0, valid), zeros after. kWhole promises that valid is <= 0 or >= kCount, and p a multiple of 16 bytes.
  template <bool kWhole>
  DEVICE_FN void load(const T* p, int64_t valid) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = make_uint4(0, 0, 0, 0);
    if constexpr (kWhole) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (valid > 0) words[w] = load16(reinterpret_cast<const uint4*>(p) + w);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i < valid) elements()[i] = p[i];
    }
  }

  template <bool kWhole>
  DEVICE_FN void store(T* p, int64_t valid) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (valid > 0) store16(reinterpret_cast<uint4*>(p) + w, words[w]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i < valid) p[i] = elements()[i];
    }
  }

  // What was made of the elements so far is to be made again, not kept in registers, where it takes up more room.
  DEVICE_FN void forget() {
#if defined(__CUDACC__)
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      asm volatile("" : "+r"(words[w].x), "+r"(words[w].y), "+r"(words[w].z), "+r"(words[w].w));
#endif
  }

  DEVICE_FN T operator[](int i) const { return elements()[i]; }
  DEVICE_FN uint32_t word(int i) const { return reinterpret_cast<const uint32_t*>(words)[i]; }
  DEVICE_FN void set_word(int i, uint32_t word) { reinterpret_cast<uint32_t*>(words)[i] = word; }

 private:
  DEVICE_FN T* elements() { return reinterpret_cast<T*>(words); }
  DEVICE_FN const T* elements() const { return reinterpret_cast<const T*>(words); }
};

// Host side: may rows `row_bytes` apart be moved in 16-byte words?
inline bool is_aligned16(const void* p, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
}

}  // namespace deepseek_kernels
