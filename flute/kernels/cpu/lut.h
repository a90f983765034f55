/* Products with a table-quantised weight on a CPU: what the files here share. Plain C11.

   weight[n, k] = table[codes[n, k]] * scales[n, k / group]
   out[m, n]    = sum_k x[m, k] * weight[n, k] + bias[n]

   lut.c    entry points: tokens, rows, threads       order.c    stored order <-> order of kernels
   scalar.c avx2.c avx512.c neon.c    one tile by the instructions of one kind of CPU
   variant.h    what each of those ends with: instances by bits and tokens, tokens in fixed point
   block.c block.h steps.h    a transformer's block, for a token each: products and what is between
   dense.c rows.h    products with a dense weight
   quantise.c   nearest entries, and the scales of least squared error

   Tile order, for one table, or one per range of whole tiles. 16 rows make a tile; K is padded with
   code 0 to whole units of 32 codes. A unit is num_bits vectors of 16 words, one word a row:

       4 bits   vector v, bits 4j (+16): codes 8v + 2j (+1), j < 4
       3 bits   vector v, bits 3j (+16): codes 10v + 2j (+1), j < 5; bit 15 (31): bit v of code 30 (31)
       2 bits   vector v, bits 2j: code 16v + j, j < 16
       scales   (tiles, groups, 16)

   Row order, for all other tables: rows as stored, each padded to whole units; scales (N, groups).
   Both start with a header: the numbers of weights of each code, int64[16], and whether products are to
   be exact, int64.

   Fixed point. A table becomes 16-bit integers of at most 4095, and so do the activations of a block
   (a group, or 64 of a longer one), where the limit is 4095 * 128 / block:

       |sum of a block| <= 4095 * (4095 * 128 / block) * block = 2,146,435,200 < 2^31

   for blocks of 32 and 64, the only ones; partial sums are bounded by the same, in any order. (A limit
   is at most 16,380, so it fits 16 bits, and two products fit 32.) So sums of blocks are exact, whatever
   adds them. They are scaled and added in fp32 in the order of K, by a multiplication and an addition
   (never fused): results do not depend on the instructions.
   A row goes to a thread as a whole, so they do not depend on the number of threads either.

   What fixed point cannot hold goes by the exact path: tokens with NaN, Inf or numbers out of range,
   or whose rounding would lose more than a tolerance of their norm, and tables likewise.
   There the weight is formed in fp32 and the sum is of fp32.
*/
#ifndef FLUTE_LUT_H
#define FLUTE_LUT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 16           /* rows */
#define UNIT 32           /* codes of a row that fill whole words at any number of bits */
#define MAX_BLOCK 64      /* codes of a row that are summed in integers */
#define BUDGET 128        /* TABLE_LIMIT * TABLE_LIMIT * BUDGET < 2^31 */
#define TABLE_LIMIT 4095  /* |entry| in fixed point */
#define MAX_TOKENS 8      /* that share a decoded weight */
#define MAX_CALL 32       /* of one call: a tile and their integers stay in the L2 */
#define DENSE_UNIT 32     /* columns of a dense weight that are multiplied at a time */
#define HEADER 192        /* bytes before the codes */
#define HEADER_EXACT 128  /* where among them */
#define TABLE_TOLERANCE 3e-4 /* relative norm of a table's rounding; nf at 4 bits: 1.9e-4 */
#define TOKEN_TOLERANCE 2e-4 /* of a token's; Gaussian: 0.8e-4. Together at most 3.6e-4 */

enum element { F32 = 0, BF16 = 1, F16 = 2 };

typedef void (*range_fn)(int64_t first, int64_t last, void *context);
/* As torch_parallel_for: calls `run` on ranges that cover [first, last); 0 is success. */
typedef int (*parallel_fn)(int64_t first, int64_t last, int64_t grain, range_fn run, void *context);

struct weight {
  const uint8_t *codes;  /* in tile or row order, the header first */
  const void *scales;
  const float *tables;   /* (num_tables, 2**num_bits) */
  const int64_t *ends;   /* of the ranges of rows that share a table; NULL: one table, or one a row */
  int64_t N, K, group, num_tables;
  int32_t num_bits, scale_type, by_rows;
};

