/* The inner loops: updates added and rounded once, proven right; distances of bfloat16.
 *
 * Optional: without a compiler numpy does the same (numpy_kernel.py), with the same bytes. Compiled
 * with -ffp-contract=off: multiplications and additions are fused where it says so, and nowhere else.
 *
 * An element is w + sum of s * b[k] * a[k] over the ranks of all terms, a real number, rounded once to
 * nearest even. It is computed in fp32 or fp64 with a bound of the error. If no boundary between two
 * roundings is within the bound, what is rounded is right, whatever the order of the sums was. The
 * others go on (`settle`): to fp64, then to sums that note their errors, and what is then still open
 * to the caller, who has exact integers (exact.py). So no byte depends on any of these loops.
 *
 * The bound in fp32 (u = 2^-24). Let S = sum |s b[k] a[k]| <= |s b| |a| (Cauchy-Schwarz, norms rounded
 * up). s b[k] is rounded once to fp32. A chunk is n = min(r, CHUNK) products summed from 0, each rounded
 * at most n times (n fused steps, or one multiplication and n - 1 additions, as the first is to 0); q =
 * ceil(r / CHUNK) chunks are added, each at most q - 1 times; w is added last. So each product is rounded
 * at most m = n + q + 1 times and w once, and the error is at most g S + u |w| with g = m u / (1 - m u).
 * c = m + 2: the 2 u S more than cover g's denominator, as long as m^2 u < 1, and the roundings of the
 * bound itself, 4 u c S. Underflow: additions are exact there, each of the r products and each s b[k] is
 * off by at most 2^-150; the latter times |a[k]|, which the caller has put into the norm of s b. What is
 * left is r 2^-150, and a few of that of the bound itself: less than `tiny`. Overflow ends in an
 * infinity or NaN, which is never proven.
 *
 * DoRA's factors f are off by `slack` at most, and rounded to fp32, as is the product with the sum: the
 * error is that of the sum times |f|, and (slack + 2 u) of the result, for which slack + 4 u is taken.
 *
 * In fp64 (u = 2^-53) s b[k] is rounded at most three times, or b[k] a[k] is exact and s and the product
 * with it are rounded; with the additions of r products, of all terms and of w less than r + terms + 6.
 * Nothing underflows while |s| is in 2^-200..2^200; beyond that the caller does what is left.
 */
#if defined(__FAST_MATH__) || (defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0)
#error "the proofs need every operation rounded as it stands: without this module numpy does the same"
#endif
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 64 /* columns of A that lie together; low_rank.py has the same */
#define ROWS 6 /* that are multiplied at a time; low_rank.py pads to it */
#define BLOCK (8 * ROWS)
#define CHUNK 32 /* ranks that are summed by themselves; the caller knows it from `bounds` */
#define LANES 16 /* sums that are kept apart; rounding.py has the same */

enum { BF16, F16, F32 };

typedef struct {
    /* A window of `rows` and `columns`, of which the first is column `first` of the panels. */
    const char *old;
    char *out;
    ptrdiff_t old_stride, out_stride, rows, columns, first;
    int old_type, out_type;
    int old_size, out_size;
    /* A in panels (panel, rank, PANEL) and the norms of its columns; rows of B as they are, times s in
     * fp32 or fp64 (`wide`), and the norms of these; where terms end, and their s in two parts. */
    ptrdiff_t rank;
    const float *panels, *norms, *left, *row_norms;
    const void *scaled;
    int wide;
    ptrdiff_t terms;
    const int64_t *ends;
    const double *scales;
    int safe;
    float bound, tiny;
    double bound_wide;
    /* What sums are multiplied by (by row, or by column of the panels), and how far that may be off. */
    const double *factor;
    int by_row;
    double slack;
    /* Squares of rows or columns: high and low part, bound. */
    double *sums;
    double column_sums[2 * PANEL];
    /* What is found. */
    double effected[LANES], intended[LANES];
    int64_t unchanged, rechecked;
    uint32_t *hard;
    size_t hard_count, hard_room;
    int out_of_memory;
} job_t;

static inline double two_sum(double one, double other, double *error)
{
    double sum = one + other, back = sum - one;
    *error = (one - (sum - back)) + (other - back);
    return sum;
}

