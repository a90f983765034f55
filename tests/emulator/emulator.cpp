// Runs a kernel on the host, a block at a time: each thread is a fiber, instructions of a warp wait
// for its lanes. kernel.h is generated: it includes the kernel, defines Config, and says which
// kernel (EMULATED_KERNEL) takes which structure (EMULATED_PARAMS).
//
// Asynchronous copies land as late as they may (when waited for) or, with `early`, at once: a read
// before its wait, or a stage filled while in use, gives wrong sums in one of the two.
//
// Counts the wavefronts of shared memory that a warp's reads take, and those without conflicts.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "kernel.h"

thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace flute {
alignas(1024) u8 smem_base[256 << 10];
}

namespace {

using flute::u32;
using flute::u8;
constexpr int kStackBytes = 128 << 10;

struct Copy {
  u32 to;
  u8 bytes[16];
};

struct Access {
  u32 address, num_bytes;
  int kind;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;  // once started. Why: swapcontext asks the system twice, _longjmp never
  std::unique_ptr<u8[]> stack{new u8[kStackBytes]};
  std::deque<std::vector<Copy>> groups;  // copies in flight, the last group not committed
  std::vector<Access> accesses;
  bool started = false, done = false;
};

struct Meeting {
  int arrived = 0, turn = 0;
};

struct WarpOperands {
  u32 a[32][4], b[32][2], v[32];
  float c[32][4], d[32][4];
};

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
std::vector<WarpOperands> operands;
Meeting block;
jmp_buf scheduler;
int running, alive;
bool copies_are_early;
u32 limit;
long long wavefronts[3], ideal[3];
void (*entry)();

void yield() {
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Wait for `count` threads; the last does `work`.
template <class Work>
void meet(Meeting& meeting, int count, Work work) {
  if (++meeting.arrived == count) {
    work();
    meeting.arrived = 0;
    meeting.turn++;
    return;
  }
  for (const int turn = meeting.turn; turn == meeting.turn;) yield();
}

int lane() { return running % 32; }
WarpOperands& own() { return operands[running / 32]; }

void start() {
  entry();
  fibers[running].done = true;
  alive--;
  yield();
}

[[noreturn]] void fail(const char* what, u32 address) {
  std::fprintf(stderr, "thread %d: %s at %u\n", running, what, address);
  std::abort();
}

// Wavefronts of a warp's access: a bank gives one word of 4 bytes each; 8-byte reads go by half
// warps, 16-byte reads by quarters.
int count_wavefronts(const std::vector<Access>& lanes) {
  int count = 0;
  const int per = 32 / std::max(1, static_cast<int>(lanes[0].num_bytes) / 4);
  for (int first = 0; first < 32; first += per) {
    std::vector<u32> words[32];
    size_t most = 1;
    for (int i = first; i < first + per; i++)
      for (u32 at = lanes[i].address; at < lanes[i].address + lanes[i].num_bytes; at += 4) {
        auto& bank = words[at / 4 % 32];
        if (std::find(bank.begin(), bank.end(), at / 4) == bank.end()) bank.push_back(at / 4);
        most = std::max(most, bank.size());
      }
    count += static_cast<int>(most);
  }
  return count;
}

void count_conflicts() {
  for (size_t w = 0; w < fibers.size() / 32; w++) {
    size_t same = fibers[w * 32].accesses.size();
    for (int i = 1; i < 32; i++)
      if (fibers[w * 32 + i].accesses.size() != same) same = 0;  // lanes went different ways
    for (size_t at = 0; at < same; at++) {
      std::vector<Access> lanes;
      for (int i = 0; i < 32; i++) lanes.push_back(fibers[w * 32 + i].accesses[at]);
      wavefronts[lanes[0].kind] += count_wavefronts(lanes);
      ideal[lanes[0].kind] += std::max(1u, lanes[0].num_bytes / 4);
    }
  }
}

}  // namespace

void __syncthreads() {
  meet(block, static_cast<int>(fibers.size()), [] {});
}
void __syncwarp() {
  meet(warps[running / 32], 32, [] {});
}
unsigned __shfl_sync(unsigned, unsigned value, int from) {
  WarpOperands& warp = own();
  warp.v[lane()] = value;
  __syncwarp();
  const unsigned found = warp.v[from];
  __syncwarp();
  return found;
}

float __shfl_sync(unsigned mask, float value, int from) {
  return __uint_as_float(__shfl_sync(mask, __float_as_uint(value), from));
}
float __shfl_xor_sync(unsigned mask, float value, int other) {
  return __shfl_sync(mask, value, lane() ^ other);
}
unsigned __ballot_sync(unsigned, bool vote) {
  WarpOperands& warp = own();
  warp.v[lane()] = vote;
  __syncwarp();
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= warp.v[i] << i;
  __syncwarp();
  return votes;
}

namespace flute {
namespace ptx {

u8* shared_memory(u32 address, u32 num_bytes, int kind) {
  if (address % num_bytes) fail("misaligned access", address);
  if (address + num_bytes > limit) fail("access outside shared memory", address);
  fibers[running].accesses.push_back({address, num_bytes, kind});
  return smem_base + address;
}

void ldmatrix_x4(u32 (&v)[4], u32 address) {
  shared_memory(address, 16, kMatrix);
  WarpOperands& warp = own();
  warp.v[lane()] = address;
  __syncwarp();
  for (int i = 0; i < 4; i++)
    std::memcpy(&v[i], smem_base + warp.v[i * 8 + lane() / 4] + lane() % 4 * 4, 4);
  __syncwarp();
}

void cp_async_16(u32 address, const void* pointer, u32 num_bytes) {
  if (address % 16 || reinterpret_cast<uintptr_t>(pointer) % 16) fail("misaligned copy", address);
  if (address + 16 > limit) fail("copy outside shared memory", address);
  Copy copy{address, {}};
  std::memcpy(copy.bytes, pointer, num_bytes);
  if (copies_are_early) {
    std::memcpy(smem_base + address, copy.bytes, 16);
    return;
  }
  auto& groups = fibers[running].groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

void cp_async_commit() {
  auto& groups = fibers[running].groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int newest) {
  auto& groups = fibers[running].groups;
  for (; static_cast<int>(groups.size()) > newest + 1; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(smem_base + copy.to, copy.bytes, 16);
}

void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
         float (*to_float)(u16)) {
  WarpOperands& warp = own();
  const int i = lane();
  std::copy(a, a + 4, warp.a[i]);
  std::copy(c, c + 4, warp.c[i]);
  warp.b[i][0] = b0, warp.b[i][1] = b1;
  meet(warps[running / 32], 32, [&] {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 2; e++) {
        const int g = l / 4, k = l % 4 * 2 + e;
        for (int r = 0; r < 4; r++)
          left[g + r % 2 * 8][k + r / 2 * 8] = to_float(static_cast<u16>(warp.a[l][r] >> 16 * e));
        for (int r = 0; r < 2; r++)
          right[k + r * 8][g] = to_float(static_cast<u16>(warp.b[l][r] >> 16 * e));
      }
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) {
        const int row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
        double sum = warp.c[l][r];
        for (int k = 0; k < 16; k++) sum += static_cast<double>(left[row][k]) * right[k][column];
        warp.d[l][r] = static_cast<float>(sum);
      }
  });
  std::copy(warp.d[i], warp.d[i] + 4, d);
  __syncwarp();
}

}  // namespace ptx
}  // namespace flute

