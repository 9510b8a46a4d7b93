/* xdp_kernel.c - AF_XDP as the kernel offers it: sockets, umem, map, program and link. The primary's, but for the mapping of rings.
 *
 * Owns the system calls: socket(2), setsockopt(2), bind(2) and bpf(2), by the uapi headers alone. libbpf and libxdp would bring ELF and BTF
 * loaders for one program of some ten to fifty instructions (shared/xdp_program.py), and a dispatcher program of libxdp's own that
 * stays pinned in bpffs; a link of bpf(2) ends with its descriptor, whatever happened to its holder.
 *
 * When has the kernel let go of a queue's buffers? Not when close(2) returns: the umem goes from a work queue, a driver in zero copy stops in
 * it, and packets that are on their way keep the socket. But (net/xdp/xsk_buff_pool.c, xp_clear_dev) only after all that is the pool taken
 * off the device's queue, and until then nobody else can bind there: EBUSY. So a bind of a small umem of our own, which is closed at
 * once, proves it (dm_xdp_queue_probe). A descriptor or a mapping of a ring in a worker keeps the socket as well.
 * After a kill -9 all of it ends with the last descriptor: nothing is pinned. */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/membarrier.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "futex.h"
#include "xdp.h"

#ifndef SO_PREFER_BUSY_POLL /* Linux 5.11 */
#define SO_PREFER_BUSY_POLL 69
#define SO_BUSY_POLL_BUDGET 70
#endif

enum { TEXT = 512, PROBE_BYTES = 4096, PROBE_RING = 8, LOOK_AGAIN_NS = 1000000, TX_BUDGET = 256, LOG_BYTES = 16384, SEND_BUFFER = 8 << 20,
	XDP_HAS_FRAGS = 1 << 5 /* BPF_F_XDP_HAS_FRAGS, Linux 5.18 */ };

/* -errno with the words. */
static int __attribute__((format(printf, 2, 3))) failed(char *text, const char *format, ...)
{
	const int err = errno;
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(text, TEXT, format, args);
	va_end(args);
	if (n > 0 && n < TEXT)
		snprintf(text + n, (size_t)(TEXT - n), ": %s", strerror(err));
	return -err;
}

/* ---- the interface ---- */

static uint32_t n_rx_queues(int sock, struct ifreq *r)
{
	struct ethtool_channels channels = { .cmd = ETHTOOL_GCHANNELS };

	r->ifr_data = (void *)&channels;
	if (ioctl(sock, SIOCETHTOOL, r) != 0)
		return 1; /* a driver that does not tell has one */
	return channels.rx_count + channels.combined_count > 0 ? channels.rx_count + channels.combined_count : 1;
}

static uint32_t mbps_of(int sock, struct ifreq *r)
{
	struct ethtool_cmd cmd = { .cmd = ETHTOOL_GSET };
	uint32_t mbps;

	r->ifr_data = (void *)&cmd;
	if (ioctl(sock, SIOCETHTOOL, r) != 0)
		return 0;
	mbps = ethtool_cmd_speed(&cmd);
	return mbps == (uint32_t)SPEED_UNKNOWN ? 0 : mbps;
}

int dm_xdp_interface_get(const char *name, struct dm_xdp_interface *out, char *text)
{
	const int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq r = { 0 };
	int err = 0;

	if (sock < 0)
		return failed(text, "interface %s", name);
	*out = (struct dm_xdp_interface){ 0 };
	snprintf(r.ifr_name, sizeof(r.ifr_name), "%s", name);
	if (strlen(name) >= sizeof(r.ifr_name)) {
		errno = ENODEV;
		err = failed(text, "interface %s", name);
	} else if (ioctl(sock, SIOCGIFINDEX, &r) != 0) {
		err = failed(text, "interface %s", name);
	} else {
		out->ifindex = (uint32_t)r.ifr_ifindex;
		if (ioctl(sock, SIOCGIFMTU, &r) == 0)
			out->mtu = (uint32_t)r.ifr_mtu;
		if (ioctl(sock, SIOCGIFFLAGS, &r) == 0)
			out->is_up = (r.ifr_flags & IFF_UP) != 0 && (r.ifr_flags & IFF_RUNNING) != 0;
		if (ioctl(sock, SIOCGIFHWADDR, &r) == 0)
			memcpy(out->mac, r.ifr_hwaddr.sa_data, sizeof(out->mac));
		out->n_queues = n_rx_queues(sock, &r);
		out->mbps = mbps_of(sock, &r);
	}
	close(sock);
	return err;
}

/* ---- map, program, link ---- */

static int bpf(int cmd, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, cmd, attr, sizeof(*attr));
}

