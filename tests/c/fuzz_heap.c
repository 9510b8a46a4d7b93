/*
 * Operations of the heap as bytes, against a shadow: every block is stamped, checked before it changes, and zero where it must be; at
 * the end all is given back and the laws hold. `make fuzz-heap` builds it with clang for libFuzzer, which searches for inputs;
 * built without, it runs random ones, as many as its argument says.
 */
#include "fixture.h"
#include "shadow.h"

enum { SLOTS = 64, MAX_INPUT = 4096 };

static struct fixture f;

struct input {
	const uint8_t *at, *end;
};

static uint64_t take_byte(struct input *in)
{
	return in->at < in->end ? *in->at++ : 0;
}

/* Small ones mostly, up to some pages more than a cached run, now and then a big one. */
static uint64_t take_bytes(struct input *in)
{
	uint64_t high = take_byte(in), low = take_byte(in);

	return 1 + (high < 200 ? high * 8 + low % 8 : (high - 199) * (low < 250 ? 1500 : 40000) + low);
}

static void allocate(struct slot *s, struct input *in, uint64_t op)
{
	uint64_t bytes = take_bytes(in), align = UINT64_C(1) << take_byte(in) % 14;
	uint8_t *p = op % 2 ? dm_zmalloc(&f.m, bytes, align) : dm_malloc(&f.m, bytes, align);

	if (p == NULL)
		return; /* the fixture's limit */
	CHECK(((uintptr_t)p & (align - 1)) == 0);
	CHECK(op % 2 == 0 || is_filled(p, 0, bytes));
	*s = (struct slot){ .at = p, .bytes = bytes, .value = (uint8_t)(op ^ bytes) };
	stamp(s);
}

static void resize(struct slot *s, struct input *in)
{
	uint64_t bytes = take_bytes(in), before = s->bytes;
	uint8_t *p = dm_realloc(&f.m, s->at, bytes, 0);

	if (p == NULL)
		return;
	s->at = p;
	check_stamp(s, bytes < before ? bytes : before);
	s->bytes = bytes;
	stamp(s);
}

static void disturb(struct input *in)
{
	switch (take_byte(in) % 6) {
	case 0:
		CHECK(dm_caches_drain(&f.m, dm_heap_at(f.m.ctl, 0), false, -1) >= 0);
		break;
	case 1:
		fixture_shrink(&f, 0);
		break;
	case 2:
		atomic_store(&dm_heap_at(f.m.ctl, 0)->needs_rebuild, 1);
		break;
	case 3:
		dm_primary_set_caches(&f.m, (uint32_t)(take_byte(in) * 512));
		break;
	case 4:
		dm_threads_close(&f.m);
		CHECK(dm_threads_open(&f.m) == 0);
		break;
	default:
		fixture_check_laws(&f);
		fixture_check_caches(&f);
	}
}

static void bad_free(const struct slot *s, struct input *in)
{
	uint64_t into = 1 + take_byte(in) * 64;

	if (into < s->bytes)
		CHECK(dm_free(&f.m, s->at + into) == -EINVAL);
}

static void step(struct slot *slots, struct input *in)
{
	uint64_t op = take_byte(in);
	struct slot *s = &slots[take_byte(in) % SLOTS];

	if (op % 16 == 15) {
		disturb(in);
		return;
	}
	if (s->at == NULL) {
		allocate(s, in, op);
		return;
	}
	check_stamp(s, s->bytes);
	if (op % 4 == 0) {
		resize(s, in);
	} else if (op % 16 == 1) {
		bad_free(s, in);
	} else {
		CHECK(dm_free(&f.m, s->at) == 0);
		CHECK(op % 8 != 3 || dm_free(&f.m, s->at) == -EINVAL);
		s->at = NULL;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	struct slot slots[SLOTS] = { 0 };
	struct input in = { data, data + n_bytes };

	if (f.m.ctl == NULL) {
		fixture_cache_bytes = 65536;
		fixture_open(&f);
	}
	while (in.at < in.end)
		step(slots, &in);
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i].at == NULL)
			continue;
		check_stamp(&slots[i], slots[i].bytes);
		CHECK(dm_free(&f.m, slots[i].at) == 0);
	}
	fixture_check_laws(&f);
	fixture_check_caches(&f);
	CHECK(fixture_block_bytes(&f) == 0);
	return 0;
}

#include "fuzz_main.h"
