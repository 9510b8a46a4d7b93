/* virtq.c - makes and ends the driver's side of a virtqueue, and what both ring forms do rarely.
 *
 * Owns the layout of the shared area, dm_vq_init() to dm_vq_recover(), notifications, and the plan of a packet that does not take the short way:
 * a chain, a header that finds no room in front, work for the device, memory that the device does not reach.
 * Who cleans up after kill -9: nothing here needs it. The private part dies with the process; the area is the port's; posted buffers: port.h. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "eventfd.h"
#include "virtq_impl.h"

enum { LINE = 64 };

/* ---- the area ---- */

static uint32_t take(uint64_t *at, uint64_t bytes)
{
	const uint32_t offset = (uint32_t)*at;

	*at += (bytes + LINE - 1) / LINE * LINE;
	return offset;
}

static struct dm_vq_area lay_out(uint32_t n, uint64_t features, bool is_rx)
{
	const bool is_packed = (features & DM_VIRTIO_F_RING_PACKED) != 0;
	struct dm_vq_area a = { .features = features, .n = n };
	uint64_t at = sizeof(a);

	a.desc_offset = take(&at, (uint64_t)n * sizeof(struct dm_vring_desc));
	a.driver_offset = take(&at, is_packed ? sizeof(struct dm_vring_event) : 6 + 2 * (uint64_t)n);
	a.device_offset = take(&at, is_packed ? sizeof(struct dm_vring_event) : 6 + 8 * (uint64_t)n);
	if (!is_rx)
		a.headers_offset = take(&at, (uint64_t)n * DM_VQ_HEADER_BYTES);
	if (!is_rx && (features & DM_VIRTIO_F_INDIRECT_DESC) != 0)
		a.tables_offset = take(&at, (uint64_t)n * DM_VQ_INDIRECT_MAX * sizeof(struct dm_vring_desc));
	a.bytes = at;
	return a;
}

static bool is_lawful(uint32_t n)
{
	return n >= DM_VQ_MIN && n <= DM_VQ_MAX && (n & (n - 1)) == 0;
}

size_t dm_vq_bytes(uint32_t n, uint64_t features, bool is_rx)
{
	return is_lawful(n) ? lay_out(n, features, is_rx).bytes : 0;
}

void dm_vq_area_parts(const struct dm_vq_area *a, struct dm_vq_parts *out)
{
	const bool is_packed = (a->features & DM_VIRTIO_F_RING_PACKED) != 0;
	const uint64_t at = (uint64_t)(uintptr_t)a;

	*out = (struct dm_vq_parts){
		.desc = at + a->desc_offset, .driver = at + a->driver_offset, .device = at + a->device_offset,
		.desc_bytes = (uint64_t)a->n * sizeof(struct dm_vring_desc),
		.driver_bytes = is_packed ? 4 : 6 + 2 * (uint64_t)a->n,
		.device_bytes = is_packed ? 4 : 6 + 8 * (uint64_t)a->n,
		.n = a->n,
	};
}

static uint32_t left_in_split(const struct dm_vq_area *a, uint32_t base)
{
	const struct dm_vring_avail *avail = (const void *)((const char *)a + a->driver_offset);
	const uint16_t left = (uint16_t)(__atomic_load_n(&avail->idx, __ATOMIC_ACQUIRE) - base);

	return left <= a->n ? left : 0;
}

/* Behind what is available stand descriptors of the lap before. */
static uint32_t left_in_packed(const struct dm_vq_area *a, uint32_t base)
{
	const struct dm_vring_packed_desc *ring = (const void *)((const char *)a + a->desc_offset);
	uint16_t at = base & 0x7fff, wrap = base >> 15 & 1;
	uint32_t left = 0;

	for (uint32_t i = 0; i < a->n && at < a->n; i++) {
		const uint16_t flags = __atomic_load_n(&ring[at].flags, __ATOMIC_ACQUIRE);

		if ((uint16_t)(flags & DM_VRING_PACKED_BOTH) != dm_vring_avail_flags(wrap))
			break;
		left += (flags & DM_VRING_DESC_F_NEXT) == 0;
		at = (uint16_t)(at + 1U == a->n ? 0 : at + 1);
		wrap ^= at == 0;
	}
	return left;
}

uint32_t dm_vq_area_left(const struct dm_vq_area *a, uint32_t base)
{
	return a->features & DM_VIRTIO_F_RING_PACKED ? left_in_packed(a, base) : left_in_split(a, base);
}

