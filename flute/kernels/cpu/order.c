/* Stored order <-> the order of kernels, rows of weights, in parallel. See lut.h. */
#include "lut.h"

#include <stdatomic.h>

struct order {
  const struct weight *w;   /* codes and scales as stored, or in the order of kernels */
  uint8_t *codes;           /* ordered: past the header */
  uint8_t *scales;
  _Atomic int64_t *counts;
  size_t word_bytes;        /* of a stored row */
};

static size_t unit_bytes(const struct weight *w) { return (size_t)w->num_bits * 4; }

static size_t row_bytes(const struct weight *w) { return (size_t)padded(w->K) / UNIT * unit_bytes(w); }

/* Codes of a unit as stored: a little-endian bit stream. */
static void read_unit(const uint8_t *p, int num_bits, uint8_t codes[UNIT]) {
  for (int part = 0; part < 4; part++) { /* 8 codes are num_bits bytes */
    uint32_t bits = 0;
    for (int i = 0; i < num_bits; i++) bits |= (uint32_t)p[part * num_bits + i] << 8 * i;
    for (int i = 0; i < 8; i++)
      codes[8 * part + i] = bits >> num_bits * i & ((1u << num_bits) - 1);
  }
}

static void write_unit(const uint8_t codes[UNIT], int num_bits, uint8_t *p) {
  for (int part = 0; part < 4; part++) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; i++) bits |= (uint32_t)codes[8 * part + i] << num_bits * i;
    for (int i = 0; i < num_bits; i++) p[part * num_bits + i] = (uint8_t)(bits >> 8 * i);
  }
}

static void pack_unit(const uint8_t codes[UNIT], int num_bits, uint32_t words[4]) {
  memset(words, 0, 16);
  if (num_bits == 4)
    for (int k = 0; k < UNIT; k++) words[k / 8] |= (uint32_t)codes[k] << (4 * (k % 8 / 2) + 16 * (k & 1));
  else if (num_bits == 2)
    for (int k = 0; k < UNIT; k++) words[k / 16] |= (uint32_t)codes[k] << 2 * (k % 16);
  else {
    for (int k = 0; k < 30; k++) words[k / 10] |= (uint32_t)codes[k] << (3 * (k % 10 / 2) + 16 * (k & 1));
    for (int v = 0; v < 3; v++)
      words[v] |= (uint32_t)(codes[30] >> v & 1) << 15 | (uint32_t)(codes[31] >> v & 1) << 31;
  }
}

static uint8_t *row_of(const struct order *o, int64_t n) {
  const struct weight *w = o->w;
  if (w->by_rows) return o->codes + (size_t)n * row_bytes(w);
  return o->codes + (size_t)(n / TILE) * TILE * row_bytes(w) + 4 * (n % TILE);
}

static void copy_scales(const struct order *o, int64_t n, int back) {
  const struct weight *w = o->w;
  int64_t groups = w->K / w->group;
  size_t size = element_bytes(w->scale_type);
  const uint8_t *stored = (const uint8_t *)w->scales + (size_t)(n * groups) * size;
  for (int64_t g = 0; g < groups; g++) {
    size_t at = w->by_rows ? (size_t)(n * groups + g)
                           : (size_t)((n / TILE * groups + g) * TILE + n % TILE);
    if (back) memcpy((uint8_t *)stored + g * size, o->scales + at * size, size);
    else memcpy(o->scales + at * size, stored + g * size, size);
  }
}

/* Nibbles 0 .. 7 of a stored word in the order 0 2 4 6 1 3 5 7, that of tiles. */
static uint32_t unzip(uint32_t word) {
  uint32_t swap = (word ^ word >> 4) & 0x00F000F0;
  word ^= swap ^ swap << 4;
  swap = (word ^ word >> 8) & 0x0000FF00;
  return word ^ swap ^ swap << 8;
}

