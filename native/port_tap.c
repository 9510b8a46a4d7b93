/* port_tap.c - an interface that the kernel has at its end of a wire: "tap:iface=tap0,queues=2", a TAP device (Documentation/networking/tuntap.rst).
 *
 * Owns the interface. Who opens the port when there is none makes it, and has a descriptor of it that takes part in no traffic (a detached queue).
 * Each queue that runs is a descriptor of its own (IFF_MULTI_QUEUE); the kernel spreads flows over those that are there. The interface
 * lives as long as one of these descriptors, so it goes with the last process, also after kill -9; a queue that starts without it makes it anew.
 * Joiners have no descriptor but for their queues: one that is attached and detached again would lose what the kernel put there meanwhile.
 * Every packet is a readv(2) or writev(2): the interface has no other way. Packets are copied; nothing is posted.
 * Keys: iface; queues; mtu (68 to 65521); up=0 leaves it down; offload=1 takes packets whose checksum is not filled in and TCP packets
 * of up to 64 KiB (TUN_F_), which DM_MBUF_ flags then say. What is sent may be such a packet always: the kernel takes them.
 * Needs CAP_NET_ADMIN in the network namespace of the process.
 * Accounts: rx_missed is what the kernel dropped for want of room (queue 0 has it for all queues; read at most TICK_MS apart and at the stop) and what
 * waited at the stop. rx_no_mbuf counts bursts that left packets waiting. rx_errors are packets longer than the interface's MTU at the
 * start allowed; tx_errors those that the kernel refuses. */
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "futex.h"
#include "port_copy.h"

enum { LEAST_MTU = 68, MOST_MTU = 65535 - ETH_HLEN, VLAN_BYTES = 4, MOST_BYTES = 65535 + ETH_HLEN + VLAN_BYTES, SPILL_BYTES = 65536, TICK_MS = 100 };
enum { MOST_SPARE = 64, MOST_WAITING = 65536 /* bound on what is read at the stop: more than a queue of the kernel's holds */ };
static const unsigned int offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;

struct tap_port {
	struct dm_port port;
	int fd;                     /* keeps the interface; -1: somebody else does */
};

struct tap_queue {
	struct dm_queue q;
	int fd;
	uint32_t room, n_want;      /* of a buffer; buffers that the longest packet takes */
	uint32_t n_spare;
	int64_t tick_ns;
	char *spill;                /* SPILL_BYTES: what no packet should have */
	struct dm_mbuf *spare[MOST_SPARE]; /* for the next packet */
};

static const char *iface_of(const struct dm_port_keys *keys)
{
	return dm_port_key(keys, "iface");
}

static bool is_on(const struct dm_port_keys *keys, const char *key, bool or_else)
{
	const char *value = dm_port_key(keys, key);

	return value == NULL ? or_else : *value == '1';
}

static int plan(struct dm_memory *m, const struct dm_port_keys *keys, struct dm_port_record *like, uint64_t *extra_bytes)
{
	const char *iface = iface_of(keys);
	uint32_t value;
	int err;

	(void)extra_bytes;
	if (iface == NULL)
		return dm_fail(m, -EINVAL, "tap port: the name of its interface belongs there, as in \"tap:tap0\"");
	if (strlen(iface) >= IFNAMSIZ || strchr(iface, '/') != NULL || strchr(iface, '%') != NULL)
		return dm_fail(m, -EINVAL, "tap port: iface=%s: at most %d bytes, without '/' and '%%'", iface, IFNAMSIZ - 1);
	err = dm_port_key_u32(m, keys, "mtu", LEAST_MTU, MOST_MTU, 1500, &value);
	like->mtu = (uint16_t)value;
	if (err == 0)
		err = dm_port_key_u32(m, keys, "up", 0, 1, 1, &value);
	if (err == 0)
		err = dm_port_key_u32(m, keys, "offload", 0, 1, 0, &value);
	like->features = value != 0 ? offloads : 0;
	return err;
}

/* ---- the interface ---- */

static int fail_errno(const struct dm_port *port, const char *what)
{
	const int err = -errno;
	const char *cure = err == -EPERM || err == -EACCES ? ": CAP_NET_ADMIN is needed"
			   : err == -EBUSY		   ? ": an interface of that name exists and is no TAP device with several queues"
			   : err == -ENOENT		   ? ": /dev/net/tun is missing: `modprobe tun`"
							   : "";

	return dm_fail(port->m, err, "tap port \"%s\": %s: %s%s", iface_of(&port->keys), what, strerror(-err), cure);
}

