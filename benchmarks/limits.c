/* What this machine can do at most, measured: `limits THREADS [SET]` prints one line of JSON. SET, an
 * instruction set as GLMLORA_ISA names them: as if the processor had no more.
 *
 * read_gb_s: reading memory that no cache holds, summed with vector loads. fma_gflop_s: float32
 * multiply-adds in registers. bf16_gflop_s, int8_gop_s: the dot products of 16-bit and 8-bit
 * numbers that the processor has (AVX-512 BF16, VNNI, else AVX2's or AVX-512's vpmaddubsw +
 * vpmaddwd); left out where it has none. Each is the median of several runs, as the figures beside it are: a
 * shared machine reaches its best for moments only. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { RUNS = 15, MAX_THREADS = 256 };
static const size_t READ_BYTES = (size_t)768 << 20; /* a thread */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef double (*work)(void *arg); /* returns operations or bytes done; the value is used up */

struct job {
    pthread_t thread;
    pthread_barrier_t *barrier;
    work fn;
    void *arg;
    double done, seconds;
};

static volatile float sink;

static void *run_job(void *p)
{
    struct job *j = p;
    pthread_barrier_wait(j->barrier);
    const double start = now();
    j->done = j->fn(j->arg);
    j->seconds = now() - start;
    return NULL;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median over RUNS of the rate of all threads: their work over the slowest one's time. */
static double rate(work fn, void **args, int threads)
{
    double rates[RUNS];
    for (int run = 0; run < RUNS; run++) {
        struct job jobs[MAX_THREADS];
        pthread_barrier_t barrier;
        pthread_barrier_init(&barrier, NULL, (unsigned)threads);
        for (int i = 0; i < threads; i++) {
            jobs[i] = (struct job){.barrier = &barrier, .fn = fn, .arg = args ? args[i] : NULL};
            if (pthread_create(&jobs[i].thread, NULL, run_job, &jobs[i]) != 0) {
                fprintf(stderr, "limits: no thread %d\n", i);
                exit(1);
            }
        }
        double done = 0, slowest = 0;
        for (int i = 0; i < threads; i++) {
            pthread_join(jobs[i].thread, NULL);
            done += jobs[i].done;
            slowest = jobs[i].seconds > slowest ? jobs[i].seconds : slowest;
        }
        pthread_barrier_destroy(&barrier);
        rates[run] = done / slowest;
    }
    qsort(rates, RUNS, sizeof *rates, compare);
    return rates[RUNS / 2];
}

typedef float v8 __attribute__((vector_size(32), aligned(4)));

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#else
#define AVX2
#endif

/* Four streams a quarter apart, as a matrix product reads its rows. */
AVX2 static double read_memory(void *arg)
{
    const float *p = arg;
    const size_t quarter = READ_BYTES / 16 - 1024; /* not a power of two apart */
    v8 s[4] = {{0}, {0}, {0}, {0}};
    for (size_t i = 0; i + 16 <= quarter; i += 16)
        for (int q = 0; q < 4; q++) {
            s[q] += *(const v8 *)(p + q * quarter + i);
            s[q] += *(const v8 *)(p + q * quarter + i + 8);
        }
    sink = s[0][0] + s[1][0] + s[2][0] + s[3][0];
    return (double)(4 * quarter * 4);
}

enum { LOOPS = 8000000 };

/* Without FMA, as the generic kernels: a product and a sum. */
static double multiply_and_add(void *arg)
{
    typedef float v4 __attribute__((vector_size(16)));
    v4 a[12], x = {1, 1, 1, 1}, y = x * 1e-9f;
    (void)arg;
    for (int j = 0; j < 12; j++)
        a[j] = x * (float)j;
    for (int i = 0; i < LOOPS; i++)
        for (int j = 0; j < 12; j++) {
            __asm__ volatile("" : "+m"(x)); /* not the same product again */
            a[j] += x * y;
        }
    float s = 0;
    for (int j = 0; j < 12; j++)
        s += a[j][0];
    sink = s;
    return 12.0 * 4 * 2 * LOOPS;
}

AVX2 static double multiply_add(void *arg)
{
    v8 a[12], x = {1, 1, 1, 1, 1, 1, 1, 1}, y = x * 1e-9f;
    (void)arg;
    for (int j = 0; j < 12; j++)
        a[j] = x * (float)j;
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+x"(x), "+x"(y));
        for (int j = 0; j < 12; j++)
            a[j] += x * y;
    }
    float s = 0;
    for (int j = 0; j < 12; j++)
        s += a[j][0];
    sink = s;
    return 12.0 * 8 * 2 * LOOPS;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static double multiply_add_512(void *arg)
{
    __m512 a[16], x = _mm512_set1_ps(1), y = _mm512_set1_ps(1e-9f);
    (void)arg;
    for (int j = 0; j < 16; j++)
        a[j] = _mm512_set1_ps((float)j);
    for (int i = 0; i < LOOPS; i++) {
        __asm__ volatile("" : "+v"(x), "+v"(y));
        for (int j = 0; j < 16; j++)
            a[j] = _mm512_fmadd_ps(x, y, a[j]);
    }
    __m512 s = a[0];
    for (int j = 1; j < 16; j++)
        s = _mm512_add_ps(s, a[j]);
    sink = _mm512_reduce_add_ps(s);
    return 16.0 * 16 * 2 * LOOPS;
}

/* LOOPS times twelve sums of one instruction that do not wait for one another, by assembly: gcc
 * copies such sums to other registers and back. */
#define ADD(instruction, sum) instruction " %12, %12, %" #sum "\n\t"
#define ADD_FOUR(instruction, a, b, c, d) \
    ADD(instruction, a) ADD(instruction, b) ADD(instruction, c) ADD(instruction, d)
#define DOTS(name, set, vector, instruction, terms)                                              \
    __attribute__((target(set))) static double name(void *arg)                                   \
    {                                                                                            \
        vector a = {0}, b = a, c = a, d = a, e = a, f = a, g = a, h = a, k = a, l = a, m = a;    \
        vector n = a, x = a;                                                                     \
        (void)arg;                                                                               \
        for (int i = 0; i < LOOPS; i++)                                                          \
            __asm__ volatile(ADD_FOUR(instruction, 0, 1, 2, 3) ADD_FOUR(instruction, 4, 5, 6, 7) \
                                 ADD_FOUR(instruction, 8, 9, 10, 11)                             \
                             : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g),    \
                               "+v"(h), "+v"(k), "+v"(l), "+v"(m), "+v"(n)                       \
                             : "v"(x));                                                          \
        return 12.0 * (terms) * 2 * LOOPS;                                                       \
    }

