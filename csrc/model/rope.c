#include <math.h>
#include <stdlib.h>

#include "state.h"

/* x rounded to float16, as an array */
static glm_status round_half(struct glm_backend *be, float *x, size_t n, struct glm_error *err)
{
    float *wide = be->alloc(be, n * 4);
    void *half = be->alloc(be, n * 2);
    if (wide && half) {
        be->upload(be, wide, x, n * 4);
        be->ops->convert(be->cx, half, GLM_F16, wide, GLM_F32, n);
        be->ops->convert(be->cx, wide, GLM_F32, half, GLM_F16, n);
        be->download(be, x, wide, n * 4);
    }
    glm_status status =
        wide && half ? GLM_OK : glm_fail(err, GLM_EMEMORY, "rotary table: %zu bytes", n * 6);
    be->free(be, wide);
    be->free(be, half);
    return status;
}

/* ChatGLM2's float16 code rounds exponent, power, reciprocal, position and product (golden
 * long/half_*). */
static glm_status half_angles(struct glm_model *m, float *angle, int first, int T,
                              struct glm_error *err)
{
    const int pairs = m->arch.rotary_dim / 2;
    float *inv = malloc((size_t)pairs * 4), *pos = malloc((size_t)T * 4);
    glm_status status =
        inv && pos ? GLM_OK : glm_fail(err, GLM_EMEMORY, "rotary table: %d positions", T);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = (float)(2 * j) / (float)m->arch.rotary_dim;
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = powf((float)m->arch.rope_base, inv[j]);
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = 1.0f / inv[j];
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int p = 0; status == GLM_OK && p < T; p++)
        pos[p] = (float)(first + p);
    if (status == GLM_OK)
        status = round_half(m->be, pos, (size_t)T, err);
    if (status == GLM_OK && m->arch.rope_divisor != 1.0) {
        for (int p = 0; p < T; p++)
            pos[p] /= (float)m->arch.rope_divisor;
        status = round_half(m->be, pos, (size_t)T, err);
    }
    for (int p = 0; status == GLM_OK && p < T; p++)
        for (int j = 0; j < pairs; j++)
            angle[(size_t)p * pairs + j] = pos[p] * inv[j];
    if (status == GLM_OK)
        status = round_half(m->be, angle, (size_t)T * pairs, err);
    free(inv);
    free(pos);
    return status;
}

/* Rows first .. first + T - 1: cos and sin of position / divisor * base^(-2j / rotary_dim), in the
 * precision of the backend. */
static glm_status fill_rope_table(struct glm_model *m, int first, int T, struct glm_error *err)
{
    const struct glm_arch *a = &m->arch;
    const int pairs = a->rotary_dim / 2;
    const size_t n = (size_t)T * pairs;
    struct glm_backend *be = m->be;
    char *table = malloc(2 * n * be->real_size);
    float *angle = a->half_rope_table ? malloc(n * 4) : NULL;
    if (!table || (a->half_rope_table && !angle)) {
        free(table);
        free(angle);
        return glm_fail(err, GLM_EMEMORY, "rotary table: %d positions, %zu bytes", T,
                        2 * n * be->real_size);
    }
    glm_status status = angle ? half_angles(m, angle, first, T, err) : GLM_OK;
    for (int j = 0; status == GLM_OK && j < pairs; j++) {
        const double wide = pow(a->rope_base, -2.0 * j / a->rotary_dim);
        const float inv = 1.0f / powf((float)a->rope_base, (float)(2 * j) / (float)a->rotary_dim);
        for (int p = 0; p < T; p++) {
            const size_t i = (size_t)p * pairs + j;
            if (be->real == GLM_F64 && !angle) {
                const double t = (first + p) / a->rope_divisor * wide;
                ((double *)table)[2 * i] = cos(t);
                ((double *)table)[2 * i + 1] = sin(t);
                continue;
            }
            const float t = angle ? angle[i] : (float)(first + p) / (float)a->rope_divisor * inv;
            if (be->real == GLM_F64) {
                ((double *)table)[2 * i] = cosf(t);
                ((double *)table)[2 * i + 1] = sinf(t);
            } else {
                ((float *)table)[2 * i] = cosf(t);
                ((float *)table)[2 * i + 1] = sinf(t);
            }
        }
    }
    if (status == GLM_OK && angle && be->real == GLM_F32)
        status = round_half(be, (float *)table, 2 * n, err);
    if (status == GLM_OK)
        be->upload(be, glm_at(m, m->rope_table, (size_t)first * a->rotary_dim), table,
                   2 * n * be->real_size);
    free(table);
    free(angle);
    return status;
}

glm_status glm_rope_reach(struct glm_model *m, int64_t positions, struct glm_error *err)
{
    enum { ROWS = 1024 }; /* at a time: all 32,768 of a large model take 12 ms */
    const int first = m->rope_rows, T = m->arch.max_positions;
    if (positions <= first || first == T)
        return GLM_OK;
    const int64_t whole = (positions + ROWS - 1) / ROWS * ROWS;
    const int end = whole < T ? (int)whole : T;
    GLM_TRY(fill_rope_table(m, first, end - first, err));
    m->rope_rows = end;
    return GLM_OK;
}

glm_status glm_rope_create(struct glm_model *m, struct glm_error *err)
{
    const size_t bytes = (size_t)m->arch.max_positions * m->arch.rotary_dim * m->be->real_size;
    m->rope_table = m->be->alloc(m->be, bytes);
    if (!m->rope_table)
        return glm_fail(err, GLM_EMEMORY, "rotary table: %d positions, %zu bytes",
                        m->arch.max_positions, bytes);
    return glm_rope_reach(m, 1, err);
}
