/* The inner loops over bfloat16, each in one pass over the block.
 *
 * Optional: without a compiler the same is done by numpy (arithmetic.py), with the same bytes in
 * the output, the same sums and a quarter of the speed. Compiled with -ffp-contract=off, so that no
 * processor fuses a multiplication and an addition that another one does not.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* arithmetic.py has the same, and adds in the same order */
#define CHUNK 256

/* One object file serves old and new x86 processors; elsewhere the compiler's default does. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define BY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BY_PROCESSOR
#endif

/* Element i of the result depends on element i only, also where both share their memory. */
#if defined(__clang__)
#define VECTOR_LOOP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define VECTOR_LOOP _Pragma("GCC ivdep")
#else
#define VECTOR_LOOP
#endif

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* What a row of an update adds up to, lane by lane. */
typedef struct {
    double change[LANES]; /* squares of out - old */
    double update[LANES]; /* squares of what is to be added */
    Py_ssize_t unchanged; /* elements whose bits stay */
} totals_t;

/* Rounds (old + update) * scale to bfloat16, to nearest even. Loops over a chunk in the nearest
 * cache: each becomes vector code. */
BY_PROCESSOR
static void add_row(const uint16_t *old, const float *update, const double *scale, uint16_t *out,
                    Py_ssize_t count, totals_t *totals)
{
    totals_t sums;
    float changes[CHUNK], updates[CHUNK];
    memcpy(&sums, totals, sizeof sums);
    for (Py_ssize_t first = 0; first < count; first += CHUNK) {
        Py_ssize_t length = count - first < CHUNK ? count - first : CHUNK, i = 0;
        uint32_t same = 0;
        if (scale == NULL) {
            VECTOR_LOOP
            for (Py_ssize_t j = 0; j < length; j++) {
                float weight = as_float((uint32_t)old[first + j] << 16);
                uint32_t bits = as_bits(weight + update[first + j]);
                uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
                changes[j] = as_float(rounded << 16) - weight;
                updates[j] = update[first + j];
                same += (uint16_t)rounded == old[first + j];
                out[first + j] = (uint16_t)rounded;
            }
        } else {
            double factor = *scale;
            VECTOR_LOOP
            for (Py_ssize_t j = 0; j < length; j++) {
                float weight = as_float((uint32_t)old[first + j] << 16);
                float total = (float)((double)(weight + update[first + j]) * factor);
                uint32_t bits = as_bits(total);
                uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
                changes[j] = as_float(rounded << 16) - weight;
                updates[j] = total - weight;
                same += (uint16_t)rounded == old[first + j];
                out[first + j] = (uint16_t)rounded;
            }
        }
        sums.unchanged += same;
        for (; i + LANES <= length; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                sums.change[lane] += (double)changes[i + lane] * (double)changes[i + lane];
                sums.update[lane] += (double)updates[i + lane] * (double)updates[i + lane];
            }
        for (; i < length; i++) {
            sums.change[0] += (double)changes[i] * (double)changes[i];
            sums.update[0] += (double)updates[i] * (double)updates[i];
        }
    }
    memcpy(totals, &sums, sizeof sums);
}

/* The sum of the squares of old + update. */
BY_PROCESSOR
static double squares_of_row(const uint16_t *old, const float *update, Py_ssize_t count)
{
    double sums[LANES] = {0}, total = 0.0;
    Py_ssize_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double value = as_float((uint32_t)old[i + lane] << 16) + update[i + lane];
            sums[lane] += value * value;
        }
    for (; i < count; i++) {
        double value = as_float((uint32_t)old[i] << 16) + update[i];
        sums[0] += value * value;
    }
    for (int lane = 0; lane < LANES; lane++)
        total += sums[lane];
    return total;
}

/* Adds the squared differences of two runs of bfloat16 to `totals`, lane by lane. */
BY_PROCESSOR
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

/* A matrix of the given item size whose rows are packed, or an exception. */
static int is_matrix(const Py_buffer *view, Py_ssize_t itemsize, const char *name)
{
    if (view->ndim == 2 && view->itemsize == itemsize
        && (view->strides[1] == itemsize || view->shape[1] <= 1))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is no matrix of %zd-byte items in packed rows", name,
                 itemsize);
    return 0;
}

PyDoc_STRVAR(add_bf16_doc,
    "add_bf16(old, update, scale, out) -> (change, update, unchanged)\n\n"
    "Round `(old + update) * scale` to bfloat16, to nearest even, into `out`, which may be `old`\n"
    "itself. `old` and `out` are bfloat16 as uint16, `update` is fp32; all are matrices of one\n"
    "shape with packed rows. `scale` is a vector of fp64, one for each row, or None for 1. Returns\n"
    "the sums in fp64 of the squares of `out - old` and of what was to be added, and how many\n"
    "elements have the bits of `old`.");

