/* Operations between the matrix products of a LoRA step, each fused into one pass over memory. Each function has the same
   name, arguments and result as its reference in reference.py, which says what it computes. */
#include "numbers.h"

void rms_norm(real *y, float *inverse, const real *x, const real *weight, float epsilon, float added, int64_t rows,
              int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *a = x + i * size;
        real *b = y + i * size;
        float sum = 0;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += get(a[j]) * get(a[j]);
        float scale = inverse[i] = 1 / sqrtf(sum / size + epsilon);
        if (added == 0)
            EACH for (int64_t j = 0; j < size; j++) b[j] = put(get(weight[j]) * get(put(get(a[j]) * scale)));
        else
            EACH for (int64_t j = 0; j < size; j++) b[j] = put((added + get(weight[j])) * (get(a[j]) * scale));
    }
}

void rms_norm_backward(real *dx, const real *dy, const real *x, const real *weight, const float *inverse, float added,
                       int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *a = x + i * size, *d = dy + i * size;
        real *b = dx + i * size;
        float scale = inverse[i], sum = 0;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += get(d[j]) * (added + get(weight[j])) * get(a[j]);
        float share = sum * scale * scale / size;
        EACH for (int64_t j = 0; j < size; j++)
            b[j] = put(scale * (get(d[j]) * (added + get(weight[j])) - share * get(a[j])));
    }
}

void swiglu(real *y, const real *both, float linear, float cubic, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *gate = both + 2 * i * size, *up = gate + size;
        real *b = y + i * size;
        EACH for (int64_t j = 0; j < size; j++) {
            float g = get(gate[j]);
            b[j] = put(g / (1 + power(-g * (linear + cubic * g * g))) * get(up[j]));
        }
    }
}

void swiglu_backward(real *dboth, const real *dy, const real *both, float linear, float cubic, int64_t rows,
                     int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *gate = both + 2 * i * size, *up = gate + size, *d = dy + i * size;
        real *dgate = dboth + 2 * i * size, *dup = dgate + size;
        EACH for (int64_t j = 0; j < size; j++) {
            float g = get(gate[j]), u = get(up[j]), dj = get(d[j]), c = cubic * g * g;
            float s = 1 / (1 + power(-g * (linear + c)));
            dgate[j] = put(dj * u * s * (1 + g * (1 - s) * (linear + 3 * c)));
            dup[j] = put(dj * g * s);
        }
    }
}

/* One head of one token, turned by its angles; way: 1 forward, -1 back. */
static inline void turn(real *to, const real *from, const float *cosine, const float *sine, float way, int64_t size) {
    int64_t half = size / 2;
    EACH for (int64_t j = 0; j < half; j++) {
        float first = get(from[j]), second = get(from[j + half]);
        to[j] = put(first * cosine[j] - way * second * sine[j + (way < 0 ? half : 0)]);
        to[j + half] = put(second * cosine[j + half] + way * first * sine[j + (way < 0 ? 0 : half)]);
    }
}

static inline void copy(real *to, const real *from, int64_t size) {
    EACH for (int64_t j = 0; j < size; j++) to[j] = from[j];
}

void split_heads(real *query, real *key, real *value, const real *joined, const float *cosine, const float *sine,
                 int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    ROWS for (int64_t i = 0; i < tokens; i++) {
        const real *from = joined + i * (groups * heads + 2 * groups) * size;
        const float *c = cosine + i * size, *s = sine + i * size;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0; h < heads; h++, from += size)
                turn(query + ((g * tokens + i) * heads + h) * size, from, c, s, 1, size);
        for (int64_t g = 0; g < groups; g++, from += size) turn(key + (g * tokens + i) * size, from, c, s, 1, size);
        for (int64_t g = 0; g < groups; g++, from += size) copy(value + (g * tokens + i) * size, from, size);
    }
}

