/* What is between the products of a decoder block (block.h), in plain C that compilers turn into vectors
   of the variant which includes this file. Rows go through fp32 arrays of up to a chunk, so results may
   lie where operands did. Sums are 16 side by side, added by `add_all`. */
#include "block.h"

#define CHUNK 256
#define MAX_DIM CHUNK /* of a head */

/* Vectors as wide as the variant's registers: WIDTH floats, or bits. */
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
#define PARTS (16 / WIDTH)
#define ALIGNED __attribute__((aligned(64))) /* a vector must not lie in two lines of the cache */

INLINE vec vec_at(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* sums[r] = the 16 sums of row r, added as by `add_all`. */
INLINE void add_rows(const vec *parts, int rows, float *sums) {
  typedef float four __attribute__((vector_size(16)));
  for (int r = 0; r < rows; r++) {
    four v[4];
    memcpy(v, parts + r * PARTS, sizeof v);
    v[0] = (v[0] + v[2]) + (v[1] + v[3]);
    sums[r] = (v[0][0] + v[0][2]) + (v[0][1] + v[0][3]);
  }
}

INLINE void widen(const void *from, int64_t first, int64_t n, float *to, const int type) {
  for (int64_t i = 0; i < n; i++) to[i] = load(from, first + i, type);
}

INLINE void narrow(const float *from, void *to, int64_t first, int64_t n, const int type) {
  uint16_t halves[CHUNK];
  if (type == F32) { memcpy((char *)to + 4 * first, from, (size_t)n * 4); return; }
  for (int64_t i = 0; i < n; i++) halves[i] = type == BF16 ? to_bf16(from[i]) : to_f16(from[i]);
  memcpy((char *)to + 2 * first, halves, (size_t)n * 2);
}

/* Round values to a type, in place. */
INLINE void round_all(float *values, int64_t n, const int type) {
  if (type == BF16)
    for (int64_t i = 0; i < n; i++) values[i] = from_bits((uint32_t)to_bf16(values[i]) << 16);
  if (type == F16)
    for (int64_t i = 0; i < n; i++) values[i] = from_f16(to_f16(values[i]));
}

INLINE int64_t chunk_at(int64_t first, int64_t n) { return n - first < CHUNK ? n - first : CHUNK; }

INLINE void norm_row(const struct norm *norm, const void *x, void *out, int64_t n, const int type) {
  float v[CHUNK], weight[CHUNK];
  vec squares[PARTS] = {{0}};
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t count = chunk_at(first, n);
    widen(x, first, count, v, type);
    for (int64_t i = 0; i < count; i += 16)
      for (int p = 0; p < PARTS; p++) squares[p] += vec_at(v + i + p * WIDTH) * vec_at(v + i + p * WIDTH);
  }
  float factor;
  add_rows(squares, 1, &factor);
  factor = 1 / sqrtf(factor / (float)n + norm->eps);
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t count = chunk_at(first, n);
    widen(x, first, count, v, type);
    widen(norm->weight, first, count, weight, type);
    for (int64_t i = 0; i < count; i++) v[i] *= factor;
    round_all(v, count, type);
    for (int64_t i = 0; i < count; i++) v[i] *= weight[i];
    narrow(v, out, first, count, type);
  }
}

INLINE void rotate_head(void *head, const void *cosine, const void *sine, int64_t dim, const int type) {
  const int64_t half = dim / 2;
  float in[MAX_DIM], turned[MAX_DIM], c[MAX_DIM], s[MAX_DIM];
  widen(head, 0, dim, in, type);
  widen(cosine, 0, dim, c, type);
  widen(sine, 0, dim, s, type);
  for (int64_t i = 0; i < half; i++) turned[i] = -in[half + i];
  for (int64_t i = 0; i < half; i++) turned[half + i] = in[i];
  for (int64_t i = 0; i < dim; i++) in[i] *= c[i];
  for (int64_t i = 0; i < dim; i++) turned[i] *= s[i];
  round_all(in, dim, type);
  round_all(turned, dim, type);
  for (int64_t i = 0; i < dim; i++) in[i] += turned[i];
  narrow(in, head, 0, dim, type);
}

