/* Products with weights. Few rows: own kernels (few.cuh). More rows: cuBLAS, with the operands
 * in the backend's compute type; weights of another type and quantized ones are widened into
 * scratch, some rows of W at a time.
 *
 * Matrices that are thin stay in float (those of adapters: adapter.cu), and so does everything in
 * float32 mode. In float16 the
 * gradient operand is multiplied by a power of two that brings its largest element near 2^13, and
 * the product by its inverse; both stay on the device, so nothing waits for them. */
#include "few.cuh"

/* ---- eight stored elements at a time */

/* Eight integers, from one word (int4: the even column is the high nibble) or two. */
static __device__ __forceinline__ void integers8(uint2 q, int dtype, float *v)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (dtype == GLM_I8) {
            v[j] = (float)((int)(q.x << (24 - 8 * j)) >> 24);
            v[4 + j] = (float)((int)(q.y << (24 - 8 * j)) >> 24);
        } else {
            v[2 * j] = (float)((int)(q.x << (24 - 8 * j)) >> 28);
            v[2 * j + 1] = (float)((int)(q.x << (28 - 8 * j)) >> 28);
        }
}

/* Elements i .. i+7 of a run of n, i a multiple of 8, integers without their scale. */
static __device__ __forceinline__ void load8(const void *p, int dtype, size_t i, size_t n, float *v)
{
    const char *at = static_cast<const char *>(p) + stored_bytes(dtype, i);
    const bool whole = i + 8 <= n;
    GLM_EXPECT(i < n);
    if (dtype == GLM_F32) {
        const f4 a = load4(static_cast<const float *>(p), i, n),
                 b = load4_or_zero(static_cast<const float *>(p), i + 4, n);
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = a.v[j], v[4 + j] = b.v[j];
    } else if (whole && (dtype == GLM_F16 || dtype == GLM_BF16) && ((size_t)at & 15) == 0) {
        widen8(*reinterpret_cast<const uint4 *>(at), dtype, v);
    } else if (whole && dtype == GLM_I8 && ((size_t)at & 7) == 0) {
        integers8(*reinterpret_cast<const uint2 *>(at), GLM_I8, v);
    } else if (whole && dtype == GLM_I4 && ((size_t)at & 3) == 0) {
        uint2 q;
        q.x = *reinterpret_cast<const unsigned *>(at), q.y = 0;
        integers8(q, GLM_I4, v);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = i + j < n ? load1(p, dtype, i + j) : 0.0f;
    }
}

/* In 16 bits */
static __device__ __forceinline__ void store8(void *p, int dtype, size_t i, size_t n,
                                              const float *v)
{
    unsigned short *to = static_cast<unsigned short *>(p) + i;
    if (i + 8 <= n && ((size_t)to & 15) == 0) {
        *reinterpret_cast<uint4 *>(to) = narrow8(v, dtype);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (i + j < n)
            to[j] = (unsigned short)(dtype == GLM_F16 ? half_bits(v[j]) : bf16_bits(v[j]));
}

/* out = inp * *factor in another dtype; factor NULL: 1, and so where that dtype is float */
GLM_KERNEL(256)
k_convert(void *out, int to, const void *inp, int from, size_t n, const float *factor)
{
    if (to == GLM_F32) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const size_t i = flat4() + 4 * blockDim.x * (size_t)(blockIdx.x + half);
            if (i < n)
                store4(static_cast<float *>(out), i, n, load4_stored(inp, from, i, n));
        }
        return;
    }
    const size_t i = 2 * flat4();
    if (i >= n)
        return;
    float v[8];
    load8(inp, from, i, n, v);
    if (factor) {
        const float f = *factor;
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] *= f;
    }
    store8(out, to, i, n, v);
}

/* Columns first .. first + count of inp (N, O), times *factor, side by side in another dtype;
 * `blocks` blocks a row */
GLM_KERNEL(256)
k_columns(void *out, int to, const float *inp, int O, int first, int count, int blocks,
          const float *factor)
{
    const size_t n = blockIdx.x / blocks;
    const int c = 8 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (c >= count)
        return;
    float v[8];
    load8(inp + n * O, GLM_F32, first + c, first + count, v);
    if (factor) {
        const float f = *factor;
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] *= f;
    }
    store8(static_cast<char *>(out) + stored_bytes(to, n * count), to, c, count, v);
}

