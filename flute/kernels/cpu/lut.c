/* Entry points: products of up to 32 tokens, in fixed point or exact, and which variants run here. */
#include "lut.h"

#include <math.h>
#include <stdlib.h>

const struct variant *const flute_variants[] = {
#ifdef FLUTE_X86
    &flute_avx512, &flute_avx2,
#endif
#ifdef FLUTE_ARM
    &flute_neon,
#endif
    &flute_scalar,
};
#define NUM_VARIANTS ((int)(sizeof flute_variants / sizeof *flute_variants))

/* Name of a variant that was compiled, fastest first, or NULL past the last. */
const char *flute_variant_name(int i) { return i < NUM_VARIANTS ? flute_variants[i]->name : NULL; }

/* Whether this CPU has the instructions of a variant. */
int flute_variant_usable(int i) { return i >= 0 && i < NUM_VARIANTS && flute_variants[i]->usable(); }

/* What the products of one call share. */
struct call {
  const struct tokens *t;
  const struct variant *v;
  struct product *products;
  int count;
  int fits[MAX_CALL]; /* whether a token may go by fixed point */
  int any_fit, all_fit;
};

struct product {
  const struct call *call;
  const struct weight *w;
  const struct result *r;
  struct tiles tiles;
  int64_t start;        /* its first tile, or row, among those of all products */
  float *tables;        /* (num_tables, 16), rounded to the type of x */
  int16_t *fixed;       /* (num_tables, 16) */
  float *table_unit;    /* (num_tables,); negative: this table must go by the exact path */
};

/* A table in fixed point: whether its rounding, weighed by how often each code occurs, is small. */
static int fit_table(const float *table, int entries, const uint8_t *header, int16_t *fixed, float *unit) {
  float largest = 0;
  double lost = 0, norm = 0;
  for (int i = 0; i < entries; i++) {
    float a = fabsf(table[i]);
    if (!(a <= 0x1p100f)) return 0;
    if (a > largest) largest = a;
  }
  *unit = largest / TABLE_LIMIT;
  if (largest == 0) return 1;
  if (largest < 0x1p-90f) return 0;
  for (int i = 0; i < entries; i++) {
    int64_t count;
    memcpy(&count, header + 8 * i, 8);
    double q = rint((double)table[i] / largest * TABLE_LIMIT);
    double error = table[i] - q * *unit;
    fixed[i] = (int16_t)q;
    lost += (double)count * error * error;
    norm += (double)count * table[i] * table[i];
  }
  return lost <= TABLE_TOLERANCE * TABLE_TOLERANCE * norm;
}

INLINE void interleave(const int16_t *from, int16_t *to, const int half) {
  for (int i = 0; i < half; i++) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[half + i];
  }
}

/* Activations of a unit in the order of a variant: by bytes (neon.c, avx2.c), of 3 bits by pairs of codes
   (avx2.c), or, of 2 bits, by the halves of a word, which are codes 8 apart (avx512.c). */
INLINE void order_x(const int16_t *from, int16_t *to, int num_bits, enum x_order order) {
  static const uint8_t pairs[UNIT] = {0,  2,  1,  3,  4,  6,  5,  7,  10, 12, 11, 13, 14, 16, 15, 17,
                                      20, 22, 21, 23, 24, 26, 25, 27, 8,  18, 9,  19, 28, 30, 29, 31};
  if (num_bits == 3 && order == BY_BYTES_AND_PAIRS) {
    for (int i = 0; i < UNIT; i++) to[i] = from[pairs[i]];
  } else if (order == AS_CODES || num_bits == 3 || (num_bits == 4 && order == BY_HALVES)) {
    memcpy(to, from, UNIT * sizeof *to);
  } else if (num_bits == 4) {
    for (int v = 0; v < UNIT; v += 8) interleave(from + v, to + v, 4);
  } else if (order == BY_HALVES) {
    for (int v = 0; v < UNIT; v += 16) interleave(from + v, to + v, 8);
  } else {
    for (int i = 0; i < UNIT; i++) to[i] = from[i / 16 * 16 + i % 4 * 4 + i % 16 / 4];
  }
}

