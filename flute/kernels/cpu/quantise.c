/* Quantising rows of weights, in parallel: nearest entries, and the search for each group's scale.

   Bit for bit what the PyTorch path computes (flute/methods/nearest.py, mse.py), by the same operations
   on fp32 in the same order, none of them fused; its cumulative sums are of fp64, rounded. */
#include "lut.h"

#include <math.h>
#include <stdlib.h>

struct nearest {
  const float *weight, *scales, *bounds;
  const uint8_t *order;
  uint8_t *codes;
  int64_t K, group;
  int entries, per_row;
  const struct variant *v;
};

static void nearest_rows(int64_t first, int64_t last, void *context) {
  const struct nearest *a = context;
  const int64_t groups = a->K / a->group;
  for (int64_t n = first; n < last; n++) {
    const int64_t table = a->per_row ? n : 0;
    for (int64_t g = 0; g < groups; g++) {
      const float scale = a->scales[n * groups + g];
      const int64_t at = n * a->K + g * a->group;
      a->v->nearest(a->weight + at, a->group, scale == 0 ? INFINITY : scale,
                    a->bounds + table * (a->entries - 1), a->order + table * a->entries,
                    a->entries, a->codes + at);
    }
  }
}

/* codes[n, k] = order[the number of bounds below weight[n, k] / scales[n, k / group]].
   weight (N, K) and scales (N, K / group) fp32; bounds (1 | N, entries - 1) ascending, order (1 | N,
   entries): where the entry of a rank is in the table. */
int flute_nearest(const float *weight, const float *scales, const float *bounds, const uint8_t *order,
                  int64_t N, int64_t K, int64_t group, int entries, int per_row, uint8_t *codes,
                  int variant, parallel_fn run) {
  struct nearest a = {weight, scales, bounds, order, codes, K, group, entries, per_row, flute_variants[variant]};
  return run(0, N, (1 << 16) / K + 1, nearest_rows, &a) ? 2 : 0;
}

#define MAX_ENTRIES 16
#define CANDIDATES 12
#define MAX_BOUNDS (CANDIDATES * (MAX_ENTRIES - 1))

/* What is tried with a table, or with its negative: as PyTorch computed it. */
struct trial {
  float candidates[MAX_ENTRIES], midpoints[MAX_ENTRIES], steps[MAX_ENTRIES], square_steps[MAX_ENTRIES];
  float low, low_norm; /* the lowest entry; its square times the length of a group */
};

/* Bounds between entries for all candidates: those of a normalised group are the same for all. */
struct bounds {
  float ascending[MAX_BOUNDS + 1];                 /* the last: infinity */
  uint8_t place[MAX_ENTRIES - 1][CANDIDATES];      /* where a candidate's bound is among them */
};

struct search {
  const float *weight;
  const struct trial *trials; /* (1 | N, 2) */
  float *scales;
  int64_t K, group;
  int entries, refinements, per_row;
  _Atomic int failed;
};

/* Ascending; runs of 16 by insertion, then merged. `spare` is as long. */
static void sort(float *a, float *spare, int64_t length) {
  for (int64_t first = 0; first < length; first += 16) {
    const int64_t last = first + 16 < length ? first + 16 : length;
    for (int64_t i = first + 1; i < last; i++) {
      const float value = a[i];
      int64_t j = i;
      for (; j > first && a[j - 1] > value; j--) a[j] = a[j - 1];
      a[j] = value;
    }
  }
  float *from = a, *to = spare;
  for (int64_t width = 16; width < length; width *= 2) {
    for (int64_t first = 0; first < length; first += 2 * width) {
      const int64_t middle = first + width < length ? first + width : length;
      const int64_t last = first + 2 * width < length ? first + 2 * width : length;
      int64_t i = first, j = middle, k = first;
      while (i < middle && j < last) {
        const int second = from[j] < from[i];
        to[k++] = second ? from[j] : from[i];
        j += second;
        i += !second;
      }
      while (i < middle) to[k++] = from[i++];
      while (j < last) to[k++] = from[j++];
    }
    float *swap = from;
    from = to;
    to = swap;
  }
  if (from != a) memcpy(a, from, (size_t)length * sizeof *a);
}

static void sort_bounds(const struct trial *t, int entries, struct bounds *b) {
  int count = 0, from[MAX_BOUNDS];
  for (int j = 0; j < entries - 1; j++)
    for (int c = 0; c < CANDIDATES; c++, count++) {
      const float bound = t->candidates[c] * t->midpoints[j];
      int i = count;
      for (; i > 0 && b->ascending[i - 1] > bound; i--) {
        b->ascending[i] = b->ascending[i - 1];
        from[i] = from[i - 1];
      }
      b->ascending[i] = bound;
      from[i] = j * CANDIDATES + c;
    }
  b->ascending[count] = INFINITY;
  for (int i = 0; i < count; i++) b->place[from[i] / CANDIDATES][from[i] % CANDIDATES] = (uint8_t)i;
}

/* below[i]: how many weights are at or below bound i. Both ascend to an infinity: one step takes a
   weight or a bound, without a branch. */
static void count_below(const float *ascending, int64_t length, const float *bounds, int count, int32_t *below) {
  int32_t weight = 0, bound = 0;
  for (int64_t step = 0; step < length + count; step++) {
    const int take = ascending[weight] <= bounds[bound];
    below[bound] = weight;
    weight += take;
    bound += !take;
  }
}

