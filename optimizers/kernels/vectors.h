/* Vectors of REAL, float or double, by the compiler's vector extensions: what the kernels beside this file share. They are
 * as wide as the machine's registers: of wider ones compilers make poor code. INTEGER is the integer of the same size.
 */
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64 /* bytes */
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES ((int)(WIDTH / sizeof(REAL)))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
#define INLINE static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(WIDTH)));
typedef INTEGER ivec __attribute__((vector_size(WIDTH)));

INLINE vec spread(REAL x) { return x - (vec){0}; }

/* Into [-bound, bound]. NaN stays NaN: comparisons with it are false, and the instructions return their second operand. */
#ifdef __AVX512F__
INLINE vec clamp(vec x, vec bound) {
    if (sizeof(REAL) == 4) return (vec)_mm512_max_ps((__m512)-bound, _mm512_min_ps((__m512)bound, (__m512)x));
    return (vec)_mm512_max_pd((__m512d)-bound, _mm512_min_pd((__m512d)bound, (__m512d)x));
}
#else
INLINE vec clamp(vec x, vec bound) {
    ivec above = x > bound, below = x < -bound;
    return (vec)((above & (ivec)bound) | (below & (ivec)-bound) | (~(above | below) & (ivec)x));
}
#endif

/* exp(x) = scale * (p + 1), p small, to a few units in the last place, for x in [-80, 80], doubles' in [-600, 600]. */
INLINE vec parts_of_exp(vec x, vec *scale) {
    x = clamp(x, spread(sizeof(REAL) == 4 ? 80 : 600));
    /* x = n ln 2 + r: adding 1.5 * 2^mantissa rounds n to an integer and leaves it in the low bits. */
    const REAL magic = sizeof(REAL) == 4 ? 12582912.0f : 6755399441055744.0;
    const int mantissa = sizeof(REAL) == 4 ? 23 : 52;
    vec shifted = x * (REAL)1.4426950408889634074 + magic, n = shifted - magic;
    ivec exponent = ((ivec)shifted - (ivec)spread(magic) + (sizeof(REAL) == 4 ? 127 : 1023)) << mantissa;
    *scale = (vec)exponent;
    vec r = sizeof(REAL) == 4 ? (x - n * (REAL)0.693145751953125) - n * (REAL)1.42860682030941723212e-6
                              : (x - n * (REAL)6.93147180369123816490e-01) - n * (REAL)1.90821492927058770002e-10;
    /* The Taylor series of (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2. */
    vec p;
    if (sizeof(REAL) == 4) {
        p = spread((REAL)(1. / 5040));
    } else {
        p = spread((REAL)(1. / 6227020800.));
        p = p * r + (REAL)(1. / 479001600.);
        p = p * r + (REAL)(1. / 39916800);
        p = p * r + (REAL)(1. / 3628800);
        p = p * r + (REAL)(1. / 362880);
        p = p * r + (REAL)(1. / 40320);
        p = p * r + (REAL)(1. / 5040);
    }
    p = p * r + (REAL)(1. / 720);
    p = p * r + (REAL)(1. / 120);
    p = p * r + (REAL)(1. / 24);
    p = p * r + (REAL)(1. / 6);
    p = p * r + (REAL)0.5;
    return p * r * r + r;
}

/* exp(x) - 1, near 0 too. */
INLINE vec expm1_(vec x) {
    vec scale, p = parts_of_exp(x, &scale);
    return scale * p + (scale - 1);
}

/* floats: AVX-512 splits an exponent from its fraction f, |f| <= 1/2, and puts it back, each in one instruction; powers
 * past the range of floats become 0 or infinity as they should. The polynomials have the least largest relative error,
 * 2e-9 and 1e-8; with rounding tanh has 3e-7, and sigmoid an absolute error of 1e-7. */
