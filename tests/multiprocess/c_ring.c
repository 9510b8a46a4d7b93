/* c_ring.c - a process that moves elements of a ring, for test_ring.py: c_ring SOCKET NAME ROLE [ID]. Says "ready" when it has begun.
 *   hold    starts an enqueue and a dequeue, and never finishes them
 *   relay   takes what there is and puts it into the ring NAME2 for ever: c_ring SOCKET NAME relay NAME2
 *   feed    puts ID << 32 | 1, 2, 3, … for ever, in batches of 1 to 8
 * It ends with its standard input, or by a kill. */
#include <dpdkmem_ring.h>

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct dm_memory *memory;
static const struct dm_self *self;

static void need(int err, const char *what)
{
	if (err == 0)
		return;
	fprintf(stderr, "%s: %d %s\n", what, err, memory != NULL ? dm_error_text(memory) : "");
	exit(1);
}

static struct dm_ring *find(const char *name)
{
	struct dm_ring *r = NULL;

	need(dm_ring_lookup(memory, name, &r), name);
	return r;
}

static void say_ready(void)
{
	puts("ready");
	fflush(stdout);
}

static int is_over(void)
{
	struct pollfd in = { 0, POLLIN, 0 };

	return poll(&in, 1, 0) != 0;
}

static void hold(struct dm_ring *r)
{
	void *obj;
	char line[8];

	need(dm_ring_enqueue_bulk_start(self, r, 1, NULL) == 1 ? 0 : -1, "start an enqueue");
	need(dm_ring_dequeue_bulk_start(self, r, &obj, 1, NULL) == 1 ? 0 : -1, "start a dequeue");
	say_ready();
	(void)fgets(line, sizeof(line), stdin);
}

static void relay(struct dm_ring *from, struct dm_ring *to)
{
	void *objs[8];

	say_ready();
	while (!is_over())
		for (int turn = 0; turn < 1000; turn++) {
			int n = dm_ring_dequeue_wait(self, from, objs, 8, 10000000), done = 0;

			while (done < n && !is_over()) {
				const int moved = dm_ring_enqueue_wait(self, to, objs + done, (uint32_t)(n - done), 10000000);

				done += moved > 0 ? moved : 0;
			}
		}
}

static void feed(struct dm_ring *r, uint64_t id)
{
	uint64_t next = 1;

	say_ready();
	while (!is_over())
		for (int turn = 0; turn < 1000; turn++) {
			const uint32_t n = 1 + (uint32_t)(next * 7) % 8;
			void *objs[8];
			int moved;

			for (uint32_t i = 0; i < n; i++)
				objs[i] = (void *)(uintptr_t)(id << 32 | (next + i));
			moved = dm_ring_enqueue_wait(self, r, objs, n, 10000000);
			next += moved > 0 ? (uint64_t)moved : 0;
		}
}

int main(int argc, char **argv)
{
	struct dm_attach_options options = { .socket_path = argv[1], .name = "ring" };
	char why[512];
	int err;

	if (argc < 4)
		return 2;
	err = dm_attach(&options, &memory, why, sizeof(why));
	if (err != 0) {
		fprintf(stderr, "%d %s\n", err, why);
		return 1;
	}
	self = dm_self(memory);
	need(self == NULL, "register");
	if (strcmp(argv[3], "hold") == 0)
		hold(find(argv[2]));
	else if (strcmp(argv[3], "relay") == 0)
		relay(find(argv[2]), find(argv[4]));
	else
		feed(find(argv[2]), strtoull(argv[4], NULL, 10));
	return dm_detach(memory) != 0;
}
