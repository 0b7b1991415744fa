/* What threads share, and signals, around a computation; and a batch's arguments.
 *
 * A computation takes the model's busy flag (a second thread gets a RuntimeError), drops the GIL,
 * and takes the lock of computations, since models share one pool of threads. While it runs, the
 * backend polls for signals through poll(). A free-threaded Python has no GIL to drop: nothing here
 * counts on it. */
#include "run.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- locks */

/* One computation at a time: models share the pool, and each has its own poll. */
static pthread_mutex_t computing = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t backends = PTHREAD_MUTEX_INITIALIZER;

/* This thread has the lock of computations: code that Python runs from within a poll would wait for
 * its own thread. */
static _Thread_local int computing_here;
static _Thread_local int taken_here; /* models */

/* The holder of a lock does not exist in a forked child, unless it is the one that forked. */
static void in_child(void)
{
    if (!computing_here)
        pthread_mutex_init(&computing, NULL);
    pthread_mutex_init(&backends, NULL);
}

static int fork_is_watched;
static void watch_forks(void) { fork_is_watched = pthread_atfork(NULL, NULL, in_child) == 0; }

int glm_locks_create(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (fork_is_watched)
        return 0;
    PyErr_SetString(PyExc_MemoryError, "no memory for what a fork has to do");
    return -1;
}

static void lock(pthread_mutex_t *mutex)
{
    if (pthread_mutex_trylock(mutex) == 0)
        return;
    PyThreadState *thread = PyEval_SaveThread();
    pthread_mutex_lock(mutex);
    PyEval_RestoreThread(thread);
}

void glm_lock_backends(void) { lock(&backends); }
void glm_unlock_backends(void) { pthread_mutex_unlock(&backends); }

static int for_one_thread(const struct glm_backend *be)
{
    return !computing_here && strncmp(be->name, "cpu:", 4) != 0;
}

int glm_claim(struct glm_backend *be)
{
    if (!for_one_thread(be))
        return 0;
    lock(&computing);
    return computing_here = 1;
}

void glm_release(int claimed)
{
    if (!claimed)
        return;
    computing_here = 0;
    pthread_mutex_unlock(&computing);
}

/* ---- a model for one thread */

enum busy { IDLE, TAKEN, COMPUTING };

int glm_there(const struct model_object *self)
{
    if (self->m)
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "this model is gone");
    return 0;
}

int glm_take(struct model_object *self)
{
    if (!glm_there(self))
        return -1;
    for (int was = IDLE; !atomic_compare_exchange_strong(&self->busy, &was, TAKEN); was = IDLE) {
        if (was == COMPUTING || taken_here) {
            PyErr_SetString(
                PyExc_RuntimeError,
                "this model is busy in another thread: use one model from one thread at a time");
            return -1;
        }
        PyThreadState *thread = PyEval_SaveThread();
        sched_yield();
        PyEval_RestoreThread(thread);
    }
    taken_here++;
    return 0;
}

void glm_give(struct model_object *self)
{
    taken_here--;
    atomic_store(&self->busy, IDLE);
}

int glm_take_all(struct model_object *self)
{
    for (int claimed = 0;;) { /* first, since a computation waits for the lock with its model */
        if (glm_take(self) < 0) {
            glm_release(claimed);
            return -1;
        }
        struct glm_backend *be = glm_model_backend(self->m);
        if (claimed || !for_one_thread(be))
            return claimed;
        glm_give(self);
        claimed = glm_claim(be);
    }
}

void glm_give_all(struct model_object *self, int claimed)
{
    glm_give(self);
    glm_release(claimed);
}

int glm_real_type(const struct model_object *self)
{
    return glm_model_backend(self->m)->real == GLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
}

void glm_lose(struct model_object *self, const struct glm_error *err)
{
    if (!self->lost && (self->lost = malloc(sizeof err->text)))
        memcpy(self->lost, err->text, sizeof err->text);
}

void glm_forget_files(struct model_object *self)
{
    PyMem_Free(self->files);
    self->files = NULL;
    self->n_files = -1;
}

static int find_files(struct model_object *self)
{
    struct glm_weight_info info;
    int n = 0;
    glm_forget_files(self);
    for (int i = 0, more; (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        const void *const places[] = {info.data, info.scale};
        for (int j = 0; more > 0 && j < 2; j++) {
            struct glm_mapped *file = places[j] ? glm_mapped_find(places[j]) : NULL;
            int known = 0;
            for (int k = 0; k < n; k++)
                known |= self->files[k] == file;
            if (!file || known)
                continue;
            void *more_room = PyMem_Realloc(self->files, (size_t)(n + 1) * sizeof *self->files);
            if (!more_room) {
                glm_forget_files(self);
                PyErr_Format(PyExc_MemoryError, "files of weights: %zu bytes could not be taken",
                             (size_t)(n + 1) * sizeof *self->files);
                return -1;
            }
            self->files = more_room;
            self->files[n++] = file;
        }
    }
    self->n_files = n;
    return 0;
}

static glm_status check_files(struct model_object *self, struct glm_error *err)
{
    if (self->lost)
        return glm_fail(err, GLM_EFILE, "%s", self->lost);
    for (int i = 0; i < self->n_files; i++)
        GLM_TRY(glm_mapped_check(self->files[i], err));
    return GLM_OK;
}

static int poll(void *arg)
{
    struct run *run = arg;
    PyEval_RestoreThread(run->thread);
    const int stop = PyErr_CheckSignals() < 0;
    run->thread = PyEval_SaveThread();
    return stop;
}

/* 0, or -1 with an exception set where a handler of a signal raised one. */
static int wait_for_others(struct run *run)
{
    while (pthread_mutex_trylock(&computing) != 0) {
        /* Ctrl-C must work while another model computes */
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 100000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_mutex_timedlock(&computing, &until) == 0)
            break;
        if (poll(run))
            return -1;
    }
    return 0;
}

