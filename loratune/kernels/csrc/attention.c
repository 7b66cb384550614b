/* Causal self-attention over packed rows; reference.py says what each function computes. */
#include <omp.h>

#include "numbers.h"

/* Products. Along the sum, numbers lie in units: two of bfloat16, one of float32. */
#ifdef BFLOAT16
#define STEP 2
static inline unit join(real even, real odd) { return even | (unit)odd << 16; }
static inline real part(unit both, int64_t number) { return number % 2 ? both >> 16 : both & 0xffff; }
static inline vector dot(vector sum, units a, units b) {
#ifdef __AVX512BF16__
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + (vector)(a << 16) * (vector)(b << 16) + (vector)(a & 0xffff0000u) * (vector)(b & 0xffff0000u);
#endif
}
#else
#define STEP 1
static inline unit join(real even, real odd) { (void)odd; word w = {.value = even}; return w.bits; }
static inline real part(unit one, int64_t number) { (void)number; word w = {.bits = one}; return w.value; }
static inline vector dot(vector sum, units a, units b) { return sum + (vector)a * (vector)b; }
#endif

#define LANES 16 /* columns of a vector */
#define CHUNK 64 /* columns that are computed at once */
static inline int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static void *allocate(int64_t count, int64_t size) { return aligned_alloc(64, up(count * size + 64, 64)); }

/* Four rows by so many vectors of columns: the sum over k of left[row][k * step] times right[k * width ...]. */
static inline __attribute__((always_inline)) void multiply(int vectors, float *product, int64_t stride,
                                                           const unit *const left[4], int64_t step, const unit *right,
                                                           int64_t width, int64_t from, int64_t past) {
    vector sum[4][4] = {0};
    for (int64_t k = from; k < past; k++) {
        const units *b = (const units *)(right + k * width);
        for (int r = 0; r < 4; r++) {
            units a = left[r][k * step] - (units){0};
            for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], a, b[v]);
        }
    }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) *(vector *)(product + r * stride + 16 * v) = sum[r][v];
}

/* The same for as many columns as there are, a chunk at most. */
static void products(int64_t columns, float *product, int64_t stride, const unit *const left[4], int64_t step,
                     const unit *right, int64_t width, int64_t from, int64_t past) {
    if (columns > 48) multiply(4, product, stride, left, step, right, width, from, past);
    else if (columns > 32) multiply(3, product, stride, left, step, right, width, from, past);
    else if (columns > 16) multiply(2, product, stride, left, step, right, width, from, past);
    else multiply(1, product, stride, left, step, right, width, from, past);
}

/* A vector of columns of the transpose of rows of `size` numbers, in units: (size / STEP, width); zero beyond `count`. */
static inline void across(unit *to, const real *from, int64_t column, int64_t count, int64_t size, int64_t width) {
    int64_t long_ = size / STEP;
    for (int64_t d = 0; d < long_; d++)
        for (int64_t j = 0; j < LANES; j++)
            to[d * width + column + j] = column + j < count ? ((const unit *)from)[(column + j) * long_ + d] : 0;
}

/* STEP rows as one row of units: (width,). Rows that are NULL, what is beyond `size`, and what is lost, are zero.
   Returns 1 if something of the first row is lost, plus 2 for the second. */
static inline int along(unit *to, const real *even, const real *odd, int64_t size, int64_t width) {
    int lost = 0;
    if (even != NULL && odd != NULL)
        ANY(lost) for (int64_t d = 0; d < size; d++) {
            to[d] = join(kept(even[d]), kept(odd[d]));
            lost |= is_lost(even[d]) | is_lost(odd[d]) << 1;
        }
    else
        for (int64_t d = 0; d < size; d++) {
            to[d] = even != NULL ? join(kept(even[d]), 0) : 0;
            lost |= even != NULL ? is_lost(even[d]) : 0;
        }
    for (int64_t d = size; d < width; d++) to[d] = 0;
    return lost;
}

