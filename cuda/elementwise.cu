/* Element by element: SwiGLU, GELU, tanh, dropout, sums. A thread has four adjacent elements of a row. */
#include "launch.cuh"
#include "products.h"

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Row and first column of this thread when a row of width `width` takes `blocks` blocks. */
static __device__ __forceinline__ int column4(int blocks)
{
    return 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
}

GLM_KERNEL(256) k_swiglu_forward(float *out, const float *inp, int F, int blocks)
{
    const size_t n = blockIdx.x / blocks;
    const int f = column4(blocks);
    if (f >= F)
        return;
    f4 gate = load4(inp + n * 2 * F, f, F);
    const f4 up = load4(inp + n * 2 * F + F, f, F);
#pragma unroll
    for (int j = 0; j < 4; j++)
        gate.v[j] = gate.v[j] * sigmoid(gate.v[j]) * up.v[j];
    store4(out + n * F, f, F, gate);
}

/* The same in 16 bits, of float or of 16 bits, eight columns a thread */
GLM_KERNEL(256)
k_swiglu_narrow(unsigned short *out, int type, const void *inp, int from, int F, int blocks)
{
    const size_t n = blockIdx.x / blocks;
    const int f = 2 * column4(blocks);
    float gate[8], up[8];
    if (f >= F)
        return;
    load8_of(inp, from, n * 2 * F + f, gate);
    load8_of(inp, from, n * 2 * F + F + f, up);
#pragma unroll
    for (int j = 0; j < 8; j++)
        gate[j] = gate[j] * sigmoid(gate[j]) * up[j];
    store8_narrow(out + n * F + f, type, gate);
}

/* Gate and value become their gradients. */
static __device__ __forceinline__ void gradient_of(float &gate, float &up, float dy)
{
    const float x = gate, s = sigmoid(x);
    gate = dy * up * s * (1.0f + x * (1.0f - s));
    up = dy * x * s;
}

static __device__ __forceinline__ void swiglu_gradient(f4 &gate, f4 &up, const f4 dy)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        gradient_of(gate.v[j], up.v[j], dy.v[j]);
}

/* The same times *factor (NULL: 1) in 16 bits, at the beginning of the row of h that it is of: a
 * block has read the row. */
GLM_KERNEL(512)
k_swiglu_backward_narrow(float *h, int type, const float *dact, int F, const float *factor)
{
    enum { TURNS = GLM_SWIGLU_ROW / 8 / 512 };
    const size_t n = blockIdx.x;
    const float by = factor ? *factor : 1.0f;
    uint4 gates[TURNS], ups[TURNS];
    h += n * 2 * F, dact += n * F;
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int f = 8 * (t * (int)blockDim.x + (int)threadIdx.x);
        float v[8], w[8];
        if (f >= F)
            break;
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            f4 gate = load4(h, f + half, F), up = load4(h + F, f + half, F);
            swiglu_gradient(gate, up, load4(dact, f + half, F));
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[half + j] = by * gate.v[j], w[half + j] = by * up.v[j];
        }
        gates[t] = narrow8(v, type), ups[t] = narrow8(w, type);
    }
    __syncthreads();
    unsigned short *to = reinterpret_cast<unsigned short *>(h);
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int f = 8 * (t * (int)blockDim.x + (int)threadIdx.x);
        if (f >= F)
            break;
        *reinterpret_cast<uint4 *>(to + f) = gates[t];
        *reinterpret_cast<uint4 *>(to + F + f) = ups[t];
    }
}

/* The same of h in 16 bits, in its place; from: the type of dact */
GLM_KERNEL(256)
k_swiglu_backward_16(unsigned short *h, int type, const void *dact, int from, int F, int blocks,
                     const float *factor)
{
    const size_t n = blockIdx.x / blocks;
    const int f = 2 * column4(blocks);
    const float by = factor ? *factor : 1.0f;
    float gate[8], up[8], dy[8];
    if (f >= F)
        return;
    h += n * 2 * F + f;
    load8_of(h, type, 0, gate);
    load8_of(h, type, F, up);
    load8_of(dact, from, n * F + f, dy);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        gradient_of(gate[j], up[j], dy[j]);
        gate[j] *= by, up[j] *= by;
    }
    store8_narrow(h, type, gate);
    store8_narrow(h + F, type, up);
}

GLM_BLOCK_REDUCTION(block_max, float, warp_max, 0)

/* Of a block's rows of that gradient the largest element; from: the type of h */
GLM_KERNEL(256)
k_swiglu_largest(float *largest, const float *dact, const void *h, int from, int N, int F)
{
    float most = 0;
    for (size_t n = blockIdx.x; n < (size_t)N; n += gridDim.x)
        for (int f = 4 * threadIdx.x; f < F; f += 4 * blockDim.x) {
            const char *gates = static_cast<const char *>(h) + stored_bytes(from, n * 2 * F),
                       *values = gates + stored_bytes(from, F);
            f4 gate = load4_stored(gates, from, f, F), up = load4_stored(values, from, f, F);
            swiglu_gradient(gate, up, load4(dact + n * F, f, F));
#pragma unroll
            for (int j = 0; j < 4; j++)
                most = fmaxf(most, fmaxf(fabsf(gate.v[j]), fabsf(up.v[j])));
        }
    most = block_max(most);
    if (threadIdx.x == 0)
        largest[blockIdx.x] = most;
}

