/* Test equipment: memory, mappings and threads that cannot be had. Loaded before everything else
 * (LD_PRELOAD); of the calls that the core itself makes (those from its module's code) number `at`
 * fails, and all that follow where `rest` is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { MEMORY = 1, MAPPING = 2, THREAD = 4 };

static uintptr_t begin, end; /* of the core's code */
static int kinds, when, and_the_rest;
static volatile int seen;

static int find_core(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size, (void)data;
    if (!info->dlpi_name || !strstr(info->dlpi_name, "/_core."))
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            end = begin + info->dlpi_phdr[i].p_memsz;
        }
    return 1;
}

/* Of the kinds, call number `at` (from 1) fails; at 0: none. Counting starts anew. */
void faults_set(int of, int at, int rest)
{
    dl_iterate_phdr(find_core, NULL);
    when = at, and_the_rest = rest, seen = 0;
    kinds = of;
}

int faults_seen(void) { return seen; }

static int fails(int kind, void *caller)
{
    const uintptr_t from = (uintptr_t)caller;
    if (!(kinds & kind) || from < begin || from >= end)
        return 0;
    const int number = __sync_add_and_fetch(&seen, 1);
    return when && (number == when || (and_the_rest && number > when));
}

#define CALLER __builtin_return_address(0)

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

static void *refused(void)
{
    errno = ENOMEM;
    return NULL;
}

void *malloc(size_t n) { return fails(MEMORY, CALLER) ? refused() : __libc_malloc(n); }
void *calloc(size_t n, size_t s) { return fails(MEMORY, CALLER) ? refused() : __libc_calloc(n, s); }
void *realloc(void *p, size_t n)
{
    return fails(MEMORY, CALLER) ? refused() : __libc_realloc(p, n);
}
void *aligned_alloc(size_t a, size_t n)
{
    return fails(MEMORY, CALLER) ? refused() : __libc_memalign(a, n);
}

void *mmap(void *at, size_t n, int protect, int flags, int fd, off_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (fails(MAPPING, CALLER)) {
        refused();
        return MAP_FAILED;
    }
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "mmap");
    return real(at, n, protect, flags, fd, offset);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *arg)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (fails(THREAD, CALLER))
        return EAGAIN;
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return real(thread, how, run, arg);
}
