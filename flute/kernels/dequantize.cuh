// Dequantise kernel: kernel order -> dense rows, for the products too large for decode.cuh.
//
//   weight[n, k] = round(float(round(table[codes[n, k]])) * scales[n, k / GROUP])
//
// packed and scales in kernel order (flute/kernel_order.py); weight (rows of this launch, K)
// row-major in the activations' dtype, bit for bit that of flute/reference.py.
//
// Work. Block (tile, part): a tile of 16 rows; warp w of the grid's part takes chunks (16 rows x 64
// k) w, w + 8 * parts, ... A lane looks up the 32 codes of its fragments (lookup.cuh), the warp
// transposes them through shared memory and writes rows of 128 bytes:
//
//   words -> codes -> table * scale -> stage (16 rows x 144 bytes) -> 16 bytes a lane
//
// Shared memory: 8 warps * 16 * 144 bytes of stages + 16 * 16 * 4 bytes of tables. Minimum: sm_80.
// Bound by its writes, 2 bytes per weight.
#pragma once
#include "element.cuh"
#include "lookup.cuh"

namespace flute {

constexpr int kDequantizeWarps = 8;

// Passed by value; flute/launchers.py packs the same fields in the same order.
struct DequantizeParams {
  const void* packed;  // (tiles, num_chunks, chunk bytes)
  const void* scales;  // as in DecodeParams
  const void* table;   // (num_ranges or N, 2**NUM_BITS) fp32
  void* out;           // (rows of the launch, K): row 0 is row 16 * first_tile of the weight
  int shape_n, shape_k;
  int num_chunks;
  int first_tile;
  int num_ranges;    // tables in use, at most 8: tiles [range_end[i-1], range_end[i]) use table i
  int range_end[8];  // in tiles; from the last table on, all of them
};

// Code `e` of pair `i` = half * 2 + h of step `st`, from a lane's words of a chunk.
template <int NUM_BITS>
FLUTE_DEVICE int code_of(const u32 (&w)[Lookup<NUM_BITS>::kWords], int st, int i, int e) {
  if constexpr (NUM_BITS == 4) {
    return w[st] >> (8 * i + 4 * e) & 15;
  } else if constexpr (NUM_BITS == 2) {
    return w[st / 2] >> (16 * (st % 2)) >> (4 * ((i >> 1) * 2 + e) + 2 * (i & 1)) & 3;
  } else {
    return Lookup<3>::step_word(w, st) >> (8 * Lookup<3>::byte_of(i) + 4 * e) & 7;
  }
}

template <class Config>
__global__ void __launch_bounds__(kDequantizeWarps * 32)
    dequantize(const __grid_constant__ DequantizeParams p) {
  using Act = Element<Config::dtype>;
  using Scale = Element<Config::scale_dtype>;
  using Table = Lookup<Config::num_bits>;
  constexpr int kBits = Config::num_bits, kGroup = Config::group_size, kEntries = 1 << kBits;
  constexpr int kStride = 144;  // bytes between staged rows: 128 + 16 against bank conflicts
  static_assert(kGroup == 0 || kGroup % 32 == 0,
                "a group is a multiple of 32 k, or 0: the whole row");
  __shared__ __align__(16) u8 stages[kDequantizeWarps][16 * kStride];
  __shared__ float entries[16 * kEntries];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
  const int tile = p.first_tile + blockIdx.x;
  const float* tables = static_cast<const float*>(p.table);
  int range = 0;
  if constexpr (!Config::row_tables) {
#pragma unroll
    for (int i = 0; i < 7; i++) range += i + 1 < p.num_ranges && tile >= p.range_end[i];
  }
  for (int i = threadIdx.x; i < (Config::row_tables ? 16 : 1) * kEntries; i += blockDim.x) {
    const int row = Config::row_tables ? min(tile * 16 + i / kEntries, p.shape_n - 1) : range;
    const float entry = ptx::ld_global_nc_f32(tables + row * kEntries + i % kEntries);
    entries[i] = Act::to_float(Act::from_float(entry));
  }
  __syncthreads();

  const u32 stage = ptx::smem_address(stages[warp]);
  const int num_groups = kGroup == 0 ? 0 : p.num_chunks * 64 / (kGroup ? kGroup : 1);
  for (int chunk = blockIdx.y * kDequantizeWarps + warp; chunk < p.num_chunks;
       chunk += gridDim.y * kDequantizeWarps) {
    u32 w[Table::kWords];
    const u32* words =
        static_cast<const u32*>(p.packed) +
        (static_cast<long long>(tile) * p.num_chunks + chunk) * (Table::kChunkBytes / 4);
    if constexpr (kBits == 3) {
      w[0] = words[lane * 2], w[1] = words[lane * 2 + 1], w[2] = words[64 + lane];
    } else {
#pragma unroll
      for (int i = 0; i < Table::kWords; i++) w[i] = words[lane * Table::kWords + i];
    }
#pragma unroll 1  // unrolled, NVRTC 13.5 spills 4 bytes at 4 bits with a table per row (sm_90a)
    for (int h = 0; h < 2; h++) {
      const float* entry = entries + (Config::row_tables ? (h * 8 + g) * kEntries : 0);
      float scale = 0.f;
#pragma unroll
      for (int st = 0; st < 4; st++) {
        if (kGroup == 0 && st == 0) scale = Scale::load_global(p.scales, tile * 16 + h * 8 + g);
        if (kGroup > 0 && st % 2 == 0) {  // 32 k, the shortest group
          const long long group = (chunk * 64 + st * 16) / (kGroup ? kGroup : 1);
          scale = Scale::load_global(p.scales, ((tile * 1ll * num_groups + group) * 8 + g) * 2 + h);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int i = half * 2 + h;
          const u32 lo = Act::from_float(entry[code_of<kBits>(w, st, i, 0)] * scale);
          const u32 hi = Act::from_float(entry[code_of<kBits>(w, st, i, 1)] * scale);
          ptx::st_shared_u32(stage + (h * 8 + g) * kStride + (st * 16 + half * 8 + q * 2) * 2,
                             lo | hi << 16);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i * 4 + lane / 8, k = chunk * 64 + lane % 8 * 8;
      if (tile * 16 + row < p.shape_n && k < p.shape_k) {  // K is a multiple of 32: whole granules
        u32 v[4];
        ptx::ld_shared_v4(v, stage + row * kStride + lane % 8 * 16);
        u16* out = static_cast<u16*>(p.out) +
                   static_cast<long long>(blockIdx.x * 16 + row) * p.shape_k + k;
        ptx::st_global_v4(out, v);
      }
    }
    __syncwarp();
  }
}

}  // namespace flute