/* dinp may be inp: a thread has read what it writes */
GLM_KERNEL(256)
k_swiglu_backward(float *dinp, const float *dout, const float *inp, int F, int blocks)
{
    const size_t n = blockIdx.x / blocks;
    const int f = column4(blocks);
    if (f >= F)
        return;
    f4 gate = load4(inp + n * 2 * F, f, F), up = load4(inp + n * 2 * F + F, f, F);
    swiglu_gradient(gate, up, load4(dout + n * F, f, F));
    store4(dinp + n * 2 * F, f, F, gate);
    store4(dinp + n * 2 * F + F, f, F, up);
}

/* 2 sqrt(2/pi) (x + 0.044715 x^3), of which the sigmoid is (1 + tanh(half of it)) / 2 */
static __device__ __forceinline__ float gelu_slope(float x)
{
    return 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
}

GLM_KERNEL(256) k_gelu_forward(float *out, const float *inp, size_t n)
{
    const size_t i = flat4();
    let_next_begin();
    after_previous();
    if (i >= n)
        return;
    f4 x = load4(inp, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] *= sigmoid(gelu_slope(x.v[j]));
    store4(out, i, n, x);
}

/* dinp may be inp or dout: a thread has read what it writes */
GLM_KERNEL(256) k_gelu_backward(float *dinp, const float *dout, const float *inp, size_t n)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 d = load4(dout, i, n);
    const f4 x = load4(inp, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float s = sigmoid(gelu_slope(x.v[j]));
        const float steep = 1.5957691216057308f * (1.0f + 3.0f * 0.044715f * x.v[j] * x.v[j]);
        d.v[j] *= s + x.v[j] * (s * (1.0f - s)) * steep;
    }
    store4(dinp, i, n, d);
}

GLM_KERNEL(256) k_tanh_forward(float *out, const float *inp, size_t n)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 x = load4(inp, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] = tanhf(x.v[j]);
    store4(out, i, n, x);
}

GLM_KERNEL(256) k_tanh_backward(float *dinp, const float *dout, const float *out, size_t n)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 d = load4(dout, i, n);
    const f4 y = load4(out, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++)
        d.v[j] *= 1.0f - y.v[j] * y.v[j];
    store4(dinp, i, n, d);
}

/* out = (add ? out : 0) + inp * mask; four columns are one Philox counter */
GLM_KERNEL(256) k_dropout(float *out, const float *inp, int C, int blocks, int add, mask_of mask)
{
    const size_t n = blockIdx.x / blocks;
    const int c = column4(blocks);
    if (c >= C)
        return;
    const words w = mask_words(mask, (int)n, (unsigned)c / 4);
    f4 x = load4(inp + n * C, c, C), y;
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] *= keep(mask, w.w[j]);
    if (add) {
        y = load4(out + n * C, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.v[j] += y.v[j];
    }
    store4(out + n * C, c, C, x);
}

/* x += size * noise */
GLM_KERNEL(256) k_noise(float *x, int C, int blocks, float size, mask_of draw)
{
    const size_t n = blockIdx.x / blocks;
    const int c = column4(blocks);
    if (c >= C)
        return;
    const words w = mask_words(draw, (int)n, (unsigned)c / 4);
    f4 y = load4(x + n * C, c, C);
#pragma unroll
    for (int j = 0; j < 4; j++)
        y.v[j] += size * ((float)(w.w[j] >> 8) * (1.0f / 8388608.0f) - 1.0f);
    store4(x + n * C, c, C, y);
}

/* out = scale a + b; of scale 1 the product is exact */
GLM_KERNEL(256) k_add(float *out, const float *a, const float *b, size_t n, float scale)
{
    const size_t i = flat4();
    let_next_begin();
    after_previous();
    if (i >= n)
        return;
    f4 x = load4(a, i, n);
    const f4 y = load4(b, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] = scale * x.v[j] + y.v[j];
    store4(out, i, n, x);
}

#ifdef GLM_HOST
static int blocks_of(int width) { return (int)ceil_div((size_t)width, 1024); }

extern "C" void glm_cuda_swiglu_forward(void *cx, void *out, const void *inp, int N, int F)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "swiglu_forward", k_swiglu_forward, (size_t)N * blocks_of(F), 256, 0,
                   (float *)out, (const float *)inp, F, blocks_of(F));
}

