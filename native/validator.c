/* validator.c - allocation validators of a secondary: registered at the primary, which asks them before the map grows.
 *
 * Owns the validators of one attachment, the questions that wait for them, and the thread that calls them: the follower runs no code
 * of the program, so it only queues a question here; the thread calls and answers. Plug-ins, which the primary loads, are here too.
 *
 *   registering:  in the list -> VALIDATOR_REGISTER -> DONE; on failure out of the list again
 *   asked:        VALIDATE -> queue -> call, without the mutex -> VERDICT
 *   unregistered: VALIDATOR_UNREGISTER -> DONE (asked no more) -> out of the list, once a call that runs has returned
 *
 * Rules: the mutex is never held while a validator runs or the primary is waited for, so neither the follower nor a registration waits
 * for the program's code. A question for a validator that is gone is answered with yes. A queue that is full drops the question: the
 * primary's deadline decides, as for any other silence.
 * Who cleans up after a kill -9: the primary, which forgets the validators of a session with the session, and goes on without them.
 * Source: the semantics are rte_mem_alloc_validator_register's, with reasons added. */
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "follower.h"
#include "validator.h"

enum { MAX_QUESTIONS = 64 }; /* the primary asks a session less: docs/protocol.md */

struct validator {
	struct validator *next;
	char name[DM_VALIDATOR_NAME_BYTES];
	int32_t numa_node;
	dm_mem_alloc_validator function;
	void *arg;
};

struct dm_validators {
	struct dm_memory *m;
	pthread_mutex_t mutex;
	pthread_cond_t changed;     /* a question came, a call returned, stop */
	struct validator *first;
	struct validator *running;
	struct dm_wire_validate questions[MAX_QUESTIONS]; /* ring */
	uint32_t n_asked, n_taken;  /* both only rise */
	pthread_t thread;
	bool has_thread, stop;
};

/* ---- the list; all under the mutex ---- */

static struct validator **find(struct dm_validators *all, const char *name, int32_t numa_node)
{
	struct validator **at = &all->first;

	while (*at && ((*at)->numa_node != numa_node || strcmp((*at)->name, name)))
		at = &(*at)->next;
	return at;
}

/* Waits for a call of it that runs, except from inside it. */
static void drop(struct dm_validators *all, const char *name, int32_t numa_node)
{
	struct validator *v;

	pthread_mutex_lock(&all->mutex);
	while ((v = *find(all, name, numa_node)) && all->running == v && !pthread_equal(pthread_self(), all->thread))
		pthread_cond_wait(&all->changed, &all->mutex);
	if (v) {
		*find(all, name, numa_node) = v->next;
		if (all->running == v)
			all->running = NULL; /* from inside itself */
		free(v);
	}
	pthread_mutex_unlock(&all->mutex);
}

/* ---- the thread ---- */

static void answer(struct dm_follower *f, const struct dm_wire_validate *question, int verdict, const char *reason)
{
	struct dm_wire_verdict v = {
		.h = {.magic = DM_WIRE_MAGIC, .type = DM_WIRE_VERDICT, .bytes = sizeof(v), .request_id = question->h.request_id},
		.status = verdict < 0 ? EPERM : 0,
	};

	snprintf(v.reason, sizeof(v.reason), "%s", verdict < 0 ? reason : "");
	if (dm_app_fd_is_ours(f))
		dm_packet_try_send(f->app_fd, &v, sizeof(v)); /* a primary that does not read waits for no verdict either */
}

/* Mutex held on entry and exit, not during the call. */
static void ask_one(struct dm_validators *all, const struct dm_wire_validate *question)
{
	struct validator *v = *find(all, question->name, question->numa_node);
	char reason[DM_VALIDATOR_REASON_BYTES] = "";
	dm_mem_alloc_validator function = v ? v->function : NULL;
	void *arg = v ? v->arg : NULL;
	int verdict = 0;

	all->running = v;
	pthread_mutex_unlock(&all->mutex);
	if (function)
		verdict = function(question->numa_node, question->limit, question->new_len, reason, arg);
	reason[sizeof(reason) - 1] = 0;
	answer(all->m->follower, question, verdict, reason);
	pthread_mutex_lock(&all->mutex);
	all->running = NULL;
	pthread_cond_broadcast(&all->changed);
}

