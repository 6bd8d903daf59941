/* A file mapped into memory to be read, whose pages may go away without killing the process.
 *
 * Touching a page of a mapping that the file no longer has, or that the disk cannot read, raises SIGBUS.
 * Two things keep that from ending the process: `populate` asks the kernel for pages in a way that answers
 * with an error, and a handler puts zeros in the place of what is gone and takes note of it. Whoever has
 * looked at a part of a mapping must therefore ask `lost` before believing what was there.
 *
 * Optional, for Linux 5.14 and later: without it files are read by positioned reads.
 */
#include <Python.h>

#ifndef __linux__
PyMODINIT_FUNC PyInit__mapping(void)
{
    PyErr_SetString(PyExc_ImportError, "there are no such calls on this system");
    return NULL;
}
#else

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* Where mappings are, for the handler, which may take no lock. A place is free while its start is 0. */
#define PLACES 4096
typedef struct {
    atomic_flag taken;
    atomic_uintptr_t start, end;
    atomic_int lost;
} place_t;
static place_t places[PLACES];
static atomic_int used; /* places from here on were never taken */

static uintptr_t page_nbytes;
static struct sigaction before, first; /* whom the handler asks next, and the one that was there first */
static int installed;
static atomic_flag installing = ATOMIC_FLAG_INIT;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int kept = errno, count = atomic_load(&used);
    uintptr_t at = (uintptr_t)info->si_addr;
    for (int i = 0; info->si_code > 0 && i < count; i++) {
        uintptr_t start = atomic_load(&places[i].start), end = atomic_load(&places[i].end);
        if (!start || at < start || at >= end)
            continue;
        /* First, as other threads see the zeros at once. Nothing that follows is believed either, so it is
         * no matter that it becomes zeros as well. */
        atomic_store(&places[i].lost, 1);
        uintptr_t page = at & ~(page_nbytes - 1);
        if (mmap((void *)page, end - page, PROT_READ,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            break;
        errno = kept;
        return;
    }
    struct sigaction next = before;
    before = first; /* who came after this handler may hand the signal back to it, and would again */
    if (next.sa_flags & SA_SIGINFO) {
        next.sa_sigaction(number, info, context);
    } else if (next.sa_handler != SIG_DFL && next.sa_handler != SIG_IGN) {
        next.sa_handler(number);
    } else { /* the instruction is tried again, and ends the process as it would have */
        signal(SIGBUS, SIG_DFL);
        if (info->si_code <= 0)
            raise(SIGBUS);
    }
    errno = kept;
}

/* Again before each mapping: others may have put their own handler there since, which is asked next. */
static int install(void)
{
    struct sigaction now;
    int failed = 0;
    while (atomic_flag_test_and_set(&installing)) /* a few system calls of another thread */
        ;
    if (sigaction(SIGBUS, NULL, &now)) {
        failed = -1;
    } else if (!installed || !(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_bus_error) {
        before = now;
        if (!installed)
            first = now;
        struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigemptyset(&ours.sa_mask);
        installed = 1;
        failed = sigaction(SIGBUS, &ours, NULL);
    }
    atomic_flag_clear(&installing);
    return failed;
}

typedef struct {
    PyObject_HEAD
    char *start;
    Py_ssize_t nbytes;
    atomic_long users; /* the object itself until it is closed, and each view; 0: nothing is mapped */
    atomic_int closed;
    place_t *place;
} mapping_t;

/* Take part in using a mapping, so that nobody unmaps it meanwhile; whether there is one. */
static int enter(mapping_t *self)
{
    long users = atomic_load(&self->users);
    while (users && !atomic_compare_exchange_weak(&self->users, &users, users + 1))
        ;
    return users != 0;
}

/* The last one unmaps. */
static void leave(mapping_t *self)
{
    if (atomic_fetch_sub(&self->users, 1) != 1)
        return;
    /* First, as another thread may map something else there at once, which is not for the handler. */
    atomic_store(&self->place->start, 0);
    munmap(self->start, (size_t)self->nbytes);
    atomic_flag_clear(&self->place->taken);
}

static int mapping_init(mapping_t *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"descriptor", "nbytes", NULL};
    int descriptor;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, named, "in", names, &descriptor, &nbytes))
        return -1;
    if (self->start || nbytes <= 0) {
        PyErr_SetString(PyExc_ValueError, "nothing to map, or mapped already");
        return -1;
    }
    if (install()) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    int at = 0;
    while (at < PLACES && atomic_flag_test_and_set(&places[at].taken))
        at++;
    if (at == PLACES) {
        errno = EMFILE;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    void *start = mmap(NULL, (size_t)nbytes, PROT_READ, MAP_SHARED, descriptor, 0);
    if (start == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        atomic_flag_clear(&places[at].taken);
        return -1;
    }
    self->start = start;
    self->nbytes = nbytes;
    self->place = &places[at];
    atomic_store(&self->place->lost, 0);
    atomic_store(&self->place->end, ((uintptr_t)start + nbytes + page_nbytes - 1) & ~(page_nbytes - 1));
    atomic_store(&self->place->start, (uintptr_t)start);
    int seen = atomic_load(&used);
    while (seen <= at && !atomic_compare_exchange_weak(&used, &seen, at + 1))
        ;
    atomic_store(&self->users, 1);
    return 0;
}

