/* linear_forward: out = x W^T. Both operands are contiguous along the reduction, so vectors run
 * along it and a sum is made of VL lanes.
 *
 * The arithmetic of a product is a "kind": GLM_F32, GLM_BF16 (pairs of bfloat16, summed in float,
 * where the set has DOT_BF16) or GLM_I8 (quads of bytes, summed in int; the same bits on every set). W is converted to it while it is read, x before. An
 * output is a sum over runs of vectors; in a run lane l adds up its products in order, then the
 * lanes are summed: the same for one row of x, which reads W where it lies at the memory's speed,
 * and for many, which pack panels of W. Only W of kind GLM_BF16 with group scales differs: few rows
 * multiply sums of 8 products by the scale, many rows have it rounded into their bfloat16. */

/* Rows of x times rows of W whose sums the registers hold: packed XR times 4; in place R1 times C1
 * of one row of x, R2 times C2 of several. More rows of x than IN_PLACE_ROWS are worth packing W. */
/* clang-format off */
enum {
#if REGISTERS == 32
    XR = 6, R1 = 1, C1 = 4, R2 = 4, C2 = VL == 4 ? 4 : 6,
#else
    XR = 3, R1 = 1, C1 = 4, R2 = 3, C2 = 4,
#endif
    IN_PLACE_ROWS = 16,
    MR = VL == 16 ? 12 : VL == 8 ? 6 : 4, /* of rank-1 updates: rows times .. */
    NV = VL == 4 && REGISTERS == 32 ? 4 : 2, NR = NV * VL, /* .. columns, which lanes are */
#ifdef BYTE_TILES
    BR = 32, /* the same of bytes: rows */
#else
    BR = MR,
#endif
    GROUP = BR == 32 ? 96 : ROW_GROUP, /* rows of a task: a multiple of every kernel's */
    IN_PLACE_COLS = 96, /* rows of W of a task in place: a multiple of each C */
    VB = 4 * VL,        /* bytes of a vector */
    FETCHED = 4096,     /* bytes of W ahead where few rows read one row of it .. */
    FOLLOWING = 1024,   /* .. or several, once */
    RUN_GROUPS = SHORT_RUN_BYTES / 2 / 32 + 4, /* most groups of 32 columns of a run */
};
/* clang-format on */

/* A line of W that is read once: it takes no room in the second cache. */
#define FETCH_ONCE(p) __builtin_prefetch((p), 0, 0)

INLINE int per_vector(enum glm_dtype kind) { return glm_per_unit(kind) * VL; }

/* Vectors of a run. Rows of 4 bits come from memory a tenth slower in runs of the longer one. */
INLINE int run_of(enum glm_dtype kind, enum glm_dtype dtype)
{
    return (kind == GLM_I8 || dtype == GLM_I4 ? SHORT_RUN_BYTES : NT_RUN_BYTES) / VB;
}

/* Vectors that are converted together: as many columns of W as make whole vectors. */
INLINE int chunk_of(enum glm_dtype kind, enum glm_dtype dtype)
{
    if (kind == GLM_BF16)
        return dtype == GLM_I4 ? 4 : dtype == GLM_I8 ? 2 : 1;
    return kind == GLM_F32 || dtype == GLM_I4 ? 2 : 1;
}

/* Vectors of a packed row. */
INLINE int vectors_of(enum glm_dtype kind, enum glm_dtype dtype, int columns)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    return (columns + width - 1) / width * chunk;
}

INLINE vf multiply_add(enum glm_dtype kind, enum glm_dtype dtype, vf acc, vf x, vf w)
{
#ifdef DOT_BF16
    if (kind == GLM_BF16)
        return DOT_BF16(acc, x, w);
#endif
    if (kind == GLM_I8)
        return dtype == GLM_I4 ? DOT_NIBBLES(acc, w, x) : DOT_I8(acc, w, x);
    return MADD(x, w, acc);
}

/* By how much the integers of W are too large in products of bytes. */
INLINE int bias_of(enum glm_dtype dtype) { return dtype == GLM_I4 ? 8 : BYTE_BIAS; }