static void *validator_thread(void *arg)
{
	struct dm_validators *all = arg;

	pthread_mutex_lock(&all->mutex);
	while (!all->stop) {
		struct dm_wire_validate question;

		if (all->n_taken == all->n_asked) {
			pthread_cond_wait(&all->changed, &all->mutex);
			continue;
		}
		question = all->questions[all->n_taken++ % MAX_QUESTIONS];
		ask_one(all, &question);
	}
	pthread_mutex_unlock(&all->mutex);
	return NULL;
}

void dm_validators_ask(struct dm_memory *m, const struct dm_wire_validate *question)
{
	struct dm_validators *all = m->validators;

	pthread_mutex_lock(&all->mutex);
	if (all->n_asked - all->n_taken < MAX_QUESTIONS) {
		struct dm_wire_validate *slot = &all->questions[all->n_asked++ % MAX_QUESTIONS];

		*slot = *question;
		slot->name[sizeof(slot->name) - 1] = 0;
		pthread_cond_broadcast(&all->changed);
	}
	pthread_mutex_unlock(&all->mutex);
}

/* ---- registering ---- */

static int judge_name(struct dm_memory *m, const char *name, int32_t numa_node)
{
	if (!name || !*name)
		return dm_fail(m, -EINVAL, "an allocation validator needs a name");
	if (strlen(name) >= DM_VALIDATOR_NAME_BYTES)
		return dm_fail(m, -ENAMETOOLONG, "validator name \"%.80s\" is longer than %d bytes", name, DM_VALIDATOR_NAME_BYTES - 1);
	if (!dm_is_text(name))
		return dm_fail(m, -EINVAL, "the name of a validator is UTF-8 without control characters");
	if (numa_node < 0)
		return dm_fail(m, -EINVAL, "validator \"%s\": NUMA node %d: register it for each node", name, numa_node);
	if (!m->validators)
		return dm_fail(m, -ENOTSUP, "validator \"%s\": this process is the primary: register it in Python "
			       "(mem_alloc_validator_register), or give dpdkmem-primary --validator", name);
	return 0;
}

static int add(struct dm_validators *all, struct validator *v)
{
	struct validator **at;
	int err = 0;

	pthread_mutex_lock(&all->mutex);
	at = find(all, v->name, v->numa_node);
	if (*at)
		err = -EEXIST;
	else if (!all->has_thread)
		err = -pthread_create(&all->thread, NULL, validator_thread, all);
	all->has_thread |= !err;
	if (!err)
		*at = v;
	pthread_mutex_unlock(&all->mutex);
	return err;
}

static int tell(struct dm_memory *m, uint16_t type, const char *name, int32_t numa_node, uint64_t limit)
{
	struct dm_wire_validator w = {
		.h = {.magic = DM_WIRE_MAGIC, .type = type, .bytes = sizeof(w)}, .limit = limit, .numa_node = numa_node,
	};
	char text[DM_ERROR_BYTES] = "";
	int64_t none;
	int err;

	snprintf(w.name, sizeof(w.name), "%s", name);
	err = dm_follower_ask(m->follower, &w.h, NULL, &none, text);
	return err ? dm_fail(m, err, "validator \"%s\" of NUMA node %d: %s", name, numa_node, text[0] ? text : strerror(-err)) : 0;
}

