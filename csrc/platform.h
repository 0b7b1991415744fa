/* Where Linux and macOS differ: what only one of them has is called in platform.c alone, and
 * tests/test_structure.py looks for it elsewhere. */
#ifndef GLM_PLATFORM_H
#define GLM_PLATFORM_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

/* Processors that this process may run on, 1 or more. */
int glm_processors(void);
/* Bytes this process could still get, what its control groups allow included; ~0: not known. */
unsigned long long glm_memory_available(void);
/* Asks for huge pages, where the system has them. */
void glm_huge_pages(void *p, size_t bytes);
/* Milliseconds since some time in the past, read fast and a few of them late. */
int64_t glm_milliseconds(void);
/* Nanoseconds since 1970 of a file's last change. */
int64_t glm_change_time(const struct stat *file);
/* 1: locked; 0: it was not free for so many milliseconds, below 1000. */
int glm_lock_within(pthread_mutex_t *mutex, int milliseconds);

/* Whether the system lets this process use AMX's tiles, which it saves for those that asked: asks. */
int glm_may_use_tiles(void);

/* Instructions of aarch64 that not all of its processors have. */
enum glm_arm_feature { GLM_ARM_DOTPROD = 1, GLM_ARM_I8MM = 2, GLM_ARM_BF16 = 4 };
/* Those that this processor has; 0 on others. */
unsigned glm_arm_features(void);

#endif