/* values[i] = exp(values[i] - shift), of differences <= 0: relative error below 2e-7; 0 below -87, NaN of
   NaN. 2^(i + f) = 2^i * exp(f log 2), |f| <= 1/2: Taylor's polynomial, whose rest is below 2e-8. */
INLINE void exp_all(float *values, int64_t n, float shift) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const vec x = vec_at(values + i) - shift, shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds */
    const vec whole = shifted - 12582912.0f;
    const vec f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* log 2 in two parts */
    vec p = f * (1.0f / 5040) + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const bits is_less = (bits)(x < -87.0f);
    bits power, out;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + 0x3F800000; /* low bits of `shifted`: the integer */
    vec factor;
    memcpy(&factor, &power, sizeof factor);
    p *= factor;
    memcpy(&out, &p, sizeof out);
    out &= ~is_less;
    memcpy(values + i, &out, sizeof out);
  }
}

INLINE void gate_row(const void *gate, const void *up, void *out, int64_t n, const int type) {
  float v[CHUNK], u[CHUNK], e[CHUNK];
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t count = chunk_at(first, n);
    widen(gate, first, count, v, type);
    widen(up, first, count, u, type);
    for (int64_t i = 0; i < count; i++) e[i] = -fabsf(v[i]);
    exp_all(e, count, 0);
    for (int64_t i = 0; i < count; i++) v[i] = v[i] * (v[i] < 0 ? e[i] : 1.0f) / (1.0f + e[i]);
    round_all(v, count, type);
    for (int64_t i = 0; i < count; i++) v[i] *= u[i];
    narrow(v, out, first, count, type);
  }
}

INLINE void add_row(const void *a, const void *b, void *out, int64_t n, const int type) {
  float v[CHUNK], w[CHUNK];
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t count = chunk_at(first, n);
    widen(a, first, count, v, type);
    widen(b, first, count, w, type);
    for (int64_t i = 0; i < count; i++) v[i] += w[i];
    narrow(v, out, first, count, type);
  }
}

/* Four tokens' keys or values as fp32; of tokens past the last, zeros. */
INLINE void four_rows(const struct past *past, int64_t m, int64_t g, int64_t t, int64_t length, int64_t dim,
                      float rows[4][MAX_DIM], const int type) {
  for (int64_t r = 0; r < 4; r++) {
    const int64_t element = m * past->strides[0] + g * past->strides[1] + (t + r) * past->strides[2];
    if (t + r < length) widen(past->data, element, dim, rows[r], type);
    else memset(rows[r], 0, (size_t)dim * sizeof(float));
  }
}

/* What a mask adds to the score of a token. */
INLINE float masked(const struct step *s, int64_t m, int64_t t, const int type) {
  if (t >= s->length) return -INFINITY;
  if (s->mask_kind == BOOLEAN) return ((const uint8_t *)s->mask)[m * s->mask_stride + t] ? 0 : -INFINITY;
  return s->mask_kind == ADDED ? load(s->mask, m * s->mask_stride + t, type) : 0;
}

/* exp(score - the largest) / their sum; zero if all are masked, as PyTorch has it. */
INLINE void softmax(float *scores, int64_t length) {
  float most[16], largest = -INFINITY, total;
  vec sums[PARTS] = {{0}};
  for (int j = 0; j < 16; j++) most[j] = -INFINITY;
  for (int64_t t = 0; t < length; t += 16)
    for (int j = 0; j < 16; j++) most[j] = scores[t + j] > most[j] ? scores[t + j] : most[j];
  for (int j = 0; j < 16; j++) largest = most[j] > largest ? most[j] : largest; /* a NaN goes on below */
  if (largest == -INFINITY) largest = 0;
  exp_all(scores, length, largest);
  for (int64_t t = 0; t < length; t += 16)
    for (int p = 0; p < PARTS; p++) sums[p] += vec_at(scores + t + p * WIDTH);
  add_rows(sums, 1, &total);
  const float factor = total == 0 ? 0 : 1 / total;
  for (int64_t t = 0; t < length; t++) scores[t] *= factor;
}