static inline double two_product(double one, double other, double *error)
{
    double product = one * other, split = 134217729.0 * one, high = split - (split - one);
    double low = one - high, other_split = 134217729.0 * other;
    double other_high = other_split - (other_split - other), other_low = other - other_high;
    *error = low * other_low
             - (((product - high * other_high) - low * other_high) - high * other_low);
    return product;
}

/* A sum in two parts, and a bound of what they lack: 0 if nothing was lost. */
typedef struct {
    double high, low, rest;
} sum_t;

static inline void add(sum_t *sum, double value)
{
    double error, lost;
    sum->high = two_sum(sum->high, value, &error);
    sum->low = two_sum(sum->low, error, &lost);
    sum->rest += fabs(lost);
}

static double power(int exponent)
{
    uint64_t bits = (uint64_t)(1023 + exponent) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds `value`, not zero, to a type; false if that is not certain, or does not fit. The number meant
 * is within `error` of `value`, or, if that is 0, it is `value + low`, give or take `rest`, both of them
 * less than half of the last place of `value`. */
static int round_near(double value, double error, double low, double rest, int type, float *result)
{
    int digits = type == BF16 ? 8 : type == F16 ? 11 : 24, least = type == F16 ? -14 : -126;
    double most = type == BF16 ? 0x1.fep127 : type == F16 ? 65504.0 : 0x1.fffffep127;
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    int exponent = (int)(bits >> 52 & 0x7ff) - 1023;
    if (exponent < -900 || exponent > 900)
        return 0;
    uint64_t number = (bits & ((UINT64_C(1) << 52) - 1)) | UINT64_C(1) << 52;
    int scale = exponent < least ? least : exponent; /* of the result */
    int drop = 53 - digits + scale - exponent;
    uint64_t whole = 0, up = 0;
    if (!(error < fabs(value))) /* its sign is not certain either */
        return 0;
    if (drop <= 54) { /* otherwise it is less than half of the smallest number */
        uint64_t half = UINT64_C(1) << (drop - 1), part = number & (2 * half - 1);
        whole = number >> drop;
        uint64_t distance = part < half ? half - part : part - half;
        if (whole == UINT64_C(1) << (digits - 1) && exponent > least
            && part + half / 2 < distance) /* the boundary below a power of two */
            distance = part + half / 2;
        if (error > 0) {
            if (!((double)distance * power(exponent - 52) > error))
                return 0;
            up = part > half;
        } else if (part != half) {
            up = part > half;
        } else {
            double more = value < 0 ? -low : low;
            if (rest > 0 && !(fabs(low) > rest))
                return 0;
            up = more > 0 || (more == 0 && (whole & 1));
        }
    }
    double found = (double)(whole + up) * power(scale - digits + 1);
    if (found > most)
        return 0;
    *result = (float)(value < 0 ? -found : found);
    return 1;
}

/* The same without rounding where that is possible: the errors of all sums are summed as well. Of what
 * DoRA scales it only finds out whether it is 0. */
static int settle_exactly(const job_t *job, const float *a, const float *b, float w, float *result)
{
    sum_t all = {0, 0, 0};
    double error;
    ptrdiff_t k = 0;
    for (ptrdiff_t term = 0; term < job->terms; term++) {
        const double *scale = job->scales + 2 * term;
        sum_t dot = {0, 0, 0};
        for (; k < job->ends[term]; k++)
            add(&dot, (double)b[k] * (double)a[k * PANEL]);
        dot.high = two_sum(dot.high, dot.low, &dot.low);
        for (int part = 0; part < 2; part++)
            for (int other = 0; other < 2; other++) {
                double value = part ? dot.low : dot.high;
                add(&all, two_product(value, scale[other], &error));
                add(&all, error);
            }
        all.rest += 1.001 * dot.rest * fabs(scale[0]);
    }
    all.high = two_sum(all.high, all.low, &all.low);
    if (all.high == 0 && all.low == 0 && all.rest == 0) { /* nothing is added */
        *result = w;
        return w == 0 || (job->factor == NULL && round_near(w, 0, 0, 0, job->out_type, result));
    }
    add(&all, w);
    all.high = two_sum(all.high, all.low, &all.low);
    all.rest *= 1.001;
    if (all.high == 0 && all.low == 0 && all.rest == 0) {
        *result = 0;
        return 1;
    }
    if (!(all.rest <= fabs(all.high) * 0x1p-56) || all.high == 0 || job->factor != NULL)
        return 0;
    return round_near(all.high, 0, all.low, all.rest, job->out_type, result);
}

/* Computes an element again in fp64, and again more exactly; false if it is still open. */
static int settle(const job_t *job, ptrdiff_t row, ptrdiff_t panel, int column, float w,
                  float *result)
{
    const float *a = job->panels + panel * job->rank * PANEL + column;
    const float *b = job->left + row * job->rank;
    double norm = job->row_norms[row], other = job->norms[panel * PANEL + column];
    if (!isfinite(w))
        return 0;
    double factor = 1;
    if (job->factor != NULL)
        factor = job->factor[job->by_row ? row : panel * PANEL + column];
    if (norm == 0 || other == 0) { /* nothing is added */
        *result = w;
        if (w == 0)
            return 1;
        if (job->factor == NULL)
            return round_near(w, 0, 0, 0, job->out_type, result);
    }
    if (factor == 0 && w != 0) {
        *result = 0;
        return 1;
    }
    if (!job->safe)
        return 0;
    double update = 0;
    ptrdiff_t k = 0;
    for (ptrdiff_t term = 0; term < job->terms; term++) {
        double sums[4] = {0};
        ptrdiff_t end = job->ends[term];
        for (; k + 4 <= end; k += 4)
            for (int i = 0; i < 4; i++)
                sums[i] += (double)b[k + i] * (double)a[(k + i) * PANEL];
        for (; k < end; k++)
            sums[0] += (double)b[k] * (double)a[k * PANEL];
        update += job->scales[2 * term] * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    double total = w + update, error = job->bound_wide * (norm * other + fabs((double)w));
    if (job->factor != NULL) {
        total *= factor;
        error = error * fabs(factor) + job->slack * fabs(total);
    }
    if (total != 0 && error > 0 && round_near(total, error, 0, 0, job->out_type, result))
        return 1;
    return settle_exactly(job, a, b, w, result);
}

static void note_hard(job_t *job, ptrdiff_t row, ptrdiff_t column)
{
    job->unchanged--; /* it will be counted as what it becomes */
    if (job->hard_count + 2 > job->hard_room) {
        size_t room = job->hard_room ? 2 * job->hard_room : 128;
        uint32_t *wider = realloc(job->hard, room * sizeof *wider);
        if (wider == NULL) {
            job->out_of_memory = 1;
            return;
        }
        job->hard = wider;
        job->hard_room = room;
    }
    job->hard[job->hard_count++] = (uint32_t)row;
    job->hard[job->hard_count++] = (uint32_t)column;
}

/* Adds a square to one of the sums, which loses next to nothing however many there are. */
static void add_square(job_t *job, ptrdiff_t place, double square, double bound)
{
    double *sum = job->sums + 3 * place, error;
    sum[0] = two_sum(sum[0], square, &error);
    sum[1] += error;
    sum[2] += bound;
}

/* --- one set of loops for each kind of processor ------------------------------------------------- */

#if defined(__x86_64__) && defined(__GNUC__)
#define IS_X86 1
#include <immintrin.h>
#else
#define IS_X86 0
#endif

#if IS_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define NAME(x) x##_avx512
#define WIDTH 64
#define VECTORS 4
#define FMAF(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FMAD(a, b, c) ((vd)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define GREATER(a, b) ((uint64_t)_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GT_OQ))
#define GREATERD(a, b) ((uint64_t)_mm512_cmp_pd_mask((__m512d)(a), (__m512d)(b), _CMP_GT_OQ))
#define LOW(a) ((vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)(a))))
#define HIGH(a) ((vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)(a), 1)))
#include "_tiles.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NAME(x) x##_avx2
#define WIDTH 32
#define VECTORS 2
#define FMAF(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FMAD(a, b, c) ((vd)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define GREATER(a, b) \
    ((uint64_t)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GT_OQ)))