/* Write rows [n, n + rows) of token m, at most a tile: sums * factor + bias. */
static void finish(const struct product *p, int64_t m, int64_t n, int rows, const float *sums, float factor) {
  const int type = p->call->t->x_type;
  float values[TILE];
  uint16_t halves[TILE];
  char *out = (char *)p->r->out + (size_t)(m * p->w->N + n) * element_bytes(type);
  for (int r = 0; r < rows; r++) values[r] = sums[r] * factor;
  if (p->r->bias)
    for (int r = 0; r < rows; r++) values[r] += load(p->r->bias, n + r, p->r->bias_type);
  if (type == F32) { memcpy(out, values, (size_t)rows * 4); return; }
  for (int r = 0; r < rows; r++) halves[r] = type == BF16 ? to_bf16(values[r]) : to_f16(values[r]);
  memcpy(out, halves, (size_t)rows * 2);
}

static int64_t table_of_row(const struct weight *w, int64_t n) {
  int64_t range = 0;
  if (!w->ends) return w->num_tables > 1 ? n : 0;
  while (w->ends[range] <= n) range++;
  return range;
}

/* Tokens of a pass for so many: those past the last are zero. */
static int pass_tokens(int now) { return now > 4 ? 8 : now > 2 ? 4 : now; }

static void multiply_tile(const struct product *p, int64_t tile) {
  const struct call *c = p->call;
  const int64_t table = table_of_row(p->w, tile * TILE), M = c->t->M, most = c->v->max_tokens;
  struct tiles a = p->tiles;
  float sums[MAX_TOKENS * TILE], unit = p->table_unit[table];
  a.codes += (size_t)tile * a.code_bytes;
  a.scales += (size_t)tile * a.scale_bytes;
  a.table = p->tables + 16 * table;
  a.fixed_table = p->fixed + 16 * table;
  const int64_t blocks = (a.padded_K + a.block - 1) / a.block;
  const int use_fixed = c->any_fit && unit >= 0;
  const int rows = p->w->N - tile * TILE < TILE ? (int)(p->w->N - tile * TILE) : TILE;
  for (int64_t first = 0; first < M; first += most) {
    const int now = (int)(M - first < most ? M - first : most), tokens = pass_tokens(now);
    struct tiles part = a;
    part.x += first * a.padded_K;
    part.fixed_x += first * a.padded_K;
    part.x_unit += first * blocks;
    for (int kind = 0; kind < 2; kind++) {
      if (kind == 0 ? !use_fixed : use_fixed && c->all_fit) continue;
      (kind == 0 ? c->v->fixed : c->v->exact)(&part, tokens, sums);
      for (int m = 0; m < now; m++) {
        if ((kind == 0) != (use_fixed && c->fits[first + m])) continue;
        finish(p, first + m, tile * TILE, rows, sums + m * TILE, kind == 0 ? unit : 1);
      }
    }
  }
}

/* The 16 pairs of codes of a stored unit: each 2 * num_bits bits. */
INLINE void unit_pairs(const uint8_t *unit, const int num_bits, uint8_t pairs[16]) {
  if (num_bits == 4) {
    memcpy(pairs, unit, 16);
  } else if (num_bits == 2) {
    for (int i = 0; i < 16; i++) pairs[i] = unit[i / 2] >> 4 * (i & 1) & 15;
  } else {
    for (int i = 0; i < 4; i++) {
      uint32_t four = unit[3 * i] | (uint32_t)unit[3 * i + 1] << 8 | (uint32_t)unit[3 * i + 2] << 16;
      for (int j = 0; j < 4; j++) pairs[4 * i + j] = four >> 6 * j & 63;
    }
  }
}

