/* The CPU backend: its memory and life, and which instruction set's ops (kernels_tmpl.h) it has. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "platform.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Large blocks lie on huge pages where the system has them: fewer faults when they are first
 * written, fewer misses of address translation when they are walked. */
static void *cpu_alloc(struct glm_backend *be, size_t bytes)
{
    const size_t slack = 64, large = (size_t)8 << 20;
    __atomic_fetch_add(&be->allocated, 1, __ATOMIC_RELAXED); /* callers of several threads */
    if (bytes > SIZE_MAX / 2)
        return NULL;
    return bytes < large ? aligned_alloc(64, (bytes + 63) / 64 * 64 + slack)
                         : glm_aligned(bytes + slack);
}
static void cpu_free(struct glm_backend *be, void *p)
{
    (void)be;
    free(p);
}
static void cpu_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    (void)be;
    if (bytes)
        memcpy(to, from, bytes);
}
static void cpu_zero(struct glm_backend *be, void *p, size_t bytes)
{
    (void)be;
    if (bytes)
        memset(p, 0, bytes);
}
static struct glm_pool *pool_of(struct glm_backend *be) { return ((struct cpu *)be->cx)->pool; }
static void cpu_set_threads(struct glm_backend *be, int threads)
{
    glm_pool_set_threads(pool_of(be), threads);
}
static int cpu_threads(struct glm_backend *be) { return glm_pool_threads(pool_of(be)); }
static void cpu_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg)
{
    glm_pool_set_poll(pool_of(be), poll, arg);
}
static int cpu_stopped(struct glm_backend *be) { return glm_pool_stopped(pool_of(be)); }
static void cpu_destroy(struct glm_backend *be)
{
    struct cpu *cpu = be->cx;
    glm_pool_destroy(cpu->pool);
    free(cpu->packed);
    free(cpu);
}

/* Which kernels this processor runs and the system keeps the registers of, asked of both directly:
 * __builtin_cpu_supports asks the compiler's runtime library, which says "none" where zig links. */
#if defined(__x86_64__)
enum register_file { YMM = 0x06, ZMM = 0xe6, TILES = 0x600e6 }; /* bits of XCR0 */

static int saved(enum register_file registers)
{
    unsigned a, b, c, d, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(high) : "c"(0));
    return (a & registers) == registers;
}

enum answer { EAX, EBX, ECX, EDX };

static int has(unsigned leaf, unsigned subleaf, enum answer which, unsigned bits)
{
    unsigned r[4];
    return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) &&
           (r[which] & bits) == bits;
}

static int runs_avx2(void)
{
    return saved(YMM) && has(1, 0, ECX, bit_FMA | bit_F16C) && has(7, 0, EBX, bit_AVX2);
}

static int runs_avx512(void)
{
    return runs_avx2() && saved(ZMM) &&
           has(7, 0, EBX, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ);
}

static int runs_avxvnni(void)
{
    const unsigned avxvnni = 1u << 4;
    return runs_avx2() && has(7, 1, EAX, avxvnni);
}

static int runs_avx512vnni(void) { return runs_avx512() && has(7, 0, ECX, bit_AVX512VNNI); }

static int runs_avx512bf16(void)
{
    return runs_avx512vnni() && has(7, 0, ECX, bit_AVX512VBMI) && has(7, 1, EAX, bit_AVX512BF16);
}

static int runs_amx(void)
{
#ifdef TILES_EMULATED /* tests/portable/tiles.h */
    return runs_avx512bf16();
#else
    const unsigned tiles = 1u << 24, of_bytes = 1u << 25;
    return runs_avx512bf16() && saved(TILES) && has(7, 0, EDX, tiles | of_bytes) &&
           glm_may_use_tiles();
#endif
}
#elif defined(__aarch64__)
static int runs_neon(void) { return 1; }

static int has(unsigned features) { return (glm_arm_features() & features) == features; }

static int runs_neon_dotprod(void) { return has(GLM_ARM_DOTPROD); }
static int runs_neon_i8mm(void) { return has(GLM_ARM_DOTPROD | GLM_ARM_I8MM); }
static int runs_neon_bf16(void) { return has(GLM_ARM_DOTPROD | GLM_ARM_I8MM | GLM_ARM_BF16); }
#endif

static int runs_generic(void) { return 1; }

