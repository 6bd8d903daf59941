/* The loops of one kind of processor; included by _kernels.c once for each, which says
 *   NAME(x)      x with the kind's name behind it,
 *   WIDTH        bytes of a vector, and VECTORS of them across a tile in registers,
 *   FMAF, FMAD   a * b + c of vectors of fp32 and fp64 (one rounding or two: the bounds hold for both),
 *   GREATER, GREATERD   a bit for each element that is greater (false for NaN),
 *   LOW, HIGH    halves of a vector of fp32 as fp64.
 * What is computed, and the bounds, are in _kernels.c.
 */

typedef float NAME(vf) __attribute__((vector_size(WIDTH)));
typedef int32_t NAME(vi) __attribute__((vector_size(WIDTH)));
typedef uint32_t NAME(vu) __attribute__((vector_size(WIDTH)));
typedef double NAME(vd) __attribute__((vector_size(WIDTH)));
typedef uint64_t NAME(vl) __attribute__((vector_size(WIDTH)));
typedef int64_t NAME(vs) __attribute__((vector_size(WIDTH)));
typedef uint16_t NAME(vh) __attribute__((vector_size(WIDTH / 2)));
typedef float NAME(hf) __attribute__((vector_size(WIDTH / 2)));
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
#define vd NAME(vd)
#define vl NAME(vl)
#define vs NAME(vs)
#define vh NAME(vh)
#define hf NAME(hf)
#define LF (WIDTH / 4)
#define LD (WIDTH / 8)

/* A vector from memory and back, wherever it lies. */
#define LOAD(type, place) ({ type value_; memcpy(&value_, (place), sizeof value_); value_; })
#define STORE(place, value) do { __typeof__(value) value_ = (value); memcpy((place), &value_, sizeof value_); } while (0)
#define SPLATF(x) ((vf){0} + (x))
#define SPLATD(x) ((vd){0} + (x))

/* ROWS x PANEL products in fp32 of `count` ranks, put into `out` or added to it. */
static void NAME(product)(const float *restrict A, const float *restrict B, ptrdiff_t rank,
                          ptrdiff_t count, float *restrict out, int adds)
{
    for (int first = 0; first < PANEL; first += VECTORS * LF) {
        vf sum[ROWS][VECTORS];
        const float *a = A + first;
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++)
                sum[row][v] = (vf){0};
        for (ptrdiff_t k = 0; k < count; k++, a += PANEL) {
            vf x[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                x[v] = LOAD(vf, a + v * LF);
            for (int row = 0; row < ROWS; row++) {
                vf b = SPLATF(B[row * rank + k]);
                for (int v = 0; v < VECTORS; v++)
                    sum[row][v] = FMAF(b, x[v], sum[row][v]);
            }
        }
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++) {
                float *place = out + row * PANEL + first + v * LF;
                STORE(place, adds ? LOAD(vf, place) + sum[row][v] : sum[row][v]);
            }
    }
}

/* The like in fp64. */
static void NAME(product_wide)(const float *restrict A, const double *restrict B, ptrdiff_t rank,
                               ptrdiff_t count, double *restrict out, int adds)
{
    for (int first = 0; first < PANEL; first += VECTORS * LD) {
        vd sum[ROWS][VECTORS];
        const float *a = A + first;
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++)
                sum[row][v] = (vd){0};
        for (ptrdiff_t k = 0; k < count; k++, a += PANEL) {
            vd x[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                x[v] = __builtin_convertvector(LOAD(hf, a + v * LD), vd);
            for (int row = 0; row < ROWS; row++) {
                vd b = SPLATD(B[row * rank + k]);
                for (int v = 0; v < VECTORS; v++)
                    sum[row][v] = FMAD(b, x[v], sum[row][v]);
            }
        }
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++) {
                double *place = out + row * PANEL + first + v * LD;
                STORE(place, adds ? LOAD(vd, place) + sum[row][v] : sum[row][v]);
            }
    }
}

