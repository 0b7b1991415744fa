#include "pool.h"

#include "mapped.h"
#include "platform.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_THREADS = 256,
    SPINS = 4000,
    /* Nanoseconds of work that are worth handing out: to workers that look for it, to workers that
     * must be woken first; and that a thread takes at least at a time. */
    SHARED = 4000,
    WOKEN = 20000,
    TAKEN = 1000,
};

/* Tasks that a thread begins with; the others take from it when theirs are done. What it computes
 * for neighbouring rows stays in its own cache from op to op. */
struct share {
    _Alignas(64) atomic_int next;
    int end;
};

struct glm_pool {
    atomic_int threads; /* asked for, the caller's included */
    int refused; /* a worker could not be started: not tried again until others are asked for */
    int workers; /* running */
    pthread_t worker[MAX_THREADS];
    char *scratch[MAX_THREADS]; /* one per worker, the last used by the caller */
    char *caller_scratch, *second_scratch;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    /* Runs so far twice, plus one while a run takes workers in, times INSIDE; plus the workers that
     * it took in. A worker that sleeps through a run is not waited for. */
    atomic_ullong state;
    atomic_int asleep, waiting, stop, busy, second_busy, quit;
    struct share share[MAX_THREADS]; /* the caller's first */
    int shares, take;                /* take: tasks at a time */
    int polls;                       /* the run is of the thread that set poll: it alone may stop */
    glm_task fn;
    const void *arg;
    int (*poll)(void *arg);
    void *poll_arg;
    int64_t polled;        /* when, in milliseconds */
    struct glm_pool *next; /* of all there are */
};

#define INSIDE (1ull << 32)

/* The pool whose poll this thread has set. Another thread that needs no model (it converts, it binds)
 * may run an op meanwhile: it neither calls that poll nor stops for it. */
static _Thread_local const struct glm_pool *polled_here;

struct seat {
    struct glm_pool *pool;
    int index;
};

/* ---- forks: the child has neither workers nor other callers */

static pthread_mutex_t pools_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct glm_pool *pools;
static int forks_are_watched;

static void before_fork(void) { pthread_mutex_lock(&pools_mutex); }
static void in_parent(void) { pthread_mutex_unlock(&pools_mutex); }

static void in_child(void)
{
    pthread_mutex_init(&pools_mutex, NULL);
    for (struct glm_pool *pool = pools; pool; pool = pool->next) {
        const int running = polled_here == pool; /* its poll has forked: what it began is lost */
        const unsigned long long run = atomic_load(&pool->state) / INSIDE;
        pthread_mutex_init(&pool->mutex, NULL);
        pthread_cond_init(&pool->wake, NULL);
        pthread_cond_init(&pool->done, NULL);
        pool->workers = pool->refused = 0;
        atomic_store(&pool->state, (running ? run : run / 2 * 2) * INSIDE);
        atomic_store(&pool->busy, running);
        atomic_store(&pool->stop, running);
        atomic_store(&pool->second_busy, 0);
        atomic_store(&pool->asleep, 0);
        atomic_store(&pool->waiting, 0);
    }
}

static void watch_forks(void)
{
    forks_are_watched = pthread_atfork(before_fork, in_parent, in_child) == 0;
}

static void enlist(struct glm_pool *pool)
{
    pthread_mutex_lock(&pools_mutex);
    pool->next = pools;
    pools = pool;
    pthread_mutex_unlock(&pools_mutex);
}

static void delist(const struct glm_pool *pool)
{
    pthread_mutex_lock(&pools_mutex);
    for (struct glm_pool **at = &pools; *at; at = &(*at)->next)
        if (*at == pool) {
            *at = pool->next;
            break;
        }
    pthread_mutex_unlock(&pools_mutex);
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* waits some cycles, as yield does nowhere */
#endif
}

/* The next tasks that nobody has taken, of share `home` first; 0: there is none, or it is to stop. */
static int take_tasks(struct glm_pool *pool, int home, int *begin, int *end)
{
    if (pool->polls && atomic_load_explicit(&pool->stop, memory_order_relaxed))
        return 0;
    for (int i = 0; i < pool->shares; i++) {
        struct share *share = &pool->share[(home + i) % pool->shares];
        if (atomic_load_explicit(&share->next, memory_order_relaxed) >= share->end)
            continue;
        *begin = atomic_fetch_add_explicit(&share->next, pool->take, memory_order_relaxed);
        *end = share->end - *begin < pool->take ? share->end : *begin + pool->take;
        if (*begin < *end)
            return 1;
    }
    return 0;
}