void dm_vq_area_make(struct dm_vq_area *area, uint32_t n, uint64_t features, bool is_rx)
{
	*area = lay_out(n, features, is_rx);
	memset(area + 1, 0, area->bytes - sizeof(*area));
}

/* ---- beginning and end ---- */

static void point_at_rings(struct dm_vq *vq, struct dm_vq_area *area)
{
	vq->area = area;
	vq->desc = (struct dm_vring_desc *)(void *)((char *)area + area->desc_offset);
	vq->avail = (struct dm_vring_avail *)(void *)((char *)area + area->driver_offset);
	vq->used = (struct dm_vring_used *)(void *)((char *)area + area->device_offset);
}

/* Pools of mbufs have one data room; the mbuf's buffer begins at the same distance in each. */
static void learn_pool(struct dm_vq *vq)
{
	const struct dm_pktmbuf_pool_private *priv = dm_mempool_get_priv(vq->pool);
	const uint32_t buf_len = priv->data_room_size > UINT16_MAX ? UINT16_MAX : priv->data_room_size;

	vq->buf_offset = (uint32_t)sizeof(struct dm_mbuf) + priv->priv_size;
	vq->room_bytes = buf_len - DM_PKTMBUF_HEADROOM + DM_NET_HDR_BYTES;
	vq->rearm = dm_pktmbuf_rearm(vq->port_id);
	vq->len_word = (uint64_t)buf_len << 48;
}

static int check_spec(const struct dm_vq_spec *s)
{
	const struct dm_pktmbuf_pool_private *priv;

	if (!is_lawful(s->n) || s->area == NULL || (uintptr_t)s->area % LINE != 0 || s->posted == NULL || s->counters == NULL ||
	    s->pool == NULL || s->self == NULL)
		return -EINVAL;
	priv = dm_mempool_get_priv(s->pool);
	if (s->pool->private_data_size < sizeof(*priv) || priv->magic != DM_PKTMBUF_POOL_MAGIC ||
	    priv->data_room_size <= DM_PKTMBUF_HEADROOM)
		return -EINVAL;
	return s->features & DM_VIRTIO_F_VERSION_1 ? 0 : -ENOTSUP;
}

static dm_vq_burst_fn burst_of(const struct dm_vq *vq)
{
	const struct dm_vq_form *form = dm_vq_form_of(vq);

	return vq->is_rx ? form->rx[(vq->features & DM_VIRTIO_NET_F_MRG_RXBUF) != 0][vq->in_order][vq->can != 0] : form->tx[vq->in_order];
}

int dm_vq_init(struct dm_vq *vq, const struct dm_vq_spec *s)
{
	const int err = check_spec(s);

	if (err != 0)
		return err;
	*vq = (struct dm_vq){
		.posted = s->posted, .pool = s->pool, .self = s->self, .counters = s->counters, .n = s->n, .mask = (uint16_t)(s->n - 1),
		.port_id = s->port_id, .features = s->features, .area_iova = s->area_iova, .reaches = s->reaches,
		.reaches_arg = s->reaches_arg, .reaches_all = s->reaches == NULL, .notify = s->notify, .is_rx = s->is_rx,
		.is_packed = (s->features & DM_VIRTIO_F_RING_PACKED) != 0, .in_order = (s->features & DM_VIRTIO_F_IN_ORDER) != 0,
		.event_idx = (s->features & DM_VIRTIO_F_EVENT_IDX) != 0, .uses_iova = s->uses_iova, .n_free = s->n,
		.batch_id = UINT16_MAX, .can = dm_net_can(s->features, !s->is_rx),
		.refill_at = s->n / 4 > DM_VQ_CHUNK ? DM_VQ_CHUNK : s->n / 4 > 0 ? s->n / 4 : 1,
	};
	vq->slots = calloc(s->n, sizeof(*vq->slots) + sizeof(*vq->free_ids));
	if (vq->slots == NULL)
		return -ENOMEM;
	vq->free_ids = (uint16_t *)(void *)(vq->slots + s->n);
	for (uint32_t i = 0; i < s->n; i++)
		vq->free_ids[i] = (uint16_t)i;
	vq->free_tail = s->n; /* of 16 bits: n ids ahead of free_head */
	dm_vq_area_make(s->area, s->n, s->features, s->is_rx);
	point_at_rings(vq, s->area);
	learn_pool(vq);
	dm_vq_form_of(vq)->reset(vq);
	vq->burst = burst_of(vq);
	return 0;
}

