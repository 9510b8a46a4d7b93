/* bell.c - how anybody tells the primary to look at the heaps: a futex word, and the primary's thread that waits on it.
 *
 * Owns control.bell. Who rings sets it to 1 and wakes the thread; the thread clears it, then makes an eventfd of the primary's
 * loop readable: what was changed before the ring is seen after the read.
 * Rules: ringing needs no descriptor, so a process that has closed all of its own can ring, and it waits for nobody. A
 * futex wake, unlike a message on an AF_UNIX socket, is no hint to the scheduler that the waker is about to sleep.
 * If the ringer dies between word and wake, the primary's look once a second does; if the primary is dead, the word stays 1 and
 * nobody is woken. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>

#include "eventfd.h"
#include "futex.h"
#include "memory.h"

enum { WAIT_S = 60 }; /* one wait; stop and ring both wake it */

struct dm_bell {
	struct dm_control *ctl;
	int fd;
	pthread_t thread;
	_Atomic bool stop;
};

void dm_bell_ring(struct dm_control *c)
{
	uint32_t quiet = 0;

	if (atomic_load_explicit(&c->bell, memory_order_relaxed) == 0 && atomic_compare_exchange_strong(&c->bell, &quiet, 1))
		dm_futex_wake(&c->bell, 1);
}

static void *bell_thread(void *arg)
{
	struct dm_bell *b = arg;

	prctl(PR_SET_NAME, "dm-bell");
	while (!atomic_load(&b->stop)) {
		if (atomic_exchange(&b->ctl->bell, 0) == 0) {
			dm_futex_wait(&b->ctl->bell, 0, WAIT_S * (int64_t)DM_NS_PER_S);
			continue;
		}
		dm_eventfd_tell(b->fd);
	}
	return NULL;
}

int dm_bell_start(struct dm_control *c, int fd, struct dm_bell **out)
{
	struct dm_bell *b = calloc(1, sizeof(*b));
	sigset_t all, old;
	int err;

	if (b == NULL)
		return -ENOMEM;
	b->ctl = c;
	b->fd = fd;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&b->thread, NULL, bell_thread, b);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err != 0) {
		free(b);
		return -err;
	}
	*out = b;
	return 0;
}

void dm_bell_stop(struct dm_bell *b)
{
	if (b == NULL)
		return;
	atomic_store(&b->stop, true);
	atomic_store(&b->ctl->bell, 1);
	dm_futex_wake(&b->ctl->bell, 1);
	pthread_join(b->thread, NULL);
	free(b);
}
