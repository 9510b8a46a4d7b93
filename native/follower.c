/* follower.c - the follower's thread: its life, what it does with each message, and the requests it answers.
 *
 * Owns: the thread and its descriptor table (follower.h says why it has one), the table of requests.
 * Rules: the thread blocks all signals, runs no code of the program, and never takes a lock that the program can hold
 * while it waits for the follower: so a Python program that keeps the GIL busy delays no acknowledgement.
 * Who cleans up: the thread itself dismantles what it holds when the attachment ends; the process's death does the rest.
 * Source: unshare(2) CLONE_FILES; close_range(2), Linux 5.9. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "follower.h"
#include "futex.h"
#include "validator.h"

enum {
	POLL_MS = 500,            /* how late the thread notices a stop whose socket somebody else closed */
	POLL_WAITING_MS = 1,      /* while a FREE is being read: how late the memory goes */
	GROW_TIMEOUT_MS = 30000,  /* a primary that does not answer for so long is stopped */
	WAIT_CHUNK_MS = 100,
	/* Thread: FREE -> WAITING -> FREE, or ANSWERED -> FREE. Follower: WAITING -> BEING_ANSWERED -> ANSWERED. */
	REQUEST_FREE = 0, REQUEST_WAITING = 1, REQUEST_BEING_ANSWERED = 2, REQUEST_ANSWERED = 3,
	REQUEST_STATE_MASK = 3, REQUEST_ID_SHIFT = 2,
	PRIMARY_STARTING = 1, PRIMARY_SERVING = 2, /* control.primary_state */
};

static void close_between(int low, int high)
{
	if (high - low > 1)
		syscall(SYS_close_range, (unsigned int)(low + 1), (unsigned int)(high - 1), 0u);
}

/* Closes all descriptors but these; -1 among them is none. */
static void close_all_but(int kept[], int n)
{
	int low = -1;

	for (int i = 1; i < n; i++)
		for (int k = i; k > 0 && kept[k] < kept[k - 1]; k--) {
			int higher = kept[k - 1];

			kept[k - 1] = kept[k];
			kept[k] = higher;
		}
	for (int i = 0; i < n; i++) {
		close_between(low, kept[i]);
		low = kept[i];
	}
	close_between(low, INT32_MAX);
}

static void take_own_table(struct dm_follower *f)
{
	int kept[] = {f->app_fd, f->handover_fd, f->uffd};

	f->own_table = !unshare(CLONE_FILES);
	f->sock = f->app_fd;
	if (f->own_table) /* else not allowed: shared with the program, which then must not close what is not its own */
		close_all_but(kept, 3);
}

static void report_start(struct dm_follower *f, int status)
{
	pthread_mutex_lock(&f->start_mutex);
	f->started = true;
	f->start_status = status;
	pthread_cond_signal(&f->start_cond);
	pthread_mutex_unlock(&f->start_mutex);
}

static uint32_t request_word(uint32_t id, uint32_t state)
{
	return id << REQUEST_ID_SHIFT | state;
}

/* word: as it was found, WAITING. Nothing happens if the thread has given the slot back meanwhile. */
static void answer(struct dm_request *r, uint32_t word, int status, int64_t value, const char *text)
{
	uint32_t id = word >> REQUEST_ID_SHIFT;

	if (!atomic_compare_exchange_strong(&r->word, &word, request_word(id, REQUEST_BEING_ANSWERED)))
		return;
	r->status = status;
	r->value = value;
	snprintf(r->text, sizeof(r->text), "%s", text);
	atomic_store_explicit(&r->word, request_word(id, REQUEST_ANSWERED), memory_order_release); /* pairs with look_for_answer */
	dm_futex_wake(&r->word, 1);
}

static void answer_request(struct dm_follower *f, uint32_t id, int status, int64_t value, const char *text)
{
	uint32_t word = request_word(id, REQUEST_WAITING);

	for (int i = 0; i < DM_MAX_REQUESTS; i++)
		if (atomic_load_explicit(&f->requests[i].word, memory_order_acquire) == word)
			answer(&f->requests[i], word, status, value, text);
}

/* First the descriptors, then the answer: who has it finds them. */
static void handle_fds(struct dm_follower *f, struct dm_packet *p)
{
	struct dm_handover what = {.run = p->wire_fds.run, .request_id = p->header.request_id};
	int err = p->fds_lost ? -EMFILE : 0;

	what.run.n_segs = p->n_fds;
	if (!err)
		err = dm_handover_send(f, &what, p->fds, p->n_fds);
	answer_request(f, p->header.request_id, err, 0, err ? strerror(-err) : "");
}

