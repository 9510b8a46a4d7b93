/* fbarray.c - shared indexed arrays: their life, who is attached, and single elements. fbarray_find.c searches.
 *
 * Owns struct dm_fb_shared (fbarray.h), which lies behind the record of a named structure of the type "fbarray".
 * Rules: an array can be destroyed, or replaced, only while no other living process is attached; who is attached stands in a table of
 * (owner id, first word of its session id), so a process that died, or a later one with its owner id, does not count.
 * fbarray.h says what protects what. A handle is the program's: no thread may use one that another detaches or destroys. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crash.h"
#include "fbarray.h"
#include "named.h"

#define TYPE DM_NAMED_TYPE_FBARRAY

static uint64_t round_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) / to * to;
}

static uint64_t n_words(uint32_t len)
{
	return ((uint64_t)len + 63) / 64;
}

static uint64_t data_offset(uint32_t len)
{
	return round_up(sizeof(struct dm_fb_shared) + n_words(len) * 8, DM_CACHE_LINE);
}

/* ---- the lock ---- */

static void recount(struct dm_fb_shared *s)
{
	uint32_t n = 0;

	for (uint64_t i = 0; i < n_words(s->len); i++)
		n += (uint32_t)__builtin_popcountll(atomic_load_explicit(&s->used[i], memory_order_relaxed));
	s->count = n;
}

int dm_fb_lock(struct dm_memory *m, struct dm_fb_shared *s)
{
	int got = dm_lock_acquire(m, &s->lock, -1);

	if (got == 1)
		recount(s);
	return got < 0 ? got : 0;
}

void dm_fb_unlock(struct dm_memory *m, struct dm_fb_shared *s)
{
	dm_lock_release(m, &s->lock);
}

static int lock_life(struct dm_memory *m)
{
	int got = dm_lock_acquire(m, &m->ctl->fbarray_lock, -1);

	return got < 0 ? got : 0;
}

static void unlock_life(struct dm_memory *m)
{
	dm_lock_release(m, &m->ctl->fbarray_lock);
}

int dm_fb_enter(struct dm_memory *m, const struct dm_fbarray *arr, uint32_t idx, struct dm_fb_shared **out)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (arr == NULL || arr->shared == NULL)
		return dm_fail(m, -EINVAL, "no array, or one that was detached");
	if (idx >= arr->len)
		return dm_fail(m, -EINVAL, "array \"%.63s\" has no index %u: it has %u elements", arr->name, idx, arr->len);
	*out = arr->shared;
	return dm_fb_lock(m, *out);
}

/* ---- who is attached ---- */

static uint32_t session_word(const struct dm_control *c, uint32_t owner_id)
{
	uint32_t word;

	memcpy(&word, dm_owner_at(c, owner_id)->session_id, sizeof(word));
	return word;
}

/* One whose session ended may still run and store: only its pidfd proves its death, which makes it an ORPHAN or frees its slot. */
static bool lives(const struct dm_control *c, const struct dm_fb_process *p)
{
	uint32_t state;

	if (p->owner_id == DM_OWNER_NONE || p->owner_id >= DM_MAX_OWNERS)
		return false;
	state = atomic_load(&dm_owner_at(c, p->owner_id)->state);
	return (state == DM_OWNER_LIVE || state == DM_OWNER_DEAD) && session_word(c, p->owner_id) == p->session_word;
}

static struct dm_fb_process *own_entry(const struct dm_memory *m, struct dm_fb_shared *s)
{
	for (int i = 0; i < DM_FBARRAY_MAX_PROCESSES; i++)
		if (s->processes[i].owner_id == m->owner_id && lives(m->ctl, &s->processes[i]))
			return &s->processes[i];
	return NULL;
}

static uint32_t count_others(const struct dm_memory *m, const struct dm_fb_shared *s)
{
	uint32_t n = 0;

	for (int i = 0; i < DM_FBARRAY_MAX_PROCESSES; i++)
		n += s->processes[i].owner_id != m->owner_id && lives(m->ctl, &s->processes[i]);
	return n;
}

/* The session word first: an entry that was half written by who died names nobody that lives. */
static int enter_table(const struct dm_memory *m, struct dm_fb_shared *s)
{
	for (int i = 0; i < DM_FBARRAY_MAX_PROCESSES; i++) {
		struct dm_fb_process *p = &s->processes[i];

		if (lives(m->ctl, p))
			continue;
		p->owner_id = DM_OWNER_NONE;
		dm_order();
		p->session_word = session_word(m->ctl, m->owner_id);
		DM_CRASH_POINT("fbarray: half an entry");
		dm_order();
		p->owner_id = m->owner_id;
		return 0;
	}
	return -EUSERS;
}

/* ---- life ---- */

