// From the warps' sums to `out`: transposed through shared memory, summed over the warps of K; then
// either scaled (one scale per row), biased and rounded, or kept for the second launch, which sums
// the parts of a unit in the order of K.
#pragma once
#include "mma_schedule.cuh"
#include "store_rows.cuh"

namespace flute {

// The sums of a unit, all of K or (`slot` >= 0) a part: 8 tokens at a time.
template <class D>
FLUTE_DEVICE void store_unit(const MmaParams& p, const float (&acc)[D::kTiles][D::kColumns][4],
                             const MmaUnit& unit, int slot, u32 partials, int warp, int lane) {
  const int g = lane >> 2, q = lane & 3;
  const u32 own = partials + warp / D::kWarpsN * D::kPartialBytes;
#pragma unroll 1
  for (int c = 0; c < D::kColumns; c++) {
    const int token = unit.token_tile * D::kTokens + c * 8;
    if (token >= p.shape_m) break;
    __syncthreads();  // the last 8 tokens' sums have been read
    // Why not unrolled as a whole: what follows would be compiled for each column, for seconds.
#pragma unroll
    for (int column = 0; column < D::kColumns; column++) {
      if (column != c) continue;  // sums are in registers, which have no index
#pragma unroll
      for (int r = 0; r < D::kTiles; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = (warp % D::kWarpsN * D::kTiles + r) * 16 + g + (i >> 1) * 8;
          ptx::st_shared_f32(own + ((q * 2 + (i & 1)) * D::kPartialStride + row) * 4,
                             acc[r][column][i]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < D::kRows; i += D::kThreads) {  // 8 tokens of kRows / 8
      const int m = i / (D::kRows / 8), row = i % (D::kRows / 8) * 8, n = unit.tile * 16 + row;
      if (token + m >= p.shape_m || n >= unit.tile_end * 16 || n >= p.shape_n) continue;
      const u32 at = partials + (m * D::kPartialStride + row) * 4;
      float v[8] = {};
#pragma unroll
      for (int w = 0; w < D::kWarpsK; w++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          u32 bits[4];
          ptx::ld_shared_v4(bits, at + w * D::kPartialBytes + h * 16);
#pragma unroll
          for (int j = 0; j < 4; j++) v[h * 4 + j] += __uint_as_float(bits[j]);
        }
      if (slot < 0) {
        store_rows<D>(p, v, n, token + m);
      } else {
        float* to =
            p.workspace + (static_cast<long long>(slot) * D::kTokens + c * 8 + m) * D::kRows + row;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 bits[4] = {__float_as_uint(v[h * 4]), __float_as_uint(v[h * 4 + 1]),
                               __float_as_uint(v[h * 4 + 2]), __float_as_uint(v[h * 4 + 3])};
          ptx::st_global_v4(to + h * 4, bits);
        }
      }
    }
  }
}

// The second launch. Blocks (i, ..): the unit that the border between pieces i and i + 1 parts, if
// it is the first border in that unit. An item is 8 rows of one token. Why several at once: this is
// the kernel that multiplies, so few warps fit a multiprocessor, and each must have much in flight.
template <class D>
FLUTE_DEVICE void sum_parts(const MmaParams& p) {
  constexpr int kUnitItems = D::kTokens * D::kRows / 8;
  constexpr int kRounds = (kUnitItems + D::kThreads - 1) / D::kThreads;
  constexpr int kItems = kRounds < 4 ? kRounds : 4;
  const MmaPieces<D> pieces(p);
  const int border = pieces.begin(blockIdx.x + 1), index = border / pieces.steps,
            begin = index * pieces.steps, end = begin + pieces.steps;
  if (border == begin || pieces.begin(blockIdx.x) > begin) return;
  const MmaUnit unit = unit_at<D>(p, index);
  const int thread = threadIdx.x;
#pragma unroll 1
  for (int first = blockIdx.y * kItems * D::kThreads; first < kUnitItems;
       first += gridDim.y * kItems * D::kThreads) {
    int items[kItems];  // -1: past M or N, where no piece has stored anything
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int item = first + i * D::kThreads + thread;
      const int token = unit.token_tile * D::kTokens + item / (D::kRows / 8),
                n = unit.tile * 16 + item % (D::kRows / 8) * 8;
      const bool stored =
          item < kUnitItems && token < p.shape_m && n < unit.tile_end * 16 && n < p.shape_n;
      items[i] = stored ? item : -1;
    }
    float v[kItems][8] = {};
#pragma unroll 1
    for (int piece = blockIdx.x; piece < p.num_pieces && pieces.begin(piece) < end; piece++) {
      const float* from =
          p.workspace + static_cast<long long>(pieces.slot(piece, index)) * kUnitItems * 8;
      u32 bits[kItems][2][4];
#pragma unroll
      for (int i = 0; i < kItems; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          ptx::ld_global_v4(bits[i][h], from + max(items[i], 0) * 8 + h * 4);
#pragma unroll
      for (int i = 0; i < kItems; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] += __uint_as_float(bits[i][j / 4][j % 4]);
    }
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      if (items[i] >= 0)
        store_rows<D>(p, v[i], unit.tile * 16 + items[i] % (D::kRows / 8) * 8,
                      unit.token_tile * D::kTokens + items[i] / (D::kRows / 8));
    }
  }
}

}  // namespace flute