/* Four sums of lanes, as the kind sums. */
INLINE v4 sums_of(enum glm_dtype kind, vf a, vf b, vf c, vf d)
{
    return kind == GLM_I8 ? SUM4_INT(a, b, c, d) : SUM4(a, b, c, d);
}

/* A chunk of a row of W at `p`. Of 4-bit columns kinds GLM_F32 and GLM_I8 have the even ones first,
 * then the odd ones; kind GLM_BF16 has columns 4i + 1, 4i, 4i + 3, 4i + 2, and of bytes the first 8 of each
 * 16, then the others; x is packed to match. */
INLINE void load_chunk(vf *v, const char *p, enum glm_dtype kind, enum glm_dtype dtype)
{
    if (kind == GLM_I8 && dtype == GLM_I4) {
        const vu both = (vu)load_bytes(p) ^ 0x88888888u;
        v[0] = (vf)(both >> 4 & 0x0f0f0f0fu);
        v[1] = (vf)(both & 0x0f0f0f0fu);
        return;
    }
    if (kind == GLM_I8) {
        v[0] = BYTES_OF_W(load_bytes(p));
        return;
    }
#ifdef DOT_BF16
    if (kind == GLM_BF16 && dtype == GLM_I4) {
        const vi raw = (vi)load_bytes(p);
        for (int j = 0; j < 4; j++)
            v[j] = INTEGERS_TO_BF16(raw >> 4 * j);
        return;
    }
    if (kind == GLM_BF16 && dtype == GLM_BF16) {
        v[0] = load_bytes(p);
        return;
    }
    if (kind == GLM_BF16 && dtype == GLM_I8) {
        BYTES_TO_BF16(v, p);
        return;
    }
    if (kind == GLM_BF16) {
        v[0] = TO_BF16(load_as(p, dtype, 0), load_as(p, dtype, VL));
        return;
    }
#endif
    if (dtype == GLM_I4) {
        const vi both = BYTES_TO_INT(p);
        v[0] = INT_TO_FLOAT(both >> 4);
        v[1] = INT_TO_FLOAT(both << 28 >> 28);
    } else if (dtype == GLM_I8) {
        v[0] = INT_TO_FLOAT(BYTES_TO_INT(p));
        v[1] = INT_TO_FLOAT(BYTES_TO_INT(p + VL));
    } else {
        v[0] = load_as(p, dtype, 0);
        v[1] = load_as(p, dtype, VL);
    }
}

/* The same for the last n columns of a row: zeros follow. */
INLINE void load_last(vf *v, const char *p, enum glm_dtype kind, enum glm_dtype dtype, int n)
{
    char end[4 * VB] __attribute__((aligned(64)));
    COPY_PART(end, p, glm_bytes(dtype, (size_t)n));
    load_chunk(v, end, kind, dtype);
}

/* A chunk of a row of x at `p`, n columns of it; zeros follow. */
INLINE void load_x(vf *v, const float *p, int n, enum glm_dtype kind, enum glm_dtype dtype)
{
    const int width = chunk_of(kind, dtype) * per_vector(kind);
    float end[8 * VL] __attribute__((aligned(64)));
    if (n < width) {
        memset(end, 0, sizeof end);
        memcpy(end, p, (size_t)n * 4);
        p = end;
    }
#ifdef DOT_BF16
    if (kind == GLM_BF16 && dtype == GLM_I4) {
        vf even[4], odd[4];
        for (int i = 0; i < 4; i++) {
            even[i] = EVEN(load(p + 2 * i * VL), load(p + (2 * i + 1) * VL));
            odd[i] = ODD(load(p + 2 * i * VL), load(p + (2 * i + 1) * VL));
        }
        v[0] = TO_BF16(EVEN(odd[0], odd[1]), EVEN(odd[2], odd[3]));
        v[1] = TO_BF16(EVEN(even[0], even[1]), EVEN(even[2], even[3]));
        v[2] = TO_BF16(ODD(odd[0], odd[1]), ODD(odd[2], odd[3]));
        v[3] = TO_BF16(ODD(even[0], even[1]), ODD(even[2], even[3]));
        return;
    }
    if (kind == GLM_BF16 && dtype == GLM_I8) {
        const vf a = load(p), b = load(p + VL), c = load(p + 2 * VL), d = load(p + 3 * VL);
#if VL == 4 /* one run of 16 */
        v[0] = TO_BF16(a, b);
        v[1] = TO_BF16(c, d);
#else
        v[0] = TO_BF16(FIRST_HALVES(a, b), FIRST_HALVES(c, d));
        v[1] = TO_BF16(LAST_HALVES(a, b), LAST_HALVES(c, d));
#endif
        return;
    }
    if (kind == GLM_BF16) {
        v[0] = TO_BF16(load(p), load(p + VL));
        return;
    }
#endif
    v[0] = load(p);
    v[1] = load(p + VL);
    if (dtype == GLM_I4) {
        const vf a = v[0], b = v[1];
        v[0] = EVEN(a, b);
        v[1] = ODD(a, b);
    }
}

