// One wrapper per PTX instruction, named after it. Owns the assembly; knows nothing of
// quantisation.
//
// `volatile` keeps an instruction in place and in order with the other volatile ones; a "memory"
// clobber also keeps ordinary loads and stores on their side of it. Wrappers without either are
// pure functions of their operands.
#pragma once

namespace flute {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace ptx {

#define FLUTE_DEVICE __device__ __forceinline__

// Generic pointer -> 32-bit address in the shared window.
FLUTE_DEVICE u32 smem_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- shared memory

// ld.shared.v4 (any GPU): 16 bytes. Volatile + memory: ring slots are rewritten behind the
// compiler's back.
FLUTE_DEVICE void ld_shared_v4(u32 (&v)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// ld.shared.v2 (any GPU): 8 bytes, ordered like ld_shared_v4.
FLUTE_DEVICE void ld_shared_v2(u32& v0, u32& v1, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v0), "=r"(v1) : "r"(address) : "memory");
}

// ld.shared (any GPU): 4 bytes, ordered like ld_shared_v4.
FLUTE_DEVICE u32 ld_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// ld.shared.u16 (any GPU): 2 bytes, ordered like ld_shared_v4.
FLUTE_DEVICE u32 ld_shared_u16(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

// st.shared.u16 (any GPU), ordered.
FLUTE_DEVICE void st_shared_u16(u32 address, u16 v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

// ld.shared of a table entry. Not volatile: the table does not change while its lookups are in
// flight (a barrier and a data dependence on volatile loads stand on both sides), so the compiler
// may schedule lookups freely.
FLUTE_DEVICE u32 ld_table(u32 address) {
  u32 v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// ld.shared.v2 of a table entry, free to move like ld_table.
FLUTE_DEVICE void ld_table_v2(u32& v0, u32& v1, u32 address) {
  asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v0), "=r"(v1) : "r"(address));
}

// ld.shared.f32 (any GPU), ordered.
FLUTE_DEVICE float ld_shared_f32(u32 address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

// st.shared.f32 (any GPU), ordered.
FLUTE_DEVICE void st_shared_f32(u32 address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// st.shared.u32 (any GPU), ordered.
FLUTE_DEVICE void st_shared_u32(u32 address, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// st.shared.v4 (any GPU): 16 bytes, ordered.
FLUTE_DEVICE void st_shared_v4(u32 address, u32 v0, u32 v1, u32 v2, u32 v3) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v0), "r"(v1), "r"(v2),
               "r"(v3)
               : "memory");
}

// ldmatrix.x4 (sm_75): four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8
// of matrix l / 8 and receives elements (row l / 4, columns 2 * (l % 4), + 1) of each.
FLUTE_DEVICE void ldmatrix_x4(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// ---- global memory

// ld.global.nc.u16 (any GPU): for data that no kernel in flight writes (tables, scales, bias).
FLUTE_DEVICE u16 ld_global_nc_u16(const void* pointer) {
  u16 v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(pointer));
  return v;
}

// ld.global.nc.f32 (any GPU).
FLUTE_DEVICE float ld_global_nc_f32(const void* pointer) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(pointer));
  return v;
}

// ld.global.u32 (any GPU). Memory: must stay behind griddepcontrol_wait, since the previous kernel
// may write x.
FLUTE_DEVICE u32 ld_global(const void* pointer) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}

// ld.global.v4 (any GPU): 16 bytes, ordered like ld_global.
FLUTE_DEVICE void ld_global_v4(u32 (&v)[4], const void* pointer) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(pointer)
               : "memory");
}

// st.global.u16 (any GPU).
FLUTE_DEVICE void st_global_u16(void* pointer, u16 v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(pointer), "h"(v) : "memory");
}

// st.global.v4 (any GPU): 16 bytes.
FLUTE_DEVICE void st_global_v4(void* pointer, const u32 (&v)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// cp.async.cg, 16 bytes past L1 into shared memory (sm_80); the bytes after `num_bytes` are filled
// with zeros.
FLUTE_DEVICE void cp_async_16(u32 address, const void* pointer, u32 num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(pointer),
               "r"(num_bytes)
               : "memory");
}

// cp.async.commit_group (sm_80).
FLUTE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group (sm_80): all but this thread's newest `N` groups have landed.
template <int N>
FLUTE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Hopper: mbarriers, bulk copies, clusters, dependent launch

// mbarrier.init (sm_80).
FLUTE_DEVICE void mbarrier_init(u32 barrier, u32 num_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// fence that makes initialised mbarriers visible to the copy engine (sm_90).
FLUTE_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
}

