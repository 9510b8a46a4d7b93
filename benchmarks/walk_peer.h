/* What both sides of the walk benchmark do once they have their memory; included by dpdk_walk_peer.c and dpdkmem_walk_peer.c.
 *
 * The includer defines, before: walk(), contig_walk() (return the memsegs or bytes that they saw), virt2memseg(p),
 * virt2iova(p), iova2virt(iova) (return something that depends on the answer), and first_and_bytes(&p, &bytes): the memory.
 *
 * Prints one JSON line: {"segments": N, "ROUND figure": ns, ...}. A figure of a walk is one walk; of a conversion 1000 calls on
 * addresses spread over the memory.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { N_CALLS = 1000 };

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static volatile uint64_t sink; /* so that no call is left out */
static char *spread[N_CALLS];
static uint64_t iovas[N_CALLS];

static uint64_t call_virt2memseg(void)
{
    uint64_t sum = 0;

    for (int i = 0; i < N_CALLS; i++)
        sum += virt2memseg(spread[i]);
    return sum;
}

static uint64_t call_virt2iova(void)
{
    uint64_t sum = 0;

    for (int i = 0; i < N_CALLS; i++)
        sum += virt2iova(spread[i]);
    return sum;
}

static uint64_t call_iova2virt(void)
{
    uint64_t sum = 0;

    for (int i = 0; i < N_CALLS; i++)
        sum += iova2virt(iovas[i]);
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*call)(void);
} figures[] = {
    { "walk", walk },
    { "contig walk", contig_walk },
    { "1000 virt2memseg", call_virt2memseg },
    { "1000 virt2iova", call_virt2iova },
    { "1000 iova2virt", call_iova2virt },
};

static void measure(int n_rounds)
{
    char *first;
    uint64_t bytes, state = 88172645463325252u;

    first_and_bytes(&first, &bytes);
    for (int i = 0; i < N_CALLS; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        spread[i] = first + state % bytes;
        iovas[i] = virt2iova(spread[i]);
        if (iova2virt(iovas[i]) != (uintptr_t)spread[i]) {
            printf("{\"error\": \"an address does not convert there and back\"}\n");
            exit(1);
        }
    }
    printf("{\"segments\": %" PRIu64, walk());
    for (int round = 0; round < n_rounds; round++) {
        for (size_t i = 0; i < sizeof(figures) / sizeof(figures[0]); i++) {
            int64_t start = now_ns();

            sink += figures[i].call();
            printf(", \"%d %s\": %" PRId64, round, figures[i].name, now_ns() - start);
        }
    }
    printf("}\n");
}
