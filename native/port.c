/* port.c - opening and closing ports, starting and stopping queues: what is the same for all transports.
 *
 * Owns dm_memory.ports, the ports that this process has open, each once however often it was opened, and the table of transports. A port's
 * record, and who may end it: port_record.c. Two that open a port without a broker at once: the name of the zone decides, the other one joins.
 * A queue without a broker is taken, and taken over from the dead, under the zone lock, as the reaper frees it: holder, then owner_id, then state.
 *  | dies                                  | left                               | mended by                                          |
 *  | between holder and owner_id, state    | holder names a dead lane           | reaper, or who takes the queue next                |
 *  | stopping, before holder is 0          | the same                           | the same                                           |
 *  | a thread alone, with a queue          | this process's handle of it        | who starts that queue, or closes the port, here    |
 * Handles and descriptors are this process's: nothing of them outlives it. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "crash.h"
#include "futex.h"
#include "port.h"
#include "zone.h"

enum { OPEN_MS = 60000 }; /* of virtio_pci: until all memory is pinned, and other devices are open; others answer or fail at once */
enum { CLOSE_MS = 5000, DEFAULT_DESC = 256, MAX_DESC = 32768 };
enum { MAKE_TRIES = 1000 /* to join or make a port that others make and end meanwhile */, REAP_NS = 1000000000, LOOK_AGAIN_NS = 1000000 }; /* how long a death may take to be proved */

/* One line per transport. */
static const struct dm_transport *const transports[] = {
	&dm_port_null,
	&dm_port_packet,
	&dm_port_ring,
	&dm_port_tap,
	&dm_port_vhost,
	&dm_port_virtio_pci,
	&dm_port_virtio_user,
	&dm_port_xdp,
};
enum { N_TRANSPORTS = sizeof(transports) / sizeof(transports[0]) };

/* This process's bit in a record: of its own handle, and of ports that have it as their peer. */
struct hold {
	struct hold *next;
	struct dm_port_record *record;
	uint32_t n;
};

struct dm_ports {
	pthread_mutex_t mutex;
	struct dm_port *first;
	struct hold *holds;
};

static struct dm_ports *ports_of(struct dm_memory *m)
{
	struct dm_ports *p = __atomic_load_n(&m->ports, __ATOMIC_ACQUIRE), *none = NULL;