/* PANEL elements of a type as fp32. */
static void NAME(widen)(const void *from, int type, float *to)
{
    if (type == F32) {
        memcpy(to, from, PANEL * sizeof(float));
        return;
    }
    for (int i = 0; i < PANEL; i += LF) {
        vu bits = __builtin_convertvector(LOAD(vh, (const uint16_t *)from + i), vu);
        if (type == BF16) {
            STORE(to + i, bits << 16);
            continue;
        }
        /* The exponent is smaller by 112 than that of fp32; of infinities and NaN it is the largest. */
        vf value = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
        vu special = (vu)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
        STORE(to + i, (vu)value | special | (bits & 0x8000) << 16);
    }
}

/* PANEL elements, which the type has just so (infinities and NaN too), from fp32. */
static void NAME(narrow)(const float *from, int type, void *to)
{
    if (type == F32) {
        memcpy(to, from, PANEL * sizeof(float));
        return;
    }
    for (int i = 0; i < PANEL; i += LF) {
        vu bits = LOAD(vu, from + i);
        if (type == F16) {
            vu size = bits & 0x7fffffff;
            vu small = (vu)(size < 0x38800000);
            vu whole = (vu)__builtin_convertvector((vf)(size & small) * 0x1p24f, vi);
            vu special = (vu)(size > 0x477fffff);
            vu normal = ((size - (112u << 23)) >> 13 & ~special) | (((size >> 13 & 0x3ff) | 0x7c00) & special);
            bits = (small & whole) | (~small & normal) | ((bits >> 16) & 0x8000);
        } else {
            bits >>= 16;
        }
        STORE((uint16_t *)to + i, __builtin_convertvector(bits, vh));
    }
}

/* Rounds PANEL sums in fp32, times `factor` or those of the columns, to BF16; returns a bit for each that
 * is not proven right. What is to be added is put into `update` where there are factors. */
static inline __attribute__((always_inline)) uint64_t
NAME(round)(const float *w, float *update, const float *norms, float norm, const job_t *job,
            const int scaled, double factor, const double *factors, float *rounded)
{
    /* Bits that are dropped; below a power of two the next boundary is half as far away, which `share`
     * is half of. What is subnormal or may overflow is settled elsewhere. */
    const uint32_t drop = 16, half = 1u << (drop - 1), mask = 2 * half - 1;
    const float share = 0x1p-10f, least = 0x1p-126f, most = 0x1p127f;
    uint64_t proven = 0;
    vf c = SPLATF(job->bound), tiny = SPLATF(job->tiny), n = SPLATF(norm);
    vf slack = SPLATF((float)(job->slack + 0x1p-22));
    for (int i = 0; i < PANEL; i += LF) {
        vf base = LOAD(vf, w + i);
        vf total = base + LOAD(vf, update + i);
        vu bits = (vu)total;
        vf error = FMAF(n, LOAD(vf, norms + i), (vf)((vu)base & 0x7fffffff));
        error = FMAF(c, error, tiny);
        if (scaled) { /* a factor is rounded, and the product; `slack` has both */
            vf by = SPLATF((float)factor);
            if (factors != NULL) {
                float narrow[LF];
                for (int lane = 0; lane < LF; lane++)
                    narrow[lane] = (float)factors[i + lane];
                by = LOAD(vf, narrow);
            }
            total = total * by;
            bits = (vu)total;
            error = FMAF(error, (vf)((vu)by & 0x7fffffff), tiny);
            error = FMAF(slack, (vf)(bits & 0x7fffffff), error);
            STORE(update + i, total - base);
        }
        vf size = (vf)(bits & 0x7fffffff);
        vi from = (vi)(bits & mask) - (int32_t)half;
        vi sign = from >> 31;
        vf ulp = (vf)(bits & 0x7f800000) * 0x1p-23f;
        vf distance = __builtin_convertvector((from ^ sign) - sign, vf) * ulp;
        uint64_t good = GREATER(distance, error) & GREATER(size * share, error)
                        & GREATER(SPLATF(most), size) & GREATER(size, SPLATF(least));
        proven |= good << i;
        STORE(rounded + i, (bits + (half - 1) + ((bits >> drop) & 1)) & ~mask);
    }
    return ~proven;
}

