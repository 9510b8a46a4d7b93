/* What both sides of the pool benchmark do once they have a pool; included by dpdk_mempool_peer.c and dpdkmem_mempool_peer.c.
 *
 * The includer defines, before: get(objs, n), put(objs, n), inline; N_OBJECTS and CACHE_SIZE go for both.
 * measure(): for each bulk, batches of get and put of BATCH objects at a time; prints one JSON
 * line: {"bulk N": picoseconds per object for get and put, ...}, the median of many batches. As mempool_perf_autotest with
 * n_get_bulk == n_put_bulk == n_keep.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_BULK = 32, N_BATCHES = 101, BATCH = 1 << 16 };

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void fail(const char *what)
{
    printf("{\"error\": \"%s\"}\n", what);
    exit(1);
}

/* A constant bulk is what packet programs have: the compiler knows it. */
#define ROUND(bulk)                                                              \
    static int64_t round_##bulk(void)                                            \
    {                                                                            \
        void *objs[bulk];                                                        \
        int64_t start = now_ns();                                                \
                                                                                 \
        for (int i = 0; i < BATCH / bulk; i++) {                                 \
            if (get(objs, bulk))                                                 \
                fail("the pool is empty");                                       \
            put(objs, bulk);                                                     \
        }                                                                        \
        return now_ns() - start;                                                 \
    }
ROUND(1)
ROUND(8)
ROUND(32)

/* Objects are kept for a while, as in a descriptor ring: a burst is got, and the oldest one is put. */
static int64_t round_keep(void)
{
    enum { KEEP = 1024, BULK = 32 };
    static void *kept[KEEP];
    static unsigned int filled;
    int64_t start;

    for (; filled < KEEP; filled += BULK)
        if (get(kept + filled, BULK))
            fail("the pool is empty");
    start = now_ns();
    for (unsigned int i = 0; i < BATCH / BULK; i++) {
        void **place = kept + i * BULK % KEEP;

        put(place, BULK);
        if (get(place, BULK))
            fail("the pool is empty");
    }
    return now_ns() - start;
}

static const struct {
    const char *name;
    int64_t (*run)(void);
} figures[] = {
    { "bulk 1", round_1 },
    { "bulk 8", round_8 },
    { "bulk 32", round_32 },
    { "bulk 32, 1024 kept", round_keep },
};

static void measure(void)
{
    for (size_t i = 0; i < sizeof(figures) / sizeof(figures[0]); i++) {
        int64_t ns[N_BATCHES];

        for (int k = 0; k < N_BATCHES; k++)
            ns[k] = figures[i].run();
        qsort(ns, N_BATCHES, sizeof(ns[0]), compare);
        printf("%s\"%s\": %" PRId64, i ? ", " : "{", figures[i].name, ns[N_BATCHES / 2] * 1000 / BATCH);
    }
    printf("}\n");
    fflush(stdout);
}

/* Measures once for each line on standard input. */
static void serve(void)
{
    char line[64];

    printf("{\"ready_ns\": %" PRId64 ", \"call_ns\": 0, \"pages\": 0}\n", now_ns());
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin))
        measure();
}
