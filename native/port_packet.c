/* port_packet.c - an interface of the kernel's, by AF_PACKET: "packet:eth0", "packet:iface=eth0,queues=2,promisc=0".
 *
 * Owns two sockets for each queue: one that receives into a TPACKET_V3 ring (packet(7), Documentation/networking/packet_mmap.rst) and one
 * that sends by sendmmsg(2), a call a burst. Several queues share the interface by PACKET_FANOUT: by flow, among those that run, so the share
 * of a dead worker goes to the living. What the kernel still had in the ring of a dead one is gone with it.
 * Packets are copied; nothing of the kernel's points to an mbuf, so nothing is posted. Nothing outlives the process: sockets, and with them
 * rings, memberships and the place in the fanout group, go with it. Needs CAP_NET_RAW in the network namespace of the process; each process
 * means the interface of that name in its own.
 * A VLAN tag that the kernel has taken off is put back: what is received is what was on the wire.
 * Accounts: rx_missed is what the kernel dropped for want of room (PACKET_STATISTICS, read at most TICK_MS apart and at the stop) and what was left in
 * the ring at the stop. rx_no_mbuf counts bursts that left packets waiting. tx_errors are packets that the kernel refuses. */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "futex.h"
#include "port_copy.h"

enum {
	BLOCK_BYTES = 1 << 17,      /* more than any packet, 64 KiB with its headers */
	LEAST_BLOCKS = 8, FRAME_BYTES = 2048, /* n_rx_desc frames of the usual size fit in */
	RETIRE_MS = 1,              /* a block that is not full is given out after so long */
	BATCH = 64, TICK_MS = 100
};

struct packet_queue {
	struct dm_queue q;
	char *ring;
	uint32_t n_blocks, block;   /* of the ring; that is read next */
	uint32_t n_left;            /* packets in it that were not read; 0: it is not begun */
	uint32_t room;              /* of a buffer */
	struct tpacket3_hdr *next;
	int rx_fd, tx_fd;
	int64_t tick_ns;            /* CLOCK_MONOTONIC_COARSE, of the last look at the counters */
	uint64_t n_seen, n_taken;   /* packets that the kernel had for this socket, dropped ones too; that were read or counted */
};

/* ---- the interface ---- */

static const char *iface_of(const struct dm_port_keys *keys)
{
	return dm_port_key(keys, "iface");
}

static int plan(struct dm_memory *m, const struct dm_port_keys *keys, struct dm_port_record *like, uint64_t *extra_bytes)
{
	const char *iface = iface_of(keys);
	uint32_t promisc;

	(void)extra_bytes, (void)like;
	if (iface == NULL)
		return dm_fail(m, -EINVAL, "packet port: an interface belongs there, as in \"packet:eth0\"");
	if (strlen(iface) >= IFNAMSIZ)
		return dm_fail(m, -EINVAL, "packet port: iface=%s: no interface has a name of more than %d bytes", iface, IFNAMSIZ - 1);
	return dm_port_key_u32(m, keys, "promisc", 0, 1, 1, &promisc);
}

static int fail_errno(const struct dm_port *port, const char *what)
{
	const int err = -errno;

	return dm_fail(port->m, err, "packet port \"%s\": %s: %s%s", iface_of(&port->keys), what, strerror(-err),
		       err == -EPERM || err == -EACCES ? ": CAP_NET_RAW is needed" : err == -ENODEV ? ": `ip link` lists what this process sees" : "");
}

static int ask(int fd, unsigned long what, const char *iface, struct ifreq *r)
{
	memset(r, 0, sizeof(*r));
	memcpy(r->ifr_name, iface, strlen(iface));
	return ioctl(fd, what, r);
}

static void read_link(struct dm_port_record *r, int fd, const char *iface)
{
	struct ifreq req;
	const uint32_t up = ask(fd, SIOCGIFFLAGS, iface, &req) == 0 && (req.ifr_flags & IFF_UP) && (req.ifr_flags & IFF_RUNNING);

	__atomic_store_n(&r->link, up ? DM_LINK_UP : DM_LINK_DOWN, __ATOMIC_RELAXED);
}