struct tokens {
  const void *x;     /* (M, K), rows x_stride elements apart */
  int64_t M, x_stride;
  int32_t x_type;
};

struct result {
  const void *bias;  /* (N,) or NULL */
  void *out;         /* (M, N), of the type of x */
  int32_t bias_type;
};

/* A weight that is not quantised. */
struct dense_weight {
  const void *data; /* (N, K) */
  int64_t N, K;
  int32_t type;
};

/* What a kernel needs to know of a dense weight and its tokens. */
struct dense_rows {
  const float *x; /* (units, M, 32), zeros past K; of bf16 a unit's even columns come first */
  int64_t M, K;
  int type;
};

/* What a kernel needs to know of its tile. */
struct tiles {
  const uint8_t *codes, *scales;   /* of the tile */
  size_t code_bytes, scale_bytes;  /* of a tile */
  const float *table;              /* rounded to the type of x */
  const int16_t *fixed_table;
  const float *x;                  /* (tokens, padded K) */
  const int16_t *fixed_x;          /* (units, tokens of a pass, 32), each unit in the variant's order;
                                      of weights by rows (tokens, padded K) */
  const float *x_unit;             /* (tokens, blocks): what 1 in fixed_x stands for */
  int64_t K, padded_K, group, block;
  int num_bits, scale_type;
};

/* Weights of a tile's unit k / 32, table * scale: out[code of the unit][row]. */
typedef void (*dense_fn)(const struct tiles *a, int64_t k, float out[UNIT][TILE]);

/* A tile's sums[token][row]; tokens is 1, 2, 4 or 8, but at most the variant's max_tokens. */
typedef void (*tile_fn)(const struct tiles *a, int tokens, float *sums);

/* A tile's first `rows` rows as 16-bit numbers of `type`, side by side: out[row][k], rows K apart. */
typedef void (*half_fn)(const struct tiles *a, int rows, int type, uint16_t *out);

/* Convert a token to fp32 and to fixed point; returns whether fixed point holds it. fixed is zero. */
typedef int (*token_fn)(const struct tiles *a, const void *from, int type, float *x, int16_t *fixed,
                        float *unit);

/* codes[i] = order[the number of bounds below weight[i] / divisor]; entries - 1 ascending bounds. */
typedef void (*nearest_fn)(const float *weight, int64_t length, float divisor, const float *bounds,
                           const uint8_t *order, int entries, uint8_t *codes);

/* sums[token] = a row of a dense weight times each token. */
typedef void (*row_fn)(const struct dense_rows *a, const char *row, float *sums);

/* In which order of a unit's codes a variant's fixed_x is; see order_x. */
enum x_order { AS_CODES, BY_BYTES, BY_BYTES_AND_PAIRS, BY_HALVES };

struct steps;

struct variant {
  const char *name;
  int (*usable)(void);
  int max_tokens;
  enum x_order order;
  tile_fn fixed, exact;
  dense_fn dense;
  token_fn token;
  nearest_fn nearest;
  half_fn halves;              /* NULL: by `dense` */
  row_fn row;
  const struct steps *steps;   /* of a decoder block: block.h */
};

extern const struct variant flute_scalar, flute_avx2, flute_avx512, flute_neon;
extern const struct variant *const flute_variants[]; /* those compiled, fastest first */

static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

/* Without branches, so that loops of them become vectors. */
static inline float from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
  /* 2^112 rebiases the exponent and makes subnormal numbers normal. */
  uint32_t finite = to_bits(from_bits(rest << 13) * from_bits(0x77800000));
  return from_bits(sign | (rest >= 0x7C00 ? 0x7F800000 | (rest & 0x3FF) << 13 : finite));
}

static inline uint16_t to_f16(float f) {
  uint32_t u = to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
  uint32_t normal = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
  /* Subnormal: adding 0.5 leaves the digits of 2^-24 at the end. */
  uint32_t small = to_bits(from_bits(rest) + 0.5f) - 0x3F000000;
  uint32_t large = rest > 0x7F800000 ? 0x7E00 : 0x7C00;
  return (uint16_t)(sign | (rest >= 0x477FF000 ? large : rest < 0x38800000 ? small : normal));
}

