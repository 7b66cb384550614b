/* Causal self-attention over packed rows, or a tree of them; reference.py says what each function computes. */
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

#define LANES 16 /* columns come in multiples of it */
#define CHUNK 64 /* columns that are computed at once */
static inline int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static void *allocate(int64_t count, int64_t size) { return aligned_alloc(64, up(count * size + 64, 64)); }

/* Four rows by so many vectors of columns: the sum over k of left[row][k * step] times right[k * width ...], where k is
   below `shared`, or from `from` on and below `past`. */
static inline __attribute__((always_inline)) void multiply(int vectors, float *product, int64_t stride,
                                                           const unit *const left[4], int64_t step, const unit *right,
                                                           int64_t width, int64_t shared, int64_t from, int64_t past) {
    vector sum[4][4] = {0};
    for (int range = 0; range < 2; range++)
        for (int64_t k = range ? from : 0; k < (range ? past : shared); k++) {
            const units *b = (const units *)(right + k * width);
            for (int r = 0; r < 4; r++) {
                units a = left[r][k * step] - (units){0};
                for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], a, b[v]);
            }
        }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) *(vector *)(product + r * stride + WIDTH * v) = sum[r][v];
}

/* The same for as many columns as there are, a chunk at most; at once as many as leave their sums in registers. */
static void products(int64_t columns, float *product, int64_t stride, const unit *const left[4], int64_t step,
                     const unit *right, int64_t width, int64_t shared, int64_t from, int64_t past) {
#ifdef __AVX512F__
    if (columns > 48) multiply(4, product, stride, left, step, right, width, shared, from, past);
    else if (columns > 32) multiply(3, product, stride, left, step, right, width, shared, from, past);
    else if (columns > 16) multiply(2, product, stride, left, step, right, width, shared, from, past);
    else multiply(1, product, stride, left, step, right, width, shared, from, past);
#else
    for (int64_t c = 0; c < least(columns, CHUNK); c += LANES)
        multiply(LANES / WIDTH, product + c, stride, left, step, right + c, width, shared, from, past);
#endif
}

/* LANES columns, in units: (size / STEP, width), from column `column` on. Column j is number numbers[j] of some rows
   of `size` numbers; zero from `count` on, and where the number is below 0. */
