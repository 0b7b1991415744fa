/* ---- linear_forward: both operands are contiguous along the reduction, so vectors run along it.
 *
 * An output is a sum of blocks of NT_BLOCK features. In a block, lane l adds up every VL-th
 * product, then the lanes are summed: the same order whether W is read where it lies (up to XR
 * rows, at the speed of the memory) or packed into panels (more rows). */

enum {
    XR = VL == 16 ? 6 : 3,
    STEP = 2 * VL,
    PACKED_X = L1_ROWS * NT_BLOCK > XR *NT_WIDTH ? L1_ROWS *NT_BLOCK : XR *NT_WIDTH
};

/* Columns k .. k + STEP - 1 of a row of W, as integers where it is quantized. Of 4-bit columns the
 * even ones come first, then the odd ones; x is packed to match. */
INLINE void load_step(vf v[2], const char *row, enum glm_dtype dtype, int k)
{
    if (dtype == GLM_I4) {
        const vi both = BYTES_TO_INT(row + k / 2);
        v[0] = INT_TO_FLOAT(both >> 4);
        v[1] = INT_TO_FLOAT(both << 28 >> 28);
    } else if (dtype == GLM_I8) {
        v[0] = INT_TO_FLOAT(BYTES_TO_INT(row + k));
        v[1] = INT_TO_FLOAT(BYTES_TO_INT(row + k + VL));
    } else {
        v[0] = load_as(row, dtype, (size_t)k);
        v[1] = load_as(row, dtype, (size_t)k + VL);
    }
}

/* The same for the last columns of a row: zeros follow. */
INLINE void load_last(vf v[2], const char *row, enum glm_dtype dtype, int k, int n)
{
    float x[STEP] = {0};
    for (int i = 0; i < n; i++)
        x[dtype == GLM_I4 ? i / 2 + i % 2 * VL : i] = load_one(row, dtype, (size_t)k + i);
    v[0] = load(x);
    v[1] = load(x + VL);
}

/* Rows of x for dot_panel and dot_rows: vector by vector, R of them; rows and features past the end
 * are 0. */
INLINE void pack_x(float *to, int R, const float *x, size_t ldx, int rows, int K,
                   enum glm_dtype dtype)
{
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k += STEP) {
            const float *from = x + r * ldx + k;
            float *at = to + ((size_t)k / VL * R + r) * VL;
            const int n = r >= rows ? 0 : K - k < STEP ? K - k : STEP;
            vf v[2];
            __builtin_prefetch(from + ldx); /* the next row: too far for the hardware to guess */
            if (n == STEP) {
                v[0] = load(from);
                v[1] = load(from + VL);
            } else {
                v[0] = load_part(from, n < VL ? n : VL);
                v[1] = load_part(from + VL, n < VL ? 0 : n - VL);
            }
            if (dtype == GLM_I4) {
                const vf a = v[0], b = v[1];
                v[0] = EVEN(a, b);
                v[1] = ODD(a, b);
            }
            store(at, v[0]);
            store(at + R * VL, v[1]);
        }
}

/* The float values of `group` columns' scales from column k of a row on; 1 where there is one scale
 * for the row, which multiplies the sum. */
INLINE float scale_at(const struct glm_mat *w, int row, int k)
{
    if (!w->group)
        return 1.0f;
    return half_to_float(w->scale[(size_t)row * glm_scale_cols(w) + k / w->group]);
}

/* Four rows of W from row o on, columns k0 .. k0 + K - 1: vector by vector, four of them; rows past
 * the end are 0. */
