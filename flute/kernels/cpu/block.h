/* A decoder block of a transformer with one new token of each of M sequences: what its files share.

   n = norm(x), q k v = rotate(norms(n Wq Wk Wv))        flute_block_before
   the caller puts k and v behind those of earlier tokens
   h = x + attend(q, keys, values) Wo                    flute_block_after
   out = h + (silu(norm(h) Wgate) * norm(h) Wup) Wdown

   norm(x) = x / sqrt(mean(x^2) + eps) * weight; rotate turns the halves of a head by an angle a pair;
   H heads attend to the keys and values of G, H / G to one. All tensors are of one type, and each
   value that a framework would hold in a tensor is rounded to it; sums are of fp32. They have 16
   parts, added in one order, so results are the same for all variants and numbers of threads.

   flute_blocks runs all blocks of a model so, one after another, and normalises the last result; keys and
   values lie in memory that it puts the new ones into.

   block.c    the entry points            steps.h    what is between products, for each variant

   All this is what LlamaDecoderLayer of transformers and its relatives compute; q and k may be
   normalised a head at a time (Qwen3), and products may have biases (Qwen2). */
#ifndef FLUTE_BLOCK_H
#define FLUTE_BLOCK_H

#include "lut.h"

enum projection { TO_Q, TO_K, TO_V, TO_OUT, TO_GATE, TO_UP, TO_DOWN, PROJECTIONS };

struct norm {
  const void *weight; /* NULL: there is none */
  float eps;
};

struct block {
  struct weight weights[PROJECTIONS];
  struct result biases[PROJECTIONS]; /* without `out` */
  struct norm before, after, q, k;   /* before attention and after it; of heads */
  int64_t hidden, inner, heads, groups, dim; /* groups: heads of keys and values; dim of a head */
  float scaling;
  int32_t type;
};

/* Keys or values, (M, groups, length, dim); a token's dim elements lie side by side. */
struct past {
  const void *data;
  int64_t strides[3]; /* elements between sequences, heads, tokens */
};

enum mask_kind { NO_MASK, BOOLEAN, ADDED };

struct step {
  const void *x;           /* (M, hidden) */
  void *q, *k, *v;         /* (M, heads | groups, dim) */
  const void *cosine, *sine; /* (M, dim), rows angle_stride elements apart */
  int64_t M, angle_stride;
  struct past keys, values;
  int64_t length;
  const void *mask;        /* (M, length), rows mask_stride elements apart */
  int64_t mask_stride;
  void *out;               /* (M, hidden) */
  int32_t mask_kind;       /* BOOLEAN: bytes, 0 where there is nothing to attend to; ADDED: of the type */
};

/* Blocks one after another. Keys and values are (count, 2, M, groups, capacity, dim): of each block its
   keys, then its values; the new token is the last of `length`. */
struct blocks {
  const struct block *const *each; /* of the same hidden, groups, dim and type */
  int64_t count;
  void *past;
  int64_t capacity;
  struct norm last;
};

/* Steps of one row or head, of n elements; n and dim are multiples of 16. */
struct steps {
  void (*norm)(const struct norm *norm, const void *x, void *out, int64_t n, int type);
  void (*rotate)(void *head, const void *cosine, const void *sine, int64_t dim, int type);
  void (*gate)(const void *gate, const void *up, void *out, int64_t n, int type); /* silu(gate) * up */
  void (*add)(const void *a, const void *b, void *out, int64_t n, int type);
  /* The heads of group g of sequence m; scratch: attend_floats of the block and the length. */
  void (*attend)(const struct block *b, const struct step *s, int64_t m, int64_t g, float *scratch, void *out);
};

static inline int64_t attend_floats(const struct block *b, int64_t length) {
  return b->heads / b->groups * (round_up(length, 16) + 2 * b->dim);
}

#endif