INLINE void multiply_row(const struct product *p, int64_t n, const int num_bits) {
  const struct weight *w = p->w;
  const struct tiles *a = &p->tiles;
  const int num_pairs = 1 << 2 * num_bits;
  int64_t table = table_of_row(w, n), groups = w->K / w->group, M = p->call->t->M;
  int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  const uint8_t *row = w->codes + HEADER + (size_t)n * (size_t)(a->padded_K / UNIT) * 4 * num_bits;
  const float *values = p->tables + 16 * table;
  int use_fixed = p->call->any_fit && p->table_unit[table] >= 0;
  int16_t fixed_pairs[256][2];
  float pairs[256][2];
  for (int i = 0; i < num_pairs; i++)
    for (int h = 0; h < 2; h++) {
      int code = h ? i >> num_bits : i & ((1 << num_bits) - 1);
      fixed_pairs[i][h] = p->fixed[16 * table + code];
      pairs[i][h] = values[code];
    }
  float fixed_sum[MAX_CALL] = {0}, sum[MAX_CALL][16] = {{0}};
  int use_exact = !(use_fixed && p->call->all_fit);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t first = b * a->block, length = a->padded_K - first < a->block ? a->padded_K - first : a->block;
    float scale = load(w->scales, n * groups + first / w->group, w->scale_type);
    const uint8_t *codes = row + (size_t)(first / UNIT) * 4 * num_bits;
    if (use_fixed) {
      int16_t decoded[MAX_BLOCK];
      for (int64_t k = 0; k < length; k += UNIT) {
        uint8_t index[16];
        unit_pairs(codes + k / 8 * num_bits, num_bits, index);
        for (int i = 0; i < 16; i++) memcpy(decoded + k + 2 * i, fixed_pairs[index[i]], 4);
      }
      for (int64_t m = 0; m < M; m++) {
        const int16_t *x = a->fixed_x + m * a->padded_K + first;
        int32_t total = 0;
        for (int64_t k = 0; k < length; k += UNIT)
          for (int i = 0; i < UNIT; i++) total += (int32_t)decoded[k + i] * x[k + i];
        float part = (float)total * a->x_unit[m * blocks + b];
        fixed_sum[m] = fixed_sum[m] + part * scale;
      }
    }
    if (use_exact) {
      float decoded[MAX_BLOCK];
      for (int64_t k = 0; k < length; k += UNIT) {
        uint8_t index[16];
        unit_pairs(codes + k / 8 * num_bits, num_bits, index);
        for (int i = 0; i < 16; i++)
          for (int h = 0; h < 2; h++) decoded[k + 2 * i + h] = pairs[index[i]][h] * scale;
      }
      for (int64_t m = 0; m < M; m++) {
        const float *x = a->x + m * a->padded_K + first;
        for (int64_t k = 0; k < length; k += 16)
          for (int j = 0; j < 16; j++) sum[m][j] += decoded[k + j] * x[k + j];
      }
    }
  }
  for (int64_t m = 0; m < M; m++) {
    float total = 0;
    if (use_fixed && p->call->fits[m]) total = fixed_sum[m] * p->table_unit[table];
    else
      for (int j = 0; j < 16; j++) total += sum[m][j];
    finish(p, m, n, 1, &total, 1);
  }
}

/* Multiply tiles [first, last), or rows, of all products. */
static void multiply_range(int64_t first, int64_t last, void *context) {
  const struct call *c = context;
  for (int i = 0; i < c->count; i++) {
    const struct product *p = c->products + i;
    const int64_t end = p->start + (p->w->by_rows ? p->w->N : (p->w->N + TILE - 1) / TILE);
    for (int64_t n = first > p->start ? first : p->start; n < last && n < end; n++) {
      if (!p->w->by_rows) multiply_tile(p, n - p->start);
      else if (p->w->num_bits == 4) multiply_row(p, n - p->start, 4);
      else if (p->w->num_bits == 3) multiply_row(p, n - p->start, 3);
      else multiply_row(p, n - p->start, 2);
    }
  }
}

static void round_tables(struct product *p, int type, int exact) {
  const int entries = 1 << p->w->num_bits;
  for (int64_t i = 0; i < p->w->num_tables; i++) {
    float *table = p->tables + 16 * i;
    for (int c = 0; c < entries; c++) {
      uint16_t one[2];
      store(one, 0, type, p->w->tables[i * entries + c]);
      table[c] = load(one, 0, type);
    }
    if (exact || p->w->codes[HEADER_EXACT] ||
        !fit_table(table, entries, p->w->codes, p->fixed + 16 * i, p->table_unit + i))
      p->table_unit[i] = -1;
  }
}

/* Multiply 1 to 32 tokens by 1 to 16 weights of the same K, group, bits and order, each with a result.
   Returns 0; 1: no memory; 2: the thread pool failed. */