static void open_handle(struct dm_fbarray *arr, const struct dm_named *named)
{
	struct dm_fb_shared *s = (struct dm_fb_shared *)(uintptr_t)named->vaddr;

	*arr = (struct dm_fbarray){.data = (uint8_t *)s + data_offset(s->len), .len = s->len, .elt_sz = s->elt_sz, .shared = s,
		.zone_idx = named->zone_idx, .generation = named->generation};
	strcpy(arr->name, named->name);
}

struct making {
	const struct dm_memory *m;
	uint32_t len, elt_sz;
};

static void prepare(void *structure, const void *arg)
{
	struct dm_fb_shared *s = structure;
	const struct making *making = arg;

	s->len = making->len;
	s->elt_sz = making->elt_sz;
	enter_table(making->m, s);
}

static int judge(struct dm_memory *m, const struct dm_fbarray *arr, const char *name)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (arr == NULL || name == NULL || *name == '\0')
		return dm_fail(m, -EINVAL, "an array has a name");
	if (strlen(name) >= DM_NAMED_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "array \"%.70s\": a name has at most %d bytes", name, DM_NAMED_NAME_BYTES - 1);
	return 0;
}

/* Under the life lock: removes an array that no living process has. -EBUSY: one has it; -ENOENT: there is none. */
static int remove_deserted(struct dm_memory *m, const char *name)
{
	struct dm_fb_shared *s;
	struct dm_named named;
	uint32_t n;
	int err = dm_named_lookup(m, TYPE, name, &named);

	if (err != 0)
		return err;
	s = (struct dm_fb_shared *)(uintptr_t)named.vaddr;
	n = count_others(m, s) + (own_entry(m, s) != NULL);
	if (n != 0)
		return dm_fail(m, -EBUSY, "array \"%s\": %u living processes have one of that name", name, n);
	DM_CRASH_POINT("fbarray: about to be replaced");
	return dm_named_remove_any(m, &named);
}

/* 0: try again. */
static int replace(struct dm_memory *m, const char *name)
{
	int err = lock_life(m);

	if (err != 0)
		return err;
	err = remove_deserted(m, name);
	unlock_life(m);
	return err == -ENOENT ? 0 : err;
}

int dm_fbarray_init(struct dm_memory *m, struct dm_fbarray *arr, const char *name, uint32_t len, uint32_t elt_sz)
{
	struct dm_named spec = {.type = TYPE}, named;
	struct making making = {m, len, elt_sz};
	int err = judge(m, arr, name);

	if (err != 0)
		return err;
	if (len == 0 || elt_sz == 0 || len > INT32_MAX)
		return dm_fail(m, -EINVAL, "array \"%s\" of %u elements of %u bytes", name, len, elt_sz);
	strcpy(spec.name, name); /* judge: it fits */
	spec.bytes = data_offset(len) + (uint64_t)len * elt_sz;
	while ((err = dm_named_create_with(m, &spec, DM_NUMA_ANY, prepare, &making, &named)) == -EEXIST) {
		err = replace(m, name);
		if (err != 0)
			return err;
	}
	if (err == 0)
		open_handle(arr, &named);
	return err;
}

/* Under the life lock. */
static int attach(struct dm_memory *m, struct dm_fbarray *arr, const char *name)
{
	struct dm_fb_shared *s;
	struct dm_named named;
	int err = dm_named_lookup(m, TYPE, name, &named);

	if (err != 0)
		return err == -ENOENT ? dm_fail(m, err, "there is no array \"%s\"", name) : err;
	s = (struct dm_fb_shared *)(uintptr_t)named.vaddr;
	if (own_entry(m, s) != NULL)
		return dm_fail(m, -EEXIST, "this process is attached to array \"%s\" already", name);
	if (enter_table(m, s) != 0)
		return dm_fail(m, -EUSERS, "array \"%s\": %d processes are attached", name, DM_FBARRAY_MAX_PROCESSES);
	open_handle(arr, &named);
	return 0;
}

int dm_fbarray_attach(struct dm_memory *m, struct dm_fbarray *arr, const char *name)
{
	int err = judge(m, arr, name);

	if (err != 0)
		return err;
	err = lock_life(m);
	if (err != 0)
		return err;
	err = attach(m, arr, name);
	unlock_life(m);
	return err;
}

/* Under the life lock. */
static int detach(struct dm_memory *m, const struct dm_fbarray *arr, bool to_destroy)
{
	struct dm_named named = {.type = TYPE, .zone_idx = arr->zone_idx, .generation = arr->generation}, found;
	struct dm_fb_shared *s = arr->shared;
	struct dm_fb_process *own;
	uint32_t n;

	memcpy(named.name, arr->name, sizeof(named.name));
	if (dm_named_lookup(m, TYPE, named.name, &found) != 0 || found.zone_idx != named.zone_idx || found.generation != named.generation)
		return dm_fail(m, -ENOENT, "array \"%.63s\" is gone", arr->name);
	own = own_entry(m, s);
	n = count_others(m, s);
	if (own == NULL)
		return dm_fail(m, -ENOENT, "this process is not attached to array \"%.63s\"", arr->name);
	if (to_destroy && n != 0)
		return dm_fail(m, -EBUSY, "array \"%.63s\": %u other processes are attached", arr->name, n);
	own->owner_id = DM_OWNER_NONE;
	DM_CRASH_POINT("fbarray: left");
	return to_destroy ? dm_named_remove_any(m, &named) : 0;
}