INLINE void pack_w(float *to, const struct glm_mat *w, enum glm_dtype dtype, int grouped, int o,
                   int rows, int k0, int K)
{
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    for (int c = 0; c < 4; c++) {
        const char *row = (const char *)w->data + (size_t)(o + c) * stride;
        float scale = 1.0f;
        int k = 0;
        for (; c < rows && k < K; k += STEP) {
            vf v[2];
            float *at = to + ((size_t)k / VL * 4 + c) * VL;
            __builtin_prefetch(row + stride + glm_bytes(dtype, (size_t)(k0 + k)));
            if (__builtin_expect(K - k >= STEP, 1))
                load_step(v, row, dtype, k0 + k);
            else
                load_last(v, row, dtype, k0 + k, K - k);
            if (grouped) {
                if ((k0 + k) % w->group == 0 || k == 0)
                    scale = scale_at(w, o + c, k0 + k);
                v[0] *= splat(scale);
                v[1] *= splat(scale);
            }
            store(at, v[0]);
            store(at + 4 * VL, v[1]);
        }
        for (; k < K; k += VL)
            store(to + ((size_t)k / VL * 4 + c) * VL, (vf){0});
    }
}

/* s[r][c] = dot product of row r of packed x with row c of packed w, `vectors` vectors long */
INLINE void dot_panel(v4 *s, const float *x, const float *w, int vectors)
{
    vf acc[XR][4];
    for (int r = 0; r < XR; r++)
        for (int c = 0; c < 4; c++)
            acc[r][c] = (vf){0};
    for (int k = 0; k < vectors; k++, x += XR * VL, w += 4 * VL) {
        vf xv[XR];
        for (int r = 0; r < XR; r++)
            xv[r] = load(x + r * VL);
        for (int c = 0; c < 4; c++) {
            const vf wv = load(w + c * VL);
            for (int r = 0; r < XR; r++)
                acc[r][c] = MADD(xv[r], wv, acc[r][c]);
        }
    }
    for (int r = 0; r < XR; r++)
        s[r] = SUM4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* Four rows of W where they lie, eight for a single row of x: enough sums in flight. */
INLINE int rows_in_place(int R) { return R == 1 ? 8 : 4; }

/* acc[r][c] += products of STEP features of row r of x with two vectors of a row of W */
INLINE void add_step(vf acc[XR][8], int R, int c, const float *x, const vf v[2])
{
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
            acc[r][c] = MADD(load(x + (h * R + r) * VL), v[h], acc[r][c]);
}

/* The same with C = rows_in_place(R) rows of W from row o on, columns k0 .. k0 + K - 1; s has C / 4
 * vectors for each row of x. Where W ends its last row repeats. */
INLINE void dot_rows(v4 *s, int R, const float *x, const struct glm_mat *w, enum glm_dtype dtype,
                     int grouped, int o, int k0, int K)
{
    const int C = rows_in_place(R);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *row[8];
    float scale[8][NT_BLOCK / 32];
    vf acc[XR][8], v[2];
    int k = 0;
    for (int c = 0; c < C; c++) {
        const int at = o + c < w->rows ? o + c : w->rows - 1;
        row[c] = (const char *)w->data + (size_t)at * stride;
        if (grouped && w->group == 32)
            load_row(scale[c], w->scale + (size_t)at * glm_scale_cols(w) + k0 / 32, GLM_F16,
                     (K + 31) / 32);
        for (int g = 0; grouped && w->group != 32 && g * 32 < K; g++)
            scale[c][g] = scale_at(w, at, k0 + g * 32);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            acc[r][c] = (vf){0};
    for (; k + STEP <= K; k += STEP, x += 2 * R * VL)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_step(v, row[c], dtype, k0 + k);
            if (grouped) {
                v[0] *= splat(scale[c][k / 32]);
                v[1] *= splat(scale[c][k / 32]);
            }
            add_step(acc, R, c, x, v);
        }
    if (k < K)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_last(v, row[c], dtype, k0 + k, K - k);
            if (grouped) {
                v[0] *= splat(scale[c][k / 32]);
                v[1] *= splat(scale[c][k / 32]);
            }
            add_step(acc, R, c, x, v);
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c += 4)
            s[(r * C + c) / 4] = SUM4(acc[r][c], acc[r][c + 1], acc[r][c + 2], acc[r][c + 3]);
}

