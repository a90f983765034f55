// From warpgroups' sums to `out`: transposed through shared memory, summed over a cluster's ranks
// and the warpgroups that split K, in their order, scaled (one scale per row), biased, rounded.
#pragma once
#include "batch_schedule.cuh"
#include "hopper.cuh"
#include "store_rows.cuh"

namespace flute {

// Sums of a unit -> out. A group is the warpgroups that have parts of it.
template <class D>
struct Epilogue {
  static constexpr int kAcc = D::kTokens / 2, kOwn = -1;  // not through the cluster
  const BatchParams& p;
  u32 partials, ready, read, rank;  // of the group
  int warpgroup, lane, thread;      // thread of the group
  u32 parity = 0;

  FLUTE_DEVICE void sync() const {
    ptx::named_barrier(1 + (D::kSplitK ? D::kWarpgroups : warpgroup), D::kGroupThreads);
  }

  // At every rank's barrier, after `sync`.
  FLUTE_DEVICE void arrive(u32 barrier) const {
#pragma unroll
    for (int r = 0; r < D::kCluster; r++)
      if (D::kEachArrives || thread == r) ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, r));
  }

  FLUTE_DEVICE void run(const float (&acc)[kAcc], int block, int token_tile) {
    const int g = lane >> 2, q = lane & 3, row = thread % 128 / 32 * 16 + g;
    const u32 own = partials + (D::kSplitK ? warpgroup * D::kPartialBytes : 0);
    const int begin = first_token<D>(p, token_tile);
#pragma unroll
    for (int slab = 0; slab < D::kTokens / D::kSlab; slab++) {
      if (begin + slab * D::kSlab >= p.shape_m) break;
      if constexpr (D::kCluster > 1)  // the other ranks have read the last slab
        ptx::mbarrier_wait_cluster(read, parity ^ 1);
#pragma unroll
      for (int j = 0; j < D::kSlab / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          ptx::st_shared_f32(
              own + ((j * 8 + q * 2 + (i & 1)) * D::kPartialStride + row + (i >> 1) * 8) * 4,
              acc[(slab * D::kSlab / 8 + j) * 4 + i]);
      sync();
      if constexpr (D::kCluster > 1 && D::kShares > 1) {  // distributed shared memory is slow
        add_shares();
        sync();
      }
      if constexpr (D::kCluster > 1) {
        arrive(ready);
        ptx::mbarrier_wait_cluster(ready, parity);
      }
      const int first = D::kCluster > 1 ? thread * D::kCluster + static_cast<int>(rank) : thread;
#pragma unroll 1
      for (int i = first; i < D::kSlab * 8; i += D::kGroupThreads * D::kCluster)
        store(i, block, begin + slab * D::kSlab + i / 8);
      sync();
      if constexpr (D::kCluster > 1) {
        arrive(read);
        parity ^= 1;
      }
    }
  }

  // The parts of all warpgroups into the first one's place.
  FLUTE_DEVICE void add_shares() const {
    for (int i = thread; i < D::kSlab * 16; i += D::kGroupThreads) {
      const u32 at = partials + (i / 16 * D::kPartialStride + i % 16 * 4) * 4;
      float sum[4];
      load(sum, at, kOwn);
#pragma unroll
      for (int share = 1; share < D::kShares; share++)
        add(sum, at + share * D::kPartialBytes, kOwn);
      ptx::st_shared_v4(at, __float_as_uint(sum[0]), __float_as_uint(sum[1]),
                        __float_as_uint(sum[2]), __float_as_uint(sum[3]));
    }
  }

  // 4 rows of one token, of a rank.
  static FLUTE_DEVICE void load(float (&v)[4], u32 at, int from) {
    if (D::kCluster > 1 && from >= 0) {
      ptx::ld_cluster_v4_f32(v, ptx::mapa(at, from));
    } else {
      u32 bits[4];
      ptx::ld_shared_v4(bits, at);
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = __uint_as_float(bits[j]);
    }
  }
  static FLUTE_DEVICE void add(float (&sum)[4], u32 at, int from) {
    float v[4];
    load(v, at, from);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += v[j];
  }

  // 8 rows of one token.
  FLUTE_DEVICE void store(int i, int block, int token) const {
    if (token >= p.shape_m) return;
    const int n = block * 64 + i % 8 * 8;
    if (n >= p.shape_n) return;
    const u32 at = partials + (i / 8 * D::kPartialStride + i % 8 * 8) * 4;
    float v[8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum[4];
      if constexpr (D::kCluster > 1) {
        load(sum, at + h * 16, 0);
#pragma unroll 1  // the sums of later slabs still need their registers
        for (int r = 1; r < D::kCluster; r++) add(sum, at + h * 16, r);
      } else {
        load(sum, at + h * 16, kOwn);
#pragma unroll
        for (int share = 1; share < D::kShares; share++)
          add(sum, at + h * 16 + share * D::kPartialBytes, kOwn);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) v[h * 4 + j] = sum[j];
    }
    store_rows<D>(p, v, n, token);
  }
};

}  // namespace flute
