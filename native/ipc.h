/* ipc.h - messages of programs: what the files of the endpoint share.
 *
 * Each process that uses dm_mp_* has one endpoint per memory: a channel (a socket pair whose other end the primary has) and
 * two kinds of threads. The receiver reads the channel, runs no code of the program and waits for none: so an answer always
 * arrives, however many handlers wait. Dispatchers run handlers and completions, one at a time; when one of them waits
 * for an answer itself, another one goes on, so that requests inside handlers cannot lock each other out.
 * The follower and its socket have no part in any of this: no message can delay a round.
 *
 * States of the channel: CLOSED -> OPEN -> ENDED -> OPEN ... ; it opens at the first use and after an end, if the attachment lives.
 * Laws, under the mutex: n_running + n_blocked + n_idle <= n_dispatchers; a dispatcher takes work only while n_running == 0.
 * Each received descriptor has one owner: the packet, then the delivery or the answer, then who took it out (-1).
 * The mutex is never held while code of the program runs, nor while anything waits for the primary.
 * After a kill -9 nothing is left: all of it is private to the process; the primary tells who waited for an answer. */
#ifndef DM_IPC_H
#define DM_IPC_H

#include "memory.h"
#include "wire.h"

enum {
	DM_MP_MAX_NESTED = 32,      /* handlers of a process that wait for requests of their own; each costs a thread */
	DM_MP_VERDICT_MS = 5000,    /* a primary that does not answer for so long is stopped */
	DM_MP_GRACE_MS = 100,       /* after a deadline the primary may still say who did not answer */
	DM_MP_SEND_MS = 1000,       /* a primary that does not read for so long gets no reply */
	DM_MP_REOPEN_MS = 1000,     /* a channel that ends sooner is opened again by the next call only */
	DM_MP_TAKEN_BATCH = 32,     /* deliveries after which the primary is told that they left the queue */
};

#define DM_MP_UNKNOWN_TEXT "the receiver has not registered the action"

/* A received message of the channel. */
struct dm_mp_packet {
	union {
		struct dm_wire_header header;
		struct dm_wire_mp mp;
		struct dm_wire_mp_result result;
		uint8_t bytes[512]; /* more than any message that comes this way: 160 + 256 */
	};
	size_t n_bytes;
	int fds[DM_WIRE_MAX_FDS];
	unsigned int n_fds;
	bool fds_lost;              /* MSG_CTRUNC: this process is out of descriptors */
};

struct dm_mp_registered {
	struct dm_mp_registered *next;
	char name[DM_MP_MAX_NAME_LEN];
	dm_mp_action action;
	void *arg;
	uint32_t n_calls;           /* that run, and others who hold it */
	bool removed;               /* no more calls begin */
	bool leaving;               /* removed, and the primary not told yet: its name stays taken */
};

/* A message or request in the queue of the dispatchers. */
struct dm_mp_delivery {
	struct dm_mp_delivery *next;
	uint32_t channel;           /* that brought it */
	struct dm_mp_peer peer;
	struct dm_mp_msg msg;
};

/* What a thread, or a completion, waits for: an MP_ACTION or MP_SEND without its MP_RESULT. */
struct dm_mp_pending {
	struct dm_mp_pending *next;
	uint32_t id;
	bool is_done, is_async;
	bool is_sending;            /* its thread is in dm_mp_send() and owns it: who completes it leaves it there */
	int status;
	char text[256];
	int64_t until_ns;           /* CLOCK_MONOTONIC, grace included */
	struct dm_mp_replies replies;
	uint32_t room;              /* of replies.answers */
	pthread_cond_t done;        /* sync */
	dm_mp_async_reply callback; /* async */
	void *arg;
	struct dm_mp_msg request;   /* async: without its descriptors */
};

/* A dispatcher's own part, on its stack. */
struct dm_mp_dispatcher {
	struct dm_mp_dispatcher *next;
	pthread_t thread;
};

enum dm_mp_state { DM_MP_CLOSED = 0, DM_MP_OPEN = 1, DM_MP_ENDED = 2 };