static uint64_t pointer(const void *p)
{
	return (uint64_t)(uintptr_t)p;
}

int dm_xdp_map_create(uint32_t n, int *fd, char *text)
{
	union bpf_attr attr = { .map_type = BPF_MAP_TYPE_XSKMAP, .key_size = 4, .value_size = 4, .max_entries = n };

	snprintf(attr.map_name, sizeof(attr.map_name), "dpdkmem_xsks");
	*fd = bpf(BPF_MAP_CREATE, &attr);
	return *fd < 0 ? failed(text, "an XSKMAP of %u sockets (bpf(2) needs CAP_BPF and CAP_NET_ADMIN)", n) : 0;
}

int dm_xdp_map_set(int map_fd, uint32_t queue_id, int socket_fd, char *text)
{
	union bpf_attr attr = { .map_fd = (uint32_t)map_fd, .key = pointer(&queue_id), .value = pointer(&socket_fd) };

	return bpf(BPF_MAP_UPDATE_ELEM, &attr) < 0 ? failed(text, "queue %u into the XSKMAP", queue_id) : 0;
}

static void map_clear(int map_fd, uint32_t queue_id)
{
	union bpf_attr attr = { .map_fd = (uint32_t)map_fd, .key = pointer(&queue_id) };

	bpf(BPF_MAP_DELETE_ELEM, &attr); /* ENOENT: it is out already */
}

int dm_xdp_program_load(const uint8_t *instructions, uint32_t n, uint32_t scatter, int *fd, char *text)
{
	char log[LOG_BYTES] = "";
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_XDP, .insn_cnt = n, .insns = pointer(instructions), .license = pointer("BSD"),
		.log_buf = pointer(log), .log_size = sizeof(log), .log_level = 1, .prog_flags = scatter ? XDP_HAS_FRAGS : 0,
	};

	snprintf(attr.prog_name, sizeof(attr.prog_name), "dpdkmem_xdp");
	*fd = bpf(BPF_PROG_LOAD, &attr);
	return *fd < 0 ? failed(text, "the XDP program of %u instructions (%.300s)", n, log) : 0;
}

int dm_xdp_link(int program_fd, uint32_t ifindex, uint32_t how, int *fd, uint32_t *is_native, char *text)
{
	union bpf_attr attr = { .link_create = { .prog_fd = (uint32_t)program_fd, .target_ifindex = ifindex, .attach_type = BPF_XDP } };

	*is_native = how != DM_XDP_ATTACH_GENERIC;
	attr.link_create.flags = *is_native ? XDP_FLAGS_DRV_MODE : XDP_FLAGS_SKB_MODE;
	*fd = bpf(BPF_LINK_CREATE, &attr);
	if (*fd < 0 && errno == EOPNOTSUPP && how == DM_XDP_ATTACH_AUTO) {
		*is_native = 0;
		attr.link_create.flags = XDP_FLAGS_SKB_MODE;
		*fd = bpf(BPF_LINK_CREATE, &attr);
	}
	if (*fd >= 0)
		return 0;
	if (errno == EBUSY || errno == EEXIST) {
		errno = EBUSY;
		return failed(text, "the interface has an XDP program already: whoever put it there must take it off first (`ip link show` names it, "
			      "`bpftool net` shows it)");
	}
	return failed(text, "an XDP program on the interface, %s mode", *is_native ? "native" : "generic");
}

/* ---- rings ---- */

static const int ring_option[] = { XDP_RX_RING, XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING };
static const off_t ring_page[] = { XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_FILL_RING, XDP_UMEM_PGOFF_COMPLETION_RING };

int dm_xdp_ring_map(int fd, int which, uint32_t size, struct dm_xdp_ring *out)
{
	const size_t entry = which == DM_XDP_RX || which == DM_XDP_TX ? sizeof(struct xdp_desc) : sizeof(uint64_t);
	const bool is_producer = which == DM_XDP_TX || which == DM_XDP_FILL;
	struct xdp_mmap_offsets all;
	socklen_t len = sizeof(all);
	const struct xdp_ring_offset *o;
	char *map;

	if (getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &all, &len) != 0)
		return -errno;
	if (len != sizeof(all))
		return -EPROTO; /* before Linux 5.4 */
	o = which == DM_XDP_RX ? &all.rx : which == DM_XDP_TX ? &all.tx : which == DM_XDP_FILL ? &all.fr : &all.cr;
	*out = (struct dm_xdp_ring){ .size = size, .mask = size - 1, .map_bytes = o->desc + size * entry };
	map = mmap(NULL, out->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, ring_page[which]);
	if (map == MAP_FAILED)
		return -errno;
	out->map = map;
	out->producer = (uint32_t *)(void *)(map + o->producer);
	out->consumer = (uint32_t *)(void *)(map + o->consumer);
	out->flags = (uint32_t *)(void *)(map + o->flags);
	out->entries = map + o->desc;
	out->at = dm_xdp_ring_load(is_producer ? out->producer : out->consumer);
	out->other = dm_xdp_ring_load(is_producer ? out->consumer : out->producer);
	return 0;
}