#define GREATERD(a, b) \
    ((uint64_t)(unsigned)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)(a), (__m256d)(b), _CMP_GT_OQ)))
#define LOW(a) ((vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)(a))))
#define HIGH(a) ((vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)(a), 1)))
#include "_tiles.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* What every processor has: vectors of 16 bytes, no fused steps. */
typedef float four_t __attribute__((vector_size(16)));
typedef double two_t __attribute__((vector_size(16)));
#define NAME(x) x##_baseline
#define WIDTH 16
#define VECTORS 2
#define FMAF(a, b, c) ((a) * (b) + (c))
#define FMAD(a, b, c) ((a) * (b) + (c))
#if IS_X86
#define GREATER(a, b) ((uint64_t)(unsigned)_mm_movemask_ps(_mm_cmpgt_ps((__m128)(a), (__m128)(b))))
#define GREATERD(a, b) \
    ((uint64_t)(unsigned)_mm_movemask_pd(_mm_cmpgt_pd((__m128d)(a), (__m128d)(b))))
#else
static inline uint64_t greater(four_t a, four_t b)
{
    return (uint64_t)(a[0] > b[0]) | (uint64_t)(a[1] > b[1]) << 1 | (uint64_t)(a[2] > b[2]) << 2
           | (uint64_t)(a[3] > b[3]) << 3;
}
#define GREATER(a, b) greater((four_t)(a), (four_t)(b))
#define GREATERD(a, b) ((uint64_t)((a)[0] > (b)[0]) | (uint64_t)((a)[1] > (b)[1]) << 1)
#endif
#define LOW(a) ((vd){(a)[0], (a)[1]})
#define HIGH(a) ((vd){(a)[2], (a)[3]})
#include "_tiles.h"

