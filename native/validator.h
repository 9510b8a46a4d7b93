/* validator.h - what the follower and the attachment call in validator.c. */
#ifndef DM_VALIDATOR_H
#define DM_VALIDATOR_H

#include "memory.h"
#include "wire.h"

int dm_validators_create(struct dm_memory *m);
/* Waits for a call that runs. Before the follower is freed, and after it has ended. */
void dm_validators_destroy(struct dm_memory *m);
bool dm_validators_called_from(const struct dm_memory *m); /* the caller runs inside a validator */
/* The follower: queues a question; never waits for a validator. */
void dm_validators_ask(struct dm_memory *m, const struct dm_wire_validate *question);

#endif