DOTS(dot_bf16, "avx512f,avx512bf16", __m512, "vdpbf16ps", 32)
DOTS(dot_int8_512, "avx512f,avx512vnni", __m512i, "vpdpbusd", 64)
DOTS(dot_int8_256_vnni, "avxvnni", __m256i, "%{vex%} vpdpbusd", 32)

__attribute__((target("avx2"))) static double dot_int8_256(void *arg)
{
    __m256i a[8], x = _mm256_set1_epi8(1), y = x, one = _mm256_set1_epi16(1);
    (void)arg;
    for (int j = 0; j < 8; j++)
        a[j] = _mm256_set1_epi32(j);
    for (int i = 0; i < LOOPS; i++) {
        for (int j = 0; j < 8; j++) {
            __asm__ volatile("" : "+x"(x), "+x"(y));
            a[j] = _mm256_add_epi32(a[j], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), one));
        }
    }
    __m256i s = a[0];
    for (int j = 1; j < 8; j++)
        s = _mm256_add_epi32(s, a[j]);
    sink = (float)_mm256_extract_epi32(s, 0);
    return 8.0 * 32 * 2 * LOOPS;
}

__attribute__((target("avx512f,avx512bw"))) static double dot_int8_512_pairs(void *arg)
{
    __m512i a[16], x = _mm512_set1_epi8(1), y = x, one = _mm512_set1_epi16(1);
    (void)arg;
    for (int j = 0; j < 16; j++)
        a[j] = _mm512_set1_epi32(j);
    for (int i = 0; i < LOOPS; i++) {
        for (int j = 0; j < 16; j++) {
            __asm__ volatile("" : "+v"(x), "+v"(y));
            a[j] = _mm512_add_epi32(a[j], _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), one));
        }
    }
    __m512i s = a[0];
    for (int j = 1; j < 16; j++)
        s = _mm512_add_epi32(s, a[j]);
    sink = (float)_mm512_reduce_add_epi32(s);
    return 16.0 * 64 * 2 * LOOPS;
}

