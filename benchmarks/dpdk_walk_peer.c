/* DPDK's side of the walk benchmark: dpdk_walk_peer ROUNDS EAL-OPTIONS. See walk_peer.h. */
#include <rte_eal.h>
#include <rte_memory.h>

#include <stdint.h>
#include <unistd.h>

static int count_seg(const struct rte_memseg_list *list, const struct rte_memseg *seg, void *arg)
{
    (void)list;
    (void)seg;
    ++*(uint64_t *)arg;
    return 0;
}

static int count_run(const struct rte_memseg_list *list, const struct rte_memseg *seg, size_t bytes, void *arg)
{
    (void)list;
    (void)seg;
    *(uint64_t *)arg += bytes;
    return 0;
}

static uint64_t walk(void)
{
    uint64_t n = 0;

    rte_memseg_walk(count_seg, &n);
    return n;
}

static uint64_t contig_walk(void)
{
    uint64_t n = 0;

    rte_memseg_contig_walk(count_run, &n);
    return n;
}

static uint64_t virt2memseg(const char *p)
{
    return rte_mem_virt2memseg(p, NULL)->len;
}

static uint64_t virt2iova(const char *p)
{
    return rte_mem_virt2iova(p);
}

static uint64_t iova2virt(uint64_t iova)
{
    return (uintptr_t)rte_mem_iova2virt(iova);
}

static int longest_run(const struct rte_memseg_list *list, const struct rte_memseg *seg, size_t bytes, void *arg)
{
    struct { char *first; uint64_t bytes; } *best = arg;

    (void)list;
    if (bytes > best->bytes) {
        best->first = seg->addr;
        best->bytes = bytes;
    }
    return 0;
}

static void first_and_bytes(char **first, uint64_t *bytes)
{
    struct { char *first; uint64_t bytes; } best = { NULL, 0 };

    rte_memseg_contig_walk(longest_run, &best);
    *first = best.first;
    *bytes = best.bytes;
}

#include "walk_peer.h"

int main(int argc, char **argv)
{
    int n_rounds = argc > 1 ? atoi(argv[1]) : 1, out = dup(1);

    dup2(2, 1); /* EAL writes its log to standard output */
    argv[1] = argv[0];
    if (rte_eal_init(argc - 1, argv + 1) < 0)
        return 1;
    dup2(out, 1);
    measure(n_rounds);
    fflush(stdout);
    rte_eal_cleanup();
    return 0;
}
