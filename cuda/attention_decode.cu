/* Attention forward for segments of a few tokens with a long past, as every token of an answer is.
 *
 * A block takes one run of keys for the query heads of one token that read them, up to 16, so that
 * a key is read once. Runs are cut by position: 64 keys, or as many as make 64 runs. Of each comes
 * a sum of values, the maximum and the sum of the weights; where there are several runs these go to
 * scratch and a second kernel puts them together. All keys of a run are visible to its token.
 *
 * Keys and values go from memory to registers with no stop in shared memory, all of a warp's 16 keys
 * before the first is used. In 16 bits they are then operands of the tensor cores: the order of a
 * dot product's terms and of the output's columns is free, so each lane's 16 bytes are just those
 * that its fragments need. In float, lanes share a key's columns. */
#include "attention.cuh"

enum { WARPS = 4, ROWS = 16 };

struct decoding {
    attention a;
    float *mixes; /* (segment, token, head, run, HD padded) */
    float2 *sums; /* the same without HD: maximum, sum */
    int tokens;   /* of a segment, at most */
    int runs;     /* of a token, at most */
    int whole;    /* heads are made of 16-byte words */
};

static __host__ __device__ __forceinline__ int padded(int HD) { return (HD + 3) / 4 * 4; }

/* Keys of a run of a token that sees so many. */
static __device__ __forceinline__ int keys_of_run(int seen)
{
    return GLM_DECODE_RUN * (1 + (seen - 1) / (GLM_DECODE_RUN * GLM_DECODE_RUNS));
}

static __device__ __forceinline__ int runs_of(int seen)
{
    return (seen - 1) / keys_of_run(seen) + 1;
}

/* What a block has to do. */
struct run_of_keys {
    glm_segment s;
    int t, g, head, heads; /* token; key head; first and number of its query heads */
    int from, end;         /* keys */
    int runs;              /* of this token */
    size_t record;         /* of the first head; the next head's is `runs` at most further */
};

/* Its block's; false where there is none. `rows` heads a block. */
static __device__ __forceinline__ bool find_run(const decoding &d, int rows, run_of_keys &w)
{
    const attention &a = d.a;
    const int tiles = (a.G + rows - 1) / rows;
    let_next_begin();
    int rest = blockIdx.x;
    const int tile = rest % tiles;
    rest /= tiles;
    w.g = rest % a.KVH;
    rest /= a.KVH;
    const int run = rest % d.runs;
    rest /= d.runs;
    w.t = rest % d.tokens;
    const int i = rest / d.tokens;
    w.s = a.segments[i];
    if (w.s.count > GLM_DECODE_TOKENS || w.t >= w.s.count) {
        after_previous();
        return false;
    }
    const int seen = seen_by(w.s, w.t), keys = keys_of_run(seen);
    w.from = run * keys;
    w.end = min(w.from + keys, seen);
    w.runs = runs_of(seen);
    w.head = w.g * a.G + tile * rows;
    w.heads = min(rows, a.G - tile * rows);
    w.record = (((size_t)i * d.tokens + w.t) * a.NH + w.head) * d.runs + run;
    after_previous(); /* but segments come from the host */
    return w.from < w.end;
}