	if (p != NULL)
		return p;
	p = calloc(1, sizeof(*p));
	if (p == NULL)
		return NULL;
	pthread_mutex_init(&p->mutex, NULL);
	if (__atomic_compare_exchange_n(&m->ports, &none, p, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		return p;
	pthread_mutex_destroy(&p->mutex);
	free(p);
	return none;
}

/* ---- this process's bit in records; under the mutex ---- */

static int hold_existing(struct dm_memory *m, struct dm_ports *ports, const char *name, const char *spec, struct dm_port_record **out)
{
	struct hold *h = ports->holds;
	int err;

	while (h != NULL && strcmp(h->record->name, name) != 0)
		h = h->next;
	if (h != NULL && (spec == NULL || strcmp(h->record->spec, spec) == 0)) {
		h->n++;
		*out = h->record;
		return 0;
	}
	h = calloc(1, sizeof(*h));
	if (h == NULL)
		return dm_fail(m, -ENOMEM, "no memory for a port");
	err = dm_port_record_hold(m, name, spec, out);
	if (err != 0) {
		free(h);
		return err;
	}
	*h = (struct hold){ ports->holds, *out, 1 };
	ports->holds = h;
	return 0;
}

static int hold_new(struct dm_memory *m, struct dm_ports *ports, const struct dm_port_record *like, uint64_t extra_bytes,
		    struct dm_port_record **out)
{
	struct hold *h = calloc(1, sizeof(*h));
	int err;

	if (h == NULL)
		return dm_fail(m, -ENOMEM, "no memory for a port");
	err = dm_port_record_reserve(m, like, extra_bytes, out);
	if (err != 0) {
		free(h);
		return err;
	}
	*h = (struct hold){ ports->holds, *out, 1 };
	ports->holds = h;
	return 0;
}

/* True: it was the last one. */
static bool forget_hold(struct dm_ports *ports, const struct dm_port_record *r)
{
	struct hold **at = &ports->holds, *h;

	while ((*at)->record != r)
		at = &(*at)->next;
	h = *at;
	if (--h->n > 0)
		return false;
	*at = h->next;
	free(h);
	return true;
}

static int drop(struct dm_memory *m, struct dm_ports *ports, struct dm_port_record *r)
{
	return forget_hold(ports, r) ? dm_port_record_let_go(m, r) : 0;
}

int dm_port_hold_other(struct dm_memory *m, const char *name, bool is_locked, struct dm_port_record **out)
{
	struct dm_ports *ports = m->ports;
	int err;

	if (!is_locked && pthread_mutex_trylock(&ports->mutex) != 0)
		return -EAGAIN;
	err = hold_existing(m, ports, name, NULL, out);
	if (!is_locked)
		pthread_mutex_unlock(&ports->mutex);
	return err;
}

void dm_port_drop_other(struct dm_memory *m, struct dm_port_record *r, bool is_locked)
{
	struct dm_ports *ports = m->ports;

	if (!is_locked)
		pthread_mutex_lock(&ports->mutex);
	drop(m, ports, r);
	if (!is_locked)
		pthread_mutex_unlock(&ports->mutex);
}

/* ---- opening ---- */

/* What is known of a port before it is there. */
struct wish {
	const struct dm_transport *transport;
	struct dm_port_keys keys;
	struct dm_port_record like;
	uint64_t extra_bytes;
};

static int find_transport(struct dm_memory *m, const char *name, const struct dm_transport **out)
{
	char known[256] = "";
	int n = 0;

	for (int i = 0; i < N_TRANSPORTS; i++) {
		if (strcmp(transports[i]->name, name) == 0) {
			*out = transports[i];
			return 0;
		}
		n += snprintf(known + n, sizeof(known) - (size_t)n, "%s%s", i > 0 ? ", " : "", transports[i]->name);
	}
	return dm_fail(m, -ENOENT, "there is no transport \"%s\": there are %s", name, known);
}

static int judge(struct dm_memory *m, const char *spec, struct wish *w)
{
	int err = dm_port_parse(m, spec, &w->keys);

	if (err == 0)
		err = find_transport(m, w->keys.transport, &w->transport);
	if (err == 0 && w->transport->known_keys != NULL)
		err = dm_port_check_keys(m, &w->keys, w->transport->known_keys);
	if (err == 0)
		err = dm_port_name_of(m, &w->keys, w->like.name);
	if (err == 0)
		err = dm_port_canonical(m, &w->keys, w->like.spec);
	if (err == 0 && !w->transport->has_broker)
		err = dm_port_key_u32(m, &w->keys, "queues", 1, DM_PORT_MAX_QUEUES, 1, &w->like.n_queues);
	if (err != 0)
		return err;
	strcpy(w->like.transport, w->keys.transport);
	w->like.link = DM_LINK_UP;
	return w->transport->plan == NULL ? 0 : w->transport->plan(m, &w->keys, &w->like, &w->extra_bytes);
}

static int open_part(struct dm_port *port, bool is_maker)
{
	port->is_maker = is_maker;
	return port->transport->open == NULL ? 0 : port->transport->open(port);
}

/* *is_late: the name was taken meanwhile. */
static int make(struct dm_memory *m, struct dm_ports *ports, struct wish *w, struct dm_port *port, bool *is_late)
{
	char text[DM_ERROR_BYTES];
	int err;

	w->like.users[m->owner_id / 64] = UINT64_C(1) << m->owner_id % 64;
	err = hold_new(m, ports, &w->like, w->extra_bytes, &port->record);
	*is_late = err == -EEXIST;
	if (err != 0)
		return err;
	err = open_part(port, true);
	if (err == 0) {
		dm_port_record_publish(port->record);
		return 0;
	}
	snprintf(text, sizeof(text), "%s", dm_error_text(m));
	forget_hold(ports, port->record);
	dm_memzone_free(m, port->record->zone_idx, port->record->generation);
	return dm_fail(m, err, "%s", text);
}

static int join(struct dm_memory *m, struct dm_ports *ports, struct dm_port *port)
{
	char text[DM_ERROR_BYTES];
	int err = open_part(port, false);

	if (err == 0)
		return 0;
	snprintf(text, sizeof(text), "%s", dm_error_text(m));
	drop(m, ports, port->record);
	return dm_fail(m, err, "%s", text);
}

static int open_here(struct dm_memory *m, struct dm_ports *ports, struct wish *w, struct dm_port *port)
{
	bool is_late;
	int err;

	for (int tries = 0; tries < MAKE_TRIES; tries++) {
		err = hold_existing(m, ports, w->like.name, w->like.spec, &port->record);
		if (err == 0)
			return join(m, ports, port);
		if (err != -ENOENT)
			return err;
		err = make(m, ports, w, port, &is_late);
		if (!is_late)
			return err;
		sched_yield();
	}
	return dm_fail(m, -EBUSY, "port \"%s\": memzone PT_%s is in the way, and no port, or one that comes and goes", w->like.name, w->like.name);
}

static void fill_request(struct dm_port_request *r, uint32_t op, const char *name, const char *spec)
{
	*r = (struct dm_port_request){ .op = op };
	snprintf(r->name, sizeof(r->name), "%s", name);
	snprintf(r->spec, sizeof(r->spec), "%s", spec);
}

static int open_at_broker(struct dm_memory *m, const struct wish *w, struct dm_port *port)
{
	struct dm_port_record *found;
	struct dm_port_request request;
	struct dm_port_answer answer;
	int err;

	fill_request(&request, DM_PORT_OPEN, w->like.name, w->like.spec);
	err = dm_port_ask(m, &request, OPEN_MS, &answer, NULL, 0, NULL);
	if (err == 0)
		err = dm_port_record_find(m, w->like.name, &found);
	if (err == 0 && (uintptr_t)found != answer.record)
		err = dm_fail(m, -EPROTO, "the primary says that port \"%s\" is at 0x%llx, and it is at %p", w->like.name,
			      (unsigned long long)answer.record, (void *)found);
	if (err != 0)
		return err;
	port->record = found;
	err = open_part(port, false);
	if (err == 0)
		return 0;
	request.op = DM_PORT_CLOSE;
	dm_port_ask(m, &request, CLOSE_MS, &answer, NULL, 0, NULL);
	return err;
}

static struct dm_port *find_open(const struct dm_ports *ports, const char *name)
{
	struct dm_port *p = ports->first;

	while (p != NULL && strcmp(p->record->name, name) != 0)
		p = p->next;
	return p;
}

static int open_new(struct dm_memory *m, struct dm_ports *ports, struct wish *w, struct dm_port **out)
{
	struct dm_port *port = calloc(1, w->transport->port_bytes > sizeof(*port) ? w->transport->port_bytes : sizeof(*port));
	int err;

	if (port == NULL)
		return dm_fail(m, -ENOMEM, "no memory for a port");
	port->m = m;
	port->transport = w->transport;
	port->keys = w->keys;
	port->n_opens = 1;
	pthread_mutex_init(&port->mutex, NULL);
	err = w->transport->has_broker ? open_at_broker(m, w, port) : open_here(m, ports, w, port);
	if (err != 0) {
		pthread_mutex_destroy(&port->mutex);
		free(port);
		return err;
	}
	port->next = ports->first;
	ports->first = port;
	*out = port;
	return 0;
}

int dm_port_open(struct dm_memory *m, const char *spec, struct dm_port **out)
{
	struct wish w = { .extra_bytes = 0 };
	struct dm_ports *ports;
	struct dm_port *port;
	int err = dm_usable(m);

	if (err == 0)
		err = judge(m, spec, &w);
	if (err != 0)
		return err;
	ports = ports_of(m);
	if (ports == NULL)
		return dm_fail(m, -ENOMEM, "no memory for a port");
	pthread_mutex_lock(&ports->mutex);
	port = find_open(ports, w.like.name);
	if (port == NULL)
		err = open_new(m, ports, &w, out);
	else if (strcmp(port->record->spec, w.like.spec) != 0)
		err = dm_fail(m, -EEXIST, "port \"%s\" exists as \"%s\": open it by that spec, or give this one another name=", w.like.name,
			      port->record->spec);
	else {
		port->n_opens++;
		*out = port;
	}
	pthread_mutex_unlock(&ports->mutex);
	return err;
}

/* ---- queues ---- */

/* Whether who took it can do nothing to the device any more. A thread that ended in a living process has left its descriptors open there. */
static bool is_holder_gone(const struct dm_memory *m, const struct dm_queue_record *q, uint32_t word)
{
	const uint32_t id = __atomic_load_n(&q->owner_id, __ATOMIC_RELAXED);
	uint32_t state;

	if (word == 0)
		return true;
	if (!dm_lane_is_dead(m->ctl, word))
		return false;
	state = id < DM_MAX_OWNERS ? atomic_load(&dm_owner_at(m->ctl, id)->state) : DM_OWNER_FREE;
	return state != DM_OWNER_LIVE || atomic_load_explicit(&m->state, memory_order_relaxed) == -EPIPE; /* nobody is there who could say */
}

/* -EBUSY; -EAGAIN: its holder's thread has ended, its session not, or not yet. */
static int try_take(struct dm_port *port, struct dm_queue_record *q, const struct dm_self *self)
{
	int err = dm_zone_lock(port->m, -1);
	uint32_t word;

	if (err != 0)
		return err;
	word = __atomic_load_n(&q->holder, __ATOMIC_ACQUIRE);
	if (!is_holder_gone(port->m, q, word))
		err = dm_lane_is_dead(port->m->ctl, word) ? -EAGAIN : -EBUSY;
	else {
		__atomic_store_n(&q->holder, self->lock_word, __ATOMIC_RELEASE);
		DM_CRASH_POINT("port: queue has a holder");
		__atomic_store_n(&q->owner_id, self->owner_id, __ATOMIC_RELAXED);
		DM_CRASH_POINT("port: queue has an owner");
		__atomic_store_n(&q->state, DM_QUEUE_TAKEN, __ATOMIC_RELEASE);
	}
	dm_zone_unlock(port->m);
	return err;
}

static int take(struct dm_port *port, uint32_t idx, const struct dm_self *self)
{
	const int64_t until_ns = dm_now_ns(CLOCK_MONOTONIC) + REAP_NS;
	const struct timespec pause = dm_timespec(LOOK_AGAIN_NS);
	struct dm_queue_record *q = dm_port_queue(port->record, idx);
	const struct dm_owner *o;
	uint32_t id;
	int err;

	while ((err = try_take(port, q, self)) == -EAGAIN && dm_now_ns(CLOCK_MONOTONIC) < until_ns)
		nanosleep(&pause, NULL);
	if (err != -EBUSY && err != -EAGAIN)
		return err;
	id = __atomic_load_n(&q->owner_id, __ATOMIC_RELAXED);
	o = dm_owner_at(port->m->ctl, id < DM_MAX_OWNERS ? id : 0);
	return dm_fail(port->m, -EBUSY, "queue %u of port \"%s\" %s \"%.31s\" (process %d, session %u)", idx, port->record->name,
		       err == -EBUSY ? "is run by" : "was left running by a thread that ended in", o->name, o->pid, id);
}

/* If it is the holder's still: only that one gives it up, unless it is dead, so nothing comes between the look and the stores. */
static void give_back(struct dm_queue_record *q, uint32_t lock_word)
{
	if (__atomic_load_n(&q->holder, __ATOMIC_ACQUIRE) != lock_word)
		return;
	__atomic_store_n(&q->state, DM_QUEUE_FREE, __ATOMIC_RELAXED);
	DM_CRASH_POINT("port: queue free, its holder not yet gone");
	__atomic_store_n(&q->owner_id, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->holder, 0, __ATOMIC_RELEASE);
	DM_CRASH_POINT("port: queue given back");
}

static bool is_power_of_two(uint32_t n)
{
	return n != 0 && (n & (n - 1)) == 0;
}

static int judge_queue(struct dm_port *port, struct dm_queue_spec *s)
{
	struct dm_memory *m = port->m;

	if (s->queue_idx >= port->record->n_queues)
		return dm_fail(m, -ERANGE, "port \"%s\" has queues 0 to %u, not %u", port->record->name, port->record->n_queues - 1, s->queue_idx);
	if (s->n_rx_desc == 0)
		s->n_rx_desc = DEFAULT_DESC;
	if (s->n_tx_desc == 0)
		s->n_tx_desc = DEFAULT_DESC;
	if (!is_power_of_two(s->n_rx_desc) || !is_power_of_two(s->n_tx_desc) || s->n_rx_desc > MAX_DESC || s->n_tx_desc > MAX_DESC)
		return dm_fail(m, -EINVAL, "port \"%s\": %u and %u descriptors: powers of two up to %d are possible", port->record->name, s->n_rx_desc,
			       s->n_tx_desc, MAX_DESC);
	if (s->pool == NULL || dm_pktmbuf_pool_check(s->pool) != 0)
		return dm_fail(m, -EINVAL, "port \"%s\": a queue needs a pool that dm_pktmbuf_pool_create() made", port->record->name);
	if (dm_pktmbuf_data_room_size(s->pool) <= DM_PKTMBUF_HEADROOM)
		return dm_fail(m, -EINVAL, "port \"%s\": pool \"%s\" has buffers of %u bytes, of which %d are headroom", port->record->name, s->pool->name,
			       dm_pktmbuf_data_room_size(s->pool), DM_PKTMBUF_HEADROOM);
	return 0;
}

static uint16_t no_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)queue, (void)mbufs, (void)n;
	return 0;
}