extern "C" void glm_cuda_swiglu_backward(void *cx, void *dinp, const void *dout, const void *inp,
                                         int N, int F)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "swiglu_backward", k_swiglu_backward, (size_t)N * blocks_of(F), 256, 0,
                   (float *)dinp, (const float *)dout, (const float *)inp, F, blocks_of(F));
}

void glm_cuda_swiglu_narrow(struct cuda *cuda, const char *op, void *out, enum glm_dtype type,
                            const void *h, enum glm_dtype from, int N, int F)
{
    const int blocks = (int)ceil_div((size_t)F, 2048);
    GLM_LAUNCH(cuda, op, k_swiglu_narrow, (size_t)N * blocks, 256, 0, (unsigned short *)out,
               (int)type, h, (int)from, F, blocks);
}

/* The factor for float16, else NULL */
static const float *swiglu_factor(struct cuda *cuda, const char *op, enum glm_dtype type,
                                  const void *dact, const void *h, enum glm_dtype from, int N,
                                  int F)
{
    const int blocks = N < 512 ? N : 512;
    if (type != GLM_F16)
        return NULL;
    GLM_LAUNCH(cuda, op, k_swiglu_largest, blocks, 256, 0, cuda->small->largest,
               (const float *)dact, h, (int)from, N, F);
    return glm_cuda_factor_of(cuda, blocks, 13, 1);
}

const float *glm_cuda_swiglu_backward_narrow(struct cuda *cuda, void *h, enum glm_dtype type,
                                             const void *dact, int N, int F)
{
    const char *op = "swiglu_linear_backward";
    const float *factor = swiglu_factor(cuda, op, type, dact, h, GLM_F32, N, F);
    GLM_LAUNCH(cuda, op, k_swiglu_backward_narrow, N, 512, 0, (float *)h, (int)type,
               (const float *)dact, F, factor);
    return factor;
}

const float *glm_cuda_swiglu_backward_16(struct cuda *cuda, void *h, enum glm_dtype type,
                                         const void *dact, enum glm_dtype from, int N, int F)
{
    const char *op = "swiglu_mlp_backward";
    const int blocks = (int)ceil_div((size_t)F, 2048);
    const float *factor = swiglu_factor(cuda, op, type, dact, h, type, N, F);
    GLM_LAUNCH(cuda, op, k_swiglu_backward_16, (size_t)N * blocks, 256, 0, (unsigned short *)h,
               (int)type, dact, (int)from, F, blocks, factor);
    return factor;
}

extern "C" void glm_cuda_gelu_forward(void *cx, void *out, const void *inp, size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "gelu_forward", k_gelu_forward, ceil_div(n, 1024), 256, 0,
                         (float *)out, (const float *)inp, n);
}

extern "C" void glm_cuda_gelu_backward(void *cx, void *dinp, const void *dout, const void *inp,
                                       size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "gelu_backward", k_gelu_backward, ceil_div(n, 1024), 256, 0, (float *)dinp,
                   (const float *)dout, (const float *)inp, n);
}

extern "C" void glm_cuda_tanh_forward(void *cx, void *out, const void *inp, size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "tanh_forward", k_tanh_forward, ceil_div(n, 1024), 256, 0, (float *)out,
                   (const float *)inp, n);
}

extern "C" void glm_cuda_tanh_backward(void *cx, void *dinp, const void *dout, const void *out,
                                       size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "tanh_backward", k_tanh_backward, ceil_div(n, 1024), 256, 0, (float *)dinp,
                   (const float *)dout, (const float *)out, n);
}

extern "C" void glm_cuda_dropout_forward(void *cx, void *out, const void *inp, int N, int C,
                                         const struct glm_dropout *dropout)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "dropout_forward", k_dropout, (size_t)N * blocks_of(C), 256, 0,
                   (float *)out, (const float *)inp, C, blocks_of(C), 0, mask_from(dropout));
}

extern "C" void glm_cuda_dropout_backward(void *cx, void *dinp, const void *dout, int N, int C,
                                          const struct glm_dropout *dropout)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "dropout_backward", k_dropout, (size_t)N * blocks_of(C), 256, 0,
                   (float *)dinp, (const float *)dout, C, blocks_of(C), 1, mask_from(dropout));
}

extern "C" void glm_cuda_noise(void *cx, void *x, int N, int C, double size,
                               const struct glm_dropout *draw)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "noise", k_noise, (size_t)N * blocks_of(C), 256, 0, (float *)x, C,
                   blocks_of(C), (float)size, mask_from(draw));
}

extern "C" void glm_cuda_add(void *cx, void *out, const void *a, const void *b, size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "add", k_add, ceil_div(n, 1024), 256, 0, (float *)out, (const float *)a,
                   (const float *)b, n, 1.0f);
}

extern "C" void glm_cuda_scaled_add(void *cx, void *out, const void *a, const void *b, size_t n,
                                    double scale)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "scaled_add", k_add, ceil_div(n, 1024), 256, 0, (float *)out,
                         (const float *)a, (const float *)b, n, (float)scale);
}
#endif