/* Columns c .. c + 3 of a row of HD floats, zero from HD on; WHOLE: in one word. */
template <bool WHOLE> static __device__ __forceinline__ f4 quad(const float *row, int c, int HD)
{
    f4 r;
    r.v[0] = r.v[1] = r.v[2] = r.v[3] = 0;
    if (WHOLE && c < HD) {
        const float4 x = at4(row + c);
        r.v[0] = x.x, r.v[1] = x.y, r.v[2] = x.z, r.v[3] = x.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (!WHOLE && c + j < HD)
            r.v[j] = row[c + j];
    return r;
}

static __device__ __forceinline__ const float *head_query(const attention &a, const run_of_keys &w,
                                                          int row)
{
    return a.qkv + (size_t)(w.s.begin + w.t) * (a.NH + 2 * a.KVH) * a.HD +
           (size_t)(w.head + row) * a.HD;
}

/* What the warps of a block found, put together. mixes (WARPS, rows, LD), mosts and totals (WARPS,
 * rows); a warp without keys has total 0. */
static __device__ __forceinline__ void put_run(const decoding &d, const run_of_keys &w,
                                               const float *mixes, const float *mosts,
                                               const float *totals, int rows, int LD)
{
    const attention &a = d.a;
    const int HD = a.HD, lane = threadIdx.x & 31;
    __syncthreads();
    for (int row = threadIdx.x >> 5; row < w.heads; row += WARPS) {
        float factor[WARPS], top = -GLM_INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            top = fmaxf(top, mosts[i * rows + row]);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const float total = totals[i * rows + row], most = mosts[i * rows + row];
            factor[i] = total == 0 ? 0 : most == top ? 1.0f : expf(most - top);
            sum += total * factor[i];
        }
        const size_t at = w.runs == 1 ? (size_t)(w.s.begin + w.t) * a.NH + w.head + row
                                      : w.record + (size_t)row * d.runs;
        for (int c = 4 * lane; c < HD; c += 128) {
            float4 mix;
            mix.x = mix.y = mix.z = mix.w = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++)
                add4(mix, factor[i], at4(mixes + (i * rows + row) * LD + c));
            if (w.runs == 1)
                put4(a.out + at * HD, c, HD, mix, 1.0f / sum);
            else
                *reinterpret_cast<float4 *>(d.mixes + at * padded(HD) + c) = mix;
        }
        if (lane == 0 && w.runs == 1)
            a.lse[at] = top + logf(sum);
        else if (lane == 0) {
            float2 both;
            both.x = top, both.y = sum;
            d.sums[at] = both;
        }
    }
}

/* ---- 16 bits */

/* Lane 4 r + q has of the products' operands: keys 2q, 2q + 1, 2q + 8, 2q + 9 of a strip of 16 in
 * its values, r and r + 8 in its keys; rows r and r + 8 of queries and results. */
template <int STEPS>
static __device__ __forceinline__ void load_keys(f4 (&key)[2][STEPS], const decoding &d,
                                                 const run_of_keys &w, int k0)
{
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float *from = key_of(d.a, w.s, w.g, min(k0 + 8 * n + r, w.end - 1)).k;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            key[n][s] = quad<true>(from, 16 * s + 4 * q, d.a.HD);
    }
}

template <int PANELS>
static __device__ __forceinline__ void load_values(f4 (&value)[4][PANELS], const decoding &d,
                                                   const run_of_keys &w, int k0)
{
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int k = k0 + 2 * q + n % 2 + 8 * (n / 2);
        const float *from = key_of(d.a, w.s, w.g, min(k, w.end - 1)).v;
#pragma unroll
        for (int m = 0; m < PANELS; m++)
            value[n][m] = quad<true>(from, 32 * m + 4 * r, d.a.HD);
    }
}

template <int D, bool BF16>
static __device__ __forceinline__ void decode_strips(const decoding &d, const run_of_keys &w,
                                                     uint4 (*query)[32], float *mixes, float *mosts,
                                                     float *totals)
{
    const int LD = D + 4, STEPS = D / 16, PANELS = D / 32;
    const attention &a = d.a;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = lane / 4, q = lane % 4;
    const int HD = a.HD;
    float mix[D / 8][4], most[2] = {-GLM_INFINITY, -GLM_INFINITY}, total[2] = {0, 0};
    f4 key[2][STEPS], value[4][PANELS];
    int k0 = w.from + 16 * warp;
    load_keys(key, d, w, k0);
    load_values(value, d, w, k0);
    for (int s = warp; s < STEPS; s += WARPS) {
        GLM_EXPECT(s < STEPS);
        const float *from = head_query(a, w, min(r, w.heads - 1)),
                    *next = head_query(a, w, min(r + 8, w.heads - 1));
        const f4 x = quad<true>(from, 16 * s + 4 * q, HD), y = quad<true>(next, 16 * s + 4 * q, HD);
        uint4 both;
        both.x = pack2<BF16>(x.v[0], x.v[1]), both.y = pack2<BF16>(y.v[0], y.v[1]);
        both.z = pack2<BF16>(x.v[2], x.v[3]), both.w = pack2<BF16>(y.v[2], y.v[3]);
        query[s][lane] = both;
    }
    __syncthreads();
    clear<D / 8>(mix);
    for (; k0 < w.end; k0 += 16 * WARPS) {
        float score[2][4];
        clear<2>(score);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const uint4 word = query[s][lane];
            const unsigned operand[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float *x = key[n][s].v;
                mma<BF16>(score[n], operand, pack2<BF16>(x[0], x[1]), pack2<BF16>(x[2], x[3]));
            }
        }
        const int next = k0 + 16 * WARPS;
        if (next < w.end)
            load_keys(key, d, w, next);
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = -GLM_INFINITY, sum = 0;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float *x = &score[n / 2][2 * h + n % 2];
                *x = k0 + 8 * (n / 2) + 2 * q + n % 2 < w.end ? *x * a.scale : -GLM_INFINITY;
                top = fmaxf(top, *x);
            }
            top = fmaxf(most[h], lanes_max<4>(top));
            shrink[h] = top == most[h] ? 1.0f : expf(most[h] - top);
            most[h] = top;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float *x = &score[n / 2][2 * h + n % 2];
                *x = expf(*x - top); /* past the end: 0 */
                sum += *x;
            }
            total[h] = total[h] * shrink[h] + lanes_sum<4>(sum);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            mix[n][0] *= shrink[0], mix[n][1] *= shrink[0];
            mix[n][2] *= shrink[1], mix[n][3] *= shrink[1];
        }
        unsigned p[4];
        pack_a<BF16>(p, score);