static inline uint16_t to_bf16(float f) {
  uint32_t u = to_bits(f), even = u + 0x7FFF + (u >> 16 & 1);
  return (uint16_t)(((u & 0x7FFFFFFF) > 0x7F800000 ? u | 0x400000 : even) >> 16);
}

static inline float load(const void *p, int64_t i, int type) {
  if (type == F32) { float f; memcpy(&f, (const char *)p + 4 * i, 4); return f; }
  uint16_t h;
  memcpy(&h, (const char *)p + 2 * i, 2);
  return type == BF16 ? from_bits((uint32_t)h << 16) : from_f16(h);
}

static inline void store(void *p, int64_t i, int type, float f) {
  uint16_t h;
  if (type == F32) { memcpy((char *)p + 4 * i, &f, 4); return; }
  h = type == BF16 ? to_bf16(f) : to_f16(f);
  memcpy((char *)p + 2 * i, &h, 2);
}

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
static inline int64_t padded(int64_t K) { return round_up(K, UNIT); }
static inline int64_t block_of(int64_t group) { return group < MAX_BLOCK ? padded(group) : MAX_BLOCK; }
static inline size_t element_bytes(int type) { return type == F32 ? 4 : 2; }

/* The codes of a row's unit: words[v] is the row's word of vector v. */
static inline void unpack_unit(const uint32_t *words, int num_bits, uint8_t codes[UNIT]) {
  if (num_bits == 4)
    for (int k = 0; k < UNIT; k++) codes[k] = words[k / 8] >> (4 * (k % 8 / 2) + 16 * (k & 1)) & 15;
  else if (num_bits == 2)
    for (int k = 0; k < UNIT; k++) codes[k] = words[k / 16] >> 2 * (k % 16) & 3;
  else {
    for (int k = 0; k < 30; k++) codes[k] = words[k / 10] >> (3 * (k % 10 / 2) + 16 * (k & 1)) & 7;
    for (int h = 0; h < 2; h++) {
      int bit = 15 + 16 * h;
      codes[30 + h] = (words[0] >> bit & 1) | (words[1] >> bit & 1) << 1 | (words[2] >> bit & 1) << 2;
    }
  }
}

#if defined(__x86_64__) || defined(_M_X64)
#define FLUTE_X86 1
#endif
#if defined(__aarch64__)
#define FLUTE_ARM 1
#endif

#define INLINE static inline __attribute__((always_inline))

/* Ask for the line of codes that is read some time from here: into the L2 long before, into the L1
   just before. Why both: one thread of a Zen 4 reads 4 bits at 28 GB/s so, of the 29 that memory
   gives; at 25 without the second, 21 with prefetchnta 2 KB ahead or none, and far less with
   prefetcht1 2 KB ahead (M = 1, 14336 x 4096, in turns, 2026-11). */
#define FAR_AHEAD 16384 /* bytes */
#define NEAR_AHEAD 512
INLINE void fetch_codes(const uint8_t *p) {
  __builtin_prefetch(p + FAR_AHEAD, 0, 2);
  __builtin_prefetch(p + NEAR_AHEAD, 0, 3);
}

#ifdef FLUTE_X86
#include <cpuid.h>

enum feature_register { LEAF1_C, LEAF7_B, LEAF7_C };

/* A register of features; Intel's manual, CPUID. Why not __builtin_cpu_supports: what it reads is
   filled by a part of the compiler's runtime, which zig's lacks: all is absent then. */
static inline uint32_t features(enum feature_register which) {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(which == LEAF1_C ? 1 : 7, 0, &a, &b, &c, &d)) return 0;
  return which == LEAF7_B ? b : c;
}

/* Whether the system saves these registers when it switches threads: bits of XCR0. */
static inline int system_saves(uint32_t registers) {
  uint32_t low, high;
  if (!(features(LEAF1_C) >> 27 & 1)) return 0; /* no XGETBV */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}
#endif

#endif
