/* wire.h - the messages of the session protocol, byte for byte. docs/protocol.md is the specification.
 *
 * Owns: sizes and offsets on the wire (shared/messages.py holds the same in struct notation; a test compares them).
 * AF_UNIX SOCK_SEQPACKET, one message per packet, host byte order: both ends are on one host. A message is at most
 * DM_WIRE_MAX_BYTES long and carries at most DM_WIRE_MAX_FDS descriptors (SCM_MAX_FD, Linux net/scm.h). */
#ifndef DM_WIRE_H
#define DM_WIRE_H

#include <assert.h>
#include <stdint.h>

enum {
	DM_WIRE_VERSION = 1,
	DM_WIRE_MAX_BYTES = 8192,
	DM_WIRE_MAX_FDS = 253,
	DM_WIRE_MAX_SENT_FDS = 2, /* with a message of a secondary: EXTERNAL */
	DM_WIRE_TEXT_BYTES = 512,
	DM_WIRE_MAX_RUNS = 253,
	DM_WIRE_VALIDATOR_BYTES = 64,  /* a validator's name with NUL, as RTE_MEM_ALLOC_VALIDATOR_NAME_LEN */
	DM_WIRE_REASON_BYTES = 256,
};
#define DM_WIRE_MAGIC UINT32_C(0x31534d44) /* "DMS1" */

enum dm_wire_type {
	DM_WIRE_HELLO = 1,      /* secondary -> primary */
	DM_WIRE_WELCOME = 2,    /* <- with descriptors: control, ack eventfd, and with flag 1 /dev/userfaultfd */
	DM_WIRE_LIST_FILES = 3, /* <- one descriptor per one-file list, runs with n_segs 0 */
	DM_WIRE_SEGMENTS = 4,   /* <- what is present: one descriptor per segment in per-segment lists */
	DM_WIRE_SYNCED = 5,     /* <- end of the snapshot */
	DM_WIRE_READY = 6,      /* -> all of it is mapped */
	DM_WIRE_ATTACHED = 7,   /* <- a member of all rounds from here on */
	DM_WIRE_ROUND = 8,      /* <- map or unmap, then acknowledge through the control segment */
	DM_WIRE_GROW = 9,       /* -> */
	DM_WIRE_DONE = 10,      /* <- the answer to GROW */
	DM_WIRE_BYE = 11,       /* -> */
	DM_WIRE_END = 12,       /* <- refused, evicted or shut down; the last message */
	/* 20 to 29: external memory */
	DM_WIRE_EXTERNAL = 20,      /* -> heaps and memory that the program brings; with its descriptors */
	DM_WIRE_EXTERNAL_DONE = 21, /* <- the answer to EXTERNAL */
	DM_WIRE_EXTERNAL_FILE = 22, /* <- the file of shared external memory, one descriptor; SEGMENTS or ROUND says when to map it */
	/* 30 to 39: messages of programs. Only MP_OPEN travels on the session socket, the others on the channel it brings. */
	DM_WIRE_MP_OPEN = 30,   /* -> with a descriptor: the primary's end of this session's channel; a bare header, no answer */
	DM_WIRE_MP_ACTION = 31, /* -> a name that messages may have from now on, or no longer; answered by MP_RESULT */
	DM_WIRE_MP_SEND = 32,   /* -> with descriptors; answered by MP_RESULT */
	DM_WIRE_MP_DELIVER = 33, /* <- with descriptors */
	DM_WIRE_MP_REPLY = 34,  /* -> with descriptors; to a request that was delivered */
	DM_WIRE_MP_ANSWER = 35, /* <- with descriptors; one per receiver of a request */
	DM_WIRE_MP_RESULT = 36, /* <- the last word about an MP_ACTION or MP_SEND */
	DM_WIRE_MP_TAKEN = 37,  /* -> deliveries left the queue */
	DM_WIRE_VALIDATOR_REGISTER = 40,   /* -> answered by DONE */
	DM_WIRE_VALIDATOR_UNREGISTER = 41, /* -> answered by DONE; asked no more once that has come */
	DM_WIRE_VALIDATE = 42,  /* <- may the map grow? */
	DM_WIRE_VERDICT = 43,   /* -> the answer to VALIDATE, with its request_id */
	DM_WIRE_GET_FDS = 50,   /* -> */
	DM_WIRE_FDS = 51,       /* <- the answer, with descriptors; where there are none, DONE with the reason */
};