/* The like from fp64 to any type, `factor` times the sums (factors by column if there are any). */
static inline __attribute__((always_inline)) uint64_t
NAME(round_wide)(const float *w, double *update, const float *norms, float norm, const job_t *job,
                 double factor, const double *factors, const int type, float *rounded)
{
    const uint64_t drop = type == BF16 ? 45 : type == F16 ? 42 : 29;
    const uint64_t half = UINT64_C(1) << (drop - 1), mask = 2 * half - 1;
    const double share = type == BF16 ? 0x1p-10 : type == F16 ? 0x1p-13 : 0x1p-26;
    const double least = type == F16 ? 0x1p-14 : 0x1p-126;
    const double most = type == F16 ? 0x1p15 : 0x1p127;
    const int scaled = job->factor != NULL;
    uint64_t proven = 0;
    vd c = SPLATD(job->bound_wide), n = SPLATD((double)norm), slack = SPLATD(job->slack);
    for (int i = 0; i < PANEL; i += LD) {
        vd base = __builtin_convertvector(LOAD(hf, w + i), vd);
        vd total = base + LOAD(vd, update + i);
        vd error = n * __builtin_convertvector(LOAD(hf, norms + i), vd)
                   + (vd)((vl)base & INT64_MAX);
        error = c * error;
        if (scaled) {
            vd by = factors != NULL ? LOAD(vd, factors + i) : SPLATD(factor);
            total = total * by;
            error = error * (vd)((vl)by & INT64_MAX) + slack * (vd)((vl)total & INT64_MAX);
            STORE(update + i, total - base);
        }
        vl bits = (vl)total;
        vd size = (vd)(bits & INT64_MAX);
        vs from = (vs)(bits & mask) - (int64_t)half;
        vs sign = -(vs)((vl)from >> 63);
        /* An integer below 2^52 as fp64, by adding it to the bits of 2^52. */
        vd distance = (vd)((vl)((from ^ sign) - sign) | UINT64_C(0x4330000000000000)) - 0x1p52;
        distance = distance * ((vd)(bits & UINT64_C(0x7ff0000000000000)) * 0x1p-52);
        uint64_t good = GREATERD(distance, error) & GREATERD(size * share, error)
                        & GREATERD(SPLATD(most), size) & GREATERD(size, SPLATD(least));
        proven |= good << i;
        vd result = (vd)((bits + (half - 1) + ((bits >> drop) & 1)) & ~mask);
        STORE(rounded + i, __builtin_convertvector(result, hf));
    }
    return ~proven;
}

/* Adds what a run of PANEL elements has changed; lanes are the elements modulo LANES, whatever the
 * vectors are. */
static inline void NAME(add_up)(const float *w, const float *rounded, job_t *job)
{
    vd sums[LANES / LD];
    vi same = {0};
    memcpy(sums, job->effected, sizeof sums);
    for (int i = 0; i < PANEL; i += LF) {
        vf base = LOAD(vf, w + i), value = LOAD(vf, rounded + i);
        same -= (vi)base == (vi)value;
        int lane = i % LANES / LD;
        vd low = LOW(value) - LOW(base), high = HIGH(value) - HIGH(base);
        sums[lane] += low * low; /* not fused: the same by every kernel */
        sums[lane + 1] += high * high;
    }
    memcpy(job->effected, sums, sizeof sums);
    for (int i = 0; i < LF; i++)
        job->unchanged += same[i];
}

static inline void NAME(add_intended)(const float *update, job_t *job)
{
    vd sums[LANES / LD];
    memcpy(sums, job->intended, sizeof sums);
    for (int i = 0; i < PANEL; i += LF) {
        vf value = LOAD(vf, update + i);
        int lane = i % LANES / LD;
        vd low = LOW(value), high = HIGH(value);
        sums[lane] = FMAD(low, low, sums[lane]);
        sums[lane + 1] = FMAD(high, high, sums[lane + 1]);
    }
    memcpy(job->intended, sums, sizeof sums);
}

