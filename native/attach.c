/* attach.c - dm_attach() and dm_detach(): a secondary's attachment from the outside.
 *
 * Owns: the list of this process's attachments, and what fork(2) does to them.
 * Rules: a child of fork() finds the window unmapped (MADV_DONTFORK), zeros in the control segment's place, its copies of
 * our descriptors closed, and every call answering -ECHILD or "not there"; the parent notices nothing. One attachment
 * per primary and process: two could not both have the window.
 * The list is the only global of the library: fork handlers get no argument (pthread_atfork(3)). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "cache.h"
#include "follower.h"
#include "ipc.h"
#include "validator.h"
#include "walks.h"
#include "mempool.h"
#include "port.h"

enum { DEFAULT_TIMEOUT_MS = 5000, MAX_ATTACHMENTS = 16 };

static struct {
	pthread_mutex_t mutex;
	pthread_once_t once;
	struct dm_memory *all[MAX_ATTACHMENTS];
} attachments = {.mutex = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

static void before_fork(void)
{
	pthread_mutex_lock(&attachments.mutex);
	for (int i = 0; i < MAX_ATTACHMENTS; i++)
		if (attachments.all[i])
			dm_readers_lock(attachments.all[i]), dm_ipc_lock(attachments.all[i]);
}

static void after_fork_in_parent(void)
{
	for (int i = 0; i < MAX_ATTACHMENTS; i++)
		if (attachments.all[i])
			dm_ipc_unlock(attachments.all[i]), dm_readers_unlock(attachments.all[i]);
	pthread_mutex_unlock(&attachments.mutex);
}

/* Lookups need no lock and ask no state: they find empty tables here, and nobody's memory. */
static void put_zeros_for_control(const struct dm_memory *m)
{
	mmap(m->ctl, m->ctl_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE,
	     -1, 0);
}

static void after_fork_in_child(void)
{
	for (int i = 0; i < MAX_ATTACHMENTS; i++) {
		struct dm_memory *m = attachments.all[i];

		if (!m)
			continue;
		dm_ipc_after_fork_in_child(m);
		dm_ipc_unlock(m);
		dm_readers_unlock(m);
		atomic_store(&m->state, -ECHILD);
		put_zeros_for_control(m);
		if (dm_app_fd_is_ours(m->follower))
			close(m->follower->app_fd); /* else the primary would not see the parent's end */
		m->follower->app_fd = -1;
		if (dm_app_handover_is_ours(m->follower))
			close(m->follower->app_handover_fd);
		m->follower->app_handover_fd = -1;
		attachments.all[i] = NULL;
	}
	pthread_mutex_unlock(&attachments.mutex);
}

static void install_fork_handlers(void)
{
	pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static int remember(struct dm_memory *m)
{
	int err = -EUSERS;

	pthread_once(&attachments.once, install_fork_handlers);
	pthread_mutex_lock(&attachments.mutex);
	for (int i = 0; i < MAX_ATTACHMENTS && err; i++)
		if (!attachments.all[i]) {
			attachments.all[i] = m;
			err = 0;
		}
	pthread_mutex_unlock(&attachments.mutex);
	return err;
}

static int attached_already(const char *path)
{
	int err = 0;

	pthread_mutex_lock(&attachments.mutex);
	for (int i = 0; i < MAX_ATTACHMENTS; i++)
		if (attachments.all[i] && !strcmp(attachments.all[i]->follower->socket_path, path))
			err = -EALREADY;
	pthread_mutex_unlock(&attachments.mutex);
	return err;
}

static void forget(const struct dm_memory *m)
{
	pthread_mutex_lock(&attachments.mutex);
	for (int i = 0; i < MAX_ATTACHMENTS; i++)
		if (attachments.all[i] == m)
			attachments.all[i] = NULL;
	pthread_mutex_unlock(&attachments.mutex);
}

static int fill_address(const char *path, struct sockaddr_un *address, socklen_t *bytes)
{
	size_t n = strlen(path);

	if (n == 0 || n >= sizeof(address->sun_path))
		return -ENAMETOOLONG;
	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	memcpy(address->sun_path, path, n);
	*bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + (path[0] != '@'));
	if (path[0] == '@')
		address->sun_path[0] = 0;
	return 0;
}