void dm_vq_fini(struct dm_vq *vq)
{
	free(vq->slots);
	vq->slots = NULL;
	vq->free_ids = NULL;
}

uint32_t dm_vq_post(struct dm_vq *vq)
{
	dm_vq_form_of(vq)->refill(vq, true);
	return (uint32_t)vq->n - vq->n_free;
}

bool dm_vq_calls(struct dm_vq *vq, bool on)
{
	vq->wants_calls = on;
	dm_vq_form_of(vq)->calls(vq, on);
	if (!on)
		return false;
	dm_vq_full_barrier(); /* the device asks after it has used: 2.7.7.2 */
	return dm_vq_form_of(vq)->has_used(vq);
}

uint32_t dm_vq_clean(struct dm_vq *vq)
{
	dm_vq_form_of(vq)->clean(vq);
	return (uint32_t)vq->n - vq->n_free;
}

void dm_vq_forget(struct dm_vq *vq)
{
	dm_pktmbuf_free(vq->partial, vq->self);
	vq->partial = NULL;
	vq->n_partial_left = 0;
	vq->burst = NULL;
}

uint32_t dm_vq_recover(struct dm_vq *vq)
{
	uint32_t n = 0;

	for (uint32_t id = 0; id < vq->n; id++) {
		struct dm_mbuf *m = dm_vq_posted_get(vq, (uint16_t)id);

		if (m == NULL)
			continue;
		dm_vq_posted_clear(vq, (uint16_t)id);
		dm_pktmbuf_free_seg(m, vq->self);
		n++;
	}
	dm_vq_forget(vq);
	return n;
}

/* ---- rare things ---- */

/* 4.1.5.2, 2.9: what a notification says beside the queue. */
static uint32_t notify_data(const struct dm_vq *vq)
{
	const uint32_t next = vq->is_packed ? (uint32_t)(vq->avail_idx | vq->avail_wrap << 15) : vq->avail_idx;

	return vq->notify.vq_idx | next << 16;
}

__attribute__((noinline, cold)) void dm_vq_kick(struct dm_vq *vq)
{
	vq->n_kicks++;
	if (vq->notify.kind == DM_VQ_NOTIFY_EVENTFD) {
		dm_eventfd_tell(vq->notify.fd);
	} else if (vq->notify.kind == DM_VQ_NOTIFY_MMIO) {
		__atomic_thread_fence(__ATOMIC_RELEASE);
		if (vq->features & DM_VIRTIO_F_NOTIFICATION_DATA)
			*(volatile uint32_t *)vq->notify.mmio = notify_data(vq);
		else
			*(volatile uint16_t *)vq->notify.mmio = vq->notify.vq_idx;
	}
}

static uint16_t burst_nothing(struct dm_vq *vq, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)vq, (void)mbufs, (void)n;
	return 0;
}

__attribute__((noinline, cold)) uint16_t dm_vq_break(struct dm_vq *vq, enum dm_vq_broken why)
{
	if (vq->broken == DM_VQ_OK)
		vq->broken = (uint16_t)why;
	vq->burst = burst_nothing;
	return 0;
}

const char *dm_vq_broken_text(uint16_t broken)
{
	switch ((enum dm_vq_broken)broken) {
	case DM_VQ_OK: return "";
	case DM_VQ_BAD_INDEX: return "the device used more buffers than it had";
	case DM_VQ_BAD_ID: return "the device used a buffer that it did not have";
	case DM_VQ_BAD_LENGTH: return "the device wrote more than the buffer holds";
	case DM_VQ_BAD_COUNT: return "the device named an impossible number of buffers for a packet";
	}
	return "unknown";
}

/* ---- packets that do not take the short way ---- */

static bool is_reached(const struct dm_vq *vq, const struct dm_mbuf *m)
{
	for (; m != NULL; m = m->next) {
		const uint32_t in_front = m->data_off < DM_NET_HDR_BYTES ? 0 : DM_NET_HDR_BYTES; /* the header may be put there */

		if (!vq->reaches(vq->reaches_arg, (uint64_t)(uintptr_t)dm_pktmbuf_mtod(m) - in_front, m->data_len + in_front))
			return false;
	}
	return true;
}

static enum dm_vq_verdict drop(struct dm_vq *vq, struct dm_mbuf *m)
{
	dm_vq_count(&vq->counters->errors, 1);
	dm_pktmbuf_free(m, vq->self);
	return DM_VQ_DROPPED;
}

