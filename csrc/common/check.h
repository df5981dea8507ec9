// Errors of the host side. Every message says where, what was wanted and what was got.
#pragma once
#include <sstream>
#include <stdexcept>

namespace deepseek_kernels {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void raise(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  text << file << ':' << line << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace deepseek_kernels

// DSK_CHECK(k % 16 == 0, "k = ", k) throws "launch.cu:12: wanted k % 16 == 0, got k = 7".
#define DSK_CHECK(condition, ...) \
  ((condition) ? void() : ::deepseek_kernels::raise(__FILE__, __LINE__, "wanted " #condition ", got ", __VA_ARGS__))

// For calls of the CUDA runtime, launches included.
#define DSK_CUDA_CHECK(call)                                                                       \
  do {                                                                                             \
    const cudaError_t dsk_error = (call);                                                          \
    if (dsk_error != cudaSuccess) {                                                                \
      ::deepseek_kernels::raise(__FILE__, __LINE__, #call ": ", cudaGetErrorName(dsk_error), " (", \
                                cudaGetErrorString(dsk_error), ")");                               \
    }                                                                                              \
  } while (false)