typedef struct {
    const char *name;
    void (*run)(job_t *);
} kernel_t;

static kernel_t kernels[3];

static void find_kernels(void)
{
    int count = 0;
#if IS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("fma"))
        kernels[count++] = (kernel_t){"avx512", run_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        kernels[count++] = (kernel_t){"avx2", run_avx2};
#endif
    kernels[count] = (kernel_t){"baseline", run_baseline};
}

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Adds the squared differences of two runs of bfloat16 to `totals`, lane by lane. */
#if IS_X86 && defined(__GLIBC__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
static void distance(const uint16_t *one, const uint16_t *other, Py_ssize_t count, double *totals)
{
    double sums[LANES];
    Py_ssize_t i = 0;
    memcpy(sums, totals, sizeof sums);
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double change = (double)as_float((uint32_t)one[i + lane] << 16)
                            - (double)as_float((uint32_t)other[i + lane] << 16);
            sums[lane] += change * change;
        }
    for (; i < count; i++) {
        double change = (double)as_float((uint32_t)one[i] << 16)
                        - (double)as_float((uint32_t)other[i] << 16);
        sums[0] += change * change;
    }
    memcpy(totals, sums, sizeof sums);
}

/* A row of B: its products with `scale` into `out` (fp64 if `wide`, else fp32), and what its norm is made
 * of: the sum of squares, and whether something is not zero, and so small that fp32 loses it. */
typedef struct {
    double squares;
    int any, tiny;
} row_t;

#if IS_X86 && defined(__GLIBC__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
static row_t scale_row(const float *row, ptrdiff_t count, double scale, void *out, int wide)
{
    double sums[LANES] = {0}, *doubles = out;
    float *floats = out;
    int any[LANES] = {0}, tiny[LANES] = {0};
    row_t found = {0, 0, 0};
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        int lanes = count - i < LANES ? (int)(count - i) : LANES;
        double values[LANES] = {0}, scaled[LANES];
        if (lanes == LANES)
            for (int lane = 0; lane < LANES; lane++)
                values[lane] = row[i + lane];
        else
            for (int lane = 0; lane < lanes; lane++)
                values[lane] = row[i + lane];
        for (int lane = 0; lane < LANES; lane++) {
            scaled[lane] = values[lane] * scale;
            sums[lane] += values[lane] * values[lane];
            any[lane] |= values[lane] != 0;
            tiny[lane] |= (values[lane] != 0) & (fabs(scaled[lane]) < 0x1p-126);
        }
        for (int lane = 0; lane < lanes; lane++) {
            if (wide)
                doubles[i + lane] = scaled[lane];
            else
                floats[i + lane] = (float)scaled[lane];
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        found.squares += sums[lane];
        found.any |= any[lane];
        found.tiny |= tiny[lane];
    }
    return found;
}

/* A run of a row of A into its panels, which lie `step` items apart; `column` is that of the first. */
#if IS_X86 && defined(__GLIBC__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
static void pack_row(const float *row, ptrdiff_t count, ptrdiff_t column, float *panels, ptrdiff_t step,
                     double *squares)
{
    for (ptrdiff_t i = 0; i < count;) {
        ptrdiff_t inner = (column + i) % PANEL, end = i + PANEL - inner;
        float *out = panels + (column + i) / PANEL * step + inner - i;
        for (end = end < count ? end : count; i < end; i++) {
            out[i] = row[i];
            squares[i] += (double)row[i] * (double)row[i];
        }
    }
}