static int can_begin(struct run *run, struct model_object *self, int reads)
{
    if (computing_here) {
        PyErr_SetString(PyExc_RuntimeError,
                        "a model computes in this thread: a signal handler or a destructor that "
                        "runs meanwhile cannot use a model");
        return 0;
    }
    if (reads && self->n_files < 0 && find_files(self) < 0)
        return 0;
    if (!reads || check_files(self, &run->err) == GLM_OK)
        return 1;
    glm_raise(GLM_EFILE, &run->err);
    return 0;
}

int glm_run_begin_taken(struct run *run, struct model_object *self, int how)
{
    const int reads = how & GLM_READS;
    if (!can_begin(run, self, reads)) {
        glm_give(self);
        return -1;
    }
    run->reads = reads;
    taken_here--;
    atomic_store(&self->busy, COMPUTING);
    Py_INCREF(self);
    run->self = self;
    run->be = run->blame = glm_model_backend(self->m);
    run->thread = PyEval_SaveThread();
    if (wait_for_others(run) < 0) {
        PyEval_RestoreThread(run->thread);
        atomic_store(&self->busy, IDLE);
        Py_DECREF(self);
        return -1;
    }
    computing_here = 1;
    if (reads && self->n_files)
        glm_guard_begin();
    run->before = run->be->enter ? run->be->enter(run->be) : -1;
    run->be->set_poll(run->be, how & GLM_WHOLE ? NULL : poll, run);
    return 0;
}

int glm_run_begin(struct run *run, struct model_object *self, int how)
{
    return glm_take(self) < 0 ? -1 : glm_run_begin_taken(run, self, how);
}

/* What was computed meanwhile is of no use, and neither is what it was added to. */
static glm_status end_of_reading(struct run *run, glm_status status)
{
    struct model_object *self = run->self;
    struct glm_error err;
    if (self->n_files)
        glm_guard_end();
    if (check_files(self, &err) == GLM_OK)
        return status;
    run->err = err;
    glm_lose(self, &err);
    return GLM_EFILE;
}

int glm_run_end_taken(struct run *run, glm_status status)
{
    status = glm_device_status(run->blame, status, &run->err);
    run->be->set_poll(run->be, NULL, NULL);
    if (run->be->leave)
        run->be->leave(run->be, run->before);
    if (run->reads)
        status = end_of_reading(run, status);
    computing_here = 0;
    pthread_mutex_unlock(&computing);
    PyEval_RestoreThread(run->thread);
    taken_here++;
    atomic_store(&run->self->busy, TAKEN);
    Py_DECREF(run->self);
    if (status == GLM_OK)
        return PyErr_Occurred() ? -1 : 0; /* poll's, after which tasks were skipped */
    glm_raise(status, &run->err);
    return -1;
}

int glm_run_end(struct run *run, glm_status status)
{
    struct model_object *self = run->self;
    const int done = glm_run_end_taken(run, status);
    glm_give(self);
    return done;
}

void glm_drop_batch(struct batch_args *b)
{
    Py_XDECREF(b->ids);
    Py_XDECREF(b->lengths);
    Py_XDECREF(b->positions);
    Py_XDECREF(b->rows);
    Py_XDECREF(b->targets);
}

int glm_batch_args(struct batch_args *b, PyObject *ids, PyObject *lengths, PyObject *positions,
                   PyObject *rows, PyObject *targets)
{
    int n_positions = -1, n_targets = -1;
    *b = (struct batch_args){0};
    if (glm_index_arg(ids, "ids", &b->ids, &b->in.ids, &b->in.N) < 0 ||
        glm_index_arg(lengths, "lengths", &b->lengths, &b->in.lengths, &b->in.S) < 0 ||
        glm_index_arg(positions, "positions", &b->positions, &b->in.positions, &n_positions) < 0 ||
        glm_index_arg(rows, "rows", &b->rows, &b->in.rows, &b->in.M) < 0 ||
        glm_index_arg(targets, "targets", &b->targets, &b->in.targets, &n_targets) < 0)
        goto fail;
    if (n_positions >= 0 && n_positions != b->in.N) {
        PyErr_Format(PyExc_ValueError, "positions: expected %d, one for each id, got %d", b->in.N,
                     n_positions);
        goto fail;
    }
    if (n_targets >= 0 && n_targets != b->in.M) {
        PyErr_Format(PyExc_ValueError, "targets: expected %d, one for each of rows, got %d",
                     b->in.M, n_targets);
        goto fail;
    }
    return 0;
fail:
    glm_drop_batch(b);
    return -1;
}
