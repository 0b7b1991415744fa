/* Mapped files and the handler of faults in them: see mapped.h. */
#include "mapped.h"

#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Never freed and used again, so that the handler may walk the list at any time. */
struct glm_mapped {
    struct glm_mapped *next;
    _Atomic(uintptr_t) begin, end; /* whole pages; 0, 0: free */
    atomic_int faulted;
    size_t size;
    int fd;
    struct stat was;
    char *path;
};

static _Atomic(struct glm_mapped *) files;
static atomic_size_t page; /* bytes; known when there is a file */

/* Protects what follows and the list's changes. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int guards; /* in all threads */
static struct sigaction former;
static atomic_int passed_on; /* faults that were not ours since the handler was installed */

/* initial-exec: the handler may not be the first to touch it, which would allocate */
static _Thread_local int inside __attribute__((tls_model("initial-exec")));
static _Thread_local sigset_t mask_before __attribute__((tls_model("initial-exec")));

/* A forked child has one thread, which may be the one that others waited for. */
static void in_child(void)
{
    pthread_mutex_init(&mutex, NULL);
    guards = inside > 0;
}

/* ---- the handler */

static void on_fault(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    struct glm_mapped *file = NULL;
    (void)context;
    if (inside && info->si_code > 0) /* not sent by a process */
        file = glm_mapped_find(info->si_addr);
    if (file) {
        const uintptr_t at = (uintptr_t)info->si_addr / page * page;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
        if (mmap((void *)at, file->end - at, PROT_READ, flags, -1, 0) != MAP_FAILED) {
            atomic_store(&file->faulted, 1);
            errno = saved;
            return;
        }
    }
    /* The read faults again under the handler before us; under none if that one hands it back. */
    if (atomic_fetch_add(&passed_on, 1))
        former = (struct sigaction){.sa_handler = SIG_DFL};
    sigaction(number, &former, NULL);
    if (info->si_code <= 0)
        raise(number);
    errno = saved;
}

static int is_ours(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_fault;
}

static void unblock(sigset_t *before)
{
    sigset_t fault;
    sigemptyset(&fault);
    sigaddset(&fault, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &fault, before);
}

void glm_guard_begin(void)
{
    if (inside++)
        return;
    pthread_mutex_lock(&mutex);
    if (guards++ == 0) {
        struct sigaction ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART}, before;
        ours.sa_sigaction = on_fault;
        sigemptyset(&ours.sa_mask);
        atomic_store(&passed_on, 0);
        sigaction(SIGBUS, &ours, &before);
        if (!is_ours(&before)) /* else a fork left it in place */
            former = before;
    }
    pthread_mutex_unlock(&mutex);
    unblock(&mask_before); /* a blocked fault ends the process */
}

void glm_guard_end(void)
{
    if (--inside)
        return;
    pthread_sigmask(SIG_SETMASK, &mask_before, NULL);
    pthread_mutex_lock(&mutex);
    if (--guards == 0) {
        struct sigaction now;
        sigaction(SIGBUS, &former, &now);
        if (!is_ours(&now)) /* someone has put in another one since */
            sigaction(SIGBUS, &now, NULL);
    }
    pthread_mutex_unlock(&mutex);
}

void glm_guard_always(void)
{
    inside = 1;
    unblock(NULL);
}

/* ---- files */

struct glm_mapped *glm_mapped_find(const void *p)
{
    const uintptr_t at = (uintptr_t)p;
    for (struct glm_mapped *file = atomic_load(&files); file; file = file->next)
        if (at >= atomic_load(&file->begin) && at < atomic_load(&file->end))
            return file;
    return NULL;
}

/* The end of a path says more than its beginning, where a sentence has not room for both. */
static const char *shown(const char *path)
{
    const size_t n = strlen(path), most = 300;
    return n > most ? path + n - most : path;
}

/* A node of the list that is free now; NULL: no memory. */
static struct glm_mapped *free_node(void)
{
    struct glm_mapped *file = atomic_load(&files);
    while (file && file->path)
        file = file->next;
    if (file || !(file = calloc(1, sizeof *file)))
        return file;
    file->next = atomic_load(&files);
    atomic_store(&files, file);
    return file;
}