struct dm_ipc {
	struct dm_memory *m;
	pthread_mutex_t mutex;      /* protects all that follows */
	pthread_cond_t work;        /* for dispatchers */
	pthread_cond_t changed;     /* for who waits for dispatchers, calls of an action, or waiters to end */
	enum dm_mp_state state;
	bool stopping, opening, has_receiver;
	bool wants_reopen;          /* it ended while actions were registered: a dispatcher opens it again */
	uint32_t channel;           /* counts the channels that there were */
	int64_t opened_ns;          /* CLOCK_MONOTONIC */
	int sock;                   /* -1 none */
	uint64_t inode;             /* of sock: tells whether the number still is ours */
	pthread_t receiver;
	uint32_t next_id;
	uint32_t n_taken, n_dropped; /* deliveries that left the queue and that the primary was not told of */
	uint32_t n_queued, n_waiters; /* n_waiters: threads that wait and will look again */
	struct dm_mp_delivery *queue, **queue_end;
	struct dm_mp_pending *pending, *completed, **completed_end;
	struct dm_mp_registered *actions;
	struct dm_mp_dispatcher *dispatchers;
	uint32_t n_dispatchers, n_running, n_blocked, n_idle;
	uint32_t n_threads;         /* dispatchers, and those that are ending */
};

/* ipc.c: the channel and the receiver. */
int dm_ipc_create(struct dm_memory *m);
bool dm_ipc_called_from(struct dm_memory *m); /* the caller runs inside a handler or a completion */
void dm_ipc_stop(struct dm_memory *m);        /* no handler runs any more; waiters get -ESHUTDOWN; again does nothing */
void dm_ipc_destroy(struct dm_memory *m);
void dm_ipc_lock(struct dm_memory *m);        /* around fork(2) */
void dm_ipc_unlock(struct dm_memory *m);
void dm_ipc_after_fork_in_child(struct dm_memory *m); /* closes the child's copy of the channel; under the lock */
int dm_mp_ensure_open(struct dm_ipc *ipc);    /* under the mutex */
/* Under the mutex, so that nobody closes the channel in between; given away while a primary that does not read is waited for,
 * until until_ns: -ETIMEDOUT; -ENOTCONN if that channel ended meanwhile, -ESHUTDOWN at the stop. The descriptors stay the caller's. */
int dm_mp_send(struct dm_ipc *ipc, const void *message, size_t bytes, const int *fds, int n_fds, int64_t until_ns);
void dm_mp_say_taken(struct dm_ipc *ipc);     /* under the mutex; does not wait */

/* ipc_packet.c: one packet in, its syntax judged: as packet.c does for the session. */
int dm_mp_receive(int sock, struct dm_mp_packet *p);
void dm_mp_packet_close(struct dm_mp_packet *p);
/* The message that a packet carries; its descriptors are msg's from then on. */
void dm_mp_take_msg(struct dm_mp_packet *p, struct dm_mp_msg *msg);
void dm_mp_take_peer(const struct dm_mp_packet *p, struct dm_mp_peer *peer);
void dm_mp_close_fds(struct dm_mp_msg *msg);

/* ipc_request.c: what waits for an answer. All under the mutex. */
void dm_mp_handle_answer(struct dm_ipc *ipc, struct dm_mp_packet *p);
void dm_mp_handle_result(struct dm_ipc *ipc, const struct dm_wire_mp_result *r);
void dm_mp_fail_all(struct dm_ipc *ipc, int status, const char *text);
void dm_mp_expire_async(struct dm_ipc *ipc, int64_t now_ns);
int64_t dm_mp_next_async_deadline(const struct dm_ipc *ipc); /* INT64_MAX: none */
void dm_mp_pending_free(struct dm_mp_pending *w);
int dm_mp_check_name(struct dm_memory *m, const char *name);
int dm_mp_refuse_unknown(struct dm_memory *m, const struct dm_mp_peer *peer); /* takes the mutex: the action went meanwhile */

/* ipc_dispatch.c: handlers. All under the mutex. */
struct dm_mp_registered *dm_mp_find_action(struct dm_ipc *ipc, const char *name);
void dm_mp_release_action(struct dm_ipc *ipc, struct dm_mp_registered *a); /* the opposite of n_calls++; may free it */
void dm_mp_handle_delivery(struct dm_ipc *ipc, struct dm_mp_packet *p);
int dm_mp_want_dispatcher(struct dm_ipc *ipc); /* starts one if none is free to go on */
bool dm_mp_is_dispatcher(const struct dm_ipc *ipc);
void dm_mp_block(struct dm_ipc *ipc);   /* a dispatcher begins to wait */
void dm_mp_unblock(struct dm_ipc *ipc);
void dm_mp_drop_queue(struct dm_ipc *ipc);
/* ipc_request.c: sends an MP_ACTION and waits for its MP_RESULT; without the mutex. */
int dm_mp_announce(struct dm_ipc *ipc, const char *name, bool is_on);

#endif
