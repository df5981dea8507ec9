// mbarriers and everything that completes on one: cp.async, TMA loads; TMA stores.
#include <algorithm>

#include "sim.h"

namespace model {
namespace {

Barrier& barrier(Cta* c, uint32_t addr, const char* what) {
  auto it = c->bars.find(addr);
  if (it == c->bars.end()) fail("%s on %s, which is not initialised", what, name_of(addr).c_str());
  uint64_t tag;
  memcpy(&tag, c->smem + addr - kSmemBase, 8);
  if (tag != (0xBA221E2000000000ull | addr))
    fail("%s on %s: the barrier object was overwritten", what, name_of(addr).c_str());
  return it->second;
}
void complete_phase_if_due(Cta* c, uint32_t addr, Barrier& b) {
  if (b.pending != 0 || b.tx != 0) return;
  note(c, -1, "completes phase of", addr, int64_t(b.phase));
  ++b.phase;
  b.pending = b.expected;
  b.completed = b.arrived;
  wake(b.waiters);
}
void arrive(Cta* c, uint32_t addr, int64_t tx) {
  Barrier& b = barrier(c, addr, "arrive");
  if (g->cur) release(g->cur, b.arrived);
  b.tx += tx;
  if (b.tx > 0xFFFFF) fail("tx-count of %s exceeds 2^20-1", name_of(addr).c_str());
  if (--b.pending < 0)
    fail("%s: more arrivals in one phase than the %u it was initialised with (tx-count %ld)", name_of(addr).c_str(),
         b.expected, long(b.tx));
  complete_phase_if_due(c, addr, b);
}
void complete_tx(Cta* c, uint32_t addr, uint32_t bytes) {
  Barrier& b = barrier(c, addr, "complete_tx");
  b.tx -= bytes;
  if (b.tx < -0xFFFFF) fail("tx-count of %s below -(2^20-1)", name_of(addr).c_str());
  complete_phase_if_due(c, addr, b);
}
}  // namespace

// Element x of row `row` of a box in global memory; nullptr outside the tensor.
static char* element(const TensorMap& map, const Corner& corner, uint32_t row, uint32_t i) {
  const int64_t at[] = {int64_t(corner[0]) + i, int64_t(corner[1]) + row % map.box[1],
                        int64_t(corner[2]) + row / map.box[1]};
  for (int d = 0; d < map.rank; ++d)
    if (at[d] < 0 || uint64_t(at[d]) >= map.size[d]) return nullptr;
  return map.base + at[2] * map.stride[1] + at[1] * map.stride[0] + at[0] * map.elem;
}

static void check_global_allowed(const char* what) {
  if (!g->cur->cta->global_allowed) fail("%s before grid_dependency_wait in a dependent launch", what);
}

void run_load(Event& e) {
  const TensorMap& map = e.map;
  for (uint32_t r = e.row0; r < e.row1; ++r)
    for (uint32_t i = 0; i < map.box[0]; i += 16 / map.elem) {
      uint8_t chunk[16] = {};
      for (uint32_t j = 0; j < 16 / map.elem; ++j)
        if (const char* p = element(map, e.corner, r, i + j)) memcpy(chunk + j * map.elem, p, map.elem);
      const uint32_t a = swizzled(e.dst + r * map.row_bytes() + i * map.elem, map.swizzle) - kSmemBase;
      memcpy(e.cta->smem + a, chunk, 16);
      memcpy(e.cta->async_view + a, chunk, 16);
    }
  const uint32_t lo = e.dst + e.row0 * map.row_bytes(), hi = e.dst + e.row1 * map.row_bytes();
  set_mark(e.cta, lo, hi, kSettled);
  note(e.cta, -1, "TMA load lands: bytes of", e.dst, hi - lo);
  complete_tx(e.cta, e.bar, hi - lo);
}

void run_store(Event& e) {
  Store& s = *e.store;
  const TensorMap& map = s.map;
  for (uint32_t r = 0; r < map.rows(); ++r)
    for (uint32_t i = 0; i < map.box[0]; ++i) {
      char* p = element(map, s.corner, r, i);
      if (!p) continue;
      const uint8_t* q =
          e.cta->async_view + swizzled(s.lo + r * map.row_bytes() + i * map.elem, map.swizzle) - kSmemBase;
      if (s.add)
        *reinterpret_cast<float*>(p) += *reinterpret_cast<const float*>(q);
      else
        memcpy(p, q, map.elem);
    }
  s.done = true;
  note(e.cta, -1, s.add ? "TMA reduction has read" : "TMA store has read", s.lo);
  wake(s.owner->store_waiters);
}
void run_copies(Event& e) {
  for (const Copy& c : e.copies) {
    memset(e.cta->smem + c.dst - kSmemBase, 0, c.bytes);
    memcpy(e.cta->smem + c.dst - kSmemBase, c.src, c.valid);
    mark_written(e.issuer, c.dst, c.dst + c.bytes);
  }
  note(e.cta, e.issuer->tid, "cp.async landed, arrive on", e.bar);
  join(barrier(e.cta, e.bar, "arrive").arrived, e.clock);
  arrive(e.cta, e.bar, 0);
}

void mbarrier_init(uint64_t* bar, uint32_t count) {
  const uint32_t a = smem_addr(bar);
  if (a % 8 || count == 0 || count > 0xFFFFF) fail("mbarrier_init: bad address or count");
  Barrier b;
  b.expected = count, b.pending = count, b.owner = g->cur->tid;
  g->cur->cta->bars[a] = b;
  *bar = 0xBA221E2000000000ull | a;
  note("mbarrier_init", a, count);
  maybe_yield();
}
void mbarrier_arrive(uint64_t* bar) {
  maybe_yield();
  note("arrives on", smem_addr(bar));
  arrive(g->cur->cta, smem_addr(bar), 0);
  maybe_yield();
}
void mbarrier_arrive_cluster(uint64_t* bar, uint32_t rank) {
  maybe_yield();
  auto& ctas = g->cur->cta->cluster->ctas;
  if (rank >= ctas.size()) fail("cluster rank %u out of range", rank);
  Cta* c = ctas[rank].get();
  const uint32_t a = smem_addr(bar);
  if (c->live == 0) fail("remote arrive on %s of CTA rank %u, which has exited", name_of(a).c_str(), rank);
  if (c != g->cur->cta && c->bars.count(a) && !c->bars[a].fenced)
    fail("remote arrive on %s of rank %u: no fence_barrier_init after its init", name_of(a).c_str(), rank);
  note("arrives for the CTA of a rank on", a, rank);
  if (c != g->cur->cta) remember(g->cur, barrier(c, a, "arrive").from_peers);
  arrive(c, a, 0);
  maybe_yield();
}
void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes) {
  maybe_yield();
  note("arrives, expecting bytes, on", smem_addr(bar), bytes);
  arrive(g->cur->cta, smem_addr(bar), bytes);
}
void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  const uint32_t a = smem_addr(bar);
  Cta* c = g->cur->cta;
  if (parity > 1) fail("mbarrier_wait: parity %u", parity);
  maybe_yield();
  for (;;) {  // re-tested after waking: a thread that comes late can miss a phase, as on the device
    Barrier& b = barrier(c, a, "wait");
    if ((b.phase & 1) != parity) {
      acquire(g->cur, b.completed);
      return note("is past parity of", a, parity);
    }
    note("waits for parity of", a, parity);
    block_on(b.waiters, str("waits on %s parity %u", name_of(a).c_str(), parity));
  }
}
void fence_barrier_init() {
  for (auto& [a, b] : g->cur->cta->bars)
    if (b.owner == g->cur->tid) b.fenced = true;
}