/* Whether pairs of rows are multiplied (MULTIPLY_PAIRS): packed rows, or W in place. */
INLINE int pairs_in_place(enum glm_dtype kind)
{
    (void)kind;
#ifdef MULTIPLY_PAIRS
    return PAIRS_IN_PLACE(kind);
#else
    return 0;
#endif
}

/* Whether rows that lie together, R of x or four of W (R is XR), are packed in pairs: of two rows
 * first halves of their vectors, then second halves. */
INLINE int paired(enum glm_dtype kind, int R)
{
    (void)kind, (void)R;
#ifdef MULTIPLY_PAIRS
    return HAS_PAIRS(kind) && (R == XR || (R != R1 && PAIRS_IN_PLACE(kind)));
#else
    return 0;
#endif
}

/* Stores a vector of row r of those that lie together. */
INLINE void store_packed(char *to, int r, vf v, int in_pairs)
{
    if (!in_pairs) {
        store((float *)(to + r * VB), v);
        return;
    }
    char *at = to + r / 2 * 2 * VB + r % 2 * (VB / 2);
    memcpy(at, &v, VB / 2);
    memcpy(at + VB, (const char *)&v + VB / 2, VB / 2);
}

/* Where a byte of row c of four packed rows lies. */
INLINE size_t packed_byte(size_t byte, int c, int in_pairs)
{
    const size_t vector = byte / VB * 4 * VB, at = byte % VB, half = VB / 2;
    return in_pairs ? vector + c / 2 * 2 * VB + at / half * VB + c % 2 * half + at % half
                    : vector + c * VB + at;
}

/* Rows of x, vector by vector, R of them; rows past the end are 0. */
INLINE void pack_x(char *to, int R, const float *x, size_t ldx, int rows, int K,
                   enum glm_dtype kind, enum glm_dtype dtype)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    for (int r = 0; r < R; r++) {
        char *at = to;
        for (int k = 0; k < K; k += width, at += (size_t)chunk * R * VB) {
            vf v[4] = {{0}};
            if (r < rows)
                load_x(v, x + r * ldx + k, K - k, kind, dtype);
            for (int j = 0; j < chunk; j++)
                store_packed(at + (size_t)j * R * VB, r, v[j], paired(kind, R));
        }
    }
}

/* Scales of the groups of 32 columns of a run from column k0 on, of a row of W whose are at `from`. */
INLINE void run_scales(float *scale, const uint16_t *from, int group, int k0, int K)
{
    if (group == 32 && K % (32 * VL) == 0)
        for (int g = 0; g * 32 < K; g += VL)
            store(scale + g, HALF_TO_FLOAT(from + k0 / 32 + g));
    else if (group == 32)
        load_row(scale, from + k0 / 32, GLM_F16, (K + 31) / 32);
    else
        for (int g = 0; g * 32 < K; g++)
            scale[g] = half_to_float(from[(k0 + g * 32) / group]);
    for (int g = (K + 31) / 32; g % 4; g++) /* a last chunk meets four of them */
        scale[g] = 0;
}