static inline void NAME(add_intended_wide)(const double *update, job_t *job)
{
    vd sums[LANES / LD];
    memcpy(sums, job->intended, sizeof sums);
    for (int i = 0; i < PANEL; i += LD) {
        vd value = LOAD(vd, update + i);
        sums[i % LANES / LD] = FMAD(value, value, sums[i % LANES / LD]);
    }
    memcpy(job->intended, sums, sizeof sums);
}

/* One run of columns of one row: rounded, settled where that is not proven, counted, written. */
static void NAME(finish)(job_t *job, ptrdiff_t row, ptrdiff_t panel, void *update)
{
    ptrdiff_t begin = panel * PANEL - job->first; /* of the window */
    ptrdiff_t low = begin < 0 ? -begin : 0;
    ptrdiff_t high = job->columns - begin < PANEL ? job->columns - begin : PANEL;
    const char *old = job->old + row * job->old_stride + begin * job->old_size;
    char *out = job->out + row * job->out_stride + begin * job->out_size;
    const float *norms = job->norms + panel * PANEL;
    float norm = job->row_norms[row];
    float w[PANEL], rounded[PANEL];
    _Alignas(64) char edge[PANEL * 4];
    int whole = low == 0 && high == PANEL;
    uint64_t inside = (high == 64 ? ~UINT64_C(0) : (UINT64_C(1) << high) - 1) & ~UINT64_C(0) << low;
    if (!whole) {
        memset(edge, 0, sizeof edge);
        memcpy(edge + low * job->old_size, old + low * job->old_size,
               (size_t)((high - low) * job->old_size));
    }
    NAME(widen)(whole ? old : edge, job->old_type, w);
    uint64_t near;
    const double *factors = job->factor == NULL || job->by_row ? NULL : job->factor + panel * PANEL;
    double factor = job->factor != NULL && job->by_row ? job->factor[row] : 1.0;
    if (!job->wide) {
        near = job->factor == NULL
                   ? NAME(round)(w, update, norms, norm, job, 0, 1.0, NULL, rounded)
                   : NAME(round)(w, update, norms, norm, job, 1, factor, factors, rounded);
    } else {
        near = job->out_type == BF16
                   ? NAME(round_wide)(w, update, norms, norm, job, factor, factors, BF16, rounded)
               : job->out_type == F16
                   ? NAME(round_wide)(w, update, norms, norm, job, factor, factors, F16, rounded)
                   : NAME(round_wide)(w, update, norms, norm, job, factor, factors, F32, rounded);
    }
    if (!whole)
        for (int i = 0; i < PANEL; i++)
            if (!(inside >> i & 1)) {
                w[i] = rounded[i] = 0;
                if (job->wide)
                    ((double *)update)[i] = 0;
                else
                    ((float *)update)[i] = 0;
            }
    for (near &= inside; near; near &= near - 1) {
        int i = __builtin_ctzll(near);
        job->rechecked++;
        if (!settle(job, row, panel, i, w[i], &rounded[i])) {
            rounded[i] = w[i]; /* changes nothing, and keeps what was there */
            note_hard(job, row, begin + i);
        }
    }
    NAME(add_up)(w, rounded, job);
    job->unchanged -= PANEL - (high - low);
    if (job->wide)
        NAME(add_intended_wide)(update, job);
    else
        NAME(add_intended)(update, job);
    NAME(narrow)(rounded, job->out_type, whole ? out : edge);
    if (!whole)
        memcpy(out + low * job->out_size, edge + low * job->out_size,
               (size_t)((high - low) * job->out_size));
}

