/* vhost_queue.c - makes the device's side of a virtqueue, and the slow ways of its bursts: chains, packets of several buffers, broken queues, maps
 * that change. vhost_queue.h has the laws. */
#include <errno.h>
#include <unistd.h>

#include "eventfd.h"
#include "vhost_impl.h"

/* ---- beginning ---- */

static int check_spec(const struct dm_vhost_spec *s)
{
	const struct dm_pktmbuf_pool_private *priv;

	if (s->n < DM_VQ_MIN || s->n > DM_VQ_MAX || (s->n & (s->n - 1)) != 0 || s->map == NULL || s->counters == NULL || s->pool == NULL ||
	    s->self == NULL)
		return -EINVAL;
	priv = dm_mempool_get_priv(s->pool);
	if (s->pool->private_data_size < sizeof(*priv) || priv->magic != DM_PKTMBUF_POOL_MAGIC ||
	    priv->data_room_size <= DM_PKTMBUF_HEADROOM)
		return -EINVAL;
	return s->features & DM_VIRTIO_F_VERSION_1 ? 0 : -ENOTSUP;
}

static void learn_pool(struct dm_vhost_vq *vq)
{
	const struct dm_pktmbuf_pool_private *priv = dm_mempool_get_priv(vq->pool);
	const uint32_t buf_len = priv->data_room_size > UINT16_MAX ? UINT16_MAX : priv->data_room_size;

	vq->buf_offset = (uint32_t)sizeof(struct dm_mbuf) + priv->priv_size;
	vq->room_bytes = buf_len - DM_PKTMBUF_HEADROOM;
	vq->rearm = dm_pktmbuf_rearm(vq->port_id);
	vq->len_word = (uint64_t)buf_len << 48;
}

static int prepare(struct dm_vhost_vq *vq, const struct dm_vhost_spec *s)
{
	const int err = check_spec(s);

	if (err != 0)
		return err;
	*vq = (struct dm_vhost_vq){
		.map = s->map, .next_map = s->map, .pool = s->pool, .self = s->self, .counters = s->counters, .n = s->n,
		.mask = (uint16_t)(s->n - 1), .features = s->features, .progress = s->progress, .desc_addr = s->desc_addr,
		.driver_addr = s->driver_addr, .device_addr = s->device_addr, .call_fd = s->call_fd, .port_id = s->port_id,
		.is_dequeue = s->is_dequeue, .is_packed = (s->features & DM_VIRTIO_F_RING_PACKED) != 0,
		.in_order = (s->features & DM_VIRTIO_F_IN_ORDER) != 0, .event_idx = (s->features & DM_VIRTIO_F_EVENT_IDX) != 0,
		.mergeable = (s->features & DM_VIRTIO_NET_F_MRG_RXBUF) != 0, .can = dm_net_can(s->features, s->is_dequeue),
		.map_seen = s->map->version,
	};
	learn_pool(vq);
	return dm_vhost_form_of(vq)->point(vq, s->map) ? 0 : -EFAULT;
}

static dm_vhost_burst_fn choose(const struct dm_vhost_vq *vq)
{
	return vq->is_dequeue ? dm_vhost_form_of(vq)->dequeue : dm_vhost_form_of(vq)->enqueue;
}

int dm_vhost_vq_init(struct dm_vhost_vq *vq, const struct dm_vhost_spec *spec)
{
	const int err = prepare(vq, spec);

	if (err != 0)
		return err;
	dm_vhost_form_of(vq)->start(vq, spec->base);
	dm_vhost_form_of(vq)->kicks(vq, false);
	vq->burst = choose(vq);
	return 0;
}

void dm_vhost_vq_fini(struct dm_vhost_vq *vq)
{
	vq->burst = NULL;
	vq->map = NULL;
}

int dm_vhost_vq_resume(const struct dm_vhost_spec *spec, uint32_t *base)
{
	struct dm_vhost_vq vq;
	const int err = prepare(&vq, spec);

	if (err == 0)
		*base = dm_vhost_form_of(&vq)->resume(&vq);
	return err;
}

uint32_t dm_vhost_vq_base(const struct dm_vhost_vq *vq)
{
	return dm_vhost_form_of(vq)->base(vq);
}

bool dm_vhost_vq_kicks(struct dm_vhost_vq *vq, bool on)
{
	vq->wants_kicks = on;
	if (!dm_vhost_map_is_there(vq))
		return false;
	dm_vhost_form_of(vq)->kicks(vq, on);
	if (!on)
		return false;
	dm_vq_full_barrier(); /* the driver asks after it has made something available: 2.7.10 */
	return dm_vhost_form_of(vq)->has_avail(vq);
}

/* ---- maps ---- */

void dm_vhost_vq_set_map(struct dm_vhost_vq *vq, const struct dm_guest_map *map)
{
	__atomic_store_n(&vq->next_map, map, __ATOMIC_RELEASE);
}