/* A chunk of W times its groups' scales; g: the first group of the chunk in the run. */
INLINE void scale_chunk(vf *v, const float *scale, int g, enum glm_dtype kind)
{
#ifdef DOT_BF16
    if (kind == GLM_BF16) {
        const vf lanes = SCALES_TO_LANES(scale + g);
        for (int j = 0; j < 4; j++)
            v[j] = SCALE_BF16(v[j], lanes);
        return;
    }
#endif
    (void)kind;
    for (int j = 0; j < 2; j++)
        v[j] *= splat(scale[g]);
}

/* Four rows of W from row o on, columns k0 .. k0 + K - 1: vector by vector, four of them; rows past
 * the end are 0. */
INLINE void pack_w(char *to, const struct glm_mat *w, enum glm_dtype kind, enum glm_dtype dtype,
                   int grouped, int o, int rows, int k0, int K)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *first = (const char *)w->data + (size_t)o * stride + glm_bytes(dtype, (size_t)k0);
    const size_t scales = grouped ? glm_scale_cols(w) : 0;
    float scale[4][RUN_GROUPS];
    for (int c = 0; grouped && c < 4 && c < rows; c++)
        run_scales(scale[c], w->scale + (size_t)(o + c) * scales, w->group, k0, K);
    const char *row[4];
    int k = 0;
    for (int c = 0; c < 4; c++)
        row[c] = first + c * stride;
    for (; rows >= 4 && k + width <= K; k += width, to += chunk * 4 * VB) {
        const size_t at = glm_bytes(dtype, (size_t)k);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            vf v[4];
            if (at % 64 == 0) /* a line once */
                __builtin_prefetch(row[c] + at + 4 * stride);
            load_chunk(v, row[c] + at, kind, dtype);
            if (grouped)
                scale_chunk(v, scale[c], k / 32, kind);
            for (int j = 0; j < chunk; j++)
                store_packed(to + j * 4 * VB, c, v[j], paired(kind, XR));
        }
    }
    for (; k < K; k += width, to += chunk * 4 * VB)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const char *p = row[c] + glm_bytes(dtype, (size_t)k);
            vf v[4] = {{0}};
            if (c < rows) {
                if (K - k >= width)
                    load_chunk(v, p, kind, dtype);
                else
                    load_last(v, p, kind, dtype, K - k);
                if (grouped)
                    scale_chunk(v, scale[c], k / 32, kind);
            }
            for (int j = 0; j < chunk; j++)
                store_packed(to + j * 4 * VB, c, v[j], paired(kind, XR));
        }
}