static int open_port(struct dm_port *port)
{
	const char *iface = iface_of(&port->keys);
	struct dm_port_record *r = port->record;
	const int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
	struct ifreq req;
	int err = 0;

	if (fd < 0)
		return fail_errno(port, "socket(AF_PACKET)");
	if (ask(fd, SIOCGIFHWADDR, iface, &req) != 0)
		err = fail_errno(port, "the interface");
	else if (port->is_maker) {
		memcpy(r->mac, req.ifr_hwaddr.sa_data, sizeof(r->mac));
		r->mtu = ask(fd, SIOCGIFMTU, iface, &req) == 0 ? (uint16_t)(req.ifr_mtu < UINT16_MAX ? req.ifr_mtu : UINT16_MAX) : 0;
	}
	if (err == 0)
		read_link(r, fd, iface);
	close(fd);
	return err;
}

/* ---- receiving ---- */

static struct tpacket_block_desc *block_at(const struct packet_queue *pq, uint32_t i)
{
	return (struct tpacket_block_desc *)(void *)(pq->ring + (size_t)i * BLOCK_BYTES);
}

static void read_counters(struct packet_queue *pq)
{
	struct tpacket_stats_v3 s = { 0 };
	socklen_t bytes = sizeof(s);

	if (getsockopt(pq->rx_fd, SOL_PACKET, PACKET_STATISTICS, &s, &bytes) != 0) /* reading clears them */
		return;
	pq->n_seen += s.tp_packets;
	pq->n_taken += s.tp_drops;
	dm_stat_add(&pq->q.record->rx_missed, s.tp_drops);
}

static void tick(struct packet_queue *pq)
{
	const int64_t now = dm_now_ns(CLOCK_MONOTONIC_COARSE);

	if (now - pq->tick_ns < TICK_MS * INT64_C(1000000))
		return;
	pq->tick_ns = now;
	read_counters(pq);
	read_link(pq->q.port->record, pq->tx_fd, iface_of(&pq->q.port->keys));
}