static int leave(struct dm_memory *m, struct dm_fbarray *arr, bool to_destroy)
{
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (arr == NULL || arr->shared == NULL)
		return dm_fail(m, -EINVAL, "no array, or one that was detached");
	err = lock_life(m);
	if (err != 0)
		return err;
	err = detach(m, arr, to_destroy);
	unlock_life(m);
	if (err == 0)
		*arr = (struct dm_fbarray){0};
	return err;
}

int dm_fbarray_detach(struct dm_memory *m, struct dm_fbarray *arr)
{
	return leave(m, arr, false);
}

int dm_fbarray_destroy(struct dm_memory *m, struct dm_fbarray *arr)
{
	return leave(m, arr, true);
}

/* ---- elements ---- */

void *dm_fbarray_get(const struct dm_fbarray *arr, uint32_t idx)
{
	return arr == NULL || arr->shared == NULL || idx >= arr->len ? NULL : (uint8_t *)arr->data + (uint64_t)idx * arr->elt_sz;
}

static int set(struct dm_memory *m, const struct dm_fbarray *arr, uint32_t idx, bool used)
{
	struct dm_fb_shared *s;
	uint64_t bit = UINT64_C(1) << idx % 64, old;
	int err = dm_fb_enter(m, arr, idx, &s);

	if (err != 0)
		return err;
	old = used ? atomic_fetch_or_explicit(&s->used[idx / 64], bit, memory_order_relaxed) :
		     atomic_fetch_and_explicit(&s->used[idx / 64], ~bit, memory_order_relaxed);
	DM_CRASH_POINT("fbarray: bit set, count not");
	if (((old & bit) != 0) != used)
		s->count += used ? 1 : UINT32_MAX;
	dm_fb_unlock(m, s);
	return 0;
}

int dm_fbarray_set_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx)
{
	return set(m, arr, idx, true);
}

int dm_fbarray_set_free(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx)
{
	return set(m, arr, idx, false);
}

int dm_fbarray_is_used(struct dm_memory *m, struct dm_fbarray *arr, uint32_t idx)
{
	struct dm_fb_shared *s;
	int err = dm_fb_enter(m, arr, idx, &s), is_used;

	if (err != 0)
		return err;
	is_used = atomic_load_explicit(&s->used[idx / 64], memory_order_relaxed) >> idx % 64 & 1;
	dm_fb_unlock(m, s);
	return is_used;
}

int dm_fbarray_count(struct dm_memory *m, struct dm_fbarray *arr)
{
	struct dm_fb_shared *s;
	int err = dm_fb_enter(m, arr, 0, &s), n;

	if (err != 0)
		return err;
	n = (int)s->count;
	dm_fb_unlock(m, s);
	return n;
}

int dm_fbarray_find_idx(struct dm_memory *m, const struct dm_fbarray *arr, const void *elt)
{
	uint64_t at;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (arr == NULL || arr->shared == NULL || elt == NULL)
		return dm_fail(m, -EINVAL, "no array, or no element");
	at = (uintptr_t)elt - (uintptr_t)arr->data;
	if ((uintptr_t)elt < (uintptr_t)arr->data || at / arr->elt_sz >= arr->len)
		return dm_fail(m, -EINVAL, "%p lies outside of array \"%.63s\"", elt, arr->name);
	return (int)(at / arr->elt_sz);
}

int dm_fbarray_dump_metadata(struct dm_memory *m, struct dm_fbarray *arr, char *text, size_t text_bytes)
{
	struct dm_fb_shared *s;
	int err = dm_fb_enter(m, arr, 0, &s), n, at;

	if (err != 0)
		return err;
	n = snprintf(text, text_bytes, "array \"%.63s\": %u of %u elements of %u bytes used, data at %p\n", arr->name, s->count, s->len,
		     s->elt_sz, arr->data);
	for (uint64_t i = 0; i < n_words(s->len); i++) {
		at = (size_t)n < text_bytes ? n : (int)text_bytes;
		n += snprintf(text + at, text_bytes - (size_t)at, "%5llu: 0x%016llx\n", (unsigned long long)i * 64,
			      (unsigned long long)atomic_load_explicit(&s->used[i], memory_order_relaxed));
	}
	dm_fb_unlock(m, s);
	return n;
}