/* s[r] = dot products of row r of packed x with four rows of packed w, `vectors` vectors long */
INLINE void dot_panel(v4 *s, const char *x, const char *w, int vectors, enum glm_dtype kind,
                      enum glm_dtype dtype)
{
    vf acc[XR][4];
    for (int r = 0; r < XR; r++)
        for (int c = 0; c < 4; c++)
            acc[r][c] = (vf){0};
    for (int k = 0; k < vectors; k++, x += XR * VB, w += 4 * VB) {
        vf xv[XR];
        for (int r = 0; r < XR; r++)
            xv[r] = load((const float *)(x + r * VB));
#if REGISTERS == 32 /* in registers: the compiler would load them again with every row of W */
#ifdef __aarch64__
#define KEPT "+w"
#else
#define KEPT "+v"
#endif
        __asm__("" : KEPT(xv[0]), KEPT(xv[1]), KEPT(xv[2]), KEPT(xv[3]), KEPT(xv[4]), KEPT(xv[5]));
#endif
        for (int c = 0; c < 4; c++) {
            const vf wv = load((const float *)(w + c * VB));
            for (int r = 0; r < XR; r++)
                acc[r][c] = multiply_add(kind, dtype, acc[r][c], xv[r], wv);
        }
    }
    for (int r = 0; r < XR; r++)
        s[r] = sums_of(kind, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* Products of pairs of rows: where a set has MULTIPLY_PAIRS(kind, acc, x, w), x and w hold half a
 * vector of each of two rows, and acc adds up the 2 x 2 products of these. HAS_PAIRS(kind): in which
 * kinds; PAIRS_IN_PLACE(kind): where W lies in place, too, since sums of floats have one order. */
#ifdef MULTIPLY_PAIRS
/* Sums of two rows of x (and two, and two ..) as the four by four of others: acc[2 p + q / 2] and its
 * neighbour are of rows 2 p, 2 p + 1 of x and of columns 4 (q / 2) .. */
INLINE v4 first_row_of(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
INLINE v4 second_row_of(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }

/* s[.][r]: as dot_panel, of eight rows of w, whose last four lie `next` bytes on */
INLINE void dot_pairs(v4 (*s)[XR], const char *x, const char *w, size_t next, int vectors,
                      enum glm_dtype kind)
{
    vf acc[XR / 2][4];
    (void)kind;
    for (int p = 0; p < XR / 2; p++)
        for (int q = 0; q < 4; q++)
            acc[p][q] = (vf){0};
    for (int k = 0; k < vectors; k++, x += XR * VB, w += 4 * VB)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vf xv[XR / 2];
            for (int p = 0; p < XR / 2; p++)
                xv[p] = load((const float *)(x + (2 * p + half) * VB));
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                const vf wv = load((const float *)(w + q / 2 * next + (q % 2 * 2 + half) * VB));
                for (int p = 0; p < XR / 2; p++)
                    acc[p][q] = MULTIPLY_PAIRS(kind, acc[p][q], xv[p], wv);
            }
        }
    for (int p = 0; p < XR / 2; p++)
        for (int q = 0; q < 4; q += 2) {
            s[q / 2][2 * p] = first_row_of(acc[p][q], acc[p][q + 1]);
            s[q / 2][2 * p + 1] = second_row_of(acc[p][q], acc[p][q + 1]);
        }
}
#endif

/* Of bytes, as a function: within a large one gcc keeps their sums in memory. */
static __attribute__((noinline)) void dot_byte_panel(v4 *s, const char *x, const char *w,
                                                     int vectors, enum glm_dtype dtype)
{
    dot_panel(s, x, w, vectors, GLM_I8, dtype);
}

/* Groups of R rows of x: as vectors of the kind in rows of `vectors`, one task for each group. */
static void pack_x_task(const void *arg, int task, char *scratch)
{
    const struct pack_args *p = arg;
    const int first = first_packed(p, task), R = first_packed(p, task + 1) - first;
    const int rows = p->N - first;
    const float *x = p->x + (size_t)first * p->K;
    const int vectors = vectors_of(p->kind, p->dtype, p->K);
    char *to = p->to + (size_t)first * vectors * VB;
    (void)scratch;
    if (p->kind == GLM_I8) {
        const int in_full = run_of(GLM_I8, p->dtype), n_runs = glm_byte_runs(p->K);
        for (int r = 0; r < R; r++)
            for (int b = 0; b < n_runs; b++) {
                const int left = p->K - b * SHORT_RUN_BYTES, in_run = vectors - b * in_full;
                int8_t q[SHORT_RUN_BYTES] __attribute__((aligned(64))) = {0};
                struct x_run *run = p->runs + (size_t)(first + r) * n_runs + b;
                if (r < rows)
                    quantize_x(q, run, x + (size_t)r * p->K + (size_t)b * SHORT_RUN_BYTES,
                               left < SHORT_RUN_BYTES ? left : SHORT_RUN_BYTES);
                else /* multiplied with the others, and dropped */
                    run->sum = 0, run->scale = 0;
                if (p->dtype == GLM_I4)
                    evens_first(q);
                for (int v = 0; v < (in_run < in_full ? in_run : in_full); v++)
                    store_packed(to + ((size_t)b * in_full + v) * R * VB, r,
                                 load((float *)(q + v * VB)), paired(GLM_I8, R));
            }
        return;
    }
#ifdef DOT_BF16
    if (p->kind == GLM_BF16) {
        if (p->dtype == GLM_I4)
            pack_x(to, R, x, (size_t)p->K, rows, p->K, GLM_BF16, GLM_I4);
        else if (p->dtype == GLM_I8)
            pack_x(to, R, x, (size_t)p->K, rows, p->K, GLM_BF16, GLM_I8);
        else
            pack_x(to, R, x, (size_t)p->K, rows, p->K, GLM_BF16, GLM_F32);
        return;
    }
#endif
    if (p->dtype == GLM_I4)
        pack_x(to, R, x, (size_t)p->K, rows, p->K, GLM_F32, GLM_I4);
    else
        pack_x(to, R, x, (size_t)p->K, rows, p->K, GLM_F32, GLM_F32);
}

/* Four outputs of a run, to be added to their sums. */
INLINE v4 run_value(v4 s, const struct x_run *run, enum glm_dtype kind, enum glm_dtype dtype)
{
    if (kind != GLM_I8)
        return s;
    typedef int32_t i4 __attribute__((vector_size(16), aligned(4)));
    return __builtin_convertvector((i4)s - bias_of(dtype) * run->sum, v4) * run->scale;
}

/* Columns of a packed panel of W that outliers of x meet, as bytes, taken out once a run. */
struct panel_columns {
    int16_t place[SHORT_RUN_BYTES]; /* -1: not yet */
    int count;
    int8_t value[SHORT_RUN_BYTES][NT_COLS];
};

INLINE void add_outliers(float *out, int cols, const struct x_run *run, const char *wp,
                         enum glm_dtype dtype, struct panel_columns *columns)
{
    for (int j = 0; j < run->count; j++) {
        const int k = run->column[j];
        if (columns->place[k] < 0) {
            int8_t *to = columns->value[columns->count];
            const int at =
                dtype == GLM_I4 ? k / (2 * VB) * 2 * VB + k % 2 * VB + k % (2 * VB) / 2 : k;
            for (int o = 0; o < NT_COLS; o++) { /* as bytes: the difference is one, too */
                const char *four = wp + o / 4 * 4 * SHORT_RUN_BYTES;
                to[o] = (int8_t)(four[packed_byte((size_t)at, o % 4, paired(GLM_I8, XR))] -
                                 bias_of(dtype));
            }
            columns->place[k] = (int16_t)columns->count++;
        }
        const int8_t *q = columns->value[columns->place[k]];
        for (int o = 0; o < cols; o++)
            out[o] += run->value[j] * (float)q[o];
    }
}

/* The panel of W that is packed next, fetched into the cache a part a tile. */
struct ahead {
    const char *w; /* first row that is not fetched whole */
    size_t stride;
    int rows, bytes, at, per_tile; /* rows left; of a row, and of it fetched; lines a tile */
};

INLINE struct ahead start_ahead(const struct glm_mat *w, enum glm_dtype dtype, int row, int rows,
                                int column, int columns, int tiles)
{
    struct ahead f = {.stride = glm_bytes(dtype, (size_t)w->cols)};
    f.w = (const char *)w->data + (size_t)row * f.stride + glm_bytes(dtype, (size_t)column);
    f.rows = columns > 0 ? rows : 0;
    f.bytes = (int)glm_bytes(dtype, (size_t)columns);
    f.per_tile = (rows * ((f.bytes + 63) / 64) + tiles - 1) / tiles;
    return f;
}

INLINE void fetch_ahead(struct ahead *f)
{
    for (int i = 0; i < f->per_tile && f->rows > 0; i++) {
        __builtin_prefetch(f->w + f->at, 0, 2);
        f->at += 64;
        if (f->at >= f->bytes) {
            f->at = 0;
            f->w += f->stride;
            f->rows--;
        }
    }
}

/* (XR, 4; ldt) at `to`, of which (rows, cols) are there, (+)= s */
INLINE void add_panel(float *to, size_t ldt, const v4 *s, int rows, int cols, int add,
                      const struct x_run *run, size_t n_runs, enum glm_dtype kind,
                      enum glm_dtype dtype)
{
    v4 v[XR];
    for (int r = 0; r < XR; r++)
        v[r] = run_value(s[r], kind == GLM_I8 ? run + r * n_runs : NULL, kind, dtype);
    if (rows == XR && cols >= 4) {
#pragma GCC unroll 6
        for (int r = 0; r < XR; r++)
            *(v4 *)(to + r * ldt) = add ? *(v4 *)(to + r * ldt) + v[r] : v[r];
        return;
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4 && c < cols; c++)
            to[r * ldt + c] = add ? to[r * ldt + c] + v[r][c] : v[r][c];
}

/* The output of a task, at `tile` until it is whole, and what it packs W into. */
struct nt_tile {
    float *tile;
    size_t ldt;
    int n0, rows, o0, cols;
    char *wp;
    float scale[NT_COLS]; /* of W's rows, 1 where they have none */
};

INLINE void row_scales(struct nt_tile *t, const struct glm_mat *w)
{
    for (int o = 0; o < t->cols; o++)
        t->scale[o] = w->scale && !w->group ? half_to_float(w->scale[t->o0 + o]) : 1.0f;
}

/* Of many rows of x */
INLINE struct nt_tile tile_of_task(const struct nt_args *a, int task, char *scratch)
{
    const int O = a->w->rows, o_tiles = (O + NT_COLS - 1) / NT_COLS;
    const int n0 = task / o_tiles * a->rows, o0 = task % o_tiles * NT_COLS;
    struct nt_tile t = {
        .tile = a->accumulate ? (float *)scratch : a->out + (size_t)n0 * a->ldo + o0,
        .ldt = a->accumulate ? NT_COLS : a->ldo,
        .n0 = n0,
        .rows = a->N - n0 < a->rows ? a->N - n0 : a->rows,
        .o0 = o0,
        .cols = O - o0 < NT_COLS ? O - o0 : NT_COLS,
        .wp = scratch + NT_ROWS_ADDED * NT_COLS * 4,
    };
    row_scales(&t, a->w);
    return t;
}

/* out = scale * (the tile times the scales of W's rows) + bias (+ out), for `rows` rows from n on */
INLINE void finish(const struct nt_args *a, const struct nt_tile *t, int n, int rows)
{
    const int by_row = a->w->scale && !a->w->group;
    if (t->tile == a->out + (size_t)t->n0 * a->ldo + t->o0 && !by_row && a->scale == 1 && !a->bias)
        return;
    for (; rows; rows--, n++) {
        float *out = a->out + (size_t)(t->n0 + n) * a->ldo + (size_t)t->o0 * a->ldc;
        const float *from = t->tile + n * t->ldt;
        int o = 0;
        for (; a->ldc == 1 && o + VL <= t->cols; o += VL) {
            vf v = splat(a->scale) * (load(from + o) * load(t->scale + o));
            if (a->bias)
                v += load(a->bias + t->o0 + o);
            store(out + o, a->accumulate ? load(out + o) + v : v);
        }
        for (; o < t->cols; o++) {
            float v = a->scale * (from[o] * t->scale[o]);
            if (a->bias)
                v += a->bias[t->o0 + o];
            out[o * a->ldc] = a->accumulate ? out[o * a->ldc] + v : v;
        }
    }
}

/* A tile of many rows: a panel of W is packed once, x is packed already */
INLINE void tile_packed(const struct nt_args *a, const struct nt_tile *t, enum glm_dtype kind,
                        enum glm_dtype dtype, int grouped)
{
    const int n0 = t->n0, rows = t->rows, o0 = t->o0, cols = t->cols;
    const size_t ldt = t->ldt;
    float *tile = t->tile;
    char *wp = t->wp;
    const int I = a->w->cols, vectors = vectors_of(kind, dtype, I);
    const int in_full = run_of(kind, dtype), width = in_full * per_vector(kind);
    const int n_runs = (vectors + in_full - 1) / in_full;
    const int wide = paired(kind, XR) ? 8 : 4, panels = (cols + wide - 1) / wide;
    const int tiles = (rows + XR - 1) / XR * panels;
    struct panel_columns *columns = (struct panel_columns *)(wp + NT_COLS * NT_RUN_BYTES);
    for (int b = 0; b < n_runs; b++) {
        const int K = I - b * width < width ? I - b * width : width;
        const int rest = vectors - b * in_full, in_run = rest < in_full ? rest : in_full;
        for (int o = 0; o < panels * wide; o += 4)
            pack_w(wp + (size_t)o * in_full * VB, a->w, kind, dtype, grouped, o0 + o, cols - o,
                   b * width, K);
        if (kind == GLM_I8) {
            memset(columns->place, -1, sizeof columns->place);
            columns->count = 0;
        }
        const int left = I - (b + 1) * width;
        struct ahead ahead = start_ahead(a->w, dtype, o0, cols, (b + 1) * width,
                                         left < width ? left & ~1 : width, tiles);
        for (int n = 0; n < rows; n += XR) {
            const char *xp = a->x + ((size_t)(n0 + n) * vectors + (size_t)b * in_full * XR) * VB;
            const struct x_run *run = a->runs + (size_t)(n0 + n) * n_runs + b;
            const int end = rows - n < XR ? rows - n : XR;
            const char *next = n + XR < rows ? xp + (size_t)vectors * XR * VB : xp;
            for (int o = 0; o < cols; o += wide) {
                v4 s[2][XR];
                const char *panel = wp + (size_t)o * in_full * VB;
                float *at = tile + n * ldt + o;
                for (int r = 0; r < end; r++)
                    __builtin_prefetch(at + r * ldt, 1, 3);
                for (int i = 0; i * panels < XR * in_full * VB / 64; i++, next += 64)
                    __builtin_prefetch(next, 0, 2);
                fetch_ahead(&ahead);
#ifdef MULTIPLY_PAIRS
                if (paired(kind, XR))
                    dot_pairs(s, xp, panel, (size_t)4 * in_full * VB, in_run, kind);
                else
#endif
                    if (kind == GLM_I8)
                    dot_byte_panel(s[0], xp, panel, in_run, dtype);
                else
                    dot_panel(s[0], xp, panel, in_run, kind, dtype);
                for (int i = 0; i < wide / 4; i++)
                    add_panel(at + 4 * i, ldt, s[i], end, cols - o - 4 * i, b, run, (size_t)n_runs,
                              kind, dtype);
            }
            for (int r = 0; kind == GLM_I8 && r < end; r++)
                add_outliers(tile + (n + r) * ldt, cols, run + (size_t)r * n_runs, wp, dtype,
                             columns);
            if (b + 1 == n_runs) /* while the rows are in the nearest cache */
                finish(a, t, n, end);
        }
    }
}

/* What a weight is multiplied in and stored as, and whether it has groups: a task for each. They are
 * functions apart, since in one that holds several gcc keeps sums in memory. */
/* clang-format off */
#define KINDS(each, name)                                                     \
    each(name, F32, F32, 0) each(name, F32, F16, 0) each(name, F32, BF16, 0)  \
    each(name, F32, I8, 0) each(name, F32, I4, 0) each(name, F32, I4, 1)      \
    each(name, F32, F64, 0) each(name, I8, I8, 0) each(name, I8, I4, 0)       \
    FAST_KINDS(each, name)
#ifdef DOT_BF16
#define FAST_KINDS(each, name)                                                  \
    each(name, BF16, F32, 0) each(name, BF16, F16, 0) each(name, BF16, BF16, 0) \
    each(name, BF16, I8, 0) each(name, BF16, I4, 0) each(name, BF16, I4, 1)
#else
#define FAST_KINDS(each, name)
#endif
/* clang-format on */
#define TASK_OF_KIND(name, kind, stored, by_group)                                              \
    static void name##_##kind##_##stored##_##by_group(const void *arg, int task, char *scratch) \
    {                                                                                           \
        name(GLM_##kind, GLM_##stored, by_group, arg, task, scratch);                           \
    }
#define WHERE_KIND(name, of, stored, by_group)                                       \
    if (kind == GLM_##of && w->dtype == GLM_##stored && (w->group != 0) == by_group) \
        return name##_##of##_##stored##_##by_group;

/* name_task(kind, w): a task of name(kind, dtype, grouped, arg, task, scratch), constants first, for
 * each of `kinds` */
/* clang-format off */
#define TASKS(kinds, name)                                                    \
    kinds(TASK_OF_KIND, name)                                                 \
    static glm_task name##_task(enum glm_dtype kind, const struct glm_mat *w) \
    {                                                                         \
        kinds(WHERE_KIND, name)                                               \
        return NULL;                                                          \
    }
/* clang-format on */