/* A queue of the interface, which is made if it is not there. */
static int open_tun(struct dm_port *port, bool is_detached, int *out)
{
	const int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE };
	int err = 0;

	if (fd < 0)
		return fail_errno(port, "/dev/net/tun");
	memcpy(r.ifr_name, iface_of(&port->keys), strlen(iface_of(&port->keys)));
	if (ioctl(fd, TUNSETIFF, &r) != 0)
		err = fail_errno(port, "TUNSETIFF");
	else if (is_detached) {
		r = (struct ifreq){ .ifr_flags = IFF_DETACH_QUEUE };
		if (ioctl(fd, TUNSETQUEUE, &r) != 0)
			err = fail_errno(port, "TUNSETQUEUE");
	} else if (ioctl(fd, TUNSETOFFLOAD, is_on(&port->keys, "offload", false) ? offloads : 0) != 0) {
		err = fail_errno(port, "TUNSETOFFLOAD");
	}
	if (err != 0)
		close(fd);
	*out = fd;
	return err;
}

static int request(int fd, unsigned long what, const struct dm_port *port, struct ifreq *r)
{
	memset(r->ifr_name, 0, sizeof(r->ifr_name));
	memcpy(r->ifr_name, iface_of(&port->keys), strlen(iface_of(&port->keys)));
	return ioctl(fd, what, r);
}

static int set_up(struct dm_port *port, int fd)
{
	struct ifreq r = { .ifr_mtu = port->record->mtu };

	if (request(fd, SIOCSIFMTU, port, &r) != 0)
		return fail_errno(port, "mtu=");
	if (!is_on(&port->keys, "up", true))
		return 0;
	r.ifr_flags = 0;
	if (request(fd, SIOCGIFFLAGS, port, &r) != 0 || (r.ifr_flags |= IFF_UP, request(fd, SIOCSIFFLAGS, port, &r)) != 0)
		return fail_errno(port, "bringing it up");
	return 0;
}

/* A descriptor of the interface; if it was not there it is made as the keys say. -EEXIST: is_keeper, and it is there. */
static int open_or_make(struct dm_port *port, bool is_keeper, int *out)
{
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq r = { 0 };
	bool was_there;
	int err;

	if (fd < 0)
		return fail_errno(port, "socket");
	was_there = request(fd, SIOCGIFFLAGS, port, &r) == 0;
	err = is_keeper && was_there ? -EEXIST : open_tun(port, is_keeper, out);
	if (err == 0 && !was_there) {
		err = set_up(port, fd);
		if (err != 0)
			close(*out);
	}
	close(fd);
	return err;
}

/* The port's own end: local, and the same each time. FNV-1a of its name. */
static void choose_mac(struct dm_port_record *r)
{
	uint32_t h = UINT32_C(0x811c9dc5);

	for (const char *s = r->name; *s; s++)
		h = (h ^ (uint8_t)*s) * UINT32_C(0x01000193);
	memcpy(r->mac, (const uint8_t[]){ 2, 1, (uint8_t)(h >> 24), (uint8_t)(h >> 16), (uint8_t)(h >> 8), (uint8_t)h }, 6);
}

static int open_tap(struct dm_port *port)
{
	struct tap_port *tp = (struct tap_port *)port;
	int err = open_or_make(port, true, &tp->fd);

	if (err == -EEXIST && port->is_maker)
		return dm_fail(port->m, -EEXIST, "tap port: there is an interface \"%s\" already: another name= or iface= belongs there, or "
			       "`ip link del` it", iface_of(&port->keys));
	if (err == -EEXIST)
		tp->fd = -1;
	else if (err != 0)
		return err;
	if (port->is_maker)
		choose_mac(port->record);
	return 0;
}

static void close_tap(struct dm_port *port)
{
	const int fd = ((struct tap_port *)port)->fd;

	if (fd >= 0)
		close(fd);
}

/* ---- receiving ---- */