/* --- for Python ---------------------------------------------------------------------------------- */

static const char *const TYPES[] = {"BF16", "F16", "F32"};

static int type_of(const char *name)
{
    for (int type = 0; type < 3; type++)
        if (strcmp(name, TYPES[type]) == 0)
            return type;
    PyErr_Format(PyExc_ValueError, "no kernel for elements of %s", name);
    return -1;
}

/* Buffers that are released together. */
typedef struct {
    Py_buffer views[16];
    int count;
} held_t;

static void release(held_t *held)
{
    while (held->count)
        PyBuffer_Release(&held->views[--held->count]);
}

/* The data of an array of at least `items` items of `size` bytes, or NULL with an exception. With
 * `stride` it is a matrix of `rows` with packed rows. None is NULL without an exception. */
static void *data_of(held_t *held, PyObject *array, Py_ssize_t size, Py_ssize_t items, int writable,
                     Py_ssize_t rows, ptrdiff_t *stride)
{
    if (array == Py_None || PyErr_Occurred())
        return NULL;
    Py_buffer *view = &held->views[held->count];
    int flags = (stride != NULL ? PyBUF_STRIDES : PyBUF_ND) | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array, view, flags) < 0)
        return NULL;
    held->count++;
    int fits = view->itemsize == size && view->len >= size * items;
    if (stride != NULL) {
        fits = fits && view->ndim == 2 && view->shape[0] == rows && view->len == size * items
               && (view->strides[1] == size || view->shape[1] <= 1);
        *stride = fits ? view->strides[0] : 0;
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "array %d is not of %zd items of %zd bytes", held->count,
                     items, size);
        return NULL;
    }
    return view->buf;
}

/* Other code of the process may have set it to flush subnormal numbers to zero. */
static inline unsigned begin_exact(void)
{
#if IS_X86
    unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return before;
#else
    return 0;
#endif
}