/* Codes 0, 2, .. 8 of 30 bits side by side; those of x >> 3 are codes 1, 3, .. 9. */
static uint32_t every_other(uint32_t x) {
  return (x & 7) | (x >> 3 & 7 << 3) | (x >> 6 & 7 << 6) | (x >> 9 & 7 << 9) | (x >> 12 & 7 << 12);
}

/* A stored unit of 3 bits as words of a tile; counts codes by fours. */
static void order_three(const uint8_t *p, uint32_t words[3], uint32_t fours[4096]) {
  uint64_t low;
  uint32_t high;
  memcpy(&low, p, 8);
  memcpy(&high, p + 8, 4);
  const uint32_t middle = (uint32_t)(low >> 60) | high << 4; /* bits 60 .. 91 */
  const uint32_t tens[3] = {(uint32_t)low, (uint32_t)(low >> 30), middle};
  for (int v = 0; v < 3; v++)
    words[v] = every_other(tens[v]) | every_other(tens[v] >> 3) << 16 | (high >> (26 + v) & 1) << 15 |
               (high >> (29 + v) & 1) << 31;
  for (int i = 0; i < 60; i += 12) fours[low >> i & 4095]++;
  fours[middle & 4095]++;
  fours[high >> 8 & 4095]++;
  fours[high >> 20]++;
}

static void order_rows(int64_t first, int64_t last, void *context) {
  const struct order *o = context;
  const struct weight *w = o->w;
  int64_t counts[2][16] = {{0}}, bytes[2][256] = {{0}};
  uint32_t fours[4096];
  if (w->num_bits == 3) memset(fours, 0, sizeof fours);
  for (int64_t n = first; n < last; n++) {
    const uint8_t *stored = w->codes + (size_t)n * o->word_bytes;
    uint8_t *out = row_of(o, n);
    for (int64_t u = 0; u < padded(w->K) / UNIT; u++) {
      uint8_t codes[UNIT], rest[16] = {0};
      const uint8_t *p = stored + u * unit_bytes(w);
      size_t left = o->word_bytes - u * unit_bytes(w);
      if (left < unit_bytes(w)) p = memcpy(rest, p, left);
      int end = w->K - u * UNIT < UNIT ? (int)(w->K - u * UNIT) : UNIT;
      if (end == UNIT && !w->by_rows && w->num_bits == 3) {
        uint32_t words[3];
        order_three(p, words, fours);
        for (int v = 0; v < 3; v++) memcpy(out + (size_t)u * unit_bytes(w) * TILE + 64 * v, words + v, 4);
        continue;
      }
      if (end == UNIT && !w->by_rows) { /* 4 times as fast */
        for (int v = 0; v < w->num_bits; v++) {
          uint32_t word;
          memcpy(&word, p + 4 * v, 4);
          for (int i = 0; i < 4; i++) bytes[i & 1][word >> 8 * i & 255]++;
          if (w->num_bits == 4) word = unzip(word);
          memcpy(out + (size_t)u * unit_bytes(w) * TILE + 64 * v, &word, 4);
        }
        continue;
      }
      read_unit(p, w->num_bits, codes);
      for (int i = end; i < UNIT; i++) codes[i] = 0;
      for (int i = 0; i < end; i++) counts[i & 1][codes[i]]++;
      if (w->by_rows) {
        write_unit(codes, w->num_bits, out + u * unit_bytes(w));
      } else {
        uint32_t words[4];
        pack_unit(codes, w->num_bits, words);
        for (int v = 0; v < w->num_bits; v++)
          memcpy(out + (size_t)u * unit_bytes(w) * TILE + 64 * v, words + v, 4);
      }
    }
    copy_scales(o, n, 0);
  }
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0; bit < 8 && w->num_bits != 3; bit += w->num_bits)
      counts[0][byte >> bit & ((1 << w->num_bits) - 1)] += bytes[0][byte] + bytes[1][byte];
  for (int four = 0; four < 4096 && w->num_bits == 3; four++)
    for (int bit = 0; bit < 12; bit += 3) counts[0][four >> bit & 7] += fours[four];
  for (int i = 0; i < 16; i++) atomic_fetch_add(o->counts + i, counts[0][i] + counts[1][i]);
}

