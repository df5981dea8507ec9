// mbarriers and everything that completes on one: cp.async, TMA loads; TMA stores.
#include <algorithm>

#include "sim.h"

namespace model {
namespace {

Barrier& barrier(Cta* c, uint32_t addr, const char* what) {
  auto it = c->bars.find(addr);
  if (it == c->bars.end()) fail("%s on %s, which is not initialised", what, name_of(c, addr).c_str());
  uint64_t tag;
  memcpy(&tag, c->smem + addr - kSmemBase, 8);
  if (tag != (0xBA221E2000000000ull | addr))
    fail("%s on %s: the barrier object was overwritten", what, name_of(c, addr).c_str());
  return it->second;
}
void complete_phase_if_due(Barrier& b) {
  if (b.pending != 0 || b.tx != 0) return;
  ++b.phase;
  b.pending = b.expected;
  wake(b.waiters);
}
void arrive(Cta* c, uint32_t addr, int64_t tx) {
  Barrier& b = barrier(c, addr, "arrive");
  b.tx += tx;
  if (b.tx > 0xFFFFF) fail("tx-count of %s exceeds 2^20-1", name_of(c, addr).c_str());
  if (--b.pending < 0)
    fail("%s: more arrivals in one phase than the %u it was initialised with (tx-count %ld)", name_of(c, addr).c_str(),
         b.expected, long(b.tx));
  complete_phase_if_due(b);
}
void complete_tx(Cta* c, uint32_t addr, uint32_t bytes) {
  Barrier& b = barrier(c, addr, "complete_tx");
  b.tx -= bytes;
  if (b.tx < -0xFFFFF) fail("tx-count of %s below -(2^20-1)", name_of(c, addr).c_str());
  complete_phase_if_due(b);
}
}  // namespace

void run_load(Event& e) {
  const uint32_t row_bytes = e.map.box[0] * e.map.elem;
  for (int r = e.row0; r < e.row1; ++r)
    for (uint32_t i = 0; i < e.map.box[0]; i += 16 / e.map.elem) {
      uint8_t chunk[16] = {};
      for (uint32_t j = 0; j < 16 / e.map.elem; ++j) {
        const int64_t x = int64_t(e.x) + i + j, y = int64_t(e.y) + r;
        if (x >= 0 && y >= 0 && uint64_t(x) < e.map.size[0] && uint64_t(y) < e.map.size[1])
          memcpy(chunk + j * e.map.elem, e.map.base + y * e.map.stride + x * e.map.elem, e.map.elem);
      }
      const uint32_t a = swizzled(e.dst + r * row_bytes + i * e.map.elem, e.map.swizzle) - kSmemBase;
      memcpy(e.cta->smem + a, chunk, 16);
      memcpy(e.cta->async_view + a, chunk, 16);
    }
  complete_tx(e.cta, e.bar, (e.row1 - e.row0) * row_bytes);
}

void run_store(Event& e) {
  Store& s = *e.store;
  const uint32_t row_bytes = s.map.box[0] * s.map.elem;
  if (settings.hazard_checks && memcmp(s.copy.data(), e.cta->smem + s.lo - kSmemBase, s.hi - s.lo))
    fail("source of a TMA store (smem+0x%x) was overwritten before the store had read it", s.lo - kSmemBase);
  for (uint32_t r = 0; r < s.map.box[1]; ++r)
    for (uint32_t i = 0; i < s.map.box[0]; ++i) {
      const int64_t x = int64_t(s.x) + i, y = int64_t(s.y) + r;
      const uint32_t a = swizzled(s.lo + r * row_bytes + i * s.map.elem, s.map.swizzle) - kSmemBase;
      if (x >= 0 && y >= 0 && uint64_t(x) < s.map.size[0] && uint64_t(y) < s.map.size[1])
        memcpy(s.map.base + y * s.map.stride + x * s.map.elem, e.cta->async_view + a, s.map.elem);
    }
  s.done = true;
  wake(s.owner->store_waiters);
}
void run_copies(Event& e) {
  for (const Copy& c : e.copies) {
    memset(e.cta->smem + c.dst - kSmemBase, 0, c.bytes);
    memcpy(e.cta->smem + c.dst - kSmemBase, c.src, c.valid);
  }
  arrive(e.cta, e.bar, 0);
}

void mbarrier_init(uint64_t* bar, uint32_t count) {
  const uint32_t a = smem_addr(bar);
  if (a % 8 || count == 0 || count > 0xFFFFF) fail("mbarrier_init: bad address or count");
  Barrier b;
  b.expected = count, b.pending = count, b.owner = g->cur->tid;
  g->cur->cta->bars[a] = b;
  *bar = 0xBA221E2000000000ull | a;
  maybe_yield();
}
void mbarrier_arrive(uint64_t* bar) {
  maybe_yield();
  arrive(g->cur->cta, smem_addr(bar), 0);
  maybe_yield();
}
void mbarrier_arrive_cluster(uint64_t* bar, uint32_t rank) {
  maybe_yield();
  if (rank >= g->ctas.size()) fail("cluster rank %u out of range", rank);
  Cta* c = g->ctas[rank].get();
  const uint32_t a = smem_addr(bar);
  if (c->live == 0) fail("remote arrive on %s of CTA rank %u, which has exited", name_of(c, a).c_str(), rank);
  if (c != g->cur->cta && c->bars.count(a) && !c->bars[a].fenced)
    fail("remote arrive on %s of rank %u: no fence_barrier_init after its init", name_of(c, a).c_str(), rank);
  arrive(c, a, 0);
  maybe_yield();
}
void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes) {
  maybe_yield();
  arrive(g->cur->cta, smem_addr(bar), bytes);
}
void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  const uint32_t a = smem_addr(bar);
  Cta* c = g->cur->cta;
  if (parity > 1) fail("mbarrier_wait: parity %u", parity);
  maybe_yield();
  for (;;) {  // re-tested after waking: a thread that comes late can miss a phase, as on the device
    Barrier& b = barrier(c, a, "wait");
    if ((b.phase & 1) != parity) return;
    block_on(b.waiters, str("waits on %s parity %u", name_of(c, a).c_str(), parity));
  }
}
void fence_barrier_init() {
  for (auto& [a, b] : g->cur->cta->bars)
    if (b.owner == g->cur->tid) b.fenced = true;
}
void fence_proxy_async() {
  memcpy(g->cur->cta->async_view, g->cur->cta->smem, g->launch.smem);
  fence_barrier_init();
  maybe_yield();
}