/* Whether any of the rows that such sums go over has lost numbers. lost: of each row, 1 or 0. */
static inline int any_lost(const uint8_t *lost, int64_t from, int64_t past) {
    return past > from && memchr(lost + from, 1, past - from) != NULL;
}

/* Adds to a sum what was kept out of it: of one row, what is lost, times its weight. */
static inline void add_lost(float *sum, float weight, const real *row, int64_t columns) {
    for (int64_t d = 0; d < columns; d++)
        if (is_lost(row[d])) sum[d] += weight * get(row[d]);
}

/* Attention. A tile is (first, end, begin): queries from `first` to `end`, none of which sees a key before `begin`. In
   it, a row is one head of one query; the heads of a query share a group's keys, and follow one another. */
typedef struct {
    const int32_t *starts;
    int64_t tokens, groups, heads, size, padded, width;
    int64_t first, end, begin, keys, rows, blocks;
} tile;

static inline tile tile_of(const int32_t *starts, const int64_t *bounds, int64_t tokens, int64_t groups, int64_t heads,
                           int64_t size) {
    tile t = {.starts = starts, .tokens = tokens, .groups = groups, .heads = heads, .size = size};
    t.padded = up(size, LANES), t.first = bounds[0], t.end = bounds[1], t.begin = bounds[2];
    t.keys = t.end - t.begin, t.width = up(t.keys, LANES);
    t.rows = (t.end - t.first) * heads, t.blocks = (t.rows + 3) / 4;
    return t;
}

static int64_t most_keys(const int64_t *tiles, int64_t count) {
    int64_t most = 0;
    for (int64_t n = 0; n < count; n++)
        if (tiles[3 * n + 1] - tiles[3 * n + 2] > most) most = tiles[3 * n + 1] - tiles[3 * n + 2];
    return up(most, LANES);
}

static int64_t most_rows(const int64_t *tiles, int64_t count, int64_t heads) {
    int64_t most = 0;
    for (int64_t n = 0; n < count; n++)
        if (tiles[3 * n + 1] - tiles[3 * n] > most) most = tiles[3 * n + 1] - tiles[3 * n];
    return up(most * heads, 4);
}

static inline int64_t query_of(const tile *t, int64_t row) { return t->first + row / t->heads; }
static inline int64_t from_of(const tile *t, int64_t row) { return t->starts[query_of(t, row)] - t->begin; }
static inline int64_t past_of(const tile *t, int64_t row) { return query_of(t, row) + 1 - t->begin; }
/* Where a row lies in (groups, tokens, heads), and in (tokens, groups, heads). */
static inline int64_t by_group(const tile *t, int64_t group, int64_t row) {
    return (group * t->tokens + t->first) * t->heads + row;
}
static inline int64_t by_token(const tile *t, int64_t group, int64_t row) {
    return (query_of(t, row) * t->groups + group) * t->heads + row % t->heads;
}

/* Keys or values of a tile, transposed: (groups, size / STEP, width). Shared out among the threads that call it. */
static void keys_across(unit *to, const real *keys, const tile *t) {
    int64_t parts = t->width / LANES;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < t->groups * parts; n++) {
        int64_t group = n / parts;
        const real *from = keys + (group * t->tokens + t->begin) * t->size;
        across(to + group * (t->size / STEP) * t->width, from, n % parts * LANES, t->keys, t->size, t->width);
    }
}

/* Keys or values of a tile, in units: (groups, width / STEP, padded). lost: (groups, width), which have lost numbers. */
static void keys_along(unit *to, uint8_t *lost, const real *keys, const tile *t) {
    int64_t parts = t->width / STEP;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < t->groups * parts; n++) {
        int64_t group = n / parts, key = n % parts * STEP;
        const real *from = keys + (group * t->tokens + t->begin + key) * t->size;
        const real *next = key + STEP - 1 < t->keys ? from + (STEP - 1) * t->size : NULL;
        int found = along(to + n * t->padded, key < t->keys ? from : NULL, next, t->size, t->padded);
        for (int s = 0; s < STEP; s++) lost[n * STEP + s] = found >> s & 1;
    }
}

