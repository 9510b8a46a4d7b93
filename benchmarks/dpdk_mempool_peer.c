/* DPDK's side of the pool benchmark: dpdk_mempool_peer EAL-OPTIONS; `--proc-type=secondary` looks the pool up. See mempool_peer.h. */
#include <rte_eal.h>
#include <rte_lcore.h>
#include <rte_mempool.h>

#include <unistd.h>

enum { N_OBJECTS = 16383, ELEMENT_BYTES = 2048, CACHE_SIZE = 256 };

static struct rte_mempool *pool;

static inline int get(void **objs, unsigned int n)
{
    return rte_mempool_get_bulk(pool, objs, n);
}

static inline void put(void **objs, unsigned int n)
{
    rte_mempool_put_bulk(pool, objs, n);
}

#include "mempool_peer.h"

int main(int argc, char **argv)
{
    int out = dup(1);

    dup2(2, 1); /* EAL writes its log to standard output */
    if (rte_eal_init(argc, argv) < 0)
        return 1;
    dup2(out, 1);
    pool = rte_eal_process_type() == RTE_PROC_PRIMARY
               ? rte_mempool_create("bench", N_OBJECTS, ELEMENT_BYTES, CACHE_SIZE, 0, NULL, NULL, NULL, NULL, SOCKET_ID_ANY, 0)
               : rte_mempool_lookup("bench");
    if (!pool)
        fail("there is no pool");
    serve();
    rte_eal_cleanup();
    return 0;
}
