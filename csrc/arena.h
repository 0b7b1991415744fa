/* Plan, then commit: the same layout code first counts bytes (base NULL), then hands out addresses
 * in one block. */
#ifndef GLM_ARENA_H
#define GLM_ARENA_H

#include "backend.h"

struct glm_arena {
    char *base;      /* NULL while planning */
    size_t capacity; /* bytes of the block */
    size_t used, peak;
    int on_host; /* the block is memory of the host, and none of the backend's */
};

/* Bytes for count elements of size each, at a multiple of 64 in the block.
 * Planning returns NULL; overflow saturates `peak` at SIZE_MAX / 2, which no commit can satisfy. */
void *glm_arena_push(struct glm_arena *arena, size_t count, size_t size);

/* Makes the block hold at least `bytes`; a block that is big enough stays. What it held is lost. */
glm_status glm_arena_commit(struct glm_arena *arena, size_t bytes, struct glm_backend *be,
                            const char *what, struct glm_error *err);
void glm_arena_free(struct glm_arena *arena, struct glm_backend *be);

#endif