/* The attachment is over: state says why, and nobody waits any longer. */
static void end(struct dm_follower *f, int state, const char *text)
{
	int expected = 0;

	snprintf(f->error, sizeof(f->error), "%s", text);
	atomic_compare_exchange_strong(&f->m->state, &expected, state);
	for (int i = 0; i < DM_MAX_REQUESTS; i++) {
		uint32_t word = atomic_load_explicit(&f->requests[i].word, memory_order_acquire);

		if ((word & REQUEST_STATE_MASK) == REQUEST_WAITING)
			answer(&f->requests[i], word, -EPIPE, 0, text);
	}
	dm_futex_wake(&f->m->ctl->event_signal, INT32_MAX);
}

static int end_state(int32_t code)
{
	return code == DM_END_SHUTDOWN ? -EPIPE : -ESTALE;
}

/* false: the attachment is over. */
static bool handle(struct dm_follower *f, struct dm_packet *p)
{
	char text[DM_ERROR_BYTES];

	switch (p->header.type) {
	case DM_WIRE_ROUND:
		dm_handle_round(f, p);
		return true;
	case DM_WIRE_DONE:
		answer_request(f, p->header.request_id, -p->text.status, 0, p->text.text);
		return true;
	case DM_WIRE_EXTERNAL_DONE:
		answer_request(f, p->header.request_id, -p->external_done.status, p->external_done.value, p->external_done.text);
		return true;
	case DM_WIRE_EXTERNAL_FILE:
		dm_external_take_file(f, p);
		return true;
	case DM_WIRE_FDS:
		handle_fds(f, p);
		return true;
	case DM_WIRE_VALIDATE:
		dm_validators_ask(f->m, &p->validate);
		return true;
	case DM_WIRE_END:
		end(f, end_state(p->text.status), p->text.text);
		return false;
	default:
		snprintf(text, sizeof(text), "the primary sent message type %u to a member", p->header.type);
		end(f, -ESTALE, text);
		return false;
	}
}

/* End of file: the primary is gone, or it evicted us and the socket was too full for its END. */
static void end_without_words(struct dm_follower *f)
{
	const struct dm_control *c = f->m->ctl;
	bool serves = c->primary_state == PRIMARY_STARTING || c->primary_state == PRIMARY_SERVING;

	if (serves && atomic_load(&dm_owner_at(c, f->m->owner_id)->state) == DM_OWNER_DEAD)
		end(f, -ESTALE, "evicted: this process did not read what the primary sent (stopped, or starved)");
	else
		end(f, -EPIPE, "the primary has ended");
}

/* After the stop: true once the primary has had POLL_MS to answer the goodbye. */
static bool has_waited_for_goodbye(struct dm_follower *f, int64_t *until)
{
	if (!atomic_load(&f->stop))
		return false;
	if (*until == 0) {
		*until = dm_now_ns(CLOCK_MONOTONIC) + POLL_MS * 1000000L;
		if (atomic_load(&f->says_bye))
			dm_say_goodbye(f->sock);
	}
	return dm_now_ns(CLOCK_MONOTONIC) >= *until;
}

static void follow(struct dm_follower *f)
{
	struct dm_packet p;
	bool going = true;
	int64_t until = 0;

	while (going) {
		int rc = dm_packet_receive(f->sock, &p, f->waiting ? POLL_WAITING_MS : POLL_MS, f->error, sizeof(f->error));

		dm_release_waiting(f);
		if (rc == 0 && has_waited_for_goodbye(f, &until))
			return;
		if (rc == 0)
			continue;
		if (rc == -EPIPE) {
			end_without_words(f);
			return;
		}
		if (rc < 0) {
			end(f, -ESTALE, f->error);
			return;
		}
		going = handle(f, &p);
		dm_packet_close(&p);
	}
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* With a table of its own the descriptors go with the thread; the guard must outlast the window, so they stay open as
 * long as the thread lives. */
static void close_own(struct dm_follower *f)
{
	close_fd(&f->control_fd);
	close_fd(&f->ack_fd);
	close_fd(&f->uffd);
	for (int i = 0; i < DM_MAX_LISTS; i++)
		close_fd(&f->list_fds[i]);
	close_fd(&f->handover_fd);
	if (f->own_table)
		close_fd(&f->sock);
}

/* The control segment stays mapped: threads' robust lists point into it until dm_memory_put(). */
void dm_follower_dismantle(struct dm_follower *f)
{
	dm_external_unmap_all(f);
	if (f->window_bytes)
		dm_window_release(f->base_vaddr, f->window_bytes);
	f->window_bytes = 0;
	close_own(f);
}

int dm_say_goodbye(int sock)
{
	struct dm_wire_header bye = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_BYE, .bytes = sizeof(bye)};

	return dm_packet_send(sock, &bye, sizeof(bye));
}

