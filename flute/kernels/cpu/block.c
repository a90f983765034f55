/* Entry points of a decoder block: products by flute_multiply, what is between them by the variant's
   steps, with no return to the caller. See block.h. */
#include "block.h"

#include <stdlib.h>

/* lut.c */
int flute_multiply(const struct weight *weights, const struct result *results, int count,
                   const struct tokens *t, int variant, int exact, parallel_fn run);

struct library {
  const struct variant *v;
  int variant, exact;
  parallel_fn run;
};

static char *row(const void *tensor, int64_t m, int64_t n, int type) {
  return (char *)(uintptr_t)tensor + (size_t)(m * n) * element_bytes(type);
}

/* Multiply x by some of the block's projections: those of one layout in one call. */
static int project(const struct block *b, const struct library *l, const void *x, int64_t M,
                   enum projection first, int count, void *const *outs) {
  struct result results[3];
  for (int i = 0; i < count; i++) {
    results[i] = b->biases[first + i];
    results[i].out = outs[i];
  }
  for (int i = 0; i < count;) {
    const struct weight *w = b->weights + first + i;
    const struct tokens tokens = {x, M, w->K, b->type};
    int alike = 1;
    while (i + alike < count && w[alike].num_bits == w->num_bits && w[alike].group == w->group &&
           w[alike].by_rows == w->by_rows)
      alike++;
    int error = flute_multiply(w, results + i, alike, &tokens, l->variant, l->exact, l->run);
    if (error) return error;
    i += alike;
  }
  return 0;
}

/* Normalise x and compute q, k and v, rotated. Returns as flute_multiply does. */
int flute_block_before(const struct block *b, const struct step *s, int variant, int exact, parallel_fn run) {
  const struct library l = {flute_variants[variant], variant, exact, run};
  const struct steps *steps = l.v->steps;
  const int type = b->type;
  char *normed = malloc((size_t)(s->M * b->hidden) * element_bytes(type));
  if (!normed) return 1;
  for (int64_t m = 0; m < s->M; m++)
    steps->norm(&b->before, row(s->x, m, b->hidden, type), row(normed, m, b->hidden, type), b->hidden, type);
  void *const outs[] = {s->q, s->k, s->v};
  const int error = project(b, &l, normed, s->M, TO_Q, 3, outs);
  free(normed);
  if (error) return error;
  for (int64_t m = 0; m < s->M; m++)
    for (int64_t h = 0; h < b->heads + b->groups; h++) {
      const int is_q = h < b->heads;
      char *head = is_q ? row(s->q, m * b->heads + h, b->dim, type)
                        : row(s->k, m * b->groups + h - b->heads, b->dim, type);
      const struct norm *norm = is_q ? &b->q : &b->k;
      if (norm->weight) steps->norm(norm, head, head, b->dim, type);
      steps->rotate(head, row(s->cosine, m, s->angle_stride, type), row(s->sine, m, s->angle_stride, type),
                    b->dim, type);
    }
  return 0;
}

struct attention {
  const struct block *b;
  const struct step *s;
  const struct steps *steps;
  float *scratch;
  void *out;
};

/* Groups [first, last) of all sequences. */
static void attend_range(int64_t first, int64_t last, void *context) {
  const struct attention *a = context;
  const int64_t floats = attend_floats(a->b, a->s->length);
  for (int64_t i = first; i < last; i++)
    a->steps->attend(a->b, a->s, i / a->b->groups, i % a->b->groups, a->scratch + i * floats, a->out);
}

