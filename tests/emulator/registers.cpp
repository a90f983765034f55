// Lookups in registers (register_lookup.cuh) compiled for the host.
#include <cstdlib>

#include "register_lookup.cuh"

thread_local Index threadIdx, blockIdx, blockDim, gridDim;
namespace flute::ptx {
u8* shared_memory(u32, u32, int) { std::abort(); }  // none is used
}  // namespace flute::ptx
unsigned __shfl_sync(unsigned, unsigned, int) { std::abort(); }

using flute::u32;

template <int NUM_BITS>
flute::RegisterTable<NUM_BITS> table_of(const u32* pairs) {
  u32 v[(1 << NUM_BITS) / 2];
  for (u32 i = 0; i < sizeof v / 4; i++) v[i] = pairs[i];
  flute::RegisterTable<NUM_BITS> table;
  table.set(v);
  return table;
}

// Pairs a0 to a3 of each word, of its two steps at 2 bits: `out` (count, 4 or 8).
extern "C" void look_up(int num_bits, const u32* pairs, const u32* words, int count, u32* out) {
  const auto two = table_of<2>(pairs);
  for (int n = 0; n < count; n++) {
    u32 a[2][4];
    if (num_bits == 2)
      two.word_in_order(a[0], a[1], words[n]);
    else if (num_bits == 3)
      table_of<3>(pairs).step(a[0], words[n]);
    else
      table_of<4>(pairs).step_of_pairs(a[0], words[n]);
    for (int s = 0; s < (num_bits == 2 ? 2 : 1); s++)
      for (u32 pair : a[s]) *out++ = pair;
  }
}
