/* robust.c - a node of ours on the robust list that the thread's libc keeps.
 *
 * The kernel walks one list per thread at its death (set_robust_list(2)); libc has registered its own for robust
 * mutexes, so we link ourselves into that one, by the protocol that glibc (nptl/descr.h ENQUEUE_MUTEX, DEQUEUE_MUTEX)
 * and musl (pthread_mutex_trylock.c, pthread_mutex_unlock.c) share on 64-bit machines:
 *  - an entry is a pointer to a `next` word, bit 0 set for PI mutexes; the list ends at the head's own address;
 *  - libc writes the `prev` word, 8 bytes before `next`, of the entry that follows the one that it links or unlinks:
 *    so ours is kept right while the program locks and unlocks robust mutexes of its own;
 *  - list_op_pending names the entry while it is linked or unlinked, so that a death in between is covered.
 * The kernel touches the word at entry + futex_offset, and only if it holds the dying thread's tid (kernel/futex/core.c
 * handle_futex_death). glibc registers at thread start; musl at the first robust mutex, so one is locked once.
 * A thread that no libc has made (clone(2) by hand) has no list at all: it gets a head of ours.
 * glibc's `prev` of the head (robust_prev) is written by nobody but itself and read by nobody: left alone, as musl has none. */
#include <assert.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "crash.h"
#include "robust.h"

static_assert(sizeof(void *) == 8, "32-bit libcs keep a singly linked list");
static_assert(offsetof(struct dm_robust_node, next) == 8, "libc writes prev 8 bytes before next");

enum { OWN_DISTANCE = -32 }; /* bytes; as glibc's */

static struct robust_list_head *registered_head(void)
{
	struct robust_list_head *head = NULL;
	size_t bytes = 0;

	if (syscall(SYS_get_robust_list, 0, &head, &bytes) != 0 || bytes != sizeof(*head))
		return NULL;
	return head;
}

/* Makes a libc that registers lazily do so. */
static void lock_a_robust_mutex(void)
{
	pthread_mutexattr_t attr;
	pthread_mutex_t mutex;

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&mutex, &attr);
	pthread_mutex_lock(&mutex);
	pthread_mutex_unlock(&mutex);
	pthread_mutex_destroy(&mutex);
	pthread_mutexattr_destroy(&attr);
}

static void register_own(struct robust_list_head *own)
{
	own->list.next = &own->list;
	own->futex_offset = OWN_DISTANCE;
	own->list_op_pending = NULL;
	syscall(SYS_set_robust_list, own, sizeof(*own));
}

int dm_robust_open(struct robust_list_head *own, long *distance)
{
	if (registered_head() == NULL)
		lock_a_robust_mutex();
	if (registered_head() == NULL)
		register_own(own);
	if (registered_head() == NULL)
		return -EOPNOTSUPP;
	*distance = registered_head()->futex_offset;
	return 0;
}

void dm_robust_close(struct robust_list_head *own)
{
	if (registered_head() == own)
		syscall(SYS_set_robust_list, NULL, sizeof(*own));
}

static void *entry_address(void *entry)
{
	return (void *)((uintptr_t)entry & ~(uintptr_t)1);
}

static struct dm_robust_node *node_of(void *entry)
{
	return (struct dm_robust_node *)((uintptr_t)entry_address(entry) - offsetof(struct dm_robust_node, next));
}

void dm_robust_link(struct dm_robust_node *node, _Atomic uint32_t *word, uint32_t tid)
{
	struct robust_list_head *head = registered_head();
	void *first = head->list.next;

	head->list_op_pending = (struct robust_list *)(void *)&node->next;
	dm_order();
	atomic_store_explicit(word, tid, memory_order_release);
	DM_CRASH_POINT("robust: word set, not linked");
	node->next = first;
	node->prev = &head->list;
	if (entry_address(first) != &head->list)
		node_of(first)->prev = &node->next;
	dm_order();
	head->list.next = (struct robust_list *)(void *)&node->next;
	DM_CRASH_POINT("robust: linked, still pending");
	dm_order();
	head->list_op_pending = NULL;
}

uint32_t dm_robust_unlink(struct dm_robust_node *node, _Atomic uint32_t *word)
{
	struct robust_list_head *head = registered_head();
	uint32_t old;

	head->list_op_pending = (struct robust_list *)(void *)&node->next;
	dm_order();
	if (entry_address(node->next) != &head->list)
		node_of(node->next)->prev = node->prev;
	*(void **)node->prev = node->next; /* prev is the address of a next word, the head's included */
	dm_order();
	DM_CRASH_POINT("robust: unlinked, still pending");
	node->next = NULL;
	node->prev = NULL;
	old = atomic_exchange_explicit(word, 0, memory_order_acq_rel);
	dm_order();
	head->list_op_pending = NULL;
	return old;
}