static int connect_to(const char *path, int *out, char *error, size_t error_bytes)
{
	struct sockaddr_un address;
	socklen_t bytes;
	int err = fill_address(path, &address, &bytes), fd;

	if (err) {
		snprintf(error, error_bytes, "session socket path \"%s\" is empty or longer than 107 bytes", path);
		return err;
	}
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		err = -errno;
		snprintf(error, error_bytes, "cannot make a socket: %s", strerror(-err));
		return err;
	}
	if (connect(fd, (struct sockaddr *)&address, bytes)) {
		err = -errno;
		snprintf(error, error_bytes, "no primary answers at %s: %s", path, strerror(-err));
		close(fd);
		return err;
	}
	*out = fd;
	return 0;
}

/* The last reference is gone: no thread's robust list runs through the control segment any more. */
static void release(struct dm_memory *m)
{
	pthread_key_delete(m->thread_key);
	if (m->ctl)
		dm_control_unmap(m->ctl, m->ctl_bytes);
	free(m);
}

/* What goes over the wire is printable UTF-8: other bytes become '?', and a character that was cut in two is dropped. */
static void set_name(struct dm_follower *f, const char *name)
{
	size_t n, cut;

	snprintf(f->name, sizeof(f->name), "%s", name && *name ? name : program_invocation_short_name);
	n = strlen(f->name);
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)f->name[i] < 0x20 || f->name[i] == 0x7f)
			f->name[i] = '?';
	if (n < sizeof(f->name) - 1)
		return;
	for (cut = n; cut > 0 && ((unsigned char)f->name[cut - 1] & 0xc0) == 0x80; cut--)
		;
	if (cut > 0 && (unsigned char)f->name[cut - 1] >= 0xc0)
		memset(f->name + cut - 1, 0, n - cut + 1);
}

static struct dm_memory *memory_new(const struct dm_attach_options *options)
{
	struct dm_memory *m = calloc(1, sizeof(*m));
	struct dm_follower *f = calloc(1, sizeof(*f));

	if (!m || !f || dm_threads_open(m))
		goto free_both;
	if (dm_seg_fds_create(m))
		goto delete_key;
	if (dm_readers_create(m))
		goto destroy_fds;
	if (dm_validators_create(m))
		goto destroy_readers;
	if (dm_ipc_create(m))
		goto destroy_validators;
	m->follower = f;
	m->grow = dm_follower_grow;
	m->external = dm_follower_external;
	m->ctx = f;
	m->release = release;
	atomic_store(&m->n_references, 1);
	f->m = m;
	f->flags = options->flags;
	f->timeout_ms = options->timeout_ms ? options->timeout_ms : DEFAULT_TIMEOUT_MS;
	f->map_address = options->map_address;
	f->app_fd = f->sock = f->control_fd = f->ack_fd = f->uffd = f->handover_fd = f->app_handover_fd = -1;
	for (int i = 0; i < DM_MAX_LISTS; i++)
		f->list_fds[i] = f->external[i].place.fd = -1;
	pthread_mutex_init(&f->start_mutex, NULL);
	pthread_cond_init(&f->start_cond, NULL);
	set_name(f, options->name);
	snprintf(f->socket_path, sizeof(f->socket_path), "%s", options->socket_path);
	return m;
destroy_validators:
	dm_validators_destroy(m);
destroy_readers:
	dm_readers_destroy(m);
destroy_fds:
	dm_seg_fds_destroy(m);
delete_key:
	pthread_key_delete(m->thread_key);
free_both:
	free(m);
	free(f);
	return NULL;
}

static void follower_free(struct dm_follower *f)
{
	if (dm_app_fd_is_ours(f))
		close(f->app_fd);
	if (dm_app_handover_is_ours(f))
		close(f->app_handover_fd);
	pthread_mutex_destroy(&f->start_mutex);
	pthread_cond_destroy(&f->start_cond);
	free(f);
}

static int make_handover(struct dm_follower *f)
{
	struct stat st;
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	f->app_handover_fd = pair[0];
	f->handover_fd = pair[1];
	if (!fstat(pair[0], &st))
		f->app_handover_inode = st.st_ino;
	return 0;
}

