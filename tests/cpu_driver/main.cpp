// Runs every CPU kernel on small ragged shapes and compares with plain loops, on the instruction set in use:
//   driver                                   all cases; prints the set
//   driver convert FUNCTION [scalar]         one conversion, raw numbers from stdin to stdout
#include "convert.h"
#include "driver.h"

namespace deepseek_kernels::driver {

int convert_stream(const char* function, bool scalar) {
  std::vector<char> from;
  char buffer[65536];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) from.insert(from.end(), buffer, buffer + n);
  const bool narrow = std::strncmp(function, "from_", 5) == 0, e4m3 = std::strstr(function, "e4m3") != nullptr;
  const size_t small = e4m3 ? 1 : std::strcmp(function, "exp") == 0 ? 4 : 2;
  const size_t count = from.size() / (narrow ? small : 4);
  std::vector<char> to(count * (narrow ? 4 : small));
  ConvertParams params{function, scalar, from.data(), to.data(), int64_t(count), false};
  convert_cpu({&params}, 1);
  return params.known && std::fwrite(to.data(), 1, to.size(), stdout) == to.size() ? 0 : 2;
}

int run_all() {
  Random random;
  test_routing(random);
  test_fp8(random);
  test_matmuls(random);
  test_latent(random);
  std::printf("%s\n", deepseek_kernels::name(cpu_isa()));
  return 0;
}

}  // namespace deepseek_kernels::driver

int main(int count, char** arguments) {
  using namespace deepseek_kernels::driver;
  try {
    if (count >= 3) return convert_stream(arguments[2], count > 3);
    return run_all();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