/* Under the port's mutex. 0: the handle is gone; else it moves nothing any more: a device that lets go late leaves the queue to others. */
static int stop_locked(struct dm_queue *queue)
{
	struct dm_port *port = queue->port;
	struct dm_queue_record *q = queue->record;
	int err;

	queue->rx_burst = queue->tx_burst = no_burst;
	err = port->transport->queue_stop(queue);
	if (err != 0)
		return err;
	DM_CRASH_POINT("port: queue stopped");
	if (!port->transport->has_broker)
		give_back(q, queue->lock_word);
	port->queues[queue->queue_idx] = NULL;
	free(queue);
	return 0;
}

/* Under the port's mutex: makes way for a queue that this process runs no more, because its thread ended without stopping it. */
static int bury(struct dm_port *port, uint32_t idx, const struct dm_self *self)
{
	struct dm_queue *old = port->queues[idx];

	if (old == NULL)
		return 0;
	if (!dm_lane_is_dead(port->m->ctl, old->lock_word))
		return dm_fail(port->m, -EBUSY, "queue %u of port \"%s\" runs in this process already", idx, port->record->name);
	old->self = self;
	return stop_locked(old);
}

static int start_taken(struct dm_port *port, const struct dm_queue_spec *s, const struct dm_self *self, struct dm_queue **out)
{
	const size_t bytes = port->transport->queue_bytes > sizeof(struct dm_queue) ? port->transport->queue_bytes : sizeof(struct dm_queue);
	const size_t whole = (bytes + DM_CACHE_LINE - 1) / DM_CACHE_LINE * DM_CACHE_LINE;
	struct dm_queue *queue = aligned_alloc(DM_CACHE_LINE, whole);
	int err;

	if (queue == NULL)
		return dm_fail(port->m, -ENOMEM, "no memory for a queue");
	memset((void *)queue, 0, whole);
	queue->record = dm_port_queue(port->record, s->queue_idx);
	queue->self = self;
	queue->pool = s->pool;
	queue->port = port;
	queue->queue_idx = s->queue_idx;
	queue->port_id = s->port_id;
	queue->lock_word = self->lock_word;
	if (!port->transport->has_broker) {
		queue->record->n_rx_desc = s->n_rx_desc;
		queue->record->n_tx_desc = s->n_tx_desc;
	}
	err = port->transport->queue_start(queue, s);
	if (err != 0) {
		free(queue);
		return err;
	}
	DM_CRASH_POINT("port: queue prepared");
	if (!port->transport->has_broker)
		__atomic_store_n(&queue->record->state, DM_QUEUE_RUNNING, __ATOMIC_RELEASE);
	port->queues[s->queue_idx] = queue;
	*out = queue;
	return 0;
}

