/* An open file or folder that closes itself. Ctrl-C may come between any two steps of Python, so also between os.open()
 * and a name for the number it returns: nobody could close that file any more, nor give back its lock. */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <structmember.h>
#include <sys/stat.h>
#include <unistd.h>

struct descriptor {
    PyObject head;
    int fd; /* -1: closed */
    PyObject *weak;
};

/* as open(2), again where a signal came; -1 with an exception set */
static int open_file(PyObject *path, PyObject *name, int flags, int mode)
{
    const char *text = PyBytes_AsString(name);
    int fd = -1, why = 0;
    if (!text)
        return -1;
    do {
        Py_BEGIN_ALLOW_THREADS fd = open(text, flags | O_CLOEXEC, mode);
        why = errno;
        Py_END_ALLOW_THREADS
    } while (fd < 0 && why == EINTR && PyErr_CheckSignals() == 0);
    errno = why;
    if (fd < 0 && !PyErr_Occurred())
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    return fd;
}

/* Descriptor(path, flags, mode=0o666) */
static PyObject *descriptor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path", "flags", "mode", NULL};
    PyObject *path, *name;
    int flags, mode = 0666;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi|i", names, &path, &flags, &mode) ||
        !PyUnicode_FSConverter(path, &name))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct descriptor *self = (struct descriptor *)alloc(type, 0);
    if (self && (self->fd = open_file(path, name, flags, mode)) < 0)
        Py_CLEAR(self);
    Py_DECREF(name);
    return (PyObject *)self;
}

static int check_mode(PyObject *check, PyObject *path, const struct stat *found)
{
    PyObject *mode = PyLong_FromUnsignedLong(found->st_mode);
    PyObject *done = mode ? PyObject_CallFunctionObjArgs(check, path, mode, NULL) : NULL;
    Py_XDECREF(mode);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* open_checked(check, path, flags) -> the number. With check as functools.partial's first word an opener for open(), which
 * takes the number over in C, too. */
PyObject *glm_py_open_checked(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *check, *path, *name, *number = NULL;
    int flags, fd = -1;
    struct stat found;
    if (!PyArg_ParseTuple(args, "OOi", &check, &path, &flags) ||
        !PyUnicode_FSConverter(path, &name))
        return NULL;
    /* Before it is opened: opening a device may already act on it. It may be another file by then; and without
     * O_NONBLOCK, opening a FIFO waits for a writer. */
    const char *text = PyBytes_AsString(name);
    if (text && (stat(text, &found) < 0 || check_mode(check, path, &found) == 0))
        fd = open_file(path, name, flags | O_NONBLOCK | O_NOCTTY, 0666);
    Py_DECREF(name);
    if (fd < 0)
        return NULL;
    if (fstat(fd, &found) < 0)
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    else if (check_mode(check, path, &found) == 0)
        number = PyLong_FromLong(fd);
    if (!number)
        close(fd);
    return number;
}

/* 0 or errno; the number is given up either way, as close(2) does */
static int descriptor_close(struct descriptor *self)
{
    const int fd = self->fd;
    int status = 0;
    self->fd = -1;
    if (fd >= 0) {
        Py_BEGIN_ALLOW_THREADS status = close(fd) < 0 && errno != EINTR ? errno : 0;
        Py_END_ALLOW_THREADS
    }
    return status;
}

static void descriptor_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_ClearWeakRefs(self);
    descriptor_close((struct descriptor *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *fileno_of(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const int fd = ((struct descriptor *)self)->fd;
    return fd < 0 ? PyErr_Format(PyExc_ValueError, "the file is closed") : PyLong_FromLong(fd);
}

/* close(), __exit__(type, value, traceback) */
static PyObject *close_it(PyObject *self, PyObject *Py_UNUSED(error))
{
    if ((errno = descriptor_close((struct descriptor *)self)))
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Py_INCREF(self);
    return self;
}

static PyMethodDef methods[] = {
    {"fileno", fileno_of, METH_NOARGS, "The file's number; ValueError once it is closed."},
    {"close", close_it, METH_NOARGS, "Close it, where it is open."},
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", close_it, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct descriptor, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, descriptor_new},
    {Py_tp_dealloc, descriptor_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_doc, "Descriptor(path, flags, mode=0o666): a file or folder opened as os.open() does, "
                "which is closed\n"
                "by close() or with its last reference."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "glmlora._core.Descriptor",
    .basicsize = sizeof(struct descriptor),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

PyTypeObject *glm_descriptor_type(PyObject *module)
{
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
}