static const struct isa {
    const char *name;
    const struct glm_ops *ops;
    int (*runs)(void);
    int bfloat16; /* multiplies in it as well; in float32, int16 and int8 all do */
} isas[] = {
#if defined(__x86_64__)
    {"amx", &glm_cpu_ops_amx, runs_amx, 1},
    {"avx512bf16", &glm_cpu_ops_avx512bf16, runs_avx512bf16, 1},
    {"avx512vnni", &glm_cpu_ops_avx512vnni, runs_avx512vnni, 0},
    {"avx512", &glm_cpu_ops_avx512, runs_avx512, 0},
    {"avxvnni", &glm_cpu_ops_avxvnni, runs_avxvnni, 0},
    {"avx2", &glm_cpu_ops_avx2, runs_avx2, 0},
#elif defined(__aarch64__)
    {"neon_bf16", &glm_cpu_ops_neon_bf16, runs_neon_bf16, 1},
    {"neon_i8mm", &glm_cpu_ops_neon_i8mm, runs_neon_i8mm, 0},
    {"neon_dotprod", &glm_cpu_ops_neon_dotprod, runs_neon_dotprod, 0},
    {"neon", &glm_cpu_ops_neon, runs_neon, 0},
#endif
    {"generic", &glm_cpu_ops_generic, runs_generic, 0},
};

enum { N_ISAS = sizeof isas / sizeof isas[0] };

int glm_cpu_variant(int i, struct glm_cpu_variant *out)
{
    if (i < 0 || i >= N_ISAS)
        return 0;
    *out = (struct glm_cpu_variant){isas[i].name, isas[i].ops != NULL, isas[i].runs()};
    return 1;
}

const char *glm_cpu_variants(char out[64])
{
    struct glm_cpu_variant set;
    *out = 0;
    for (int i = 0; glm_cpu_variant(i, &set); i++)
        if (set.compiled && set.runs)
            snprintf(out + strlen(out), 64 - strlen(out), "%s%s", *out ? "," : "", set.name);
    return out;
}

/* NULL: there is none of that name in this build, or this processor does not run it. */
static const struct isa *isa_of(const char *name, size_t length)
{
    for (int i = 0; i < N_ISAS; i++)
        if (strlen(isas[i].name) == length && strncmp(isas[i].name, name, length) == 0)
            return isas[i].ops && isas[i].runs() ? &isas[i] : NULL;
    return NULL;
}

glm_status glm_cpu_create(struct glm_backend **out, const char *name, struct glm_error *err)
{
    char sets[64];
    const char *from = name[3] == ':' ? name + 4 : "", *type = strchr(name, '/');
    const struct isa *isa = isa_of(from, type ? (size_t)(type - from) : strlen(from));
    if (!isa)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': this processor runs %s of what this build has", name,
                        glm_cpu_variants(sets));
    const int words = type && strcmp(type, "/int16") == 0;
    const enum glm_dtype compute = !type || words || strcmp(type, "/float32") == 0 ? GLM_F32
                                   : strcmp(type, "/bfloat16") == 0                ? GLM_BF16
                                   : strcmp(type, "/int8") == 0                    ? GLM_I8
                                                                                   : GLM_F64;
    if (compute == GLM_F64)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': expected /float32, /bfloat16, /int16 or /int8", name);
    if (compute == GLM_BF16 && !isa->bfloat16)
        return glm_fail(
            err, GLM_EVALUE,
            "backend '%s': these kernels multiply in float32, int16 and int8; bfloat16 needs "
            "avx512bf16, this processor runs %s",
            name, glm_cpu_variants(sets));
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu) {
        cpu->pool = glm_pool_create();
        cpu->packed = glm_aligned(PACKED);
    }
    if (!cpu || !cpu->pool || !cpu->packed) {
        if (cpu) {
            glm_pool_destroy(cpu->pool);
            free(cpu->packed);
        }
        free(cpu);
        return glm_fail(err, GLM_EMEMORY, "cpu backend: %zu bytes could not be taken",
                        sizeof *cpu + GLM_SCRATCH + PACKED);
    }
    cpu->compute = compute;
    cpu->words = words;
    snprintf(cpu->name, sizeof cpu->name, "%s", name);
    cpu->be = (struct glm_backend){
        .name = cpu->name,
        .ops = isa->ops,
        .cx = cpu,
        .real_size = 4,
        .real = GLM_F32,
        .kept_h = compute == GLM_F32 ? GLM_F32 : GLM_BF16,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .upload = cpu_copy,
        .download = cpu_copy,
        .copy = cpu_copy,
        .zero = cpu_zero,
        .set_threads = cpu_set_threads,
        .threads = cpu_threads,
        .set_poll = cpu_set_poll,
        .stopped = cpu_stopped,
        .destroy = cpu_destroy,
    };
    *out = &cpu->be;
    return GLM_OK;
}
