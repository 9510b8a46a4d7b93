/* robust.h - a node of ours on the calling thread's robust list.
 *
 * Owns the protocol of robust.c; lane.c alone uses it. */
#ifndef DM_ROBUST_H
#define DM_ROBUST_H

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>

/* The node's `next` word as the kernel reads it; libc's `prev` word stands 8 bytes before it. */
struct dm_robust_node {
	void *prev;
	void *next;
};

/* Where the liveness word must be: bytes from the node's `next` word. Registers own, which must live until
 * dm_robust_close(), if libc has no list for this thread. -EOPNOTSUPP: no robust list to be had. */
int dm_robust_open(struct robust_list_head *own, long *distance);
void dm_robust_close(struct robust_list_head *own);
/* Writes tid into word and links the node; the kernel sets FUTEX_OWNER_DIED in word if the thread dies from then on. */
void dm_robust_link(struct dm_robust_node *node, _Atomic uint32_t *word, uint32_t tid);
/* Unlinks and writes 0 into word. Returns the old word: it may hold FUTEX_WAITERS. */
uint32_t dm_robust_unlink(struct dm_robust_node *node, _Atomic uint32_t *word);

#endif