void join_heads(real *joined, const real *query, const real *key, const real *value, const float *cosine,
                const float *sine, int64_t tokens, int64_t groups, int64_t heads, int64_t size) {
    ROWS for (int64_t i = 0; i < tokens; i++) {
        real *to = joined + i * (groups * heads + 2 * groups) * size;
        const float *c = cosine + i * size, *s = sine + i * size;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t h = 0; h < heads; h++, to += size)
                turn(to, query + ((g * tokens + i) * heads + h) * size, c, s, -1, size);
        for (int64_t g = 0; g < groups; g++, to += size) turn(to, key + (g * tokens + i) * size, c, s, -1, size);
        for (int64_t g = 0; g < groups; g++, to += size) copy(to, value + (g * tokens + i) * size, size);
    }
}

void add_lora(real *y, const real *x, const real *down, const real *up, int64_t rows, int64_t in, int64_t rank,
              int64_t out) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t i = 0; i < rows; i++) {
        const real *from = x + i * in;
        real *to = y + i * out;
        float change[out];
        EACH for (int64_t j = 0; j < out; j++) change[j] = 0;
        for (int64_t r = 0; r < rank; r++) {
            float sum = 0;
            SUM(sum) for (int64_t j = 0; j < in; j++) sum += get(from[j]) * get(down[r * in + j]);
            sum = get(put(sum));
            EACH for (int64_t j = 0; j < out; j++) change[j] += sum * get(up[r * out + j]);
        }
        EACH for (int64_t j = 0; j < out; j++) to[j] = put(get(to[j]) + change[j]);
    }
}

void dequantize(real *y, const int8_t *x, const float *scales, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const int8_t *a = x + i * size;
        real *b = y + i * size;
        float scale = scales[i];
        EACH for (int64_t j = 0; j < size; j++) b[j] = put(scale * a[j]);
    }
}

/* `code`: the values of the 16 numbers of 4 bits, of which each byte has two. size is a multiple of 16. */
void dequantize_4bit(real *y, const uint8_t *x, const float *scales, const float *code, int64_t blocks, int64_t size) {
    ROWS for (int64_t i = 0; i < blocks; i++) {
        sixteen values, found;
        sixteen_words numbers;
        for (int64_t k = 0; k < 16; k++) {
            real value = put(code[k] * scales[i]);
            memcpy((bits *)&values + k, &value, sizeof value);
        }
        for (int64_t j = 0; j < size; j += 16) {
            unpack(&numbers, x + (i * size + j) / 2);
            SHUFFLE(found, values, __builtin_convertvector(numbers, sixteen));
            memcpy(y + i * size + j, &found, sizeof found);
        }
    }
}

/* The largest magnitude, by the bits, whose order is the same; NaN, if there is one, is above all. */
static float magnitude(const real *x, int64_t size) {
    word most = {.bits = 0};
    uint32_t bits = 0;
    MOST(bits) for (int64_t j = 0; j < size; j++) {
        word w = {.value = fabsf(get(x[j]))};
        bits = w.bits > bits ? w.bits : bits;
    }
    most.bits = bits;
    return most.value;
}

void quantize_8bit(int8_t *y, float *most, const real *x, int64_t rows, int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const real *a = x + i * size;
        int8_t *b = y + i * size;
        most[i] = magnitude(a, size);
        float scale = most[i] > 0 ? 127 * (1 / most[i]) : 0;
        EACH for (int64_t j = 0; j < size; j++) b[j] = (int8_t)(int32_t)rintf(get(a[j]) * scale);
    }
}

/* A number is the count of `bounds` below it, of 15; `order`: what is written for each count. */
void quantize_4bit(uint8_t *y, float *most, const real *x, const float *bounds, const uint8_t *order, int64_t blocks,
                   int64_t size) {
    ROWS for (int64_t i = 0; i < blocks; i++) {
        const real *a = x + i * size;
        uint8_t *b = y + i * size / 2;
        most[i] = magnitude(a, size);
        float scale = 1 / (most[i] > 1e-38f ? most[i] : 1e-38f);
        int32_t counts[size];
        EACH for (int64_t j = 0; j < size; j++) {
            float scaled = get(a[j]) * scale;
            int32_t count = 0;
            for (int64_t k = 0; k < 15; k++) count += !(scaled <= bounds[k]);
            counts[j] = count;
        }
        for (int64_t j = 0; j < size / 2; j++) b[j] = order[counts[2 * j]] << 4 | order[counts[2 * j + 1]];
    }
}

