/* tag.c - names for what memory is used for.
 *
 * Owns the tag table. Ids are dense from DM_TAG_FIRST_USER on and never change or go away, so finding one takes no lock:
 * a name is written first, the state stored last. Law: n_tags == number of named tags from DM_TAG_FIRST_USER on. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "crash.h"
#include "memory.h"

enum { TAG_NAMED = 1, TAG_NAME_BYTES = DM_NAME_BYTES - 4 };

void dm_tag_name(const struct dm_control *c, uint32_t tag_id, char text[DM_NAME_BYTES])
{
	const char *name = "?";

	if (tag_id == DM_TAG_NONE)
		name = "none";
	else if (tag_id == DM_TAG_MEMZONE)
		name = "memzone";
	else if (tag_id < DM_MAX_TAGS && atomic_load_explicit(&dm_tag_at(c, tag_id)->state, memory_order_acquire) == TAG_NAMED)
		name = dm_tag_at(c, tag_id)->name;
	snprintf(text, DM_NAME_BYTES, "%.27s", name);
}

/* Returns the first id that is not named; *found tells whether one before it has this name, *tag_id which. */
static uint32_t scan_tags(const struct dm_control *c, const char *name, bool *found, uint32_t *tag_id)
{
	uint32_t i;

	*found = false;
	for (i = DM_TAG_FIRST_USER; i < DM_MAX_TAGS; i++) {
		const struct dm_tag *t = dm_tag_at(c, i);

		if (atomic_load_explicit(&t->state, memory_order_acquire) != TAG_NAMED)
			break;
		if (strncmp(t->name, name, TAG_NAME_BYTES) == 0) {
			*found = true;
			*tag_id = i;
		}
	}
	return i;
}

static int make_tag(struct dm_memory *m, const char *name, uint32_t *tag_id)
{
	bool found;
	uint32_t i = scan_tags(m->ctl, name, &found, tag_id);

	if (found)
		return 0;
	if (i == DM_MAX_TAGS)
		return dm_fail(m, -ENOSPC, "tag \"%s\": all %d tags are taken", name, DM_MAX_TAGS - DM_TAG_FIRST_USER);
	snprintf(dm_tag_at(m->ctl, i)->name, TAG_NAME_BYTES, "%s", name);
	DM_CRASH_POINT("tag: name written");
	atomic_store_explicit(&dm_tag_at(m->ctl, i)->state, TAG_NAMED, memory_order_release);
	DM_CRASH_POINT("tag: committed");
	atomic_store_explicit(&m->ctl->n_tags, i + 1 - DM_TAG_FIRST_USER, memory_order_relaxed); /* cures a predecessor's death */
	*tag_id = i;
	return 0;
}

int dm_tag(struct dm_memory *m, const char *name, uint32_t *tag_id)
{
	bool found;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (name == NULL || name[0] == '\0')
		return dm_fail(m, -EINVAL, "a tag needs a name");
	if (strlen(name) >= TAG_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "tag \"%s\": at most %d bytes", name, TAG_NAME_BYTES - 1);
	scan_tags(m->ctl, name, &found, tag_id);
	if (found)
		return 0;
	err = dm_lock_acquire(m, &m->ctl->tag_lock, -1);
	if (err < 0)
		return err;
	err = make_tag(m, name, tag_id);
	dm_lock_release(m, &m->ctl->tag_lock);
	return err;
}
