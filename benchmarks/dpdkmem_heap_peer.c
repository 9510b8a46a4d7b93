/* dpdkmem's side of the heap benchmark: … SOCKET, a secondary. See heap_peer.h. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "dpdkmem.h"

static struct dm_memory *m;

static void *allocate(size_t bytes) { return dm_malloc(m, bytes, 0); }
static void *zero_allocate(size_t bytes) { return dm_zmalloc(m, bytes, 0); }
static void release(void *p) { dm_free(m, p); }

static void start(int argc, char **argv)
{
    char error[512];
    struct dm_attach_options options = { .socket_path = argc > 1 ? argv[1] : NULL };

    if (dm_attach(&options, &m, error, sizeof(error)) == 0)
        return;
    fprintf(stderr, "%s\n", error);
    exit(1);
}

#include "heap_peer.h"
