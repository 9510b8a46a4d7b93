/* follower.h - the follower of a secondary: what its files share.
 *
 * The follower is one native thread per attachment. It owns a descriptor table of its own (unshare(2), CLONE_FILES):
 * the session socket, the control memfd, the userfaultfd and the list files are in there and nowhere else, so a program
 * that closes every descriptor it sees (os.closerange()) can neither drop the guard nor feed the follower a foreign
 * file, and no growth of that table stalls the program's threads. The program's own table holds two descriptors: a
 * second name of the session socket, for requests, and one end of the handover socket, through which the follower passes
 * descriptors of segments that the program asks for (seg_fd.c).
 *
 * States of an attachment: CONNECTING -> SYNCING -> MEMBER -> ENDED. */
#ifndef DM_FOLLOWER_H
#define DM_FOLLOWER_H

#include "memory.h"
#include "wire.h"

struct msghdr;

enum { DM_MAX_REQUESTS = 64 };

/* One request that a thread of the program waits for. Id and state are one word, since an answer can come while the
 * thread gives the slot back and another one takes it: it must find its own request or none. */
struct dm_request {
	_Atomic uint32_t word;      /* id << 2 | state, see follower.c; a private futex */
	int status;
	int64_t value;              /* of EXTERNAL_DONE */
	char text[DM_WIRE_TEXT_BYTES];
};

/* What is known of the shared external memory in a list; follower's thread only. */
struct dm_external_mapping {
	struct dm_external_place place; /* fd: in the follower's table, -1 none */
	bool is_mapped;
	bool is_stale;              /* its file came too late: the memory has gone meanwhile */
	int error;                  /* why there is no file: -EMFILE */
};

/* A round of UNMAP that waits for readers of events. */
struct dm_waiting_round {
	struct dm_waiting_round *next;
	uint64_t event_seq;
	uint32_t round_id, slot;
	bool last;
	uint32_t n_runs;
	struct dm_wire_run runs[];
};

struct dm_follower {
	struct dm_memory *m;
	pthread_t thread;
	int app_fd;                 /* session socket in the program's table */
	uint64_t app_inode;         /* st_ino of the socket: tells whether app_fd still is ours */
	int sock, control_fd, ack_fd, uffd; /* in the follower's table; -1 none */
	int list_fds[DM_MAX_LISTS]; /* one-file lists; -1 none */
	int handover_fd;            /* the follower's end of the handover socket, in its table */
	int app_handover_fd;        /* the program's */
	uint64_t app_handover_inode;
	struct dm_external_mapping external[DM_MAX_LISTS];
	bool own_table;
	bool guarded;               /* one-file lists are mapped whole, under the guard */
	uint32_t flags;             /* DM_ATTACH_ */
	uint32_t timeout_ms;
	char name[DM_NAME_BYTES];
	char socket_path[112];
	uint64_t base_vaddr, window_bytes; /* 0: not reserved */
	uint64_t map_address;
	struct dm_waiting_round *waiting; /* oldest first; follower's thread only */
	int round_error[DM_MAX_ROUNDS]; /* of the parts of a round seen so far; follower's thread only */
	pthread_mutex_t start_mutex;
	pthread_cond_t start_cond;
	bool started;
	int start_status;
	_Atomic bool stop;
	_Atomic bool says_bye;      /* at the stop it is the follower that says goodbye, because app_fd is lost */
	_Atomic bool gone;          /* the thread has ended */
	char error[DM_ERROR_BYTES]; /* why the handshake failed, or why the attachment ended */
	_Atomic uint32_t next_request_id;
	struct dm_request requests[DM_MAX_REQUESTS];
};

/* A received message. Its descriptors are closed by dm_packet_close() unless taken (set to -1) before. */
struct dm_packet {
	union {
		struct dm_wire_header header;
		uint8_t bytes[DM_WIRE_MAX_BYTES];
		struct dm_wire_welcome welcome;
		struct dm_wire_runs runs;
		struct dm_wire_version version;
		struct dm_wire_round round;
		struct dm_wire_fds wire_fds;
		struct dm_wire_text text;
		struct dm_wire_external_done external_done;
		struct dm_wire_external_file external_file;
		struct dm_wire_validate validate;
	};
	size_t n_bytes;
	int fds[DM_WIRE_MAX_FDS];
	unsigned int n_fds;
	bool fds_lost;              /* MSG_CTRUNC: this table is full */
};

/* packet.c */
int dm_packet_send(int sock, const void *message, size_t bytes);
int dm_packet_send_fds(int sock, const struct dm_wire_header *message, const int *fds); /* as many as it says */
int dm_packet_try_send(int sock, const void *message, size_t bytes); /* -EAGAIN: the peer does not read */
/* 1 received and syntactically sound; 0 timeout; -EPIPE end of file; -EPROTO malformed, error says how. */
int dm_packet_receive(int sock, struct dm_packet *p, int timeout_ms, char *error, size_t error_bytes);
void dm_packet_close(struct dm_packet *p);
unsigned int dm_received_fds(struct msghdr *msg, int *fds); /* how many came; room for them was the asker's to bound */

/* handshake.c: HELLO to ATTACHED. On failure f->error says why; what it made is undone by dm_follower_dismantle(). */
int dm_say_hello(struct dm_follower *f, int sock);
int dm_handshake(struct dm_follower *f);

/* rounds.c */
int dm_map_runs_of(struct dm_follower *f, const struct dm_wire_run *runs, uint32_t n_runs, struct dm_packet *p);
void dm_handle_round(struct dm_follower *f, struct dm_packet *p);
void dm_release_waiting(struct dm_follower *f); /* what the readers of events are done with */
void dm_drop_waiting(struct dm_follower *f);    /* at the end: unmaps nothing, frees the list */

/* external_follow.c */
void dm_external_take_file(struct dm_follower *f, struct dm_packet *p);
int dm_external_map_run(struct dm_follower *f, const struct dm_wire_run *run);
int dm_external_unmap_run(struct dm_follower *f, const struct dm_wire_run *run);
void dm_external_unmap_all(struct dm_follower *f);
int dm_follower_external(void *ctx, const struct dm_external_request *request, struct dm_external_answer *answer);

/* follower.c */
int dm_follower_start(struct dm_follower *f);
void dm_follower_dismantle(struct dm_follower *f);
int dm_follower_grow(void *ctx, const struct dm_grow_request *request, char *text);
int dm_say_goodbye(int sock);
/* Sends a request with its n_fds descriptors and waits for the answer: 0 and the value of an EXTERNAL_DONE, or -errno with the
 * reason in text. Fills in the header's id. */
int dm_follower_ask(struct dm_follower *f, struct dm_wire_header *request, const int *fds, int64_t *value, char *text);
/* What goes through the handover socket, with the descriptors: request id 0 for the files of one-file lists, at the attach. */
struct dm_handover {
	struct dm_wire_run run;
	uint32_t request_id, reserved;
};
int dm_handover_send(const struct dm_follower *f, const struct dm_handover *what, const int *fds, uint32_t n_fds);
/* Whether app_fd still is the session: the program may have closed it and opened something else under its number. */
bool dm_app_fd_is_ours(const struct dm_follower *f);
bool dm_app_handover_is_ours(const struct dm_follower *f);

#endif
