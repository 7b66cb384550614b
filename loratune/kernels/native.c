/* The passes over memory between the matrix products of a LoRA step. Each function has the same name, arguments and
   result as its reference in plain.py, which says what it computes; arithmetic is in float32, numbers are stored as
   `real`: bfloat16 with -DBFLOAT16, float32 without. All arrays are dense; rows are shared out among OpenMP's threads. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define ROWS _Pragma("omp parallel for schedule(static)")
#define EACH _Pragma("omp simd")
#define SUM(x) _Pragma(STRING(omp simd reduction(+ : x)))
#define MOST(x) _Pragma(STRING(omp simd reduction(max : x)))
#define STRING(x) #x

typedef union { uint32_t bits; float value; } word;
typedef float vector __attribute__((vector_size(64), may_alias));

#ifdef BFLOAT16
typedef uint16_t real;
static inline float get(real x) { word w = {.bits = (uint32_t)x << 16}; return w.value; }
static inline real put(float x) {
    word w = {.value = x};
    uint32_t rounded = (w.bits + 0x7fff + ((w.bits >> 16) & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}
#else
typedef float real;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
#endif

/* exp by Cephes' polynomial; 0 below -87, NaN stays NaN. */
static inline float power(float x) {
    float bounded = x > 88.f ? 88.f : x;
    float n = rintf(bounded * 1.44269504f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    word scale = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    return x < -87.f ? 0.f : p * scale.value;
}

void rms_norm(real *y, float *inverse, const real *x, const real *weight, float epsilon, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *a = x + i * size;
        real *b = y + i * size;
        float sum = 0;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += get(a[j]) * get(a[j]);
        float scale = inverse[i] = 1 / sqrtf(sum / size + epsilon);
        EACH for (int64_t j = 0; j < size; j++) b[j] = put(get(weight[j]) * get(put(get(a[j]) * scale)));
    }
}

void rms_norm_backward(real *dx, const real *dy, const real *x, const real *weight, const float *inverse, int64_t rows,
                       int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *a = x + i * size, *d = dy + i * size;
        real *b = dx + i * size;
        float scale = inverse[i], sum = 0;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += get(d[j]) * get(weight[j]) * get(a[j]);
        float share = sum * scale * scale / size;
        EACH for (int64_t j = 0; j < size; j++) b[j] = put(scale * (get(d[j]) * get(weight[j]) - share * get(a[j])));
    }
}

void swiglu(real *y, const real *both, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *gate = both + 2 * i * size, *up = gate + size;
        real *b = y + i * size;
        EACH for (int64_t j = 0; j < size; j++) {
            float g = get(gate[j]);
            b[j] = put(g / (1 + power(-g)) * get(up[j]));
        }
    }
}

void swiglu_backward(real *dboth, const real *dy, const real *both, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *gate = both + 2 * i * size, *up = gate + size, *d = dy + i * size;
        real *dgate = dboth + 2 * i * size, *dup = dgate + size;
        EACH for (int64_t j = 0; j < size; j++) {
            float g = get(gate[j]), u = get(up[j]), dj = get(d[j]), s = 1 / (1 + power(-g));
            dgate[j] = put(dj * u * s * (1 + g * (1 - s)));
            dup[j] = put(dj * g * s);
        }
    }
}

/* One head of one token, turned by its angles; way: 1 forward, -1 back. */
static inline void turn(real *to, const real *from, const real *cosine, const real *sine, float way, int64_t size) {
    int64_t half = size / 2;
    EACH for (int64_t j = 0; j < half; j++) {
        float first = get(from[j]), second = get(from[j + half]);
        to[j] = put(first * get(cosine[j]) - way * second * get(sine[j + (way < 0 ? half : 0)]));
        to[j + half] = put(second * get(cosine[j + half]) + way * first * get(sine[j + (way < 0 ? 0 : half)]));
    }
}

static inline void copy(real *to, const real *from, int64_t size) {
    EACH for (int64_t j = 0; j < size; j++) to[j] = from[j];
}

void split_heads(real *query, real *key, real *value, const real *joined, const real *cosine, const real *sine,
                 int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    ROWS for (int64_t i = 0; i < tokens; i++) {
        const real *from = joined + i * (groups * heads + 2 * groups) * size;
        const real *c = cosine + i * size, *s = sine + i * size;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0; h < heads; h++, from += size)
                turn(query + ((g * tokens + i) * heads + h) * size, from, c, s, 1, size);
        for (int64_t g = 0; g < groups; g++, from += size) turn(key + (g * tokens + i) * size, from, c, s, 1, size);
        for (int64_t g = 0; g < groups; g++, from += size) copy(value + (g * tokens + i) * size, from, size);
    }
}

void join_heads(real *joined, const real *query, const real *key, const real *value, const real *cosine,
                const real *sine, int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    ROWS for (int64_t i = 0; i < tokens; i++) {
        real *to = joined + i * (groups * heads + 2 * groups) * size;
        const real *c = cosine + i * size, *s = sine + i * size;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0; h < heads; h++, to += size)
                turn(to, query + ((g * tokens + i) * heads + h) * size, c, s, -1, size);
        for (int64_t g = 0; g < groups; g++, to += size) turn(to, key + (g * tokens + i) * size, c, s, -1, size);
        for (int64_t g = 0; g < groups; g++, to += size) copy(to, value + (g * tokens + i) * size, size);
    }
}