// Copies run when their thread has arrived for them: nobody can tell that they have before.
void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t valid_bytes) {
  maybe_yield();
  const uint32_t d = smem_addr(dst);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp_async of %u bytes", bytes);
  if (d % bytes || reinterpret_cast<uintptr_t>(src) % bytes)
    fail("cp_async: an address is not a multiple of %u", bytes);
  if (valid_bytes > bytes) fail("cp_async: %u of %u bytes are valid", valid_bytes, bytes);
  check_global_allowed("cp_async");
  plain_access(g->cur, d, d + bytes, "cp.async", true);
  memset(dst, 0xFF, bytes);  // NaN until waited for
  set_mark(g->cur->cta, d, d + bytes, kCopyInFlight);
  g->cur->copies.push_back({d, bytes, valid_bytes, src});
}
void cp_async_mbarrier_arrive(uint64_t* bar) {
  maybe_yield();
  Event e{Event::Copies, g->cur->cta};
  e.bar = smem_addr(bar);
  barrier(e.cta, e.bar, "cp_async_mbarrier_arrive");
  e.issuer = g->cur;
  release(g->cur, e.clock);
  e.copies = std::move(g->cur->copies);
  g->cur->copies.clear();
  g->events.push_back(std::move(e));
  maybe_yield();
}

