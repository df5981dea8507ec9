// The state of one launch, shared by the model's sources.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "model.h"

namespace model {

constexpr uint32_t kSmemBase = 0x400;  // shared-window address of dynamic smem (the first KiB is reserved on sm_90)
constexpr size_t kSmemMax = 227 * 1024, kSmemSlot = 256 * 1024, kSmemSlack = 4096;
constexpr unsigned kSlots = 64;  // CTAs alive at once

struct Cta;
struct Cluster;
struct Fiber;
using Waiters = std::vector<Fiber*>;
using Clock = std::vector<uint32_t>;  // per thread of the cluster: up to where in its life others know it

struct Barrier {  // mbarrier object (PTX ISA "mbarrier": phase, pending and expected arrivals, tx-count)
  uint32_t expected = 0;
  int64_t pending = 0, tx = 0;
  uint64_t phase = 0;
  bool fenced = false;
  int owner = 0;
  Clock from_peers;          // when threads of other CTAs last arrived
  Clock arrived, completed;  // of the arrivals so far; of those up to the last completed phase
  Waiters waiters;
};
struct Acc {  // accumulator registers of one thread while wgmma owns them
  float* d;
  int n;
  std::vector<float> v;
  uint64_t last_op;
};
struct Op {  // one wgmma of a warpgroup
  Type type;
  int n, scale_d, ta, tb;
  bool rs;
  uint64_t da, db;
  int issued = 0;
  Acc* acc[128];
  const uint32_t* a[128];
  uint32_t a_copy[128][4];
  uint32_t range[2][2];  // [A, B] shared addresses read
};
struct WarpGroup {
  std::deque<Op> ops;                      // not yet retired
  uint64_t base = 0;                       // index of ops.front()
  uint64_t done[4] = {}, retired[4] = {};  // per warp: executed; waited for
  Clock issued[4];                         // per warp
  int nreg = 0, nreg_calls = 0;
  Waiters waiters;
  Op& op(uint64_t i) { return ops[i - base]; }
};
struct Rendezvous {  // warp-wide collective for one lane mask
  uint64_t lane_gen[32] = {}, done = 0;
  uint32_t arrived = 0;
  uint64_t v[2][32];
  Clock clock[2];
  Waiters waiters;
};
struct Warp {
  std::map<uint32_t, Rendezvous> meetings;  // by lane mask
  int leader = 0;                           // elect_one's lane
  int priority = 0;
  bool stalled = false;
};
struct NamedBarrier {
  int need = 0, count = 0;
  uint64_t gen = 0;
  Clock clock[2];  // by generation
  Waiters waiters;
};
struct Store {
  bool done = false;
  uint32_t lo, hi;
  TensorMap map;
  Corner corner;
  bool add;
  Fiber* owner;
};
struct Copy {  // cp.async
  uint32_t dst, bytes, valid;
  const void* src;
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  Cta* cta = nullptr;
  int tid = 0;
  bool exited = false;
  std::string waiting;                          // for the deadlock report
  uint32_t unfenced_lo = ~0u, unfenced_hi = 0;  // its plain writes to shared memory since its last fence lie within
  Clock clock;
  // wgmma
  bool clock_news = true;  // it has accessed shared memory, or met others, since it last issued
  bool need_fence = true;
  uint64_t issued = 0;
  std::deque<uint64_t> groups;
  std::vector<std::unique_ptr<Acc>> accs;
  // cp.async since the last arrive
  std::vector<Copy> copies;
  // bulk stores
  std::vector<std::shared_ptr<Store>> stores;
  std::vector<size_t> store_groups;
  size_t stores_waited = 0;
  Waiters store_waiters;
  Warp& warp();
};
// What a byte of shared memory is to the checks, where it is not a thread's unfenced plain write (1 + thread).
enum Mark : uint16_t { kSettled = 0, kStoreReads = 0xFFFD, kCopyInFlight = 0xFFFE, kTmaInFlight = 0xFFFF };
struct Cta {
  Cluster* cluster;
  unsigned rank, slot;
  uint3 block;
  uint8_t *smem, *async_view;        // what plain accesses see; what TMA and wgmma see (equal after fence_proxy_async)
  uint16_t* mark;                    // a Mark or a writer, per byte
  uint32_t *last_write, *last_read;  // per byte, see races.cpp
  int live;
  bool global_allowed;  // false in a dependent launch until a thread of the CTA has called grid_dependency_wait
  std::map<uint32_t, Barrier> bars;
  NamedBarrier named[16];
  std::vector<WarpGroup> wgs;
  std::vector<Warp> warps;
};
inline Warp& Fiber::warp() { return cta->warps[tid / 32]; }
struct Cluster {
  unsigned first_slot;
  int live;  // threads
  NamedBarrier barrier;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Fiber>> fibers;
};
struct Event {  // something asynchronous that may happen now
  enum { Load, StoreRead, Wgmma, Copies } kind;
  Cta* cta = nullptr;
  TensorMap map = {};
  Corner corner = {};
  uint32_t row0 = 0, row1 = 0;
  uint32_t dst = 0, bar = 0;
  WarpGroup* wg = nullptr;
  int warp = 0;
  std::shared_ptr<Store> store = nullptr;
  std::vector<Copy> copies = {};
  Fiber* issuer = nullptr;
  Clock clock = {};  // of the issuer, then
};

struct Sim {
  Launch launch;
  const std::function<void()>* body;
  std::mt19937_64 rng;
  std::vector<std::unique_ptr<Cluster>> clusters;  // alive
  std::vector<unsigned> free_slots;                // of a cluster's first CTA
  std::vector<Fiber*> ready, held;                 // held: threads of warps that are stalled for now
  std::vector<Event> events;
  Fiber* cur = nullptr;
  void* main_sp = nullptr;
  bool global_open = true;
  int async_rate = 64, prio_rate = 0, yield_rate = 4, stall_rate = 4000;
  uint64_t switches = 0, plain_accesses = 0;
  std::string report;
  uint64_t rnd(uint64_t n) { return rng() % n; }
};
extern Sim* g;

// scheduler.cpp
void yield_now();
inline void maybe_yield() {
  if (g->rnd(g->yield_rate) == 0) yield_now();
}
void block_on(Waiters& w, std::string why);
void wake(Waiters& w);
[[noreturn]] void stop();  // the launch ends here, with g->report

// report.cpp
std::string str(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(uint32_t address);
std::string deadlock_report();
void forget_events();
// Remembers what happened, for the report of a failure; `what` is a literal, `address` of shared memory, or 0.
void note(const Cta* c, int thread, const char* what, uint32_t address = 0, int64_t value = -1);
inline void note(const char* what, uint32_t address = 0, int64_t value = -1) {
  note(g->cur->cta, g->cur->tid, what, address, value);
}

// memory.cpp
std::string describe_address(const void* p);
std::string overrun();        // "" or which buffer's surroundings a launch has written
void open_global(bool open);  // otherwise every access faults

// shared_memory.cpp
void place(Cta* c);  // its memory, filled with NaN
void check_slack(Cta* c);
uint32_t swizzled(uint32_t a, uint32_t span);
void check_smem(uint32_t lo, uint32_t hi, const char* what);
void set_mark(Cta* c, uint32_t lo, uint32_t hi, uint16_t mark);
// Fails where an asynchronous unit would not see, or would disturb, what somebody else is doing there.
void check_settled(Cta* c, uint32_t lo, uint32_t hi, const char* what, bool write);
void check_wgmma_reads(Cta* c, uint32_t lo, uint32_t hi, const char* what);
void plain_access(Fiber* f, uint32_t lo, uint32_t hi, const char* what, bool write);
void mark_written(Fiber* f, uint32_t lo, uint32_t hi);
inline bool overlap(uint32_t lo, uint32_t hi, uint32_t lo2, uint32_t hi2) { return lo < hi2 && lo2 < hi; }

// races.cpp
void join(Clock& into, const Clock& from);
void start_clock(Fiber* f);
void release(Fiber* f, Clock& to);  // what f did so far happens before whoever acquires `to`
void acquire(Fiber* f, const Clock& from);
void remember(Fiber* f, Clock& moments);  // f's own, now
// Fails unless every arrival from a peer happened before the CTA ends: else one might come after.
void order_exit(Cta* c);
// Fails unless the earlier accesses to [lo, hi) happened before this one by f. A trace is left by what later accesses
// can race with; not by a copy, whose end its barrier tells.
void order_access(Fiber* f, Cta* c, uint32_t lo, uint32_t hi, const char* what, bool write, bool leaves_trace = true);

// transfers.cpp, wgmma.cpp
void run_load(Event& e);
void run_store(Event& e);
void run_copies(Event& e);
void run_wgmma(Event& e);

}  // namespace model
