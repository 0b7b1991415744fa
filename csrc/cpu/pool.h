/* The backend's own threads. Tasks are picked from a counter, so which thread runs one is chance:
 * results may not depend on it. A forked child starts threads of its own; a second caller of a busy
 * pool works alone. */
#ifndef GLM_CPU_POOL_H
#define GLM_CPU_POOL_H

#include <stddef.h>

#define GLM_SCRATCH ((size_t)1 << 20) /* bytes each thread has for packing */

struct glm_pool;
typedef void (*glm_task)(const void *arg, int task, char *scratch);

void *glm_aligned(size_t bytes); /* for free(); NULL: no memory */

struct glm_pool *glm_pool_create(void); /* NULL: no memory */
void glm_pool_destroy(struct glm_pool *pool);
void glm_pool_set_threads(struct glm_pool *pool, int threads);
int glm_pool_threads(const struct glm_pool *pool);
void glm_pool_set_poll(struct glm_pool *pool, int (*poll)(void *arg), void *arg);
int glm_pool_stopped(const struct glm_pool *pool);

/* Runs fn(arg, 0 .. n_tasks - 1); returns when all are done, or skipped because poll asked to stop.
 * ns: about what they cost one thread together; of little the caller does all, since handing it out
 * costs more. */
void glm_pool_run(struct glm_pool *pool, int n_tasks, size_t ns, glm_task fn, const void *arg);

#endif