/* A primary that is gone leaves the memory usable: the guard and the list files stay until the program detaches. */
static void stay_until_detached(struct dm_follower *f)
{
	dm_drop_waiting(f);
	close_fd(&f->ack_fd);
	if (f->own_table)
		close_fd(&f->sock);
	while (!atomic_load(&f->stop)) {
		struct timespec t = {.tv_nsec = WAIT_CHUNK_MS * 1000000L};

		nanosleep(&t, NULL);
	}
}

static void *follower_thread(void *arg)
{
	struct dm_follower *f = arg;
	int err;

	prctl(PR_SET_NAME, "dm-follower");
	take_own_table(f);
	err = dm_handshake(f);
	if (err) {
		dm_say_goodbye(f->sock); /* else the primary, which may count us a member already, waits for this process's death */
		dm_follower_dismantle(f);
		report_start(f, err);
		return NULL;
	}
	report_start(f, 0);
	follow(f);
	stay_until_detached(f);
	dm_follower_dismantle(f);
	return NULL;
}

int dm_follower_start(struct dm_follower *f)
{
	sigset_t all, old;
	int err = dm_say_hello(f, f->app_fd);

	if (err) {
		close_fd(&f->uffd);
		return err;
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&f->thread, NULL, follower_thread, f);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err) {
		close_fd(&f->uffd);
		snprintf(f->error, sizeof(f->error), "cannot start the follower's thread: %s", strerror(err));
		return -err;
	}
	pthread_mutex_lock(&f->start_mutex);
	while (!f->started)
		pthread_cond_wait(&f->start_cond, &f->start_mutex);
	pthread_mutex_unlock(&f->start_mutex);
	if (f->start_status)
		pthread_join(f->thread, NULL);
	return f->start_status;
}

/* ---- requests of the program's threads ---- */

static struct dm_request *take_request(struct dm_follower *f, uint32_t *id)
{
	do {
		*id = (atomic_fetch_add(&f->next_request_id, 1) + 1) & UINT32_MAX >> REQUEST_ID_SHIFT;
	} while (*id == 0); /* means none on the wire */
	for (int i = 0; i < DM_MAX_REQUESTS; i++) {
		uint32_t word = atomic_load_explicit(&f->requests[i].word, memory_order_relaxed);

		if ((word & REQUEST_STATE_MASK) == REQUEST_FREE &&
		    atomic_compare_exchange_strong(&f->requests[i].word, &word, request_word(*id, REQUEST_WAITING)))
			return &f->requests[i];
	}
	return NULL;
}

static void give_request(struct dm_request *r, uint32_t id)
{
	uint32_t word = request_word(id, REQUEST_WAITING);

	if (atomic_compare_exchange_strong(&r->word, &word, REQUEST_FREE))
		return;
	while ((atomic_load_explicit(&r->word, memory_order_acquire) & REQUEST_STATE_MASK) != REQUEST_ANSWERED)
		sched_yield(); /* the follower is copying the text */
	atomic_store_explicit(&r->word, REQUEST_FREE, memory_order_release);
}

bool dm_app_fd_is_ours(const struct dm_follower *f)
{
	struct stat st;

	return !fstat(f->app_fd, &st) && S_ISSOCK(st.st_mode) && st.st_ino == f->app_inode;
}

bool dm_app_handover_is_ours(const struct dm_follower *f)
{
	struct stat st;

	return !fstat(f->app_handover_fd, &st) && S_ISSOCK(st.st_mode) && st.st_ino == f->app_handover_inode;
}

/* Whether memory for the request came with the events after *seq; moves *seq on. */
static bool memory_came(const struct dm_control *c, const struct dm_grow_request *request, uint64_t *seq)
{
	uint64_t last = atomic_load_explicit(&c->event_seq, memory_order_acquire);

	for (; *seq < last; ++*seq) {
		const struct dm_event *e = dm_event_at(c, (*seq + 1) % DM_EVENT_LOG_SLOTS);

		if (e->type == DM_EVENT_ALLOC && e->bytes >= request->bytes &&
		    dm_list_at(c, e->list_idx % DM_MAX_LISTS)->heap_idx == request->heap_idx)
			return true;
	}
	return false;
}

