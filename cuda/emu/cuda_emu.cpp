// cuda_emu.cpp - the emulator's runtime: fibers, device memory with shadow state, streams, cuBLAS
// subset. Built WITHOUT instrumentation. Checks work through the __tsan_* entry points that
// `-fsanitize=thread` makes the compiler call in the kernels' library; no sanitizer runtime is
// linked.
#include "cuda_emu.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
typedef uint8_t u8;
typedef uint64_t u64;
static emu_stats S;
static int g_dry, g_lazy, g_protect;
static unsigned g_seed;
static int g_limit_kb = 227;              // sm_90 opt-in
static bool in_dev, in_kernel, g_checked; // g_checked: the kernels' library is instrumented
static const char *g_kname = "host";
static cudaError_t g_last;
static std::map<std::string, u64> g_seen;
static std::string g_report; // the last one
static std::map<std::string, u64> g_launches;
emu_fiber *emu_cur;
uint3 emu_bid;
dim3 emu_bdim, emu_gdim;
static void report(void *pc, const char *fmt, ...)
{
    char m[512], where[256] = "";
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(m, sizeof m, fmt, ap);
    va_end(ap);
    Dl_info di{};
    if (pc && dladdr(pc, &di) && di.dli_fname)
        snprintf(where, sizeof where, " at %s+0x%zx", di.dli_fname,
                 (size_t)((u8 *)pc - (u8 *)di.dli_fbase));
    S.errors++;
    g_report = std::string(m) + " [" + g_kname + where + "]";
    std::string key = std::string(g_kname) + where + std::string(m).substr(0, 30);
    if (g_seen[key]++)
        return;
    if (in_kernel && emu_cur)
        fprintf(stderr, "EMU: %s [%s block %u,%u,%u thread %u%s]\n", m, g_kname, emu_bid.x,
                emu_bid.y, emu_bid.z, emu_cur->tid, where);
    else
        fprintf(stderr, "EMU: %s [host code%s]\n", m, where);
    if (getenv("EMU_ABORT"))
        abort();
}
// ---------------------------------------------------------------- memory regions and shadow
struct Region {
    u8 *base = nullptr, *init = nullptr;
    size_t size = 0, limit = 0;
    u64 *w = nullptr, *r1 = nullptr, *r2 = nullptr;
};
static Region dev, dyn, sta;
static const size_t DYN = 256 << 10;
struct Alloc {
    size_t size;
    int device;
};
static std::map<u8 *, Alloc> allocs;
static u8 *bump;
static std::multimap<size_t, u8 *> freed;
static u8 *lastA, *lastE;
static size_t dev_cap;
// Devices, of EMU_DEVICES those that CUDA_VISIBLE_DEVICES lists: the one of this thread, those that
// were made current by someone, the one whose work runs (-1: none). Memory, streams and cuBLAS
// belong to one.
static thread_local int g_device;
static unsigned g_contexts;
static int g_on = -1;
static std::vector<int> &devices()
{
    static std::vector<int> found;
    if (found.size())
        return found;
    const char *all = getenv("EMU_DEVICES"), *some = getenv("CUDA_VISIBLE_DEVICES");
    const int n = all ? atoi(all) : 1;
    for (int i = 0; !(all && some) && i < n; i++)
        found.push_back(i);
    for (char *end; all && some && *some; some = end + (*end == ',')) {
        const int i = (int)strtol(some, &end, 10);
        if (end == some || i < 0 || i >= n)
            break;
        found.push_back(i);
    }
    return found;
}
static void *vmap(size_t n)
{
    void *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) {
        perror("emu mmap");
        abort();
    }
    return p;
}
static void shadow(Region &r, size_t n)
{
    r.size = n;
    r.init = (u8 *)vmap(n);
    r.w = (u64 *)vmap(n * 8);
    r.r1 = (u64 *)vmap(n * 8);
    r.r2 = (u64 *)vmap(n * 8);
}
// Who touched what last is told by launch numbers of 14 bits: when they begin again, what earlier
// launches left would look like the present ones'.
static void forget_accesses(const Region &r)
{
    for (u64 *stamps : {r.w, r.r1, r.r2})
        if (stamps)
            madvise(stamps, r.size * 8, MADV_DONTNEED);
}
static void clear_shadow(Region &r, size_t n)
{
    if (!r.size || !n || !g_checked)
        return;
    memset(r.init, 0, n);
    memset(r.w, 0, n * 8);
    memset(r.r1, 0, n * 8);
    memset(r.r2, 0, n * 8);
}
static void segv(int, siginfo_t *si, void *)
{
    fprintf(stderr, "EMU: fault at %p (%s) in %s block %u,%u,%u thread %u\n", si->si_addr,
            (u8 *)si->si_addr >= dev.base && (u8 *)si->si_addr < dev.base + dev_cap
                ? "device pointer used by host code, or unmapped"
                : "bad address",
            g_kname, emu_bid.x, emu_bid.y, emu_bid.z, emu_cur ? emu_cur->tid : 0);
    _exit(139);
}
static void boot()
{
    if (dev.base)
        return;
    dev_cap = g_dry ? (size_t)96 << 30 : (size_t)2 << 30;
    dev.base = (u8 *)vmap(dev_cap);
    bump = dev.base + 4096;
    if (!g_dry)
        shadow(dev, dev_cap);
    else
        dev.size = dev_cap;
    dyn.base = (u8 *)vmap(DYN);
    shadow(dyn, DYN);
    if (const char *e = getenv("EMU_SMEM_KB"))
        g_limit_kb = atoi(e);
    if (const char *e = getenv("EMU_SEED"))
        g_seed = (unsigned)atoi(e);
    g_lazy |= getenv("EMU_LAZY") != nullptr;
    g_protect |= getenv("EMU_PROTECT") != nullptr;
    static u8 alt[65536];
    stack_t ss{};
    ss.ss_sp = alt;
    ss.ss_size = sizeof alt;
    sigaltstack(&ss, nullptr);
    struct sigaction sa{};
    sa.sa_sigaction = segv;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &sa, nullptr);
    sigaction(SIGBUS, &sa, nullptr);
}
static void guard(bool open)
{ // device window closed while host code runs
    if (g_protect && bump)
        mprotect(dev.base, (bump - dev.base + 8191) & ~4095ull,
                 open ? PROT_READ | PROT_WRITE : PROT_NONE);
}
struct Open {
    bool was;
    Open() : was(in_dev)
    {
        if (!was)
            guard(true);
        in_dev = true;
    }
    ~Open()
    {
        in_dev = was;
        if (!was)
            guard(false);
    }
};
static bool in_alloc(u8 *p, size_t n)
{
    if (p >= lastA && p + n <= lastE)
        return true;
    auto it = allocs.upper_bound(p);
    if (it == allocs.begin())
        return false;
    --it;
    if (p + n > it->first + it->second.size)
        return false;
    if (g_on >= 0 && it->second.device != g_on)
        report(nullptr, "memory of device %d used by device %d", it->second.device, g_on);
    lastA = it->first;
    lastE = it->first + it->second.size;
    return true;
}
static bool is_dev(const void *p)
{
    return dev.base && (u8 *)p >= dev.base && (u8 *)p < dev.base + dev_cap;
}
// whole-range check for copies and GEMM operands: in bounds, initialised if read, marked if written
static bool range(const void *vp, size_t n, bool rd, bool wr, const char *what)
{
    u8 *p = (u8 *)vp;
    if (!n)
        return true;
    if (!is_dev(p)) {
        report(nullptr, "%s: not a device pointer: %p", what, vp);
        return false;
    }
    if (!in_alloc(p, n)) {
        report(nullptr, "%s: %zu bytes run outside the allocation", what, n);
        return false;
    }
    if (g_dry || !g_checked)
        return true;
    size_t o = p - dev.base;
    if (rd && memchr(dev.init + o, 0, n))
        report(nullptr, "%s: reads uninitialised device memory", what);
    if (wr)
        memset(dev.init + o, 1, n);
    return true;
}
// ---------------------------------------------------------------- fibers
enum { READY, WAIT_BLOCK, WAIT_WARP, DONE };
static const int MAXT = 1024;
static const size_t STK = 96 << 10;
static emu_fiber *F;
static u8 *stacks;
static std::function<void()> *body;
static void *main_sp;
static int nthr, ndone, nblockwait, fifo[2 * MAXT], fh, ft;
static unsigned lcg = 1, g_launch;
static u64 g_barriers; // of this launch
static size_t g_dyn;
extern "C" void emu_switch(void **save, void *to);
asm(".globl emu_switch\nemu_switch:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n "
    "push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop "
    "%rbp\n ret\n");