/* Whether a set may be used: it is part of the one that is named. */
static int within(const char *set, const char *named)
{
    static const char *const parts[][6] = {
        {"generic"},
        {"avx2", "generic"},
        {"avxvnni", "avx2", "generic"},
        {"avx512", "avx2", "generic"},
        {"avx512vnni", "avx512", "avx2", "generic"},
        {"avx512bf16", "avx512vnni", "avx512", "avx2", "generic"},
        {"amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "generic"},
    };
    for (size_t i = 0; named && i < sizeof parts / sizeof *parts; i++)
        if (strcmp(parts[i][0], named) == 0) {
            for (int j = 0; j < 6 && parts[i][j]; j++)
                if (strcmp(parts[i][j], set) == 0)
                    return 1;
            return 0;
        }
    return 1;
}
#endif

int main(int argc, char **argv)
{
    const int threads = argc > 1 ? atoi(argv[1]) : 2;
    void *memory[MAX_THREADS];
    if (threads < 1 || threads > MAX_THREADS) {
        fprintf(stderr, "limits: expected 1 to %d threads, got '%s'\n", MAX_THREADS, argv[1]);
        return 2;
    }
    for (int i = 0; i < threads; i++) {
        memory[i] = malloc(READ_BYTES);
        if (!memory[i]) {
            fprintf(stderr, "limits: %zu bytes could not be taken\n", READ_BYTES);
            return 1;
        }
        memset(memory[i], 1, READ_BYTES);
    }
    printf("{\"threads\": %d, \"read_gb_s\": %.2f", threads,
           1e-9 * rate(read_memory, memory, threads));
    work fma = multiply_add;
#if defined(__x86_64__)
    const char *set = argc > 2 && *argv[2] ? argv[2] : NULL;
    work int8 = NULL, bf16 = NULL;
    if (!within("avx2", set) || !__builtin_cpu_supports("avx2"))
        fma = multiply_and_add;
    else
        int8 = dot_int8_256;
    if (within("avxvnni", set) && __builtin_cpu_supports("avxvnni"))
        int8 = dot_int8_256_vnni;
    if (within("avx512", set) && __builtin_cpu_supports("avx512bw")) {
        fma = multiply_add_512;
        int8 = dot_int8_512_pairs;
    }
    if (within("avx512vnni", set) && __builtin_cpu_supports("avx512vnni"))
        int8 = dot_int8_512;
    if (within("avx512bf16", set) && __builtin_cpu_supports("avx512bf16"))
        bf16 = dot_bf16;
    if (bf16)
        printf(", \"bf16_gflop_s\": %.1f", 1e-9 * rate(bf16, NULL, threads));
    if (int8)
        printf(", \"int8_gop_s\": %.1f", 1e-9 * rate(int8, NULL, threads));
#endif
    printf(", \"fma_gflop_s\": %.1f}\n", 1e-9 * rate(fma, NULL, threads));
    for (int i = 0; i < threads; i++)
        free(memory[i]);
    return 0;
}