/* tile (rows, NT_COLS) of up to R rows, W read in place */
INLINE void tile_in_place(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped,
                          int R, int n0, int rows, int o0, int cols, float *xp)
{
    const int I = a->w->cols, C = rows_in_place(R);
    for (int begin = 0; begin < I; begin += NT_WIDTH) {
        const int width = I - begin < NT_WIDTH ? I - begin : NT_WIDTH;
        pack_x(xp, R, a->inp + (size_t)n0 * I + begin, (size_t)I, rows, width, dtype);
        for (int o = 0; o < cols; o += C)
            for (int k = 0; k < width; k += NT_BLOCK) {
                v4 s[XR];
                dot_rows(s, R, xp + (size_t)k * R, a->w, dtype, grouped, o0 + o, begin + k,
                         width - k < NT_BLOCK ? width - k : NT_BLOCK);
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < C; c += 4)
                        *(v4 *)(tile + r * NT_COLS + o + c) += s[(r * C + c) / 4];
            }
    }
}

/* tile (rows, NT_COLS) of many rows: W packed once, x so many rows at a time as L1 holds */
INLINE void tile_packed(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped,
                        int n0, int rows, int o0, int cols, float *xp, float *wp)
{
    const int I = a->w->cols;
    for (int begin = 0; begin < I; begin += NT_BLOCK) {
        const int K = I - begin < NT_BLOCK ? I - begin : NT_BLOCK;
        const int vectors = (K + STEP - 1) / STEP * 2;
        for (int o = 0; o < cols; o += 4)
            pack_w(wp + (size_t)o * NT_BLOCK, a->w, dtype, grouped, o0 + o, cols - o, begin, K);
        for (int m = 0; m < rows; m += L1_ROWS) {
            const int end = rows - m < L1_ROWS ? rows - m : L1_ROWS;
            for (int n = 0; n < end; n += XR)
                pack_x(xp + (size_t)n * NT_BLOCK, XR, a->inp + (size_t)(n0 + m + n) * I + begin,
                       (size_t)I, end - n, K, dtype);
            for (int o = 0; o < cols; o += 4)
                for (int n = 0; n < end; n += XR) {
                    v4 s[XR];
                    dot_panel(s, xp + (size_t)n * NT_BLOCK, wp + (size_t)o * NT_BLOCK, vectors);
                    for (int r = 0; r < XR; r++)
                        *(v4 *)(tile + (m + n + r) * NT_COLS + o) += s[r];
                }
        }
    }
}

INLINE void nt_tile(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped, int n0,
                    int rows, int o0, int cols)
{
    float *xp = tile + NT_ROWS * NT_COLS, *wp = xp + PACKED_X;
    if (rows == 1)
        tile_in_place(tile, a, dtype, grouped, 1, n0, rows, o0, cols, xp);
    else if (rows <= XR)
        tile_in_place(tile, a, dtype, grouped, XR, n0, rows, o0, cols, xp);
    else
        tile_packed(tile, a, dtype, grouped, n0, rows, o0, cols, xp, wp);
}

