// Stands in for flute/kernels/ptx.cuh where a kernel is compiled for the host (emulator.cpp): the
// wrappers do on one lane of an emulated warp what the instructions do on a GPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define FLUTE_DEVICE inline

struct Index {
  unsigned x, y, z;
};
extern thread_local Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &value, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t v = static_cast<uint64_t>(b) << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; i++)
    d |= static_cast<unsigned>(v >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return d;
}
unsigned __shfl_sync(unsigned mask, unsigned value, int lane);
float __shfl_sync(unsigned mask, float value, int lane);
float __shfl_xor_sync(unsigned mask, float value, int lane);
unsigned __ballot_sync(unsigned mask, bool vote);
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

namespace flute {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace ptx {

u8* shared_memory(u32 address, u32 num_bytes, int kind);  // noted; fails outside
enum Kind { kRead = 0, kWrite = 1, kMatrix = 2 };

inline u32 smem_address(const void*) { return 0; }
inline u32 ld_shared(u32 at) {
  u32 v;
  std::memcpy(&v, shared_memory(at, 4, kRead), 4);
  return v;
}
inline void ld_shared_v2(u32& v0, u32& v1, u32 at) {
  const u8* from = shared_memory(at, 8, kRead);
  std::memcpy(&v0, from, 4), std::memcpy(&v1, from + 4, 4);
}
inline void ld_shared_v4(u32 (&v)[4], u32 at) { std::memcpy(v, shared_memory(at, 16, kRead), 16); }
inline u32 ld_shared_u16(u32 at) {
  u16 v;
  std::memcpy(&v, shared_memory(at, 2, kRead), 2);
  return v;
}
inline float ld_shared_f32(u32 at) { return __uint_as_float(ld_shared(at)); }
inline u32 ld_table(u32 at) { return ld_shared(at); }
inline void ld_table_v2(u32& v0, u32& v1, u32 at) { ld_shared_v2(v0, v1, at); }
inline void st_shared_u32(u32 at, u32 v) { std::memcpy(shared_memory(at, 4, kWrite), &v, 4); }
inline void st_shared_f32(u32 at, float v) { st_shared_u32(at, __float_as_uint(v)); }
inline void st_shared_u16(u32 at, u16 v) { std::memcpy(shared_memory(at, 2, kWrite), &v, 2); }
inline void st_shared_v4(u32 at, u32 v0, u32 v1, u32 v2, u32 v3) {
  const u32 v[4] = {v0, v1, v2, v3};
  std::memcpy(shared_memory(at, 16, kWrite), v, 16);
}
void ldmatrix_x4(u32 (&v)[4], u32 address);

template <class T>
inline T load(const void* pointer) {
  T v;
  std::memcpy(&v, pointer, sizeof v);
  return v;
}
inline u16 ld_global_nc_u16(const void* pointer) { return load<u16>(pointer); }
inline float ld_global_nc_f32(const void* pointer) { return load<float>(pointer); }
inline u32 ld_global(const void* pointer) { return load<u32>(pointer); }
inline void ld_global_v4(u32 (&v)[4], const void* pointer) { std::memcpy(v, pointer, 16); }
inline void st_global_u16(void* pointer, u16 v) { std::memcpy(pointer, &v, 2); }
inline void st_global_v4(void* pointer, const u32 (&v)[4]) { std::memcpy(pointer, v, 16); }

void cp_async_16(u32 address, const void* pointer, u32 num_bytes);
void cp_async_commit();
void wait_copies(int newest);
template <int N>
inline void cp_async_wait() {
  wait_copies(N);
}
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}

// ---- arithmetic

inline u32 select(u32 mask, u32 one, u32 zero) { return (mask & one) | (~mask & zero); }
// A NaN would not come through the multiplication by 1 as it is.
inline u32 upper_half(u32 v) {
  const u32 half = v >> 16;
  return (half & 0x7C00) == 0x7C00 ? 0xDEADDEAD : half << 16 | half;
}

inline float half_to_float(u16 v) { return static_cast<float>(bits_as<_Float16>(v)); }
inline float bfloat_to_float(u16 v) { return __uint_as_float(static_cast<u32>(v) << 16); }
inline float cvt_f32_f16(u16 v) { return half_to_float(v); }
inline u16 cvt_f16_f32(float v) { return bits_as<u16>(static_cast<_Float16>(v)); }
inline u16 cvt_bf16_f32(float v) {
  const u32 bits = __float_as_uint(v);
  if (v != v) return 0x7FFF;
  return static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline u32 mul_f16x2(u32 a, u32 b) {
  const auto product = [&](int shift) {
    return static_cast<u32>(cvt_f16_f32(half_to_float(static_cast<u16>(a >> shift)) *
                                        half_to_float(static_cast<u16>(b >> shift))));
  };
  return product(0) | product(16) << 16;
}
inline u32 mul_bf16x2(u32 a, u32 b) {
  const auto product = [&](int shift) {
    return static_cast<u32>(cvt_bf16_f32(bfloat_to_float(static_cast<u16>(a >> shift)) *
                                         bfloat_to_float(static_cast<u16>(b >> shift))));
  };
  return product(0) | product(16) << 16;
}
// Bit 3 of a selector's nibble: the byte's sign, eight times.
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d = __byte_perm(a, b, selector);
  for (int i = 0; i < 4; i++)
    if (selector >> 4 * i & 8) d = d & ~(255u << 8 * i) | (d >> (8 * i + 7) & 1 ? 255u << 8 * i : 0);
  return d;
}

// mma.m16n8k16: the whole warp.
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
         float (*to_float)(u16));
inline void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2,
                    float c3) {
  const float c[4] = {c0, c1, c2, c3};
  mma(d, a, b0, b1, c, half_to_float);
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2,
                     float c3) {
  const float c[4] = {c0, c1, c2, c3};
  mma(d, a, b0, b1, c, bfloat_to_float);
}

}  // namespace ptx
}  // namespace flute
