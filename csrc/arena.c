#include "arena.h"

#include <stdint.h>
#include <stdlib.h>

void *glm_arena_push(struct glm_arena *arena, size_t count, size_t size)
{
    size_t bytes, end;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX / 2 ||
        __builtin_add_overflow(arena->used, (bytes + 63) / 64 * 64, &end) || end > SIZE_MAX / 2) {
        arena->used = arena->peak = SIZE_MAX / 2;
        return NULL;
    }
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used = end;
    if (arena->peak < end)
        arena->peak = end;
    return p;
}

glm_status glm_arena_commit(struct glm_arena *arena, size_t bytes, struct glm_backend *be,
                            const char *what, struct glm_error *err)
{
    arena->used = arena->peak = 0;
    if (bytes <= arena->capacity)
        return GLM_OK;
    glm_arena_free(arena, be);
    arena->base = arena->on_host ? calloc(1, bytes) : be->alloc(be, bytes);
    if (arena->on_host) /* alloc counts itself */
        __atomic_fetch_add(&be->allocated, 1, __ATOMIC_RELAXED);
    if (!arena->base)
        return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes (%.1f MiB) could not be taken", what,
                        bytes, (double)bytes / (1 << 20));
    arena->capacity = bytes;
    return GLM_OK;
}

void glm_arena_free(struct glm_arena *arena, struct glm_backend *be)
{
    if (arena->on_host)
        free(arena->base);
    else if (arena->base)
        be->free(be, arena->base);
    *arena = (struct glm_arena){.on_host = arena->on_host};
}