#ifdef __AVX512DQ__
#define FAST_EXP2 (sizeof(REAL) == 4)
INLINE vec fraction(vec x) { return (vec)_mm512_reduce_ps((__m512)x, 0); }
INLINE vec scaled(vec x, vec exponent) { return (vec)_mm512_scalef_ps((__m512)x, (__m512)exponent); }
INLINE vec at_most(vec bound, vec x) { return (vec)_mm512_min_ps((__m512)bound, (__m512)x); } /* NaN stays NaN */
INLINE vec exp2_(vec x) {
    vec f = fraction(x), p = spread((REAL)1.53458120e-04);
    p = p * f + (REAL)1.33999314e-03;
    p = p * f + (REAL)9.61848896e-03;
    p = p * f + (REAL)5.55032878e-02;
    p = p * f + (REAL)2.40226469e-01;
    p = p * f + (REAL)6.93147206e-01;
    p = p * f + (REAL)1;
    return scaled(p, x - f);
}
INLINE vec exp2m1(vec x) {
    vec f = fraction(x), p = spread((REAL)1.54035127e-04), scale = scaled(spread(1), x - f);
    p = p * f + (REAL)1.33907356e-03;
    p = p * f + (REAL)9.61823749e-03;
    p = p * f + (REAL)5.55035743e-02;
    p = p * f + (REAL)2.40226498e-01;
    p = p * f + (REAL)6.93147188e-01;
    return scale * (p * f) + (scale - 1);
}
#else
#define FAST_EXP2 0
INLINE vec at_most(vec bound, vec x) { return bound + x; } /* these three are never called */
INLINE vec exp2_(vec x) { return x; }
INLINE vec exp2m1(vec x) { return x; }
#endif

INLINE vec sigmoid(vec x) {
    if (FAST_EXP2) return 1 / (1 + exp2_(x * (REAL)-1.4426950408889634074));
    return 1 / (2 + expm1_(-x));
}
INLINE vec tanh_(vec x) {
    vec e = FAST_EXP2 ? exp2m1(at_most(spread(64), x * (REAL)2.8853900817779268147)) : expm1_(2 * x);
    return e / (e + 2);
}

/* The logarithm to base 2 of what is positive or 0, to a few units in the last place; infinity and NaN stay. Of what is
 * below the smallest normal number it is that of 2^-126, doubles' 2^-1022. */
INLINE vec log2_(vec x) {
    const int mantissa = sizeof(REAL) == 4 ? 23 : 52;
    const INTEGER root = sizeof(REAL) == 4 ? 0x3f3504f3 : (INTEGER)0x3fe6a09e667f3bcdLL; /* of 1/2 */
    const REAL least = sizeof(REAL) == 4 ? 1.17549435e-38f : 2.2250738585072014e-308;
    const REAL most = sizeof(REAL) == 4 ? 3.40282347e38f : 1.7976931348623157e308;
    ivec small = x < least, finite = x <= most;
    ivec bits = (ivec)((small & (ivec)spread(least)) | (~small & (ivec)x));
    ivec exponent = (bits - root) >> mantissa; /* x = 2^exponent * f, f between the roots of 1/2 and 2 */
    vec f = (vec)(bits - (exponent << mantissa)), s = (f - 1) / (f + 1), t = s * s;
    vec p = spread(0);
    /* ln f = 2 artanh s = 2 s (1 + t / 3 + t^2 / 5 + ...), t < 0.0295. */
    for (int k = sizeof(REAL) == 4 ? 9 : 21; k > 0; k -= 2) p = p * t + (REAL)1 / k;
    vec found = s * p * (REAL)2.8853900817779268147 + __builtin_convertvector(exponent, vec);
    return (vec)((finite & (ivec)found) | (~finite & (ivec)x));
}

/* exp(x), 0 or infinite past the range of floats. */
INLINE vec exp_(vec x) {
    if (FAST_EXP2) return exp2_(x * (REAL)1.4426950408889634074);
    vec scale, p = parts_of_exp(x * (REAL)0.5, &scale), root = scale * p + scale; /* so that its bound is past the range */
    return root * root;
}
INLINE vec power_of_2(vec x) { return FAST_EXP2 ? exp2_(x) : exp_(x * (REAL)0.69314718055994530942); }

INLINE REAL total(vec x) {
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* Keeps the compiler from reading a value from memory again for each of its uses. */
#if defined(__x86_64__) && defined(__AVX512F__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif

INLINE vec load(const REAL *at) { return *(const vec *)at; }
INLINE void store(REAL *at, vec x) { *(vec *)at = x; }

static REAL *aligned(size_t count) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (count ? count : 1) * sizeof(REAL))) return NULL;
    memset(memory, 0, count * sizeof(REAL));
    return memory;
}

/* From and to any address. */
typedef REAL anywhere __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));
INLINE vec load_any(const REAL *at) { return (vec)*(const anywhere *)at; }
INLINE void store_any(REAL *at, vec x) { *(anywhere *)at = (anywhere)x; }