INLINE void attend_group(const struct block *b, const struct step *s, int64_t m, int64_t g, float *scratch,
                         void *out, const int type) {
  const int64_t dim = b->dim, heads = b->heads / b->groups, length = round_up(s->length, 16);
  const int64_t first = (m * b->heads + g * heads) * dim;
  ALIGNED float rows[4][MAX_DIM];
  float *scores = scratch, *q = scores + heads * length, *sums = q + heads * dim;
  widen(s->q, first, heads * dim, q, type);
  memset(sums, 0, (size_t)(heads * dim) * sizeof(float));
  for (int64_t t = 0; t < length; t += 4) {
    four_rows(&s->keys, m, g, t, s->length, dim, rows, type);
    for (int64_t h = 0; h < heads; h++) {
      vec products[4 * PARTS] = {{0}};
      for (int64_t i = 0; i < dim; i += 16)
        for (int p = 0; p < PARTS; p++) {
          const vec of = vec_at(q + h * dim + i + p * WIDTH);
          for (int r = 0; r < 4; r++) products[r * PARTS + p] += of * vec_at(rows[r] + i + p * WIDTH);
        }
      float *four = scores + h * length + t;
      add_rows(products, 4, four);
      for (int r = 0; r < 4; r++) four[r] *= b->scaling;
    }
    for (int r = 0; r < 4; r++) {
      const float added = masked(s, m, t + r, type);
      for (int64_t h = 0; h < heads; h++) scores[h * length + t + r] += added;
    }
  }
  for (int64_t h = 0; h < heads; h++) softmax(scores + h * length, length);
  for (int64_t t = 0; t < length; t += 4) {
    four_rows(&s->values, m, g, t, s->length, dim, rows, type);
    for (int64_t h = 0; h < heads; h++) {
      const float *p = scores + h * length + t;
      for (int64_t i = 0; i < dim; i += WIDTH) {
        vec sum = vec_at(sums + h * dim + i);
        for (int r = 0; r < 4; r++) sum += p[r] * vec_at(rows[r] + i);
        memcpy(sums + h * dim + i, &sum, sizeof sum);
      }
    }
  }
  for (int64_t h = 0; h < heads; h++) narrow(sums + h * dim, out, first + h * dim, dim, type);
}

/* The same for each type, which is a constant once inlined. */
#define BY_TYPE(CALL)                             \
  if (type == BF16) { const int T = BF16; CALL; } \
  else if (type == F16) { const int T = F16; CALL; } \
  else { const int T = F32; CALL; }

static void step_norm(const struct norm *norm, const void *x, void *out, int64_t n, int type) {
  BY_TYPE(norm_row(norm, x, out, n, T))
}
static void step_rotate(void *head, const void *cosine, const void *sine, int64_t dim, int type) {
  BY_TYPE(rotate_head(head, cosine, sine, dim, T))
}
static void step_gate(const void *gate, const void *up, void *out, int64_t n, int type) {
  BY_TYPE(gate_row(gate, up, out, n, T))
}
static void step_add(const void *a, const void *b, void *out, int64_t n, int type) {
  BY_TYPE(add_row(a, b, out, n, T))
}
static void step_attend(const struct block *b, const struct step *s, int64_t m, int64_t g, float *scratch,
                        void *out) {
  const int type = b->type;
  BY_TYPE(attend_group(b, s, m, g, scratch, out, T))
}

static const struct steps all_steps = {step_norm, step_rotate, step_gate, step_add, step_attend};