// mbarrier.arrive.expect_tx (sm_90): one arrival, and the phase also waits for `num_bytes` of
// copies.
FLUTE_DEVICE void mbarrier_arrive_expect_tx(u32 barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes)
               : "memory");
}

// cp.async.mbarrier.arrive.noinc (sm_80): arrive once all cp.async of this thread so far have
// landed.
FLUTE_DEVICE void cp_async_mbarrier_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.try_wait.parity (sm_90; test_wait on sm_80): wait until the phase of this parity is
// complete.
FLUTE_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, "
        "0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, "
        "1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (!done);
}

// elect.sync (sm_90): true in one lane of a converged warp. Why not `lane == 0`: the compiler then
// knows that one lane runs, keeps addresses in uniform registers and drops the loop over lanes that
// it puts around a bulk copy otherwise.
FLUTE_DEVICE bool elect_one() {
  u32 elected;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xFFFFFFFF;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(elected));
  return elected != 0;
}

// cp.async.bulk global -> shared (sm_90): one thread copies `num_bytes`; addresses and size are
// multiples of 16.
FLUTE_DEVICE void cp_async_bulk(u32 address, const void* pointer, u32 num_bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address),
      "l"(pointer), "r"(num_bytes), "r"(barrier)
      : "memory");
}

// griddepcontrol.launch_dependents (sm_90): the next kernel of the stream may start now, beside
// this one; again, nothing. Behind griddepcontrol_wait, all kernels before this one have ended once
// the next one runs. Before it they may still run: for next kernels that wait before they touch
// what any of these writes or reads (EARLY_DEPENDENTS).
FLUTE_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// griddepcontrol.wait (sm_90): the previous kernel has finished and its writes are visible.
FLUTE_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// %cluster_ctarank (sm_90).
FLUTE_DEVICE u32 cluster_rank() {
  u32 v;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}

// mapa (sm_90): the same shared address in block `rank` of the cluster.
FLUTE_DEVICE u32 mapa(u32 address, u32 rank) {
  u32 v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(address), "r"(rank));
  return v;
}

// ld.shared::cluster.f32 (sm_90), ordered.
FLUTE_DEVICE float ld_cluster_f32(u32 address) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

// barrier.cluster.arrive + wait (sm_90): every thread of the cluster; shared-memory writes before
// it are visible after.
FLUTE_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// ---- arithmetic

// mma.m16n8k16 (sm_80), fp32 sums: d = a * b + c.
FLUTE_DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1,
                          float c2, float c3) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
        "f"(c3));
}

FLUTE_DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1,
                           float c2, float c3) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
        "f"(c3));
}

// mul.rn.f16x2 (any GPU): two products, each rounded once.
FLUTE_DEVICE u32 mul_f16x2(u32 a, u32 b) {
  u32 v;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
  return v;
}

// fma.rn.bf16x2 (sm_80) with -0 as the addend: two products, each rounded once.
FLUTE_DEVICE u32 mul_bf16x2(u32 a, u32 b) {
  u32 v;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(0x80008000u));
  return v;
}

// prmt.b32 (any GPU): byte i of the result is that byte of the eight of a and b which nibble i of
// `selector` names. Why not __byte_perm: it masks every selector that is no constant, an
// instruction each; here nibbles must be below 8.
FLUTE_DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Bits of `one` where `mask` has ones, else of `zero`.
FLUTE_DEVICE u32 select(u32 mask, u32 one, u32 zero) { return (mask & one) | (~mask & zero); }

// The upper half of v in both halves, for v whose upper half is no NaN as a half: x * 1 is exact,
// and an operand may name a half, so this takes the floating-point unit one instruction.
FLUTE_DEVICE u32 upper_half(u32 v) {
  u32 d;
  asm("{\n.reg .b16 lo, hi;\n.reg .b32 both;\n"
      "mov.b32 {lo, hi}, %1;\nmov.b32 both, {hi, hi};\nmul.f16x2 %0, both, %2;\n}"
      : "=r"(d)
      : "r"(v), "r"(0x3C003C00));
  return d;
}

// cvt.f32.f16 (any GPU).
FLUTE_DEVICE float cvt_f32_f16(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}

// cvt.rn.f16.f32 (any GPU): round to nearest even.
FLUTE_DEVICE u16 cvt_f16_f32(float v) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

// cvt.rn.bf16.f32 (sm_80): round to nearest even.
FLUTE_DEVICE u16 cvt_bf16_f32(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

}  // namespace ptx
}  // namespace flute