void dm_xdp_ring_unmap(struct dm_xdp_ring *r)
{
	if (r->map != NULL)
		munmap(r->map, r->map_bytes);
	*r = (struct dm_xdp_ring){ 0 };
}

/* ---- sockets ---- */

static int set_rings(int fd, const struct dm_xdp_socket_spec *spec, char *text)
{
	const uint32_t sizes[] = { spec->n_rx, spec->n_tx, spec->n_fill, spec->n_completion };

	for (int i = 0; i < 4; i++)
		if (sizes[i] != 0 && setsockopt(fd, SOL_XDP, ring_option[i], &sizes[i], sizeof(sizes[i])) != 0)
			return failed(text, "an AF_XDP ring of %u entries", sizes[i]);
	return 0;
}

static int register_umem(int fd, const struct dm_xdp_socket_spec *spec, char *text)
{
	const struct {
		uint64_t addr, len;
		uint32_t chunk_size, headroom, flags, reserved; /* Linux 6.8: tx_metadata_len */
	} reg = {
		.addr = spec->umem.vaddr, .len = spec->umem.bytes, .chunk_size = spec->umem.chunk_bytes, .headroom = spec->umem.headroom,
		.flags = spec->umem.is_unaligned ? XDP_UMEM_UNALIGNED_CHUNK_FLAG : 0,
	};

	if (setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &reg, sizeof(reg)) == 0)
		return 0;
	return failed(text, "a umem of %llu bytes at 0x%llx, chunks of %u, headroom %u (without CAP_IPC_LOCK RLIMIT_MEMLOCK counts)",
		      (unsigned long long)reg.len, (unsigned long long)reg.addr, reg.chunk_size, reg.headroom);
}

/* Options that make things faster: a kernel that has them not does without. */
static void tune(int fd, const struct dm_xdp_socket_spec *spec)
{
	const int yes = 1, budget = TX_BUDGET, send_bytes = SEND_BUFFER, poll_us = (int)spec->busy_poll_us, poll_budget = (int)spec->busy_budget;

	(void)setsockopt(fd, SOL_XDP, DM_XDP_MAX_TX_BUDGET, &budget, sizeof(budget));
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &send_bytes, sizeof(send_bytes));
	if (spec->busy_poll_us == 0)
		return;
	(void)setsockopt(fd, SOL_SOCKET, SO_PREFER_BUSY_POLL, &yes, sizeof(yes));
	(void)setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL, &poll_us, sizeof(poll_us));
	(void)setsockopt(fd, SOL_SOCKET, SO_BUSY_POLL_BUDGET, &poll_budget, sizeof(poll_budget));
}

static uint16_t bind_flags(const struct dm_xdp_socket_spec *spec)
{
	uint32_t flags = 0;

	if (spec->shared_fd >= 0)
		return XDP_SHARED_UMEM; /* the rest is as with the first */
	flags |= spec->mode == DM_XDP_MODE_COPY || !spec->umem.zerocopy_ok ? XDP_COPY : 0;
	flags |= spec->mode == DM_XDP_MODE_ZEROCOPY ? XDP_ZEROCOPY : 0;
	flags |= spec->need_wakeup ? XDP_USE_NEED_WAKEUP : 0;
	flags |= spec->scatter ? DM_XDP_USE_SG : 0;
	return (uint16_t)flags;
}

static int bind_queue(int fd, const struct dm_xdp_socket_spec *spec, char *text)
{
	const struct sockaddr_xdp addr = {
		.sxdp_family = AF_XDP, .sxdp_flags = bind_flags(spec), .sxdp_ifindex = spec->ifindex, .sxdp_queue_id = spec->queue_id,
		.sxdp_shared_umem_fd = spec->shared_fd >= 0 ? (uint32_t)spec->shared_fd : 0,
	};

	if (bind(fd, (const struct sockaddr *)&addr, sizeof(addr)) == 0)
		return 0;
	return failed(text, "AF_XDP on queue %u of interface %u, flags 0x%x", spec->queue_id, spec->ifindex, addr.sxdp_flags);
}