static void row_codes(const struct order *o, int64_t n, int64_t u, uint8_t codes[UNIT]) {
  const struct weight *w = o->w;
  const uint8_t *p = row_of(o, n) + (size_t)u * unit_bytes(w) * (w->by_rows ? 1 : TILE);
  if (w->by_rows) { read_unit(p, w->num_bits, codes); return; }
  uint32_t words[4];
  for (int v = 0; v < w->num_bits; v++) memcpy(words + v, p + 64 * v, 4);
  unpack_unit(words, w->num_bits, codes);
}

static void store_rows(int64_t first, int64_t last, void *context) {
  const struct order *o = context;
  const struct weight *w = o->w;
  for (int64_t n = first; n < last; n++) {
    uint8_t *stored = (uint8_t *)w->codes + (size_t)n * o->word_bytes;
    for (int64_t u = 0; u < padded(w->K) / UNIT; u++) {
      uint8_t codes[UNIT], bytes[16];
      row_codes(o, n, u, codes);
      write_unit(codes, w->num_bits, bytes);
      size_t left = o->word_bytes - u * unit_bytes(w);
      memcpy(stored + u * unit_bytes(w), bytes, left < unit_bytes(w) ? left : unit_bytes(w));
    }
    copy_scales(o, n, 1);
  }
}

/* Put a stored weight into the order of kernels. `codes`, of so many bytes, takes the header and the
   codes; `scales` is zero. */
int flute_order(const struct weight *stored, uint8_t *codes, void *scales, int64_t bytes, int exact,
                parallel_fn run) {
  _Atomic int64_t counts[16];
  for (int i = 0; i < 16; i++) atomic_init(counts + i, 0);
  struct order o = {stored, codes + HEADER, scales, counts,
                    (size_t)(stored->K * stored->num_bits + 31) / 32 * 4};
  const int64_t tile_bytes = TILE * (int64_t)row_bytes(stored);
  memset(codes, 0, HEADER);
  if (!stored->by_rows) memset(codes + bytes - tile_bytes, 0, (size_t)tile_bytes); /* rows past N */
  int error = run(0, stored->N, 64, order_rows, &o);
  for (int i = 0; i < 16; i++) {
    int64_t count = atomic_load(counts + i);
    memcpy(codes + 8 * i, &count, 8);
  }
  codes[HEADER_EXACT] = exact != 0;
  return error;
}

/* Undo flute_order: writes what `stored` points to. */
int flute_restore(const struct weight *stored, const uint8_t *codes, const void *scales, parallel_fn run) {
  struct order o = {stored, (uint8_t *)codes + HEADER, (uint8_t *)scales, NULL,
                    (size_t)(stored->K * stored->num_bits + 31) / 32 * 4};
  return run(0, stored->N, 64, store_rows, &o);
}

static float rounded(float value, int type) {
  uint16_t h[2];
  store(h, 0, type, value);
  return load(h, 0, type);
}

struct dense {
  const struct weight *w;
  const struct variant *v;
  uint8_t *out;
  int64_t first, rows;
  int type;
};

static void dense_rows(int64_t first, int64_t last, void *context) {
  const struct dense *d = context;
  const struct weight *w = d->w;
  struct order o = {w, (uint8_t *)w->codes + HEADER, NULL, NULL, 0};
  int64_t groups = w->K / w->group, range = 0;
  int entries = 1 << w->num_bits;
  size_t size = element_bytes(d->type);
  for (int64_t i = first; i < last; i++) {
    int64_t n = d->first + i;
    if (w->ends)
      while (w->ends[range] <= n) range++;
    const float *table = w->tables + (w->ends ? range : w->num_tables > 1 ? n : 0) * entries;
    uint8_t *out = d->out + (size_t)(i * w->K) * size;
    float values[16];
    uint16_t halves[16];
    int64_t group = -1;
    for (int64_t u = 0; u < padded(w->K) / UNIT; u++) {
      uint8_t codes[UNIT];
      if (u * UNIT / w->group != group) {
        group = u * UNIT / w->group;
        float scale = load(w->scales, n * groups + group, w->scale_type);
        for (int c = 0; c < entries; c++) {
          values[c] = rounded(table[c], d->type) * scale;
          if (d->type != F32) store(halves, c, d->type, values[c]);
        }
      }
      row_codes(&o, n, u, codes);
      int end = w->K - u * UNIT < UNIT ? (int)(w->K - u * UNIT) : UNIT;
      if (d->type == F32)
        for (int k = 0; k < end; k++) memcpy(out + 4 * (u * UNIT + k), values + codes[k], 4);
      else
        for (int k = 0; k < end; k++) memcpy(out + 2 * (u * UNIT + k), halves + codes[k], 2);
    }
  }
}