uint64_t dm_vhost_vq_map_seen(const struct dm_vhost_vq *vq)
{
	return __atomic_load_n(&vq->map_seen, __ATOMIC_ACQUIRE);
}

__attribute__((noinline, cold)) void dm_vhost_switch_map(struct dm_vhost_vq *vq)
{
	const struct dm_guest_map *map = __atomic_load_n(&vq->next_map, __ATOMIC_ACQUIRE);

	vq->cache = (struct dm_guest_cache){ .bytes = 0 };
	vq->map = map;
	if (map == NULL || !dm_vhost_form_of(vq)->point(vq, map)) {
		if (vq->broken == DM_VHOST_OK)
			vq->broken = DM_VHOST_NO_RING;
	} else if (vq->broken == DM_VHOST_NO_RING) {
		vq->broken = DM_VHOST_OK; /* nothing was touched meanwhile */
	}
	__atomic_store_n(&vq->map_seen, map == NULL ? 0 : map->version, __ATOMIC_RELEASE); /* the old one is not looked at after this */
}

/* ---- broken queues ---- */

__attribute__((noinline, cold)) uint16_t dm_vhost_break(struct dm_vhost_vq *vq, enum dm_vhost_broken why)
{
	if (vq->broken == DM_VHOST_OK)
		vq->broken = (uint16_t)why;
	return 0;
}

const char *dm_vhost_broken_text(uint16_t broken)
{
	switch ((enum dm_vhost_broken)broken) {
	case DM_VHOST_OK: return "";
	case DM_VHOST_BAD_INDEX: return "the driver made more buffers available than the ring has";
	case DM_VHOST_BAD_ID: return "the driver named a descriptor that the ring does not have";
	case DM_VHOST_BAD_LOOP: return "the driver's chain is longer than the ring";
	case DM_VHOST_BAD_ADDRESS: return "the driver named an address that lies in none of its memory regions";
	case DM_VHOST_BAD_INDIRECT: return "the driver's indirect table breaks the rules";
	case DM_VHOST_BAD_DIRECTION: return "the driver's buffer has the wrong direction";
	case DM_VHOST_BAD_HEADER: return "the driver's buffer has no room for a header";
	case DM_VHOST_NO_RING: return "the rings lie in none of the memory regions";
	}
	return "unknown";
}

/* ---- chains ---- */

bool dm_vhost_add_desc(struct dm_vhost_vq *vq, const struct dm_vhost_desc *d, struct dm_vhost_pieces *out)
{
	uint64_t addr = d->addr;
	uint32_t left = d->len;

	if (((d->flags & DM_VRING_DESC_F_WRITE) != 0) == (vq->is_dequeue != 0))
		return dm_vhost_break(vq, DM_VHOST_BAD_DIRECTION);
	while (left > 0 && !out->is_too_long) {
		uint32_t bytes = left;
		char *at = dm_guest_at(vq->map, &vq->cache, addr, &bytes);

		if (at == NULL)
			return dm_vhost_break(vq, DM_VHOST_BAD_ADDRESS);
		if (out->n == DM_VHOST_PIECES || bytes > UINT32_MAX / 2 - out->bytes) {
			out->is_too_long = true;
			break;
		}
		out->piece[out->n++] = (struct dm_vhost_piece){ .at = at, .len = bytes };
		out->bytes += bytes;
		addr += bytes;
		left -= bytes;
	}
	return true;
}

uint32_t dm_vhost_table_size(struct dm_vhost_vq *vq, const struct dm_vhost_desc *t, bool in_chain)
{
	const uint32_t n = t->len / (uint32_t)sizeof(struct dm_vring_desc);

	/* 2.7.5.3.1: not longer than the queue, no NEXT beside it, none inside. */
	if (in_chain || n == 0 || n > vq->n || t->len % sizeof(struct dm_vring_desc) != 0 || (vq->features & DM_VIRTIO_F_INDIRECT_DESC) == 0)
		return dm_vhost_break(vq, DM_VHOST_BAD_INDIRECT);
	return n;
}

bool dm_vhost_table_entry(struct dm_vhost_vq *vq, const struct dm_vhost_desc *t, uint32_t i, struct dm_vhost_desc *out)
{
	const char *at = dm_vhost_at(vq, t->addr + (uint64_t)i * sizeof(struct dm_vring_desc), sizeof(struct dm_vring_desc));
	struct dm_vring_desc d;

	if (at == NULL)
		return dm_vhost_break(vq, DM_VHOST_BAD_ADDRESS);
	memcpy(&d, at, sizeof(d)); /* no address of the driver's is aligned for certain */
	dm_order();
	/* 2.8.13: the packed form has id and flags in the other order. */
	*out = vq->is_packed ? (struct dm_vhost_desc){ .addr = d.addr, .len = d.len, .flags = d.next, .other = d.flags }
			     : (struct dm_vhost_desc){ .addr = d.addr, .len = d.len, .flags = d.flags, .other = d.next };
	return true;
}

