/* c_program.c - a secondary in C, for test_c_program.py: attaches, and obeys lines on standard input.
 *
 * Each line gets one line back, "ok ..." or "error -N text". The program includes only what users include. */
#include <dpdkmem.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static _Atomic unsigned int n_alloc, n_free, n_wrong;
static _Atomic uint64_t last_seq;
static struct dm_memory *memory;
static void *made_inside;
static int detach_inside;

/* Numbers rise by one each, but for the replay; memory can be touched; allocation is allowed. */
static void on_event(const struct dm_mem_event *event, void *arg)
{
	uint64_t before = atomic_exchange(&last_seq, event->seq);

	if (arg != &last_seq || (before && event->seq != before && event->seq != before + 1))
		atomic_fetch_add(&n_wrong, 1);
	atomic_fetch_add(event->type == DM_MEM_EVENT_ALLOC ? &n_alloc : &n_free, 1);
	if (((volatile const unsigned char *)(uintptr_t)event->vaddr)[event->bytes - 1] == 1)
		detach_inside = dm_detach(memory);
	if (!made_inside)
		made_inside = dm_malloc(memory, 3 << 20, 0);
}

static void say(int err)
{
	if (err)
		printf("error %d %s\n", err, dm_error_text(memory));
	else
		printf("ok\n");
}

static void reserve(const char *name, const char *text)
{
	struct dm_memzone zone;
	struct dm_memzone_spec spec = {.name = name, .bytes = 4096, .numa_node = DM_NUMA_ANY};
	int err = dm_memzone_reserve(memory, &spec, &zone);

	if (!err)
		snprintf((char *)(uintptr_t)zone.vaddr, 4096, "%s", text);
	say(err);
}

static void look_up(const char *name)
{
	struct dm_memzone zone;
	int err = dm_memzone_lookup(memory, name, &zone);

	if (err)
		say(err);
	else
		printf("ok %.100s\n", (const char *)(uintptr_t)zone.vaddr);
}

/* In a child every call answers, none crashes; returns how many did not say that it is a child's. */
static int calls_in_child(struct dm_event_reader *reader)
{
	struct dm_mem_event event;
	struct dm_memseg_info memseg;
	struct dm_memzone zone;
	struct dm_run run;
	uint64_t version, seq;
	char text[512];
	int wrong = 0;

	wrong += dm_malloc(memory, 64, 0) != NULL;
	wrong += dm_memzone_lookup(memory, "any", &zone) != -ECHILD;
	wrong += dm_event_reader_next(reader, &event, 0) != -ECHILD;
	wrong += dm_attachment_state(memory, text, sizeof(text)) != -ECHILD;
	wrong += dm_list_count(memory) != 0;
	wrong += dm_virt2memseg(memory, text, &memseg) != -ENOENT;
	wrong += dm_map_runs(memory, &run, 1, &version, &seq) != 0;
	dm_event_reader_cancel(reader);
	dm_event_reader_close(reader);
	wrong += dm_mem_event_callback_unregister(memory, "c", &last_seq) != 0;
	wrong += dm_detach(memory) != 0;
	return wrong;
}

