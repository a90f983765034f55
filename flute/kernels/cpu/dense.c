/* Products with a dense weight, of up to 8 tokens: what stays dense is read as fast as memory gives it.

   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n],   summed in fp32, in the order of rows.h */
#include "lut.h"

#include <stdlib.h>

struct dense_call {
  const struct dense_weight *w;
  const struct result *r;
  const struct tokens *t;
  const struct variant *v;
  struct dense_rows rows;
};

static void multiply_range(int64_t first, int64_t last, void *context) {
  const struct dense_call *c = context;
  const struct dense_weight *w = c->w;
  const struct result *r = c->r;
  const size_t bytes = (size_t)w->K * element_bytes(w->type);
  float sums[MAX_TOKENS];
  for (int64_t n = first; n < last; n++) {
    c->v->row(&c->rows, (const char *)w->data + (size_t)n * bytes, sums);
    const float bias = r->bias ? load(r->bias, n, r->bias_type) : 0;
    for (int64_t m = 0; m < c->t->M; m++)
      store(r->out, m * w->N + n, c->t->x_type, r->bias ? sums[m] + bias : sums[m]);
  }
}

/* Multiply 1 to 8 tokens by a weight. Returns 0; 1: no memory; 2: the thread pool failed. */
int flute_dense(const struct dense_weight *w, const struct result *r, const struct tokens *t, int variant,
                parallel_fn run) {
  const int64_t K = round_up(w->K, DENSE_UNIT), half = DENSE_UNIT / 2;
  char *memory = calloc(1, 64 + (size_t)(t->M * K) * sizeof(float));
  if (!memory) return 1;
  float *x = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); /* vectors in one line of the cache */
  for (int64_t m = 0; m < t->M; m++)
    for (int64_t k = 0; k < w->K; k++) {
      const int64_t i = k % DENSE_UNIT, to = w->type == BF16 ? i / 2 + i % 2 * half : i;
      x[(k - i) * t->M + m * DENSE_UNIT + to] = load(t->x, m * t->x_stride + k, t->x_type);
    }
  struct dense_call call = {w, r, t, flute_variants[variant],
                            {.x = x, .M = t->M, .K = w->K, .type = w->type}};
  /* As in flute_multiply, a thread's share takes about 10 us at least. */
  const int error = run(0, w->N, (1 << 17) / K + 1, multiply_range, &call);
  free(memory);
  return error ? 2 : 0;
}