static void work(struct glm_pool *pool, int home, char *scratch)
{
    for (int task, end; take_tasks(pool, home, &task, &end);)
        for (; task < end; task++)
            pool->fn(pool->arg, task, scratch);
}

/* Whether there is something for a worker that has been in run `seen`. */
static int called(struct glm_pool *pool, unsigned long long seen)
{
    const unsigned long long run = atomic_load(&pool->state) / INSIDE;
    return (run & 1 && run != seen) || atomic_load(&pool->quit);
}

static void *worker_main(void *arg)
{
    struct seat seat = *(struct seat *)arg;
    struct glm_pool *pool = seat.pool;
    unsigned long long seen = 0;
    free(arg);
    glm_guard_always();
    for (;;) {
        for (int spin = 0; spin < SPINS && !called(pool, seen); spin++)
            relax();
        if (!called(pool, seen)) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->asleep, 1);
            while (!called(pool, seen))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->asleep, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        if (atomic_load(&pool->quit))
            return NULL;
        unsigned long long state = atomic_load(&pool->state);
        if (!(state / INSIDE & 1) ||
            !atomic_compare_exchange_strong(&pool->state, &state, state + 1))
            continue; /* over, or another worker came between: look again */
        seen = state / INSIDE;
        work(pool, seat.index + 1, pool->scratch[seat.index]);
        atomic_fetch_sub(&pool->state, 1);
        if (atomic_load(&pool->waiting)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static int default_threads(void)
{
    const char *omp = getenv("OMP_NUM_THREADS");
    const long asked = omp ? strtol(omp, NULL, 10) : 0; /* "4,2": the outer level counts */
    if (asked >= 1)
        return asked > MAX_THREADS ? MAX_THREADS : (int)asked;
    const int here = glm_processors();
    return here > MAX_THREADS ? MAX_THREADS : here;
}

/* On huge pages where the system has them: panels of 4 KiB pages meet in the caches by chance (up
 * to a tenth of a product's time, different from process to process). */
void *glm_aligned(size_t bytes)
{
    const size_t huge = (size_t)2 << 20, size = (bytes + huge - 1) / huge * huge;
    void *p = aligned_alloc(huge, size);
    if (p)
        glm_huge_pages(p, size);
    return p;
}

struct glm_pool *glm_pool_create(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    struct glm_pool *pool = forks_are_watched ? aligned_alloc(64, sizeof *pool) : NULL;
    if (!pool)
        return NULL;
    memset(pool, 0, sizeof *pool);
    pool->caller_scratch = glm_aligned(GLM_SCRATCH);
    pool->second_scratch = glm_aligned(GLM_SCRATCH);
    if (!pool->caller_scratch || !pool->second_scratch) {
        free(pool->caller_scratch);
        free(pool->second_scratch);
        free(pool);
        return NULL;
    }
    pool->threads = default_threads();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    enlist(pool);
    return pool;
}

static void wake_sleepers(struct glm_pool *pool)
{
    if (!atomic_load(&pool->asleep))
        return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static void join_workers(struct glm_pool *pool)
{
    if (pool->workers) {
        atomic_store(&pool->quit, 1);
        wake_sleepers(pool);
        for (int i = 0; i < pool->workers; i++)
            pthread_join(pool->worker[i], NULL);
        atomic_store(&pool->quit, 0);
    }
    pool->workers = 0;
}

void glm_pool_destroy(struct glm_pool *pool)
{
    if (!pool)
        return;
    delist(pool);
    join_workers(pool);
    for (int i = 0; i < MAX_THREADS; i++)
        free(pool->scratch[i]);
    free(pool->caller_scratch);
    free(pool->second_scratch);
    free(pool);
}

/* Starts missing workers; fewer than asked for is slower, never wrong. */
static void start_workers(struct glm_pool *pool)
{
    if (pool->workers > pool->threads - 1)
        join_workers(pool);
    while (pool->workers < pool->threads - 1 && pool->refused != pool->threads) {
        const int i = pool->workers;
        struct seat *seat = malloc(sizeof *seat);
        if (!pool->scratch[i])
            pool->scratch[i] = glm_aligned(GLM_SCRATCH);
        if (seat)
            *seat = (struct seat){pool, i};
        if (!seat || !pool->scratch[i] ||
            pthread_create(&pool->worker[i], NULL, worker_main, seat) != 0) {
            free(seat);
            pool->refused = pool->threads; /* asking again at every op would cost more than it */
            return;
        }
        pool->workers++;
    }
}

void glm_pool_set_threads(struct glm_pool *pool, int threads)
{
    pool->threads = threads < 1             ? 1
                    : threads > MAX_THREADS ? MAX_THREADS
                                            : threads; /* the next run starts or ends them */
}

int glm_pool_threads(const struct glm_pool *pool) { return pool->threads; }

void glm_pool_set_poll(struct glm_pool *pool, int (*poll)(void *arg), void *arg)
{
    polled_here = poll ? pool : NULL;
    pool->poll = poll;
    pool->poll_arg = arg;
    atomic_store(&pool->stop, 0);
    pool->polled = glm_milliseconds();
}

int glm_pool_stopped(const struct glm_pool *pool)
{
    return atomic_load(&((struct glm_pool *)pool)->stop);
}

static void poll_now_and_then(struct glm_pool *pool)
{
    if (!pool->polls || !pool->poll || atomic_load_explicit(&pool->stop, memory_order_relaxed))
        return;
    const int64_t now = glm_milliseconds();
    if (now - pool->polled < 50)
        return;
    pool->polled = now;
    if (pool->poll(pool->poll_arg))
        atomic_store(&pool->stop, 1);
}

static void work_and_poll(struct glm_pool *pool)
{
    for (int task, end; poll_now_and_then(pool), take_tasks(pool, 0, &task, &end);)
        for (; task < end; task++)
            pool->fn(pool->arg, task, pool->caller_scratch);
}

/* No worker enters any more; returns when those inside have left. */
static void close_run(struct glm_pool *pool)
{
    atomic_fetch_add(&pool->state, INSIDE);
    for (int spin = 0; spin < SPINS && atomic_load(&pool->state) % INSIDE; spin++)
        relax();
    if (atomic_load(&pool->state) % INSIDE == 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->waiting, 1);
    while (atomic_load(&pool->state) % INSIDE)
        pthread_cond_wait(&pool->done, &pool->mutex);
    atomic_store(&pool->waiting, 0);
    pthread_mutex_unlock(&pool->mutex);
}

/* Tasks for a thread to take at a time: enough to be worth it, few enough that all end together. */
static int taken(const struct glm_pool *pool, int n_tasks, size_t ns)
{
    const size_t few = (size_t)n_tasks * TAKEN / (ns + 1), most = (size_t)n_tasks;
    const size_t fair = most / (4 * (size_t)pool->threads) + 1;
    return (int)(few < 1 ? 1 : few < fair ? few : fair);
}

void glm_pool_run(struct glm_pool *pool, int n_tasks, size_t ns, glm_task fn, const void *arg)
{
    if (n_tasks < 1)
        return;
    if (atomic_exchange(&pool->busy, 1)) { /* another caller's op is running */
        while (atomic_exchange(&pool->second_busy, 1))
            sched_yield(); /* a third waits for the second, who waits for nobody */
        for (int task = 0; task < n_tasks; task++)
            fn(arg, task, pool->second_scratch);
        atomic_store(&pool->second_busy, 0);
        return;
    }
    if (ns < SHARED) { /* too short to look at the clock, too */
        for (int task = 0; task < n_tasks; task++)
            fn(arg, task, pool->caller_scratch);
        atomic_store(&pool->busy, 0);
        return;
    }
    const int alone =
        n_tasks == 1 || pool->threads == 1 || (ns < WOKEN && atomic_load(&pool->asleep));
    if (!alone)
        start_workers(pool);
    pool->polls = polled_here == pool;
    pool->take = taken(pool, n_tasks, ns);
    pool->fn = fn;
    pool->arg = arg;
    pool->shares = alone ? 1 : pool->workers < n_tasks ? pool->workers + 1 : n_tasks;
    for (int i = 0; i < pool->shares; i++) {
        const int begin = (int)((int64_t)n_tasks * i / pool->shares);
        atomic_store_explicit(&pool->share[i].next, begin, memory_order_relaxed);
        pool->share[i].end = (int)((int64_t)n_tasks * (i + 1) / pool->shares);
    }
    if (pool->shares == 1) {
        work_and_poll(pool);
    } else {
        atomic_fetch_add(&pool->state, INSIDE);
        wake_sleepers(pool);
        work_and_poll(pool);
        close_run(pool);
    }
    atomic_store(&pool->busy, 0);
}