static inline void normalise(real *row, float *total, float *scores, float scale, int64_t from, int64_t past) {
    float most = -INFINITY, sum = 0;
    MOST(most) for (int64_t j = from; j < past; j++) most = scores[j] > most ? scores[j] : most;
    SUM(sum) for (int64_t j = from; j < past; j++) sum += scores[j] = power((scores[j] - most) * scale);
    float share = 1 / sum;
    *total = most * scale + logf(sum);
    EACH for (int64_t j = from; j < past; j++) row[j] = put(scores[j] * share);
}

/* Adds to a sum over keys what is lost of those that a row sees. keys: (groups, tokens, size), keys or values, from the
   column on that the sum begins with; weights: of the row, (width,). */
static void add_seen(float *sum, const real *weights, const real *keys, const uint8_t *lost, const tile *t,
                     int64_t group, int64_t row, int64_t columns) {
    for (int64_t j = from_of(t, row); j < past_of(t, row); j++)
        if (lost[j])
            add_lost(sum, get(weights[j]), keys + (group * t->tokens + t->begin + j) * t->size, columns);
}

/* Four rows of a tile. value: the argument; keys, values, lost: of the tile; scores, weights: space for (4, width). */
static void attend_block(real *result, float *total, const real *query, const real *value, const unit *keys,
                         const unit *values, const uint8_t *lost, const tile *t, float scale, int64_t group,
                         int64_t row, float *scores, real *weights) {
    int64_t count = least(4, t->rows - row), from = from_of(t, row), past = past_of(t, row + count - 1);
    int64_t low = from / LANES * LANES, high = up(past, LANES);
    const unit *left[4];
    for (int64_t r = 0; r < 4; r++)
        left[r] = (const unit *)(query + by_group(t, group, row + (r < count ? r : 0)) * t->size);
    for (int64_t c = low; c < high; c += CHUNK)
        products(high - c, scores + c, t->width, left, 1, keys + c, t->width, 0, t->size / STEP);
    for (int64_t r = 0; r < 4; r++) {
        real *weight = weights + r * t->width;
        left[r] = (const unit *)weight;
        EACH for (int64_t j = low; j < high; j++) weight[j] = 0;
        if (r < count)
            normalise(weight, total + by_group(t, group, row + r), scores + r * t->width, scale, from_of(t, row + r),
                      past_of(t, row + r));
    }
    int astray = any_lost(lost, from, past);
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float mixed[4][CHUNK] __attribute__((aligned(64)));
        products(t->size - c, mixed[0], CHUNK, left, 1, values + c, t->padded, from / STEP, (past + STEP - 1) / STEP);
        for (int64_t r = 0; r < count; r++) {
            if (astray)
                add_seen(mixed[r], weights + r * t->width, value + c, lost, t, group, row + r,
                         least(CHUNK, t->size - c));
            real *to = result + by_token(t, group, row + r) * t->size + c;
            EACH for (int64_t d = 0; d < least(CHUNK, t->size - c); d++) to[d] = put(mixed[r][d]);
        }
    }
}

