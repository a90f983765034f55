// Element types of activations and scales: conversions and the matching mma. Owns nothing else.
#pragma once
#include "ptx.cuh"

namespace flute {

enum Dtype : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

template <int DTYPE>
struct Element;

template <>
struct Element<kFloat16> {
  static constexpr int kBytes = 2;
  static FLUTE_DEVICE float to_float(u16 v) { return ptx::cvt_f32_f16(v); }
  static FLUTE_DEVICE u16 from_float(float v) { return ptx::cvt_f16_f32(v); }
  static FLUTE_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1,
                               float c2, float c3) {
    ptx::mma_f16(d, a, b0, b1, c0, c1, c2, c3);
  }
  // Products of two pairs, each rounded once.
  static FLUTE_DEVICE u32 multiply2(u32 a, u32 b) { return ptx::mul_f16x2(a, b); }
  // Two scales stored side by side at `address`.
  static FLUTE_DEVICE void load_pair(float& lo, float& hi, u32 address) {
    u32 v = ptx::ld_shared(address);
    lo = to_float(static_cast<u16>(v));
    hi = to_float(static_cast<u16>(v >> 16));
  }
  static FLUTE_DEVICE float load_global(const void* base, long long idx) {
    return to_float(ptx::ld_global_nc_u16(static_cast<const u16*>(base) + idx));
  }
};

template <>
struct Element<kBFloat16> {
  static constexpr int kBytes = 2;
  static FLUTE_DEVICE float to_float(u16 v) { return __uint_as_float(static_cast<u32>(v) << 16); }
  static FLUTE_DEVICE u16 from_float(float v) { return ptx::cvt_bf16_f32(v); }
  static FLUTE_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1,
                               float c2, float c3) {
    ptx::mma_bf16(d, a, b0, b1, c0, c1, c2, c3);
  }
  static FLUTE_DEVICE u32 multiply2(u32 a, u32 b) { return ptx::mul_bf16x2(a, b); }
  static FLUTE_DEVICE void load_pair(float& lo, float& hi, u32 address) {
    u32 v = ptx::ld_shared(address);
    lo = __uint_as_float(v << 16);
    hi = __uint_as_float(v & 0xFFFF0000u);
  }
  static FLUTE_DEVICE float load_global(const void* base, long long idx) {
    return to_float(ptx::ld_global_nc_u16(static_cast<const u16*>(base) + idx));
  }
};

template <>
struct Element<kFloat32> {
  static constexpr int kBytes = 4;
  static FLUTE_DEVICE void load_pair(float& lo, float& hi, u32 address) {
    u32 v0, v1;
    ptx::ld_shared_v2(v0, v1, address);
    lo = __uint_as_float(v0);
    hi = __uint_as_float(v1);
  }
  static FLUTE_DEVICE float load_global(const void* base, long long idx) {
    return ptx::ld_global_nc_f32(static_cast<const float*>(base) + idx);
  }
};

}  // namespace flute