static void try_fork(const char *path)
{
	struct dm_attach_options options = {.socket_path = path, .name = "child"};
	struct dm_event_reader *reader;
	char error[512];
	int status, err = dm_event_reader_open(memory, &reader);
	pid_t pid = err ? -1 : fork();

	if (pid == 0) {
		int wrong = calls_in_child(reader);

		if (!wrong && (dm_attach(&options, &memory, error, sizeof(error)) || !dm_malloc(memory, 64, 0)))
			wrong = 50;
		_exit(wrong ? wrong : dm_detach(memory));
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		status = -1;
	if (!err)
		dm_event_reader_close(reader);
	printf("ok %d\n", status);
}

/* ---- messages ---- */

/* Answers a request with its own bytes, and a descriptor with its own descriptor. */
static int on_message(struct dm_memory *m, struct dm_mp_msg *msg, const struct dm_mp_peer *peer, void *arg)
{
	if (arg != &n_wrong || peer->request_id == 0)
		return -EBADMSG;
	return msg->len_param != 0 ? dm_mp_reply(m, msg, peer) : -EXDEV;
}

static void on_answer(struct dm_memory *m, const struct dm_mp_msg *request, int status, const char *text,
		      struct dm_mp_replies *replies, void *arg)
{
	if (m != memory || request->len_param != 1 || status != 0 || *text != '\0' || replies->nb_received != 1)
		atomic_fetch_add(&n_wrong, 1);
	atomic_fetch_add((_Atomic unsigned int *)arg, 1);
}

/* What the other end of a pipe says, whose descriptor went to another process and came back. */
static void ask(const char *name, const char *text, const char *peer)
{
	struct dm_mp_target target = {.to = DM_MP_TO_NAME};
	struct dm_mp_msg msg = {.len_param = (int)strlen(text), .num_fds = 1};
	struct dm_mp_replies replies;
	char read_back[8] = "";
	int pipe_fds[2], err;

	snprintf(target.name, sizeof(target.name), "%s", peer);
	snprintf(msg.name, sizeof(msg.name), "%s", name);
	memcpy(msg.param, text, strlen(text));
	if (pipe(pipe_fds) || write(pipe_fds[1], "pipe", 4) != 4)
		exit(3);
	msg.fds[0] = pipe_fds[0];
	err = dm_mp_request_sync(memory, &target, &msg, 20000, &replies);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	if (err) {
		say(err);
	} else {
		const struct dm_mp_msg *reply = &replies.answers[0].msg;

		if (reply->num_fds == 1 && read(reply->fds[0], read_back, 4) != 4)
			read_back[0] = '?';
		printf("ok %u %u %.*s %s\n", replies.nb_sent, replies.nb_received, reply->len_param, (const char *)reply->param, read_back);
	}
	dm_mp_replies_free(&replies);
}

static void ask_later(const char *name, const char *peer)
{
	struct dm_mp_target target = {.to = DM_MP_TO_NAME};
	struct dm_mp_msg msg = {.len_param = 1};

	snprintf(target.name, sizeof(target.name), "%s", peer);
	snprintf(msg.name, sizeof(msg.name), "%s", name);
	say(dm_mp_request_async(memory, &target, &msg, 20000, on_answer, &n_alloc));
}

static int obey_messages(const char *command, char *first, char *second)
{
	char *third = strtok(NULL, " \n");

	if (!strcmp(command, "action"))
		say(dm_mp_action_register(memory, first, on_message, &n_wrong));
	else if (!strcmp(command, "no_action"))
		say(dm_mp_action_unregister(memory, first));
	else if (!strcmp(command, "ask"))
		ask(first, second, third);
	else if (!strcmp(command, "ask_later"))
		ask_later(first, second);
	else
		return 0;
	return 1;
}

static void obey(char *line, const char *path)
{
	char *command = strtok(line, " \n"), *first = strtok(NULL, " \n"), *second = strtok(NULL, " \n");
	void *block;

	if (!command)
		return;
	if (!strcmp(command, "malloc")) {
		block = dm_malloc(memory, strtoull(first, NULL, 10), 0);
		block ? (void)printf("ok %" PRIuPTR "\n", (uintptr_t)block) : (void)printf("error 0 %s\n", dm_error_text(memory));
	} else if (!strcmp(command, "fill")) {
		memset((void *)(uintptr_t)strtoull(first, NULL, 10), atoi(second), 3 << 20);
		say(0);
	} else if (!strcmp(command, "free")) {
		say(dm_free(memory, (void *)(uintptr_t)strtoull(first, NULL, 10)));
	} else if (!strcmp(command, "reserve")) {
		reserve(first, second);
	} else if (!strcmp(command, "lookup")) {
		look_up(first);
	} else if (!strcmp(command, "register")) {
		say(dm_mem_event_callback_register(memory, "c", on_event, &last_seq));
	} else if (!strcmp(command, "unregister")) {
		say(dm_mem_event_callback_unregister(memory, "c", &last_seq));
	} else if (!strcmp(command, "events")) {
		printf("ok %u %u %u %d %d\n", atomic_load(&n_alloc), atomic_load(&n_free), atomic_load(&n_wrong), made_inside != NULL,
		       detach_inside);
	} else if (!strcmp(command, "fork")) {
		try_fork(path);
	} else if (!obey_messages(command, first, second)) {
		printf("error 0 unknown\n");
	}
}

int main(int argc, char **argv)
{
	struct dm_attach_options options = {.socket_path = argc > 1 ? argv[1] : "", .name = "program in C"};
	char error[512], line[512];
	int err = dm_attach(&options, &memory, error, sizeof(error));

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (err) {
		printf("error %d %s\n", err, error);
		return 1;
	}
	printf("ok %s\n", dm_version());
	while (fgets(line, sizeof(line), stdin))
		obey(line, options.socket_path);
	return dm_detach(memory) ? 2 : 0;
}