/* out = inp where one of the two is double. */
GLM_KERNEL(256) k_convert_double(void *out, int to, const void *inp, int from, size_t n)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    const double x =
        from == GLM_F64 ? static_cast<const double *>(inp)[i] : (double)load1(inp, from, i);
    if (to == GLM_F64)
        static_cast<double *>(out)[i] = x;
    else
        store1(out, to, i, to == GLM_F32 ? (float)x : odd_float(x));
}

enum { WIDENED = 4 }; /* rows of a block: so many loads are in flight */

/* `rows` rows of w from `first` on, times their scales, in another dtype; `blocks` blocks a row */
GLM_KERNEL(256) k_widen(void *out, int to, stored_matrix w, int first, int rows, int blocks)
{
    const int r0 = (int)(blockIdx.x / blocks) * WIDENED;
    const int begin = 8 * (int)(blockIdx.x % blocks) * (int)blockDim.x;
    const size_t cols = w.cols;
    const char *data = static_cast<const char *>(w.data);
    if (to == GLM_F32) {
        for (int r = r0; r < min(r0 + WIDENED, rows); r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int c = begin + 4 * (int)(half * blockDim.x + threadIdx.x);
                const size_t row = first + r;
                if (c >= w.cols)
                    break;
                f4 x = load4_stored(data + stored_bytes(w.dtype, row * cols), w.dtype, c, cols);
                if (w.scale) {
                    const float s = scale_at(w, row, c);
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        x.v[j] *= s;
                }
                store4(static_cast<float *>(out) + r * cols, c, cols, x);
            }
        return;
    }
    const int c = begin + 8 * (int)threadIdx.x;
    if (c >= w.cols)
        return;
    const int integers = w.dtype == GLM_I8 || w.dtype == GLM_I4;
    const int whole = integers && cols % 8 == 0 && ((size_t)data & 7) == 0;
    uint2 q[WIDENED];
    float s[WIDENED]; /* groups are multiples of 32: the eight share a scale */
#pragma unroll
    for (int k = 0; k < WIDENED; k++) {
        const size_t row = first + min(r0 + k, rows - 1);
        const char *at = data + stored_bytes(w.dtype, row * cols + c);
        q[k].x = q[k].y = 0;
        if (whole && w.dtype == GLM_I8)
            q[k] = *reinterpret_cast<const uint2 *>(at);
        else if (whole)
            q[k].x = *reinterpret_cast<const unsigned *>(at);
        s[k] = w.scale ? scale_at(w, row, c) : 1.0f;
    }
#pragma unroll
    for (int k = 0; k < WIDENED; k++) {
        float v[8];
        const size_t r = r0 + k;
        if (r0 + k >= rows)
            break;
        if (whole)
            integers8(q[k], w.dtype, v);
        else
            load8(data + stored_bytes(w.dtype, (first + r) * cols), w.dtype, c, cols, v);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] *= s[k];
        store8(static_cast<char *>(out) + stored_bytes(to, r * cols), to, c, cols, v);
    }
}

/* ---- the power of two that brings the largest element near 2^exponent, and scale over it */

GLM_BLOCK_REDUCTION(block_max, float, warp_max, 0)

GLM_KERNEL(256) k_largest(float *largest, const float *x, size_t n)
{
    float most = 0;
    for (size_t i = flat4(); i < n; i += 4 * (size_t)gridDim.x * blockDim.x) {
        const f4 a = load4(x, i, n);
#pragma unroll
        for (int j = 0; j < 4; j++)
            most = fmaxf(most, fabsf(a.v[j]));
    }
    most = block_max(most);
    if (threadIdx.x == 0)
        largest[blockIdx.x] = most;
}

GLM_KERNEL(256)
k_factor(float *factor, float *alpha, const float *largest, int n, int exponent, float scale)
{
    float most = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        most = fmaxf(most, largest[i]);
    most = block_max(most);
    if (threadIdx.x)
        return;
    const int stored = (__float_as_int(most) >> 23) & 255;
    int power = most > 0 && stored < 255 ? exponent - (stored - 127) : 0;
    power = power > 126 ? 126 : power;
    *factor = __int_as_float((127 + power) << 23);
    *alpha = scale * __int_as_float((127 - power) << 23);
}

