/* The next token of a row: its argmax, or one that is drawn. A block a row.
 *
 * A draw is three selections of one kind: the largest key such that the columns from it up weigh at
 * least so much. By score and count that is top_k, by score and mass top_p, and by column and mass
 * the draw itself. Each finds two bits of its key in one pass over the row; weights are integers,
 * so their sum has no order. */
#include "launch.cuh"

typedef unsigned long long wide;

/* Words that a thread of a draw has on their way (of the argmax: twice as many). One of 1,024 has
 * 64 registers, and code for capability 7.0 takes more of them. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
enum { DRAW_WORDS = 1 };
#else
enum { DRAW_WORDS = 4 };
#endif

/* A row is read by words of four columns, WORDS of a thread at a time: all of them are asked for
 * before the first is looked at. The last word of a row may be short. */
template <int WORDS>
static __device__ __forceinline__ void load_words(f4 (&x)[WORDS], const float *row, int v0, int V)
{
    const bool whole = ((size_t)row & 15) == 0;
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
        const int v = v0 + k * 4 * (int)blockDim.x;
        if (whole && v + 4 <= V) {
            const float4 q = *reinterpret_cast<const float4 *>(row + v);
            x[k].v[0] = q.x, x[k].v[1] = q.y, x[k].v[2] = q.z, x[k].v[3] = q.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (v + j < V)
                    x[k].v[j] = row[v + j];
        }
    }
}

/* ---- the first largest */

/* The better of two candidates: larger, or as large and before; an index below 0 beats all. */
static __device__ __forceinline__ void take_better(float *most, int *at, float x, int i)
{
    if (i < 0 || (*at >= 0 && (x > *most || (x == *most && i < *at))))
        *most = x, *at = i;
}

/* The best of a warp's candidates, for every lane. */
static __device__ __forceinline__ void warp_best(float *most, int *at)
{
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float x_o = __shfl_xor_sync(0xffffffffu, *most, o);
        const int at_o = __shfl_xor_sync(0xffffffffu, *at, o);
        take_better(most, at, x_o, at_o);
    }
}

/* Column of the first largest score, which is left in *most; V where all are -infinity. checked:
 * -1 where one is not finite. Every thread gets it; a call follows another after a barrier. A
 * thread only notes in which of its words the largest is: that word is read again at the end. */
static __device__ int argmax(const float *row, int V, bool checked, float *most)
{
    const int WORDS = 2 * DRAW_WORDS;
    __shared__ float mosts[32];
    __shared__ int places[32];
    const int lane = threadIdx.x & 31, step = 4 * blockDim.x;
    int at = V;
    float nan = 0; /* or 0: what is finite times 0 */
    *most = -GLM_INFINITY;
    for (int v0 = 4 * threadIdx.x; v0 < V; v0 += WORDS * step) {
        f4 x[WORDS];
        load_words(x, row, v0, V);
#pragma unroll
        for (int k = 0; k < WORDS; k++) {
            const int v = v0 + k * step;
            float top = -GLM_INFINITY;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (v + j < V) {
                    top = fmaxf(top, x[k].v[j]);
                    nan += x[k].v[j] * 0;
                }
            at = top > *most ? v : at;
            *most = fmaxf(*most, top);
        }
    }
    if (checked && !(nan == 0))
        at = -1;
    warp_best(most, &at);
    if (lane == 0) {
        mosts[threadIdx.x >> 5] = *most;
        places[threadIdx.x >> 5] = at;
    }
    __syncthreads();
    *most = lane < (int)(blockDim.x >> 5) ? mosts[lane] : -GLM_INFINITY;
    at = lane < (int)(blockDim.x >> 5) ? places[lane] : V;
    warp_best(most, &at);
    if (at >= 0 && at < V) {
        const f4 x = load4(row, at, V);
        at += x.v[0] == *most ? 0 : x.v[1] == *most ? 1 : x.v[2] == *most ? 2 : 3;
    }
    return at;
}