static int open_once(const struct dm_xdp_socket_spec *spec, int *fd, uint32_t *is_zerocopy, char *text)
{
	struct xdp_options options = { 0 };
	socklen_t len = sizeof(options);
	int err;

	*fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (*fd < 0)
		return failed(text, "an AF_XDP socket (it needs CAP_NET_RAW)");
	err = spec->shared_fd < 0 ? register_umem(*fd, spec, text) : 0;
	if (err == 0)
		err = set_rings(*fd, spec, text);
	if (err == 0)
		err = bind_queue(*fd, spec, text);
	if (err != 0) {
		close(*fd);
		*fd = -1;
		return err;
	}
	tune(*fd, spec);
	if (getsockopt(*fd, SOL_XDP, XDP_OPTIONS, &options, &len) == 0)
		*is_zerocopy = (options.flags & XDP_OPTIONS_ZEROCOPY) != 0;
	return 0;
}

int dm_xdp_socket_open(const struct dm_xdp_socket_spec *spec, int *fd, uint32_t *is_zerocopy, char *text)
{
	const int64_t until = dm_now_ns(CLOCK_MONOTONIC) + (int64_t)spec->wait_ms * 1000000;
	const struct timespec pause = { .tv_nsec = LOOK_AGAIN_NS };
	int err;

	if (spec->mode == DM_XDP_MODE_ZEROCOPY && !spec->umem.zerocopy_ok)
		return snprintf(text, TEXT, "zero copy needs a pool in huge pages, or one whose objects are 2048 or 4096 bytes at page boundaries"), -ENOTSUP;
	while ((err = open_once(spec, fd, is_zerocopy, text)) == -EBUSY && dm_now_ns(CLOCK_MONOTONIC) < until)
		nanosleep(&pause, NULL);
	return err;
}

int dm_xdp_socket_missed(int fd, uint32_t n_rx, uint64_t *dropped, uint64_t *unread)
{
	struct xdp_statistics s = { 0 };
	socklen_t len = sizeof(s);
	struct dm_xdp_ring rx;
	int err;

	if (getsockopt(fd, SOL_XDP, XDP_STATISTICS, &s, &len) != 0)
		return -errno;
	*dropped = s.rx_dropped + s.rx_ring_full; /* an empty fill ring counts as dropped too, so rx_fill_ring_empty_descs is in it */
	err = dm_xdp_ring_map(fd, DM_XDP_RX, n_rx, &rx);
	if (err != 0)
		return err;
	*unread = rx.other - rx.at;
	dm_xdp_ring_unmap(&rx);
	return 0;
}

int dm_xdp_queue_probe(uint32_t ifindex, uint32_t queue_id)
{
	struct dm_xdp_socket_spec spec = {
		.umem = { .bytes = PROBE_BYTES, .chunk_bytes = PROBE_BYTES }, .ifindex = ifindex, .queue_id = queue_id,
		.n_rx = PROBE_RING, .n_fill = PROBE_RING, .n_completion = PROBE_RING, .mode = DM_XDP_MODE_COPY, .shared_fd = -1,
	};
	void *page = mmap(NULL, PROBE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char text[TEXT];
	uint32_t is_zerocopy;
	int fd, err;

	if (page == MAP_FAILED)
		return -errno;
	spec.umem.vaddr = (uint64_t)(uintptr_t)page;
	err = dm_xdp_socket_open(&spec, &fd, &is_zerocopy, text);
	if (err == 0)
		close(fd);
	munmap(page, PROBE_BYTES);
	return err == -ENODEV || err == -ENETDOWN ? 0 : err; /* an interface that went has taken its queues along */
}

/* All packets that the program has redirected before are in their socket: the receive path runs in RCU read sections, for whose end this
 * command waits (synchronize_rcu). */
static void wait_for_receivers(void)
{
	(void)syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
}

int dm_xdp_socket_retire(int map_fd, uint32_t queue_id, int fd, uint32_t ifindex, uint32_t n_rx, uint32_t timeout_ms, uint64_t *missed)
{
	const int64_t until = dm_now_ns(CLOCK_MONOTONIC) + (int64_t)timeout_ms * 1000000;
	const struct timespec pause = { .tv_nsec = LOOK_AGAIN_NS };
	uint64_t dropped = 0, unread = 0;
	int err;

	map_clear(map_fd, queue_id);
	wait_for_receivers();
	(void)dm_xdp_socket_missed(fd, n_rx, &dropped, &unread); /* an interface that went has no figures any more */
	*missed = dropped + unread;
	close(fd);
	while ((err = dm_xdp_queue_probe(ifindex, queue_id)) == -EBUSY && dm_now_ns(CLOCK_MONOTONIC) < until)
		nanosleep(&pause, NULL);
	return err == -EBUSY ? -ETIMEDOUT : err;
}