static void close_once(mapping_t *self)
{
    if (self->start && !atomic_exchange(&self->closed, 1))
        leave(self);
}

static void mapping_dealloc(mapping_t *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    close_once(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int get_buffer(mapping_t *self, Py_buffer *view, int flags)
{
    if (atomic_load(&self->closed) || !enter(self)) {
        PyErr_SetString(PyExc_ValueError, "the mapping is closed");
        return -1;
    }
    if (!PyBuffer_FillInfo(view, (PyObject *)self, self->start, self->nbytes, 1, flags))
        return 0;
    leave(self);
    return -1;
}

static void release_buffer(mapping_t *self, Py_buffer *view)
{
    (void)view;
    leave(self);
}

/* The whole pages around a range, of a mapping that is entered; -1 with an error if it has no such. */
static int pages_of(mapping_t *self, PyObject *args, char **start, size_t *nbytes)
{
    Py_ssize_t offset, count;
    if (!PyArg_ParseTuple(args, "nn", &offset, &count))
        return -1;
    if (offset < 0 || count <= 0 || offset > self->nbytes - count || !enter(self)) {
        PyErr_SetString(PyExc_ValueError, "not in the mapping");
        return -1;
    }
    size_t first = (size_t)offset & ~(page_nbytes - 1);
    *start = self->start + first;
    *nbytes = (size_t)offset + (size_t)count - first;
    return 0;
}

static PyObject *advise(mapping_t *self, PyObject *args, int advice)
{
    char *start;
    size_t nbytes;
    int failed;
    if (pages_of(self, args, &start, &nbytes))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    do
        failed = madvise(start, nbytes, advice);
    while (failed && errno == EAGAIN);
    Py_END_ALLOW_THREADS
    int error = errno;
    leave(self);
    if (failed) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(populate_doc,
    "populate(offset, nbytes)\n\n"
    "Have these bytes in memory, or raise OSError where touching them would be a bus error.");

static PyObject *populate(mapping_t *self, PyObject *args)
{
    return advise(self, args, MADV_POPULATE_READ);
}

PyDoc_STRVAR(drop_doc,
    "drop(offset, nbytes)\n\n"
    "Count these bytes no longer as memory of this process; they are read again if they are touched.");

static PyObject *drop(mapping_t *self, PyObject *args)
{
    return advise(self, args, MADV_DONTNEED);
}

PyDoc_STRVAR(absent_doc,
    "absent(step, sample) -> bytes\n\n"
    "For each `step` bytes 1 if the page cache seems to have none of them, else 0. One page of each\n"
    "`sample` bytes is looked at; both are multiples of a page.");

static PyObject *absent(mapping_t *self, PyObject *args)
{
    Py_ssize_t step, sample;
    if (!PyArg_ParseTuple(args, "nn", &step, &sample))
        return NULL;
    if (sample <= 0 || sample % (Py_ssize_t)page_nbytes || step <= 0 || step % sample || !enter(self)) {
        PyErr_SetString(PyExc_ValueError, "not multiples, or closed");
        return NULL;
    }
    PyObject *found = PyBytes_FromStringAndSize(NULL, (self->nbytes + step - 1) / step);
    if (!found) {
        leave(self);
        return NULL;
    }
    char *flags = PyBytes_AsString(found);
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS
    memset(flags, 1, (size_t)((self->nbytes + step - 1) / step));
    for (Py_ssize_t at = 0; at < self->nbytes && !failed; at += sample) {
        unsigned char there = 0;
        failed = flags[at / step] && mincore(self->start + at, 1, &there);
        if (there & 1)
            flags[at / step] = 0;
    }
    Py_END_ALLOW_THREADS
    int error = errno;
    leave(self);
    if (failed) {
        Py_DECREF(found);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return found;
}

PyDoc_STRVAR(close_doc,
    "close()\n\n"
    "Unmap the file, as soon as no view of it is left.");

static PyObject *close_mapping(mapping_t *self, PyObject *args)
{
    (void)args;
    close_once(self);
    Py_RETURN_NONE;
}

static PyObject *get_lost(mapping_t *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(self->start && atomic_load(&self->place->lost));
}

static PyMethodDef mapping_methods[] = {
    {"populate", (PyCFunction)populate, METH_VARARGS, populate_doc},
    {"drop", (PyCFunction)drop, METH_VARARGS, drop_doc},
    {"absent", (PyCFunction)absent, METH_VARARGS, absent_doc},
    {"close", (PyCFunction)close_mapping, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef mapping_getset[] = {
    {"lost", (getter)get_lost, NULL, "Whether some bytes were gone when they were touched.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, "Mapping(descriptor, nbytes): the first bytes of a file in memory, to be read."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, mapping_init},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},
    {Py_bf_getbuffer, get_buffer},
    {Py_bf_releasebuffer, release_buffer},
    {0, NULL},
};

static PyType_Spec mapping_spec = {
    .name = "streamshard.disk._mapping.Mapping",
    .basicsize = sizeof(mapping_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = mapping_slots,
};

PyDoc_STRVAR(file_system_doc,
    "file_system(descriptor) -> int\n\n"
    "The number by which Linux knows the kind of file system that a file is on.");

static PyObject *file_system(PyObject *self, PyObject *args)
{
    int descriptor, failed;
    struct statfs found;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &descriptor))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = fstatfs(descriptor, &found);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLong((unsigned long)found.f_type & 0xffffffffUL);
}

static PyMethodDef methods[] = {
    {"file_system", file_system, METH_VARARGS, file_system_doc},
    {NULL, NULL, 0, NULL},
};

static int begin(PyObject *made)
{
    page_nbytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    /* Where the kernel cannot say that bytes are missing, files are not mapped. */
    void *page = mmap(NULL, page_nbytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int able = page != MAP_FAILED && !madvise(page, page_nbytes, MADV_POPULATE_READ);
    if (page != MAP_FAILED)
        munmap(page, page_nbytes);
    if (!able) {
        PyErr_SetString(PyExc_ImportError, "this kernel has no MADV_POPULATE_READ (Linux 5.14)");
        return -1;
    }
    PyObject *type = PyType_FromModuleAndSpec(made, &mapping_spec, NULL);
    int failed = !type || PyModule_AddType(made, (PyTypeObject *)type);
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, begin},
#ifdef Py_mod_gil /* what threads share is atomic */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "streamshard.disk._mapping", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__mapping(void)
{
    return PyModuleDef_Init(&module);
}
#endif