static PyObject *add_bf16(PyObject *self, PyObject *args)
{
    PyObject *sources[4], *result = NULL;
    Py_buffer old, update, out, scale = {0};
    if (!PyArg_ParseTuple(args, "OOOO", &sources[0], &sources[1], &sources[2], &sources[3]))
        return NULL;
    if (PyObject_GetBuffer(sources[0], &old, PyBUF_STRIDES) < 0)
        return NULL;
    if (PyObject_GetBuffer(sources[1], &update, PyBUF_STRIDES) < 0)
        goto release_old;
    if (PyObject_GetBuffer(sources[3], &out, PyBUF_STRIDES | PyBUF_WRITABLE) < 0)
        goto release_update;
    if (sources[2] != Py_None && PyObject_GetBuffer(sources[2], &scale, PyBUF_SIMPLE) < 0)
        goto release_out;
    if (!is_matrix(&old, 2, "old") || !is_matrix(&update, 4, "update") || !is_matrix(&out, 2, "out"))
        goto release_scale;
    Py_ssize_t rows = old.shape[0], columns = old.shape[1];
    if (update.shape[0] != rows || out.shape[0] != rows || update.shape[1] != columns
        || out.shape[1] != columns
        || (scale.buf != NULL && scale.len != rows * (Py_ssize_t)sizeof(double))) {
        PyErr_SetString(PyExc_ValueError, "the shapes differ");
        goto release_scale;
    }
    totals_t totals = {{0}, {0}, 0};
    double change = 0.0, intended = 0.0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = 0; row < rows; row++)
        add_row((const uint16_t *)((const char *)old.buf + row * old.strides[0]),
                (const float *)((const char *)update.buf + row * update.strides[0]),
                scale.buf != NULL ? (const double *)scale.buf + row : NULL,
                (uint16_t *)((char *)out.buf + row * out.strides[0]), columns, &totals);
    for (int lane = 0; lane < LANES; lane++) {
        change += totals.change[lane];
        intended += totals.update[lane];
    }
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("ddn", change, intended, totals.unchanged);
release_scale:
    if (scale.buf != NULL)
        PyBuffer_Release(&scale);
release_out:
    PyBuffer_Release(&out);
release_update:
    PyBuffer_Release(&update);
release_old:
    PyBuffer_Release(&old);
    return result;
}

PyDoc_STRVAR(squares_bf16_doc,
    "squares_bf16(old, update, sums)\n\n"
    "Add to the fp64 vector `sums` the squares of each row of `old + update`: bfloat16 as uint16\n"
    "and fp32, matrices of one shape with packed rows.");

static PyObject *squares_bf16(PyObject *self, PyObject *args)
{
    PyObject *sources[3], *result = NULL;
    Py_buffer old, update, sums;
    if (!PyArg_ParseTuple(args, "OOO", &sources[0], &sources[1], &sources[2]))
        return NULL;
    if (PyObject_GetBuffer(sources[0], &old, PyBUF_STRIDES) < 0)
        return NULL;
    if (PyObject_GetBuffer(sources[1], &update, PyBUF_STRIDES) < 0)
        goto release_old;
    if (PyObject_GetBuffer(sources[2], &sums, PyBUF_WRITABLE) < 0)
        goto release_update;
    if (!is_matrix(&old, 2, "old") || !is_matrix(&update, 4, "update"))
        goto release_sums;
    Py_ssize_t rows = old.shape[0], columns = old.shape[1];
    if (update.shape[0] != rows || update.shape[1] != columns
        || sums.len != rows * (Py_ssize_t)sizeof(double)) {
        PyErr_SetString(PyExc_ValueError, "the shapes differ");
        goto release_sums;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = 0; row < rows; row++)
        ((double *)sums.buf)[row] += squares_of_row(
            (const uint16_t *)((const char *)old.buf + row * old.strides[0]),
            (const float *)((const char *)update.buf + row * update.strides[0]), columns);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
release_sums:
    PyBuffer_Release(&sums);
release_update:
    PyBuffer_Release(&update);
release_old:
    PyBuffer_Release(&old);
    return result;
}

PyDoc_STRVAR(distance_bf16_doc,
    "distance_bf16(one, other) -> float\n\n"
    "Sum in fp64 of the squared differences of two buffers of as many bfloat16.");

static PyObject *distance_bf16(PyObject *self, PyObject *args)
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

static PyMethodDef methods[] = {
    {"add_bf16", add_bf16, METH_VARARGS, add_bf16_doc},
    {"squares_bf16", squares_bf16, METH_VARARGS, squares_bf16_doc},
    {"distance_bf16", distance_bf16, METH_VARARGS, distance_bf16_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "streamshard.tensors._kernels", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