struct dm_wire_header {
	uint32_t magic;
	uint16_t type;
	uint16_t n_fds;             /* that come with this message */
	uint32_t bytes;             /* of the whole message */
	uint32_t request_id;        /* of requests and their answers, VALIDATE and VERDICT, MP_ACTION to MP_RESULT; else 0 */
};
static_assert(sizeof(struct dm_wire_header) == 16, "wire");

struct dm_wire_hello {
	struct dm_wire_header h;
	uint16_t version_min, version_max;
	uint32_t layout_version;    /* of the control segment: must be equal */
	uint32_t role;              /* enum dm_role */
	uint32_t flags;             /* DM_HELLO_ */
	char name[32];
};
static_assert(sizeof(struct dm_wire_hello) == 64, "wire");
enum { DM_HELLO_NO_GUARD = 1, DM_HELLO_GUARDED = 2 };

struct dm_wire_welcome {
	struct dm_wire_header h;
	uint16_t version, n_lists;
	uint32_t owner_id;
	uint32_t flags;             /* DM_WELCOME_ */
	uint32_t reserved;
	uint8_t session_id[16];
	uint64_t control_bytes;
	uint64_t base_vaddr, window_bytes;
};
static_assert(sizeof(struct dm_wire_welcome) == 72, "wire");
enum { DM_WELCOME_USERFAULTFD = 1 };

struct dm_wire_run {
	uint32_t list_idx, reserved;
	uint64_t first_seg, n_segs;
};
static_assert(sizeof(struct dm_wire_run) == 24, "wire");

/* LIST_FILES and SEGMENTS */
struct dm_wire_runs {
	struct dm_wire_header h;
	uint32_t n_runs, reserved;
	struct dm_wire_run runs[];
};
static_assert(sizeof(struct dm_wire_runs) == 24, "wire");

/* SYNCED, READY, ATTACHED */
struct dm_wire_version {
	struct dm_wire_header h;
	uint64_t version;           /* map version */
	uint32_t flags;             /* READY: DM_READY_; else 0 */
	uint32_t reserved;
};
static_assert(sizeof(struct dm_wire_version) == 32, "wire");
enum { DM_READY_GUARDED = 1 }; /* one-file lists are mapped whole under the guard: no MAP rounds wanted for them */

struct dm_wire_round {
	struct dm_wire_header h;
	uint32_t round_id, slot;
	uint32_t op;                /* enum dm_round_op */
	uint32_t flags;             /* DM_ROUND_LAST: the last message of the round; acknowledge after it */
	uint64_t event_seq;         /* UNMAP: callbacks must have seen the events up to this one first */
	uint32_t n_runs, reserved;
	struct dm_wire_run runs[];
};
static_assert(sizeof(struct dm_wire_round) == 48, "wire");
enum dm_round_op { DM_ROUND_MAP = 1, DM_ROUND_UNMAP = 2 };
enum { DM_ROUND_LAST = 1 };

struct dm_wire_grow {
	struct dm_wire_header h;
	uint64_t bytes, align, page_bytes;
	uint32_t heap_idx, flags;
};
static_assert(sizeof(struct dm_wire_grow) == 48, "wire");

/* GET_FDS, and FDS: of as many of these segments, from the first on, as descriptors come. In a one-file list there is one,
 * of its file. */
struct dm_wire_fds {
	struct dm_wire_header h;
	struct dm_wire_run run;
};
static_assert(sizeof(struct dm_wire_fds) == 40, "wire");

