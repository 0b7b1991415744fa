/* Test equipment: the calls by which files below one folder change, the chosen one of which fails or
 * is where the process is killed. Loaded before everything else (LD_PRELOAD). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096];
static long seen, chosen;
static int code;

/* Call number `at` (from 1) of those that change something below `where` fails with `error`, or the
 * process is killed there if that is 0; at 0: none. Counting starts anew. */
void io_faults_set(const char *where, long at, int error)
{
    snprintf(folder, sizeof folder, "%s", where);
    seen = 0;
    chosen = at;
    code = error;
}

long io_faults_seen(void) { return seen; }

/* The path of a descriptor, or of `name` in the directory `at`. */
static int is_below(int at, const char *name)
{
    char link[64], path[4096];
    if (!folder[0])
        return 0;
    if (name && (name[0] == '/' || at == AT_FDCWD))
        return strncmp(name, folder, strlen(folder)) == 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 0 && (path[n] = 0, strncmp(path, folder, strlen(folder)) == 0);
}

/* Whether this call is the one. */
static int fails(int at, const char *name)
{
    if (!is_below(at, name) || ++seen != chosen)
        return 0;
    if (code == 0)
        kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n)
{
    if (!fails(fd, NULL))
        return REAL(write)(fd, data, n);
    if (n > 1) /* a disk that gets full takes a part */
        REAL(write)(fd, data, n / 2);
    errno = code;
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at)
{
    return fails(fd, NULL) ? -1 : REAL(pwrite64)(fd, data, n, at);
}

int fsync(int fd) { return fails(fd, NULL) ? -1 : REAL(fsync)(fd); }

int rename(const char *from, const char *to)
{
    return fails(AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode)
{
    return fails(AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}

int unlink(const char *path) { return fails(AT_FDCWD, path) ? -1 : REAL(unlink)(path); }

int unlinkat(int at, const char *path, int flags)
{
    return fails(at, path) ? -1 : REAL(unlinkat)(at, path, flags);
}

int rmdir(const char *path) { return fails(AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }

int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return flags & O_CREAT && fails(AT_FDCWD, path) ? -1 : REAL(open64)(path, flags, mode);
}