/* With a guard in hand before HELLO, the primary need not wait for READY where all memory is in one-file lists. */
static int connect_and_start(struct dm_memory *m, const char *path, char *error, size_t error_bytes)
{
	struct dm_follower *f = m->follower;
	struct stat st;
	int guard = -1, handover_fd, err;

	if (!(f->flags & DM_ATTACH_NO_GUARD))
		dm_guard_open(-1, &guard);
	err = connect_to(path, &f->app_fd, error, error_bytes);
	if (err) {
		if (guard >= 0)
			close(guard);
		return err;
	}
	if (!fstat(f->app_fd, &st))
		f->app_inode = st.st_ino;
	err = make_handover(f);
	if (err) {
		if (guard >= 0)
			close(guard);
		snprintf(error, error_bytes, "cannot make a pair of sockets: %s", strerror(-err));
		return err;
	}
	handover_fd = f->handover_fd;
	f->uffd = guard;
	err = dm_follower_start(f);
	if (f->own_table) { /* the follower has copies; else these are its only ones */
		close(handover_fd);
		if (guard >= 0)
			close(guard);
	}
	if (err)
		snprintf(error, error_bytes, "%s", f->error);
	return err;
}

int dm_attach(const struct dm_attach_options *options, struct dm_memory **out, char *error, size_t error_bytes)
{
	struct dm_memory *m;
	int err;

	if (!options || !options->socket_path) {
		snprintf(error, error_bytes, "dm_attach() needs the path of a session socket");
		return -EINVAL;
	}
	m = memory_new(options);
	if (!m) {
		snprintf(error, error_bytes, "no memory, or no thread key (PTHREAD_KEYS_MAX), is left for an attachment");
		return -ENOMEM;
	}
	err = attached_already(options->socket_path);
	if (err)
		snprintf(error, error_bytes, "this process is attached to %s already", options->socket_path);
	else
		err = connect_and_start(m, options->socket_path, error, error_bytes);
	if (err)
		goto drop;
	err = remember(m);
	if (err) {
		snprintf(error, error_bytes, "this process has %d attachments already", MAX_ATTACHMENTS);
		dm_detach(m);
		return err;
	}
	*out = m;
	return 0;
drop:
	dm_validators_destroy(m);
	dm_ipc_destroy(m);
	dm_readers_destroy(m);
	dm_seg_fds_destroy(m);
	follower_free(m->follower);
	m->follower = NULL;
	dm_memory_put(m);
	return err;
}

/* The primary answers the goodbye, and the follower ends with that: the socket stays whole until then, else a message that
 * is on its way here would fail, and the primary would take us for dead. A follower that hears nothing stops by itself. */
static void stop_follower(struct dm_follower *f)
{
	bool has_fd = dm_app_fd_is_ours(f);

	atomic_store(&f->says_bye, !has_fd);
	atomic_store(&f->stop, true);
	if (has_fd)
		dm_say_goodbye(f->app_fd);
	pthread_join(f->thread, NULL);
}

int dm_detach(struct dm_memory *m)
{
	struct dm_follower *f;

	if (!m)
		return 0;
	f = m->follower;
	if (dm_readers_called_from(m) || dm_map_read_is_held(m) || dm_validators_called_from(m) || dm_ipc_called_from(m))
		return -EDEADLK;
	forget(m);
	dm_ports_close(m); /* first: the primary is asked */
	dm_ipc_stop(m); /* then: a memory event callback may wait for an answer */
	dm_readers_stop(m);
	if (atomic_load(&m->state) == -ECHILD) { /* nothing of it is mapped here, and no thread came along */
		dm_validators_destroy(m);
		dm_ipc_destroy(m);
		dm_readers_destroy(m);
		dm_seg_fds_destroy(m);
		follower_free(f);
		return 0; /* m itself stays: the parent's threads' parts point to it, and memory of a child is short-lived */
	}
	atomic_store(&m->state, -ESHUTDOWN);
	dm_caches_quiesce(m); /* before the primary hears of it, and reaps */
	dm_thread_leave(m);
	stop_follower(f); /* it asks the readers before it unmaps, and queues questions for validators: they end after it */
	dm_ipc_destroy(m);
	dm_validators_destroy(m);
	dm_readers_destroy(m);
	dm_seg_fds_destroy(m);
	dm_mempool_events_close(m);
	follower_free(f);
	m->follower = NULL;
	dm_memory_put(m);
	return 0;
}

int dm_attachment_state(struct dm_memory *m, char *text, size_t text_bytes)
{
	int state = atomic_load(&m->state);

	snprintf(text, text_bytes, "%s", state == 0 ? "attached" : state == -ECHILD ? "forked child of an attached process" :
		 m->follower && m->follower->error[0] ? m->follower->error : strerror(-state));
	return state;
}

uint32_t dm_owner_id(const struct dm_memory *m)
{
	return m->owner_id;
}