// Copies run when their thread has arrived for them: nobody can tell that they have before.
void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t valid_bytes) {
  maybe_yield();
  const uint32_t d = smem_addr(dst);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp_async of %u bytes", bytes);
  if (d % bytes || reinterpret_cast<uintptr_t>(src) % bytes)
    fail("cp_async: an address is not a multiple of %u", bytes);
  if (valid_bytes > bytes) fail("cp_async: %u of %u bytes are valid", valid_bytes, bytes);
  check_smem(d, d + bytes, "cp_async");
  memset(dst, 0xFF, bytes);  // NaN until waited for
  g->cur->copies.push_back({d, bytes, valid_bytes, src});
}
void cp_async_mbarrier_arrive(uint64_t* bar) {
  maybe_yield();
  Event e{Event::Copies, g->cur->cta};
  e.bar = smem_addr(bar);
  barrier(e.cta, e.bar, "cp_async_mbarrier_arrive");
  e.copies = std::move(g->cur->copies);
  g->cur->copies.clear();
  g->events.push_back(std::move(e));
  maybe_yield();
}

void tma_load_2d(void* dst, const TensorMap& map, uint64_t* bar, int x, int y, uint16_t mask) {
  maybe_yield();
  const uint32_t d = smem_addr(dst), b = smem_addr(bar), bytes = map.box[0] * map.box[1] * map.elem;
  Cta* self = g->cur->cta;
  if (mask == 0) mask = uint16_t(1u << self->rank);
  if (d % 128) fail("tma_load_2d: destination smem+0x%x not a multiple of 128", d - kSmemBase);
  check_smem(d, d + bytes, "tma_load_2d");
  for (unsigned r = 0; r < 16; ++r) {
    if (!(mask >> r & 1)) continue;
    if (r >= g->ctas.size()) fail("tma_load_2d: multicast mask 0x%x names no CTA of the cluster", mask);
    Cta* c = g->ctas[r].get();
    if (c->live == 0) fail("multicast into CTA rank %u, which has exited", r);
    if (!barrier(c, b, "tma_load_2d").fenced)
      fail("TMA uses %s, but its init was not followed by fence_barrier_init", name_of(c, b).c_str());
    if (settings.hazard_checks) {
      for (auto& wg : c->wgs)
        for (size_t i = 0; i < wg.ops.size(); ++i) {
          bool live = false;
          for (int w = 0; w < 4; ++w) live |= wg.retired[w] <= wg.base + i;
          Op& op = wg.ops[i];
          for (int o = op.rs; o < 2; ++o)
            if (live && overlap(d, d + bytes, op.range[o][0], op.range[o][1]))
              fail(
                  "early overwrite: TMA load into smem+0x%x of rank %u while a wgmma of warpgroup %d that reads it as "
                  "%c has not been waited for",
                  d - kSmemBase, r, int(&wg - c->wgs.data()), "AB"[o]);
        }
      for (auto& e : g->events) {
        if (e.cta != c) continue;
        if (e.kind == Event::Load && overlap(d, d + bytes, e.dst, e.dst + e.map.box[0] * e.map.box[1] * e.map.elem))
          fail("two TMA loads in flight into smem+0x%x of rank %u", d - kSmemBase, r);
        if (e.kind == Event::StoreRead && overlap(d, d + bytes, e.store->lo, e.store->hi))
          fail("early overwrite: TMA load into smem+0x%x, which a TMA store is still reading", d - kSmemBase);
      }
    }
    const int rows = map.box[1], pieces = std::min(rows, 1 + int(g->rnd(4)));
    for (int p = 0; p < pieces; ++p)
      g->events.push_back({Event::Load, c, map, x, y, rows * p / pieces, rows * (p + 1) / pieces, d, b});
  }
  maybe_yield();
}
void tma_store_2d(const void* src, const TensorMap& map, int x, int y) {
  maybe_yield();
  auto s = std::make_shared<Store>();
  s->lo = smem_addr(src), s->hi = s->lo + map.box[0] * map.box[1] * map.elem;
  s->cta = g->cur->cta, s->map = map, s->x = x, s->y = y, s->owner = g->cur;
  if (s->lo % 128) fail("tma_store_2d: source smem+0x%x not a multiple of 128", s->lo - kSmemBase);
  check_smem(s->lo, s->hi, "tma_store_2d");
  check_fenced(s->cta, s->lo, s->hi, "tma_store_2d");
  s->copy.assign(s->cta->smem + s->lo - kSmemBase, s->cta->smem + s->hi - kSmemBase);
  g->cur->stores.push_back(s);
  Event e{Event::StoreRead, s->cta};
  e.store = s;
  g->events.push_back(std::move(e));
}
void tma_store_commit() { g->cur->store_groups.push_back(g->cur->stores.size()); }
void tma_store_wait(int n) {
  Fiber* f = g->cur;
  const size_t upto = f->store_groups.size() > size_t(n) ? f->store_groups[f->store_groups.size() - 1 - n] : 0;
  for (size_t i = 0; i < upto; ++i)
    while (!f->stores[i]->done) block_on(f->store_waiters, "waits for its TMA stores");
  f->stores_waited = std::max(f->stores_waited, upto);
}

}  // namespace model
