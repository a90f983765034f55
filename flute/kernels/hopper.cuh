// PTX of sm_90a: warpgroup matrix multiply, tensor-map copies, barriers across a cluster. One
// wrapper per instruction, like ptx.cuh.
#pragma once
#include "ptx.cuh"

namespace flute {
namespace ptx {

// ---- wgmma: D (64 x N, registers) += A (64 x 16, registers) * B (16 x N, shared memory). The
// instruction itself is generated, for the one N in use (flute/batch.py).

// wgmma.fence: registers written so far are visible to the wgmma that follow.
FLUTE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: the wgmma since the last commit form a group.
FLUTE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: at most the newest `N` groups are still running.
template <int N>
FLUTE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Matrix descriptor of B: rows of 64 values of 16 bits (128 bytes, 128-byte swizzle), 8 rows 1024
// bytes apart. Its low half: a multiple of 1024 as address; + 2 per step of 16 k.
FLUTE_DEVICE u32 wgmma_descriptor_low(u32 address) { return (address & 0x3FFFF) >> 4 | 1u << 16; }
FLUTE_DEVICE u64 wgmma_descriptor(u32 low) { return low | (64ull | 1ull << 30) << 32; }

// setmaxnreg (sm_90a): registers per thread from here on; the whole warpgroup calls.
template <int COUNT>
FLUTE_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
FLUTE_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- copies by tensor map

// prefetch.tensormap (sm_90).
FLUTE_DEVICE void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.2d global -> shared (sm_90): the box at column `c0`, row `c1` of the map;
// zeros outside the matrix.
FLUTE_DEVICE void cp_async_bulk_tensor(u32 address, const void* map, int c0, int c1, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(address),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

// ---- barriers

// mbarrier.arrive (sm_80).
FLUTE_DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.try_wait.parity (sm_90) that lets the hardware suspend the thread for long: for waits
// that are not urgent.
FLUTE_DEVICE void mbarrier_wait_long(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2, %3;\n\tselp.u32 "
        "%0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity), "r"(1000000)
        : "memory");
  } while (!done);
}

// mbarrier.arrive at an address of the cluster (sm_90), releasing this thread's writes to it.
FLUTE_DEVICE void mbarrier_arrive_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

// mbarrier.try_wait.parity with acquire at cluster scope (sm_90).
FLUTE_DEVICE void mbarrier_wait_cluster(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], "
        "%2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// bar.sync of `num_threads` threads on barrier `id` of the block.
FLUTE_DEVICE void named_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// bar.arrive: counted as `named_barrier` counts, without waiting.
FLUTE_DEVICE void named_barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ld.shared::cluster.v4.f32 (sm_90), ordered.
FLUTE_DEVICE void ld_cluster_v4_f32(float (&v)[4], u32 address) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}

}  // namespace ptx
}  // namespace flute