int attend(real *result, float *total, const real *query, const real *key, const real *value, const int32_t *starts,
            const int64_t *tiles, int64_t count, float scale, int64_t tokens, int64_t groups, int64_t heads,
            int64_t size) {
    int64_t width = most_keys(tiles, count);
    unit *keys = allocate(groups * size / STEP * width, sizeof(unit));
    unit *values = allocate(groups * width / STEP * up(size, LANES), sizeof(unit));
    float *all_scores = allocate(omp_get_max_threads() * 4 * width, sizeof(float));
    real *all_weights = allocate(omp_get_max_threads() * 4 * up(width, 32), sizeof(real));
    uint8_t *lost = allocate(groups * width, 1);
    int short_of_memory = !(keys && values && all_scores && all_weights && lost);
#pragma omp parallel if (!short_of_memory)
    if (!short_of_memory) {
        float *scores = all_scores + omp_get_thread_num() * 4 * width;
        real *weights = all_weights + omp_get_thread_num() * 4 * up(width, 32);
        for (int64_t n = 0; n < count; n++) {
            tile t = tile_of(starts, tiles + 3 * n, tokens, groups, heads, size);
            keys_across(keys, key, &t);
            keys_along(values, lost, value, &t);
#pragma omp barrier
#pragma omp for schedule(dynamic, 4)
            for (int64_t b = 0; b < groups * t.blocks; b++) {
                int64_t group = b / t.blocks;
                attend_block(result, total, query, value, keys + group * size / STEP * t.width,
                             values + group * t.width / STEP * t.padded, lost + group * t.width, &t, scale, group,
                             b % t.blocks * 4, scores, weights);
            }
        }
    }
    free(keys);
    free(values);
    free(all_scores);
    free(all_weights);
    free(lost);
    return short_of_memory;
}

/* What the way back through a tile needs of all its rows: in units of rows, (groups, rows / STEP, ...) each. */
typedef struct {
    unit *keys, *values;      /* transposed */
    unit *keys_along;         /* (width / STEP, padded) */
    unit *queries, *passed;   /* padded */
    unit *weights, *dscores;  /* width */
    uint8_t *lost_keys, *lost_queries, *lost_passed; /* which have lost numbers: (groups, width or rows) */
} back;

/* The weights of four rows again, the gradients of their scores, and with these that of the query. */
static void back_block(real *dquery, const real *query, const real *key, const real *gradient, const real *result,
                       const float *total, const back *all, const tile *t, float scale, int64_t group, int64_t row,
                       real *dscores) {
    int64_t count = least(4, t->rows - row), from = from_of(t, row), past = past_of(t, row + count - 1);
    const unit *asked[4], *passed[4], *left[4];
    const unit *keys = all->keys + group * t->size / STEP * t->width;
    const unit *values = all->values + group * t->size / STEP * t->width;
    int64_t place = (group * t->blocks * 4 + row) / STEP * t->width;
    float inner[4];
    for (int64_t r = 0; r < 4; r++) {
        int64_t own = row + (r < count ? r : 0), lies = by_token(t, group, own) * t->size;
        asked[r] = (const unit *)(query + by_group(t, group, own) * t->size);
        passed[r] = (const unit *)(gradient + lies);
        left[r] = (const unit *)(dscores + r * t->width);
        float sum = 0;
        SUM(sum) for (int64_t d = 0; d < t->size; d++) sum += get(gradient[lies + d]) * get(result[lies + d]);
        inner[r] = sum;
    }
    for (int64_t c = from / LANES * LANES; c < past; c += CHUNK) {
        int64_t columns = least(CHUNK, up(past - c, LANES));
        float p[4][CHUNK] __attribute__((aligned(64))), d[4][CHUNK] __attribute__((aligned(64)));
        products(columns, p[0], CHUNK, asked, 1, keys + c, t->width, 0, t->size / STEP);
        products(columns, d[0], CHUNK, passed, 1, values + c, t->width, 0, t->size / STEP);
        for (int64_t r = 0; r < 4; r++) {
            int64_t low = r < count ? from_of(t, row + r) - c : CHUNK, high = r < count ? past_of(t, row + r) - c : 0;
            float sum = r < count ? total[by_group(t, group, row + r)] : 0;
            EACH for (int32_t j = 0; j < columns; j++) {
                int seen = j >= (int32_t)low && j < (int32_t)high;
                float weight = power(p[r][j] * scale - sum);
                float change = weight * (d[r][j] - inner[r]) * scale;
                p[r][j] = seen ? weight : 0;
                d[r][j] = seen ? change : 0;
            }
            EACH for (int64_t j = 0; j < columns; j++) dscores[r * t->width + c + j] = put(d[r][j]);
        }
        for (int64_t r = 0; r < 4; r += STEP) {
            unit *weight = all->weights + place + r / STEP * t->width + c;
            unit *change = all->dscores + place + r / STEP * t->width + c;
            EACH for (int64_t j = 0; j < columns; j++) weight[j] = join(put(p[r][j]), put(p[r + STEP - 1][j]));
            EACH for (int64_t j = 0; j < columns; j++) change[j] = join(put(d[r][j]), put(d[r + STEP - 1][j]));
        }
    }
    const uint8_t *lost = all->lost_keys + group * t->width;
    int astray = any_lost(lost, from, past);
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float sums[4][CHUNK] __attribute__((aligned(64)));
        const unit *keys_along = all->keys_along + group * t->width / STEP * t->padded + c;
        products(t->size - c, sums[0], CHUNK, left, 1, keys_along, t->padded, from / STEP, (past + STEP - 1) / STEP);
        for (int64_t r = 0; r < count; r++) {
            if (astray)
                add_seen(sums[r], dscores + r * t->width, key + c, lost, t, group, row + r, least(CHUNK, t->size - c));
            real *to = dquery + by_group(t, group, row + r) * t->size + c;
            EACH for (int64_t d = 0; d < least(CHUNK, t->size - c); d++) to[d] = put(sums[r][d]);
        }
    }
}