static inline void across(unit *to, const real *rows, const int32_t *numbers, int64_t column, int64_t count,
                          int64_t size, int64_t width) {
    int64_t long_ = size / STEP, places[LANES];
    unit kept_bits[LANES];
    for (int64_t j = 0; j < LANES; j++) {
        int is_there = column + j < count && numbers[column + j] >= 0;
        places[j] = is_there ? numbers[column + j] * long_ : 0;
        kept_bits[j] = is_there ? ~(unit)0 : 0;
    }
    for (int64_t d = 0; d < long_; d++)
        for (int64_t j = 0; j < LANES; j++)
            to[d * width + column + j] = ((const unit *)rows)[places[j] + d] & kept_bits[j];
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

/* Attention. A tile is (first, end, place, count, shared, repeats): queries from `first` to `end`, and `count` keys, whose
   tokens stand in an array from `place` on, some of them several times if it repeats. Of these, a query sees those from `low` to `shared`, and those from `from` to
   `past`: `spans` has (low, from, past) of each. The first range is for all queries of a tile about the same, and its
   keys are followed by others that nobody sees, below 0, up to a multiple of LANES; `from` and `past` do not fall from
   one query to the next. In a tile, a row is one head of one query; the heads of a query share a group's keys, and
   follow one another. */
typedef struct {
    const int32_t *spans, *tokens_of;
    int64_t tokens, groups, heads, size, padded, width;
    int64_t first, end, keys, shared, wide, repeats, rows, blocks;
} tile;

enum { FIRST, END, PLACE, COUNT, SHARED, REPEATS, BOUNDS };

/* What attention goes over, as `Layout` has it. */
typedef struct {
    const int32_t *spans, *keys;
    const int64_t *tiles;
    int64_t count;
} layout;

static inline tile tile_of(const layout *l, int64_t number, int64_t tokens, int64_t groups, int64_t heads,
                           int64_t size) {
    const int64_t *bounds = l->tiles + BOUNDS * number;
    tile t = {.spans = l->spans, .tokens = tokens, .groups = groups, .heads = heads, .size = size};
    t.padded = up(size, LANES), t.first = bounds[FIRST], t.end = bounds[END], t.tokens_of = l->keys + bounds[PLACE];
    t.keys = bounds[COUNT], t.width = up(t.keys, LANES), t.shared = bounds[SHARED], t.wide = up(t.shared, LANES);
    t.repeats = bounds[REPEATS];
    t.rows = (t.end - t.first) * heads, t.blocks = (t.rows + 3) / 4;
    return t;
}

static int64_t most_keys(const layout *l) {
    int64_t most = 0;
    for (int64_t n = 0; n < l->count; n++)
        if (l->tiles[BOUNDS * n + COUNT] > most) most = l->tiles[BOUNDS * n + COUNT];
    return up(most, LANES);
}

static int64_t most_rows(const layout *l, int64_t heads) {
    int64_t most = 0;
    for (int64_t n = 0; n < l->count; n++) {
        int64_t queries = l->tiles[BOUNDS * n + END] - l->tiles[BOUNDS * n + FIRST];
        if (queries > most) most = queries;
    }
    return up(most * heads, 4);
}

static inline int64_t query_of(const tile *t, int64_t row) { return t->first + row / t->heads; }
static inline int64_t low_of(const tile *t, int64_t row) { return t->spans[3 * query_of(t, row)]; }
static inline int64_t from_of(const tile *t, int64_t row) { return t->spans[3 * query_of(t, row) + 1]; }
static inline int64_t past_of(const tile *t, int64_t row) { return t->spans[3 * query_of(t, row) + 2]; }
static inline int sees(const tile *t, int64_t row, int64_t key) {
    return (low_of(t, row) <= key && key < t->shared) || (from_of(t, row) <= key && key < past_of(t, row));
}
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
        const real *rows = keys + group * t->tokens * t->size;
        across(to + group * (t->size / STEP) * t->width, rows, t->tokens_of, n % parts * LANES, t->keys, t->size,
               t->width);
    }
}

/* The numbers of a key or value of a tile; NULL for none. keys: (groups, tokens, size). */
static inline const real *key_of(const real *keys, const tile *t, int64_t group, int64_t key) {
    if (key >= t->keys || t->tokens_of[key] < 0) return NULL;
    return keys + (group * t->tokens + t->tokens_of[key]) * t->size;
}

/* Keys or values of a tile, in units: (groups, width / STEP, padded). lost: (groups, width), which have lost numbers. */
static void keys_along(unit *to, uint8_t *lost, const real *keys, const tile *t) {
    int64_t parts = t->width / STEP;
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < t->groups * parts; n++) {
        int64_t group = n / parts, key = n % parts * STEP;
        const real *even = key_of(keys, t, group, key), *odd = key_of(keys, t, group, key + STEP - 1);
        int found = along(to + n * t->padded, even, odd, t->size, t->padded);
        for (int s = 0; s < STEP; s++) lost[n * STEP + s] = found >> s & 1;
    }
}

/* How products become scores: times `scale`, then bounded to `cap` smoothly, if that is above 0. sinks: of each head,
   (groups, heads), a score that takes its share of the weights and gives nothing; NULL for none. */
typedef struct {
    float scale, cap;
    const float *sinks;
} scoring;

/* tanh by Cephes' polynomial near 0, and by exp elsewhere. */
static inline float bounded(float x) {
    float square = x * x, size = fabsf(x);
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    float far = copysignf(1 - 2 / (1 + power(2 * size)), x);
    return size < 0.625f ? x + x * square * p : size >= 0.625f ? far : x;
}