/* DONE and END */
struct dm_wire_text {
	struct dm_wire_header h;
	int32_t status;             /* DONE: 0 or errno; END: enum dm_end_code */
	uint32_t retryable;
	char text[DM_WIRE_TEXT_BYTES];
};
static_assert(sizeof(struct dm_wire_text) == 536, "wire");

enum dm_external_op {
	DM_EXTERNAL_HEAP_CREATE = 1,
	DM_EXTERNAL_HEAP_DESTROY = 2,
	DM_EXTERNAL_ADD = 3,        /* takes the place, and lets everybody map memory with a descriptor */
	DM_EXTERNAL_COMMIT = 4,     /* makes it the heap's */
	DM_EXTERNAL_ABORT = 5,
	DM_EXTERNAL_REMOVE = 6,
	DM_EXTERNAL_ATTACH = 7,
	DM_EXTERNAL_DETACH = 8,
};
enum { DM_EXTERNAL_REGISTERED = 1, DM_EXTERNAL_HAS_FD = 2, DM_EXTERNAL_HAS_IOVAS = 4 };

struct dm_wire_external {
	struct dm_wire_header h;    /* descriptors: the memory's if HAS_FD, then the table of IOVAs if HAS_IOVAS */
	uint32_t op;                /* enum dm_external_op */
	uint32_t flags;             /* as below */
	uint32_t list_idx;          /* COMMIT; else 0 */
	uint32_t reserved;
	uint64_t vaddr, bytes, page_bytes, fd_offset;
	char name[32];              /* of the heap; empty with REGISTERED */
};
static_assert(sizeof(struct dm_wire_external) == 96, "wire");

struct dm_wire_external_done {
	struct dm_wire_header h;
	int32_t status;             /* 0 or errno */
	uint32_t reserved;
	int64_t value;              /* HEAP_CREATE: socket id; ADD: list_idx; else 0 */
	char text[DM_WIRE_TEXT_BYTES];
};
static_assert(sizeof(struct dm_wire_external_done) == 544, "wire");

struct dm_wire_external_file {
	struct dm_wire_header h;
	uint32_t list_idx;
	uint32_t flags;             /* 1: can only be read */
	uint64_t generation;        /* of the list: another one there means that the memory has gone meanwhile */
	uint64_t fd_offset;
};
static_assert(sizeof(struct dm_wire_external_file) == 40, "wire");
enum { DM_EXTERNAL_FILE_READ_ONLY = 1 };
/* VALIDATOR_REGISTER and VALIDATOR_UNREGISTER (limit 0) */
struct dm_wire_validator {
	struct dm_wire_header h;
	uint64_t limit;             /* asked when a growth would bring the node's memory above it */
	int32_t numa_node;
	uint32_t reserved;
	char name[DM_WIRE_VALIDATOR_BYTES];
};
static_assert(sizeof(struct dm_wire_validator) == 96, "wire");

struct dm_wire_validate {
	struct dm_wire_header h;
	uint64_t limit, new_len;    /* of the validator; bytes of the node after the growth */
	int32_t numa_node;
	uint32_t reserved;
	char name[DM_WIRE_VALIDATOR_BYTES];
};
static_assert(sizeof(struct dm_wire_validate) == 104, "wire");

struct dm_wire_verdict {
	struct dm_wire_header h;
	int32_t status;             /* 0: go ahead, else an errno */
	uint32_t reserved;
	char reason[DM_WIRE_REASON_BYTES]; /* of a refusal, for who asked */
};
static_assert(sizeof(struct dm_wire_verdict) == 280, "wire");

enum dm_end_code {
	DM_END_BYE = 0,             /* the answer to BYE */
	DM_END_SHUTDOWN = 1,        /* the primary ends in order */
	DM_END_VERSION = 2,         /* no common protocol version, or another layout */
	DM_END_NOT_PERMITTED = 3,   /* uid, gid or role */
	DM_END_PROTOCOL = 4,        /* malformed, truncated, oversized, out of order */
	DM_END_LIMIT = 5,           /* too many sessions, descriptors */
	DM_END_TIMEOUT = 6,         /* handshake deadline */
	DM_END_EVICTED = 7,         /* silent in a round, under --on-lag=evict; or a full queue */
	DM_END_MODE = 8,            /* asked for something that this primary does not do */
};