int dm_queue_start(struct dm_port *port, const struct dm_queue_spec *spec, struct dm_queue **out)
{
	struct dm_queue_spec s = *spec;
	const struct dm_self *self;
	int err = dm_usable(port->m);

	if (err == 0)
		err = judge_queue(port, &s);
	if (err != 0)
		return err;
	self = dm_self(port->m);
	if (self == NULL)
		return -EUSERS; /* its text is there */
	pthread_mutex_lock(&port->mutex);
	err = bury(port, s.queue_idx, self);
	if (err == 0 && !port->transport->has_broker)
		err = take(port, s.queue_idx, self);
	if (err == 0) {
		err = start_taken(port, &s, self, out);
		if (err != 0 && !port->transport->has_broker)
			give_back(dm_port_queue(port->record, s.queue_idx), self->lock_word);
	}
	pthread_mutex_unlock(&port->mutex);
	return err;
}

int dm_queue_stop(struct dm_queue *queue)
{
	struct dm_port *port;
	int err;

	if (queue == NULL)
		return 0;
	port = queue->port;
	pthread_mutex_lock(&port->mutex);
	err = stop_locked(queue);
	pthread_mutex_unlock(&port->mutex);
	return err;
}

int dm_queue_rx_fd(struct dm_queue *queue)
{
	const struct dm_transport *t = queue->port->transport;

	if (t->queue_rx_fd == NULL)
		return dm_fail(queue->port->m, -ENOTSUP, "a %s port has no descriptor to wait for: poll it", t->name);
	return t->queue_rx_fd(queue);
}