GLM_KERNEL(1024) k_argmax(int *id, const float *x, int V)
{
    float most;
    let_next_begin();
    after_previous();
    const int at = argmax(x + (size_t)blockIdx.x * V, V, true, &most);
    if (threadIdx.x == 0)
        id[blockIdx.x] = at;
}

/* ---- draws */

/* A row of scores whose columns stay while their (score, -column) is at least (least, -last).
 * listed: those that can stay are so many, on a list in any order; 0: it was not made. */
struct drawn_row {
    const float *x;
    int V, last;
    float top;
    unsigned least;
    int listed;
    const float *scores;
    const int *columns;
};

/* Bits that are ordered as the scores are. */
static __device__ __forceinline__ unsigned ordered(float score)
{
    const unsigned bits = (unsigned)__float_as_int(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* each(score, column) for this thread's columns of a row */
template <class F>
static __device__ __forceinline__ void over_row(const drawn_row &r, const F &each)
{
    const int WORDS = DRAW_WORDS;
    for (int v0 = 4 * threadIdx.x; v0 < r.V; v0 += WORDS * 4 * blockDim.x) {
        f4 x[WORDS];
        load_words(x, r.x, v0, r.V);
#pragma unroll
        for (int e = 0; e < 4 * WORDS; e++) {
            const int column = v0 + e / 4 * 4 * blockDim.x + e % 4;
            if (column < r.V)
                each(x[e / 4].v[e % 4], column);
        }
    }
}

static __device__ __forceinline__ wide mass_of(const drawn_row &r, float score)
{
    return (wide)(expf(score - r.top) * 1099511627776.0f);
}

enum measure { COUNT, MASS, EQUAL, COLUMN }; /* how a row is weighed */

/* found[i]: what the columns with keys from from + i * step on weigh, i = 0 .. 2. `turn` is another
 * one in every call: a barrier lies between two calls of the same. */
template <measure BY>
static __device__ void weigh(const drawn_row &r, unsigned from, unsigned step, int turn,
                             wide found[3])
{
    const int warps = blockDim.x >> 5;
    const int busy = r.listed ? min(warps, (r.listed + 31) / 32) : warps;
    __shared__ wide part[2][3][32];
    wide sum[3] = {0, 0, 0};
    const auto add = [&](float score, int column) {
        const unsigned place = ordered(score);
        const unsigned key = BY == COLUMN  ? (unsigned)column
                             : BY == EQUAL ? (unsigned)(r.V - 1 - column)
                                           : place;
        if (key < from || place < r.least || (place == r.least && column > r.last) ||
            (BY == EQUAL && place > r.least))
            return;
        const wide weight = BY == COUNT || BY == EQUAL ? 1 : mass_of(r, score);
        sum[0] += weight;
        sum[1] += key - from >= step ? weight : 0;
        sum[2] += key - from >= 2 * step ? weight : 0;
    };
    if (r.listed) {
        for (int i = threadIdx.x; i < r.listed; i += blockDim.x)
            add(r.scores[i], r.columns[i]);
    } else {
        over_row(r, add);
    }
    if ((int)(threadIdx.x >> 5) < busy) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
#pragma unroll
            for (int o = 16; o; o >>= 1)
                sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], o);
            if ((threadIdx.x & 31) == 0)
                part[turn & 1][i][threadIdx.x >> 5] = sum[i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 3; i++) {
        found[i] = 0;
        for (int w = 0; w < busy; w++)
            found[i] += part[turn & 1][i][w];
    }
}

/* The largest key of `bits` bits, an even number, from which on the columns weigh `need`. */
template <measure BY>
static __device__ unsigned descend(const drawn_row &r, int bits, wide need, int *turn)
{
    unsigned place = 0;
#pragma unroll 1
    for (int shift = bits - 2; shift >= 0; shift -= 2) {
        wide found[3];
        weigh<BY>(r, place + (1u << shift), 1u << shift, (*turn)++, found);
        place += (unsigned)((found[0] >= need) + (found[1] >= need) + (found[2] >= need)) << shift;
    }
    return place;
}

