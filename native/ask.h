/* ask.h - one question to the primary itself, by one of its built-in actions (docs/protocol.md), and the one answer. Owns nothing. */
#ifndef DM_ASK_H
#define DM_ASK_H

#include "memory.h"

struct dm_ask {
	const char *action;         /* "dpdkmem.port" */
	const char *subject;        /* for people: "a port" */
	const void *question;
	uint32_t question_bytes;    /* at most 256 */
	int timeout_ms;
	void *answer;               /* room for answer_max bytes */
	uint32_t answer_max;
	uint32_t answer_bytes;      /* out */
	int *fds;                   /* room for fds_max; what comes is the caller's */
	uint32_t fds_max;
	uint32_t n_fds;             /* out */
};

/* 0, what the primary refused with, or what dm_mp_request_sync() returns; -ENOTSUP it knows no such action; -EPROTO it is of another version: more
 * bytes or descriptors than there is room for. A death while it waits leaves nothing here. */
int dm_ask_primary(struct dm_memory *m, struct dm_ask *ask);

#endif