/* What four keys are given by all rows of a tile that may see them. weights, rows: of the tile, see `back`; given: the
   rows themselves, and whether they lie by token; lost: (groups, rows). */
typedef struct {
    const unit *weights, *rows;
    const real *given;
    int by_token;
    const uint8_t *lost;
} giving;

static void add_given(float *sum, const giving *g, const tile *t, int64_t group, int64_t key, int64_t from,
                      int64_t past, int64_t column, int64_t columns) {
    const uint8_t *lost = g->lost + group * t->blocks * 4;
    for (int64_t row = from; row < past; row++)
        if (lost[row] && from_of(t, row) <= key && key < past_of(t, row)) {
            unit weight = g->weights[(group * t->blocks * 4 + row) / STEP * t->width + key];
            int64_t lies = g->by_token ? by_token(t, group, row) : by_group(t, group, row);
            add_lost(sum, get(part(weight, row)), g->given + lies * t->size + column, columns);
        }
}

/* Four keys: adds it up. from, past: the rows that may see them, whole blocks. */
static void back_keys(float *to, const giving *g, const tile *t, int64_t group, int64_t key, int64_t from,
                      int64_t past) {
    const unit *left[4];
    int astray = any_lost(g->lost + group * t->blocks * 4, from, past);
    for (int64_t r = 0; r < 4; r++) left[r] = g->weights + group * t->blocks * 4 / STEP * t->width + key + r;
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float sums[4][CHUNK] __attribute__((aligned(64)));
        const unit *right = g->rows + group * t->blocks * 4 / STEP * t->padded + c;
        int64_t columns = least(CHUNK, t->size - c);
        products(t->size - c, sums[0], CHUNK, left, t->width, right, t->padded, from / STEP, past / STEP);
        for (int64_t r = 0; r < least(4, t->keys - key); r++) {
            float *sum = to + (group * t->tokens + t->begin + key + r) * t->size + c;
            if (astray) add_given(sums[r], g, t, group, key + r, from, past, c, columns);
            EACH for (int64_t d = 0; d < columns; d++) sum[d] += sums[r][d];
        }
    }
}