/* ---- packets ---- */

/* A place in pieces. */
struct place {
	const struct dm_vhost_pieces *in;
	uint32_t i, at;
};

/* The next bytes in one piece, at most n of them. */
static char *advance(struct place *p, uint32_t *n)
{
	const struct dm_vhost_piece *piece = &p->in->piece[p->i];
	char *at = piece->at + p->at;

	if (*n > piece->len - p->at)
		*n = piece->len - p->at;
	p->at += *n;
	if (p->at == piece->len) {
		p->i++;
		p->at = 0;
	}
	return at;
}

static void read_bytes(struct place *p, char *to, uint32_t n)
{
	while (n > 0) {
		uint32_t part = n;
		const char *at = advance(p, &part);

		memcpy(to, at, part);
		to += part;
		n -= part;
	}
}

static void write_bytes(struct place *p, const char *from, uint32_t n)
{
	while (n > 0) {
		uint32_t part = n;
		char *at = advance(p, &part);

		memcpy(at, from, part);
		from += part;
		n -= part;
	}
}

static int drop(struct dm_vhost_vq *vq)
{
	dm_vq_count(&vq->counters->errors, 1);
	return 1;
}

__attribute__((noinline)) int dm_vhost_read_header(struct dm_vhost_vq *vq, struct dm_mbuf *m, struct dm_net_hdr h)
{
	h.flags &= DM_NET_HDR_F_NEEDS_CSUM; /* 5.1.6.2.2: a device ignores the others */
	return dm_net_hdr_read(m, &h, vq->can) == 0 ? 0 : drop(vq);
}

/* Mbufs behind first for n bytes more than it holds. */
static bool add_segments(struct dm_vhost_vq *vq, struct dm_mbuf *first, uint32_t n)
{
	struct dm_mbuf *last = first;
	uint32_t left = n > vq->room_bytes ? n - vq->room_bytes : 0;

	dm_vhost_fresh(vq, first, n - left);
	first->pkt_len = n;
	while (left > 0) {
		const uint32_t part = left < vq->room_bytes ? left : vq->room_bytes;
		void *obj;

		if (first->nb_segs == UINT16_MAX || dm_mempool_get(vq->pool, vq->self, &obj) != 0)
			return false;
		last->next = obj;
		last = obj;
		dm_vhost_fresh(vq, last, part);
		first->nb_segs++;
		left -= part;
	}
	return true;
}

static void cut_segments(struct dm_vhost_vq *vq, struct dm_mbuf *first)
{
	dm_pktmbuf_free(first->next, vq->self);
	first->next = NULL;
	first->nb_segs = 1;
}

int dm_vhost_read_packet(struct dm_vhost_vq *vq, const struct dm_vhost_pieces *in, struct dm_mbuf *first)
{
	struct place p = { .in = in };
	struct dm_net_hdr h;

	if (in->is_too_long || in->bytes <= DM_NET_HDR_BYTES || in->bytes > DM_VQ_MAX_PACKET)
		return drop(vq);
	if (!add_segments(vq, first, in->bytes - DM_NET_HDR_BYTES)) {
		cut_segments(vq, first);
		dm_vq_count(&vq->counters->starved, 1);
		return -1;
	}
	read_bytes(&p, (char *)&h, sizeof(h));
	for (struct dm_mbuf *m = first; m != NULL; m = m->next)
		read_bytes(&p, dm_pktmbuf_mtod(m), m->data_len);
	if ((h.flags | h.gso_type) != 0 && dm_vhost_read_header(vq, first, h) != 0) {
		cut_segments(vq, first);
		return 1;
	}
	return 0;
}

void dm_vhost_write_packet(struct dm_vhost_vq *vq, const struct dm_vhost_pieces *out, const struct dm_mbuf *m, uint16_t n_buffers)
{
	struct dm_net_hdr h = dm_net_hdr_of(m, true, vq->can);
	struct place p = { .in = out };

	h.num_buffers = n_buffers;
	write_bytes(&p, (const char *)&h, sizeof(h));
	for (; m != NULL; m = m->next)
		write_bytes(&p, dm_pktmbuf_mtod(m), m->data_len);
}

int dm_vhost_suit(struct dm_vhost_vq *vq, struct dm_mbuf *m, struct dm_mbuf **fit)
{
	uint32_t bytes = 0;
	int err;

	for (const struct dm_mbuf *s = m; s != NULL; s = s->next)
		bytes += s->data_len;
	if (bytes == 0 || bytes != m->pkt_len || bytes > DM_VQ_MAX_PACKET)
		return drop(vq);
	err = dm_net_soften(m, vq->can, vq->pool, vq->self, fit);
	if (err == 0)
		return 0;
	return err == -ENOBUFS ? -1 : drop(vq);
}

__attribute__((noinline)) void dm_vhost_call(struct dm_vhost_vq *vq)
{
	vq->n_calls++;
	dm_eventfd_tell(vq->call_fd);
}
