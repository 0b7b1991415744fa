/* Rotary positions, in place: a thread rotates two adjacent pairs, 16 bytes. */
#include "launch.cuh"

GLM_KERNEL(256)
k_rope(float *x, const float *table, const int *position, int N, int heads, int HD, int stride,
       int rotary_dim, float sign)
{
    const int quads = (rotary_dim + 3) / 4;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t n = at / ((size_t)heads * quads);
    if (n >= (size_t)N)
        return;
    const int in_row = (int)(at % ((size_t)heads * quads)), h = in_row / quads,
              i = in_row % quads * 4;
    float *head = x + n * stride + (size_t)h * HD;
    const f4 angle = load4(table + (size_t)position[n] * rotary_dim, i, rotary_dim);
    const f4 a = load4(head, i, rotary_dim);
    f4 r;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const float c = angle.v[j], s = sign * angle.v[j + 1];
        r.v[j] = a.v[j] * c - a.v[j + 1] * s;
        r.v[j + 1] = a.v[j + 1] * c + a.v[j] * s;
    }
    store4(head, i, rotary_dim, r);
}

#ifdef GLM_HOST
static void rope(void *cx, void *x, const void *table, const int32_t *position, int N, int heads,
                 int HD, int stride, int rotary_dim, float sign)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t threads = (size_t)N * heads * ((rotary_dim + 3) / 4);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "rope", k_rope, ceil_div(threads, 256), 256, 0, (float *)x,
                   (const float *)table, position, N, heads, HD, stride, rotary_dim, sign);
}

extern "C" void glm_cuda_rope_forward(void *cx, void *x, const void *table, const int32_t *position,
                                      int N, int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, x, table, position, N, heads, HD, stride, rotary_dim, 1);
}

extern "C" void glm_cuda_rope_backward(void *cx, void *dx, const void *table,
                                       const int32_t *position, int N, int heads, int HD,
                                       int stride, int rotary_dim)
{
    rope(cx, dx, table, position, N, heads, HD, stride, rotary_dim, -1);
}
#endif