int flute_multiply(const struct weight *weights, const struct result *results, int count,
                   const struct tokens *t, int variant, int exact, parallel_fn run) {
  const struct weight *w = weights;
  const struct variant *v = flute_variants[variant];
  const int64_t K = padded(w->K), block = block_of(w->group), blocks = (K + block - 1) / block;
  const size_t tokens = t->M > 4 ? (size_t)round_up(t->M, 8) : t->M > 2 ? 4 : (size_t)t->M;
  size_t T = 0;
  int64_t parts = 0;
  for (int i = 0; i < count; i++) T += (size_t)weights[i].num_tables;
  const int by_rows = w->by_rows, bits = w->num_bits;
  const size_t x_bytes = (tokens * 6 + 2) * (size_t)K + tokens * (size_t)blocks * 4;
  float *memory = calloc(1, x_bytes + T * (64 + 32 + 4) + (size_t)count * sizeof(struct product));
  if (!memory) return 1;
  struct product *products = (struct product *)memory;
  float *tables = (float *)(products + count), *table_unit = tables + 16 * T, *x = table_unit + T;
  float *unit = x + tokens * (size_t)K;
  int16_t *fixed_x = (int16_t *)(unit + tokens * (size_t)blocks), *one = fixed_x + tokens * (size_t)K;
  int16_t *fixed = one + K; /* of the tables; `one`: a token in fixed point */
  struct call call = {.t = t, .v = v, .products = products, .count = count, .all_fit = 1};
  for (int i = 0; i < count; i++) {
    w = weights + i;
    products[i] = (struct product){
        .call = &call, .w = w, .r = results + i, .start = parts,
        .tables = tables, .fixed = fixed, .table_unit = table_unit,
        .tiles = {.codes = w->codes + HEADER, .scales = w->scales, .x = x, .fixed_x = fixed_x, .x_unit = unit,
                  .code_bytes = (size_t)K / UNIT * 64 * w->num_bits,
                  .scale_bytes = (size_t)(w->K / w->group) * TILE * element_bytes(w->scale_type),
                  .K = w->K, .padded_K = K, .group = w->group, .block = block,
                  .num_bits = w->num_bits, .scale_type = w->scale_type}};
    round_tables(products + i, t->x_type, exact);
    parts += w->by_rows ? w->N : (w->N + TILE - 1) / TILE;
    tables += 16 * w->num_tables;
    fixed += 16 * w->num_tables;
    table_unit += w->num_tables;
  }
  const size_t size = element_bytes(t->x_type);
  for (int64_t m = 0; m < t->M; m++) {
    int16_t *row = by_rows ? fixed_x + m * K : one;
    const char *from = (const char *)t->x + (size_t)(m * t->x_stride) * size;
    if (m && !by_rows) memset(row, 0, (size_t)K * 2);
    call.fits[m] = v->token(&products->tiles, from, t->x_type, x + m * K, row, unit + m * blocks) && !exact;
    call.any_fit |= call.fits[m];
    call.all_fit &= call.fits[m];
    if (by_rows) continue;
    const int64_t first = m / v->max_tokens * v->max_tokens, left = t->M - first;
    const int in_pass = pass_tokens((int)(left < v->max_tokens ? left : v->max_tokens));
    int16_t *to = fixed_x + first * K + (m - first) * UNIT;
    for (int64_t k = 0; k < K; k += UNIT) order_x(row + k, to + k * in_pass, bits, v->order);
  }
  /* A thread's share is at least 128 K weights, about 10 us, which waking it must not exceed. */
  int64_t grain = (1 << 17) / (K * (w->by_rows ? 1 : TILE)) + 1;
  int error = run(0, parts, grain, multiply_range, &call);
  free(memory);
  return error ? 2 : 0;
}

/* Where there is no thread pool. */
int flute_serial(int64_t first, int64_t last, int64_t grain, range_fn run, void *context) {
  (void)grain;
  if (first < last) run(first, last, context);
  return 0;
}

/* Whether so many bytes are the same. */
int flute_equal(const void *a, const void *b, size_t bytes) { return !memcmp(a, b, bytes); }