int dm_queue_rx_arm(struct dm_queue *queue, int on)
{
	const struct dm_transport *t = queue->port->transport;

	return t->queue_rx_arm == NULL ? 0 : t->queue_rx_arm(queue, on != 0);
}

int dm_queue_outlives_primary(const struct dm_queue *queue)
{
	const struct dm_transport *t = queue->port->transport;

	return t->queue_outlives == NULL ? !t->has_broker : t->queue_outlives(queue);
}

uint16_t dm_queue_rx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	return dm_rx_burst(queue, mbufs, n);
}

uint16_t dm_queue_tx_burst(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	return dm_tx_burst(queue, mbufs, n);
}

/* ---- closing ---- */

/* Stops the caller's queues, and those of ended threads; all of them if is_all. -EBUSY: others run some. */
static int stop_queues(struct dm_port *port, bool is_all)
{
	const struct dm_self *self = dm_self(port->m);
	int err = 0, busy = 0;

	pthread_mutex_lock(&port->mutex);
	for (uint32_t i = 0; i < DM_PORT_MAX_QUEUES && err == 0; i++) {
		struct dm_queue *queue = port->queues[i];

		if (queue == NULL)
			continue;
		if (self != NULL && (is_all || dm_lane_is_dead(port->m->ctl, queue->lock_word)))
			queue->self = self;
		if (self != NULL && queue->self == self)
			err = stop_locked(queue);
		else
			busy = -EBUSY;
	}
	pthread_mutex_unlock(&port->mutex);
	return err != 0 ? err : busy;
}

