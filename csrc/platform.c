/* What Linux and macOS do each in its own way: see platform.h. */
#include "platform.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <mach/mach.h>
#include <sys/sysctl.h>
#endif

#ifdef __linux__
/* A number from a one-line file, or of its first line that begins with `key`; else `otherwise`
 * ("max" and absent files included). */
static unsigned long long number_in(const char *path, const char *key, unsigned long long otherwise)
{
    unsigned long long value = otherwise;
    char line[256];
    const size_t n = strlen(key);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, n) == 0) {
            if (sscanf(line + n, "%llu", &value) != 1)
                value = otherwise;
            break;
        }
    if (f)
        fclose(f);
    return value;
}

/* What the control group in `folder` and those around it leave: limit - used, where pages of files
 * count as free, since the system drops them when others need the memory. */
static unsigned long long group_leaves(char *folder, const char *root, const char *limit_name,
                                       const char *used_name)
{
    unsigned long long least = ~0ull;
    char path[PATH_MAX + 64];
    for (;;) {
        snprintf(path, sizeof path, "%s/%s", folder, limit_name);
        const unsigned long long limit = number_in(path, "", ~0ull);
        snprintf(path, sizeof path, "%s/%s", folder, used_name);
        unsigned long long used = number_in(path, "", 0);
        snprintf(path, sizeof path, "%s/memory.stat", folder);
        for (int i = 0; i < 2; i++) { /* version 1 adds up the groups within under total_ */
            const char *v1 = i ? "total_active_file " : "total_inactive_file ";
            const unsigned long long files = number_in(path, v1, number_in(path, v1 + 6, 0));
            used = used > files ? used - files : 0;
        }
        if (limit != ~0ull && (limit > used ? limit - used : 0) < least)
            least = limit > used ? limit - used : 0;
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= strlen(root) || !slash)
            return least;
        *slash = 0;
    }
}

unsigned long long glm_memory_available(void)
{
    unsigned long long available = number_in("/proc/meminfo", "MemAvailable:", ~0ull);
    if (available != ~0ull)
        available *= 1024;
    char line[PATH_MAX], folder[PATH_MAX + 32];
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) { /* id:controllers:/path */
        char *controllers = strchr(line, ':'),
             *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        const int v1 = strstr(controllers, "memory") != NULL, v2 = strcmp(controllers, ":") == 0;
        if (!v1 && !v2)
            continue;
        const char *root = v1 ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup";
        snprintf(folder, sizeof folder, "%s%s", root, strcmp(path, "/") == 0 ? "" : path);
        const unsigned long long left =
            group_leaves(folder, root, v1 ? "memory.limit_in_bytes" : "memory.max",
                         v1 ? "memory.usage_in_bytes" : "memory.current");
        available = left < available ? left : available;
    }
    if (f)
        fclose(f);
    return available;
}

int glm_processors(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

void glm_huge_pages(void *p, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

static int64_t milliseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t glm_milliseconds(void) { return milliseconds(CLOCK_MONOTONIC_COARSE); }

int64_t glm_change_time(const struct stat *file)
{
    return (int64_t)file->st_mtim.tv_sec * 1000000000 + file->st_mtim.tv_nsec;
}

int glm_lock_within(pthread_mutex_t *mutex, int ms)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += ms * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return pthread_mutex_timedlock(mutex, &until) == 0;
}

unsigned glm_arm_features(void)
{
    unsigned found = 0;
#ifdef __aarch64__ /* bits as the kernel numbers them; older headers lack names of some */
    const unsigned long has = getauxval(AT_HWCAP), has2 = getauxval(AT_HWCAP2);
    found |= has & 1ul << 20 ? GLM_ARM_DOTPROD : 0; /* ASIMDDP */
    found |= has2 & 1ul << 13 ? GLM_ARM_I8MM : 0;
    found |= has2 & 1ul << 14 ? GLM_ARM_BF16 : 0;
#endif
    return found;
}

int glm_may_use_tiles(void)
{
#ifdef __x86_64__
    const int ask = 0x1023,
              tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux 5.16 */
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return 0;
#endif
}

#elif defined(__APPLE__)

unsigned long long glm_memory_available(void)
{
    vm_statistics64_data_t pages;
    mach_msg_type_number_t n = HOST_VM_INFO64_COUNT;
    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t)&pages, &n) != 0)
        return ~0ull;
    /* those of files can be dropped */
    const unsigned long long many =
        (unsigned long long)pages.free_count + pages.inactive_count + pages.purgeable_count;
    return many * (unsigned long long)sysconf(_SC_PAGESIZE);
}

int glm_processors(void)
{
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

void glm_huge_pages(void *p, size_t bytes) { (void)p, (void)bytes; }

int64_t glm_milliseconds(void)
{
    return (int64_t)(clock_gettime_nsec_np(CLOCK_MONOTONIC_RAW_APPROX) / 1000000);
}

int64_t glm_change_time(const struct stat *file)
{
    return (int64_t)file->st_mtimespec.tv_sec * 1000000000 + file->st_mtimespec.tv_nsec;
}

int glm_lock_within(pthread_mutex_t *mutex, int ms)
{
    const struct timespec moment = {.tv_nsec = 1000000};
    for (; pthread_mutex_trylock(mutex) != 0; nanosleep(&moment, NULL))
        if (ms-- < 1)
            return 0;
    return 1;
}

int glm_may_use_tiles(void) { return 0; }

static unsigned has(const char *name, unsigned feature)
{
    int yes = 0;
    size_t size = sizeof yes;
    return sysctlbyname(name, &yes, &size, NULL, 0) == 0 && yes ? feature : 0;
}

unsigned glm_arm_features(void)
{
    return has("hw.optional.arm.FEAT_DotProd", GLM_ARM_DOTPROD) |
           has("hw.optional.arm.FEAT_I8MM", GLM_ARM_I8MM) |
           has("hw.optional.arm.FEAT_BF16", GLM_ARM_BF16);
}

#else
#error "glmlora builds on Linux and on macOS (csrc/README.md says what Windows would take)"
#endif