static inline void cap_scores(float *scores, float scale, float cap, int64_t from, int64_t past) {
    float inner = scale / cap;
    EACH for (int64_t j = from; j < past; j++) scores[j] = cap * bounded(scores[j] * inner);
}

/* The scores of a row, (width,), as weights. sink: NULL for none. */
static inline void normalise(real *weights, float *total, float *scores, const scoring *s, const float *sink,
                             const tile *t, int64_t row) {
    int64_t low = low_of(t, row), shared = t->shared, from = from_of(t, row), past = past_of(t, row);
    float scale = s->cap > 0 ? 1 : s->scale, most = sink == NULL ? -INFINITY : *sink / scale, sum = 0;
    if (s->cap > 0) cap_scores(scores, s->scale, s->cap, low, shared), cap_scores(scores, s->scale, s->cap, from, past);
    MOST(most) for (int64_t j = low; j < shared; j++) most = scores[j] > most ? scores[j] : most;
    MOST(most) for (int64_t j = from; j < past; j++) most = scores[j] > most ? scores[j] : most;
    SUM(sum) for (int64_t j = low; j < shared; j++) sum += scores[j] = power((scores[j] - most) * scale);
    SUM(sum) for (int64_t j = from; j < past; j++) sum += scores[j] = power((scores[j] - most) * scale);
    if (sink != NULL) sum += expf(*sink - most * scale);
    float share = 1 / sum;
    *total = most * scale + logf(sum);
    EACH for (int64_t j = low; j < shared; j++) weights[j] = put(scores[j] * share);
    EACH for (int64_t j = from; j < past; j++) weights[j] = put(scores[j] * share);
}

/* Adds to a sum over keys what is lost of those that a row sees. keys: (groups, tokens, size), keys or values, from the
   column on that the sum begins with; weights: of the row, (width,). */
static void add_seen(float *sum, const real *weights, const real *keys, const uint8_t *lost, const tile *t,
                     int64_t group, int64_t row, int64_t columns) {
    for (int64_t j = 0; j < past_of(t, row); j++)
        if (lost[j] && sees(t, row, j))
            add_lost(sum, get(weights[j]), keys + (group * t->tokens + t->tokens_of[j]) * t->size, columns);
}

/* Four rows of a tile. value: the argument; keys, values, lost: of the tile; scores, weights: space for (4, width). */
static void attend_block(real *result, float *total, const real *query, const real *value, const unit *keys,
                         const unit *values, const uint8_t *lost, const tile *t, const scoring *s, int64_t group,
                         int64_t row, float *scores, real *weights) {
    int64_t count = least(4, t->rows - row), from = from_of(t, row), past = past_of(t, row + count - 1);
    int64_t low = from / LANES * LANES, high = up(past, LANES);
    const unit *left[4];
    for (int64_t r = 0; r < 4; r++)
        left[r] = (const unit *)(query + by_group(t, group, row + (r < count ? r : 0)) * t->size);
    for (int64_t c = 0; c < t->wide; c += CHUNK)
        products(t->wide - c, scores + c, t->width, left, 1, keys + c, t->width, 0, 0, t->size / STEP);
    for (int64_t c = low; c < high; c += CHUNK)
        products(high - c, scores + c, t->width, left, 1, keys + c, t->width, 0, 0, t->size / STEP);
    for (int64_t r = 0; r < 4; r++) {
        real *weight = weights + r * t->width;
        left[r] = (const unit *)weight;
        EACH for (int64_t j = 0; j < t->wide; j++) weight[j] = 0;
        EACH for (int64_t j = low; j < high; j++) weight[j] = 0;
        const float *sink = s->sinks == NULL ? NULL : s->sinks + group * t->heads + (row + r) % t->heads;
        if (r < count)
            normalise(weight, total + by_group(t, group, row + r), scores + r * t->width, s, sink, t, row + r);
    }
    int astray = any_lost(lost, 0, t->wide) || any_lost(lost, from, past);
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float mixed[4][CHUNK] __attribute__((aligned(64)));
        products(t->size - c, mixed[0], CHUNK, left, 1, values + c, t->padded, t->wide / STEP, from / STEP,
                 (past + STEP - 1) / STEP);
        for (int64_t r = 0; r < count; r++) {
            if (astray)
                add_seen(mixed[r], weights + r * t->width, value + c, lost, t, group, row + r,
                         least(CHUNK, t->size - c));
            real *to = result + by_token(t, group, row + r) * t->size + c;
            EACH for (int64_t d = 0; d < least(CHUNK, t->size - c); d++) to[d] = put(mixed[r][d]);
        }
    }
}

