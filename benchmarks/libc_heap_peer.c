/* The C library's side of the heap benchmark. See heap_peer.h. */
#include <stdlib.h>

static void *allocate(size_t bytes) { return malloc(bytes); }
static void *zero_allocate(size_t bytes) { return calloc(1, bytes); }
static void release(void *p) { free(p); }

static void start(int argc, char **argv)
{
    (void)argc;
    (void)argv;
}

#include "heap_peer.h"