/* A tile at a time: decoded with rows side by side, then turned. */
static void dense_tiles(int64_t first, int64_t last, void *context) {
  const struct dense *d = context;
  const struct weight *w = d->w;
  const size_t size = element_bytes(d->type);
  const int64_t K = padded(w->K);
  float values[UNIT][TILE], table[16];
  struct tiles a = {.code_bytes = (size_t)K / UNIT * 64 * w->num_bits,
                    .scale_bytes = (size_t)(w->K / w->group) * TILE * element_bytes(w->scale_type),
                    .table = table, .K = w->K, .padded_K = K, .group = w->group,
                    .num_bits = w->num_bits, .scale_type = w->scale_type};
  for (int64_t t = first; t < last; t++) {
    int64_t n = d->first + t * TILE, range = 0, rows = w->N - n < TILE ? w->N - n : TILE;
    if (rows > d->rows - t * TILE) rows = d->rows - t * TILE;
    if (w->ends)
      while (w->ends[range] <= n) range++;
    for (int c = 0; c < 1 << w->num_bits; c++)
      table[c] = rounded(w->tables[(range << w->num_bits) + c], d->type);
    a.codes = w->codes + HEADER + (size_t)(n / TILE) * a.code_bytes;
    a.scales = (const uint8_t *)w->scales + (size_t)(n / TILE) * a.scale_bytes;
    uint8_t *out = d->out + (size_t)(t * TILE * w->K) * size;
    if (d->v->halves && d->type != F32) {
      d->v->halves(&a, (int)rows, d->type, (uint16_t *)out);
      continue;
    }
    for (int64_t k = 0; k < K; k += UNIT) {
      int end = w->K - k < UNIT ? (int)(w->K - k) : UNIT;
      d->v->dense(&a, k, values);
      if (d->type == BF16 && end == UNIT) {
        uint32_t pairs[UNIT / 2][TILE];
        for (int i = 0; i < UNIT / 2; i++)
          for (int r = 0; r < TILE; r++) { /* weights are no NaN, so rounding is an addition */
            uint32_t even = to_bits(values[2 * i][r]), odd = to_bits(values[2 * i + 1][r]);
            even = (even + 0x7FFF + (even >> 16 & 1)) >> 16;
            odd = (odd + 0x7FFF + (odd >> 16 & 1)) & 0xFFFF0000;
            pairs[i][r] = even | odd;
          }
        for (int64_t r = 0; r < rows; r++)
          for (int i = 0; i < UNIT / 2; i++)
            memcpy(out + (size_t)(r * w->K + k + 2 * i) * 2, &pairs[i][r], 4);
        continue;
      }
      for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < end; i++) store(out, r * w->K + k + i, d->type, values[i][r]);
    }
  }
}

/* Write rows [first, last) of the weight, of `type`, to out (last - first, K); first is that of a tile. */
int flute_dequantise(const struct weight *w, int64_t first, int64_t last, int type, void *out, int variant,
                     parallel_fn run) {
  struct dense d = {w, flute_variants[variant], out, first, last - first, type};
  if (w->by_rows) return run(0, last - first, 16, dense_rows, &d);
  return run(0, (last - first + TILE - 1) / TILE, 1, dense_tiles, &d);
}