/* ---- Most draws end among few columns near the largest. They are listed, and only the list is gone
 * over again and again; where it would not hold all that can stay, the row is. */

enum { LISTED = 1024, CUTS = 3 };

static __device__ __forceinline__ float cut_of(float top, int i)
{
    return top - (i == 0 ? 3.0f : i == 1 ? 6.0f : 12.0f);
}

/* Scores by their temperature, in place. Returns the mass of all; mass and number of the columns at
 * each cut and above. */
static __device__ wide survey(float *row, float temperature, const drawn_row &r, wide (&mass)[CUTS],
                              int (&number)[CUTS])
{
    const int WORDS = DRAW_WORDS, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    __shared__ wide masses[CUTS + 1][32];
    __shared__ int numbers[CUTS][32];
    wide sum[CUTS + 1] = {0, 0, 0, 0};
    int count[CUTS] = {0, 0, 0};
    for (int v0 = 4 * threadIdx.x; v0 < r.V; v0 += WORDS * 4 * blockDim.x) {
        f4 x[WORDS];
        load_words(x, row, v0, r.V);
#pragma unroll
        for (int k = 0; k < WORDS; k++) {
            const int v = v0 + k * 4 * blockDim.x;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[k].v[j] = x[k].v[j] / temperature + 0.0f; /* -0 as 0 */
                if (v + j >= r.V)
                    continue;
                const wide weight = mass_of(r, x[k].v[j]);
                sum[CUTS] += weight;
#pragma unroll
                for (int i = 0; i < CUTS; i++)
                    if (x[k].v[j] >= cut_of(r.top, i))
                        sum[i] += weight, count[i]++;
            }
            if (v < r.V)
                store4(row, v, r.V, x[k]);
        }
    }
#pragma unroll
    for (int i = 0; i <= CUTS; i++) {
#pragma unroll
        for (int o = 16; o; o >>= 1)
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], o);
        if (lane == 0)
            masses[i][threadIdx.x >> 5] = sum[i];
    }
#pragma unroll
    for (int i = 0; i < CUTS; i++) {
#pragma unroll
        for (int o = 16; o; o >>= 1)
            count[i] += __shfl_xor_sync(0xffffffffu, count[i], o);
        if (lane == 0)
            numbers[i][threadIdx.x >> 5] = count[i];
    }
    __syncthreads();
    wide total = 0;
#pragma unroll
    for (int i = 0; i < CUTS; i++)
        mass[i] = 0, number[i] = 0;
    for (int w = 0; w < warps; w++) {
        total += masses[CUTS][w];
#pragma unroll
        for (int i = 0; i < CUTS; i++)
            mass[i] += masses[i][w], number[i] += numbers[i][w];
    }
    return total;
}

/* The columns whose scores are at least `cut`. A thread looks at those that it has scaled. */
static __device__ void list(drawn_row &r, float cut, int number)
{
    __shared__ float scores[LISTED];
    __shared__ int columns[LISTED], next;
    if (threadIdx.x == 0)
        next = 0;
    __syncthreads();
    over_row(r, [&](float score, int column) {
        if (score >= cut) {
            const int at = atomicAdd(&next, 1);
            GLM_EXPECT(at < LISTED);
            scores[at] = score;
            columns[at] = column;
        }
    });
    __syncthreads();
    r.listed = number;
    r.scores = scores;
    r.columns = columns;
}

/* Mass that top_p asks for. */
static __device__ __forceinline__ wide needed(double top_p, wide total)
{
    const wide rest = (wide)((1 - top_p) * (double)total);
    return rest < total ? total - rest : 1;
}

