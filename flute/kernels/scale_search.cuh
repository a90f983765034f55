// Scale search: the scale of least squared error of each group of weights, its sign included.
//
//   codes = nearest(w / s),   s' = <w, c> / <c, c>,   gain = <w, c>^2 / <c, c>,   c = table[codes]
//
// of the candidates s of a sign the one of largest gain, then s' of its codes, and so on; of all that
// was seen the s of largest gain. What flute/methods/mse.py does by sorting, here by trying: a warp
// has a group, and every lane compares its weights with all bounds, which are in registers.
//
//   group -> largest |w| -> for + and -: 12 candidates -> best -> refined twice -> scale
//
// Work: a warp takes one group; 28 trials of 2 * 2**NUM_BITS instructions a weight. Weights are read
// again for each trial: they are in the L1. Shared memory: none. Minimum: sm_80.
#pragma once
#include "ptx.cuh"

namespace flute {

constexpr int kSearchWarps = 8;  // two such blocks a multiprocessor leave 128 registers a thread: no spills
constexpr float kSmallestNormal = 1.17549435e-38f;

// Passed by value; flute/cuda_quantize.py packs the same fields in the same order.
struct ScaleSearchParams {
  const float* weight;      // (N, groups * length), rows weight_stride apart
  const float* entries;     // (1 | N, 2**NUM_BITS), ascending
  const float* bounds;      // (1 | N, 2**NUM_BITS - 1): midpoints
  const float* candidates;  // (1 | N, 2, num_candidates): for +table and -table, as shares of max|w|
  void* scales;             // (N, groups) fp32
  int shape_n, num_groups;
  int length;
  int weight_stride;
  int num_candidates;
  int refinements;  // after the candidates
  int row_tables;   // 1: a table of each row, 0: of all
};

FLUTE_DEVICE float sum_of_warp(float v) {  // the same in every lane, in one order
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
  return v;
}

template <class Config>
__global__ void __launch_bounds__(kSearchWarps * 32, 2)
    scale_search(const __grid_constant__ ScaleSearchParams p) {
  constexpr int kEntries = 1 << Config::num_bits;
  static_assert(Config::num_bits >= 2 && Config::num_bits <= 4, "codes have 2, 3 or 4 bits");
  const int lane = threadIdx.x % 32;
  const long long group = static_cast<long long>(blockIdx.x) * kSearchWarps + threadIdx.x / 32;
  const long long row = group / p.num_groups;
  if (row >= p.shape_n) return;
  const float* w = p.weight + row * p.weight_stride + group % p.num_groups * p.length;

  float largest = 0.f;
  for (int i = lane; i < p.length; i += 32) largest = fmaxf(largest, fabsf(w[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
  const float unit = largest > 0.f ? largest : 1.f;  // squares in units of it don't overflow

  const long long table = p.row_tables ? row : 0;
  const float* entries = p.entries + table * kEntries;
  const float* midpoints = p.bounds + table * (kEntries - 1);
  float best_gain = 0.f, best_scale = 0.f;
  for (int side = 0; side < 2; side++) {  // the table, and its negative, ascending again
    const float sign = side ? -1.f : 1.f;
    float entry[kEntries], midpoint[kEntries - 1];
#pragma unroll
    for (int j = 0; j < kEntries; j++) entry[j] = sign * entries[side ? kEntries - 1 - j : j];
#pragma unroll
    for (int j = 0; j < kEntries - 1; j++)
      midpoint[j] = sign * midpoints[side ? kEntries - 2 - j : j];
    const float* candidates = p.candidates + (table * 2 + side) * p.num_candidates;
    float refined = 0.f;
    for (int round = 0; round <= p.refinements; round++) {
      const int trials = round ? 1 : p.num_candidates;
      float gain = -2.f, scale = 0.f;  // of this round; below any gain
      for (int trial = 0; trial < trials; trial++) {
        const float s = round ? refined : candidates[trial];
        float bound[kEntries - 1];
#pragma unroll
        for (int j = 0; j < kEntries - 1; j++) bound[j] = s * midpoint[j];
        float dot = 0.f, norm = 0.f;
        for (int i = lane; i < p.length; i += 32) {
          const float x = w[i] / unit;
          float c = entry[0];
#pragma unroll
          for (int j = 0; j < kEntries - 1; j++) c = x > bound[j] ? entry[j + 1] : c;
          dot += x * c, norm += c * c;
        }
        dot = sum_of_warp(dot), norm = fmaxf(sum_of_warp(norm), kSmallestNormal);
        const float found = dot > 0.f ? dot * dot / norm : -1.f;
        if (found > gain) gain = found, scale = dot / norm;
      }
      refined = scale;
      if (gain > best_gain) best_gain = gain, best_scale = sign * scale;
    }
  }
  if (lane == 0) static_cast<float*>(p.scales)[group] = best_scale * largest;
}

}  // namespace flute