#pragma unroll
        for (int m = 0; m < PANELS; m++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma<BF16>(mix[4 * m + j], p, pack2<BF16>(value[0][m].v[j], value[1][m].v[j]),
                          pack2<BF16>(value[2][m].v[j], value[3][m].v[j]));
        if (next < w.end)
            load_values(value, d, w, next);
    }
    /* column n of product j of a panel is the panel's column 4 n + j */
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp * ROWS + r + 8 * h;
#pragma unroll
        for (int m = 0; m < 2 * PANELS; m++) {
            float4 x;
            x.x = mix[m / 2 * 4][2 * h + m % 2];
            x.y = mix[m / 2 * 4 + 1][2 * h + m % 2];
            x.z = mix[m / 2 * 4 + 2][2 * h + m % 2];
            x.w = mix[m / 2 * 4 + 3][2 * h + m % 2];
            *reinterpret_cast<float4 *>(mixes + row * LD + 32 * (m / 2) + 8 * q + 4 * (m % 2)) = x;
        }
        if (q == 0) {
            mosts[row] = most[h];
            totals[row] = total[h];
        }
    }
}

template <int D, bool BF16> static __device__ __forceinline__ void decode_narrow(const decoding &d)
{
    __shared__ __align__(16) float mixes[WARPS * ROWS * (D + 4)];
    __shared__ uint4 query[D / 16][32];
    __shared__ float mosts[WARPS * ROWS], totals[WARPS * ROWS];
    run_of_keys w;
    if (!find_run(d, ROWS, w))
        return;
    decode_strips<D, BF16>(d, w, query, mixes, mosts, totals);
    put_run(d, w, mixes, mosts, totals, ROWS, D + 4);
}

GLM_TILE_KERNEL(128, 2) k_attention_decode_f16_64(decoding d) { decode_narrow<64, false>(d); }
GLM_TILE_KERNEL(128, 2) k_attention_decode_f16_128(decoding d) { decode_narrow<128, false>(d); }
GLM_TILE_KERNEL(128, 2) k_attention_decode_bf16_64(decoding d) { decode_narrow<64, true>(d); }
GLM_TILE_KERNEL(128, 2) k_attention_decode_bf16_128(decoding d) { decode_narrow<128, true>(d); }

/* ---- float */

/* Each lane gives half of its first 2 N numbers away and adds what it gets to the other half, and so
 * on: what is left to lane l is the sum over the warp of number l / (32 / R). */
template <int R, int N> static __device__ __forceinline__ void share_sums(float (&v)[R])
{
    const int away = 32 * N / R;
    const bool upper = threadIdx.x & away;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float give = upper ? v[i] : v[i + N], keep = upper ? v[i + N] : v[i];
        v[i] = keep + __shfl_xor_sync(0xffffffffu, give, away);
    }
    if constexpr (N > 1)
        share_sums<R, N / 2>(v);
}

template <int R> static __device__ __forceinline__ float sums_of_rows(float (&v)[R])
{
    share_sums<R, R / 2>(v);
    return lanes_sum<32 / R>(v[0]);
}

