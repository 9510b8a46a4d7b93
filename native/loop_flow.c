/* loop_flow.c - packets that say which they are: made by txonly, verified by rxonly.
 *
 * Owns the payload: 16 bytes in network order, then bytes that follow from flow and number.
 *   0 magic 0xd9dd   2 flow   4 number   12 checksum of all payload, with 0 in its own place
 * and the bookkeeping of a flow: `next` is one more than the highest number; seen[] has a bit for each of the WINDOW numbers below it. So
 * loss (a gap), duplicates and corruption are told apart, also when packets overtake each other by less than WINDOW.
 * Who sends counts in the same struct: a number is taken before its packet is made, so that no number is ever sent twice, whoever dies.
 * Sources: RFC 768, RFC 791; addresses of RFC 2544, port 9 (discard). */
#include <endian.h>
#include <net/ethernet.h>
#include <string.h>

#include "loop.h"

enum { MAGIC = 0xd9dd, PAYLOAD_HEADER = 16, WINDOW = 1024, IP_UDP = 17, IP_BYTES = 20, UDP_BYTES = 8, TTL = 64, MAX_FLOWS = 65536 };
#define DEFAULT_SRC_IP 0xc6120001u
#define DEFAULT_DST_IP 0xc6120002u

static void write16(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static void write32(uint8_t *p, uint32_t value)
{
	write16(p, value >> 16);
	write16(p + 2, value);
}

static uint32_t read32(const uint8_t *p)
{
	uint32_t value;

	memcpy(&value, p, sizeof(value));
	return be32toh(value);
}

static uint64_t read64(const uint8_t *p)
{
	return (uint64_t)read32(p) << 32 | read32(p + 4);
}

/* FNV-1a over words of 8 bytes, folded; a rest as bytes. */
static uint32_t checksum(const uint8_t *p, uint32_t bytes)
{
	uint64_t h = UINT64_C(0xcbf29ce484222325), word;

	for (; bytes >= 8; bytes -= 8, p += 8) {
		memcpy(&word, p, 8);
		h = (h ^ word) * UINT64_C(0x100000001b3);
		h ^= h >> 29;
	}
	for (; bytes > 0; bytes--, p++)
		h = (h ^ *p) * UINT64_C(0x100000001b3);
	return (uint32_t)(h ^ h >> 32);
}

/* ---- sending ---- */

static uint16_t ip_checksum(const uint8_t *ip)
{
	uint32_t sum = 0;

	for (int i = 0; i < IP_BYTES; i += 2)
		sum += (uint32_t)(ip[i] << 8 | ip[i + 1]);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~(sum + (sum >> 16));
}

static void write_headers(struct dm_loop *l, const struct dm_loop_template *t)
{
	uint8_t *p = l->headers, *ip = p + ETH_HLEN, *udp = ip + IP_BYTES;

	memcpy(p, t->dst_mac, 6);
	memcpy(p + 6, t->src_mac, 6);
	write16(p + 12, ETHERTYPE_IP);
	ip[0] = 0x45;
	write16(ip + 2, l->bytes - ETH_HLEN);
	ip[8] = TTL;
	ip[9] = IP_UDP;
	write32(ip + 12, t->src_ip != 0 ? t->src_ip : DEFAULT_SRC_IP);
	write32(ip + 16, t->dst_ip != 0 ? t->dst_ip : DEFAULT_DST_IP);
	write16(ip + 10, ip_checksum(ip));
	write16(udp + 2, t->dst_port != 0 ? t->dst_port : 9);
	write16(udp + 4, l->bytes - (uint32_t)(ETH_HLEN + IP_BYTES));
}

int dm_loop_template_read(struct dm_memory *m, struct dm_loop *l)
{
	static const struct dm_loop_template none;
	const struct dm_loop_template *t = l->spec->txonly != NULL ? l->spec->txonly : &none;

	if (l->n_flows == 0)
		l->n_flows = 1;
	l->bytes = t->bytes != 0 ? t->bytes : DM_LOOP_LEAST_BYTES;
	l->src_port = t->src_port != 0 ? t->src_port : 1024;
	if (l->bytes < DM_LOOP_LEAST_BYTES || l->bytes > DM_LOOP_MOST_BYTES)
		return dm_fail(m, -EINVAL, "txonly: packets of %u bytes: %d to %d are possible", l->bytes, DM_LOOP_LEAST_BYTES, DM_LOOP_MOST_BYTES);
	if ((uint64_t)l->spec->first_flow + l->n_flows > MAX_FLOWS)
		return dm_fail(m, -EINVAL, "txonly: flows %u to %u: numbers below %d are possible", l->spec->first_flow,
			       l->spec->first_flow + l->n_flows - 1, MAX_FLOWS);
	if (l->flows == NULL)
		return dm_fail(m, -EINVAL, "txonly: its flows are counted in `flows`, %u of them", l->n_flows);
	for (uint32_t i = 0; i < l->spec->n_tx; i++)
		if ((uint32_t)l->bytes + DM_PKTMBUF_HEADROOM > dm_pktmbuf_data_room_size(l->spec->tx[i]->pool))
			return dm_fail(m, -EINVAL, "txonly: packets of %u bytes do not fit in a buffer of pool \"%s\"", l->bytes,
				       l->spec->tx[i]->pool->name);
	write_headers(l, t);
	return 0;
}

void dm_loop_template_fill(struct dm_loop *l, struct dm_mbuf *fresh)
{
	const uint32_t i = l->flow, flow = l->spec->first_flow + i, payload = l->bytes - DM_LOOP_HEADERS;
	const uint64_t number = l->flows[i].next;
	uint64_t fill = (number << 16 | flow) * UINT64_C(0x9e3779b97f4a7c15);
	uint8_t *p;

	l->flow = i + 1 == l->n_flows ? 0 : i + 1;
	__atomic_store_n(&l->flows[i].next, number + 1, __ATOMIC_RELAXED);
	__atomic_store_n(&l->flows[i].n_packets, number + 1, __ATOMIC_RELAXED);
	dm_pktmbuf_set_rearm(fresh, dm_pktmbuf_rearm(UINT16_MAX));
	fresh->ol_flags = 0;
	fresh->data_len = l->bytes;
	fresh->pkt_len = l->bytes;
	p = (uint8_t *)dm_pktmbuf_mtod(fresh);
	memcpy(p, l->headers, DM_LOOP_HEADERS);
	write16(p + ETH_HLEN + IP_BYTES, (l->src_port + i) & 0xffff);
	p += DM_LOOP_HEADERS;
	write16(p, MAGIC);
	write16(p + 2, flow);
	write32(p + 4, (uint32_t)(number >> 32));
	write32(p + 8, (uint32_t)number);
	write32(p + 12, 0);
	for (uint32_t at = PAYLOAD_HEADER; at < payload; at += 8, fill = fill * 5 + 1)
		memcpy(p + at, &fill, payload - at < 8 ? payload - at : 8);
	write32(p + 12, checksum(p, payload));
}

/* ---- receiving ---- */

static void forget_up_to(struct dm_loop_flow *f, uint64_t number)
{
	const uint64_t steps = number - f->next;

	if (steps >= WINDOW)
		memset(f->seen, 0, sizeof(f->seen));
	for (uint64_t k = f->next; steps < WINDOW && k <= number; k++)
		f->seen[k % WINDOW / 64] &= ~(UINT64_C(1) << k % 64);
}

static void count(struct dm_loop *l, struct dm_loop_flow *f, uint64_t number)
{
	const uint64_t bit = UINT64_C(1) << number % 64;
	uint64_t *word = &f->seen[number % WINDOW / 64];

	if (f->n_packets == 0)
		f->first = f->next = number;
	if (number >= f->next) {
		dm_stat_add(&l->out->n_lost, number - f->next);
		forget_up_to(f, number);
		f->next = number + 1;
	} else if (f->next - number > WINDOW || (*word & bit) != 0) {
		f->n_duplicates++;
		dm_stat_add(&l->out->n_duplicates, 1);
		return;
	} else if (number < f->first) {
		dm_stat_add(&l->out->n_lost, f->first - number - 1); /* overtaken by the first one; those in between are lost until they come */
		f->first = number;
	} else {
		dm_stat_add(&l->out->n_lost, (uint64_t)-1);
	}
	*word |= bit;
	f->n_packets++;
}

/* The payload in one piece, which may be written; NULL: it is longer than the longest that is sent, or shorter than its header. */
static uint8_t *payload_of(const struct dm_mbuf *m, uint8_t *room, uint32_t *bytes)
{
	uint32_t at = 0;

	if (m->pkt_len < DM_LOOP_HEADERS + PAYLOAD_HEADER || m->pkt_len > DM_LOOP_MOST_BYTES)
		return NULL;
	*bytes = m->pkt_len - DM_LOOP_HEADERS;
	if (m->next == NULL && dm_mbuf_refcnt_read(m) == 1)
		return (uint8_t *)dm_pktmbuf_mtod(m) + DM_LOOP_HEADERS;
	for (const struct dm_mbuf *s = m; s != NULL && at + s->data_len <= DM_LOOP_MOST_BYTES; s = s->next) {
		memcpy(room + at, dm_pktmbuf_mtod(s), s->data_len);
		at += s->data_len;
	}
	return at == m->pkt_len ? room + DM_LOOP_HEADERS : NULL;
}

void dm_loop_verify(struct dm_loop *l, const struct dm_mbuf *packet)
{
	uint8_t room[DM_LOOP_MOST_BYTES], *p;
	uint32_t bytes, sum, flow;

	p = payload_of(packet, room, &bytes);
	if (p == NULL || read32(p) >> 16 != MAGIC) {
		dm_stat_add(&l->out->n_alien, 1);
		return;
	}
	flow = read32(p) & 0xffff;
	sum = read32(p + 12);
	write32(p + 12, 0);
	if (sum != checksum(p, bytes))
		dm_stat_add(&l->out->n_corrupt, 1);
	else if (flow < l->spec->first_flow || flow - l->spec->first_flow >= l->n_flows)
		dm_stat_add(&l->out->n_alien, 1);
	else
		count(l, &l->flows[flow - l->spec->first_flow], read64(p + 4));
}