/* ---- bias */

GLM_KERNEL(256) k_bias(float *out, const float *bias, int O, int blocks, int accumulate)
{
    const size_t n = blockIdx.x / blocks;
    const int o = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (o >= O)
        return;
    f4 b = load4(bias, o, O);
    if (accumulate) {
        const f4 y = load4(out + n * O, o, O);
#pragma unroll
        for (int j = 0; j < 4; j++)
            b.v[j] += y.v[j];
    }
    store4(out + n * O, o, O, b);
}

/* dbias += scale * column sums: 32 columns a block, rows by eights in a fixed order */
GLM_KERNEL(256) k_column_sum(float *dbias, const float *dout, int N, int O, float scale)
{
    __shared__ float part[8][32];
    const int lane = threadIdx.x & 31, group = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    float sum = 0;
    for (int n = group; n < N && c < O; n += 8)
        sum += dout[(size_t)n * O + c];
    part[group][lane] = sum;
    __syncthreads();
    if (group || c >= O)
        return;
    sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum += part[i][lane];
    dbias[c] += scale * sum;
}

/* ---- merge and quantize */

/* W = magnitude * rnorm * (W + scale * B A), four columns a thread */
GLM_KERNEL(256)
k_merge(void *data, int dtype, const float *B, const float *A, const float *magnitude,
        const float *rnorm, int I, int R, float scale, int blocks)
{
    const size_t o = blockIdx.x / blocks;
    const float factor = magnitude ? magnitude[o] * rnorm[o] : 1.0f;
    const int i = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (i >= I)
        return;
    float sum[4] = {0, 0, 0, 0};
    for (int r = 0; r < R; r++) {
        const float b = B[o * R + r];
        const f4 a = load4(A + (size_t)r * I, i, I);
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum[j] += b * a.v[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + j < I) {
            const size_t at = o * I + i + j;
            if (dtype == GLM_F64)
                static_cast<double *>(data)[at] =
                    (double)factor *
                    (static_cast<double *>(data)[at] + (double)scale * (double)sum[j]);
            else
                store1(data, dtype, at, factor * (load1(data, dtype, at) + scale * sum[j]));
        }
}

/* The element of a row-wise matrix is float16 before anything else is done with it. */
static __device__ __forceinline__ float element_of(const void *inp, int dtype, size_t i, int group)
{
    const float w = load1(inp, dtype, i);
    return group ? w : half_value(half_bits(w));
}

static __device__ __forceinline__ float clamp(float x, float low, float high)
{
    return fminf(high, fmaxf(low, x));
}

/* A warp has one row, or one group of a row: see ops.h. */
GLM_TILE_KERNEL(256, 2)
k_quantize(unsigned char *data, unsigned short *scales, int dtype, int group, const void *inp,
           int inp_dtype, int rows, int cols)
{
    const int width = group ? group : cols, per_row = (cols + width - 1) / width;
    const int lane = threadIdx.x & 31;
    const size_t warp = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    if (warp >= (size_t)rows * per_row)
        return;
    const int begin = (int)(warp % per_row) * width, n = min(cols - begin, width);
    const size_t at = warp / per_row * cols + begin;
    const float high = dtype == GLM_I8 ? 127.0f : 7.0f, low = group ? -8.0f : -high;
    float top = 0;
    int finite = 1;
    for (int i = lane; i < n; i += 32) {
        const float w = element_of(inp, inp_dtype, at + i, group);
        finite = finite && w - w == 0;
        top = fmaxf(top, fabsf(w));
    }
    top = warp_max(top);
    finite = warp_min(finite);
    float scale = GLM_INFINITY;
    if (finite && !group)
        scale = top / high;
    if (finite && group) {
        int where = n;
        for (int i = lane; i < n; i += 32)
            if (fabsf(load1(inp, inp_dtype, at + i)) == top)
                where = min(where, i);
        where = warp_min(where);
        const float peak = load1(inp, inp_dtype, at + where);
        float most = 0;
        scale = 0;
#pragma unroll 1
        for (int j = -9; top != 0 && j <= 9; j++) {
            const float inverse = (8.0f + 0.1f * (float)j) / -peak;
            float wq = 0, qq = 0;
            for (int i = lane; i < n; i += 32) {
                const float w = load1(inp, inp_dtype, at + i);
                const float q = clamp(rintf(w * inverse), -8, 7);
                wq += w * q;
                qq += q * q;
            }
            wq = warp_sum(wq);
            qq = warp_sum(qq);
            if (wq * wq / qq > most) {
                most = wq * wq / qq;
                scale = wq / qq;
            }
        }
    }
    scale = half_value(half_bits(scale));
    if (lane == 0)
        scales[warp] = (unsigned short)half_bits(scale);
    const int step = dtype == GLM_I4 ? 2 : 1, none = scale == 0 || !(scale - scale == 0);
    for (int i = step * lane; i < n; i += 32 * step) {
        int q[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (j < step && !none) {
                const float x = element_of(inp, inp_dtype, at + i + j, group) / scale;
                q[j] = (int)clamp(rintf(group ? x : half_value(half_bits(x))), low, high);
            }
        if (dtype == GLM_I8)
            data[at + i] = (unsigned char)q[0];
        else
            data[(at + i) / 2] = (unsigned char)((q[0] & 15) << 4 | (q[1] & 15));
    }
}

#ifdef GLM_HOST
static int blas_type(enum glm_dtype dtype)
{
    return dtype == GLM_F16 ? BLAS_R_16F : dtype == GLM_BF16 ? BLAS_R_16BF : BLAS_R_32F;
}

/* `rows` rows of W from `first` on in a float dtype: in place, or widened into scratch for the
 * `most` that come at a time. */
static const void *widened(struct cuda *cuda, const struct glm_mat *W, enum glm_dtype type,
                           int first, int rows, int most)
{
    if (W->dtype == type)
        return (const char *)W->data + glm_bytes(type, (size_t)first * W->cols);
    void *to = glm_cuda_scratch(cuda, SCRATCH_WEIGHT, glm_bytes(type, (size_t)most * W->cols));
    const int blocks = (int)ceil_div((size_t)W->cols, 2048);
    if (to)
        GLM_LAUNCH(cuda, "weights", k_widen, ceil_div((size_t)rows, WIDENED) * blocks, 256, 0, to,
                   (int)type, matrix_of(W), first, rows, blocks);
    return to;
}

const float *glm_cuda_factor(struct cuda *cuda, const void *x, size_t n, enum glm_dtype type,
                             int exponent, double scale)
{
    struct glm_small *small = cuda->small;
    const size_t runs = ceil_div(n, 8192), blocks = runs < 512 ? runs : 512;
    if (type != GLM_F16)
        return NULL;
    GLM_LAUNCH(cuda, "gradient", k_largest, blocks, 256, 0, small->largest, (const float *)x, n);
    return glm_cuda_factor_of(cuda, (int)blocks, exponent, scale);
}

const float *glm_cuda_factor_of(struct cuda *cuda, int n, int exponent, double scale)
{
    struct glm_small *small = cuda->small;
    GLM_LAUNCH(cuda, "gradient", k_factor, 1, 256, 0, &small->factor, &small->alpha,
               (const float *)small->largest, n, exponent, (float)scale);
    return &small->factor;
}

const void *glm_cuda_operand(struct cuda *cuda, enum glm_scratch which, const void *x, size_t n,
                             enum glm_dtype type, const float *factor)
{
    if (type == GLM_F32)
        return x;
    void *to = glm_cuda_scratch(cuda, which, glm_bytes(type, n));
    if (to)
        GLM_LAUNCH(cuda, "operand", k_convert, ceil_div(n, 2048), 256, 0, to, (int)type, x,
                   (int)GLM_F32, n, factor);
    return to;
}

/* Column-major C (m, n) = alpha op(A) op(B) + beta C, C float or as `to` says. */
static void product_to(struct cuda *cuda, int ta, int tb, int m, int n, int k, double alpha,
                       int on_device, const void *A, int lda, const void *B, int ldb,
                       enum glm_dtype type, int beta, void *C, int ldc, enum glm_dtype to)
{
    const float a = (float)alpha, b = (float)beta;
    const struct glm_small *small = cuda->small;
    const struct glm_blas *blas = &cuda->blas;
    int status = 0;
    if (on_device)
        status = blas->set_pointer_mode(blas->handle, BLAS_DEVICE);
    if (!status)
        status =
            blas->gemm(blas->handle, ta, tb, m, n, k, on_device ? (const void *)&small->alpha : &a,
                       A, blas_type(type), lda, B, blas_type(type), ldb,
                       on_device ? (const void *)(beta ? &small->one : &small->zero) : &b, C,
                       blas_type(to), ldc, BLAS_COMPUTE_32F, BLAS_DEFAULT);
    if (on_device) {
        const int back = blas->set_pointer_mode(blas->handle, BLAS_HOST);
        status = status ? status : back;
    }
    glm_cuda_multiplied(cuda, status, m, n, k);
}

static void product(struct cuda *cuda, int ta, int tb, int m, int n, int k, double alpha,
                    int on_device, const void *A, int lda, const void *B, int ldb,
                    enum glm_dtype type, int beta, void *C, int ldc)
{
    product_to(cuda, ta, tb, m, n, k, alpha, on_device, A, lda, B, ldb, type, beta, C, ldc,
               GLM_F32);
}

/* As all that the model has. */
static int on_grid(const void *p) { return (size_t)p % 16 == 0; }

static void put_bias(struct cuda *cuda, void *out, const void *bias, int N, int O, int accumulate)
{
    const int blocks = (int)ceil_div((size_t)O, 1024);
    if (bias)
        GLM_LAUNCH(cuda, "linear_forward", k_bias, (size_t)N * blocks, 256, 0, (float *)out,
                   (const float *)bias, O, blocks, accumulate);
}

/* out (N, O) of a type = scale * x W^T (+ out) of an operand, some rows of W at a time; 0 after an
 * error */
static int multiplied(struct cuda *cuda, void *out, enum glm_dtype to, const void *x,
                      const struct glm_mat *W, enum glm_dtype type, int N, double scale,
                      int accumulate)
{
    const int O = W->rows, I = W->cols, rows = glm_forward_rows(cuda->piece, W, type);
    for (int o = 0; o < O; o += rows) {
        const int count = O - o < rows ? O - o : rows;
        const void *w = widened(cuda, W, type, o, count, rows);
        if (!w)
            return 0;
        product_to(cuda, BLAS_T, BLAS_N, count, N, I, scale, 0, w, I, x, I, type, accumulate,
                   (char *)out + stored_bytes(to, (size_t)o), O, to);
    }
    return 1;
}

int glm_cuda_product(struct cuda *cuda, void *out, enum glm_dtype to, const void *x,
                     const struct glm_mat *W, const void *bias, enum glm_dtype type, int N)
{
    put_bias(cuda, out, bias, N, W->rows, 0);
    return multiplied(cuda, out, to, x, W, type, N, 1, bias != NULL);
}

extern "C" void glm_cuda_linear_forward(void *cx, void *out, const void *inp,
                                        const struct glm_mat *weight, const void *bias, int N,
                                        double scale, int accumulate)
{
    struct cuda *cuda = cuda_of(cx);
    const int O = weight->rows, I = weight->cols;
    if (!N || !glm_cuda_begin(cuda))
        return;
    if (is_few(cuda, weight, N)) {
        few_rows a = {(float *)out, (const float *)inp, (const float *)bias};
        a.N = N, a.scale = (float)scale, a.accumulate = accumulate;
        glm_cuda_few(cuda, "linear_forward", a, weight);
        return;
    }
    if (glm_is_adapter(weight->dtype, O, I)) {
        glm_cuda_thin(cuda, "linear_forward", out, inp, GLM_F32, weight, bias, N, scale, accumulate,
                      0, NULL);
        return;
    }
    const enum glm_dtype type = glm_product_type(cuda->compute, weight->dtype, O, I);
    const int tokens = glm_piece_rows(cuda->piece, N, type == GLM_F32 ? 0 : (size_t)I);
    put_bias(cuda, out, bias, N, O, accumulate);
    for (int n = 0; n < N; n += tokens) {
        const int some = N - n < tokens ? N - n : tokens;
        const void *x = glm_cuda_operand(cuda, SCRATCH_A, (const float *)inp + (size_t)n * I,
                                         (size_t)some * I, type, NULL);
        if (!x || !multiplied(cuda, (float *)out + (size_t)n * O, GLM_F32, x, weight, type, some,
                              scale, bias || accumulate))
            return;
    }
}

extern "C" void glm_cuda_swiglu_linear_forward(void *cx, void *out, void *act, const void *h,
                                               const struct glm_mat *weight, const void *bias,
                                               int N)
{
    struct cuda *cuda = cuda_of(cx);
    const int O = weight->rows, F = weight->cols;
    const enum glm_dtype type = glm_product_type(cuda->compute, weight->dtype, O, F);
    if (!N || is_few(cuda, weight, N) || !glm_swiglu_narrows(type, F) || !on_grid(act)) {
        glm_cuda_swiglu_forward(cx, act, h, N, F);
        glm_cuda_linear_forward(cx, out, act, weight, bias, N, 1, 0);
    } else if (glm_cuda_begin(cuda)) {
        put_bias(cuda, out, bias, N, O, 0);
        glm_cuda_swiglu_narrow(cuda, "swiglu_linear_forward", act, type, h, GLM_F32, N, F);
        multiplied(cuda, out, GLM_F32, act, weight, type, N, 1, bias != NULL);
    }
}

/* dinp (N, I) = dh W (+ dinp) of gradients in 16 bits with `stride` elements from row to row */
static void multiplied_back(struct cuda *cuda, void *dinp, const void *dh, int stride,
                            const struct glm_mat *W, enum glm_dtype type, int N, int scaled,
                            int accumulate)
{
    const int O = W->rows, I = W->cols, rows = glm_forward_rows(cuda->piece, W, type);
    for (int o = 0; o < O; o += rows) {
        const int count = O - o < rows ? O - o : rows;
        const void *w = widened(cuda, W, type, o, count, rows);
        if (!w)
            return;
        product(cuda, BLAS_N, BLAS_N, I, N, count, 1, scaled, w, I, (const unsigned short *)dh + o,
                stride, type, accumulate || o, dinp, I);
    }
}

void glm_cuda_product_back(struct cuda *cuda, void *dinp, const void *d, const struct glm_mat *W,
                           enum glm_dtype type, int N, int accumulate)
{
    multiplied_back(cuda, dinp, d, W->rows, W, type, N, 0, accumulate);
}

extern "C" void glm_cuda_swiglu_linear_backward(void *cx, void *dinp, const void *dact, void *h,
                                                const struct glm_mat *weight, int N)
{
    struct cuda *cuda = cuda_of(cx);
    const int O = weight->rows, I = weight->cols, F = O / 2;
    const enum glm_dtype type = glm_product_type(cuda->compute, weight->dtype, O, I);
    if (!N || !glm_swiglu_backward_narrows(type, F) || !on_grid(h)) {
        glm_cuda_swiglu_backward(cx, h, dact, h, N, F);
        glm_cuda_linear_backward_input(cx, dinp, h, weight, N, 1, 0);
    } else if (glm_cuda_begin(cuda)) {
        const float *factor = glm_cuda_swiglu_backward_narrow(cuda, h, type, dact, N, F);
        multiplied_back(cuda, dinp, h, 2 * O, weight, type, N, factor != NULL, 0);
    }
}

extern "C" void glm_cuda_swiglu_mlp_forward(void *cx, void *out, void *rstd, void *sum, void *work,
                                            void *h, const void *b, const void *weight,
                                            const struct glm_mat *up, const struct glm_mat *down,
                                            const void *bias, int N, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    const enum glm_dtype type = glm_mlp_type(cuda->compute, up, down, N);
    if (type == GLM_F32) {
        glm_cuda_add_rmsnorm_forward(cx, work, rstd, sum, sum, b, weight, N, up->cols, eps);
        glm_cuda_linear_forward(cx, h, work, up, NULL, N, 1, 0);
        if (out)
            glm_cuda_swiglu_linear_forward(cx, out, work, h, down, bias, N);
    } else if (glm_cuda_begin(cuda)) {
        glm_cuda_add_rmsnorm_narrow(cuda, "swiglu_mlp_forward", work, type, rstd, sum, b, weight, N,
                                    up->cols, eps);
        if (!multiplied(cuda, h, type, work, up, type, N, 1, 0) || !out)
            return;
        put_bias(cuda, out, bias, N, down->rows, 0);
        glm_cuda_swiglu_narrow(cuda, "swiglu_mlp_forward", work, type, h, type, N, down->cols);
        multiplied(cuda, out, GLM_F32, work, down, type, N, 1, bias != NULL);
    }
}

extern "C" void glm_cuda_adapted_forward(void *cx, void *out, const void *inp,
                                         const struct glm_mat *weight, const void *bias,
                                         const void *xa, const struct glm_mat *B, int N,
                                         double scale)
{
    struct cuda *cuda = cuda_of(cx);
    if (!is_few(cuda, weight, N)) {
        const int first = glm_is_adapter(B->dtype, B->rows, B->cols); /* with the bias, in a pass */
        if (first)
            glm_cuda_linear_forward(cx, out, xa, B, bias, N, scale, 0);
        glm_cuda_linear_forward(cx, out, inp, weight, first ? NULL : bias, N, 1, first);
        if (!first)
            glm_cuda_linear_forward(cx, out, xa, B, NULL, N, scale, 1);
    } else if (N && glm_cuda_begin(cuda)) {
        few_rows a = {(float *)out, (const float *)inp, (const float *)bias};
        a.N = N, a.scale = 1, a.added = (float)scale;
        a.xa = (const float *)xa, a.B = (const float *)B->data, a.R = B->cols;
        glm_cuda_few(cuda, "adapted_forward", a, weight);
    }
}

/* dinp of a type; in 16 bits of all rows of the weight at once, or their sum would be rounded */
void glm_cuda_input_gradient(struct cuda *cuda, void *dinp, enum glm_dtype to, const void *dout,
                             const struct glm_mat *weight, int N, double scale, int accumulate)
{
    const int O = weight->rows, I = weight->cols;
    const enum glm_dtype type = glm_product_type(cuda->compute, weight->dtype, O, I);
    const int rows = glm_backward_rows(cuda->piece, weight, type, N), narrow = type != GLM_F32;
    const float *factor = glm_cuda_factor(cuda, dout, (size_t)N * O, type, 13, scale);
    void *d = narrow ? glm_cuda_scratch(cuda, SCRATCH_A, glm_bytes(type, (size_t)N * rows)) : NULL;
    for (int o = 0; (d || !narrow) && o < O; o += rows) {
        const int count = O - o < rows ? O - o : rows, blocks = (int)ceil_div((size_t)count, 2048);
        const void *w = widened(cuda, weight, type, o, count, rows);
        if (!w)
            return;
        if (narrow)
            GLM_LAUNCH(cuda, "operand", k_columns, (size_t)N * blocks, 256, 0, d, (int)type,
                       (const float *)dout, O, o, count, blocks, factor);
        product_to(cuda, BLAS_N, BLAS_N, I, N, count, scale, factor != NULL, w, I,
                   narrow ? d : (const float *)dout + o, narrow ? count : O, type, accumulate || o,
                   dinp, I, to);
    }
}

extern "C" void glm_cuda_linear_backward_input(void *cx, void *dinp, const void *dout,
                                               const struct glm_mat *weight, int N, double scale,
                                               int accumulate)
{
    struct cuda *cuda = cuda_of(cx);
    if (!N || !glm_cuda_begin(cuda))
        return;
    if (glm_is_adapter(weight->dtype, weight->rows, weight->cols))
        glm_cuda_thin(cuda, "linear_backward_input", dinp, dout, GLM_F32, weight, NULL, N, scale,
                      accumulate, 1, NULL);
    else
        glm_cuda_input_gradient(cuda, dinp, GLM_F32, dout, weight, N, scale, accumulate);
}

/* The activation's gradient is bfloat16 where its products are; float16 has no room for what was not
 * scaled to it. */
extern "C" void glm_cuda_swiglu_mlp_backward(void *cx, void *dinp, void *h, const void *dout,
                                             const struct glm_mat *up, const struct glm_mat *down,
                                             int N)
{
    struct cuda *cuda = cuda_of(cx);
    const int O = down->rows, F = down->cols;
    const enum glm_dtype type = glm_mlp_type(cuda->compute, up, down, N);
    if (type == GLM_F32) {
        glm_cuda_linear_backward_input(cx, dinp, dout, down, N, 1, 0);
        glm_cuda_swiglu_linear_backward(cx, dinp, dinp, h, up, N);
    } else if (glm_cuda_begin(cuda)) {
        const int whole = glm_backward_rows(cuda->piece, down, type, N) >= O;
        const enum glm_dtype to = type == GLM_BF16 && whole ? type : GLM_F32;
        glm_cuda_input_gradient(cuda, dinp, to, dout, down, N, 1, 0);
        const float *factor = glm_cuda_swiglu_backward_16(cuda, h, type, dinp, to, N, F);
        multiplied_back(cuda, dinp, h, 2 * F, up, type, N, factor != NULL, 0);
    }
}

extern "C" void glm_cuda_linear_backward_weight(void *cx, void *dweight, void *dbias,
                                                const void *dout, const void *inp, int N, int O,
                                                int I, double scale)
{
    struct cuda *cuda = cuda_of(cx);
    if (!N || !glm_cuda_begin(cuda))
        return;
    if (dweight && glm_is_adapter(GLM_F32, O, I)) {
        glm_cuda_thin_gradient(cuda, "linear_backward_weight", dweight, dout, inp, N, O, I, scale);
    } else if (dweight) {
        const enum glm_dtype type = glm_product_type(cuda->compute, GLM_F32, O, I);
        const float *factor = glm_cuda_factor(cuda, dout, (size_t)N * O, type, 13, scale);
        const void *d = glm_cuda_operand(cuda, SCRATCH_A, dout, (size_t)N * O, type, factor);
        const void *x = glm_cuda_operand(cuda, SCRATCH_B, inp, (size_t)N * I, type, NULL);
        if (d && x)
            product(cuda, BLAS_N, BLAS_T, I, O, N, scale, factor != NULL, x, I, d, O, type, 1,
                    dweight, I);
    }
    if (dbias)
        GLM_LAUNCH(cuda, "linear_backward_weight", k_column_sum, ceil_div((size_t)O, 32), 256, 0,
                   (float *)dbias, (const float *)dout, N, O, (float)scale);
}

extern "C" void glm_cuda_merge(void *cx, void *data, enum glm_dtype dtype, const void *B,
                               const void *A, const void *magnitude, const void *rnorm, int O,
                               int I, int R, double scale)
{
    struct cuda *cuda = cuda_of(cx);
    const int blocks = (int)ceil_div((size_t)I, 1024);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "merge", k_merge, (size_t)O * blocks, 256, 0, data, (int)dtype,
                   (const float *)B, (const float *)A, (const float *)magnitude,
                   (const float *)rnorm, I, R, (float)scale, blocks);
}

extern "C" void glm_cuda_convert(void *cx, void *out, enum glm_dtype out_dtype, const void *inp,
                                 enum glm_dtype inp_dtype, size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_cuda_begin(cuda))
        return;
    if (out_dtype == GLM_F64 || inp_dtype == GLM_F64)
        GLM_LAUNCH(cuda, "convert", k_convert_double, ceil_div(n, 256), 256, 0, out, (int)out_dtype,
                   inp, (int)inp_dtype, n);
    else
        GLM_LAUNCH(cuda, "convert", k_convert, ceil_div(n, 2048), 256, 0, out, (int)out_dtype, inp,
                   (int)inp_dtype, n, (const float *)NULL);
}

extern "C" void glm_cuda_quantize(void *cx, void *data, uint16_t *scale, enum glm_dtype dtype,
                                  int group, const void *inp, enum glm_dtype inp_dtype, int rows,
                                  int cols)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t warps = (size_t)rows * (group ? ceil_div((size_t)cols, (size_t)group) : 1);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "quantize", k_quantize, ceil_div(warps, 8), 256, 0, (unsigned char *)data,
                   scale, (int)dtype, group, inp, (int)inp_dtype, rows, cols);
}
#endif
