// Shared memory: two views of it, and who wrote what since which fence.
//
// Kernels are compiled with -fsanitize=thread, for the calls that GCC then makes before every plain access to memory;
// the functions called are at the end of this file, and libtsan has no part in it. memcpy, memmove and memset are seen
// because they stay calls (-fno-builtin) and the linker wraps them.
#include <sys/mman.h>

#include <algorithm>

#include "sim.h"

namespace model {
namespace {

struct Memory {
  uint8_t plain[kSlots][kSmemSlot], async_view[kSlots][kSmemSlot];
  uint16_t mark[kSlots][kSmemSlot];
  uint32_t last_write[kSlots][kSmemSlot], last_read[kSlots][kSmemSlot];
};
Memory* memory() {
  static void* const mapped =
      mmap(nullptr, sizeof(Memory), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return static_cast<Memory*>(mapped);
}
const uintptr_t g_plain = reinterpret_cast<uintptr_t>(memory()->plain);

std::string marked(uint16_t mark) {
  return mark == kTmaInFlight    ? "which a TMA load in flight is writing"
         : mark == kCopyInFlight ? "which a cp.async in flight is writing"
         : mark == kStoreReads   ? "which a TMA store reads until it is waited for"
                                 : str("which thread %d wrote and has not fenced (fence_proxy_async)", mark - 1);
}

}  // namespace

void place(Cta* c) {
  const size_t bytes = g->launch.smem;
  c->smem = memory()->plain[c->slot], c->async_view = memory()->async_view[c->slot];
  c->mark = memory()->mark[c->slot];
  c->last_write = memory()->last_write[c->slot], c->last_read = memory()->last_read[c->slot];
  memset(c->smem, 0xFF, bytes + kSmemSlack);  // NaN in e4m3, bf16 and fp32
  memset(c->async_view, 0xFF, bytes);
  memset(c->mark, 0, bytes * sizeof *c->mark);
  memset(c->last_write, 0, bytes * sizeof *c->last_write);
  memset(c->last_read, 0, bytes * sizeof *c->last_read);
}
void check_slack(Cta* c) {
  const uint8_t* end = c->smem + g->launch.smem;
  const uint8_t* written = std::find_if(end, end + kSmemSlack, [](uint8_t b) { return b != 0xFF; });
  if (written != end + kSmemSlack)
    fail("store at shared memory offset %zu, past the %zu bytes allocated", size_t(written - c->smem), g->launch.smem);
}

uint8_t* dynamic_smem() { return g->cur->cta->smem; }
uint32_t smem_addr(const void* p) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  Cta* c = g->cur->cta;
  if (q < c->smem || q >= c->smem + g->launch.smem) fail("pointer is not into this CTA's shared memory");
  return uint32_t(q - c->smem) + kSmemBase;
}

// 16-byte chunk index XOR 128-byte line index, over the absolute address.
uint32_t swizzled(uint32_t a, uint32_t span) {
  return span == 128  ? a ^ ((a >> 7 & 7) << 4)
         : span == 64 ? a ^ ((a >> 7 & 3) << 4)
         : span == 32 ? a ^ ((a >> 7 & 1) << 4)
                      : a;
}
void check_smem(uint32_t lo, uint32_t hi, const char* what) {
  if (lo < kSmemBase || hi > kSmemBase + g->launch.smem)
    fail("%s touches shared memory [0x%x, 0x%x), outside the %zu bytes allocated", what, lo - kSmemBase, hi - kSmemBase,
         g->launch.smem);
}
void set_mark(Cta* c, uint32_t lo, uint32_t hi, uint16_t mark) {
  std::fill(c->mark + lo - kSmemBase, c->mark + hi - kSmemBase, mark);
}
void check_settled(Cta* c, uint32_t lo, uint32_t hi, const char* what, bool write) {
  if (!settings.hazard_checks) return;
  const uint16_t *from = c->mark + lo - kSmemBase, *to = c->mark + hi - kSmemBase;
  uint16_t any = 0;
  for (const uint16_t* m = from; m != to; ++m) any |= *m;
  if (!any) return;
  const uint16_t* m = std::find_if(from, to, [=](uint16_t x) { return x && (write || x != kStoreReads); });
  if (m == to) return;
  fail("%s meets %s, %s", what, name_of(uint32_t(m - c->mark) + kSmemBase).c_str(), marked(*m).c_str());
}
void check_wgmma_reads(Cta* c, uint32_t lo, uint32_t hi, const char* what) {
  if (!settings.hazard_checks) return;
  for (auto& wg : c->wgs)
    for (size_t i = 0; i < wg.ops.size(); ++i) {
      const Op& op = wg.ops[i];
      if (*std::min_element(wg.retired, wg.retired + 4) > wg.base + i) continue;
      for (int o = op.rs; o < 2; ++o)
        if (overlap(lo, hi, op.range[o][0], op.range[o][1]))
          fail(
              "early overwrite: %s into %s of rank %u while a wgmma of warpgroup %d that reads it as %c has not been "
              "waited for",
              what, name_of(lo).c_str(), c->rank, int(&wg - c->wgs.data()), "AB"[o]);
    }
}
void mark_written(Fiber* f, uint32_t lo, uint32_t hi) {
  set_mark(f->cta, lo, hi, uint16_t(1 + f->tid));
  f->unfenced_lo = std::min(f->unfenced_lo, lo), f->unfenced_hi = std::max(f->unfenced_hi, hi);
}
// Comes just before the access.
void plain_access(Fiber* f, uint32_t lo, uint32_t hi, const char* what, bool write) {
  check_smem(lo, hi, what);
  if (settings.hazard_checks) {
    const uint16_t* mark = f->cta->mark - kSmemBase;
    for (uint32_t a = lo; a < hi; ++a)
      if (mark[a] >= (write ? kStoreReads : kCopyInFlight))
        fail("%s meets %s, %s", what, name_of(a).c_str(), marked(mark[a]).c_str());
    if (write) check_wgmma_reads(f->cta, lo, hi, what);
  }
  order_access(f, f->cta, lo, hi, what, write);
  if (write) mark_written(f, lo, hi);
}

void store_cluster(float* p, uint32_t rank, float value) {
  maybe_yield();
  auto& ctas = g->cur->cta->cluster->ctas;
  if (rank >= ctas.size()) fail("cluster rank %u out of range", rank);
  Cta* c = ctas[rank].get();
  const uint32_t a = smem_addr(p);
  if (c->live == 0) fail("store to %s of CTA rank %u, which has exited", name_of(a).c_str(), rank);
  check_settled(c, a, a + 4, "store of another CTA", true);
  order_access(g->cur, c, a, a + 4, "store of another CTA", true);
  auto* to = reinterpret_cast<float*>(c->smem + (a - kSmemBase));
  *to = value;
}

// Strict about whose writes it covers: those of the thread that executes it. That is the convention by which kernels
// are written (everyone fences, everyone meets, one thread starts the copy).
void fence_proxy_async() {
  Fiber* f = g->cur;
  Cta* c = f->cta;
  const uint16_t own = uint16_t(1 + f->tid);
  for (uint32_t a = f->unfenced_lo; a < f->unfenced_hi; ++a) {
    const uint32_t i = a - kSmemBase;
    const bool mine = c->mark[i] == own;
    c->async_view[i] = mine ? c->smem[i] : c->async_view[i];
    c->mark[i] = mine ? uint16_t(kSettled) : c->mark[i];
  }
  f->unfenced_lo = ~0u, f->unfenced_hi = 0;
  fence_barrier_init();
  note("fence_proxy_async");
  maybe_yield();
}

// Every plain access of a kernel, before it happens.
static void access_smem(uintptr_t offset, size_t bytes, bool write) {
  if (offset / kSmemSlot != g->cur->cta->slot) fail("plain access to the shared memory of another CTA");
  const uint32_t lo = uint32_t(offset % kSmemSlot) + kSmemBase;
  plain_access(g->cur, lo, lo + uint32_t(bytes), write ? "plain store" : "plain load", write);
}
static bool is_shared(const void* p) { return reinterpret_cast<uintptr_t>(p) - g_plain < kSlots * kSmemSlot; }
static inline void access(const void* p, size_t bytes, bool write) {
  if (!g || !g->cur) return;
  const bool shared = is_shared(p);
  // A loop that waits for another CTA's plain store comes to an end.
  if (++g->plain_accesses % 65536 == 0 || (settings.strict && shared && g->rnd(8) == 0)) yield_now();
  if (shared) access_smem(reinterpret_cast<uintptr_t>(p) - g_plain, bytes, write);
}
// By memcpy and the like, which the model itself calls too: no place to switch threads.
static void bulk_access(const void* p, size_t bytes, bool write) {
  if (g && g->cur && bytes && is_shared(p)) access_smem(reinterpret_cast<uintptr_t>(p) - g_plain, bytes, write);
}
void atomic_access(void* p, size_t bytes) {
  maybe_yield();
  if (!is_shared(p)) return;
  const uint32_t a = smem_addr(p);
  check_smem(a, a + uint32_t(bytes), "atomic");
  mark_written(g->cur, a, a + uint32_t(bytes));
}

}  // namespace model

