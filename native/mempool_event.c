/* mempool_event.c - functions of this process that are told when it makes a pool ready or ends one.
 *
 * Owns dm_memory.mempool_events. A function may register and unregister inside: what is called is decided before the first call,
 * and asked again before each. Registered ones end with the attachment. */
#include <errno.h>
#include <stdlib.h>

#include "mempool.h"

struct entry {
	dm_mempool_event_callback fn;
	void *arg;
	uint64_t number;            /* of the registration: never used again */
	struct entry *next;
};

struct dm_mempool_events {
	pthread_mutex_t lock;
	uint64_t n_registered;
	struct entry *first;
};

static struct dm_mempool_events *events_of(struct dm_memory *m)
{
	struct dm_mempool_events *e = __atomic_load_n(&m->mempool_events, __ATOMIC_ACQUIRE), *none = NULL;

	if (e != NULL)
		return e;
	e = calloc(1, sizeof(*e));
	if (e == NULL)
		return NULL;
	pthread_mutex_init(&e->lock, NULL);
	if (__atomic_compare_exchange_n(&m->mempool_events, &none, e, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		return e;
	pthread_mutex_destroy(&e->lock);
	free(e);
	return none;
}

static struct entry **find(struct dm_mempool_events *e, dm_mempool_event_callback fn, const void *arg)
{
	struct entry **at = &e->first;

	while (*at != NULL && ((*at)->fn != fn || (*at)->arg != arg))
		at = &(*at)->next;
	return at;
}

int dm_mempool_event_callback_register(struct dm_memory *m, dm_mempool_event_callback fn, void *arg)
{
	struct dm_mempool_events *e;
	struct entry *one;
	struct entry **at;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (fn == NULL)
		return dm_fail(m, -EINVAL, "events of pools need a function");
	e = events_of(m);
	one = malloc(sizeof(*one));
	if (e == NULL || one == NULL) {
		free(one);
		return dm_fail(m, -ENOMEM, "no memory for one more function");
	}
	pthread_mutex_lock(&e->lock);
	at = find(e, fn, arg);
	if (*at != NULL)
		err = -EEXIST;
	else {
		*one = (struct entry){ .fn = fn, .arg = arg, .number = ++e->n_registered };
		*at = one;
	}
	pthread_mutex_unlock(&e->lock);
	if (err == 0)
		return 0;
	free(one);
	return dm_fail(m, err, "that function is registered with that argument");
}

int dm_mempool_event_callback_unregister(struct dm_memory *m, dm_mempool_event_callback fn, void *arg)
{
	struct dm_mempool_events *e = __atomic_load_n(&m->mempool_events, __ATOMIC_ACQUIRE);
	struct entry **at, *gone = NULL;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (e != NULL) {
		pthread_mutex_lock(&e->lock);
		at = find(e, fn, arg);
		gone = *at;
		if (gone != NULL)
			*at = gone->next;
		pthread_mutex_unlock(&e->lock);
	}
	free(gone);
	return gone != NULL ? 0 : dm_fail(m, -ENOENT, "that function is not registered with that argument");
}

/* The first registration after *number, of those up to `last`. */
static bool next_of(struct dm_mempool_events *e, uint64_t *number, uint64_t last, struct entry *out)
{
	bool found = false;

	pthread_mutex_lock(&e->lock);
	for (const struct entry *one = e->first; one != NULL && !found; one = one->next)
		if (one->number > *number && one->number <= last) {
			*out = *one;
			*number = one->number;
			found = true;
		}
	pthread_mutex_unlock(&e->lock);
	return found;
}

void dm_mempool_event(struct dm_memory *m, int event, struct dm_mempool *p)
{
	struct dm_mempool_events *e = __atomic_load_n(&m->mempool_events, __ATOMIC_ACQUIRE);
	struct entry one;
	uint64_t number = 0, last;

	if (e == NULL)
		return;
	pthread_mutex_lock(&e->lock);
	last = e->n_registered;
	pthread_mutex_unlock(&e->lock);
	while (next_of(e, &number, last, &one))
		one.fn(event, p, one.arg);
}

void dm_mempool_events_close(struct dm_memory *m)
{
	struct dm_mempool_events *e = m->mempool_events;
	struct entry *one;

	if (e == NULL)
		return;
	while ((one = e->first) != NULL) {
		e->first = one->next;
		free(one);
	}
	pthread_mutex_destroy(&e->lock);
	free(e);
	m->mempool_events = NULL;
}
