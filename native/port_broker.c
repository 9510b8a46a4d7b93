/* port_broker.c - what a worker asks the primary about ports whose sockets the primary owns: the bytes of question and answer (port.h). What the primary
 * did for a worker that died ends with its session. */
#include "ask.h"
#include "port_ask.h"

enum { HEAP_MS = 20000 };

int dm_port_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		uint32_t fds_max, uint32_t *n_fds)
{
	struct dm_ask ask = {
		.action = "dpdkmem.port", .subject = "a port", .question = request, .question_bytes = sizeof(*request), .timeout_ms = timeout_ms,
		.answer = answer, .answer_max = sizeof(*answer), .fds = fds, .fds_max = fds_max,
	};
	int err = dm_ask_primary(m, &ask);

	if (err == 0 && ask.answer_bytes != sizeof(*answer)) {
		dm_port_close_fds(fds, ask.n_fds);
		ask.n_fds = 0;
		err = dm_fail(m, -EPROTO, "the primary answered about a port with %u bytes, not %zu: it is of another version", ask.answer_bytes, sizeof(*answer));
	}
	if (n_fds != NULL)
		*n_fds = ask.n_fds;
	return err;
}

int dm_port_heap(struct dm_memory *m, uint64_t bytes, int32_t *numa_node)
{
	const struct dm_port_request request = { .op = DM_PORT_HEAP, .pool = bytes };
	struct dm_port_answer answer;
	const int err = dm_port_ask(m, &request, HEAP_MS, &answer, NULL, 0, NULL);

	if (err == 0)
		*numa_node = (int32_t)answer.values[0];
	return err;
}
