/* Files that weights lie in, mapped and watched: one that changes or becomes shorter is an error
 * with its name, never a signal and never other numbers.
 *
 * Reading a page that its file no longer has (or that the disk cannot read) raises SIGBUS. While a
 * thread is between glm_guard_begin and glm_guard_end, a handler puts zeros in the place of the
 * file's remaining pages, marks the file and lets the read go on, so no computation is left in the
 * middle; whoever guarded asks glm_mapped_check afterwards and throws away what came out. Display
 * servers guard the memory that clients share with them in this way. A fault of another thread or
 * at another address goes to the handler that was there before, which is there again when the last
 * guard ends. */
#ifndef GLM_MAPPED_H
#define GLM_MAPPED_H

#include <stddef.h>

#include "status.h"

struct glm_mapped;

/* Maps all of the open file `fd`, which may be closed then; path is what errors call it. GLM_EFILE
 * as the system refuses it, GLM_EMEMORY. */
glm_status glm_mapped_open(struct glm_mapped **out, int fd, const char *path,
                           struct glm_error *err);
void glm_mapped_close(struct glm_mapped *file);
const void *glm_mapped_data(const struct glm_mapped *file, size_t *size);

/* The file that the address lies in, or NULL. */
struct glm_mapped *glm_mapped_find(const void *p);
/* GLM_EFILE unless it is as it was when it was mapped: size, time of change, and no page lost. */
glm_status glm_mapped_check(struct glm_mapped *file, struct glm_error *err);
/* Gives back the memory of the whole pages in p .. p + bytes; reading them reads the file again. */
void glm_mapped_drop(const void *p, size_t bytes);

/* Of this thread; they nest. */
void glm_guard_begin(void);
void glm_guard_end(void);
/* This thread does nothing but work that others guard (a worker of a pool). */
void glm_guard_always(void);

#endif
