/* named.h - the record of a named shared structure, as it lies in its memzone.
 *
 * Truth is `stamp`: stored last, it says that the record is whole, and of which reservation of the zone it is; bytes that an earlier user
 * of the memory left never look like that. A record that is not whole belongs to who reserved the zone: alive it will finish,
 * dead the next who wants the name frees it. So a kill -9 between any two instructions leaves a zone with a dead owner, or none.
 * A record is read under a pin, and its zone looked at once more after that: it may be removed at any moment. */
#ifndef DM_NAMED_H
#define DM_NAMED_H

#include "memory.h"

struct dm_named_record {
	_Atomic uint64_t stamp;     /* of the zone: index and generation; stored last */
	uint64_t vaddr, bytes;      /* of the structure */
	uint64_t registered_ns;     /* CLOCK_REALTIME */
	char type[DM_NAMED_TYPE_BYTES], name[DM_NAMED_NAME_BYTES];
	uint8_t pad[64];
};
static_assert(sizeof(struct dm_named_record) == 192, "what follows a record begins a line");

/* Arrays come and go under a lock of their own (fbarray.c): nobody else makes or removes records of this type. */
#define DM_NAMED_TYPE_FBARRAY "fbarray"
int dm_named_remove_any(struct dm_memory *m, const struct dm_named *which);

/* dm_named_create() with what is to be done to the memory before anybody can find it. */
int dm_named_create_with(struct dm_memory *m, const struct dm_named *spec, int32_t numa_node,
			 void (*prepare)(void *structure, const void *arg), const void *arg, struct dm_named *out);

#endif
