// wgmma: descriptors, operand layouts, the asynchronous product, and who may touch what meanwhile.
#include <algorithm>

#include "sim.h"

namespace model {
namespace {

struct Desc {
  uint32_t start, lbo, sbo, span;
};
Desc decode(uint64_t d) {
  static const uint32_t spans[] = {0, 128, 64, 32};
  Desc r{uint32_t(d & 0x3FFF) << 4, uint32_t(d >> 16 & 0x3FFF) << 4, uint32_t(d >> 32 & 0x3FFF) << 4, spans[d >> 62]};
  if (d >> 49 & 7) fail("descriptor with a base offset: not modelled");
  if (r.span && (r.start & (r.span * 8 - 1) & ~127u))
    fail("descriptor start 0x%x is not at the start of its %u-byte swizzle pattern and base offset is 0", r.start,
         r.span);
  return r;
}
// Address of a 16-byte chunk. K-major: `row` = m or n, `chunk` along k. MN-major: `row` = k, `chunk` along mn.
uint32_t chunk_addr(const Desc& d, bool mn_major, int row, int chunk) {
  uint32_t off;
  const int per = d.span / 16;  // chunks per swizzled line
  if (!mn_major)
    off = d.span ? row / 8 * d.sbo + row % 8 * d.span + chunk * 16 : row / 8 * d.sbo + chunk * d.lbo + row % 8 * 16;
  else
    off = d.span ? chunk / per * d.lbo + row / 8 * d.sbo + row % 8 * d.span + chunk % per * 16
                 : chunk * d.sbo + row / 8 * d.lbo + row % 8 * 16;
  return swizzled((d.start + off) & 0x3FFFF, d.span);
}
float decode_e4m3(uint8_t v) {
  const int s = v >> 7, e = v >> 3 & 15, m = v & 7;
  const float f = e == 15 && m == 7 ? NAN : e ? std::ldexp(1.f + m / 8.f, e - 7) : std::ldexp(float(m), -9);
  return s ? -f : f;
}
float decode_bf16(uint16_t v) {
  uint32_t u = uint32_t(v) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
float decode_f16(uint16_t v) {
  const int exponent = v >> 10 & 31, mantissa = v & 1023;
  const float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
                  : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                                 : std::ldexp(float(mantissa), -24);
  return v >> 15 ? -f : f;
}
float decode_16(Type t, uint16_t v) { return t == BF16 ? decode_bf16(v) : decode_f16(v); }

// Loads rows [r0, r0+rows) of an operand as float [k][row] (k-major outside so that the product vectorises).
void fetch(Cta* c, Type t, uint64_t desc, bool mn_major, int r0, int rows, float* out, int ld) {
  static float e4m3[256];
  if (e4m3[0x38] != 1.f)
    for (int i = 0; i < 256; ++i) e4m3[i] = decode_e4m3(i);
  const Desc d = decode(desc);
  const uint8_t* mem = c->async_view - kSmemBase;
  if (!mn_major) {
    for (int r = 0; r < rows; ++r)
      for (int ch = 0; ch < 2; ++ch) {
        const uint8_t* p = mem + chunk_addr(d, false, r0 + r, ch);
        if (t == E4M3)
          for (int j = 0; j < 16; ++j) out[(ch * 16 + j) * ld + r] = e4m3[p[j]];
        else
          for (int j = 0; j < 8; ++j) {
            uint16_t h;
            memcpy(&h, p + 2 * j, 2);
            out[(ch * 8 + j) * ld + r] = decode_16(t, h);
          }
      }
  } else {
    for (int k = 0; k < 16; ++k)
      for (int ch = 0; ch < rows / 8; ++ch) {
        const uint8_t* p = mem + chunk_addr(d, true, k, r0 / 8 + ch);
        for (int j = 0; j < 8; ++j) {
          uint16_t h;
          memcpy(&h, p + 2 * j, 2);
          out[k * ld + ch * 8 + j] = decode_16(t, h);
        }
      }
  }
}
void check_operand(Cta* c, uint64_t desc, bool mn_major, int rows, char operand, uint32_t (&range)[2]) {
  const Desc d = decode(desc);
  const int nr = mn_major ? 16 : rows, nc = mn_major ? rows / 8 : 2;
  const std::string what = str("wgmma operand %c", operand);
  range[0] = ~0u, range[1] = 0;
  for (int r = 0; r < nr; ++r)
    for (int ch = 0; ch < nc; ++ch) {
      const uint32_t a = chunk_addr(d, mn_major, r, ch);
      check_smem(a, a + 16, what.c_str());
      check_settled(c, a, a + 16, what.c_str(), false);
      range[0] = std::min(range[0], a), range[1] = std::max(range[1], a + 16);
    }
}

}  // namespace

uint32_t operand_address(uint64_t descriptor, bool mn_major, int mn, int k, int element_bytes) {
  const int row = mn_major ? k : mn, byte = (mn_major ? mn : k) * element_bytes;
  return chunk_addr(decode(descriptor), mn_major, row, byte / 16) + byte % 16;
}

void run_wgmma(Event& e) {  // one warp's 16 rows of its next wgmma
  WarpGroup& wg = *e.wg;
  const int w = e.warp;
  Op& op = wg.op(wg.done[w]);
  const int K = op.type == E4M3 ? 32 : 16;
  static float A[32 * 16], B[32 * 256], D[16][256];
  if (op.rs) {
    for (int l = 0; l < 32; ++l) {
      const int t = w * 32 + l;
      if (settings.hazard_checks && memcmp(op.a[t], op.a_copy[t], 16))
        fail("thread %d changed wgmma A registers before wgmma_wait", t);
      for (int i = 0; i < 8; ++i) {
        const Place at = register_a_place(l, i);
        A[at.column * 16 + at.row] = decode_16(op.type, uint16_t(op.a[t][i / 2] >> (i % 2 * 16)));
      }
    }
  } else {
    fetch(e.cta, op.type, op.da, op.ta, 16 * w, 16, A, 16);
  }
  fetch(e.cta, op.type, op.db, op.tb, 0, op.n, B, op.n);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < op.n / 2; ++i) {
      const Place at = accumulator_place(l, i);
      D[at.row][at.column] = op.scale_d ? op.acc[w * 32 + l]->v[i] : 0.f;
    }
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < K; ++k) {
      const float a = A[k * 16 + r];
      for (int n = 0; n < op.n; ++n) D[r][n] += a * B[k * op.n + n];
    }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < op.n / 2; ++i) {
      const Place at = accumulator_place(l, i);
      op.acc[w * 32 + l]->v[i] = D[at.row][at.column];
    }
  note(e.cta, int(&wg - e.cta->wgs.data()) * 128 + w * 32, "wgmma executed for the warp of", 0, int64_t(wg.done[w]));
  ++wg.done[w];
  wake(wg.waiters);
}