/* rx_dropped and tx_dropped are seen from the kernel's side: what it could not give us is its tx_dropped. */
static uint64_t read_dropped(const struct dm_port *port)
{
	char path[64 + IFNAMSIZ], text[32] = "";
	int fd;

	snprintf(path, sizeof(path), "/sys/class/net/%s/statistics/tx_dropped", iface_of(&port->keys));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof(text) - 1) < 0)
		text[0] = '\0';
	close(fd);
	return strtoull(text, NULL, 10);
}

/* opaque: what was counted so far; it goes on after a death. The interface may have been made anew meanwhile. */
static void count_dropped(struct tap_queue *tq)
{
	struct dm_queue_record *r = tq->q.record;
	const uint64_t now = read_dropped(tq->q.port);

	if (tq->q.queue_idx != 0)
		return;
	dm_stat_add(&r->rx_missed, now >= r->opaque ? now - r->opaque : now);
	r->opaque = now;
}

static void tick(struct tap_queue *tq)
{
	const int64_t now = dm_now_ns(CLOCK_MONOTONIC_COARSE);

	if (tq->q.queue_idx != 0 || now - tq->tick_ns < TICK_MS * INT64_C(1000000))
		return;
	tq->tick_ns = now;
	count_dropped(tq);
}

static bool fill_spare(struct tap_queue *tq)
{
	const uint32_t want = tq->n_want - tq->n_spare;

	if (want > 0 && dm_mempool_get_bulk(tq->q.pool, tq->q.self, (void **)(tq->spare + tq->n_spare), want) != 0)
		return false;
	tq->n_spare = tq->n_want;
	return true;
}

/* The first buffers of spare[] have it: they become a packet. */
static struct dm_mbuf *make_packet(struct tap_queue *tq, const struct virtio_net_hdr *vnet, uint32_t bytes)
{
	const uint64_t rearm = dm_pktmbuf_rearm(tq->q.port_id);
	struct dm_mbuf *head = tq->spare[0];
	const uint32_t n = (bytes + tq->room - 1) / tq->room;

	for (uint32_t i = 0, left = bytes; i < n; i++) {
		struct dm_mbuf *s = tq->spare[i];

		dm_pktmbuf_set_rearm(s, rearm);
		s->ol_flags = 0;
		s->data_len = (uint16_t)(left < tq->room ? left : tq->room);
		s->pkt_len = s->data_len;
		s->next = i + 1 < n ? tq->spare[i + 1] : NULL;
		left -= s->data_len;
	}
	head->pkt_len = bytes;
	head->nb_segs = (uint16_t)n;
	dm_vnet_to_mbuf(vnet, head);
	tq->n_spare -= n;
	memmove(tq->spare, tq->spare + n, tq->n_spare * sizeof(tq->spare[0]));
	return head;
}

/* 1: *out is a packet; 0: one was dropped and counted; -EAGAIN: there is none; -ENOBUFS. */
static int read_one(struct tap_queue *tq, struct dm_mbuf **out)
{
	struct virtio_net_hdr vnet;
	struct iovec iov[MOST_SPARE + 2];
	ssize_t got;

	if (!fill_spare(tq))
		return -ENOBUFS;
	iov[0] = (struct iovec){ &vnet, sizeof(vnet) };
	for (uint32_t i = 0; i < tq->n_want; i++)
		iov[1 + i] = (struct iovec){ (char *)tq->spare[i]->buf_addr + DM_PKTMBUF_HEADROOM, tq->room };
	iov[1 + tq->n_want] = (struct iovec){ tq->spill, SPILL_BYTES };
	got = readv(tq->fd, iov, (int)(tq->n_want + 2));
	if (got < 0)
		return -EAGAIN;
	got -= (ssize_t)sizeof(vnet);
	if (got < ETH_HLEN || got > (ssize_t)tq->n_want * tq->room) {
		dm_stat_add(&tq->q.record->rx_errors, 1);
		return 0;
	}
	*out = make_packet(tq, &vnet, (uint32_t)got);
	return 1;
}

static uint16_t rx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct tap_queue *tq = (struct tap_queue *)queue;
	struct dm_queue_record *r = queue->record;
	uint64_t bytes = 0;
	uint16_t got = 0;
	int one = 0;

	while (got < n && (one = read_one(tq, &mbufs[got])) >= 0)
		if (one > 0)
			bytes += mbufs[got++]->pkt_len;
	if (one == -ENOBUFS)
		dm_stat_add(&r->rx_no_mbuf, 1);
	if (got < n)
		tick(tq);
	if (got == 0)
		return 0;
	dm_stat_add(&r->rx_packets, got);
	dm_stat_add(&r->rx_bytes, bytes);
	return got;
}

