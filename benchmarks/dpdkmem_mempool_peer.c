/* dpdkmem's side of the pool benchmark: dpdkmem_mempool_peer SOCKET NAME FLAGS, a secondary; makes the pool, or finds it.
 * See mempool_peer.h. */
#include "dpdkmem_mempool.h"

enum { N_OBJECTS = 16383, ELEMENT_BYTES = 2048, CACHE_SIZE = 256 };

static struct dm_mempool *pool;
static const struct dm_self *self;

static inline int get(void **objs, unsigned int n)
{
    return dm_mempool_get_bulk(pool, self, objs, n);
}

static inline void put(void **objs, unsigned int n)
{
    dm_mempool_put_bulk(pool, self, objs, n);
}

#include "mempool_peer.h"

int main(int argc, char **argv)
{
    struct dm_memory *m;
    char error[512];
    const struct dm_attach_options options = { .socket_path = argc > 1 ? argv[1] : NULL };
    struct dm_mempool_spec spec = { .n = N_OBJECTS, .elt_size = ELEMENT_BYTES, .cache_size = CACHE_SIZE, .numa_node = DM_NUMA_ANY };

    if (argc < 4 || dm_attach(&options, &m, error, sizeof(error)))
        fail("cannot attach");
    spec.name = argv[2];
    spec.flags = (uint32_t)strtoul(argv[3], NULL, 0);
    self = dm_self(m);
    if (!self || (dm_mempool_lookup(m, spec.name, &pool) && dm_mempool_create(m, &spec, &pool)))
        fail(dm_error_text(m));
    serve();
    dm_detach(m);
    return 0;
}
