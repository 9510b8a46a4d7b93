/* mimalloc's side of the heap benchmark. See heap_peer.h. */
#include <mimalloc.h>

static void *allocate(size_t bytes) { return mi_malloc(bytes); }
static void *zero_allocate(size_t bytes) { return mi_zalloc(bytes); }
static void release(void *p) { mi_free(p); }

static void start(int argc, char **argv)
{
    (void)argc;
    (void)argv;
}

#include "heap_peer.h"