static void end_handle(struct dm_port *port)
{
	pthread_mutex_destroy(&port->mutex);
	free(port);
}

/* The handle is out of the list. */
static int close_port(struct dm_ports *ports, struct dm_port *port)
{
	struct dm_port_request request;
	struct dm_port_answer answer;
	struct dm_memory *m = port->m;
	int err = 0;

	if (port->transport->close != NULL)
		port->transport->close(port);
	if (port->transport->has_broker) {
		fill_request(&request, DM_PORT_CLOSE, port->record->name, port->record->spec);
		(void)dm_port_ask(m, &request, CLOSE_MS, &answer, NULL, 0, NULL); /* a primary that does not hear it ends it with the session */
	} else {
		err = drop(m, ports, port->record);
	}
	end_handle(port);
	return err;
}

int dm_port_close(struct dm_port *port)
{
	struct dm_ports *ports;
	struct dm_port **at;
	int err;

	if (port == NULL)
		return 0;
	ports = ports_of(port->m);
	pthread_mutex_lock(&ports->mutex);
	err = stop_queues(port, false);
	if (err == -EBUSY && port->n_opens > 1)
		err = 0;
	if (err != 0)
		err = err == -EBUSY ? dm_fail(port->m, -EBUSY, "port \"%s\": another thread of this process runs a queue of it", port->record->name) : err;
	else if (--port->n_opens == 0) {
		for (at = &ports->first; *at != port; at = &(*at)->next)
			;
		*at = port->next;
		err = close_port(ports, port);
	}
	pthread_mutex_unlock(&ports->mutex);
	return err;
}

