// Eight finished sums to `out`, as the batch and mma kernels end.
#pragma once
#include "element.cuh"

namespace flute {

// 8 rows of one token: scaled if a row has one scale, biased, rounded. `v` is spent.
template <class D, class Params>
FLUTE_DEVICE void store_rows(const Params& p, float (&v)[8], int n, int token) {
  u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.shape_n + n;
  const int count = min(8, p.shape_n - n);
  u32 packed[4];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if (j < count) {
      if constexpr (D::kGroup == 0) v[j] *= D::Scale::load_global(p.scales, n + j);
      if (p.bias != nullptr) v[j] += D::Act::load_global(p.bias, n + j);
    }
    const u32 half = D::Act::from_float(v[j]);
    packed[j / 2] = j % 2 ? packed[j / 2] | half << 16 : half;
  }
  if (p.shape_n % 8 == 0) {
    ptx::st_global_v4(out, packed);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < count) ptx::st_global_u16(out + j, static_cast<u16>(packed[j / 2] >> (j % 2 * 16)));
  }
}

}  // namespace flute
