/* Entry points: a product of up to 8 tokens, in fixed point or exact, and which variants run here. */
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

struct product {
  const struct weight *w;
  const struct tokens *t;
  const struct variant *v;
  struct tiles tiles;
  float *tables;        /* (num_tables, 16), rounded to the type of x */
  int16_t *fixed;       /* (num_tables, 16) */
  float *table_unit;    /* (num_tables,); negative: this table must go by the exact path */
  int fits[MAX_TOKENS]; /* whether a token may go by fixed point */
  int any_fit, all_fit;
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

/* Codes of a unit in the order of a variant that shuffles bytes; see avx2.c. */
static void order_x(int16_t *x, int num_bits) {
  static const uint8_t four[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  int16_t unit[UNIT];
  if (num_bits == 3) return;
  memcpy(unit, x, sizeof unit);
  for (int i = 0; i < UNIT; i++)
    x[i] = num_bits == 4 ? unit[i / 8 * 8 + four[i % 8]] : unit[i / 16 * 16 + i % 4 * 4 + i % 16 / 4];
}

/* Convert a token to fp32 and to fixed point; returns whether fixed point holds it. */
static int prepare_token(const struct product *p, int64_t m, float *x, int16_t *fixed, float *unit) {
  const struct tiles *a = &p->tiles;
  const char *from = (const char *)p->t->x + (size_t)(m * p->t->x_stride) * element_bytes(p->t->x_type);
  const float limit = (float)(TABLE_LIMIT * BUDGET / a->block);
  double lost = 0, norm = 0;
  int fits = 1;
  if (p->t->x_type == F32) memcpy(x, from, (size_t)a->K * 4);
  else if (p->t->x_type == BF16)
    for (int64_t k = 0; k < a->K; k++) x[k] = load(from, k, BF16);
  else
    for (int64_t k = 0; k < a->K; k++) x[k] = load(from, k, F16);
  for (int64_t first = 0, b = 0; first < a->padded_K; first += a->block, b++) {
    int64_t length = a->padded_K - first < a->block ? a->padded_K - first : a->block;
    const float *in = x + first;
    int32_t bits[16] = {0}, largest_bits = 0;
    for (int64_t i = 0; i < length; i += 16)
      for (int j = 0; j < 16; j++) {
        int32_t now;
        memcpy(&now, in + i + j, 4);
        now &= 0x7FFFFFFF;
        bits[j] = now > bits[j] ? now : bits[j];
      }
    for (int j = 0; j < 16; j++) largest_bits = bits[j] > largest_bits ? bits[j] : largest_bits;
    float largest = from_bits((uint32_t)largest_bits);
    unit[b] = 0;
    if (largest == 0) continue; /* fixed is zero already */
    if (!(largest >= 0x1p-90f && largest <= 0x1p100f)) { fits = 0; continue; } /* NaN too */
    float inverse = limit / largest, errors[16] = {0}, squares[16] = {0};
    unit[b] = largest / limit;
    for (int64_t i = 0; i < length; i += 16)
      for (int j = 0; j < 16; j++) {
        float v = in[i + j] * inverse, q = (v + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds */
        fixed[first + i + j] = (int16_t)q;
        errors[j] += (v - q) * (v - q);
        squares[j] += v * v;
      }
    double u = unit[b];
    for (int j = 0; j < 16; j++) {
      lost += u * u * errors[j];
      norm += u * u * squares[j];
    }
  }
  return fits && lost <= TOKEN_TOLERANCE * TOKEN_TOLERANCE * norm;
}

static void finish(const struct product *p, int64_t m, int64_t n, float sum) {
  if (p->t->bias) sum += load(p->t->bias, n, p->t->bias_type);
  store(p->t->out, m * p->w->N + n, p->t->x_type, sum);
}

static int64_t table_of_row(const struct weight *w, int64_t n) {
  int64_t range = 0;
  if (!w->ends) return w->num_tables > 1 ? n : 0;
  while (w->ends[range] <= n) range++;
  return range;
}

static void multiply_tiles(const struct product *p, int64_t tile, int count, int64_t table) {
  struct tiles a = p->tiles;
  float sums[2 * MAX_TOKENS * TILE], unit = p->table_unit[table];
  a.codes += (size_t)tile * a.code_bytes;
  a.scales += (size_t)tile * a.scale_bytes;
  a.table = p->tables + 16 * table;
  a.fixed_table = p->fixed + 16 * table;
  int64_t blocks = (a.padded_K + a.block - 1) / a.block, M = p->t->M;
  int use_fixed = p->any_fit && unit >= 0;
  for (int64_t first = 0; first < M; first += p->v->max_tokens) {
    int now = (int)(M - first < p->v->max_tokens ? M - first : p->v->max_tokens);
    int tokens = now > 4 ? 8 : now > 2 ? 4 : now; /* those past the last are zero */
    struct tiles part = a;
    part.x += first * a.padded_K;
    part.fixed_x += first * a.padded_K;
    part.x_unit += first * blocks;
    for (int kind = 0; kind < 2; kind++) {
      if (kind == 0 ? !use_fixed : use_fixed && p->all_fit) continue;
      (kind == 0 ? p->v->fixed : p->v->exact)(&part, count, tokens, sums);
      for (int t = 0; t < count; t++)
        for (int m = 0; m < now; m++) {
          if ((kind == 0) != (use_fixed && p->fits[first + m])) continue;
          for (int r = 0; r < TILE && (tile + t) * TILE + r < p->w->N; r++) {
            float sum = sums[(t * tokens + m) * TILE + r];
            finish(p, first + m, (tile + t) * TILE + r, kind == 0 ? sum * unit : sum);
          }
        }
    }
  }
}

static void multiply_pairs(int64_t first, int64_t last, void *context) {
  const struct product *p = context;
  int64_t num_tiles = (p->w->N + TILE - 1) / TILE;
  for (int64_t tile = 2 * first; tile < 2 * last && tile < num_tiles; tile += 2) {
    int64_t table = table_of_row(p->w, tile * TILE);
    if (tile + 1 == num_tiles) {
      multiply_tiles(p, tile, 1, table);
    } else if (table_of_row(p->w, (tile + 1) * TILE) == table) {
      multiply_tiles(p, tile, 2, table);
    } else {
      multiply_tiles(p, tile, 1, table);
      multiply_tiles(p, tile + 1, 1, table_of_row(p->w, (tile + 1) * TILE));
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
  int64_t table = table_of_row(w, n), groups = w->K / w->group, M = p->t->M;
  int64_t blocks = (a->padded_K + a->block - 1) / a->block;
  const uint8_t *row = w->codes + HEADER + (size_t)n * (size_t)(a->padded_K / UNIT) * 4 * num_bits;
  const float *values = p->tables + 16 * table;
  int use_fixed = p->any_fit && p->table_unit[table] >= 0;
  int16_t fixed_pairs[256][2];
  float pairs[256][2];
  for (int i = 0; i < num_pairs; i++)
    for (int h = 0; h < 2; h++) {
      int code = h ? i >> num_bits : i & ((1 << num_bits) - 1);
      fixed_pairs[i][h] = p->fixed[16 * table + code];
      pairs[i][h] = values[code];
    }
  float fixed_sum[MAX_TOKENS] = {0}, sum[MAX_TOKENS][16] = {{0}};
  int use_exact = !(use_fixed && p->all_fit);
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
    if (use_fixed && p->fits[m]) total = fixed_sum[m] * p->table_unit[table];
    else
      for (int j = 0; j < 16; j++) total += sum[m][j];
    finish(p, m, n, total);
  }
}

static void multiply_rows(int64_t first, int64_t last, void *context) {
  const struct product *p = context;
  for (int64_t n = first; n < last; n++) {
    if (p->w->num_bits == 4) multiply_row(p, n, 4);
    else if (p->w->num_bits == 3) multiply_row(p, n, 3);
    else multiply_row(p, n, 2);
  }
}

/* Multiply 1 to 8 tokens. Returns 0; 1: no memory; 2: the thread pool failed. */
int flute_multiply(const struct weight *w, const struct tokens *t, int variant, int exact, parallel_fn run) {
  exact |= w->codes[HEADER_EXACT] != 0;
  struct product p = {.w = w, .t = t, .v = flute_variants[variant]};
  const int entries = 1 << w->num_bits;
  const int64_t K = padded(w->K), block = block_of(w->group), blocks = (K + block - 1) / block;
  const size_t tokens = MAX_TOKENS, T = (size_t)w->num_tables;
  float *memory = calloc(1, tokens * (size_t)K * 6 + tokens * (size_t)blocks * 4 + T * (64 + 32 + 4));
  if (!memory) return 1;
  float *x = memory, *unit = x + tokens * (size_t)K;
  p.tables = unit + tokens * (size_t)blocks;
  p.table_unit = p.tables + 16 * T;
  int16_t *fixed = (int16_t *)(p.table_unit + T);
  p.fixed = fixed + tokens * (size_t)K;
  p.tiles = (struct tiles){
      .codes = w->codes + HEADER, .scales = w->scales, .x = x, .fixed_x = fixed, .x_unit = unit,
      .code_bytes = (size_t)K / UNIT * 64 * w->num_bits,
      .scale_bytes = (size_t)(w->K / w->group) * TILE * element_bytes(w->scale_type),
      .K = w->K, .padded_K = K, .group = w->group, .block = block,
      .num_bits = w->num_bits, .scale_type = w->scale_type};
  for (size_t i = 0; i < T; i++) {
    for (int c = 0; c < entries; c++) {
      uint16_t one[2];
      store(one, 0, t->x_type, w->tables[i * entries + c]);
      p.tables[16 * i + c] = load(one, 0, t->x_type);
    }
    if (exact || !fit_table(p.tables + 16 * i, entries, w->codes, p.fixed + 16 * i, p.table_unit + i))
      p.table_unit[i] = -1;
  }
  p.all_fit = 1;
  for (int64_t m = 0; m < t->M; m++) {
    int16_t *row = fixed + m * K;
    p.fits[m] = prepare_token(&p, m, x + m * K, row, unit + m * blocks) && !exact;
    p.any_fit |= p.fits[m];
    p.all_fit &= p.fits[m];
    if (p.v->transposed && !w->by_rows)
      for (int64_t k = 0; k < K; k += UNIT) order_x(row + k, w->num_bits);
  }
  /* A thread's share is at least 128 K weights, about 10 us, which waking it must not exceed. */
  int64_t grain = (1 << 17) / (K * (w->by_rows ? 1 : 2 * TILE)) + 1, pairs = (w->N + 2 * TILE - 1) / (2 * TILE);
  int error = w->by_rows ? run(0, w->N, grain, multiply_rows, &p) : run(0, pairs, grain, multiply_pairs, &p);
  free(memory);
  return error ? 2 : 0;
}

/* Where there is no thread pool. */
int flute_serial(int64_t first, int64_t last, int64_t grain, range_fn run, void *context) {
  (void)grain;
  if (first < last) run(first, last, context);
  return 0;
}
