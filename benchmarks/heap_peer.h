/* What all sides of the heap benchmark do; included by each peer.
 *
 * The includer defines, before: allocate(bytes), zero_allocate(bytes), release(p), and start(argc, argv), which gets what follows the
 * common arguments, and may start nothing.
 *
 * Usage: PEER ROUNDS THREADS …. Prints "ready", waits for a line on standard input, and prints one JSON line {"ROUND figure": ns, ...}:
 * a figure is the time of one pair of malloc and free on each thread, all at once, times 1000. ROUNDS 0 makes load until it is killed.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { N_PAIRS = 200000, N_LIVE = 10000, N_FRESH = 128, FRESH_BYTES = 65536, MAX_THREADS = 8 };

static const struct {
    const char *name;
    size_t bytes; /* 0: objects of mixed size, N_LIVE of them at any time */
} figures[] = { { "64", 64 }, { "1024", 1024 }, { "4096", 4096 }, { "65536", 65536 }, { "live", 0 } };
enum { N_FIGURES = sizeof(figures) / sizeof(figures[0]) };

static int n_rounds, n_threads;
static pthread_barrier_t barrier;
static int64_t *taken; /* [thread][round][figure] */

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void check(const void *p)
{
    if (p != NULL)
        return;
    fprintf(stderr, "out of memory\n");
    exit(1);
}

static void pairs(size_t bytes)
{
    for (int i = 0; i < N_PAIRS; i++) {
        void *p = allocate(bytes);

        check(p);
        *(volatile char *)p = 1;
        release(p);
    }
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static size_t mixed(uint64_t random)
{
    return random % 10 < 8 ? 64 + (random >> 8) % 1000 : 64 + (random >> 8) % 8000;
}

static void replace(void **live, uint64_t *state)
{
    for (int i = 0; i < N_PAIRS; i++) {
        uint64_t random = next_random(state);
        void **at = &live[random % N_LIVE];

        release(*at);
        *at = allocate(mixed(random >> 16));
        check(*at);
        *(volatile char *)*at = 1;
    }
}

static void *run(void *arg)
{
    intptr_t me = (intptr_t)arg;
    void **live = malloc(N_LIVE * sizeof(*live));
    uint64_t state = 88172645463325252u + (uint64_t)me;

    check(live);
    for (int i = 0; i < N_LIVE; i++)
        check(live[i] = allocate(mixed(next_random(&state))));
    for (int round = 0; n_rounds == 0 || round < n_rounds; round++) {
        for (int i = 0; i < N_FIGURES; i++) {
            int64_t start;

            pthread_barrier_wait(&barrier);
            start = now_ns();
            if (figures[i].bytes != 0)
                pairs(figures[i].bytes);
            else
                replace(live, &state);
            if (n_rounds != 0)
                taken[(me * n_rounds + round) * N_FIGURES + i] = (now_ns() - start) * 1000 / N_PAIRS;
        }
    }
    for (int i = 0; i < N_LIVE; i++)
        release(live[i]);
    free(live);
    return NULL;
}

/* Memory that nobody had yet, if the side has some. */
static int64_t fresh(void *(*take)(size_t bytes))
{
    void *p[N_FRESH];
    int64_t start = now_ns(), ns;

    for (int i = 0; i < N_FRESH; i++)
        check(p[i] = take(FRESH_BYTES));
    ns = now_ns() - start;
    for (int i = 0; i < N_FRESH; i++)
        release(p[i]);
    return ns * 1000 / N_FRESH;
}

int main(int argc, char **argv)
{
    pthread_t threads[MAX_THREADS];
    int64_t fresh_malloc = 0, fresh_zmalloc = 0;
    char line[16];

    n_rounds = atoi(argv[1]);
    n_threads = atoi(argv[2]);
    start(argc - 2, argv + 2);
    taken = calloc((size_t)(n_rounds * n_threads * N_FIGURES + 1), sizeof(*taken));
    printf("ready\n");
    fflush(stdout);
    if (fgets(line, sizeof(line), stdin) == NULL)
        return 1;
    if (n_rounds != 0) {
        release(allocate(64)); /* whatever the first call of a thread costs */
        fresh_zmalloc = fresh(zero_allocate);
        fresh_malloc = fresh(allocate); /* not zero any more, which malloc does not care about */
    }
    pthread_barrier_init(&barrier, NULL, (unsigned)n_threads);
    for (intptr_t i = 0; i < n_threads; i++)
        pthread_create(&threads[i], NULL, run, (void *)i);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    printf("{\"fresh malloc\": %" PRId64 ", \"fresh zmalloc\": %" PRId64, fresh_malloc, fresh_zmalloc);
    for (int i = 0; i < n_threads * n_rounds * N_FIGURES; i++)
        printf(", \"%d %s\": %" PRId64, i / N_FIGURES, figures[i % N_FIGURES].name, taken[i]);
    printf("}\n");
    return 0;
}