/* Attend, and compute the block's result; out may be no part of x. Returns as flute_multiply does. */
int flute_block_after(const struct block *b, const struct step *s, int variant, int exact, parallel_fn run) {
  const struct library l = {flute_variants[variant], variant, exact, run};
  const struct steps *steps = l.v->steps;
  const int type = b->type;
  const int64_t width = b->heads * b->dim, most = width > b->hidden ? width : b->hidden, M = s->M;
  const int64_t floats = attend_floats(b, s->length);
  const size_t bytes = element_bytes(type), wide = (size_t)(M * most) * bytes, inner = (size_t)(M * b->inner) * bytes;
  /* Each starts at a multiple of 4 bytes, since widths are multiples of 16. */
  void *memory = malloc(64 + (size_t)(M * b->groups * floats) * sizeof(float) + 2 * wide + 2 * inner);
  if (!memory) return 1;
  float *scratch = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
  char *one = (char *)(scratch + M * b->groups * floats), *two = one + wide, *gate = two + wide, *up = gate + inner;
  struct attention attention = {b, s, steps, scratch, one};
  /* As in flute_multiply, a thread's share takes about 10 us at least. */
  const int64_t grain = (1 << 17) / (2 * b->heads / b->groups * b->dim * s->length) + 1;
  int error = run(0, M * b->groups, grain, attend_range, &attention) ? 2 : 0;
  void *outs[] = {two, NULL};
  if (!error) error = project(b, &l, one, M, TO_OUT, 1, outs);
  for (int64_t m = 0; m < M && !error; m++) {
    char *out = row(s->out, m, b->hidden, type);
    steps->add(row(s->x, m, b->hidden, type), row(two, m, b->hidden, type), out, b->hidden, type);
    steps->norm(&b->after, out, row(one, m, b->hidden, type), b->hidden, type);
  }
  outs[0] = gate;
  outs[1] = up;
  if (!error) error = project(b, &l, one, M, TO_GATE, 2, outs);
  for (int64_t m = 0; m < M && !error; m++) {
    char *gated = row(gate, m, b->inner, type);
    steps->gate(gated, row(up, m, b->inner, type), gated, b->inner, type);
  }
  outs[0] = one;
  if (!error) error = project(b, &l, gate, M, TO_DOWN, 1, outs);
  for (int64_t m = 0; m < M && !error; m++) {
    char *out = row(s->out, m, b->hidden, type);
    steps->add(out, row(one, m, b->hidden, type), out, b->hidden, type);
  }
  free(memory);
  return error;
}

/* Put a token's keys or values, (M * groups, dim), at the end of those before. */
static void append(const void *from, void *to, int64_t rows, int64_t place, int64_t capacity, size_t bytes) {
  for (int64_t i = 0; i < rows; i++)
    memcpy((char *)to + (size_t)(i * capacity + place) * bytes, (const char *)from + (size_t)i * bytes, bytes);
}

/* Run blocks one after another; of the step `x`, `out`, angles, mask, M and length are given, and the
   length counts the new token. Returns as flute_multiply does. */
int flute_blocks(const struct blocks *all, const struct step *given, int variant, int exact, parallel_fn run) {
  const struct block *b = all->each[0];
  const int64_t M = given->M, size = M * b->groups * all->capacity * b->dim;
  const size_t bytes = element_bytes(b->type), row_bytes = (size_t)b->dim * bytes;
  const size_t x_bytes = (size_t)(M * b->hidden) * bytes, kv_bytes = (size_t)(M * b->groups) * row_bytes;
  size_t q_bytes = 0;
  for (int64_t i = 0; i < all->count; i++) {
    const size_t of = (size_t)(M * all->each[i]->heads) * row_bytes;
    q_bytes = of > q_bytes ? of : q_bytes;
  }
  char *memory = malloc(2 * x_bytes + 2 * kv_bytes + q_bytes);
  if (!memory) return 1;
  char *now = memory, *next = now + x_bytes, *k = next + x_bytes, *v = k + kv_bytes;
  struct step s = *given;
  int error = 0;
  s.q = v + kv_bytes, s.k = k, s.v = v;
  for (int64_t i = 0; i < all->count && !error; i++) {
    b = all->each[i];
    char *keys = (char *)all->past + (size_t)(2 * i * size) * bytes, *values = keys + (size_t)size * bytes;
    s.out = next;
    error = flute_block_before(b, &s, variant, exact, run);
    append(k, keys, M * b->groups, s.length - 1, all->capacity, row_bytes);
    append(v, values, M * b->groups, s.length - 1, all->capacity, row_bytes);
    s.keys = (struct past){keys, {b->groups * all->capacity * b->dim, all->capacity * b->dim, b->dim}};
    s.values = s.keys;
    s.values.data = values;
    if (!error) error = flute_block_after(b, &s, variant, exact, run);
    s.x = next;
    next = now;
    now = s.out;
  }
  for (int64_t m = 0; m < M && !error; m++)
    flute_variants[variant]->steps->norm(&all->last, row(now, m, b->hidden, b->type),
                                         row(given->out, m, b->hidden, b->type), b->hidden, b->type);
  free(memory);
  return error;
}