/* A chain of a device that wants the header apart, or does not: descriptors, ids and where the header lies. */
static void plan(const struct dm_vq *vq, const struct dm_mbuf *m, struct dm_vq_plan *p)
{
	const bool in_front = m->data_off >= DM_NET_HDR_BYTES && dm_mbuf_refcnt_read(m) == 1;
	const uint32_t n = m->nb_segs + !in_front;

	p->n_segs = m->nb_segs;
	p->has_slot = !in_front;
	p->is_indirect = n > 1 && n <= DM_VQ_INDIRECT_MAX && vq->area->tables_offset != 0;
	if (vq->in_order && !vq->is_packed && m->nb_segs > 1) /* 2.7.9: descriptors in ring order, so none may be left out for a segment's id */
		p->is_indirect = false;
	p->n_descs = (uint16_t)(p->is_indirect ? 1 : n);
	p->n_ids = (uint16_t)(p->is_indirect ? m->nb_segs : n);
}

static uint32_t count_segs(const struct dm_mbuf *m, uint32_t *bytes)
{
	uint32_t n = 0;

	for (*bytes = 0; m != NULL; m = m->next, n++)
		*bytes += m->data_len;
	return n;
}

/* *fit: the packet with nothing left to do, where the device reaches it; m itself, or a copy beside it. */
static int suit(struct dm_vq *vq, struct dm_mbuf *m, struct dm_mbuf **fit, bool *bounced)
{
	int err = dm_net_soften(m, vq->can, vq->pool, vq->self, fit);
	struct dm_mbuf *soft = *fit;

	*bounced = err == 0 && !__atomic_load_n(&vq->reaches_all, __ATOMIC_RELAXED) && !is_reached(vq, soft);
	if (!*bounced)
		return err;
	*fit = dm_net_copy(soft, vq->pool, vq->self);
	if (soft != m)
		dm_pktmbuf_free(soft, vq->self);
	return *fit == NULL ? -ENOBUFS : 0;
}

static enum dm_vq_verdict choose(struct dm_vq *vq, const struct dm_mbuf *fit, struct dm_vq_plan *out)
{
	plan(vq, fit, out);
	if (out->n_ids > vq->n || out->n_descs > vq->n)
		return DM_VQ_DROPPED;
	return out->n_ids > vq->n_free ? DM_VQ_WAIT : DM_VQ_GO;
}

/* A packet that waits is the caller's still, as it was. */
__attribute__((noinline)) enum dm_vq_verdict dm_vq_tx_plan(struct dm_vq *vq, struct dm_mbuf **m, struct dm_vq_plan *out)
{
	struct dm_mbuf *was = *m, *fit;
	enum dm_vq_verdict verdict;
	uint32_t bytes;
	bool bounced;
	int err;

	/* nb_segs and pkt_len are the caller's word: a chain that is longer would overrun the ids that are taken for it. */
	if (count_segs(was, &bytes) != was->nb_segs || bytes != was->pkt_len || bytes == 0 || bytes > DM_VQ_MAX_PACKET)
		return drop(vq, was);
	if ((was->ol_flags & DM_NET_TSO) != 0 && (was->ol_flags & DM_MBUF_NEEDS_CSUM) == 0) /* 5.1.6.2.1 */
		return drop(vq, was);
	if (vq->n_free == 0) /* before anything is copied */
		return DM_VQ_WAIT;
	err = suit(vq, was, &fit, &bounced);
	if (err != 0)
		return err == -ENOBUFS ? DM_VQ_WAIT : drop(vq, was);
	verdict = choose(vq, fit, out);
	if (fit != was)
		dm_pktmbuf_free(verdict == DM_VQ_GO ? was : fit, vq->self);
	if (verdict == DM_VQ_DROPPED)
		return drop(vq, was);
	if (verdict == DM_VQ_GO) {
		*m = fit;
		dm_vq_count(&vq->counters->other, bounced);
	}
	return verdict;
}

void *dm_vq_tx_header(struct dm_vq *vq, struct dm_mbuf *m, const struct dm_vq_plan *p, uint16_t id)
{
	const struct dm_net_hdr h = dm_net_hdr_of(m, false, vq->can);
	void *at = p->has_slot ? dm_vq_header_slot(vq, id) : dm_pktmbuf_mtod(m) - DM_NET_HDR_BYTES;

	memcpy(at, &h, sizeof(h));
	return at;
}
