/* Products of bytes (kind GLM_I8) of many rows, whose sums are columns: a lane adds up a column of W
 * (of B), four terms at a time, the unit. So no lanes are summed: linear_forward's where vectors are
 * long, and the backward products of every set. Integers: the bits are those of any other order.
 *
 * A row of x (of A) lies as it is, in runs of SHORT_RUN_BYTES; BR rows of a run lie together. */

/* Whether N rows are multiplied so in linear_forward: where sums of lanes cost more than W's being
 * turned, which few rows do not pay. The bits are the same. */
static int by_column(enum glm_dtype kind, enum glm_dtype dtype, int N)
{
    return kind == GLM_I8 && N > 4 * MR && (VL == 16 || (VL == 8 && dtype == GLM_I8));
}

/* the four bytes at p in every lane */
INLINE vf splat_unit(const float *p)
{
    int32_t bits;
    memcpy(&bits, p, 4);
    return (vf)((vi){0} + bits);
}

/* Tiles of bytes are registers that a task takes and gives back: BYTE_TILES(sums, x, w, units) is what
 * byte_tile adds up by them. */
#ifndef BYTE_TILES
#define START_TILES() (void)0
#define END_TILES() (void)0
#endif

enum { AHEAD = 16 };

/* BR rows of packed x from row m on, a multiple of BR, of run b */
INLINE const char *byte_rows(const void *x, int m, int b, int n_runs)
{
    return (const char *)x + ((size_t)m * n_runs + (size_t)b * BR) * SHORT_RUN_BYTES;
}

/* Adds a vector of sums at `at`: their part of a run of x, less what W's bytes are too large. */
INLINE void store_sums(float *at, vi sums, const struct x_run *run, int add, enum glm_dtype dtype)
{
    const vf sum = INT_TO_FLOAT(sums - bias_of(dtype) * run->sum) * splat(run->scale);
    store(at, add ? load(at) + sum : sum);
}

/* tile (BR, NR; ldt) (+)= the run's scale of x times the sum over `units` of those of x (BR,
 * SHORT_RUN_BYTES) times those of w (units, NR); run: of the first row, `runs` to the next. Of the
 * rows that come next, AHEAD bytes a unit are fetched from `next` on. */