/* ---- messages of programs, on their own channel ---- */

enum {
	DM_WIRE_MP_NAME_BYTES = 64, /* an action's, with NUL */
	DM_WIRE_MP_PARAM_BYTES = 256,
	DM_WIRE_MP_WINDOW = 256,    /* deliveries that wait in one receiver; more are refused to their senders */
	DM_WIRE_MP_WINDOW_FDS = 512, /* descriptors that wait with them: less than the usual RLIMIT_NOFILE */
	DM_WIRE_MP_MAX_REQUESTS = 256, /* MP_ACTION and MP_SEND of one channel without their MP_RESULT */
	DM_WIRE_MP_MAX_ACTIONS = 1024, /* of one channel */
};
#define DM_WIRE_MP_UNKNOWN "no-action" /* action of an MP_REPLY with ENOENT: it is not registered; a handler's ENOENT says "error" */
enum dm_wire_mp_kind { DM_WIRE_MP_MESSAGE = 1, DM_WIRE_MP_REQUEST = 2 };
/* enum dm_mp_to of dpdkmem_api.h has the numbers of `to`. */

/* MP_SEND, MP_DELIVER, MP_REPLY, MP_ANSWER. h.request_id: MP_SEND and MP_ANSWER the sender's; MP_DELIVER and MP_REPLY the
 * primary's, 0 in the MP_DELIVER of a message. */
struct dm_wire_mp {
	struct dm_wire_header h;
	uint32_t kind;              /* MP_SEND, MP_DELIVER: enum dm_wire_mp_kind; else 0 */
	uint32_t status;            /* MP_REPLY, MP_ANSWER: 0, or errno and param is its text; else 0 */
	uint32_t to;                /* MP_SEND; else 0 */
	uint32_t owner_id;          /* MP_SEND to DM_MP_TO_OWNER: the target; MP_DELIVER, MP_ANSWER: who sent it; else 0 */
	uint32_t timeout_ms;        /* MP_SEND, MP_DELIVER of a request; else 0 */
	uint32_t n_taken;           /* MP_SEND, MP_REPLY: as MP_TAKEN's; else 0 */
	uint32_t param_bytes;
	uint32_t reserved;
	uint8_t session_id[16];     /* MP_SEND to DM_MP_TO_SESSION: the target; MP_DELIVER, MP_ANSWER: who sent it; else 0 */
	char peer_name[32];         /* MP_SEND to DM_MP_TO_NAME: the target; MP_DELIVER, MP_ANSWER: who sent it; else 0 */
	char action[DM_WIRE_MP_NAME_BYTES];
	uint8_t param[];
};
static_assert(sizeof(struct dm_wire_mp) == 160, "wire");

struct dm_wire_mp_action {
	struct dm_wire_header h;
	uint32_t is_on;             /* 1 registered, 0 no longer */
	uint32_t reserved;
	char action[DM_WIRE_MP_NAME_BYTES];
};
static_assert(sizeof(struct dm_wire_mp_action) == 88, "wire");

struct dm_wire_mp_result {
	struct dm_wire_header h;
	uint32_t status;            /* 0 or errno */
	uint32_t n_sent, n_received; /* MP_SEND: receivers; requests: replies with status 0 */
	uint32_t reserved;
	char text[256];
};
static_assert(sizeof(struct dm_wire_mp_result) == 288, "wire");

struct dm_wire_mp_taken {
	struct dm_wire_header h;
	uint32_t n_taken;           /* deliveries that left the queue since this was last said */
	uint32_t n_dropped;         /* of them, messages that no handler saw */
};
static_assert(sizeof(struct dm_wire_mp_taken) == 24, "wire");

#endif