static inline unsigned rnd()
{
    lcg = lcg * 1664525u + 1013904223u;
    return lcg >> 8;
}
static inline void push(int i)
{
    F[i].state = READY;
    fifo[ft] = i;
    ft = ft + 1 == 2 * MAXT ? 0 : ft + 1;
}
static void shuffle(int *a, int n)
{
    if (g_seed)
        for (int i = n - 1; i > 0; i--)
            std::swap(a[i], a[rnd() % (i + 1)]);
}
static void deadlock()
{
    std::map<std::string, int> w;
    for (int i = 0; i < nthr; i++)
        if (F[i].state != DONE)
            w[std::string(F[i].state == WAIT_BLOCK ? "__syncthreads " : "warp op ") +
              (F[i].file ? F[i].file : "?") + ":" + std::to_string(F[i].line)]++;
    for (auto &k : w)
        report(nullptr, "deadlock: %d threads wait at %s", k.second, k.first.c_str());
}
static void next()
{ // leave the current fiber for whatever is runnable
    emu_fiber *me = emu_cur;
    S.switches++;
    if (fh == ft) {
        if (ndone < nthr)
            deadlock();
        void *d;
        emu_switch(me ? &me->sp : &d, main_sp);
        return;
    }
    int i = fifo[fh];
    fh = fh + 1 == 2 * MAXT ? 0 : fh + 1;
    emu_cur = &F[i];
    if (emu_cur != me)
        emu_switch(&me->sp, F[i].sp);
}
// Copies on their way, of each thread of the block: oldest first, with the group they belong to.
struct Copy {
    void *to;
    uint4 bytes;
    unsigned group;
};
struct Copies {
    std::deque<Copy> waiting;
    unsigned groups = 0; // committed so far
};
static std::vector<Copies> copies(MAXT);
void emu_copy(void *to, const uint4 &bytes)
{
    Copies &c = copies[emu_cur->tid];
    c.waiting.push_back({to, bytes, c.groups});
}
void emu_copies_commit() { copies[emu_cur->tid].groups++; }
void *emu_copy_landed(int n, uint4 *bytes)
{
    Copies &c = copies[emu_cur->tid];
    if (c.waiting.empty() || c.waiting.front().group + n >= c.groups)
        return nullptr;
    void *to = c.waiting.front().to;
    *bytes = c.waiting.front().bytes;
    c.waiting.pop_front();
    return to;
}
static void entry()
{
    for (;;) {
        (*body)();
        Copies &c = copies[emu_cur->tid];
        if (!c.waiting.empty())
            report(nullptr, "returned with %zu copies that nobody waited for", c.waiting.size());
        c.waiting.clear();
        c.groups = 0;
        emu_cur->state = DONE;
        ndone++;
        if (nblockwait && nblockwait + ndone == nthr) {
            report(nullptr, "%d threads returned while %d wait at __syncthreads", ndone,
                   nblockwait);
        }
        next();
    }
}
static void run_block()
{
    ndone = nblockwait = fh = ft = 0;
    int nw = (nthr + 31) / 32;
    static int wo[32], lo[32];
    for (int w = 0; w < nw; w++)
        wo[w] = w;
    shuffle(wo, nw);
    for (int w = 0; w < nw; w++) {
        int n = 0;
        for (int l = 0; l < 32 && wo[w] * 32 + l < nthr; l++)
            lo[n++] = wo[w] * 32 + l;
        shuffle(lo, n);
        for (int k = 0; k < n; k++) {
            emu_fiber &f = F[lo[k]];
            unsigned id = f.tid = lo[k];
            f.bep = f.wep = 1;
            f.dev = 0;
            f.file = nullptr;
            f.t = {id % emu_bdim.x, id / emu_bdim.x % emu_bdim.y, id / (emu_bdim.x * emu_bdim.y)};
            void **sp = (void **)(f.stack + STK - 64);
            *--sp = nullptr;
            *--sp = (void *)entry;
            for (int r = 0; r < 6; r++)
                *--sp = nullptr;
            f.sp = sp;
            push(lo[k]);
        }
    }
    int i = fifo[fh++];
    emu_cur = &F[i];
    emu_switch(&main_sp, F[i].sp);
    emu_cur = nullptr;
}
void emu_syncthreads(const char *f, int l, int site)
{
    emu_fiber *me = emu_cur;
    me->file = f;
    me->line = l;
    me->site = site;
    if (ndone)
        report(nullptr, "%s:%d __syncthreads after %d threads returned", f, l, ndone);
    if (++nblockwait < nthr - ndone) {
        me->state = WAIT_BLOCK;
        next();
        return;
    }
    static int o[MAXT];
    int n = 0;
    nblockwait = 0;
    g_barriers++;
    for (int i = 0; i < nthr; i++)
        if (F[i].state == WAIT_BLOCK || &F[i] == me) {
            if (F[i].site != site)
                report(nullptr, "divergent __syncthreads: lines %d and %d", F[i].line, l);
            F[i].bep++;
            if (&F[i] != me)
                o[n++] = i;
        }
    if (g_seed) {
        for (int i = 0; i < n; i += 32)
            shuffle(o + i, std::min(32, n - i)); // lanes, then rotate warps
        std::rotate(o, o + (n ? rnd() % n / 32 * 32 : 0), o + n);
    }
    for (int i = 0; i < n; i++)
        push(o[i]);
}
static inline int frag_pos(int lane, int i)
{
    return ((lane * 8 + i) * 97 + 13) & 255;
} // opaque on purpose
void emu_warp(unsigned mask, unsigned kind, emu_warp_op *op, const char *f, int l)
{
    emu_fiber *me = emu_cur;
    int w0 = me->tid & ~31, lane = me->tid & 31;
    if (nthr - w0 < 32)
        mask &= (1u << (nthr - w0)) - 1;
    if (!(mask >> lane & 1)) {
        report(nullptr, "%s:%d caller's lane %d is not in the mask %08x", f, l, lane, mask);
        return;
    }
    me->wmask = mask;
    me->kind = kind;
    me->arg = op;
    me->file = f;
    me->line = l;
    me->state = WAIT_WARP;
    for (unsigned m = mask; m; m &= m - 1) {
        emu_fiber &o = F[w0 + __builtin_ctz(m)];
        if (o.state == DONE) {
            report(nullptr, "%s:%d mask %08x names lane %d, which has returned", f, l, me->wmask,
                   __builtin_ctz(m));
            mask &= ~(1u << (o.tid & 31));
            continue;
        }
        if (o.state != WAIT_WARP) {
            next();
            return;
        }
    }
    for (unsigned m = mask; m; m &= m - 1) {
        emu_fiber &o = F[w0 + __builtin_ctz(m)];
        if (o.kind != kind || o.wmask != me->wmask)
            report(nullptr,
                   "lanes of one warp meet in different operations: lines %d (mask %08x) and %d "
                   "(mask %08x)",
                   o.line, o.wmask, l, me->wmask);
    }
    emu_warp_op *op_of[32] = {};
    unsigned ep = 0;
    for (unsigned m = mask; m; m &= m - 1) {
        int k = __builtin_ctz(m);
        op_of[k] = (emu_warp_op *)F[w0 + k].arg;
        ep = std::max(ep, F[w0 + k].wep);
    }
    if (kind == EMU_SHFL)
        for (unsigned m = mask; m; m &= m - 1) {
            int k = __builtin_ctz(m), s = op_of[k]->src;
            if (!(mask >> s & 1)) {
                report(nullptr, "%s:%d shuffle reads lane %d, not in mask %08x", f, l, s, mask);
                op_of[k]->out = ~0ull;
            } else
                op_of[k]->out = op_of[s]->v;
        }
    else if (kind == EMU_BALLOT) {
        unsigned b = 0;
        for (unsigned m = mask; m; m &= m - 1) {
            int k = __builtin_ctz(m);
            b |= (unsigned)op_of[k]->v << k;
        }
        for (unsigned m = mask; m; m &= m - 1)
            op_of[__builtin_ctz(m)]->out = b;
    } else if (kind == EMU_MMA || kind == EMU_MMA16816) {
        bool big = kind == EMU_MMA;
        float A[16][16], B[16][16], C[16][16] = {};
        int N = big ? 16 : 8;
        if (mask != ~0u)
            report(nullptr, "%s: not all 32 lanes take part", f);
        else {
            for (int k = 0; k < 32; k++) {
                int g = k / 4, t = k % 4;
                emu_warp_op *o = op_of[k];
                if (big)
                    for (int i = 0; i < 8; i++) {
                        int p = frag_pos(k, i);
                        A[p / 16][p % 16] = o->a[i];
                        B[p / 16][p % 16] = o->b[i];
                        C[p / 16][p % 16] = o->c[i];
                    }
                else {
                    for (int i = 0; i < 8; i++)
                        A[g + 8 * (i / 2 % 2)][t * 2 + i % 2 + 8 * (i / 4)] = o->a[i];
                    for (int i = 0; i < 4; i++) {
                        B[t * 2 + i % 2 + 8 * (i / 2)][g] = o->b[i];
                        C[g + 8 * (i / 2)][t * 2 + i % 2] = o->c[i];
                    }
                }
            }
            for (int i = 0; i < 16; i++)
                for (int k = 0; k < 16; k++) {
                    float a = A[i][k];
                    for (int j = 0; j < N; j++)
                        C[i][j] += a * B[k][j];
                }
            for (int k = 0; k < 32; k++) {
                int g = k / 4, t = k % 4;
                float *d = op_of[k]->d;
                if (big)
                    for (int i = 0; i < 8; i++) {
                        int p = frag_pos(k, i);
                        d[i] = C[p / 16][p % 16];
                    }
                else
                    for (int i = 0; i < 4; i++)
                        d[i] = C[g + 8 * (i / 2)][t * 2 + i % 2];
            }
        }
    }
    static int o[32];
    int n = 0;
    for (unsigned m = mask; m; m &= m - 1) {
        int k = w0 + __builtin_ctz(m);
        if (kind == EMU_SYNC)
            F[k].wep = ep + 1;
        if (&F[k] != me)
            o[n++] = k;
    }
    shuffle(o, n);
    me->state = READY;
    for (int i = 0; i < n; i++)
        push(o[i]);
}
static void access(void *, size_t, bool, bool, void *);
void emu_frag_io(void *x, bool f32, void *mem, unsigned ldm, bool col, bool store, bool,
                 const char *what)
{
    int es = f32 ? 4 : 2, lane = emu_cur->tid & 31;
    if ((uintptr_t)mem % 32)
        report(__builtin_return_address(0), "%s: pointer is not 32-byte aligned", what);
    if (ldm * es % 16)
        report(__builtin_return_address(0), "%s: ldm %u is not a multiple of 16 bytes", what, ldm);
    for (int i = 0; i < 8; i++) {
        int p = frag_pos(lane, i), r = p / 16, c = p % 16;
        u8 *q = (u8 *)mem + (size_t)(col ? c * ldm + r : r * ldm + c) * es;
        if (g_checked)
            access(q, es, store, false, __builtin_return_address(0));
        if (store)
            memcpy(q, (u8 *)x + i * es, es);
        else
            memcpy((u8 *)x + i * es, q, es);
    }
    if (g_checked)
        emu_warp(~0u, EMU_FRAG, nullptr, what,
                 0); // convergence check only: each lane moved its own elements
}
void *emu_dyn_shared() { return dyn.base; }
static int g_mutant = -1;
static u8 reached[4096];
int emu_mutant(int k)
{
    reached[k] = 1;
    return k == g_mutant;
}
// ---------------------------------------------------------------- checked accesses
struct Img {
    u8 *lo, *hi, *tls;
    size_t tls_n;
    bool mine;
};
static std::vector<Img> imgs;
static const void *g_kfun;
static int img_cb(dl_phdr_info *i, size_t, void *)
{
    Img m{};
    m.lo = (u8 *)~0ull;
    for (int k = 0; k < i->dlpi_phnum; k++) {
        auto &p = i->dlpi_phdr[k];
        u8 *a = (u8 *)i->dlpi_addr + p.p_vaddr;
        if (p.p_type == PT_LOAD)
            m.lo = std::min(m.lo, a), m.hi = std::max(m.hi, a + p.p_memsz);
        if (p.p_type == PT_TLS)
            m.tls = (u8 *)i->dlpi_tls_data, m.tls_n = p.p_memsz;
    }
    imgs.push_back(m);
    return 0;
}
static void find_static_shared()
{
    imgs.clear();
    dl_iterate_phdr(img_cb, nullptr);
    for (auto &m : imgs)
        if ((u8 *)g_kfun >= m.lo && (u8 *)g_kfun < m.hi && m.tls && sta.base != m.tls) {
            if (!sta.init || sta.size < m.tls_n)
                shadow(sta, m.tls_n);
            else
                clear_shadow(sta, sta.size);
            sta.base = m.tls;
            sta.limit = m.tls_n;
        }
}
static inline u64 stamp()
{
    emu_fiber *f = emu_cur;
    unsigned b = (emu_bid.z * emu_gdim.y + emu_bid.y) * emu_gdim.x + emu_bid.x;
    return (u64)(g_launch & 0x3fff) << 50 | (u64)(b & 0xffff) << 34 | (u64)f->tid << 24 |
           (u64)(f->bep & 0xfff) << 12 | (f->wep & 0xfff);
}
// What blocks of a launch know of each other: an atomic gives away, at its place, what the block wrote
// before the barrier that is before the thread's last fence; it takes what others gave there, for the
// thread from its next fence on, for the block from the next barrier on.
struct Known {
    u64 block;       // of a stamp
    unsigned before; // what that block did before this barrier ..
    unsigned since;  // .. is known from this barrier of ours on, or by this thread
    unsigned tid;
};
static std::unordered_map<const void *, std::vector<Known>> given; // of a launch
static std::unordered_map<unsigned, std::vector<Known>> asked;     // by thread, of a block
static std::unordered_map<unsigned, unsigned> fenced;              // barrier of its last fence
static std::unordered_map<u64, Known> known;                       // of a block
static void forget_blocks(bool launch)
{
    asked.clear(), fenced.clear(), known.clear();
    if (launch)
        given.clear();
}
static u64 block_of(u64 stamp) { return stamp >> 34 & 0xffff; }
static void know(const void *p)
{
    const unsigned tid = emu_cur->tid;
    std::vector<Known> &all = given[p], &mine = asked[tid];
    mine.insert(mine.end(), all.begin(), all.end());
    if (fenced.count(tid))
        all.push_back({block_of(stamp()), fenced[tid], 0, 0});
}
void __threadfence()
{
    const unsigned tid = emu_cur->tid;
    fenced[tid] = emu_cur->bep;
    for (Known k : asked[tid]) {
        k.since = emu_cur->bep, k.tid = tid;
        known[k.block] = k;
    }
    asked[tid].clear();
}
static bool is_known(u64 other)
{
    auto found = known.find(block_of(other));
    if (found == known.end() || (other >> 12 & 0xfff) >= found->second.before)
        return false;
    return emu_cur->bep > found->second.since || emu_cur->tid == found->second.tid;
}
static inline bool conflict(u64 a, u64 b)
{
    if (!b || (a ^ b) >> 50)
        return false; // never touched, or by another launch
    if ((a ^ b) >> 34)
        return !is_known(b); // two blocks of one launch
    if (!((a ^ b) >> 24 & 1023) || ((a ^ b) >> 12 & 0xfff))
        return false; // same thread, or a block barrier between
    return ((a ^ b) >> 29 & 31) ||
           !((a ^ b) & 0xfff); // other warp, or same warp with no __syncwarp between
}
// 16-way LRU over 32-byte sectors: what would reach DRAM (EMU_METRICS=1, EMU_L2_KB, default 6144)
struct L2 {
    std::vector<u64> tag;
    std::vector<u8> dirty;
    u64 sets = 0;
    void touch(u64 a, bool wr)
    {
        if (!sets) {
            const char *e = getenv("EMU_L2_KB");
            sets = (e ? atoll(e) : 6144) * 1024 / 512;
            tag.assign(sets * 16, 0);
            dirty.assign(sets * 16, 0);
        }
        u64 *t = &tag[a % sets * 16];
        u8 *d = &dirty[a % sets * 16];
        int k = 0;
        while (k < 15 && t[k] != a)
            k++;
        bool hit = t[k] == a, dd = hit && d[k];
        if (!hit) {
            if (d[k])
                S.dram_wr += 32;
            if (!wr)
                S.dram_rd += 32;
        }
        for (; k; k--)
            t[k] = t[k - 1], d[k] = d[k - 1];
        t[0] = a;
        d[0] = dd || wr;
    }
    void flush()
    {
        for (size_t i = 0; i < dirty.size(); i++)
            if (dirty[i])
                S.dram_wr += 32;
        std::fill(tag.begin(), tag.end(), 0);
        std::fill(dirty.begin(), dirty.end(), 0);
    }
};
static L2 l2;
static int g_metrics = -1;
struct Traffic {
    u64 launches, barriers, asked, distinct, sectors;
};
static std::map<std::string, Traffic> g_traffic;
static std::unordered_map<u64, unsigned> occ; // how often a thread was at a place
static unsigned sequence[MAXT];               // accesses of a thread so far
struct Together {                             // an instruction of a warp
    std::vector<std::pair<u64, u64>> bytes;   // [begin, end) of its lanes
    unsigned warp, order = ~0u;
    bool store;
};
static std::unordered_map<u64, Together> together;
// The accesses of a block: what each warp's instruction asked for, and the sectors that it moves. A
// load moves none that one of the warp's four loads before it has just brought (they are in the
// first cache); a store moves all that it touches.
static void count_traffic()
{
    Traffic &t = g_traffic[g_kname];
    std::vector<Together *> all;
    for (auto &e : together)
        all.push_back(&e.second);
    std::sort(all.begin(), all.end(), [](const Together *a, const Together *b) {
        return a->warp != b->warp ? a->warp < b->warp : a->order < b->order;
    });
    std::deque<std::vector<u64>> recent;
    unsigned warp = ~0u;
    for (Together *e : all) {
        if (e->warp != warp)
            recent.clear();
        warp = e->warp;
        std::vector<u64> sectors;
        auto &v = e->bytes;
        std::sort(v.begin(), v.end());
        u64 end = 0; // bytes below are counted
        for (auto &a : v) {
            t.asked += a.second - a.first;
            t.distinct += a.second > end ? a.second - std::max(end, a.first) : 0;
            end = std::max(end, a.second);
            for (u64 x = a.first / 32; x <= (a.second - 1) / 32; x++)
                if (sectors.empty() || sectors.back() < x)
                    sectors.push_back(x);
        }
        for (u64 x : sectors) {
            bool near = false;
            for (auto &r : recent)
                near |= !e->store && std::binary_search(r.begin(), r.end(), x);
            t.sectors += !near;
            S.sectors += !near;
        }
        if (!e->store)
            recent.push_back(std::move(sectors));
        if (recent.size() > 4)
            recent.pop_front();
    }
    together.clear();
    occ.clear();
    memset(sequence, 0, sizeof sequence);
}
static void access(void *vp, size_t n, bool wr, bool atomic, void *pc)
{
    u8 *p = (u8 *)vp;
    if (!emu_cur || !emu_cur->dev) {
        if (is_dev(p))
            report(pc, "device pointer dereferenced by host code");
        return;
    }
    if (p >= stacks && p < stacks + STK * MAXT)
        return;
    Region *r;
    bool g = false;
    if (is_dev(p)) {
        r = &dev;
        g = true;
        if (!in_alloc(p, n)) {
            report(pc, "%s of %zu bytes outside every allocation", wr ? "write" : "read", n);
            return;
        }
    } else if (p >= dyn.base && p < dyn.base + DYN) {
        r = &dyn;
        if (p + n > dyn.base + g_dyn) {
            report(pc, "%s past the %zu bytes of dynamic shared memory", wr ? "write" : "read",
                   g_dyn);
            return;
        }
    } else {
        if (!(p >= sta.base && p < sta.base + sta.limit)) {
            if (p >= (u8 *)F && p < (u8 *)(F + MAXT))
                return;
            for (auto &m : imgs)
                if (p >= m.lo && p < m.hi) {
                    if (wr && g_kfun >= m.lo && g_kfun < m.hi)
                        report(pc, "kernel writes a host global");
                    return;
                }
            find_static_shared();
        }
        if (!(p >= sta.base && p < sta.base + sta.limit)) {
            report(pc, "kernel dereferences a host pointer %p", vp);
            return;
        }
        r = &sta;
    }
    if ((n == 2 || n == 4 || n == 8 || n == 16) && (uintptr_t)p % n)
        report(pc, "misaligned %zu-byte %s", n, wr ? "write" : "read");
    size_t o = p - r->base;
    u64 st = stamp();
    if (g) {
        (wr ? S.wr : S.rd) += n;
        if (g_metrics) {
            unsigned k = occ[(u64)emu_cur->tid << 48 ^ (u64)pc]++;
            const unsigned warp = emu_cur->tid / 32;
            Together &e = together[(u64)warp << 56 ^ (u64)k << 40 ^ (u64)pc];
            e.bytes.push_back({(u64)p, (u64)p + n});
            e.warp = warp;
            e.store = wr;
            e.order = std::min(e.order, sequence[emu_cur->tid]++);
            for (u64 a = (u64)p / 32; a <= ((u64)p + n - 1) / 32; a++)
                l2.touch(a, wr);
        }
    }
    for (size_t i = o; i < o + n; i++) {
        if (!wr && !r->init[i]) {
            report(pc, "read of uninitialised %s memory", g ? "device" : "shared");
            r->init[i] = 1;
        }
        if (g) {
            if (wr ? (r->w[i] ^ st) >> 50 || !r->w[i]
                   : (((r->r1[i] ^ st) >> 50 || !r->r1[i]) && ((r->w[i] ^ st) >> 50 || !r->w[i])))
                (wr ? S.wr_unique : S.rd_unique)++;
        }
        if (!atomic && conflict(st, r->w[i]))
            report(pc, "race on %s memory: %s here, written by thread %u without a barrier between",
                   g ? "device" : "shared", wr ? "written" : "read",
                   (unsigned)(r->w[i] >> 24 & 1023));
        if (wr) {
            u64 c = conflict(st, r->r1[i]) ? r->r1[i] : conflict(st, r->r2[i]) ? r->r2[i] : 0;
            if (c)
                report(
                    pc,
                    "race on %s memory: written here, read by thread %u without a barrier between",
                    g ? "device" : "shared", (unsigned)(c >> 24 & 1023));
            r->init[i] = 1;
            r->w[i] = st;
        } else if (!conflict(st, r->r1[i]) || !r->r1[i])
            r->r1[i] = st;
        else if (!conflict(st, r->r2[i]))
            r->r2[i] = st;
    }
}
extern "C" {
#define PC __builtin_return_address(0)
#define HOOK(n)                                                                \
    void __tsan_read##n(void *p) { access(p, n, false, false, PC); }           \
    void __tsan_write##n(void *p) { access(p, n, true, false, PC); }           \
    void __tsan_unaligned_read##n(void *p) { access(p, n, false, false, PC); } \
    void __tsan_unaligned_write##n(void *p) { access(p, n, true, false, PC); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) void __tsan_read_range(void *p, size_t n)
{
    access(p, n, false, false, PC);
}
void __tsan_write_range(void *p, size_t n) { access(p, n, true, false, PC); }
void *__tsan_memcpy(void *d, const void *s, size_t n)
{
    access((void *)s, n, false, false, PC);
    access(d, n, true, false, PC);
    return memcpy(d, s, n);
}
void *__tsan_memset(void *d, int v, size_t n)
{
    access(d, n, true, false, PC);
    return memset(d, v, n);
}
void __tsan_init() { g_checked = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
struct UbLoc {
    const char *file;
    uint32_t line, col;
};
struct UbMis {
    UbLoc loc;
    const void *type;
    u8 log_align, kind;
};
void __ubsan_handle_type_mismatch_v1(UbMis *d, void *p)
{ // -fsanitize=alignment: vector loads through misaligned pointers
    if (in_kernel)
        report(nullptr, "%s:%u pointer %p is not %u-byte aligned", d->loc.file, d->loc.line, p,
               1u << d->log_align);
}
}
#define ATOM(T, f, e)                              \
    T f(T *p, T v)                                 \
    {                                              \
        if (g_checked)                             \
            access(p, sizeof(T), false, true, PC); \
        if (g_checked && is_dev(p))                \
            know(p);                               \
        T o = *p;                                  \
        if (is_dev(p))                             \
            S.wr += sizeof(T);                     \
        *p = e;                                    \
        return o;                                  \
    }
ATOM(float, atomicAdd, o + v)
ATOM(int, atomicAdd, o + v)
ATOM(unsigned, atomicAdd, o + v)
ATOM(unsigned, atomicInc, o >= v ? 0 : o + 1)
ATOM(int, atomicMax, o > v ? o : v)

// ---------------------------------------------------------------- streams, events, graphs
struct emu_event {
    emu_stream *s = nullptr;
    u64 seq = 0;
};
struct Op {
    std::function<void()> f;
    emu_event wait;
};
struct emu_graph {
    std::vector<Op> ops;
};
struct emu_stream {
    int device = g_device;
    std::deque<Op> q;
    u64 head = 0, tail = 0;
    emu_graph *cap = nullptr;
};
static emu_stream null_stream;
static std::set<emu_stream *> streams = {&null_stream};
static emu_stream *str(cudaStream_t s) { return s ? s : &null_stream; }
static void drain(emu_stream *s, u64 to)
{
    while (s->head < to && !s->q.empty()) {
        Op op = std::move(s->q.front());
        s->q.pop_front();
        if (op.wait.s && streams.count(op.wait.s))
            drain(op.wait.s, op.wait.seq);
        const int on = g_on;
        g_on = s->device;
        if (on != g_on)
            lastA = lastE = nullptr;
        if (op.f)
            op.f();
        g_on = on;
        s->head++;
    }
}
static void drain_all()
{
    std::vector<emu_stream *> v(streams.begin(), streams.end());
    for (size_t i = v.size(); g_seed && i > 1; i--)
        std::swap(v[i - 1], v[rnd() % i]);
    for (auto s : v)
        drain(s, s->tail);
}
static void submit(cudaStream_t st, std::function<void()> f, emu_event w = {})
{
    emu_stream *s = str(st);
    if (s->cap) {
        s->cap->ops.push_back({std::move(f), w});
        return;
    }
    s->q.push_back({std::move(f), w});
    s->tail++;
    if (!g_lazy)
        drain(s, s->tail);
}
void emu_expect_failed(const char *what, const char *file, int line)
{
    report(__builtin_return_address(0), "%s:%d expected %s", file, line, what);
}
static cudaError_t fail(cudaError_t e) { return g_last = e; }
static int g_logging;
static std::string g_log, g_told;
static void log_bytes(const char *what, size_t n)
{
    if (g_logging)
        g_log += std::string(what) + ' ' + std::to_string(n) + '\n';
}
static std::map<const void *, int> g_smem_attr;
cudaError_t emu_func_attr(const void *f, cudaFuncAttribute, int v)
{
    if (v > g_limit_kb * 1024)
        return fail(cudaErrorInvalidValue);
    g_smem_attr[f] = v;
    return cudaSuccess;
}
void __attribute__((noinline)) emu_launch(const char *name, const void *id, dim3 g, dim3 b,
                                          size_t smem, cudaStream_t s, size_t argb,
                                          std::function<void()> k, const std::string &arguments)
{
    boot();
    if (str(s)->device != g_device) {
        report(nullptr, "%s launched into a stream of device %d while %d is current", name,
               str(s)->device, g_device);
        fail(cudaErrorInvalidValue);
        return;
    }
    u64 n = (u64)b.x * b.y * b.z;
    size_t lim = g_smem_attr.count(id) ? (size_t)g_smem_attr[id] : 48 << 10;
    const char *why = nullptr;
    if (n == 0 || n > 1024 || b.z > 64)
        why = "threads per block";
    else if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535)
        why = "grid size";
    else if (smem > lim)
        why = "dynamic shared memory";
    else if (argb > 4096)
        why = "argument bytes";
    if (why) {
        report(nullptr,
               "launch of %s refused: %s (grid %u,%u,%u block %u,%u,%u shared %zu, limit %zu)",
               name, why, g.x, g.y, g.z, b.x, b.y, b.z, smem, lim);
        fail(cudaErrorInvalidConfiguration);
        return;
    }
    auto run = [=]() mutable {
        S.launches++;
        g_launches[name]++;
        if (g_logging)
            g_log += std::string(name) + ' ' + std::to_string(g.x) + ' ' + std::to_string(n) +
                     arguments + '\n';
        if (g_dry)
            return;
        Open o;
        in_kernel = true;
        g_kname = name;
        g_kfun = id;
        if (!(++g_launch & 0x3fff))
            for (const Region *r : {&dev, &dyn, &sta})
                forget_accesses(*r);
        nthr = (int)n;
        emu_bdim = b;
        emu_gdim = g;
        g_dyn = smem;
        body = &k;
        lcg = g_seed * 7919u + g_launch;
        if (g_metrics < 0)
            g_metrics = getenv("EMU_METRICS") != nullptr;
        g_barriers = 0;
        if (!F) {
            F = (emu_fiber *)vmap(sizeof(emu_fiber) * MAXT);
            stacks = (u8 *)vmap(STK * MAXT);
            for (int i = 0; i < MAXT; i++) {
                F[i].stack = stacks + STK * i;
                mprotect(F[i].stack, 4096, PROT_NONE);
            }
        }
        find_static_shared();
        std::vector<uint3> blocks;
        for (unsigned z = 0; z < g.z; z++)
            for (unsigned y = 0; y < g.y; y++)
                for (unsigned x = 0; x < g.x; x++)
                    blocks.push_back({x, y, z});
        for (size_t i = blocks.size(); g_seed && i > 1; i--)
            std::swap(blocks[i - 1], blocks[rnd() % i]);
        forget_blocks(true);
        for (uint3 id : blocks) {
            forget_blocks(false);
            emu_bid = id;
            memset(dyn.base, 0xff, smem);
            clear_shadow(dyn, smem);
            if (sta.base)
                memset(sta.base, 0xff, sta.limit), clear_shadow(sta, sta.limit);
            run_block();
            if (g_metrics)
                count_traffic();
        }
        g_traffic[name].launches++;
        g_traffic[name].barriers += g_barriers;
        in_kernel = false;
        g_kname = "host";
    };
    submit(s, run);
}
extern "C" {
cudaError_t cudaMalloc(void **p, size_t n)
{
    boot();
    if (!n) {
        *p = nullptr;
        return cudaSuccess;
    }
    size_t need = ((n + 255) & ~(size_t)255) + 512; // red zone behind every block
    const char *cap = getenv("EMU_VRAM_MB");
    if (cap && S.cur_bytes + n > (u64)atoll(cap) << 20)
        return fail(cudaErrorMemoryAllocation);
    u8 *a;
    auto it = freed.lower_bound(need);
    if (it != freed.end() && it->first <= need * 2) {
        a = it->second;
        need = it->first;
        freed.erase(it);
    } else {
        if (bump + need > dev.base + dev_cap)
            return fail(cudaErrorMemoryAllocation);
        a = bump;
        bump += need;
    }
    allocs[a] = {n, g_device};
    S.cur_bytes += n;
    S.peak_bytes = std::max(S.peak_bytes, S.cur_bytes);
    if (!g_dry) {
        Open o;
        memset(a, 0xff, n);
        if (g_checked)
            memset(dev.init + (a - dev.base), 0, n);
    }
    *p = a;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p)
{
    if (!p)
        return cudaSuccess;
    drain_all();
    auto it = allocs.find((u8 *)p);
    if (it == allocs.end()) {
        report(nullptr, "cudaFree of %p, which is no live allocation", p);
        return fail(cudaErrorInvalidValue);
    }
    size_t n = it->second.size;
    S.cur_bytes -= n;
    lastA = lastE = nullptr;
    freed.insert({((n + 255) & ~(size_t)255) + 512, (u8 *)p});
    allocs.erase(it);
    return cudaSuccess;
}
static std::map<u8 *, size_t> pinned;
cudaError_t cudaMallocHost(void **p, size_t n)
{
    *p = aligned_alloc(256, (n + 255) & ~(size_t)255);
    pinned[(u8 *)*p] = n;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p)
{
    drain_all();
    pinned.erase((u8 *)p);
    free(p);
    return cudaSuccess;
}
static bool is_pinned(const void *p)
{
    auto it = pinned.upper_bound((u8 *)p);
    if (it == pinned.begin())
        return false;
    --it;
    return (u8 *)p < it->first + it->second;
}
static void copy(void *d, const void *s, size_t n, cudaMemcpyKind k)
{
    Open o;
    bool dd = k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToDevice,
         sd = k == cudaMemcpyDeviceToHost || k == cudaMemcpyDeviceToDevice;
    if (sd && !range(s, n, !dd, false, "copy source"))
        return;
    if (dd && !range(d, n, false, !sd, "copy target"))
        return;
    if ((!sd && is_dev(s)) || (!dd && is_dev(d))) {
        report(nullptr, "copy kind does not fit the pointers");
        return;
    }
    if (g_dry)
        return;
    if (sd && dd && g_checked)
        memcpy(dev.init + ((u8 *)d - dev.base), dev.init + ((u8 *)s - dev.base), n);
    memcpy(d, s, n);
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t st)
{
    boot();
    if (!n)
        return cudaSuccess;
    if (g_lazy && !g_dry && k == cudaMemcpyHostToDevice && !is_pinned(s)) {
        auto b = std::make_shared<std::vector<u8>>((u8 *)s, (u8 *)s + n);
        submit(st, [=] { copy(d, b->data(), n, k); });
    } else {
        submit(st, [=] { copy(d, s, n, k); });
        if (k == cudaMemcpyDeviceToHost && !is_pinned(d) && !str(st)->cap)
            drain(str(st), str(st)->tail);
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k)
{
    boot();
    drain(&null_stream, null_stream.tail);
    if (n)
        copy(d, s, n, k);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t st)
{
    boot();
    submit(st, [=] {
        Open o;
        log_bytes("memset", n);
        if (range(d, n, false, true, "cudaMemset") && !g_dry)
            memset(d, v, n);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *d, int v, size_t n) { return cudaMemsetAsync(d, v, n, nullptr); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    *s = new emu_stream;
    streams.insert(*s);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    drain(s, s->tail);
    streams.erase(s);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    drain(str(s), str(s)->tail);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize()
{
    drain_all();
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned)
{
    *e = new emu_event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    e->s = str(s);
    e->seq = str(s)->tail;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    if (e->s)
        drain(e->s, e->seq);
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    if (e->s)
        submit(s, nullptr, *e);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode)
{
    if (!s)
        return fail(cudaErrorInvalidValue);
    s->cap = new emu_graph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g)
{
    *g = s->cap;
    s->cap = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long)
{
    *e = new emu_graph(*g);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e)
{
    drain_all();
    delete e;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s)
{
    for (auto &o : e->ops)
        submit(s, o.f, o.wait);
    return cudaSuccess;
}
cudaError_t cudaGetLastError()
{
    cudaError_t e = g_last;
    g_last = cudaSuccess;
    return e;
}
const char *cudaGetErrorString(cudaError_t e) { return e ? "emulated error" : "no error"; }
cudaError_t cudaGetDeviceCount(int *n)
{
    *n = (int)devices().size();
    return *n ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int d)
{
    if (d < 0 || d >= (int)devices().size())
        return fail(cudaErrorInvalidDevice);
    g_device = d;
    g_contexts |= 1u << d;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d)
{
    *d = g_device;
    return cudaSuccess;
}
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active)
{
    *flags = 0;
    *active = (int)(g_contexts >> d & 1);
    return 0;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int d)
{
    *p = {};
    strcpy(p->name, "emulator");
    if (devices()[d])
        snprintf(p->name, sizeof p->name, "emulator %d", devices()[d]);
    const char *capability = getenv("EMU_CAPABILITY"); // 86
    p->major = capability ? atoi(capability) / 10 : 8;
    p->minor = capability ? atoi(capability) % 10 : 6;
    const char *multiprocessors = getenv("EMU_MULTIPROCESSORS"); // 2
    p->multiProcessorCount = multiprocessors ? atoi(multiprocessors) : 2;
    p->sharedMemPerBlockOptin = g_limit_kb << 10;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) { return *v = 0, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { return *v = 0, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t)
{
    boot();
    *t = dev_cap;
    *f = dev_cap - S.cur_bytes;
    return cudaSuccess;
}
void emu_mode(int dry, int lazy, int protect, unsigned seed)
{
    guard(true);
    drain_all();
    g_dry = dry;
    g_lazy = lazy;
    g_protect = protect;
    g_seed = seed;
    boot();
    if (!in_dev)
        guard(false);
}
void emu_get_stats(emu_stats *s)
{
    l2.flush();
    *s = S;
}
void emu_reset_stats()
{
    u64 c = S.cur_bytes;
    S = {};
    S.cur_bytes = S.peak_bytes = c;
    g_seen.clear();
    g_launches.clear();
}
u64 emu_reports(char *text, size_t n)
{
    snprintf(text, n, "%s", g_report.c_str());
    return S.errors;
}
void emu_forget(void *p, size_t n, cudaStream_t st)
{
    if (!n || g_dry)
        return;
    submit(st, [=] {
        Open o;
        memset(p, 0xff, n);
        if (g_checked)
            memset(dev.init + ((u8 *)p - dev.base), 0, n);
    });
}
int emu_checked() { return g_checked; }
void emu_set_mutant(int k)
{
    g_mutant = k;
    memset(reached, 0, sizeof reached);
}
int emu_reached(int k) { return reached[k]; }
void emu_metrics(int on)
{
    g_metrics = on;
    g_traffic.clear();
}
int emu_traffic(int i, char *name, size_t n, u64 *out)
{
    if (i < 0 || i >= (int)g_traffic.size())
        return 0;
    auto it = std::next(g_traffic.begin(), i);
    snprintf(name, n, "%s", it->first.c_str());
    memcpy(out, &it->second, sizeof it->second);
    return 1;
}
int emu_logging() { return g_logging; }
const char *emu_log(int on)
{
    g_logging = on;
    g_told.swap(g_log);
    g_log.clear();
    return g_told.c_str();
}
void emu_print_launches()
{
    for (auto &k : g_launches)
        printf("  %6llu %s\n", (unsigned long long)k.second, k.first.c_str());
}
}

// ---------------------------------------------------------------- cuBLAS subset (column-major,
// float accumulation)
struct emu_cublas {
    int device = g_device;
    cudaStream_t s = nullptr;
    int mode = 0;
};
static size_t esz(cudaDataType t)
{
    return t == CUDA_R_32F || t == CUDA_R_32I ? 4 : t == CUDA_R_8I ? 1 : 2;
}
static void get(float *d, const void *s, cudaDataType t, int n)
{
    if (t == CUDA_R_32F)
        memcpy(d, s, n * 4);
    else if (t == CUDA_R_16F)
        for (int i = 0; i < n; i++)
            d[i] = ((const __half *)s)[i];
    else
        for (int i = 0; i < n; i++)
            d[i] = ((const __nv_bfloat16 *)s)[i];
}
static bool mat(const void *p, cudaDataType t, int rows, int cols, int ld, bool rd, bool wr,
                const char *w)
{
    for (int c = 0; c < cols; c++)
        if (!range((const u8 *)p + (size_t)c * ld * esz(t), rows * esz(t), rd, wr, w))
            return false;
    return true;
}
static void gemm(bool ta, bool tb, int m, int n, int k, float al, const void *A, cudaDataType at,
                 int lda, const void *B, cudaDataType bt, int ldb, float be, void *C,
                 cudaDataType ct, int ldc)
{
    S.gemms++;
    S.gemm_flops += 2.0 * m * n * k;
    if (g_logging)
        g_log += "gemm " + std::to_string(m) + ' ' + std::to_string(n) + ' ' + std::to_string(k) +
                 ' ' + std::to_string(esz(at)) + ' ' + std::to_string(esz(ct)) + ' ' +
                 std::to_string(be != 0) + '\n';
    if (g_dry)
        return;
    Open o;
    if (!mat(A, at, ta ? k : m, ta ? m : k, lda, true, false, "GEMM A") ||
        !mat(B, bt, tb ? n : k, tb ? k : n, ldb, true, false, "GEMM B") ||
        !mat(C, ct, m, n, ldc, be != 0, true, "GEMM C"))
        return;
    std::vector<float> a((size_t)m * k), b((size_t)n * k), col(std::max(m, std::max(n, k))),
        acc((size_t)4 * m);
    for (int c = 0; c < (ta ? m : k); c++) {
        get(col.data(), (const u8 *)A + (size_t)c * lda * esz(at), at, ta ? k : m);
        if (ta)
            for (int i = 0; i < k; i++)
                a[(size_t)i * m + c] = col[i];
        else
            memcpy(&a[(size_t)c * m], col.data(), m * 4);
    }
    for (int c = 0; c < (tb ? k : n); c++) {
        get(col.data(), (const u8 *)B + (size_t)c * ldb * esz(bt), bt, tb ? n : k);
        if (tb)
            for (int j = 0; j < n; j++)
                b[(size_t)j * k + c] = col[j];
        else
            memcpy(&b[(size_t)c * k], col.data(), k * 4);
    }
    for (int j0 = 0; j0 < n; j0 += 4) {
        int nj = std::min(4, n - j0);
        std::fill(acc.begin(), acc.end(), 0.f);
        float *c0 = &acc[0], *c1 = c0 + m, *c2 = c1 + m, *c3 = c2 + m;
        for (int q = 0; q < k; q++) {
            const float *av = &a[(size_t)q * m];
            float b0 = b[(size_t)j0 * k + q], b1 = nj > 1 ? b[(size_t)(j0 + 1) * k + q] : 0,
                  b2 = nj > 2 ? b[(size_t)(j0 + 2) * k + q] : 0,
                  b3 = nj > 3 ? b[(size_t)(j0 + 3) * k + q] : 0;
            for (int i = 0; i < m; i++) {
                float x = av[i];
                c0[i] += x * b0;
                c1[i] += x * b1;
                c2[i] += x * b2;
                c3[i] += x * b3;
            }
        }
        for (int j = 0; j < nj; j++) {
            u8 *cp = (u8 *)C + (size_t)(j0 + j) * ldc * esz(ct);
            if (be != 0)
                get(col.data(), cp, ct, m);
            for (int i = 0; i < m; i++) {
                float v = al * acc[(size_t)j * m + i] + (be != 0 ? be * col[i] : 0);
                if (ct == CUDA_R_32F)
                    ((float *)cp)[i] = v;
                else if (ct == CUDA_R_16F)
                    ((__half *)cp)[i] = __float2half(v);
                else
                    ((__nv_bfloat16 *)cp)[i] = __float2bfloat16(v);
            }
        }
    }
}
extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t *h)
{
    *h = new emu_cublas;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t h)
{
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s)
{
    h->s = s;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t m)
{
    h->mode = m;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *p, size_t n)
{
    return range(p, n, false, false, "cuBLAS's workspace") ? CUBLAS_STATUS_SUCCESS
                                                           : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta,
                                          cublasOperation_t tb, int m, int n, int k, const void *al,
                                          const void *A, cudaDataType at, int lda, long long sa,
                                          const void *B, cudaDataType bt, int ldb, long long sb,
                                          const void *be, void *C, cudaDataType ct, int ldc,
                                          long long sc, int batch, cublasComputeType_t comp,
                                          cublasGemmAlgo_t)
{
    if (m < 0 || n < 0 || k < 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) {
        report(nullptr, "GEMM m=%d n=%d k=%d lda=%d ldb=%d ldc=%d: bad leading dimension", m, n, k,
               lda, ldb, ldc);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (h->device != g_device) {
        report(nullptr, "GEMM by cuBLAS of device %d while %d is current", h->device, g_device);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (at != bt || (comp != CUBLAS_COMPUTE_32F && comp != CUBLAS_COMPUTE_32F_FAST_TF32) ||
        !(ct == at || (ct == CUDA_R_32F && (at == CUDA_R_16F || at == CUDA_R_16BF)))) {
        report(nullptr, "GEMM type combination not supported");
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (!m || !n)
        return CUBLAS_STATUS_SUCCESS;
    float a0 = 0, b0 = 0;
    bool devp = h->mode;
    if (!devp)
        a0 = *(const float *)al, b0 = *(const float *)be; // host pointer mode: read at call time
    submit(h->s, [=] {
        float a = a0, b = b0;
        if (devp && !g_dry) {
            Open o;
            if (!range(al, 4, true, false, "GEMM alpha") || !range(be, 4, true, false, "GEMM beta"))
                return;
            a = *(const float *)al;
            b = *(const float *)be;
        }
        for (int i = 0; i < batch; i++)
            gemm(ta, tb, m, n, k, a, (const u8 *)A + i * sa * (long long)esz(at), at, lda,
                 (const u8 *)B + i * sb * (long long)esz(bt), bt, ldb, b,
                 (u8 *)C + i * sc * (long long)esz(ct), ct, ldc);
    });
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                            int n, int k, const void *al, const void *A, cudaDataType at, int lda,
                            const void *B, cudaDataType bt, int ldb, const void *be, void *C,
                            cudaDataType ct, int ldc, cublasComputeType_t comp, cublasGemmAlgo_t g)
{
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, al, A, at, lda, 0, B, bt, ldb, 0, be, C,
                                      ct, ldc, 0, 1, comp, g);
}
}