#ifdef BYTE_TILES
INLINE void byte_tile(float *tile, size_t ldt, const char *x, const char *w, int units, int add,
                      enum glm_dtype dtype, const struct x_run *run, size_t runs, const char *next)
{
    int32_t sums[BR][NR] __attribute__((aligned(64)));
    for (int i = 0; i < AHEAD * units; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    BYTE_TILES(sums[0], x, w, units);
    for (int m = 0; m < BR; m++)
        for (int v = 0; v < NV; v++)
            store_sums(tile + m * ldt + v * VL, (vi)load((const float *)(sums[m] + v * VL)),
                       run + m * runs, add, dtype);
}
#else
static __attribute__((noinline)) void byte_tile(float *tile, size_t ldt, const char *x,
                                                const char *w, int units, int add,
                                                enum glm_dtype dtype, const struct x_run *run,
                                                size_t runs, const char *next)
{
    vf acc[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            acc[m][v] = (vf){0};
#ifdef DOT_I8_LANE
    for (int k = 0; k < units; k += 4, x += 16) {
        vf xv[MR];
        for (int m = 0; m < MR; m++)
            xv[m] = load((const float *)(x + m * SHORT_RUN_BYTES));
        __builtin_prefetch(next + k * AHEAD, 0, 2);
#pragma GCC unroll 4
        for (int lane = 0; lane < 4; lane++, w += NV * VB)
            for (int v = 0; v < NV; v++) {
                const vf wv = load((const float *)(w + v * VB));
                for (int m = 0; m < MR; m++)
                    acc[m][v] = DOT_I8_LANE(acc[m][v], wv, xv[m], lane);
            }
    }
#else
    for (int k = 0; k < units; k++, x += 4, w += NV * VB) {
        vf wv[NV];
        for (int v = 0; v < NV; v++)
            wv[v] = load((const float *)(w + v * VB));
        __builtin_prefetch(x + 64 + (k & 15) * SHORT_RUN_BYTES);
        __builtin_prefetch(next + k * AHEAD, 0, 2);
        for (int v = 0; v < NV * VB / 64; v++)
            __builtin_prefetch(w + 16 * NV * VB + v * 64);
        for (int m = 0; m < MR; m++) {
            const vf xv = splat_unit((const float *)(x + m * SHORT_RUN_BYTES));
            for (int v = 0; v < NV; v++)
                acc[m][v] = multiply_add(GLM_I8, dtype, acc[m][v], xv, wv[v]);
        }
    }
#endif
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            store_sums(tile + m * ldt + v * VL, (vi)acc[m][v], run + m * runs, add, dtype);
}
#endif

/* BR rows of x, or of A, as bytes in runs; rows past the end are 0. */
static void pack_bytes_task(const void *arg, int task, char *scratch)
{
    const struct pack_args *p = arg;
    const int rows = p->N - task * BR < BR ? p->N - task * BR : BR, n_runs = glm_byte_runs(p->K);
    const float *from = p->x + (size_t)task * BR * p->am;
    float *terms = (float *)scratch;
    for (int b = 0; b < n_runs; b++)
        for (int r = 0; r < BR; r++) {
            const int begin = b * SHORT_RUN_BYTES, left = p->K - begin;
            const int n = left < SHORT_RUN_BYTES ? left : SHORT_RUN_BYTES;
            const float *x = from + r * p->am + begin;
            int8_t *q = (int8_t *)byte_rows(p->to, task * BR, b, n_runs) + r * SHORT_RUN_BYTES;
            struct x_run *run = p->runs + ((size_t)task * BR + r) * n_runs + b;
            if (r >= rows) { /* multiplied with the others, and dropped */
                memset(q, 0, SHORT_RUN_BYTES);
                *run = (struct x_run){0};
                continue;
            }
            for (int k = 0; k < n; k += 16) /* the next row, while this one is read twice */
                __builtin_prefetch(x + p->am + k);
            if (p->factor) {
                for (int k = 0; k < n; k++)
                    terms[k] = p->scale * x[k] * half_to_float(p->factor[begin + k]);
                x = terms;
            }
            quantize_x(q, run, x, n);
            if (p->dtype == GLM_I4)
                evens_first(q);
        }
}

/* NR rows of W from row o on, of which `rows` are there, columns k0 .. k0 + K - 1: (units, NR). */
INLINE void pack_columns(char *to, const struct glm_mat *w, enum glm_dtype dtype, int o, int rows,
                         int k0, int K)
{
    const int chunk = chunk_of(GLM_I8, dtype), width = chunk * per_vector(GLM_I8);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *first = (const char *)w->data + (size_t)o * stride + glm_bytes(dtype, (size_t)k0);
    for (int k = 0; k < K; k += width, to += (size_t)chunk * VL * NV * VB)
        for (int n = 0; n < NR; n += VL) {
            const char *p = first + (size_t)n * stride + glm_bytes(dtype, (size_t)k);
            const int whole = n + VL <= rows && K - k >= width;
            vf v[2][VL], row[2] = {{0}};
#pragma GCC unroll 16
            for (int i = 0; whole && i < VL; i++, p += stride) {
                __builtin_prefetch(p + 2 * VB);
                load_chunk(row, p, GLM_I8, dtype);
                v[0][i] = row[0];
                v[1][i] = row[1];
            }
            for (int i = 0; !whole && i < VL; i++, p += stride) {
                row[0] = row[1] = (vf){0};
                if (n + i < rows)
                    load_last(row, p, GLM_I8, dtype, K - k < width ? K - k : width);
                v[0][i] = row[0];
                v[1][i] = row[1];
            }
#pragma GCC unroll 2
            for (int j = 0; j < chunk; j++) {
                transpose(v[j]);
#pragma GCC unroll 16
                for (int i = 0; i < VL; i++)
                    store((float *)(to + (j * VL + i) * NV * VB + n * 4), v[j][i]);
            }
        }
}

/* Column k of a run of W as bytes, from the packed panels. */
INLINE void column_of(int8_t *to, const char *wp, int k, enum glm_dtype dtype)
{
    typedef int8_t vb __attribute__((vector_size(VL), aligned(1)));
    const int at = dtype == GLM_I4 ? k / (2 * VB) * 2 * VB + k % 2 * VB + k % (2 * VB) / 2 : k;
    for (int o = 0; o < NT_COLS; o += VL) {
        const vi units = (vi)load(
            (const float *)(wp + o / NR * NR * SHORT_RUN_BYTES + at / 4 * NR * 4 + o % NR * 4));
        const vi of_w = (units >> at % 4 * 8 & 255) - bias_of(dtype); /* a byte, or 256 more */
        *(vb *)(to + o) = __builtin_convertvector(of_w, vb);
    }
}

/* As add_outliers of a row, of packed columns. */
INLINE void add_column_outliers(float *out, int cols, const struct x_run *run, const char *wp,
                                enum glm_dtype dtype, struct panel_columns *columns)
{
    const int8_t *q[OUTLIERS];
    for (int j = 0; j < run->count; j++) {
        const int k = run->column[j];
        if (columns->place[k] < 0) {
            column_of(columns->value[columns->count], wp, k, dtype);
            columns->place[k] = (int16_t)columns->count++;
        }
        q[j] = columns->value[columns->place[k]];
    }
    int o = 0;
    for (; run->count && o + VL <= cols; o += VL) {
        vf sum = load(out + o);
        for (int j = 0; j < run->count; j++)
            sum += splat(run->value[j]) * INT_TO_FLOAT(BYTES_TO_INT((const char *)q[j] + o));
        store(out + o, sum);
    }
    for (; run->count && o < cols; o++)
        for (int j = 0; j < run->count; j++)
            out[o] += run->value[j] * (float)q[j][o];
}

/* tile_packed of bytes by columns */
INLINE void tile_bytes(const struct nt_args *a, const struct nt_tile *t, enum glm_dtype dtype)
{
    const int n0 = t->n0, rows = t->rows, o0 = t->o0, cols = t->cols;
    const size_t ldt = t->ldt;
    float *tile = t->tile;
    char *wp = t->wp;
    const int I = a->w->cols, n_runs = glm_byte_runs(I), panels = (cols + NR - 1) / NR;
    const int tiles = (rows + BR - 1) / BR * panels;
    const size_t panel = (size_t)NR * SHORT_RUN_BYTES;
    struct panel_columns *columns = (struct panel_columns *)(wp + NT_COLS * NT_RUN_BYTES);
    float edge[BR * NR] __attribute__((aligned(64))) = {0};
    START_TILES();
    for (int b = 0; b < n_runs; b++) {
        const int k0 = b * SHORT_RUN_BYTES, left = I - k0;
        const int K = left < SHORT_RUN_BYTES ? left : SHORT_RUN_BYTES;
        const int units = vectors_of(GLM_I8, dtype, K) * VL;
        for (int i = 0; i < panels; i++)
            pack_columns(wp + i * panel, a->w, dtype, o0 + i * NR, cols - i * NR, k0, K);
        memset(columns->place, -1, sizeof columns->place);
        columns->count = 0;
        const int last = b + 1 == n_runs, from = last ? 0 : k0 + SHORT_RUN_BYTES;
        const int next_rows = last ? a->w->rows - o0 - cols : cols; /* most likely the next task */
        struct ahead ahead = start_ahead(
            a->w, dtype, last ? o0 + cols : o0, next_rows < NT_COLS ? next_rows : NT_COLS, from,
            I - from < SHORT_RUN_BYTES ? (I - from) & ~1 : SHORT_RUN_BYTES, tiles);
        for (int n = 0; n < rows; n += BR) {
            const char *x = byte_rows(a->x, n0 + n, b, n_runs);
            const struct x_run *run = a->runs + (size_t)(n0 + n) * n_runs + b;
            const int height = rows - n < BR ? rows - n : BR;
            const char *next = n + BR < rows ? byte_rows(a->x, n0 + n + BR, b, n_runs)
                                             : byte_rows(a->x, n0, last ? 0 : b + 1, n_runs);
            for (int o = 0; o < cols; o += NR) {
                const int width = cols - o < NR ? cols - o : NR;
                const int whole = height == BR && width == NR;
                float *at = tile + n * ldt + o;
                for (int r = 0; r < height; r++)
                    for (int v = 0; v < NV; v++)
                        __builtin_prefetch(at + r * ldt + v * VL, 1, 3);
                fetch_ahead(&ahead);
                for (int r = 0; !whole && b && r < height; r++)
                    memcpy(edge + r * NR, at + r * ldt, (size_t)width * 4);
                byte_tile(whole ? at : edge, whole ? ldt : NR, x, wp + o / NR * panel, units, b,
                          dtype, run, (size_t)n_runs, next + o / NR * AHEAD * units);
                for (int r = 0; !whole && r < height; r++)
                    memcpy(at + r * ldt, edge + r * NR, (size_t)width * 4);
            }
            for (int r = 0; r < height; r++)
                add_column_outliers(tile + (n + r) * ldt, cols, run + (size_t)r * n_runs, wp, dtype,
                                    columns);
            if (last) /* while the rows are in the nearest cache */
                finish(a, t, n, height);
        }
    }
    END_TILES();
}