namespace {
EMULATED_PARAMS params;
void call() { EMULATED_KERNEL(params); }
}  // namespace

// Run a grid; returns wavefronts of reads, writes and ldmatrix, then those without conflicts.
extern "C" void run_grid(const void* parameters, int size, int grid_x, int grid_y, int num_threads,
                         int smem_bytes, int early, long long (*counts)[6]) {
  if (size != static_cast<int>(sizeof params)) fail("structure of another size", size);
  std::memcpy(&params, parameters, sizeof params);
  entry = call, copies_are_early = early, limit = static_cast<u32>(smem_bytes);
  std::fill(wavefronts, wavefronts + 3, 0), std::fill(ideal, ideal + 3, 0);
  blockDim = {static_cast<unsigned>(num_threads), 1, 1};
  gridDim = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1};
  fibers.resize(num_threads), operands.resize(num_threads / 32);
  for (int y = 0; y < grid_y; y++)
    for (int x = 0; x < grid_x; x++) {
      blockIdx = {static_cast<unsigned>(x), static_cast<unsigned>(y), 0};
      std::memset(flute::smem_base, 0xFF, sizeof flute::smem_base);  // NaN
      warps.assign(num_threads / 32, {}), block = {}, alive = num_threads;
      for (Fiber& fiber : fibers) {
        fiber.started = fiber.done = false, fiber.groups.clear(), fiber.accesses.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
      }
      while (alive > 0)
        for (running = 0; running < num_threads; running++)
          if (!fibers[running].done) {
            threadIdx = {static_cast<unsigned>(running), 0, 0};
            resume(fibers[running]);
          }
      if (x == 0 && y == 0) count_conflicts();
    }
  std::copy(wavefronts, wavefronts + 3, *counts), std::copy(ideal, ideal + 3, *counts + 3);
}