glm_status glm_mapped_open(struct glm_mapped **out, int fd, const char *path, struct glm_error *err)
{
    struct stat now;
    *out = NULL;
    if (fstat(fd, &now) != 0)
        return glm_fail(err, GLM_EFILE, "%s: %s", shown(path), strerror(errno));
    if (!S_ISREG(now.st_mode) || now.st_size < 1)
        return glm_fail(err, GLM_EFILE, "%s: expected a file that is not empty", shown(path));
    const size_t size = (size_t)now.st_size;
    if (!page && pthread_atfork(NULL, NULL, in_child) != 0)
        return glm_fail(err, GLM_EMEMORY, "%s: no memory for what a fork has to do", shown(path));
    page = (size_t)sysconf(_SC_PAGESIZE);
    char *name = malloc(strlen(path) + 1);
    void *data = name ? mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    const int why = name ? errno : ENOMEM;
    const int own = data == MAP_FAILED ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    const int no_fd = data != MAP_FAILED && own < 0 ? errno : 0;
    pthread_mutex_lock(&mutex);
    struct glm_mapped *file = own < 0 ? NULL : free_node();
    if (file) {
        file->size = size;
        file->fd = own;
        file->was = now;
        file->path = strcpy(name, path);
        atomic_store(&file->faulted, 0);
        atomic_store(&file->begin, (uintptr_t)data);
        atomic_store(&file->end, (uintptr_t)data + (size + page - 1) / page * page);
    }
    pthread_mutex_unlock(&mutex);
    if (!file) {
        free(name);
        if (data != MAP_FAILED)
            munmap(data, size);
        if (own >= 0)
            close(own);
        if (no_fd || (data == MAP_FAILED && why != ENOMEM))
            return glm_fail(err, GLM_EFILE, "%s: %s", shown(path), strerror(no_fd ? no_fd : why));
        return glm_fail(err, GLM_EMEMORY,
                        "%s: the address space for its %zu bytes could not be taken", shown(path),
                        size);
    }
    glm_huge_pages(data, size);
    *out = file;
    return GLM_OK;
}

void glm_mapped_close(struct glm_mapped *file)
{
    void *data = (void *)atomic_load(&file->begin);
    pthread_mutex_lock(&mutex);
    atomic_store(&file->end, 0);
    atomic_store(&file->begin, 0);
    free(file->path);
    close(file->fd);
    munmap(data, file->size);
    file->path = NULL; /* free from here on */
    pthread_mutex_unlock(&mutex);
}

const void *glm_mapped_data(const struct glm_mapped *file, size_t *size)
{
    *size = file->size;
    return (const void *)atomic_load(&file->begin);
}

glm_status glm_mapped_check(struct glm_mapped *file, struct glm_error *err)
{
    struct stat now;
    if (fstat(file->fd, &now) != 0)
        return glm_fail(err, GLM_EFILE, "%s: %s", shown(file->path), strerror(errno));
    if (now.st_size != file->was.st_size)
        return glm_fail(err, GLM_EFILE,
                        "%s: had %lld bytes when it was opened and has %lld now: it is in use and "
                        "must not change; load it again",
                        shown(file->path), (long long)file->was.st_size, (long long)now.st_size);
    if (glm_change_time(&now) != glm_change_time(&file->was))
        return glm_fail(err, GLM_EFILE,
                        "%s: was written to since it was opened: it is in use and must not change; "
                        "load it again",
                        shown(file->path));
    if (atomic_load(&file->faulted))
        return glm_fail(err, GLM_EFILE,
                        "%s: could not be read to its end: it became shorter while it was in use, "
                        "or its disk failed; load it again",
                        shown(file->path));
    return GLM_OK;
}

void glm_mapped_drop(const void *p, size_t bytes)
{
    const struct glm_mapped *file = glm_mapped_find(p);
    const uintptr_t begin = ((uintptr_t)p + page - !!page) / (page ? page : 1) * page;
    const uintptr_t end = ((uintptr_t)p + bytes) / (page ? page : 1) * page;
    if (file && !atomic_load(&file->faulted) && begin < end)
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}