int dm_mem_alloc_validator_register(struct dm_memory *m, const char *name, dm_mem_alloc_validator function, int32_t numa_node,
				    uint64_t limit, void *arg)
{
	struct validator *v;
	int err = dm_usable(m);

	if (!err)
		err = judge_name(m, name, numa_node);
	if (!err && !function)
		err = dm_fail(m, -EINVAL, "validator \"%s\" has no function", name);
	if (err)
		return err;
	v = calloc(1, sizeof(*v));
	if (!v)
		return dm_fail(m, -ENOMEM, "no memory for validator \"%s\"", name);
	snprintf(v->name, sizeof(v->name), "%s", name);
	v->numa_node = numa_node;
	v->function = function;
	v->arg = arg;
	err = add(m->validators, v);
	if (err) {
		free(v);
		return dm_fail(m, err, "cannot register validator \"%s\" of NUMA node %d: %s", name, numa_node, strerror(-err));
	}
	err = tell(m, DM_WIRE_VALIDATOR_REGISTER, name, numa_node, limit);
	if (err)
		drop(m->validators, name, numa_node);
	return err;
}

int dm_mem_alloc_validator_unregister(struct dm_memory *m, const char *name, int32_t numa_node)
{
	struct dm_validators *all = m->validators;
	bool known;
	int err = dm_usable(m);

	if (!err)
		err = judge_name(m, name, numa_node);
	if (err)
		return err;
	pthread_mutex_lock(&all->mutex);
	known = *find(all, name, numa_node) != NULL;
	pthread_mutex_unlock(&all->mutex);
	if (!known)
		return dm_fail(m, -ENOENT, "no validator \"%s\" of NUMA node %d is registered here", name, numa_node);
	err = tell(m, DM_WIRE_VALIDATOR_UNREGISTER, name, numa_node, 0);
	if (err && err != -EPIPE) /* with the primary its registrations are gone */
		return err;
	drop(all, name, numa_node);
	return 0;
}

/* ---- life ---- */

int dm_validators_create(struct dm_memory *m)
{
	m->validators = calloc(1, sizeof(*m->validators));
	if (!m->validators)
		return -ENOMEM;
	m->validators->m = m;
	pthread_mutex_init(&m->validators->mutex, NULL);
	pthread_cond_init(&m->validators->changed, NULL);
	return 0;
}

bool dm_validators_called_from(const struct dm_memory *m)
{
	const struct dm_validators *all = m->validators;

	return all && all->has_thread && atomic_load(&m->state) != -ECHILD && pthread_equal(pthread_self(), all->thread);
}

void dm_validators_destroy(struct dm_memory *m)
{
	struct dm_validators *all = m->validators;

	m->validators = NULL;
	if (!all || atomic_load(&m->state) == -ECHILD) /* of a forked child: the mutex may be held by nobody who lives here */
		return;
	pthread_mutex_lock(&all->mutex);
	all->stop = true;
	pthread_cond_broadcast(&all->changed);
	pthread_mutex_unlock(&all->mutex);
	if (all->has_thread)
		pthread_join(all->thread, NULL);
	while (all->first) {
		struct validator *v = all->first;

		all->first = v->next;
		free(v);
	}
	pthread_mutex_destroy(&all->mutex);
	pthread_cond_destroy(&all->changed);
	free(all);
}

/* ---- plug-ins of the primary ---- */

int dm_plugin_open(const char *path, const char *symbol, void **handle, uint64_t *address, char *error, size_t error_bytes)
{
	void *found;

	*handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!*handle) {
		snprintf(error, error_bytes, "%s", dlerror());
		return -ENOENT;
	}
	found = dlsym(*handle, symbol);
	if (!found) {
		snprintf(error, error_bytes, "%s has no symbol \"%s\"", path, symbol);
		dlclose(*handle);
		return -ENOENT;
	}
	*address = (uintptr_t)found;
	return 0;
}

int dm_plugin_validate(uint64_t address, const struct dm_validator_question *question, char *reason, void *arg)
{
	dm_mem_alloc_validator function = (dm_mem_alloc_validator)(uintptr_t)address;

	memset(reason, 0, DM_VALIDATOR_REASON_BYTES);
	return function(question->numa_node, question->limit, question->new_len, reason, arg);
}
