/* debug.c - --heap-debug: what a program writes where it must not.
 *
 * Owns guards and poison. With "guard" at least 64 bytes behind what was asked for belong to the guard: a pattern that free, and
 * `dpdkmem heaps --check`, look at; the last 16 bytes say how much was asked for. With "poison" a block that is freed is filled
 * with words that carry its owner and tag; who gets the memory next finds out whether somebody has written there since. Both
 * name the block, its owner and its tag. A damaged block is never handed out: free refuses it, and malloc keeps what it found.
 * A pattern is written while the block's word says DM_TAG_FILLING: who looks at blocks passes it by, and what a kill leaves half
 * written, which looks as if somebody had written over it, is the reaper's, who fills it before the heap has it.
 * Lanes have no caches then, so each malloc and free takes the heap's lock. Memzones and external memory have no guard.
 * Laws: outside guard mode blocks have no guard; no live block contains a poison word that its owner did not write. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "heap.h"

enum { GUARD_BYTES = 64, GUARD_BYTE = 0xfd, LINE_WORDS = 8 };
#define GUARD_MAGIC UINT64_C(0x6472617567656e69)
#define POISON_MAGIC UINT64_C(0xdeadf4ee)
#define FRESH_WORD UINT64_C(0xa5a5a5a5a5a5a5a5) /* what malloc hands out in poison mode */

typedef unsigned long long ull;

/* The end of a guarded block. */
struct guard_end {
	uint64_t user_bytes, check; /* check: user_bytes ^ vaddr ^ GUARD_MAGIC */
};

static bool has_guards(const struct dm_control *c) { return (c->flags & DM_CTL_GUARD) != 0; }

static bool has_poison(const struct dm_control *c) { return (c->flags & DM_CTL_POISON) != 0; }

static bool is_filled(const struct dm_control *c, const struct dm_block_place *b)
{
	return dm_list_at(c, b->list_idx)->external == 0;
}

uint32_t dm_debug_mark(const struct dm_control *c, uint32_t mark)
{
	return dm_is_debugged(c) ? mark | DM_TAG_FILLING : mark;
}

/* ---- words ---- */

static _Atomic uint64_t *word_of(const struct dm_control *c, const struct dm_block_place *b)
{
	const struct dm_list *l = dm_list_at(c, b->list_idx);

	return b->is_small ? dm_block_cell(c, l, b->page, b->block) : dm_page_head(c, l, b->page);
}

/* False: its word is b->word no more. */
static bool change_mark(const struct dm_control *c, struct dm_block_place *b, uint32_t mark)
{
	uint64_t word = b->is_small ? dm_cell_word(mark, b->birth_s) : dm_head_run(dm_head_pages(b->word), mark);

	if (!atomic_compare_exchange_strong_explicit(word_of(c, b), &b->word, word, memory_order_acq_rel, memory_order_acquire))
		return false;
	b->word = word;
	b->mark = mark;
	return true;
}

/* ---- guards ---- */

uint64_t dm_debug_bytes(const struct dm_control *c, uint64_t user_bytes)
{
	return has_guards(c) ? user_bytes + GUARD_BYTES : user_bytes;
}

static bool is_guarded(const struct dm_control *c, const struct dm_block_place *b)
{
	return has_guards(c) && !dm_block_is_zone(b) && dm_list_at(c, b->list_idx)->external == 0;
}

static struct guard_end *end_of(const struct dm_block_place *b)
{
	return (struct guard_end *)(uintptr_t)(b->vaddr + b->bytes - sizeof(struct guard_end));
}

static bool end_is_whole(const struct dm_block_place *b)
{
	const struct guard_end *e = end_of(b);

	return e->check == (e->user_bytes ^ b->vaddr ^ GUARD_MAGIC) && e->user_bytes + GUARD_BYTES <= b->bytes;
}

uint64_t dm_debug_user_bytes(const struct dm_control *c, const struct dm_block_place *b)
{
	return is_guarded(c, b) && end_is_whole(b) ? end_of(b)->user_bytes : b->bytes;
}

static void say(const struct dm_control *c, const struct dm_block_place *b, const char *what, uint64_t at, char *text)
{
	char why[256];

	dm_block_describe(c, b->vaddr, why, sizeof(why));
	snprintf(text, DM_ERROR_BYTES, "block 0x%llx is damaged: %s (first at 0x%llx, offset %lld); %s", (ull)b->vaddr, what, (ull)at,
		 (long long)(at - b->vaddr), why);
}

int dm_debug_check_guard(const struct dm_control *c, const struct dm_block_place *b, char *text)
{
	const uint8_t *bytes = (const uint8_t *)(uintptr_t)b->vaddr;
	uint64_t end = b->bytes - sizeof(struct guard_end), at;

	if (!is_guarded(c, b))
		return 0;
	if (!end_is_whole(b)) {
		for (at = end; at > 0 && bytes[at - 1] != GUARD_BYTE;) /* how far the overflow may have begun */
			at--;
		say(c, b, "what stands behind it was overwritten to the very end", b->vaddr + at, text);
		return -EBADMSG;
	}
	for (at = end_of(b)->user_bytes; at < end; at++) {
		if (bytes[at] == GUARD_BYTE)
			continue;
		say(c, b, "something was written behind its end", b->vaddr + at, text);
		return -EBADMSG;
	}
	return 0;
}

/* ---- poison ---- */

static uint64_t poison_of(uint32_t mark) { return POISON_MAGIC << 32 | mark; }