/* Whether there is a packet to be read. */
static bool begin_block(struct packet_queue *pq)
{
	struct tpacket_block_desc *b = block_at(pq, pq->block);

	if (pq->n_left > 0)
		return true;
	if (!(__atomic_load_n(&b->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
		return false;
	pq->n_left = b->hdr.bh1.num_pkts;
	pq->next = (struct tpacket3_hdr *)(void *)((char *)b + b->hdr.bh1.offset_to_first_pkt);
	return pq->n_left > 0;
}

static void end_packet(struct packet_queue *pq)
{
	pq->n_taken++;
	pq->next = (struct tpacket3_hdr *)(void *)((char *)pq->next + pq->next->tp_next_offset);
	if (--pq->n_left > 0)
		return;
	__atomic_store_n(&block_at(pq, pq->block)->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
	pq->block = pq->block + 1 == pq->n_blocks ? 0 : pq->block + 1;
}

/* The kernel takes the outer VLAN tag off and tells of it beside the packet (packet(7), tp_vlan_tci): it goes back behind the addresses. */
static void put_tag_back(struct dm_mbuf *m, const struct tpacket3_hdr *h)
{
	const uint16_t tpid = h->tp_status & TP_STATUS_VLAN_TPID_VALID ? h->hv1.tp_vlan_tpid : ETHERTYPE_VLAN;
	const uint16_t tag[2] = { htons(tpid), htons((uint16_t)h->hv1.tp_vlan_tci) };
	char *at = dm_pktmbuf_prepend(m, sizeof(tag));

	if (at == NULL) /* never: DM_PKTMBUF_HEADROOM is in front */
		return;
	memmove(at, at + sizeof(tag), 2 * ETH_ALEN);
	memcpy(at + 2 * ETH_ALEN, tag, sizeof(tag));
	if (m->ol_flags & DM_MBUF_NEEDS_CSUM)
		m->csum_start = (uint16_t)(m->csum_start + sizeof(tag));
	if (m->ol_flags & (DM_MBUF_TCP4 | DM_MBUF_TCP6 | DM_MBUF_UDP4))
		m->hdr_len = (uint16_t)(m->hdr_len + sizeof(tag));
}

/* 1: m has it; 0: it was dropped and counted; -ENOBUFS. */
static int take_packet(struct packet_queue *pq, struct dm_mbuf *m)
{
	const struct tpacket3_hdr *h = pq->next;
	const char *data = (const char *)h + h->tp_mac;
	struct virtio_net_hdr vnet;

	if (h->tp_snaplen < ETH_HLEN || h->tp_snaplen < h->tp_len) {
		dm_stat_add(&pq->q.record->rx_errors, 1);
		return 0;
	}
	memcpy(&vnet, data - sizeof(vnet), sizeof(vnet));
	dm_pktmbuf_set_rearm(m, dm_pktmbuf_rearm(pq->q.port_id));
	dm_vnet_to_mbuf(&vnet, m);
	if (dm_copy_in(&pq->q, m, data, h->tp_snaplen, pq->room) != 0)
		return -ENOBUFS;
	if (h->tp_status & TP_STATUS_VLAN_VALID)
		put_tag_back(m, h);
	return 1;
}

/* What one block has, at most. Returns how many mbufs were filled; *err: the pool is empty. */
static uint32_t take_from_block(struct packet_queue *pq, struct dm_mbuf **mbufs, uint32_t n, uint64_t *bytes, int *err)
{
	uint32_t want = n < pq->n_left ? n : pq->n_left, filled = 0, got;

	want = dm_copy_alloc(&pq->q, mbufs, want);
	*err = want == 0 ? -ENOBUFS : 0;
	while (filled < want && pq->n_left > 0) {
		*err = take_packet(pq, mbufs[filled]);
		if (*err < 0)
			break;
		got = (uint32_t)*err;
		*err = 0;
		*bytes += got * mbufs[filled]->pkt_len;
		filled += got;
		end_packet(pq);
	}
	if (filled < want)
		dm_mempool_put_bulk(pq->q.pool, pq->q.self, (void *const *)(mbufs + filled), want - filled);
	return filled;
}

static uint16_t rx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	struct packet_queue *pq = (struct packet_queue *)queue;
	struct dm_queue_record *r = queue->record;
	uint64_t bytes = 0;
	uint32_t got = 0;
	int err = 0;

	while (got < n && err == 0 && begin_block(pq))
		got += take_from_block(pq, mbufs + got, n - got, &bytes, &err);
	if (err != 0)
		dm_stat_add(&r->rx_no_mbuf, 1);
	if (got == 0) {
		tick(pq);
		return 0;
	}
	dm_stat_add(&r->rx_packets, got);
	dm_stat_add(&r->rx_bytes, bytes);
	if (pq->n_left == 0)
		tick(pq);
	return (uint16_t)got;
}

/* ---- sending ---- */

struct outgoing {
	struct mmsghdr msgs[BATCH];
	struct virtio_net_hdr vnet[BATCH];
	struct iovec iov[BATCH + BATCH * 2 + DM_COPY_MAX_SEGMENTS];
};

/* As many as there is room for; at least one. Returns how many; 0: the first one can never be sent. */
static uint32_t gather(struct dm_mbuf **mbufs, uint32_t n, struct outgoing *o)
{
	const uint32_t n_iov = sizeof(o->iov) / sizeof(o->iov[0]);
	uint32_t at = 0, i, used;

	for (i = 0; i < n && i < BATCH && at + DM_COPY_MAX_SEGMENTS < n_iov; i++) {
		used = dm_copy_iov(mbufs[i], o->iov + at);
		if (used == 0)
			break;
		dm_vnet_of_mbuf(mbufs[i], &o->vnet[i]);
		o->iov[at] = (struct iovec){ &o->vnet[i], sizeof(o->vnet[i]) };
		o->msgs[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = o->iov + at, .msg_iovlen = used } };
		at += used;
	}
	return i;
}

/* The kernel has no room now, or the interface is down: the packets stay the caller's. */
static bool is_full(int err)
{
	return err == EAGAIN || err == ENOBUFS || err == ENOMEM || err == ENETDOWN || err == EINTR;
}

static void drop_one(struct dm_queue *queue, struct dm_mbuf *m)
{
	dm_pktmbuf_free(m, queue->self);
	dm_stat_add(&queue->record->tx_errors, 1);
}

static uint16_t tx(struct dm_queue *queue, struct dm_mbuf **mbufs, uint16_t n)
{
	const struct packet_queue *pq = (const struct packet_queue *)queue;
	struct dm_queue_record *r = queue->record;
	uint64_t bytes = 0, packets = 0;
	struct outgoing o;
	uint32_t done = 0;

	while (done < n) {
		const uint32_t ready = gather(mbufs + done, n - done, &o);
		const int sent = ready == 0 ? -1 : sendmmsg(pq->tx_fd, o.msgs, ready, MSG_DONTWAIT);

		if (sent <= 0 && ready > 0 && is_full(errno))
			break;
		if (sent <= 0) {
			drop_one(queue, mbufs[done++]);
			continue;
		}
		for (int i = 0; i < sent; i++)
			bytes += mbufs[done + (uint32_t)i]->pkt_len;
		dm_pktmbuf_free_bulk(mbufs + done, (uint32_t)sent, queue->self);
		packets += (uint32_t)sent;
		done += (uint32_t)sent;
	}
	if (done < n)
		dm_stat_add(&r->tx_full, 1);
	dm_stat_add(&r->tx_packets, packets);
	dm_stat_add(&r->tx_bytes, bytes);
	return (uint16_t)done;
}

/* ---- life ---- */

static int set_int(int fd, int option, int value)
{
	return setsockopt(fd, SOL_PACKET, option, &value, sizeof(value));
}

static int bind_to(int fd, int ifindex, uint16_t protocol)
{
	const struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = ifindex };

	return bind(fd, (const struct sockaddr *)&at, sizeof(at));
}

static int make_ring(struct packet_queue *pq, const struct dm_queue_spec *spec)
{
	const uint32_t want = (uint32_t)spec->n_rx_desc * FRAME_BYTES / BLOCK_BYTES;
	struct tpacket_req3 req = { .tp_block_size = BLOCK_BYTES, .tp_frame_size = FRAME_BYTES, .tp_retire_blk_tov = RETIRE_MS };
	void *ring;

	pq->n_blocks = want < LEAST_BLOCKS ? LEAST_BLOCKS : want;
	req.tp_block_nr = pq->n_blocks;
	req.tp_frame_nr = pq->n_blocks * (BLOCK_BYTES / FRAME_BYTES);
	if (set_int(pq->rx_fd, PACKET_VERSION, TPACKET_V3) != 0 || set_int(pq->rx_fd, PACKET_VNET_HDR, 1) != 0 ||
	    setsockopt(pq->rx_fd, SOL_PACKET, PACKET_RX_RING, &req, sizeof(req)) != 0)
		return fail_errno(pq->q.port, "PACKET_RX_RING");
	ring = mmap(NULL, (size_t)pq->n_blocks * BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, pq->rx_fd, 0);
	if (ring == MAP_FAILED)
		return fail_errno(pq->q.port, "mapping its ring");
	madvise(ring, (size_t)pq->n_blocks * BLOCK_BYTES, MADV_DONTFORK); /* best effort: a child's copy would keep the ring alive */
	pq->ring = ring;
	return 0;
}

/* The same number in all processes of a primary, another one for another port: FNV-1a. */
static uint16_t fanout_group(const struct dm_port *port)
{
	uint32_t h = UINT32_C(0x811c9dc5);

	for (size_t i = 0; i < DM_SESSION_ID_BYTES; i++)
		h = (h ^ port->m->ctl->instance_id[i]) * UINT32_C(0x01000193);
	for (const char *s = port->record->name; *s; s++)
		h = (h ^ (uint8_t)*s) * UINT32_C(0x01000193);
	return (uint16_t)(h ^ h >> 16);
}

static int set_up_rx(struct packet_queue *pq, int ifindex)
{
	struct dm_port *port = pq->q.port;
	const struct packet_mreq promisc = { .mr_ifindex = ifindex, .mr_type = PACKET_MR_PROMISC };
	const char *wants = dm_port_key(&port->keys, "promisc");

	if (set_int(pq->rx_fd, PACKET_IGNORE_OUTGOING, 1) != 0)
		return fail_errno(port, "PACKET_IGNORE_OUTGOING (Linux 4.20)");
	if (bind_to(pq->rx_fd, ifindex, ETH_P_ALL) != 0)
		return fail_errno(port, "bind");
	if ((wants == NULL || *wants == '1') && setsockopt(pq->rx_fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promisc, sizeof(promisc)) != 0)
		return fail_errno(port, "promiscuous mode (promisc=0 does without)");
	if (port->record->n_queues > 1 && set_int(pq->rx_fd, PACKET_FANOUT, fanout_group(port) | PACKET_FANOUT_HASH << 16) != 0)
		return fail_errno(port, "PACKET_FANOUT");
	return 0;
}

static void close_queue(struct packet_queue *pq)
{
	if (pq->ring != NULL)
		munmap(pq->ring, (size_t)pq->n_blocks * BLOCK_BYTES);
	if (pq->rx_fd >= 0)
		close(pq->rx_fd);
	if (pq->tx_fd >= 0)
		close(pq->tx_fd);
}

static int open_queue(struct packet_queue *pq, const struct dm_queue_spec *spec)
{
	struct dm_port *port = pq->q.port;
	struct ifreq req;
	int err;

	pq->rx_fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	pq->tx_fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* protocol 0: it receives nothing */
	if (pq->rx_fd < 0 || pq->tx_fd < 0)
		return fail_errno(port, "socket(AF_PACKET)");
	if (ask(pq->tx_fd, SIOCGIFINDEX, iface_of(&port->keys), &req) != 0)
		return fail_errno(port, "the interface");
	if (set_int(pq->tx_fd, PACKET_VNET_HDR, 1) != 0 || bind_to(pq->tx_fd, req.ifr_ifindex, 0) != 0)
		return fail_errno(port, "bind");
	err = make_ring(pq, spec); /* before it is bound: nothing is missed that it had room for */
	return err == 0 ? set_up_rx(pq, req.ifr_ifindex) : err;
}

static int queue_start(struct dm_queue *queue, const struct dm_queue_spec *spec)
{
	struct packet_queue *pq = (struct packet_queue *)queue;
	int err;

	pq->rx_fd = pq->tx_fd = -1;
	pq->room = dm_copy_room(queue);
	if (pq->room < ETH_HLEN)
		return dm_fail(queue->port->m, -EINVAL, "packet port \"%s\": buffers of pool \"%s\" hold %u bytes: at least %d belong there",
			       iface_of(&queue->port->keys), queue->pool->name, pq->room, ETH_HLEN);
	err = open_queue(pq, spec);
	if (err != 0) {
		close_queue(pq);
		return err;
	}
	queue->rx_burst = rx;
	queue->tx_burst = tx;
	return 0;
}

/* Unbound first, so that nothing comes any more; what is in the ring then was missed. */
static int queue_stop(struct dm_queue *queue)
{
	struct packet_queue *pq = (struct packet_queue *)queue;

	bind_to(pq->rx_fd, 0, 0);
	read_counters(pq);
	if (pq->n_seen > pq->n_taken)
		dm_stat_add(&queue->record->rx_missed, pq->n_seen - pq->n_taken);
	close_queue(pq);
	return 0;
}

static int queue_rx_fd(struct dm_queue *queue)
{
	return ((struct packet_queue *)queue)->rx_fd;
}

const struct dm_transport dm_port_packet = {
	.name = "packet",
	.port_bytes = sizeof(struct dm_port),
	.queue_bytes = sizeof(struct packet_queue),
	.open = open_port,
	.queue_start = queue_start,
	.queue_stop = queue_stop,
	.queue_rx_fd = queue_rx_fd,
	.known_keys = "name iface queues promisc",
	.plan = plan,
};
