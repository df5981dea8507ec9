// Guarded global memory and tensor maps.
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "sim.h"

namespace model {
namespace {

constexpr size_t kPage = 4096, kGuard = 16 << 20;

struct Region {
  char *map, *data;
  size_t len, bytes;
  std::string name;
};
std::vector<Region> g_regions;

}  // namespace

void* alloc_global(size_t bytes, const std::string& name) {
  const size_t room = std::max<size_t>(1, (bytes + kPage - 1) / kPage) * kPage, len = room + 2 * kGuard;
  void* map = mmap(nullptr, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  char* m = static_cast<char*>(map);
  mprotect(m + kGuard, room, PROT_READ | PROT_WRITE);
  char* p = m + kGuard + room - (bytes + 15) / 16 * 16;
  memset(m + kGuard, 0xFF, room);
  g_regions.push_back({m, p, len, bytes, name});
  return p;
}
void free_global(void* p) {
  for (auto it = g_regions.begin(); it != g_regions.end(); ++it)
    if (it->data == p) {
      munmap(it->map, it->len);
      g_regions.erase(it);
      return;
    }
  throw std::invalid_argument("free: not an address that alloc returned");
}

std::string describe_address(const void* address) {
  const char* a = static_cast<const char*>(address);
  for (auto& r : g_regions)
    if (a >= r.map && a < r.map + r.len)
      return (a < r.data ? str("%ld bytes before '", long(r.data - a))
                         : str("%ld bytes past the end of '", long(a - (r.data + r.bytes)))) +
             r.name + str("' (%zu bytes)", r.bytes);
  return str("%p is in no known buffer", address);
}

std::string overrun() {
  // Refills what it finds written, so that one overrun is reported once.
  auto written = [](char* from, char* to) {
    if (std::all_of(from, to, [](char c) { return c == -1; })) return false;
    memset(from, 0xFF, size_t(to - from));
    return true;
  };
  std::string report;
  for (auto& r : g_regions) {
    if (written(r.map + kGuard, r.data)) report = "bytes before '" + r.name + "' were written";
    if (written(r.data + r.bytes, r.map + r.len - kGuard))
      report = "bytes past the end of '" + r.name + "' were written";
  }
  return report;
}

void open_global(bool open) {
  for (auto& r : g_regions) mprotect(r.map + kGuard, r.len - 2 * kGuard, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  g->global_open = open;
}

TensorMap make_tensor_map(int rank, const void* base, uint32_t elem, const std::array<int64_t, 3>& size,
                          const std::array<int64_t, 2>& stride, const std::array<int, 3>& box, uint32_t swizzle) {
  auto need = [](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("tensor map: ") + what);
  };
  need(reinterpret_cast<uintptr_t>(base) % 16 == 0, "global address not a multiple of 16");
  for (int i = 0; i < rank; ++i) {
    need(size[i] >= 1 && size[i] <= int64_t(1) << 32, "a size not in 1..2^32");
    need(box[i] >= 1 && box[i] <= 256, "box side not in 1..256");
  }
  need(stride[0] % 16 == 0 && stride[0] >= size[0] * elem, "row stride not a multiple of 16, or shorter than a row");
  need(rank == 2 || stride[1] % 16 == 0, "stride between matrices not a multiple of 16");
  for (int i = 0; i < rank - 1; ++i) need(stride[i] >= 0 && stride[i] < int64_t(1) << 40, "a stride not below 2^40");
  TensorMap map{static_cast<char*>(const_cast<void*>(base)), rank, {}, {}, elem, {}, swizzle};
  for (int i = 0; i < 3; ++i) map.size[i] = uint64_t(size[i]), map.box[i] = uint32_t(box[i]);
  for (int i = 0; i < 2; ++i) map.stride[i] = uint64_t(stride[i]);
  need(map.row_bytes() % 16 == 0, "inner box bytes not a multiple of 16");
  need(swizzle == 0 || map.row_bytes() <= swizzle, "inner box wider than the swizzle span");
  need(swizzle == 0 || map.row_bytes() == swizzle, "inner box narrower than the swizzle span: not modelled");
  return map;
}

}  // namespace model
