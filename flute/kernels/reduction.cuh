// From the warps' accumulators to `out`: sums across warps, blocks and phases, then scale, bias,
// rounding.
#pragma once
#include "traits.cuh"

namespace flute {

// Sums over the warps of a block, then over the blocks of a cluster, in a fixed order.
//
// Two buffers of partial sums take turns, so that one barrier per turn is enough: who writes a
// buffer again has passed the barrier of the other, which its readers reach only after reading. A
// cluster adds two buffers of the blocks' sums. Why not mbarriers, which would let warps with no
// outputs to sum run on: tried, 4.24 against 3.85 us on 4096 x 4096 (M = 1, 4 bits, H200,
// CUDA 13.0, 2026-11-22), and compute-sanitizer cannot follow an arrival by one lane for its warp.
// Why two levels: all warps' values through distributed shared memory took 350 us where M = 16
// should take 80.
template <class D>
struct Reduction {
  static constexpr int kRows = D::kTiles * 16;
  u32 smem_partials, smem_sums, warp_bytes, rank;
  u32 turn = 0;
  int phase = 0;

  FLUTE_DEVICE Reduction(u32 smem_partials, u32 rank, int shape_m)
      : smem_partials(smem_partials),
        warp_bytes(min(shape_m, 8) * D::kPartialStride * 4),
        rank(rank) {
    smem_sums = smem_partials + 2 * D::kWarps * warp_bytes;
  }

  // Sum and store the tile block that starts at `tile`.
  FLUTE_DEVICE void run(const float (&acc)[D::kTiles][D::kColumns][4], int tile, int count,
                        const DecodeParams& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
#pragma unroll
    for (int c = 0; c < D::kColumns; c++) {
      const int num_tokens = min(p.shape_m - c * 8, 8);
      if (num_tokens <= 0) break;
      const u32 base = smem_partials + turn % 2 * (D::kWarps * warp_bytes);
#pragma unroll
      for (int t = 0; t < D::kTiles; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = q * 2 + (i & 1), row = t * 16 + g + (i >> 1) * 8;
          if (token < num_tokens)
            ptx::st_shared_f32(base + warp * warp_bytes + (token * D::kPartialStride + row) * 4,
                               acc[t][c][i]);
        }
      __syncthreads();
      const u32 sums = smem_sums + turn % 2 * warp_bytes;
      if constexpr (D::kCluster > 1) {
        for (int i = threadIdx.x; i < num_tokens * kRows; i += D::kThreads)
          ptx::st_shared_f32(sums + offset(i), sum_warps(base + offset(i)));
        ptx::cluster_sync();
      }
      // The first outputs fall to another warp each turn, so that with few tokens the work goes
      // round.
      const int first = (threadIdx.x + turn * kRows) % D::kThreads + rank * D::kThreads;
      for (int i = first; i < num_tokens * kRows; i += D::kThreads * D::kCluster)
        if (i % kRows < count * 16) {
          const float sum =
              D::kCluster > 1 ? sum_blocks(sums + offset(i)) : sum_warps(base + offset(i));
          store(sum, tile * 16 + i % kRows, c * 8 + i / kRows, p);
        }
      turn++;
    }
  }

  static FLUTE_DEVICE u32 offset(int i) { return (i / kRows * D::kPartialStride + i % kRows) * 4; }

  FLUTE_DEVICE float sum_warps(u32 at) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < D::kWarps; w++) sum += ptx::ld_shared_f32(at + w * warp_bytes);
    return sum;
  }

  static FLUTE_DEVICE float sum_blocks(u32 at) {
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < D::kCluster; r++) sum += ptx::ld_cluster_f32(ptx::mapa(at, r));
    return sum;
  }

  FLUTE_DEVICE void store(float sum, int n, int token, const DecodeParams& p) const {
    if (n >= p.shape_n) return;
    if constexpr (D::kPhased) {
      float* so_far = p.workspace + static_cast<long long>(token) * p.shape_n + n;
      if (phase > 0) sum += *so_far;
      if (phase + 1 < p.num_phases) {
        *so_far = sum;
        return;
      }
    }
    if (D::kGroup == 0) sum *= D::Scale::load_global(p.scales, n);
    if (p.bias != nullptr) sum += D::Act::load_global(p.bias, n);
    u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.shape_n + n;
    ptx::st_global_u16(out, D::Act::from_float(sum));
  }
};

}  // namespace flute