void split_gradient(real *split, float *inner, const real *gradient, const real *result, int64_t tokens, int64_t groups,
                    int64_t heads, int64_t size) {
    ROWS for (int64_t i = 0; i < tokens; i++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t from = ((i * groups + g) * heads + h) * size, to = (g * tokens + i) * heads + h;
                float sum = 0;
                SUM(sum) for (int64_t j = 0; j < size; j++) sum += get(gradient[from + j]) * get(result[from + j]);
                inner[to] = sum;
                copy(split + to * size, gradient + from, size);
            }
}

/* The products of four queries with all keys from `from` to `past`. keys: (size, width) float32, padded to whole vectors;
   queries beyond `count` are those of the first. */
static inline void products(float *scores, const real *queries, int64_t count, const float *keys, int64_t from,
                            int64_t past, int64_t width, int64_t size) {
    const real *q[4];
    for (int64_t r = 0; r < 4; r++) q[r] = queries + (r < count ? r : 0) * size;
    for (int64_t j = from / 32 * 32; j < past; j += 32) {
        vector sum[4][2] = {0};
        for (int64_t d = 0; d < size; d++) {
            const vector *k = (const vector *)(keys + d * width + j);
            for (int64_t r = 0; r < 4; r++) {
                float one = get(q[r][d]);
                sum[r][0] += one * k[0];
                sum[r][1] += one * k[1];
            }
        }
        for (int64_t r = 0; r < 4; r++) {
            *(vector *)(scores + r * width + j) = sum[r][0];
            *(vector *)(scores + r * width + j + 16) = sum[r][1];
        }
    }
}

static inline void normalise(real *row, float *total, float *scores, float scale, int64_t from, int64_t past,
                             int64_t keys) {
    float most = -INFINITY, sum = 0;
    MOST(most) for (int64_t j = from; j < past; j++) most = scores[j] > most ? scores[j] : most;
    SUM(sum) for (int64_t j = from; j < past; j++) sum += scores[j] = power((scores[j] - most) * scale);
    float share = 1 / sum;
    *total = most * scale + logf(sum);
    EACH for (int64_t j = from; j < past; j++) row[j] = put(scores[j] * share);
    EACH for (int64_t j = 0; j < from; j++) row[j] = 0;
    EACH for (int64_t j = past; j < keys; j++) row[j] = 0;
}

void attention_weights(real *weights, float *total, const real *query, const real *key, const int32_t *starts,
                       float scale, int64_t tokens, int64_t first, int64_t end, int64_t begin, int64_t groups,
                       int64_t heads, int64_t size) {
    int64_t rows = (end - first) * heads, keys = end - begin, width = (keys + 31) / 32 * 32;
    float *turned = aligned_alloc(64, groups * size * width * sizeof(float));
    ROWS for (int64_t n = 0; n < groups * size; n++) {
        const real *from = key + (n / size * tokens + begin) * size + n % size;
        for (int64_t j = 0; j < width; j++) turned[n * width + j] = j < keys ? get(from[j * size]) : 0;
    }
    int64_t blocks = (rows + 3) / 4;
#pragma omp parallel
    {
        float *scores = aligned_alloc(64, 4 * width * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < groups * blocks; n++) {
            int64_t group = n / blocks, row = n % blocks * 4, count = rows - row < 4 ? rows - row : 4;
            int64_t from = starts[first + row / heads] - begin, past = first + (row + count - 1) / heads + 1 - begin;
            int64_t place = (group * tokens + first) * heads + row;
            products(scores, query + place * size, count, turned + group * size * width, from, past, width, size);
            for (int64_t r = 0; r < count; r++) {
                int64_t token = first + (row + r) / heads;
                normalise(weights + (group * rows + row + r) * keys, total + place + r, scores + r * width, scale,
                          starts[token] - begin, token + 1 - begin, keys);
            }
        }
        free(scores);
    }
    free(turned);
}

void softmax_backward(real *scores, real *gradient, const float *total, const float *inner, const int32_t *starts,
                      float scale, int64_t tokens, int64_t first, int64_t end, int64_t key, int64_t groups,
                      int64_t heads) {
    int64_t rows = (end - first) * heads, keys = end - key;
    ROWS for (int64_t n = 0; n < groups * rows; n++) {
        int64_t token = first + n % rows / heads, head = n % heads, begin = starts[token] - key, past = token + 1 - key;
        int64_t place = (n / rows * tokens + token) * heads + head;
        real *row = scores + n * keys, *d = gradient + n * keys;
        float all = total[place], less = inner[place];
        EACH for (int64_t j = begin; j < past; j++) {
            float p = power(get(row[j]) * scale - all);
            row[j] = put(p);
            d[j] = put(p * (get(d[j]) - less) * scale);
        }
        EACH for (int64_t j = 0; j < begin; j++) row[j] = d[j] = 0;
        EACH for (int64_t j = past; j < keys; j++) row[j] = d[j] = 0;
    }
}

void cross_entropy(real *logits, float *loss, const int64_t *targets, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        real *row = logits + i * size;
        float most = -INFINITY, sum = 0;
        MOST(most) for (int64_t j = 0; j < size; j++) most = get(row[j]) > most ? get(row[j]) : most;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += power(get(row[j]) - most);
        float all = most + logf(sum), right = get(row[targets[i]]);
        loss[i] = all - right;
        EACH for (int64_t j = 0; j < size; j++) row[j] = put(power(get(row[j]) - all));
        row[targets[i]] = put(expf(right - all) - 1);
    }
}