int attend(real *result, float *total, const real *query, const real *key, const real *value, const int32_t *spans,
           const int32_t *tokens_of, const int64_t *tiles, int64_t count, float scale, float cap, const float *sinks,
           int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    const scoring s = {scale, cap, sinks};
    const layout l = {spans, tokens_of, tiles, count};
    int64_t width = most_keys(&l);
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
            tile t = tile_of(&l, n, tokens, groups, heads, size);
            keys_across(keys, key, &t);
            keys_along(values, lost, value, &t);
#pragma omp barrier
#pragma omp for schedule(dynamic, 4)
            for (int64_t b = 0; b < groups * t.blocks; b++) {
                int64_t group = b / t.blocks;
                attend_block(result, total, query, value, keys + group * size / STEP * t.width,
                             values + group * t.width / STEP * t.padded, lost + group * t.width, &t, &s, group,
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
    float *dkeys, *dvalues;   /* what the keys of the tile are given: (groups, width, size) */
    uint8_t *lost_keys, *lost_queries, *lost_passed; /* which have lost numbers: (groups, width or rows) */
} back;

/* The weights of four rows again, the gradients of their scores, and with these that of the query. */
static void back_block(real *dquery, const real *query, const real *key, const real *gradient, const real *result,
                       const float *total, const back *all, const tile *t, const scoring *s, int64_t group,
                       int64_t row, real *dscores) {
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
    int64_t begin = from / LANES * LANES;
    for (int64_t c = t->wide ? 0 : begin; c < past; c = c < t->wide && c + CHUNK >= t->wide ? begin : c + CHUNK) {
        int is_shared = c < t->wide;
        int64_t columns = least(CHUNK, up((is_shared ? t->wide : past) - c, LANES));
        float p[4][CHUNK] __attribute__((aligned(64))), d[4][CHUNK] __attribute__((aligned(64)));
        products(columns, p[0], CHUNK, asked, 1, keys + c, t->width, 0, 0, t->size / STEP);
        products(columns, d[0], CHUNK, passed, 1, values + c, t->width, 0, 0, t->size / STEP);
        for (int64_t r = 0; r < 4; r++) {
            int64_t low = r < count ? (is_shared ? low_of(t, row + r) : from_of(t, row + r)) - c : CHUNK;
            int64_t high = r < count ? (is_shared ? t->shared : past_of(t, row + r)) - c : 0;
            float sum = r < count ? total[by_group(t, group, row + r)] : 0;
            float scale = s->scale, rest = s->cap > 0 ? 1 : scale;
            if (s->cap > 0) {
                EACH for (int64_t j = 0; j < columns; j++) {
                    float share = bounded(p[r][j] * (scale / s->cap));
                    p[r][j] = s->cap * share;
                    d[r][j] = (d[r][j] - inner[r]) * (1 - share * share);
                }
            } else
                EACH for (int64_t j = 0; j < columns; j++) d[r][j] -= inner[r];
            EACH for (int32_t j = 0; j < columns; j++) {
                int seen = j >= (int32_t)low && j < (int32_t)high;
                float weight = power(p[r][j] * rest - sum);
                float change = weight * d[r][j] * scale;
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
    int astray = any_lost(lost, 0, t->wide) || any_lost(lost, from, past);
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float sums[4][CHUNK] __attribute__((aligned(64)));
        const unit *keys_along = all->keys_along + group * t->width / STEP * t->padded + c;
        products(t->size - c, sums[0], CHUNK, left, 1, keys_along, t->padded, t->wide / STEP, from / STEP,
                 (past + STEP - 1) / STEP);
        for (int64_t r = 0; r < count; r++) {
            if (astray)
                add_seen(sums[r], dscores + r * t->width, key + c, lost, t, group, row + r, least(CHUNK, t->size - c));
            real *to = dquery + by_group(t, group, row + r) * t->size + c;
            EACH for (int64_t d = 0; d < least(CHUNK, t->size - c); d++) to[d] = put(sums[r][d]);
        }
    }
}

/* What four keys are given by all rows of a tile that may see them. weights, rows: of the tile, see `back`; given: the
   rows themselves, and whether they lie by token; lost: (groups, rows); to: what the tokens are given by all tiles,
   (groups, tokens, size); of_keys: what the keys of this one are given, where its tokens repeat, (groups, width, size). */
typedef struct {
    const unit *weights, *rows;
    const real *given;
    int by_token;
    const uint8_t *lost;
    float *to, *of_keys;
} giving;

static void add_given(float *sum, const giving *g, const tile *t, int64_t group, int64_t key, int64_t from,
                      int64_t past, int64_t column, int64_t columns) {
    const uint8_t *lost = g->lost + group * t->blocks * 4;
    for (int64_t row = from; row < past; row++)
        if (row < t->rows && lost[row] && sees(t, row, key)) {
            unit weight = g->weights[(group * t->blocks * 4 + row) / STEP * t->width + key];
            int64_t lies = g->by_token ? by_token(t, group, row) : by_group(t, group, row);
            add_lost(sum, get(part(weight, row)), g->given + lies * t->size + column, columns);
        }
}

/* Four keys. from, past: the rows that may see them, whole blocks. */
static void back_keys(const giving *g, const tile *t, int64_t group, int64_t key, int64_t from,
                      int64_t past) {
    const unit *left[4];
    int astray = any_lost(g->lost + group * t->blocks * 4, from, past);
    for (int64_t r = 0; r < 4; r++) left[r] = g->weights + group * t->blocks * 4 / STEP * t->width + key + r;
    for (int64_t c = 0; c < t->size; c += CHUNK) {
        float sums[4][CHUNK] __attribute__((aligned(64)));
        const unit *right = g->rows + group * t->blocks * 4 / STEP * t->padded + c;
        int64_t columns = least(CHUNK, t->size - c);
        products(t->size - c, sums[0], CHUNK, left, t->width, right, t->padded, 0, from / STEP, past / STEP);
        for (int64_t r = 0; r < least(4, t->keys - key); r++) {
            if (astray) add_given(sums[r], g, t, group, key + r, from, past, c, columns);
            float *of_key = g->of_keys + (group * t->width + key + r) * t->size + c;
            float *to = g->to + (group * t->tokens + t->tokens_of[key + r]) * t->size + c;
            if (t->repeats) memcpy(of_key, sums[r], columns * sizeof(float));
            else if (t->tokens_of[key + r] >= 0) EACH for (int64_t d = 0; d < columns; d++) to[d] += sums[r][d];
        }
    }
}

/* Adds to what tokens are given what the keys of a tile are, in which tokens repeat: for every LANES columns one key
   after the other, so that the order of a sum never changes. Called by all threads. */
static void add_to_tokens(const giving *one, const giving *other, const tile *t) {
    int64_t parts = t->padded / LANES;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < 2 * t->groups * parts; n++) {
        int64_t group = n / 2 / parts, c = n / 2 % parts * LANES, columns = least(LANES, t->size - c);
        const giving *g = n % 2 ? other : one;
        const float *from = g->of_keys + group * t->width * t->size + c;
        float *to = g->to + group * t->tokens * t->size + c;
        for (int64_t key = 0; key < t->keys; key++)
            if (t->tokens_of[key] >= 0) {
                float *sum = to + t->tokens_of[key] * t->size;
                EACH for (int64_t d = 0; d < columns; d++) sum[d] += from[key * t->size + d];
            }
    }
}

static void back_tile(real *dquery, float *dkey, float *dvalue, const real *gradient, const real *result,
                      const float *total, const real *query, const real *key, const real *value, const back *all,
                      const tile *t, const scoring *s, real *dscores) {
    keys_across(all->keys, key, t);
    keys_across(all->values, value, t);
    keys_along(all->keys_along, all->lost_keys, key, t);
    giving scores = {all->dscores, all->queries, query, 0, all->lost_queries, dkey, all->dkeys};
    giving shares = {all->weights, all->passed, gradient, 1, all->lost_passed, dvalue, all->dvalues};
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
        back_block(dquery, query, key, gradient, result, total, all, t, s, b / t->blocks, b % t->blocks * 4, dscores);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < t->groups * parts; n++) {
        int64_t group = n / parts, column = n % parts * LANES, queries = t->end - t->first, first = 0, last = queries;
        if (column >= t->wide) {
            while (first < queries && past_of(t, first * t->heads) <= column) first++;
            while (last > first && from_of(t, (last - 1) * t->heads) > column + LANES - 1) last--;
        }
        int64_t from = first * t->heads / 4 * 4, past = up(last * t->heads, 4);
        for (int64_t k = column; k < least(column + LANES, t->keys); k += 4) {
            back_keys(&scores, t, group, k, from, past);
            back_keys(&shares, t, group, k, from, past);
        }
    }
    if (t->repeats) add_to_tokens(&scores, &shares, t);
}

int attend_backward(real *dquery, float *dkey, float *dvalue, const real *gradient, const real *result,
                     const float *total, const real *query, const real *key, const real *value, const int32_t *spans,
                     const int32_t *tokens_of, const int64_t *tiles, int64_t count, float scale, float cap,
                     int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    const scoring s = {scale, cap, NULL}; /* `total` knows of sinks. */
    const layout l = {spans, tokens_of, tiles, count};
    int64_t width = most_keys(&l), rows = most_rows(&l, heads), padded = up(size, LANES);
    int64_t each[9] = {size / STEP * width, size / STEP * width, width / STEP * padded, rows / STEP * padded,
                       rows / STEP * padded, rows / STEP * width, rows / STEP * width, size * width, size * width};
    unit *parts[9];
    int short_of_memory = 0;
    for (int n = 0; n < 9; n++) short_of_memory |= !(parts[n] = allocate(groups * each[n], sizeof(unit)));
    real *all_dscores = allocate(omp_get_max_threads() * 4 * up(width, 32), sizeof(real));
    uint8_t *lost = allocate(groups * (width + 2 * rows), 1);
    short_of_memory |= !(all_dscores && lost);
    back all = {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], (float *)parts[7],
                (float *)parts[8], lost, lost + groups * width, lost + groups * (width + rows)};
#pragma omp parallel if (!short_of_memory)
    if (!short_of_memory) {
        real *dscores = all_dscores + omp_get_thread_num() * 4 * up(width, 32);
        for (int64_t n = 0; n < count; n++) {
            tile t = tile_of(&l, n, tokens, groups, heads, size);
            back_tile(dquery, dkey, dvalue, gradient, result, total, query, key, value, &all, &t, &s, dscores);
        }
    }
    for (int n = 0; n < 9; n++) free(parts[n]);
    free(all_dscores);
    free(lost);
    return short_of_memory;
}

