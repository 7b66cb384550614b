/* Numbers as they are stored, `real`: bfloat16 with -DBFLOAT16, float32 without; arithmetic is in float32. Arrays are
   dense; rows are shared out among OpenMP's threads. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS _Pragma("omp parallel for schedule(static)")
#define EACH _Pragma("omp simd")
#define SUM(...) _Pragma(STRING(omp simd reduction(+ : __VA_ARGS__)))
#define MOST(x) _Pragma(STRING(omp simd reduction(max : x)))
#define ANY(x) _Pragma(STRING(omp simd reduction(| : x)))
#define STRING(...) #__VA_ARGS__

typedef union { uint32_t bits; float value; } word;
/* As many numbers as a register holds: of wider vectors, each step of a sum would go through memory. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float vector __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t unit __attribute__((may_alias));
typedef uint32_t units __attribute__((vector_size(4 * WIDTH), may_alias));

#ifdef BFLOAT16
typedef uint16_t real, bits;
static inline float get(real x) { word w = {.bits = (uint32_t)x << 16}; return w.value; }
static inline real put(float x) {
    word w = {.value = x};
    uint32_t rounded = (w.bits + 0x7fff + ((w.bits >> 16) & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}
static inline int is_lost(real x) { return (x & 0x7f80) == 0x7f80; }
#else
typedef float real;
typedef uint32_t bits;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
static inline int is_lost(real x) { word w = {.value = x}; return (w.bits & 0x7f800000) == 0x7f800000; }
#endif
typedef bits sixteen __attribute__((vector_size(16 * sizeof(real))));
typedef float sixteen_floats __attribute__((vector_size(64)));
typedef uint32_t sixteen_words __attribute__((vector_size(64)));
typedef uint64_t eight_longs __attribute__((vector_size(64)));
#ifdef __clang__
#define SHUFFLE(to, from, places) for (int64_t k = 0; k < 16; k++) (to)[k] = (from)[(places)[k]]
#else
#define SHUFFLE(to, from, places) to = __builtin_shuffle(from, places)
#endif
/* The 16 numbers of 4 bits in 8 bytes, the first of a byte in its upper half. */
static inline void unpack(sixteen_words *numbers, const uint8_t *bytes) {
    eight_longs pairs;
    for (int64_t k = 0; k < 8; k++) pairs[k] = bytes[k] >> 4 | (uint64_t)(bytes[k] & 15) << 32;
    *numbers = (sixteen_words)pairs;
}
/* `is_lost`: NaN or infinite. Where a sum goes over more than it should, with weights of 0 for the rest, such numbers
   would get into it, as 0 times NaN is NaN: they are kept out, and added where they belong. */
static inline real kept(real x) { return is_lost(x) ? 0 : x; }

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