static void nt_task(const void *arg, int task, char *scratch)
{
    const struct nt_args *a = arg;
    const struct glm_mat *w = a->w;
    const int O = w->rows, o_tiles = (O + NT_COLS - 1) / NT_COLS;
    const int n0 = task / o_tiles * a->rows, o0 = task % o_tiles * NT_COLS;
    const int rows = a->N - n0 < a->rows ? a->N - n0 : a->rows,
              cols = O - o0 < NT_COLS ? O - o0 : NT_COLS;
    float *tile = (float *)scratch;
    memset(tile, 0, (size_t)NT_COLS * 4 * (size_t)((rows + XR - 1) / XR * XR));
    if (w->dtype == GLM_F32)
        nt_tile(tile, a, GLM_F32, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_F16)
        nt_tile(tile, a, GLM_F16, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_BF16)
        nt_tile(tile, a, GLM_BF16, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_I8)
        nt_tile(tile, a, GLM_I8, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_I4 && w->group)
        nt_tile(tile, a, GLM_I4, 1, n0, rows, o0, cols);
    else if (w->dtype == GLM_I4)
        nt_tile(tile, a, GLM_I4, 0, n0, rows, o0, cols);
    else
        nt_tile(tile, a, GLM_F64, 0, n0, rows, o0, cols);
    for (int o = 0; w->scale && !w->group && o < cols; o++) {
        const float scale = half_to_float(w->scale[o0 + o]);
        for (int n = 0; n < rows; n++)
            tile[n * NT_COLS + o] *= scale;
    }
    for (int n = 0; n < rows; n++) {
        float *out = a->out + (size_t)(n0 + n) * O + o0;
        for (int o = 0; o < cols; o++) {
            float v = a->scale * tile[n * NT_COLS + o];
            if (a->bias)
                v += a->bias[o0 + o];
            out[o] = a->accumulate ? out[o] + v : v;
        }
    }
}

/* ---- the backward products: rank-1 updates over packed panels, vectors run along the output */

enum { MR = VL == 16 ? 12 : VL == 8 ? 6 : 4, NV = 2, NR = NV * VL };

/* acc (MR, NR) += a[m * am] * b[n] */
INLINE void add_outer(vf acc[MR][NV], const float *a, size_t am, const float *b)
{
    vf bv[NV];
    for (int v = 0; v < NV; v++)
        bv[v] = load(b + v * VL);
    for (int m = 0; m < MR; m++) {
        const vf av = splat(a[m * am]);
        for (int v = 0; v < NV; v++)
            acc[m][v] = MADD(av, bv[v], acc[m][v]);
    }
}

/* tile (MR, NR; ldt) += sum over k < K of a(m, k) * b[k * ldb + n], where a(m, k) =
 * a[m * am + k % 4 * ak + k / 4 * quad] */