/* Of up to four tokens, whose sums do not wait for each other. */
void linear_8bit(real *y, const float *x, const int8_t *weight, const float *scales, int64_t tokens, int64_t in,
                 int64_t out) {
    const float *b = x, *c = tokens > 1 ? b + in : b, *d = tokens > 2 ? c + in : b, *e = tokens > 3 ? d + in : b;
    ROWS for (int64_t i = 0; i < out; i++) {
        const int8_t *a = weight + i * in;
        float one = 0, two = 0, three = 0, four = 0;
        if (tokens == 1)
            SUM(one) for (int64_t j = 0; j < in; j++) one += a[j] * b[j];
        else SUM(one, two, three, four) for (int64_t j = 0; j < in; j++) {
            float w = a[j];
            one += w * b[j];
            two += w * c[j];
            three += w * d[j];
            four += w * e[j];
        }
        float sums[] = {one, two, three, four};
        for (int64_t t = 0; t < tokens; t++) y[t * out + i] = put(scales[i] * sums[t]);
    }
}

/* An output of `tokens` tokens, which the compiler knows: one, or four. */
static inline void output_4bit(float *sums, const float *const *x, const uint8_t *weight, const float *scales,
                               const sixteen_floats *code, int64_t in, int64_t size, const int64_t tokens) {
    sixteen_floats all[4] = {0};
    for (int64_t start = 0; start < in; start += size) {
        sixteen_floats some[4] = {0}, states, w;
        sixteen_words numbers;
        for (int64_t j = start; j < start + size; j += 16) {
            unpack(&numbers, weight + j / 2);
            SHUFFLE(w, *code, numbers);
            for (int64_t t = 0; t < tokens; t++) {
                memcpy(&states, x[t] + j, sizeof states);
                some[t] += w * states;
            }
        }
        for (int64_t t = 0; t < tokens; t++) all[t] += some[t] * scales[start / size];
    }
    for (int64_t t = 0; t < tokens; t++) {
        sums[t] = 0;
        for (int64_t k = 0; k < 16; k++) sums[t] += all[t][k];
    }
}

/* Of up to four tokens, see `linear_8bit`; rows begin with a block, of `size` numbers. */
void linear_4bit(real *y, const float *x, const uint8_t *weight, const float *scales, const float *code, int64_t tokens,
                 int64_t in, int64_t out, int64_t size) {
    const float *states[4];
    sixteen_floats values;
    for (int64_t t = 0; t < 4; t++) states[t] = x + (t < tokens ? t : 0) * in;
    memcpy(&values, code, sizeof values);
    ROWS for (int64_t i = 0; i < out; i++) {
        const uint8_t *a = weight + i * in / 2;
        const float *factors = scales + i * in / size;
        float sums[4];
        if (tokens == 1) output_4bit(sums, states, a, factors, &values, in, size, 1);
        else output_4bit(sums, states, a, factors, &values, in, size, 4);
        for (int64_t t = 0; t < tokens; t++) y[t * out + i] = put(sums[t]);
    }
}

void cross_entropy(real *logits, float *loss, const int64_t *targets, const float *weights, int64_t rows,
                   int64_t size) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        real *row = logits + i * size;
        float most = -INFINITY, sum = 0;
        MOST(most) for (int64_t j = 0; j < size; j++) most = get(row[j]) > most ? get(row[j]) : most;
        SUM(sum) for (int64_t j = 0; j < size; j++) sum += power(get(row[j]) - most);
        float all = most + logf(sum), right = get(row[targets[i]]), weight = weights == NULL ? 1 : weights[i];
        loss[i] = all - right;
        EACH for (int64_t j = 0; j < size; j++) row[j] = put(weight * power(get(row[j]) - all));
        row[targets[i]] = put(weight * (expf(right - all) - 1));
    }
}