/* Of the codes of each of `count` scales: <w, c>^2 / <c, c>, or -1; and the best scale <w, c> / <c, c>. */
INLINE void gains_of(const struct trial *t, const float *sums_above, int64_t length, int entries,
                     const int count, int32_t below[][CANDIDATES], float *gains, float *scales) {
  float dot[CANDIDATES], norm[CANDIDATES];
  for (int c = 0; c < count; c++) {
    dot[c] = t->low * sums_above[0];
    norm[c] = t->low_norm;
  }
  for (int j = 0; j < entries - 1; j++)
    for (int c = 0; c < count; c++) {
      dot[c] = dot[c] + sums_above[below[j][c]] * t->steps[j];
      norm[c] = norm[c] + (float)((int32_t)length - below[j][c]) * t->square_steps[j];
    }
  for (int c = 0; c < count; c++) {
    const float positive = norm[c] > 0x1p-126f ? norm[c] : 0x1p-126f;
    scales[c] = dot[c] / positive;
    gains[c] = dot[c] > 0 ? dot[c] * dot[c] / positive : -1.0f;
  }
}

/* The same for one scale that is no candidate: its bounds are searched by halves, side by side. */
static float gain_of(const struct trial *t, const float *ascending, const float *sums_above, int64_t length,
                     int entries, float scale, float *best) {
  float bound[MAX_ENTRIES], gain;
  int32_t at[MAX_ENTRIES] = {0}, below[MAX_ENTRIES - 1][CANDIDATES];
  for (int j = 0; j < entries - 1; j++) bound[j] = scale * t->midpoints[j];
  for (int32_t left = (int32_t)length; left > 1; left -= left / 2)
    for (int j = 0; j < entries - 1; j++)
      at[j] += ascending[at[j] + left / 2 - 1] <= bound[j] ? left / 2 : 0;
  for (int j = 0; j < entries - 1; j++) below[j][0] = at[j] + (ascending[at[j]] <= bound[j]);
  gains_of(t, sums_above, length, entries, 1, below, &gain, best);
  return gain;
}

static float search_group(const struct search *s, const float *weight, const struct trial *trials,
                          const struct bounds *bounds, float *scratch) {
  const int64_t length = s->group;
  const int num_bounds = CANDIDATES * (s->entries - 1);
  float *ascending = scratch, *sums_above = scratch + length + 1, largest = 0;
  for (int64_t i = 0; i < length; i++) largest = fabsf(weight[i]) > largest ? fabsf(weight[i]) : largest;
  const float unit = largest == 0 ? 1 : largest;
  for (int64_t i = 0; i < length; i++) ascending[i] = weight[i] / unit;
  sort(ascending, sums_above, length);
  ascending[length] = INFINITY;
  double sum = 0;
  sums_above[length] = 0;
  for (int64_t i = length - 1; i >= 0; i--) {
    sum += ascending[i];
    sums_above[i] = (float)sum;
  }
  float best_gain = 0, best_scale = 0;
  for (int sign = 0; sign < 2; sign++) {
    const struct trial *t = trials + sign;
    int32_t at[MAX_BOUNDS + 1], below[MAX_ENTRIES - 1][CANDIDATES];
    float gains[CANDIDATES], scales[CANDIDATES];
    count_below(ascending, length, bounds[sign].ascending, num_bounds, at);
    for (int j = 0; j < s->entries - 1; j++)
      for (int c = 0; c < CANDIDATES; c++) below[j][c] = at[bounds[sign].place[j][c]];
    gains_of(t, sums_above, length, s->entries, CANDIDATES, below, gains, scales);
    int winner = 0;
    for (int c = 1; c < CANDIDATES; c++) winner = gains[c] > gains[winner] ? c : winner;
    float gain = gains[winner], scale = scales[winner];
    for (int round = 0;; round++) {
      if (gain > best_gain) {
        best_gain = gain;
        best_scale = sign ? -scale : scale;
      }
      if (round == s->refinements) break;
      gain = gain_of(t, ascending, sums_above, length, s->entries, scale, &scale);
    }
  }
  return best_scale * largest;
}

static void search_rows(int64_t first, int64_t last, void *context) {
  struct search *s = context;
  const int64_t groups = s->K / s->group;
  struct bounds bounds[2];
  float *scratch = malloc((size_t)(2 * s->group + 2) * sizeof(float));
  if (!scratch) {
    s->failed = 1;
    return;
  }
  for (int64_t n = first; n < last; n++) {
    const struct trial *trials = s->trials + (s->per_row ? 2 * n : 0);
    if (n == first || s->per_row)
      for (int sign = 0; sign < 2; sign++) sort_bounds(trials + sign, s->entries, bounds + sign);
    for (int64_t g = 0; g < groups; g++)
      s->scales[n * groups + g] =
          search_group(s, s->weight + n * s->K + g * s->group, trials, bounds, scratch);
  }
  free(scratch);
}

/* The signed scale of least squared error of each group: scales (N, K / group), fp32. trials: (1 | N, 2),
   each with all its candidates. */
int flute_search(const float *weight, const struct trial *trials, int64_t N, int64_t K, int64_t group,
                 int entries, int refinements, int per_row, float *scales, int variant, parallel_fn run) {
  struct search s = {weight, trials, scales, K, group, entries, refinements, per_row, 0};
  (void)variant;
  if (run(0, N, (1 << 12) / K + 1, search_rows, &s)) return 2;
  return s.failed ? 1 : 0;
}