/* ---- sending ---- */

/* 0 sent; else errno. */
static int write_one(const struct tap_queue *tq, const struct dm_mbuf *m)
{
	struct iovec iov[DM_COPY_MAX_SEGMENTS + 1];
	struct virtio_net_hdr vnet;
	const uint32_t n = dm_copy_iov(m, iov);

	if (n == 0)
		return E2BIG;
	dm_vnet_of_mbuf(m, &vnet);
	iov[0] = (struct iovec){ &vnet, sizeof(vnet) };
	return writev(tq->fd, iov, (int)n) < 0 ? errno : 0;
}

static bool is_full(int err)
{
	return err == EAGAIN || err == ENOBUFS || err == ENOMEM || err == EINTR;
}

static uint16_t tx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	const struct tap_queue *tq = (const struct tap_queue *)queue;
	struct dm_queue_record *r = queue->record;
	uint64_t bytes = 0, packets = 0, errors = 0;
	uint16_t done = 0;

	for (; done < n; done++) {
		const int err = write_one(tq, mbufs[done]);

		if (is_full(err))
			break;
		errors += err != 0;
		packets += err == 0;
		bytes += err == 0 ? mbufs[done]->pkt_len : 0;
	}
	dm_pktmbuf_free_bulk(mbufs, done, queue->self);
	if (done < n)
		dm_stat_add(&r->tx_full, 1);
	dm_stat_add(&r->tx_packets, packets);
	dm_stat_add(&r->tx_bytes, bytes);
	dm_stat_add(&r->tx_errors, errors);
	return done;
}

/* ---- life ---- */

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct tap_queue *tq = (struct tap_queue *)queue;
	const uint32_t longest = is_on(&queue->port->keys, "offload", false) ? MOST_BYTES : (uint32_t)queue->port->record->mtu + ETH_HLEN + VLAN_BYTES;
	int err;

	tq->room = dm_copy_room(queue);
	tq->n_want = (longest + tq->room - 1) / tq->room;
	if (tq->n_want > MOST_SPARE)
		return dm_fail(queue->port->m, -EINVAL, "tap port \"%s\": a packet of %u bytes takes %u buffers of pool \"%s\", more than %d: buffers of %u "
			       "bytes at least belong there", iface_of(&queue->port->keys), longest, tq->n_want, spec->pool->name, MOST_SPARE,
			       (longest + MOST_SPARE - 1) / MOST_SPARE);
	tq->spill = malloc(SPILL_BYTES);
	if (tq->spill == NULL)
		return dm_fail(queue->port->m, -ENOMEM, "no memory for a queue");
	err = open_or_make(queue->port, false, &tq->fd);
	if (err != 0) {
		free(tq->spill);
		return err;
	}
	queue->rx_burst = rx;
	queue->tx_burst = tx;
	return 0;
}

/* What waits is read and counted: the kernel would drop it without a word. */
static int queue_stop(struct dm_queue *queue)
{
	struct tap_queue *tq = (struct tap_queue *)queue;
	uint64_t n = 0;

	while (n < MOST_WAITING && read(tq->fd, tq->spill, SPILL_BYTES) > 0)
		n++;
	count_dropped(tq);
	dm_stat_add(&queue->record->rx_missed, n);
	close(tq->fd);
	dm_mempool_put_bulk(queue->pool, queue->self, (void *const *)tq->spare, tq->n_spare);
	free(tq->spill);
	return 0;
}

static int queue_rx_fd(struct dm_queue *queue)
{
	return ((struct tap_queue *)queue)->fd;
}

const struct dm_transport dm_port_tap = {
	.name = "tap",
	.port_bytes = sizeof(struct tap_port),
	.queue_bytes = sizeof(struct tap_queue),
	.open = open_tap,
	.close = close_tap,
	.queue_start = queue_start,
	.queue_stop = queue_stop,
	.queue_rx_fd = queue_rx_fd,
	.known_keys = "name iface queues mtu up offload",
	.plan = plan,
};