void wgmma_fence() {
  g->cur->need_fence = false;
  maybe_yield();
}
void wgmma_commit() {
  g->cur->groups.push_back(g->cur->issued);
  maybe_yield();
}

void wgmma(Type t, int n, float* d, const uint32_t* a, uint64_t da, uint64_t db, int scale_d, int ta, int tb) {
  Fiber* f = g->cur;
  Cta* c = f->cta;
  const int wt = f->tid % 128;
  maybe_yield();
  if (f->need_fence) fail("wgmma without wgmma_fence after the accumulators were last accessed");
  if (n % 8 || n < 8 || n > 256) fail("wgmma: N = %d", n);
  WarpGroup& wg = c->wgs[f->tid / 128];
  const uint64_t idx = f->issued++;
  if (idx == wg.base + wg.ops.size()) {
    wg.ops.emplace_back();
    Op& o = wg.ops.back();
    o.type = t, o.n = n, o.scale_d = scale_d != 0, o.ta = ta, o.tb = tb, o.rs = a != nullptr, o.da = da, o.db = db;
    if (!o.rs) check_operand(c, da, ta, 64, 'A', o.range[0]);
    check_operand(c, db, tb, n, 'B', o.range[1]);
  }
  Op& o = wg.op(idx);
  if (o.type != t || o.n != n || o.scale_d != (scale_d != 0) || o.da != da || o.db != db || o.rs != (a != nullptr) ||
      o.ta != ta || o.tb != tb)
    fail("wgmma: shape, descriptor or scale_d differs between threads of the warpgroup");
  Acc* acc = nullptr;
  for (auto& x : f->accs)
    if (x->d == d) acc = x.get();
  if (!acc) {
    f->accs.push_back(std::make_unique<Acc>());
    acc = f->accs.back().get();
    acc->d = d, acc->n = n / 2, acc->v.assign(d, d + n / 2);
    memset(d, 0xFF, n / 2 * 4);  // NaN until waited for
  }
  note("issues wgmma", 0, int64_t(idx));
  if (f->clock_news) release(f, wg.issued[wt / 32]), f->clock_news = false;
  acc->last_op = idx;
  o.acc[wt] = acc, o.a[wt] = a;
  if (a) memcpy(o.a_copy[wt], a, 16);
  if (++o.issued == 128)
    for (int w = 0; w < 4; ++w) {
      Event e{Event::Wgmma, c};
      e.wg = &wg, e.warp = w;
      g->events.push_back(std::move(e));
    }
}

void wgmma_wait(int n, std::initializer_list<float*> named) {
  Fiber* f = g->cur;
  WarpGroup& wg = f->cta->wgs[f->tid / 128];
  const int w = f->tid % 128 / 32;
  maybe_yield();
  const uint64_t upto = f->groups.size() > size_t(n) ? f->groups[f->groups.size() - 1 - n] : 0;
  for (int v = 0; v < 4; ++v) {  // strict: a warp's wait covers only its own 16 rows
    if (settings.wgmma_per_warp && v != w) continue;
    while (wg.done[v] < upto) block_on(wg.waiters, "waits for wgmma");
  }
  note("has waited for wgmma before", 0, int64_t(upto));
  if (upto) acquire(f, wg.issued[w]);
  for (int v = 0; v < 4; ++v)
    if (!settings.wgmma_per_warp || v == w) wg.retired[v] = std::max(wg.retired[v], upto);
  while (f->groups.size() > size_t(n)) f->groups.pop_front();
  for (size_t i = 0; i < f->accs.size();) {
    Acc& a = *f->accs[i];
    if (a.last_op >= upto) {
      ++i;
      continue;
    }
    for (int k = 0; k < a.n; ++k) {
      uint32_t u;
      memcpy(&u, a.d + k, 4);
      if (u != ~0u) fail("accumulator %d was written while wgmma owned it", k);
    }
    bool is_named = false;
    for (float* p : named) is_named |= p == a.d;
    if (!is_named)
      fail("wgmma_wait completes an accumulator that the call does not name: the compiler may read it early");
    memcpy(a.d, a.v.data(), a.n * 4);
    f->accs.erase(f->accs.begin() + i);
    f->need_fence = true;
  }
  while (!wg.ops.empty() && wg.ops.front().issued == 128 &&
         std::min(std::min(wg.retired[0], wg.retired[1]), std::min(wg.retired[2], wg.retired[3])) > wg.base)
    wg.ops.pop_front(), ++wg.base;
}

}  // namespace model