static void check_tma(int rank, const TensorMap& map, uint32_t smem, const char* what) {
  if (map.rank != rank) fail("%s of %d dimensions through a tensor map of %d", what, rank, map.rank);
  if (smem % 128) fail("%s: smem+0x%x is not a multiple of 128", what, smem - kSmemBase);
  check_smem(smem, smem + map.bytes(), what);
  check_global_allowed(what);
}

void tma_load(int rank, void* dst, const TensorMap& map, uint64_t* bar, const Corner& corner, uint16_t mask) {
  maybe_yield();
  const uint32_t d = smem_addr(dst), b = smem_addr(bar), bytes = map.bytes();
  Cta* self = g->cur->cta;
  if (mask == 0) mask = uint16_t(1u << self->rank);
  check_tma(rank, map, d, "TMA load");
  note("starts a TMA load into", d, bytes);
  for (unsigned r = 0; r < 16; ++r) {
    if (!(mask >> r & 1)) continue;
    if (r >= self->cluster->ctas.size()) fail("TMA load: multicast mask 0x%x names no CTA of the cluster", mask);
    Cta* c = self->cluster->ctas[r].get();
    if (c->live == 0) fail("multicast into CTA rank %u, which has exited", r);
    if (!barrier(c, b, "TMA load").fenced)
      fail("TMA uses %s, but its init was not followed by fence_barrier_init", name_of(b).c_str());
    check_wgmma_reads(c, d, d + bytes, "TMA load");
    check_settled(c, d, d + bytes, "TMA load", true);
    order_access(g->cur, c, d, d + bytes, "TMA load", true, false);
    set_mark(c, d, d + bytes, kTmaInFlight);
    const uint32_t rows = map.rows(), pieces = std::min(rows, 1 + uint32_t(g->rnd(4)));
    for (uint32_t p = 0; p < pieces; ++p)
      g->events.push_back({Event::Load, c, map, corner, rows * p / pieces, rows * (p + 1) / pieces, d, b});
  }
  maybe_yield();
}
void tma_store(int rank, const void* src, const TensorMap& map, const Corner& corner, bool add) {
  maybe_yield();
  const char* what = add ? "TMA reduction" : "TMA store";
  auto s = std::make_shared<Store>();
  s->lo = smem_addr(src), s->hi = s->lo + map.bytes();
  s->map = map, s->corner = corner, s->add = add, s->owner = g->cur;
  check_tma(rank, map, s->lo, what);
  for (int i = 0; i < rank; ++i)  // loads may begin there
    if (corner[i] < 0) fail("%s before the beginning of the tensor: an illegal instruction on the GPU", what);
  if (add && map.elem != 4) fail("TMA reduction of %u-byte elements: not modelled", map.elem);
  Cta* c = g->cur->cta;
  check_settled(c, s->lo, s->hi, what, false);
  set_mark(c, s->lo, s->hi, kStoreReads);
  g->cur->stores.push_back(s);
  note(add ? "starts a TMA reduction from" : "starts a TMA store from", s->lo, map.bytes());
  Event e{Event::StoreRead, c};
  e.store = s;
  g->events.push_back(std::move(e));
}
void tma_store_commit() { g->cur->store_groups.push_back(g->cur->stores.size()); }
void tma_store_wait(int n) {
  Fiber* f = g->cur;
  const size_t upto = f->store_groups.size() > size_t(n) ? f->store_groups[f->store_groups.size() - 1 - n] : 0;
  for (size_t i = 0; i < upto; ++i)
    while (!f->stores[i]->done) block_on(f->store_waiters, "waits for its TMA stores");
  // Only now may the source be written again, by this thread or by who meets it after this.
  for (; f->stores_waited < upto; ++f->stores_waited) {
    const Store& s = *f->stores[f->stores_waited];
    order_access(f, f->cta, s.lo, s.hi, "TMA store", false);
    set_mark(f->cta, s.lo, s.hi, kSettled);
  }
  for (size_t i = upto; i < f->stores.size(); ++i) set_mark(f->cta, f->stores[i]->lo, f->stores[i]->hi, kStoreReads);
  note("has waited for its TMA stores, all but the last", 0, n);
}

}  // namespace model
