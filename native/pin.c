/* pin.c - what keeps memory from being given back: devices, kernel sockets, back-ends, leases.
 *
 * Owns the pin table. A pin is made in a slot taken by compare-and-swap (kind 0: being made, hinders nobody), and
 * committed by storing its word with the kind, last. The table decides; memseg.n_pins is a hint for people, computed
 * again for the memsegs of a pin whose maker died (dm_pins_reap).
 * A pin under a memseg that is about to leave: see segments.c. */
#include <errno.h>
#include <stdio.h>

#include "heap.h"

enum { PIN_KIND_MASK = 0xffff, PIN_OWNER_SHIFT = 16 };

typedef unsigned long long ull;

static uint64_t pin_word(uint32_t owner_id, uint32_t kind)
{
	return (uint64_t)owner_id << PIN_OWNER_SHIFT | kind;
}

/* Copied field by field: a reader without a lock may meet a slot that is taken again. */
static void pin_range(const struct dm_pin *p, uint64_t *vaddr, uint64_t *bytes)
{
	*vaddr = __atomic_load_n(&p->vaddr, __ATOMIC_RELAXED);
	*bytes = __atomic_load_n(&p->bytes, __ATOMIC_RELAXED);
}

/* Slots are taken lowest first, so nothing was ever pinned behind one that was never filled: a search ends there. */
static bool was_never_used(const struct dm_pin *p, uint64_t word)
{
	return word == 0 && __atomic_load_n(&p->bytes, __ATOMIC_RELAXED) == 0;
}

int dm_pin_find(const struct dm_control *c, uint64_t vaddr, uint64_t bytes)
{
	for (int i = 0; i < DM_MAX_PINS; i++) {
		const struct dm_pin *p = dm_pin_at(c, (uint64_t)i);
		uint64_t word = atomic_load_explicit(&p->word, memory_order_acquire), at, n;

		if (was_never_used(p, word))
			break;
		if ((word & PIN_KIND_MASK) == DM_PIN_FREE)
			continue;
		pin_range(p, &at, &n);
		if (at < vaddr + bytes && vaddr < at + n)
			return i;
	}
	return -ENOENT;
}

/* Adds delta to the hint of every memseg under [vaddr, vaddr + bytes). */
static void hint(const struct dm_control *c, const struct dm_list *l, uint64_t vaddr, uint64_t bytes, uint32_t delta)
{
	uint64_t last = (vaddr + bytes - 1 - l->base_vaddr) / l->page_bytes;

	for (uint64_t seg = (vaddr - l->base_vaddr) / l->page_bytes; seg <= last; seg++)
		atomic_fetch_add_explicit(&dm_list_memseg(c, l, seg)->n_pins, delta, memory_order_relaxed);
}

static bool all_present(const struct dm_control *c, const struct dm_list *l, uint64_t vaddr, uint64_t bytes)
{
	uint64_t last = (vaddr + bytes - 1 - l->base_vaddr) / l->page_bytes;

	for (uint64_t seg = (vaddr - l->base_vaddr) / l->page_bytes; seg <= last; seg++)
		if (dm_seg_settled_state(c, l, seg) != DM_SEG_PRESENT)
			return false;
	return true;
}

static int take_slot(struct dm_control *c, uint32_t owner_id, uint32_t *pin_id)
{
	for (uint32_t i = 0; i < DM_MAX_PINS; i++) {
		uint64_t none = 0;

		if (atomic_load_explicit(&dm_pin_at(c, i)->word, memory_order_relaxed) == 0 &&
		    atomic_compare_exchange_strong_explicit(&dm_pin_at(c, i)->word, &none, pin_word(owner_id, DM_PIN_FREE),
							    memory_order_acquire, memory_order_relaxed)) {
			*pin_id = i;
			return 0;
		}
	}
	return -ENOSPC;
}

static int judge_pin(struct dm_memory *m, uint64_t vaddr, uint64_t bytes, uint32_t kind)
{
	int list_idx = dm_find_list(m->ctl, vaddr);
	const struct dm_list *l;

	if (kind == DM_PIN_FREE || kind > DM_PIN_USER)
		return dm_fail(m, -EINVAL, "pin kind %u: there is 1 lease, 2 VFIO, 3 vhost, 4 AF_XDP, 5 user", kind);
	if (list_idx < 0)
		return dm_fail(m, -ENOENT, "pin at 0x%llx: it lies in no memseg list", (ull)vaddr);
	l = dm_list_at(m->ctl, (uint32_t)list_idx);
	if (!dm_list_is_held(m->ctl, l, m->owner_id))
		return dm_fail(m, -ENOENT, "pin at 0x%llx: this process has not attached that external memory", (ull)vaddr);
	if (bytes == 0 || bytes > l->base_vaddr + l->window_bytes - vaddr)
		return dm_fail(m, -EINVAL, "pin [0x%llx, + %llu): empty, or past the end of its list", (ull)vaddr, (ull)bytes);
	return 0;
}

