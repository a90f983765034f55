// Feedback kernel: rounds the columns of a block one after the other; what a column's rounding
// changes acts on the columns after it. The inner loop of gptq and of lnq's descent.
//
//   rank[n, i]    = number of bounds[n] below aims[n, i] / scale[n, i]; of zero where that is 0
//   change[n, i]  = base[n, i] - entries[n, rank[n, i]] * scale[n, i]
//   aims[n, k]   += change[n, i] * effect[i, k]                                 for all k > i
//
// all fp32; scale[n, i] = scales[n, (first + i) / length]. base is what the columns are now (descent
// through codes), or null: then it is the aim as it has become by then (error feedback).
//
// Rows don't meet, so a launch takes all of them. Work: a warp takes a row. Lane l holds columns l,
// l + 32, ... of the row in registers, and entry l and bound l of its table:
//
//   aim, scale --shfl--> every lane --bound < aim / scale--> ballot --popc--> rank --shfl--> entry
//                                                   aims of later columns <--fma-- change <--'
//
// The chain of a column is some 100 clocks, whatever the number of rows up to about 16 a
// multiprocessor; `effect` is outside of it, read by all warps alike, at most 64 KB: L1. Why not a
// step per column in torch: ten launches each, 0.05 ms.
//
// Shared memory: none. Minimum: sm_80. Same inputs, same bits: each sum has one order.
#pragma once
#include "ptx.cuh"

namespace flute {

constexpr int kFeedbackWarps = 4;  // rows of a block: few, so that 512 rows reach all of a GPU
constexpr int kFeedbackParts = 4;  // columns that a lane holds: blocks have up to 128
constexpr u32 kAllLanes = 0xFFFFFFFFu;

// Passed by value; flute/cuda_quantize.py packs the same fields in the same order.
struct FeedbackParams {
  const float* aims;     // (N, count), rows aim_stride apart
  const float* base;     // (N, count), rows base_stride apart, or null
  const float* scales;   // (N, groups), rows scale_stride apart
  const float* entries;  // (1 | N, num_entries), ascending
  const float* bounds;   // (1 | N, num_entries - 1), ascending
  const float* effect;   // (count, count), rows effect_stride apart
  void* ranks;           // (N, count) u8, rows rank_stride apart
  void* changes;         // (N, count) fp32
  int shape_n;
  int count;  // columns, 1 .. 128
  int aim_stride, base_stride, scale_stride, effect_stride, rank_stride;
  int first, length;  // the first column's place in its group; columns of a group
  int num_entries;    // 4, 8 or 16
  int row_tables;     // 1: entries and bounds of each row, 0: of all
};

__global__ void __launch_bounds__(kFeedbackWarps * 32)
    feedback(const __grid_constant__ FeedbackParams p) {
  static_assert(kFeedbackParts * 32 == 128, "flute/cuda_quantize.py makes blocks of 128 columns");
  const int lane = threadIdx.x % 32;
  const long long row = blockIdx.x * kFeedbackWarps + threadIdx.x / 32;
  if (row >= p.shape_n) return;

  float aim[kFeedbackParts], base[kFeedbackParts], scale[kFeedbackParts], change[kFeedbackParts];
  int rank[kFeedbackParts];
#pragma unroll
  for (int part = 0; part < kFeedbackParts; part++) {
    const int i = part * 32 + lane;
    const bool is_column = i < p.count;
    aim[part] = is_column ? p.aims[row * p.aim_stride + i] : 0.f;
    base[part] = is_column && p.base ? p.base[row * p.base_stride + i] : 0.f;
    scale[part] = is_column ? p.scales[row * p.scale_stride + (p.first + i) / p.length] : 0.f;
    change[part] = 0.f;
    rank[part] = 0;
  }
  const long long table = p.row_tables ? row : 0;
  const bool has_entry = lane < p.num_entries, has_bound = lane < p.num_entries - 1;
  const float entry = has_entry ? p.entries[table * p.num_entries + lane] : 0.f;
  const float bound = has_bound ? p.bounds[table * (p.num_entries - 1) + lane] : 0.f;

#pragma unroll
  for (int part = 0; part < kFeedbackParts; part++) {
    const int columns = min(32, p.count - part * 32);
    for (int l = 0; l < columns; l++) {
      const float v = __shfl_sync(kAllLanes, aim[part], l);
      const float s = __shfl_sync(kAllLanes, scale[part], l);
      const float old = p.base ? __shfl_sync(kAllLanes, base[part], l) : v;
      const float x = s == 0.f ? 0.f : v / s;
      const int found = __popc(__ballot_sync(kAllLanes, has_bound && bound < x));
      // NOTE: rounded before it is subtracted, so that the change is that of the weight as stored.
      const float value = __fmul_rn(__shfl_sync(kAllLanes, entry, found), s);
      const float c = old - value;
      if (lane == l) rank[part] = found, change[part] = c;
      const float* effect = p.effect + static_cast<long long>(part * 32 + l) * p.effect_stride;
#pragma unroll
      for (int q = part; q < kFeedbackParts; q++)  // columns before l are done: they may change
        if (q * 32 + lane < p.count) aim[q] += c * effect[q * 32 + lane];
    }
  }
#pragma unroll
  for (int part = 0; part < kFeedbackParts; part++) {
    const int i = part * 32 + lane;
    if (i >= p.count) continue;
    static_cast<u8*>(p.ranks)[row * p.rank_stride + i] = static_cast<u8>(rank[part]);
    static_cast<float*>(p.changes)[row * p.count + i] = change[part];
  }
}

}  // namespace flute
