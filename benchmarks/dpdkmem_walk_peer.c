/* dpdkmem's side of the walk benchmark: dpdkmem_walk_peer ROUNDS SOCKET, a secondary. See walk_peer.h. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "dpdkmem.h"

static struct dm_memory *m;

static int count_seg(const struct dm_list_info *list, const struct dm_memseg_info *seg, void *arg)
{
    (void)list;
    (void)seg;
    ++*(uint64_t *)arg;
    return 0;
}

static int count_run(const struct dm_list_info *list, const struct dm_memseg_info *seg, uint64_t bytes, void *arg)
{
    (void)list;
    (void)seg;
    *(uint64_t *)arg += bytes;
    return 0;
}

static uint64_t walk(void)
{
    uint64_t n = 0;

    dm_memseg_walk(m, count_seg, &n);
    return n;
}

static uint64_t contig_walk(void)
{
    uint64_t n = 0;

    dm_memseg_contig_walk(m, count_run, &n);
    return n;
}

static uint64_t virt2memseg(const char *p)
{
    struct dm_memseg_info seg = { 0 };

    dm_virt2memseg(m, p, &seg);
    return seg.bytes;
}

static uint64_t virt2iova(const char *p)
{
    return dm_virt2iova(m, p);
}

static uint64_t iova2virt(uint64_t iova)
{
    return (uintptr_t)dm_iova2virt(m, iova);
}

static int longest_run(const struct dm_list_info *list, const struct dm_memseg_info *seg, uint64_t bytes, void *arg)
{
    struct { char *first; uint64_t bytes; } *best = arg;

    (void)list;
    if (bytes > best->bytes) {
        best->first = (char *)(uintptr_t)seg->vaddr;
        best->bytes = bytes;
    }
    return 0;
}

static void first_and_bytes(char **first, uint64_t *bytes)
{
    struct { char *first; uint64_t bytes; } best = { NULL, 0 };

    dm_memseg_contig_walk(m, longest_run, &best);
    *first = best.first;
    *bytes = best.bytes;
}

#include "walk_peer.h"

int main(int argc, char **argv)
{
    char error[512];
    struct dm_attach_options options = { .socket_path = argc > 2 ? argv[2] : NULL };

    if (dm_attach(&options, &m, error, sizeof(error))) {
        printf("{\"error\": \"cannot attach\"}\n");
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    measure(atoi(argv[1]));
    dm_detach(m);
    return 0;
}