/* R heads of up to 128 C columns; a warp takes four keys at a time. */
template <int R, int C, bool WHOLE>
static __device__ __forceinline__ void decode_floats(const decoding &d, const run_of_keys &w,
                                                     float *mixes, float *mosts, float *totals)
{
    const int KEYS = C == 1 ? 4 : 2, LD = 128 * C;
    const attention &a = d.a;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    f4 query[R][C], mix[R][C];
    float most = -GLM_INFINITY, total = 0; /* of row lane / (32 / R) */
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) {
            query[r][c] =
                quad<WHOLE>(head_query(a, w, min(r, w.heads - 1)), 4 * (lane + 32 * c), HD);
#pragma unroll
            for (int j = 0; j < 4; j++)
                mix[r][c].v[j] = 0;
        }
    for (int k0 = w.from + KEYS * warp; k0 < w.end; k0 += KEYS * WARPS) {
        f4 key[KEYS][C], value[KEYS][C];
        float score[KEYS], top = most;
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const pair_of kv = key_of(a, w.s, w.g, min(k0 + n, w.end - 1));
#pragma unroll
            for (int c = 0; c < C; c++) {
                key[n][c] = quad<WHOLE>(kv.k, 4 * (lane + 32 * c), HD);
                value[n][c] = quad<WHOLE>(kv.v, 4 * (lane + 32 * c), HD);
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            float dot[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                dot[r] = 0;
#pragma unroll
                for (int c = 0; c < C; c++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        dot[r] += query[r][c].v[j] * key[n][c].v[j];
            }
            score[n] = sums_of_rows<R>(dot) * a.scale;
            score[n] = k0 + n < w.end ? score[n] : -GLM_INFINITY;
            top = fmaxf(top, score[n]);
        }
        const float shrink = top == most ? 1.0f : expf(most - top);
        most = top;
        total *= shrink;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float by = __shfl_sync(0xffffffffu, shrink, r * (32 / R));
#pragma unroll
            for (int c = 0; c < C; c++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mix[r][c].v[j] *= by;
        }
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const float mine = expf(score[n] - top); /* past the end: 0 */
            total += mine;
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float p = __shfl_sync(0xffffffffu, mine, r * (32 / R));
#pragma unroll
                for (int c = 0; c < C; c++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        mix[r][c].v[j] += p * value[n][c].v[j];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) {
            float4 x;
            x.x = mix[r][c].v[0], x.y = mix[r][c].v[1];
            x.z = mix[r][c].v[2], x.w = mix[r][c].v[3];
            *reinterpret_cast<float4 *>(mixes + (warp * R + r) * LD + 4 * (lane + 32 * c)) = x;
        }
    if (lane % (32 / R) == 0) {
        mosts[warp * R + lane / (32 / R)] = most;
        totals[warp * R + lane / (32 / R)] = total;
    }
}

template <int R, int C> static __device__ __forceinline__ void decode_wide(const decoding &d)
{
    __shared__ __align__(16) float mixes[WARPS * R * 128 * C];
    __shared__ float mosts[WARPS * R], totals[WARPS * R];
    run_of_keys w;
    if (!find_run(d, R, w))
        return;
    if (d.whole)
        decode_floats<R, C, true>(d, w, mixes, mosts, totals);
    else
        decode_floats<R, C, false>(d, w, mixes, mosts, totals);
    put_run(d, w, mixes, mosts, totals, R, 128 * C);
}

GLM_TILE_KERNEL(128, 2) k_attention_decode_128(decoding d) { decode_wide<16, 1>(d); }
GLM_TILE_KERNEL(128, 2) k_attention_decode_256(decoding d) { decode_wide<8, 2>(d); }

/* ---- the runs of a token together: a block a token and head, its warps take runs in turn */

enum { JOIN = 8, PASSES = 4 }; /* warps, and runs of each at a time */

static __device__ __forceinline__ void load_mixes(float4 (&mix)[PASSES], const decoding &d,
                                                  size_t record, int first, int runs, int c)
{
#pragma unroll
    for (int n = 0; n < PASSES; n++) {
        const int run = first + n * JOIN;
        mix[n].x = mix[n].y = mix[n].z = mix[n].w = 0;
        if (run < runs && c < d.a.HD)
            mix[n] = at4(d.mixes + (record + run) * padded(d.a.HD) + c);
    }
}

GLM_KERNEL(256) k_attention_decode_join(decoding d)
{
    __shared__ __align__(16) float mixes[JOIN][256];
    const attention &a = d.a;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    const int h = blockIdx.x % a.NH, t = blockIdx.x / a.NH % d.tokens;
    const glm_segment s = a.segments[blockIdx.x / a.NH / d.tokens];
    let_next_begin();
    after_previous();
    if (s.count > GLM_DECODE_TOKENS || t >= s.count)
        return;
    const int runs = runs_of(seen_by(s, t));
    if (runs == 1)
        return;
    const size_t record = (size_t)blockIdx.x * d.runs;
    float4 mix[PASSES];
    float most[2], total[2], top = -GLM_INFINITY, sum = 0; /* runs lane and lane + 32 */
    load_mixes(mix, d, record, warp, runs, 4 * lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int run = lane + 32 * i;
        most[i] = -GLM_INFINITY, total[i] = 0;
        if (run < runs) {
            const float2 both = d.sums[record + run];
            most[i] = both.x, total[i] = both.y;
        }
        top = fmaxf(top, most[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        most[i] = most[i] == top ? 1.0f : expf(most[i] - top); /* its factor */
        sum += total[i] * most[i];
    }
    sum = warp_sum(sum);
    for (int c = 4 * lane; c < 4 * 64; c += 4 * 32) {
        float4 all;
        all.x = all.y = all.z = all.w = 0;
        for (int first = 0; first < runs; first += PASSES * JOIN) {
            if (first || c >= 4 * 32)
                load_mixes(mix, d, record, first + warp, runs, c);
#pragma unroll
            for (int n = 0; n < PASSES; n++)
                add4(all, __shfl_sync(0xffffffffu, first ? most[1] : most[0], warp + n * JOIN),
                     mix[n]);
        }
        *reinterpret_cast<float4 *>(&mixes[warp][c]) = all;
        if (HD <= 128)
            break;
    }
    __syncthreads();
    const size_t at = (size_t)(s.begin + t) * a.NH + h;
    const int c = threadIdx.x;
    if (c == 0)
        a.lse[at] = top + logf(sum);
    if (c >= HD)
        return;
    float x = 0;
#pragma unroll
    for (int i = 0; i < JOIN; i++)
        x += mixes[i][c];
    a.out[at * HD + c] = x * (1.0f / sum);
}

#ifdef GLM_HOST
static int on_grid(const void *p) { return (size_t)p % 16 == 0; }

void glm_cuda_attention_decode(struct cuda *cuda, const attention &a, struct glm_heads heads)
{
    const struct glm_decode cut = glm_decode_of(heads, a.n_segments);
    const int whole = a.HD % 4 == 0 && on_grid(a.qkv) && on_grid(a.cache_k) && on_grid(a.cache_v);
    const bool narrow = cuda->compute != GLM_F32 && a.HD <= 128 && whole;
    const int rows = narrow || a.HD <= 128 ? ROWS : ROWS / 2;
    const size_t tokens = (size_t)a.n_segments * cut.tokens;
    const size_t blocks = tokens * cut.runs * a.KVH * ceil_div(a.G, rows);
    decoding d = {a, NULL, NULL, cut.tokens, cut.runs, whole};
    if (cut.scratch) {
        d.mixes = (float *)glm_cuda_scratch(cuda, SCRATCH_A, cut.scratch);
        if (!d.mixes)
            return;
        d.sums = (float2 *)(d.mixes + tokens * a.NH * cut.runs * padded(a.HD));
    }
    if (heads.shortest > GLM_DECODE_TOKENS)
        return; /* there is nothing to do; the memory is for the tokens that follow */
    void (*const kernels[2][2])(decoding) = {
        {k_attention_decode_f16_64, k_attention_decode_f16_128},
        {k_attention_decode_bf16_64, k_attention_decode_bf16_128}};
    void (*const kernel)(decoding) = narrow        ? kernels[cuda->compute == GLM_BF16][a.HD > 64]
                                     : a.HD <= 128 ? k_attention_decode_128
                                                   : k_attention_decode_256;
    GLM_LAUNCH_AFTER(cuda, "attention_forward", kernel, blocks, 32 * WARPS, 0, d);
    if (cut.runs > 1)
        GLM_LAUNCH_AFTER(cuda, "attention_forward", k_attention_decode_join, tokens * a.NH, 256, 0,
                         d);
}
#endif
