/* What the choice of a token (struct glm_choice in backend.h) has in common wherever it is made on
 * the host: from scores that a caller has, and in the cpu's op. ref/ has its own. */
#ifndef GLM_CHOICE_H
#define GLM_CHOICE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* The first `penalised` of ids lose by the penalty, the next `banned` may not come. (Keskar et al.
 * 2019, eq. 2, signed as usual) */
static inline void glm_adjust_logits(float *logits, const int32_t *ids, int penalised, int banned,
                                     float penalty)
{
    for (int i = 0; i < penalised; i++) {
        float *x = logits + ids[i];
        *x = *x < 0 ? *x * penalty : *x / penalty;
    }
    for (int i = 0; i < banned; i++)
        logits[ids[penalised + i]] = -INFINITY;
}

/* In (0, 1), of the first word of Philox4x32-10 (Salmon et al. 2011): the same for any thread
 * count, and for a row whatever the other rows do. */
static inline double glm_fraction(uint64_t seed, uint32_t stream, uint32_t index)
{
    uint32_t x[4] = {index, stream, 0x73616d70u, 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * x[0], p1 = (uint64_t)0xCD9E8D57u * x[2];
        const uint32_t y[4] = {(uint32_t)(p1 >> 32) ^ x[1] ^ k0, (uint32_t)p1,
                               (uint32_t)(p0 >> 32) ^ x[3] ^ k1, (uint32_t)p0};
        memcpy(x, y, sizeof x);
    }
    return (x[0] + 0.5) / 4294967296.0;
}

#endif