void dm_ports_close(struct dm_memory *m)
{
	struct dm_ports *ports = m->ports;
	struct dm_port *port;
	const int state = atomic_load(&m->state);

	if (ports == NULL || state == -ECHILD) /* a forked child's copies: nothing that they name is mapped */
		return;
	while ((port = ports->first) != NULL) {
		ports->first = port->next;
		if (state == 0 || state == -EPIPE) {
			stop_queues(port, true);
			close_port(ports, port);
		} else {
			end_handle(port);
		}
	}
	for (struct hold *h = ports->holds, *next; h != NULL; h = next) { /* of an attachment that ended by itself */
		next = h->next;
		free(h);
	}
	pthread_mutex_destroy(&ports->mutex);
	free(ports);
	m->ports = NULL;
}

/* ---- what it is ---- */

const char *dm_port_name(const struct dm_port *port)
{
	return port->record->name;
}

int dm_port_info_get(const struct dm_port *port, struct dm_port_info *out)
{
	const struct dm_port_record *r = port->record;

	*out = (struct dm_port_info){
		.mtu = r->mtu, .n_queues = r->n_queues, .link = __atomic_load_n(&r->link, __ATOMIC_RELAXED), .link_mbps = r->link_mbps,
		.features = r->features,
	};
	memcpy(out->name, r->name, sizeof(out->name));
	memcpy(out->transport, r->transport, sizeof(out->transport));
	memcpy(out->spec, r->spec, sizeof(out->spec));
	memcpy(out->mac, r->mac, sizeof(out->mac));
	for (uint32_t i = 0; i < DM_MAX_OWNERS / 64; i++)
		out->n_users += (uint32_t)__builtin_popcountll(__atomic_load_n(&r->users[i], __ATOMIC_RELAXED));
	out->is_orphaned = out->n_users == 0;
	return 0;
}