static void back_tile(real *dquery, float *dkey, float *dvalue, const real *gradient, const real *result,
                      const float *total, const real *query, const real *key, const real *value, const back *all,
                      const tile *t, float scale, real *dscores) {
    keys_across(all->keys, key, t);
    keys_across(all->values, value, t);
    keys_along(all->keys_along, all->lost_keys, key, t);
    giving scores = {all->dscores, all->queries, query, 0, all->lost_queries};
    giving shares = {all->weights, all->passed, gradient, 1, all->lost_passed};
    int64_t pairs = t->blocks * 4 / STEP, parts = t->width / LANES;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < t->groups * pairs; n++) {
        int64_t group = n / pairs, row = n % pairs * STEP, last = row + STEP - 1;
        const real *asked = query + by_group(t, group, row) * t->size;
        const real *next = last < t->rows ? asked + (STEP - 1) * t->size : NULL;
        const real *passed = row < t->rows ? gradient + by_token(t, group, row) * t->size : NULL;
        const real *second = last < t->rows ? gradient + by_token(t, group, last) * t->size : NULL;
        int lost = along(all->queries + n * t->padded, row < t->rows ? asked : NULL, next, t->size, t->padded);
        int astray = along(all->passed + n * t->padded, passed, second, t->size, t->padded);
        for (int s = 0; s < STEP; s++) {
            all->lost_queries[n * STEP + s] = lost >> s & 1;
            all->lost_passed[n * STEP + s] = astray >> s & 1;
        }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t b = 0; b < t->groups * t->blocks; b++)
        back_block(dquery, query, key, gradient, result, total, all, t, scale, b / t->blocks, b % t->blocks * 4, dscores);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < t->groups * parts; n++) {
        int64_t group = n / parts, column = n % parts * LANES, last = t->end;
        int64_t sees = t->begin + column > t->first ? t->begin + column - t->first : 0;
        while (last > t->first && t->starts[last - 1] - t->begin > column + LANES - 1) last--;
        int64_t from = sees * t->heads / 4 * 4, past = up((last - t->first) * t->heads, 4);
        for (int64_t k = column; k < least(column + LANES, t->keys); k += 4) {
            back_keys(dkey, &scores, t, group, k, from, past);
            back_keys(dvalue, &shares, t, group, k, from, past);
        }
    }
}

int attend_backward(real *dquery, float *dkey, float *dvalue, const real *gradient, const real *result,
                     const float *total, const real *query, const real *key, const real *value, const int32_t *starts,
                     const int64_t *tiles, int64_t count, float scale, int64_t tokens, int64_t groups, int64_t heads,
                     int64_t size) {
    int64_t width = most_keys(tiles, count), rows = most_rows(tiles, count, heads), padded = up(size, LANES);
    int64_t each[7] = {size / STEP * width, size / STEP * width, width / STEP * padded, rows / STEP * padded,
                       rows / STEP * padded, rows / STEP * width, rows / STEP * width};
    unit *parts[7];
    int short_of_memory = 0;
    for (int n = 0; n < 7; n++) short_of_memory |= !(parts[n] = allocate(groups * each[n], sizeof(unit)));
    real *all_dscores = allocate(omp_get_max_threads() * 4 * up(width, 32), sizeof(real));
    uint8_t *lost = allocate(groups * (width + 2 * rows), 1);
    short_of_memory |= !(all_dscores && lost);
    back all = {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6],
                lost, lost + groups * width, lost + groups * (width + rows)};
#pragma omp parallel if (!short_of_memory)
    if (!short_of_memory) {
        real *dscores = all_dscores + omp_get_thread_num() * 4 * up(width, 32);
        for (int64_t n = 0; n < count; n++) {
            tile t = tile_of(starts, tiles + 3 * n, tokens, groups, heads, size);
            back_tile(dquery, dkey, dvalue, gradient, result, total, query, key, value, &all, &t, scale, dscores);
        }
    }
    for (int n = 0; n < 7; n++) free(parts[n]);
    free(all_dscores);
    free(lost);
    return short_of_memory;
}