/* The poison that most words of a line carry; 0: none. A line is one block's, so whole ones carry one poison eight times. */
static uint64_t poison_in(const uint64_t *line)
{
	uint64_t found = 0;
	int n_most = 0;

	for (int i = 0; i < LINE_WORDS; i++) {
		int n = 0;

		for (int j = 0; j < LINE_WORDS; j++)
			n += line[j] == line[i];
		if (line[i] >> 32 == POISON_MAGIC && n > n_most) {
			found = line[i];
			n_most = n;
		}
	}
	return found;
}

static const uint64_t *find_stain(const uint64_t *line, uint64_t poison)
{
	for (int i = 0; i < LINE_WORDS; i++)
		if (line[i] != poison)
			return &line[i];
	return NULL;
}

static int check_poison(struct dm_memory *m, const struct dm_block_place *b)
{
	const uint64_t *words = (const uint64_t *)(uintptr_t)b->vaddr;
	char tag[DM_NAME_BYTES];

	for (uint64_t i = 0; i < b->bytes / sizeof(*words); i += LINE_WORDS) {
		uint64_t poison = poison_in(words + i);
		const uint64_t *stain = poison == 0 ? NULL : find_stain(words + i, poison);
		uint32_t mark = (uint32_t)poison;

		if (stain == NULL)
			continue;
		dm_tag_name(m->ctl, dm_mark_tag(mark), tag);
		return dm_fail(m, -EBADMSG, "memory at %p was written to after it was freed: it was a block of owner %u (%.31s), tag %s; the "
					    "block 0x%llx that was found there stays out of use", (const void *)stain, dm_mark_owner(mark),
			       dm_owner_at(m->ctl, dm_mark_owner(mark) % DM_MAX_OWNERS)->name, tag, (ull)b->vaddr);
	}
	return 0;
}

static void fill(uint64_t vaddr, uint64_t bytes, uint64_t word)
{
	for (uint64_t i = 0; i < bytes / sizeof(word); i++) {
		((uint64_t *)(uintptr_t)vaddr)[i] = word;
		if (i == LINE_WORDS / 2)
			DM_CRASH_POINT("debug: half a line filled");
	}
}

static void set_guard(const struct dm_block_place *b, uint64_t user_bytes)
{
	struct guard_end *e = end_of(b);

	memset((void *)(uintptr_t)(b->vaddr + user_bytes), GUARD_BYTE, b->bytes - user_bytes - sizeof(*e));
	*e = (struct guard_end){ .user_bytes = user_bytes, .check = user_bytes ^ b->vaddr ^ GUARD_MAGIC };
}

/* ---- in and out of the heap ---- */

int dm_debug_taken(struct dm_memory *m, uint64_t vaddr, uint64_t user_bytes)
{
	const struct dm_control *c = m->ctl;
	struct dm_block_place b;
	int err = 0;

	if (!dm_is_debugged(c) || dm_block_find_any(c, vaddr, &b) != 0)
		return 0;
	if (has_poison(c) && is_filled(c, &b)) {
		err = check_poison(m, &b);
		fill(vaddr, b.bytes, FRESH_WORD);
	}
	if (is_guarded(c, &b))
		set_guard(&b, user_bytes);
	DM_CRASH_POINT("debug: filled, not live yet");
	change_mark(c, &b, b.mark & ~(uint32_t)DM_TAG_FILLING);
	return err;
}

int dm_debug_to_be_freed(struct dm_memory *m, uint64_t vaddr, struct dm_block_place *out)
{
	const struct dm_control *c = m->ctl;
	char text[DM_ERROR_BYTES];
	uint32_t mark;

	if (dm_block_find_start(c, vaddr, out) != 0)
		return -EINVAL;
	if (dm_debug_check_guard(c, out, text) != 0)
		return dm_fail(m, -EBADMSG, "free: %s", text);
	if (!has_poison(c) || !is_filled(c, out))
		return 0;
	mark = out->mark;
	if (!change_mark(c, out, dm_mark(m->owner_id, (mark & 0xffff) | DM_TAG_FILLING)))
		return -EINVAL;
	DM_CRASH_POINT("debug: to be filled");
	fill(vaddr, out->bytes, poison_of(mark));
	return 0;
}

/* It is the caller's from then on, whose free has failed. */
void dm_debug_keep(struct dm_memory *m, const struct dm_block_place *b)
{
	struct dm_block_place kept = *b;

	change_mark(m->ctl, &kept, b->mark & ~(uint32_t)DM_TAG_FILLING);
}

void dm_debug_refill(struct dm_memory *m, const struct dm_block_place *b)
{
	if (has_poison(m->ctl) && is_filled(m->ctl, b))
		fill(b->vaddr, b->bytes, poison_of(b->mark & ~(uint32_t)DM_TAG_FILLING));
}

/* Under no lock: what looks damaged may have been freed and taken again meanwhile, even with the same word. Real damage stays. */
static bool is_damaged(const struct dm_control *c, const struct dm_block_place *b, char *text)
{
	enum { LOOKS = 3 };

	for (int i = 0; i < LOOKS; i++)
		if (dm_debug_check_guard(c, b, text) == 0 || atomic_load_explicit(word_of(c, b), memory_order_acquire) != b->word)
			return false;
	return true;
}

int dm_debug_find_damaged(struct dm_memory *m, struct dm_block_cursor *cursor, char *text)
{
	struct dm_block_place b;

	while (dm_block_walk_live(m->ctl, cursor, &b) == 0)
		if (is_damaged(m->ctl, &b, text))
			return 1;
	return 0;
}
