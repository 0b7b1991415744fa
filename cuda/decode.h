/* How attention of segments of a few tokens is cut, for attention_decode.cu and for the plan that
 * counts it: the keys that a token sees into runs of one length, which only their number says. */
#ifndef GLM_CUDA_DECODE_H
#define GLM_CUDA_DECODE_H

#include "backend.h"

enum {
    GLM_DECODE_TOKENS = 4, /* segments of at most so many go this way, longer ones by tiles */
    GLM_DECODE_RUN = 64,   /* keys of a run, or a multiple, so that there are at most .. */
    GLM_DECODE_RUNS = 64,
};

#ifndef __CUDACC_RTC__
struct glm_decode {
    int tokens, runs; /* of a segment and of a token, at most */
    size_t scratch;   /* bytes, for n segments; 0: one run is the result */
};

static inline struct glm_decode glm_decode_of(struct glm_heads heads, int n)
{
    struct glm_decode d;
    const int known = heads.longest && heads.longest < GLM_DECODE_TOKENS;
    d.tokens = known ? heads.longest : GLM_DECODE_TOKENS;
    const int runs = (heads.before + d.tokens - 1) / GLM_DECODE_RUN + 1;
    d.runs = runs < GLM_DECODE_RUNS ? runs : GLM_DECODE_RUNS;
    const size_t of_head = (size_t)(heads.HD + 3) / 4 * 4 + 2; /* floats */
    d.scratch = d.runs > 1 ? 4 * of_head * (size_t)n * (size_t)(d.tokens * heads.NH * d.runs) : 0;
    return d;
}
#endif

#endif