INLINE void rank1_tile(float *tile, size_t ldt, const float *a, size_t am, size_t ak, size_t quad,
                       const float *b, size_t ldb, int K)
{
    vf acc[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            acc[m][v] = load(tile + m * ldt + v * VL);
    int k = 0;
    for (; k + 4 <= K; k += 4, a += quad, b += 4 * ldb)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            add_outer(acc, a + i * ak, am, b + i * ldb);
    for (; k < K; k++, a += ak, b += ldb)
        add_outer(acc, a, am, b);
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            store(tile + m * ldt + v * VL, acc[m][v]);
}

/* Rows of A for rank1_tile, quads of k together: (K / 4, MR, 4); rows and k past the end are 0. */
INLINE void pack_a(float *to, const float *from, size_t am, size_t ak, int rows, int K)
{
    for (int r = 0; r < MR; r++)
        for (int k = 0; k < K; k += 4) {
            v4 v = {0};
            const float *at = from + r * am + k * ak;
            const int n = r >= rows ? 0 : K - k < 4 ? K - k : 4;
            if (n == 4 && ak == 1)
                v = *(const v4 *)at;
            else
                for (int i = 0; i < n; i++)
                    v[i] = at[i * ak];
            *(v4 *)(to + k * MR + r * 4) = v;
        }
}

/* Rows k0 .. k0 + K - 1, columns n0 .. n0 + cols - 1 of B as (K, NR) panels; columns past the end
 * are 0. */
INLINE void pack_b(float *bp, const struct glm_mat *b, enum glm_dtype dtype, int k0, int K, int n0,
                   int cols)
{
    const size_t stride = glm_bytes(dtype, (size_t)b->cols);
    for (int k = 0; k < K; k++) {
        const char *row = (const char *)b->data + (size_t)(k0 + k) * stride;
        float scale = 1.0f;
        if (b->scale && !b->group)
            scale = half_to_float(b->scale[k0 + k]);
        for (int n = 0; n < cols; n += NR) {
            vf v[NV];
            __builtin_prefetch(row + stride + glm_bytes(dtype, (size_t)(n0 + n)));
            if (n + NR <= cols)
                load_step(v, row, dtype, n0 + n);
            else
                load_last(v, row, dtype, n0 + n, cols - n);
            if (dtype == GLM_I4) {
                const vf even = v[0], odd = v[1];
                v[0] = LOW(even, odd);
                v[1] = HIGH(even, odd);
                if (b->group && ((n0 + n) % b->group == 0 || n == 0))
                    scale = scale_at(b, k0 + k, n0 + n);
            }
            float *to = bp + (size_t)n * GEMM_BLOCK + k * NR;
            for (int h = 0; h < NV; h++)
                store(to + h * VL, glm_is_quantized(dtype) ? v[h] * splat(scale) : v[h]);
        }
    }
}

INLINE void pack_b_as(float *bp, const struct glm_mat *b, int k0, int K, int n0, int cols)
{
    switch (b->dtype) {
    case GLM_F32:
        pack_b(bp, b, GLM_F32, k0, K, n0, cols);
        break;
    case GLM_F16:
        pack_b(bp, b, GLM_F16, k0, K, n0, cols);
        break;
    case GLM_BF16:
        pack_b(bp, b, GLM_BF16, k0, K, n0, cols);
        break;
    case GLM_I8:
        pack_b(bp, b, GLM_I8, k0, K, n0, cols);
        break;
    case GLM_I4:
        pack_b(bp, b, GLM_I4, k0, K, n0, cols);
        break;
    default:
        pack_b(bp, b, GLM_F64, k0, K, n0, cols);
    }
}

static void gemm_task(const void *arg, int task, char *scratch)
{
    const struct gemm_args *g = arg;
    const int N = g->b->cols, n_tiles = (N + GEMM_COLS - 1) / GEMM_COLS;
    const int m0 = task / n_tiles * g->rows, n0 = task % n_tiles * GEMM_COLS;
    const int rows = g->M - m0 < g->rows ? g->M - m0 : g->rows,
              cols = N - n0 < GEMM_COLS ? N - n0 : GEMM_COLS;
    float *tile = (float *)scratch, *ap = tile + GEMM_ROWS * GEMM_COLS,
          *bp = ap + GEMM_ROWS * GEMM_BLOCK;
    memset(tile, 0, (size_t)GEMM_COLS * 4 * (size_t)((rows + MR - 1) / MR * MR));
    for (int k0 = 0; k0 < g->b->rows; k0 += GEMM_BLOCK) {
        const int K = g->b->rows - k0 < GEMM_BLOCK ? g->b->rows - k0 : GEMM_BLOCK;
        for (int m = 0; m < rows; m += MR)
            pack_a(ap + (size_t)m * GEMM_BLOCK,
                   g->a + (size_t)(m0 + m) * g->am + (size_t)k0 * g->ak, g->am, g->ak, rows - m, K);
        pack_b_as(bp, g->b, k0, K, n0, cols);
        for (int n = 0; n < cols; n += NR) /* a panel of B stays in L1 */
            for (int m = 0; m < rows; m += MR)
                rank1_tile(tile + m * GEMM_COLS + n, GEMM_COLS, ap + (size_t)m * GEMM_BLOCK, 4, 1,
                           4 * MR, bp + (size_t)n * GEMM_BLOCK, NR, K);
    }
    for (int m = 0; m < rows; m++) {
        float *c = g->c + (size_t)(m0 + m) * N + n0;
        for (int n = 0; n < cols; n++) {
            const float v = g->scale * tile[m * GEMM_COLS + n];
            c[n] = g->accumulate ? c[n] + v : v;
        }
    }
}
