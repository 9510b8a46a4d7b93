/* DPDK's side of the heap benchmark: … EAL-OPTIONS. Threads that are not EAL's, as programs have them. See heap_peer.h. */
#include <rte_eal.h>
#include <rte_malloc.h>

#include <unistd.h>

static void *allocate(size_t bytes) { return rte_malloc(NULL, bytes, 0); }
static void *zero_allocate(size_t bytes) { return rte_zmalloc(NULL, bytes, 0); }
static void release(void *p) { rte_free(p); }

static void start(int argc, char **argv)
{
    int out = dup(1);

    dup2(2, 1); /* EAL writes its log to standard output */
    if (rte_eal_init(argc, argv) < 0)
        _exit(1);
    dup2(out, 1);
}

#include "heap_peer.h"