static inline void end_exact(unsigned before)
{
#if IS_X86
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

PyDoc_STRVAR(merge_doc,
    "merge(kernel, rows, columns, first, old, old_type, out, out_type, wide, rank, panels, norms,\n"
    "      left, scaled, row_norms, ends, scales, safe, bound, tiny, bound_wide, factor, by_row,\n"
    "      slack, sums) -> (effected, intended, unchanged, rechecked, hard)\n\n"
    "Round `(old + s * left @ panels) * factor` to nearest even into `out`, which may be `old` itself:\n"
    "a window of `rows` x `columns`, the first of which is column `first` of the panels. Returns\n"
    "sums of squares of `out - old` and of what was to be added, how many elements have the value\n"
    "of `old`, how many were computed again, and row and column (uint32 each) of those that are\n"
    "left to the caller. With `sums` (high, low and bound for each row or column) nothing is\n"
    "rounded: squares of the sums are added to these. The kernel's file says what the bounds are.");

static PyObject *merge(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *old, *out, *panels, *norms, *left, *scaled, *row_norms, *ends, *scales, *factor, *sums;
    PyObject *result = NULL;
    const char *name, *old_type, *out_type;
    double bound, tiny;
    held_t held = {.count = 0};
    job_t job = {0};
    const kernel_t *kernel = NULL;
    if (!PyArg_ParseTuple(args, "snnnOsOspnOOOOOOOpdddOpdO", &name, &job.rows, &job.columns,
                          &job.first, &old, &old_type, &out, &out_type, &job.wide, &job.rank,
                          &panels, &norms, &left, &scaled, &row_norms, &ends, &scales, &job.safe,
                          &bound, &tiny, &job.bound_wide, &factor, &job.by_row, &job.slack, &sums))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (kernels[i].name != NULL && strcmp(kernels[i].name, name) == 0)
            kernel = &kernels[i];
    if (kernel == NULL)
        return PyErr_Format(PyExc_ValueError, "no kernel %s here", name);
    if ((job.old_type = type_of(old_type)) < 0 || (job.out_type = type_of(out_type)) < 0)
        return NULL;
    if (!job.wide && (job.out_type != BF16 || sums != Py_None)) {
        PyErr_SetString(PyExc_ValueError, "fp32 is not enough for this");
        return NULL;
    }
    if (job.rows < 0 || job.columns < 0 || job.first < 0 || job.rank < 1
        || (sums != Py_None && job.first)) {
        PyErr_SetString(PyExc_ValueError, "there is no such window");
        return NULL;
    }
    job.old_size = job.old_type == F32 ? 4 : 2;
    job.out_size = job.out_type == F32 ? 4 : 2;
    job.bound = (float)bound;
    job.tiny = (float)tiny;
    Py_ssize_t width = (job.first + job.columns + PANEL - 1) / PANEL * PANEL;
    Py_ssize_t height = (job.rows + ROWS - 1) / ROWS * ROWS, count = job.rows * job.columns;
    Py_ssize_t by = job.by_row ? job.rows : width, summed = job.by_row ? job.rows : job.columns;
    job.old = data_of(&held, old, job.old_size, count, 0, job.rows, &job.old_stride);
    job.out = data_of(&held, out, job.out_size, count, 1, job.rows, &job.out_stride);
    job.panels = data_of(&held, panels, 4, width * job.rank, 0, 0, NULL);
    job.norms = data_of(&held, norms, 4, width, 0, 0, NULL);
    job.left = data_of(&held, left, 4, job.rows * job.rank, 0, 0, NULL);
    job.scaled = data_of(&held, scaled, job.wide ? 8 : 4, height * job.rank, 0, 0, NULL);
    job.row_norms = data_of(&held, row_norms, 4, job.rows, 0, 0, NULL);
    job.ends = data_of(&held, ends, 8, 1, 0, 0, NULL);
    job.terms = PyErr_Occurred() ? 0 : held.views[held.count - 1].len / 8;
    job.scales = data_of(&held, scales, 8, 2 * job.terms, 0, 0, NULL);
    job.factor = data_of(&held, factor, 8, by, 0, 0, NULL);
    job.sums = data_of(&held, sums, 8, 3 * summed, 1, 0, NULL);
    if (!PyErr_Occurred() && (job.out == NULL) == (job.sums == NULL))
        PyErr_SetString(PyExc_ValueError, "either elements or sums are wanted");
    if (!PyErr_Occurred() && (job.terms < 1 || job.ends[job.terms - 1] != job.rank))
        PyErr_SetString(PyExc_ValueError, "the terms do not make up the rank");
    if (PyErr_Occurred())
        goto done;
    Py_BEGIN_ALLOW_THREADS
    unsigned before = begin_exact();
    kernel->run(&job);
    end_exact(before);
    Py_END_ALLOW_THREADS
    double effected = 0, intended = 0;
    for (int lane = 0; lane < LANES; lane++) {
        effected += job.effected[lane];
        intended += job.intended[lane];
    }
    if (job.out_of_memory)
        PyErr_NoMemory();
    else
        result = Py_BuildValue("ddLLN", effected, intended, (long long)job.unchanged,
                               (long long)job.rechecked,
                               /* no "y#": it is another function since Python 3.13 */
                               PyBytes_FromStringAndSize((const char *)job.hard,
                                   (Py_ssize_t)(job.hard_count * sizeof *job.hard)));
done:
    free(job.hard);
    release(&held);
    return result;
}

PyDoc_STRVAR(scale_rows_doc,
    "scale_rows(rows, count, rank, scale, scaled, wide, norms, least, tiny)\n\n"
    "Put `rows * scale` into `scaled`, which is of fp64 if `wide`, and add the norm of each row to that\n"
    "in `norms`: at least `least` if something is not zero, and `tiny` more if fp32 loses some of it.");

static PyObject *scale_rows(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *rows, *scaled, *norms;
    Py_ssize_t count, rank;
    ptrdiff_t step, out_step;
    double scale, least, tiny;
    int wide;
    held_t held = {.count = 0};
    if (!PyArg_ParseTuple(args, "OnndOpOdd", &rows, &count, &rank, &scale, &scaled, &wide, &norms,
                          &least, &tiny))
        return NULL;
    const char *from = data_of(&held, rows, 4, count * rank, 0, count, &step);
    char *to = data_of(&held, scaled, wide ? 8 : 4, count * rank, 1, count, &out_step);
    double *all = data_of(&held, norms, 8, count, 1, 0, NULL);
    if (PyErr_Occurred()) {
        release(&held);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    unsigned before = begin_exact();
    for (Py_ssize_t i = 0; i < count; i++) {
        row_t found = scale_row((const float *)(from + i * step), rank, scale, to + i * out_step, wide);
        double norm = sqrt(found.squares) * fabs(scale);
        if (!found.any)
            norm = 0;
        else if (norm < least)
            norm = least;
        if (found.tiny)
            norm += tiny;
        all[i] = hypot(all[i], norm);
    }
    end_exact(before);
    Py_END_ALLOW_THREADS
    release(&held);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(pack_rows_doc,
    "pack_rows(rows, count, columns, first, panels, rank, at, squares)\n\n"
    "Put `rows`, of columns from `first` on, into panels as ranks from `at` on, and add their squares\n"
    "to those of the columns.");

static PyObject *pack_rows(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *rows, *panels, *squares;
    Py_ssize_t count, columns, first, rank, at;
    ptrdiff_t step;
    held_t held = {.count = 0};
    if (!PyArg_ParseTuple(args, "OnnnOnnO", &rows, &count, &columns, &first, &panels, &rank, &at,
                          &squares))
        return NULL;
    if (first < 0 || at < 0 || columns < 0 || count < 0 || count > rank - at) {
        PyErr_SetString(PyExc_ValueError, "there are no such panels");
        return NULL;
    }
    Py_ssize_t width = (first + columns + PANEL - 1) / PANEL * PANEL;
    const char *from = data_of(&held, rows, 4, count * columns, 0, count, &step);
    float *to = data_of(&held, panels, 4, width * rank, 1, 0, NULL);
    double *sums = data_of(&held, squares, 8, width, 1, 0, NULL);
    if (PyErr_Occurred()) {
        release(&held);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    unsigned before = begin_exact();
    for (Py_ssize_t i = 0; i < count; i++)
        pack_row((const float *)(from + i * step), columns, first, to + (at + i) * PANEL,
                 rank * PANEL, sums + first);
    end_exact(before);
    Py_END_ALLOW_THREADS
    release(&held);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(distance_bf16_doc,
    "distance_bf16(one, other) -> float\n\n"
    "Sum in fp64 of the squared differences of two buffers of as many bfloat16.");

static PyObject *distance_bf16(PyObject *Py_UNUSED(self), PyObject *args)
{
    Py_buffer one, other;
    if (!PyArg_ParseTuple(args, "y*y*", &one, &other))
        return NULL;
    int fits = one.len == other.len && one.len % 2 == 0;
    double sums[LANES] = {0}, total = 0.0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        distance(one.buf, other.buf, one.len / 2, sums);
        for (int lane = 0; lane < LANES; lane++)
            total += sums[lane];
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&one);
    PyBuffer_Release(&other);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the lengths differ or are odd");
        return NULL;
    }
    return PyFloat_FromDouble(total);
}

PyDoc_STRVAR(names_doc, "names() -> tuple\n\nThe kernels that this machine can run, the best first.");

static PyObject *names(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(args))
{
    int count = 0;
    while (count < 3 && kernels[count].name != NULL)
        count++;
    PyObject *found = PyTuple_New(count);
    for (int i = 0; found != NULL && i < count; i++)
        if (PyTuple_SetItem(found, i, PyUnicode_FromString(kernels[i].name)))
            Py_CLEAR(found);
    return found;
}

PyDoc_STRVAR(keep_subnormals_doc,
    "keep_subnormals()\n\n"
    "Have this thread compute with subnormal numbers, and round to nearest, from now on.");

static PyObject *keep_subnormals(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(args))
{
#if IS_X86
    _mm_setcsr(0x1f80);
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"merge", merge, METH_VARARGS, merge_doc},
    {"distance_bf16", distance_bf16, METH_VARARGS, distance_bf16_doc},
    {"scale_rows", scale_rows, METH_VARARGS, scale_rows_doc},
    {"pack_rows", pack_rows, METH_VARARGS, pack_rows_doc},
    {"names", names, METH_NOARGS, names_doc},
    {"keep_subnormals", keep_subnormals, METH_NOARGS, keep_subnormals_doc},
    {NULL, NULL, 0, NULL},
};

/* The same is found each time, so it is no matter how many interpreters look. */
static int begin(PyObject *Py_UNUSED(made))
{
    find_kernels();
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, begin},
#ifdef Py_mod_gil /* nothing here is shared between threads */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "streamshard.tensors._kernels", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&module);
}