static int look_for_answer(struct dm_follower *f, struct dm_request *r, char *text)
{
	if ((atomic_load_explicit(&r->word, memory_order_acquire) & REQUEST_STATE_MASK) == REQUEST_ANSWERED) { /* pairs with answer() */
		snprintf(text, DM_ERROR_BYTES, "%s", r->text);
		return r->status;
	}
	if (atomic_load(&f->m->state)) {
		snprintf(text, DM_ERROR_BYTES, "%s", f->error);
		return -EPIPE;
	}
	return -EAGAIN;
}

/* The commit itself wakes us, by the futex word of the event log: the answer by message would come two threads later. If
 * somebody else takes what came, the heap asks again. Without futex_waitv(2) the answer is waited for. growth: NULL for a
 * request that no event answers. */
static int wait_for_answer(struct dm_follower *f, struct dm_request *r, uint32_t id,
			   const struct dm_grow_request *growth, uint64_t seq, char *text)
{
	_Atomic uint32_t *const words[2] = {&r->word, &f->m->ctl->event_signal};
	int64_t until = dm_now_ns(CLOCK_MONOTONIC) + (int64_t)GROW_TIMEOUT_MS * 1000000;

	while (dm_now_ns(CLOCK_MONOTONIC) < until) {
		uint32_t expected[2] = {request_word(id, REQUEST_WAITING), atomic_load_explicit(words[1], memory_order_acquire)};
		int rc = look_for_answer(f, r, text);

		if (rc != -EAGAIN)
			return rc;
		if (growth && memory_came(f->m->ctl, growth, &seq))
			return 0;
		if (dm_futex_wait_two(words, expected, dm_now_ns(CLOCK_MONOTONIC) + WAIT_CHUNK_MS * 1000000L) == -ENOSYS)
			dm_futex_wait(&r->word, expected[0], WAIT_CHUNK_MS * 1000000L);
	}
	snprintf(text, DM_ERROR_BYTES, "no answer for %d s: the primary is stopped or overloaded%s", GROW_TIMEOUT_MS / 1000, growth ? "" :
		 ", or it waits for a process that is stopped or has not read a FREE event; it goes on with it");
	return -ETIMEDOUT;
}

static int send_request(struct dm_follower *f, const struct dm_wire_header *message, const int *fds, char *text)
{
	int err;

	if (!dm_app_fd_is_ours(f)) {
		snprintf(text, DM_ERROR_BYTES, "descriptor %d of the session was closed by this process (os.closerange()?): "
			 "memory that is there still works, growth needs detach and attach", f->app_fd);
		return -EBADF;
	}
	err = dm_packet_send_fds(f->app_fd, message, fds);
	if (err)
		snprintf(text, DM_ERROR_BYTES, "cannot ask the primary: %s", err == -EPIPE ? "it has ended" : strerror(-err));
	return err;
}

static int request_growth(struct dm_follower *f, struct dm_request *r, uint32_t id,
			  const struct dm_grow_request *request, char *text)
{
	struct dm_wire_grow grow = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_GROW, .bytes = sizeof(grow), .request_id = id},
		.bytes = request->bytes,
		.align = request->align,
		.page_bytes = request->page_bytes,
		.heap_idx = request->heap_idx,
		.flags = request->flags,
	};
	uint64_t seq = atomic_load_explicit(&f->m->ctl->event_seq, memory_order_acquire);
	int err = send_request(f, &grow.h, NULL, text);

	return err ? err : wait_for_answer(f, r, id, request, seq, text);
}

/* A slot and an id for a request, if the attachment lives. */
static int begin_request(struct dm_follower *f, struct dm_request **r, uint32_t *id, char *text)
{
	int err = atomic_load(&f->m->state);

	if (err) {
		snprintf(text, DM_ERROR_BYTES, "the primary cannot be asked: %.470s", f->error);
		return err;
	}
	*r = take_request(f, id);
	if (*r)
		return 0;
	snprintf(text, DM_ERROR_BYTES, "%d threads of this process wait for the primary already", DM_MAX_REQUESTS);
	return -EBUSY;
}

int dm_follower_ask(struct dm_follower *f, struct dm_wire_header *message, const int *fds, int64_t *value, char *text)
{
	struct dm_request *r;
	int err = begin_request(f, &r, &message->request_id, text);

	if (err)
		return err;
	err = send_request(f, message, fds, text);
	if (!err)
		err = wait_for_answer(f, r, message->request_id, NULL, 0, text);
	*value = r->value;
	give_request(r, message->request_id);
	return err;
}

int dm_follower_grow(void *ctx, const struct dm_grow_request *request, char *text)
{
	struct dm_follower *f = ctx;
	struct dm_request *r;
	uint32_t id;
	int err = begin_request(f, &r, &id, text);

	if (err)
		return err;
	err = request_growth(f, r, id, request, text);
	give_request(r, id);
	return err;
}
