/* The rotary table: cos and sin of position / divisor * base^(-2j / rotary_dim), filled as far as
 * someone asks, in the precision of the backend or as ChatGLM2's float16 code gets them. */
#include <math.h>
#include <stdlib.h>

#include "state.h"

/* The nearest float16, ties to even, as a float. */
static float round_half(float x)
{
    int exponent;
    if (!(fabsf(x) < 65520)) /* half a step beyond the largest: infinity */
        return isnan(x) ? x : copysignf(INFINITY, x);
    frexpf(x, &exponent); /* |x| in [1/2, 1) * 2^exponent: 11 bits, or to the smallest step 2^-24 */
    const float step = ldexpf(1, (exponent > -13 ? exponent : -13) - 11);
    return rintf(x / step) * step;
}

/* base^(-2j / rotary_dim); the float16 code rounds exponent, power and reciprocal (golden
 * long/half_*), ChatGLM-6B the outcome alone */
static float frequency_of(const struct glm_arch *a, int j)
{
    const float exponent = (float)(2 * j) / (float)a->rotary_dim;
    if (!a->half_rope_table) {
        const float frequency = 1.0f / powf((float)a->rope_base, exponent);
        return a->half_rope_frequencies ? round_half(frequency) : frequency;
    }
    return round_half(1.0f / round_half(powf((float)a->rope_base, round_half(exponent))));
}

/* .. and position, quotient and product */
static float angle_of(const struct glm_arch *a, int position, float frequency)
{
    if (!a->half_rope_table)
        return (float)position / (float)a->rope_divisor * frequency;
    float p = round_half((float)position);
    if (a->rope_divisor != 1.0)
        p = round_half(p / (float)a->rope_divisor);
    return round_half(p * frequency);
}

/* Rows first .. first + T - 1 into table (T, rotary_dim / 2, 2). */
static void fill_floats(const struct glm_arch *a, float *table, int first, int T)
{
    const int pairs = a->rotary_dim / 2;
    for (int j = 0; j < pairs; j++) {
        const float frequency = frequency_of(a, j);
        for (int p = 0; p < T; p++) {
            float *pair = table + 2 * ((size_t)p * pairs + j);
            const float t = angle_of(a, first + p, frequency);
            pair[0] = a->half_rope_table ? round_half(cosf(t)) : cosf(t);
            pair[1] = a->half_rope_table ? round_half(sinf(t)) : sinf(t);
        }
    }
}

static void fill_doubles(const struct glm_arch *a, double *table, int first, int T)
{
    const int pairs = a->rotary_dim / 2;
    for (int j = 0; j < pairs; j++) {
        const float rounded = frequency_of(a, j);
        const double frequency = a->half_rope_frequencies
                                     ? (double)rounded
                                     : pow(a->rope_base, -2.0 * j / a->rotary_dim);
        for (int p = 0; p < T; p++) {
            double *pair = table + 2 * ((size_t)p * pairs + j);
            const double t = (first + p) / a->rope_divisor * frequency;
            const float half = angle_of(a, first + p, rounded);
            pair[0] = a->half_rope_table ? cosf(half) : cos(t);
            pair[1] = a->half_rope_table ? sinf(half) : sin(t);
        }
    }
}

glm_status glm_rope_reach(struct glm_model *m, int64_t positions, struct glm_error *err)
{
    enum { ROWS = 1024 }; /* at a time: all 32,768 of a large model take 12 ms */
    const int first = m->rope_rows, end_of_table = m->arch.max_positions;
    if (positions <= first || first == end_of_table)
        return GLM_OK;
    const int64_t whole = (positions + ROWS - 1) / ROWS * ROWS;
    const int end = whole < end_of_table ? (int)whole : end_of_table, T = end - first;
    const size_t bytes = (size_t)T * m->arch.rotary_dim * m->be->real_size;
    void *table = malloc(bytes);
    if (!table)
        return glm_fail(err, GLM_EMEMORY,
                        "rotary table: %d positions: %zu bytes could not be taken", T, bytes);
    if (m->be->real == GLM_F64)
        fill_doubles(&m->arch, table, first, T);
    else
        fill_floats(&m->arch, table, first, T);
    m->be->upload(m->be, glm_at(m, m->rope_table, (size_t)first * m->arch.rotary_dim), table,
                  bytes);
    free(table);
    m->rope_rows = end;
    return GLM_OK;
}

glm_status glm_rope_create(struct glm_model *m, struct glm_error *err)
{
    const size_t bytes = (size_t)m->arch.max_positions * m->arch.rotary_dim * m->be->real_size;
    m->rope_table = m->be->alloc(m->be, bytes);
    if (!m->rope_table)
        return glm_fail(err, GLM_EMEMORY,
                        "rotary table: %d positions: %zu bytes could not be taken",
                        m->arch.max_positions, bytes);
    return glm_rope_reach(m, 1, err);
}