/* column_bits: an even number that holds a column */
static __device__ int draw(float *row, drawn_row &r, const glm_choice &c, int column_bits)
{
    int turn = 0, number[CUTS];
    wide found[3], mass[CUTS], total = survey(row, c.temperature, r, mass, number);
    const bool few = c.top_k > 0 && c.top_k < r.V;
#pragma unroll
    for (int i = 0; i < CUTS; i++) {
        const bool enough =
            few ? number[i] >= c.top_k : c.top_p < 1 && mass[i] >= needed(c.top_p, total);
        if (enough && number[i] <= LISTED) {
            list(r, cut_of(r.top, i), number[i]);
            break;
        }
    }
    if (few) {
        r.least = descend<COUNT>(r, 32, (wide)c.top_k, &turn);
        weigh<MASS>(r, 0, 1, turn++, found);
        total = found[0];
    }
    if (c.top_p < 1) {
        const wide need = needed(c.top_p, total);
        r.least = descend<MASS>(r, 32, need, &turn);
        weigh<MASS>(r, r.least, 1, turn++, found);
        total = found[0];
        const unsigned bits = r.least >> 31 ? r.least & 0x7fffffffu : ~r.least;
        const wide each = mass_of(r, __int_as_float((int)bits));
        const wide equal = (need - found[1] + each - 1) / each; /* columns at the least that stay */
        if (found[1] + equal * each < total) {
            r.last = r.V - 1 - (int)descend<EQUAL>(r, column_bits, equal, &turn);
            total = found[1] + equal * each;
        }
    }
    const words random =
        philox(c.index, c.stream, 0x73616d70u, 0, (unsigned)c.seed, (unsigned)(c.seed >> 32));
    const double u = (random.w[0] + 0.5) / 4294967296.0;
    return (int)descend<COLUMN>(r, column_bits, total - (wide)(u * (double)total), &turn);
}

GLM_KERNEL(1024)
k_choose(int *id, float *x, int V, int column_bits, const glm_choice *choices, const int *touched)
{
    const glm_choice c = choices[blockIdx.x];
    float *row = x + (size_t)blockIdx.x * V;
    float most;
    let_next_begin();
    after_previous();
    int at = argmax(row, V, true, &most);
    __syncthreads(); /* its readers of the row */
    if (at >= 0 && c.penalised + c.banned) {
        touched += c.first;
        for (int i = threadIdx.x; i < c.penalised; i += blockDim.x) {
            const float score = row[touched[i]];
            row[touched[i]] = score < 0 ? score * c.penalty : score / c.penalty;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < c.banned; i += blockDim.x)
            row[touched[c.penalised + i]] = -GLM_INFINITY;
        __syncthreads();
        at = argmax(row, V, false, &most);
        __syncthreads(); /* its readers of the row */
        at = most - most == 0 ? at : -2;
    }
    drawn_row r = {row, V, V, most / c.temperature + 0.0f, 0, 0, NULL, NULL};
    if (at >= 0 && c.temperature != 0 && r.top - r.top == 0) {
        at = draw(row, r, c, column_bits);
    }
    if (threadIdx.x == 0)
        id[blockIdx.x] = at;
}

#ifdef GLM_HOST
extern "C" void glm_cuda_choose(void *cx, int32_t *id, void *x, int M, int V,
                                const struct glm_choice *choices, const int32_t *touched)
{
    struct cuda *cuda = cuda_of(cx);
    const int threads = V > 4096 ? 1024 : V > 512 ? 256 : 64;
    int column_bits = 2;
    while (column_bits < 32 && (V - 1) >> column_bits)
        column_bits += 2;
    if (!glm_cuda_begin(cuda))
        return;
    if (choices)
        GLM_LAUNCH_AFTER(cuda, "choose", k_choose, M, threads, 0, id, (float *)x, V, column_bits,
                         choices, touched);
    else
        GLM_LAUNCH_AFTER(cuda, "choose", k_argmax, M, threads, 0, id, (const float *)x, V);
}
#endif