int dm_pin(struct dm_memory *m, const void *addr, uint64_t bytes, uint32_t kind, const char *reason, uint32_t *pin_id)
{
	uint64_t vaddr = (uintptr_t)addr;
	const struct dm_list *l;
	struct dm_pin *p;
	int err = dm_usable(m);

	if (err == 0)
		err = judge_pin(m, vaddr, bytes, kind);
	if (err != 0)
		return err;
	if (take_slot(m->ctl, m->owner_id, pin_id) != 0)
		return dm_fail(m, -ENOSPC, "all %d pins are taken", DM_MAX_PINS);
	l = dm_list_at(m->ctl, (uint32_t)dm_find_list(m->ctl, vaddr));
	p = dm_pin_at(m->ctl, *pin_id);
	__atomic_store_n(&p->vaddr, vaddr, __ATOMIC_RELAXED);
	__atomic_store_n(&p->bytes, bytes, __ATOMIC_RELAXED);
	snprintf(p->reason, sizeof(p->reason), "%s", reason == NULL ? "" : reason);
	DM_CRASH_POINT("pin: filled");
	atomic_store(&p->word, pin_word(m->owner_id, kind));
	DM_CRASH_POINT("pin: committed");
	atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in take_out (segments.c) */
	hint(m->ctl, l, vaddr, bytes, 1);
	if (all_present(m->ctl, l, vaddr, bytes))
		return 0;
	dm_unpin(m, *pin_id);
	return dm_fail(m, -ENOENT, "pin [0x%llx, 0x%llx): not all of it is present", (ull)vaddr, (ull)(vaddr + bytes));
}

static void drop_pin(struct dm_control *c, struct dm_pin *p)
{
	uint64_t vaddr, bytes;
	const struct dm_list *l;

	pin_range(p, &vaddr, &bytes);
	l = dm_list_at(c, (uint32_t)dm_find_list(c, vaddr));
	hint(c, l, vaddr, bytes, UINT32_MAX);
	DM_CRASH_POINT("pin: hint gone, pin not");
	atomic_store_explicit(&p->word, 0, memory_order_release);
}

int dm_unpin(struct dm_memory *m, uint32_t pin_id)
{
	struct dm_pin *p;
	uint64_t word;
	int err = dm_usable(m);

	if (err != 0)
		return err;
	if (pin_id >= DM_MAX_PINS)
		return dm_fail(m, -EINVAL, "pin %u: there are %d", pin_id, DM_MAX_PINS);
	p = dm_pin_at(m->ctl, pin_id);
	word = atomic_load_explicit(&p->word, memory_order_acquire);
	if ((word & PIN_KIND_MASK) == DM_PIN_FREE || word >> PIN_OWNER_SHIFT != m->owner_id)
		return dm_fail(m, -EINVAL, "pin %u is not held by this attachment", pin_id);
	drop_pin(m->ctl, p);
	return 0;
}

/* Counts the hint of each memseg in the range again. Pins that others make meanwhile may be missed: it is a hint. */
static void recount_hints(struct dm_control *c, uint64_t vaddr, uint64_t bytes)
{
	int list_idx = dm_find_list(c, vaddr);
	const struct dm_list *l;

	if (list_idx < 0 || bytes == 0)
		return;
	l = dm_list_at(c, (uint32_t)list_idx);
	for (uint64_t at = vaddr - vaddr % l->page_bytes; at < vaddr + bytes; at += l->page_bytes) {
		uint32_t n = 0;

		for (uint32_t i = 0; i < DM_MAX_PINS; i++) {
			const struct dm_pin *p = dm_pin_at(c, i);
			uint64_t start, length;

			pin_range(p, &start, &length);
			n += (atomic_load(&p->word) & PIN_KIND_MASK) != DM_PIN_FREE && start < at + l->page_bytes &&
			     at < start + length;
		}
		atomic_store_explicit(&dm_list_memseg(c, l, (at - l->base_vaddr) / l->page_bytes)->n_pins, n,
				      memory_order_relaxed);
	}
}

void dm_pins_reap(struct dm_control *c, uint32_t owner_id)
{
	for (uint32_t i = 0; i < DM_MAX_PINS; i++) {
		struct dm_pin *p = dm_pin_at(c, i);
		uint64_t word = atomic_load_explicit(&p->word, memory_order_acquire), vaddr, bytes;
		uint64_t kind = word & PIN_KIND_MASK;

		if (word == 0 || word >> PIN_OWNER_SHIFT != owner_id)
			continue;
		if (kind != DM_PIN_FREE && kind != DM_PIN_LEASE && kind != DM_PIN_USER)
			continue; /* a device or the kernel may write there still */
		pin_range(p, &vaddr, &bytes);
		if (bytes == 0) /* its maker died before it was filled: see was_never_used */
			__atomic_store_n(&p->bytes, 1, __ATOMIC_RELAXED);
		atomic_store_explicit(&p->word, 0, memory_order_release);
		recount_hints(c, vaddr, bytes);
	}
}