/* The squares of what is added up, in fp64, summed by row or by column, and those of their bounds. */
static void NAME(add_squares)(job_t *job, ptrdiff_t row, ptrdiff_t panel, const double *update)
{
    ptrdiff_t begin = panel * PANEL - job->first;
    ptrdiff_t high = job->columns - begin < PANEL ? job->columns - begin : PANEL;
    const char *old = job->old + row * job->old_stride + begin * job->old_size;
    const float *norms = job->norms + panel * PANEL;
    float w[PANEL];
    _Alignas(64) char edge[PANEL * 4] = {0};
    if (high < PANEL) {
        memcpy(edge, old, (size_t)(high * job->old_size));
        old = edge;
    }
    NAME(widen)(old, job->old_type, w);
    vd n = SPLATD((double)job->row_norms[row]), all = {0}, all_bounds = {0};
    for (int i = 0; i < PANEL; i += LD) {
        vd base = __builtin_convertvector(LOAD(hf, w + i), vd);
        vd total = base + LOAD(vd, update + i);
        vd bound = n * __builtin_convertvector(LOAD(hf, norms + i), vd)
                   + (vd)((vl)base & INT64_MAX);
        if (job->by_row) {
            all = FMAD(total, total, all);
            all_bounds = FMAD(bound, bound, all_bounds);
        } else {
            double *place = job->column_sums + i;
            STORE(place, FMAD(total, total, LOAD(vd, place)));
            place += PANEL;
            STORE(place, FMAD(bound, bound, LOAD(vd, place)));
        }
    }
    if (job->by_row) {
        double sum = 0, bounds = 0;
        for (int i = 0; i < LD; i++)
            sum += all[i], bounds += all_bounds[i];
        add_square(job, row, sum, bounds);
    }
}

/* All of a window, panel by panel. Some rows at a time, so that a chunk of a panel stays in the
 * nearest cache while they use it. */
static void NAME(run)(job_t *job)
{
    _Alignas(64) double totals[BLOCK * PANEL];
    ptrdiff_t rank = job->rank, last = job->first + job->columns;
    for (ptrdiff_t panel = job->first / PANEL; panel * PANEL < last; panel++) {
        const float *A = job->panels + panel * rank * PANEL;
        for (ptrdiff_t row = 0; row < job->rows; row += BLOCK) {
            ptrdiff_t count = job->rows - row < BLOCK ? job->rows - row : BLOCK;
            for (ptrdiff_t k = 0; k < rank; k += CHUNK) {
                ptrdiff_t ranks = rank - k < CHUNK ? rank - k : CHUNK;
                for (ptrdiff_t i = 0; i < count; i += ROWS) {
                    ptrdiff_t at = (row + i) * rank + k;
                    if (job->wide)
                        NAME(product_wide)(A + k * PANEL, (const double *)job->scaled + at, rank,
                                           ranks, totals + i * PANEL, k > 0);
                    else
                        NAME(product)(A + k * PANEL, (const float *)job->scaled + at, rank, ranks,
                                      (float *)totals + i * PANEL, k > 0);
                }
            }
            if (job->sums != NULL && !job->by_row)
                memset(job->column_sums, 0, sizeof job->column_sums);
            for (ptrdiff_t i = 0; i < count; i++) {
                if (job->sums != NULL)
                    NAME(add_squares)(job, row + i, panel, totals + i * PANEL);
                else if (job->wide)
                    NAME(finish)(job, row + i, panel, totals + i * PANEL);
                else
                    NAME(finish)(job, row + i, panel, (float *)totals + i * PANEL);
            }
            if (job->sums != NULL && !job->by_row)
                for (int i = 0; i < PANEL; i++) {
                    ptrdiff_t column = panel * PANEL + i - job->first;
                    if (column >= 0 && column < job->columns)
                        add_square(job, column, job->column_sums[i], job->column_sums[PANEL + i]);
                }
        }
    }
}

#undef vf
#undef vi
#undef vu
#undef vd
#undef vl
#undef vs
#undef vh
#undef hf
#undef LF
#undef LD
#undef LOAD
#undef STORE
#undef SPLATF
#undef SPLATD
#undef NAME
#undef WIDTH
#undef VECTORS
#undef FMAF
#undef FMAD
#undef GREATER
#undef GREATERD
#undef LOW
#undef HIGH