extern "C" {
#define SANITIZER_CALLS(n)                                               \
  void __tsan_read##n(void* p) { model::access(p, n, false); }           \
  void __tsan_write##n(void* p) { model::access(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { model::access(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { model::access(p, n, true); }
SANITIZER_CALLS(1)
SANITIZER_CALLS(2)
SANITIZER_CALLS(4)
SANITIZER_CALLS(8)
SANITIZER_CALLS(16)
void __tsan_read_range(void* p, size_t n) { model::access(p, n, false); }
void __tsan_write_range(void* p, size_t n) { model::access(p, n, true); }
void* __real_memcpy(void* to, const void* from, size_t n);
void* __wrap_memcpy(void* to, const void* from, size_t n) {
  model::bulk_access(from, n, false), model::bulk_access(to, n, true);
  return __real_memcpy(to, from, n);
}
void* __real_memmove(void* to, const void* from, size_t n);
void* __wrap_memmove(void* to, const void* from, size_t n) {
  model::bulk_access(from, n, false), model::bulk_access(to, n, true);
  return __real_memmove(to, from, n);
}
void* __real_memset(void* to, int byte, size_t n);
void* __wrap_memset(void* to, int byte, size_t n) {
  model::bulk_access(to, n, true);
  return __real_memset(to, byte, n);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
