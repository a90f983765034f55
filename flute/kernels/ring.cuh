// One consumer warp's ring of weight slots in shared memory. Owns the copies and their
// synchronisation; knows sizes, not what the bytes mean.
//
//   slot = [ weights: PANEL chunks of one tile | scales: their groups, 16 rows each ]
//   stage   0        1        2        3
//         [ in use ][ full   ][ flying ][ flying ]  refilled as soon as its words are in registers
//
// Each warp fills its own ring, so that no block-wide barrier stands in the main loop. A fill must
// not start before the reads of the slot's last contents have returned: its argument `zero` depends
// on them (decode.cuh).
// Why no producer warp: tried, with block-wide stages and full/empty mbarriers. 57344 x 8192, 4
// bits, M = 1: 77 us against 72 with 8 consumer warps; 4096 x 4096: 4.5 against 3.85. The ninth
// warp lowers the register cap from 128 to 96 at two blocks per SM, and the copies' issue was not
// the bottleneck (H200, CUDA 13.0, 2026-11-22).
#pragma once
#include "ptx.cuh"

namespace flute {

// Hopper: lane 0 asks the copy engine for a slot, an mbarrier per stage tells when it landed.
template <int NUM_STAGES, int WEIGHT_BYTES, int SCALE_BYTES>
struct BulkRing {
  static_assert(WEIGHT_BYTES % 16 == 0 && SCALE_BYTES % 16 == 0,
                "bulk copies move multiples of 16 bytes");
  static constexpr int kSlotBytes = WEIGHT_BYTES + SCALE_BYTES;
  static constexpr int kNumBarriers = NUM_STAGES;  // per warp

  u32 slots, barriers;
  u32 stage = 0, parity = 0;

  FLUTE_DEVICE BulkRing(u32 smem_slots, u32 smem_barriers)
      : slots(smem_slots), barriers(smem_barriers) {}

  // Lane 0 of the owning warp, before the first fill.
  FLUTE_DEVICE void init() const {
#pragma unroll
    for (int i = 0; i < NUM_STAGES; i++) ptx::mbarrier_init(barriers + i * 8, 1);
  }

  // The whole warp calls; `at` is the stage to fill.
  FLUTE_DEVICE void fill(u32 at, const u8* weights, const u8* scales, bool wanted, int lane,
                         u32 zero) {
    if (wanted && ptx::elect_one()) {
      const u32 slot = slots + at * kSlotBytes, barrier = barriers + at * 8;
      ptx::mbarrier_arrive_expect_tx(barrier, kSlotBytes + zero);  // copies are issued after it
      ptx::cp_async_bulk(slot, weights, WEIGHT_BYTES, barrier);
      if (SCALE_BYTES > 0) ptx::cp_async_bulk(slot + WEIGHT_BYTES, scales, SCALE_BYTES, barrier);
    }
  }

  FLUTE_DEVICE u32 wait() {
    ptx::mbarrier_wait(barriers + stage * 8, parity);
    return slots + stage * kSlotBytes;
  }
  FLUTE_DEVICE void advance() {
    if (++stage == NUM_STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// sm_80 and later: the warp's lanes copy a slot 16 bytes each; one cp.async group per slot, empty
// at the end.
template <int NUM_STAGES, int WEIGHT_BYTES, int SCALE_BYTES>
struct AsyncRing {
  static_assert(WEIGHT_BYTES % 16 == 0 && SCALE_BYTES % 16 == 0,
                "cp.async moves 16 bytes per lane");
  static constexpr int kSlotBytes = WEIGHT_BYTES + SCALE_BYTES;
  static constexpr int kNumBarriers = 0;

  u32 slots;
  u32 stage = 0;

  FLUTE_DEVICE AsyncRing(u32 smem_slots, u32) : slots(smem_slots) {}
  FLUTE_DEVICE void init() const {}

  // Every call makes one group, wanted or not, so that `wait` can count groups.
  FLUTE_DEVICE void fill(u32 at, const u8* weights, const u8* scales, bool wanted, int lane,
                         u32 zero) {
    if (wanted) {
      const u32 to = slots + at * kSlotBytes + lane * 16 + zero;
#pragma unroll
      for (int i = 0; i < WEIGHT_BYTES; i += 512)
        if (i + lane * 16 < WEIGHT_BYTES) ptx::cp_async_16(to + i, weights + i + lane * 16, 16);
#pragma unroll
      for (int i = 0; i < SCALE_BYTES; i += 512)
        if (i + lane * 16 < SCALE_BYTES)
          ptx::cp_async_16(to + WEIGHT_BYTES + i, scales + i + lane * 16, 16);
    }
    ptx::cp_async_commit();
  }

  FLUTE_DEVICE u32 wait() {
    ptx::cp_async_wait<NUM_STAGES - 1>();
    __syncwarp();
    return slots + stage * kSlotBytes;
  }
  FLUTE_DEVICE void advance() {
    if (++stage == NUM_STAGES) stage = 0;
  }
};

}  // namespace flute
