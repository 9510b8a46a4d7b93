/* loop_modes.c - what ready-made loops do with a burst (testpmd's io, macswap, rxonly, icmpecho).
 *
 * Owns the rules of each. A packet is changed only where its first segment holds what is to be changed; others go on as they are (macswap) or
 * are freed (icmpecho). Sources: RFC 826 (ARP), RFC 792 (ICMP echo), RFC 1624 (checksums that are adjusted), RFC 1122 3.2.2 (no answer to what
 * was sent to many). Left out: VLAN tags and fragments, which icmpecho frees. */
#include <arpa/inet.h>
#include <net/ethernet.h>
#include <string.h>

#include "loop.h"

enum { ARP_BYTES = 28, IP_BYTES = 20, ICMP_BYTES = 8, IP_ICMP = 1, IP_MORE = 0x2000, IP_OFFSET = 0x1fff };
enum { ECHO_REQUEST = 8, ECHO_REPLY = 0, ARP_REQUEST = 1, ARP_REPLY = 2 };

uint16_t dm_loop_io(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)arg, (void)mbufs;
	return n;
}

static void swap_macs(uint8_t *p)
{
	uint8_t mac[6];

	memcpy(mac, p, 6);
	memcpy(p, p + 6, 6);
	memcpy(p + 6, mac, 6);
}

uint16_t dm_loop_macswap(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	(void)arg;
	for (uint16_t i = 0; i < n; i++)
		if (mbufs[i]->data_len >= ETH_HLEN)
			swap_macs((uint8_t *)dm_pktmbuf_mtod(mbufs[i]));
	return n;
}

uint16_t dm_loop_rxonly(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	struct dm_loop *l = arg;

	for (uint16_t i = 0; l->flows != NULL && i < n; i++)
		dm_loop_verify(l, mbufs[i]);
	return 0;
}

/* ---- icmpecho ---- */

static uint16_t read16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static void write16(uint8_t *p, uint16_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static uint32_t read32(const uint8_t *p)
{
	return (uint32_t)read16(p) << 16 | read16(p + 2);
}

static bool is_mine(const struct dm_loop *l, uint32_t ip)
{
	return l->spec->ip == 0 || l->spec->ip == ip;
}

/* p: the frame. Fields of ARP: type of hardware 0, of protocol 2, lengths 4 and 5, operation 6, sender 8 and 14, target 18 and 24. */
static bool answer_arp(const struct dm_loop *l, uint8_t *p, uint32_t bytes)
{
	uint8_t *arp = p + ETH_HLEN, asked[4];

	if (bytes < ETH_HLEN + ARP_BYTES || read16(arp) != 1 || read16(arp + 2) != ETHERTYPE_IP || arp[4] != 6 || arp[5] != 4 ||
	    read16(arp + 6) != ARP_REQUEST || !is_mine(l, read32(arp + 24)))
		return false;
	write16(arp + 6, ARP_REPLY);
	memcpy(asked, arp + 24, 4);
	memcpy(arp + 18, arp + 8, 10);  /* who asked is the target */
	memcpy(arp + 8, l->mac, 6);
	memcpy(arp + 14, asked, 4);
	memcpy(p, p + 6, 6);
	memcpy(p + 6, l->mac, 6);
	return true;
}

/* The type's octet goes from 8 to 0: the ones' complement sum loses 0x0800. */
static void adjust(uint8_t *checksum)
{
	const uint32_t sum = (uint32_t)read16(checksum) + 0x0800;

	write16(checksum, (uint16_t)(sum + (sum >> 16)));
}

static bool is_sent_to_many(const uint8_t *p, uint32_t ip)
{
	return (p[0] & 1) != 0 || ip >> 28 == 14 || ip == UINT32_MAX;
}

static bool answer_echo(const struct dm_loop *l, uint8_t *p, uint32_t bytes)
{
	uint8_t *ip = p + ETH_HLEN, *icmp, addr[4];
	uint32_t ip_bytes;

	if (bytes < ETH_HLEN + IP_BYTES + ICMP_BYTES || ip[0] >> 4 != 4 || ip[9] != IP_ICMP || (read16(ip + 6) & (IP_MORE | IP_OFFSET)) != 0)
		return false;
	ip_bytes = (uint32_t)(ip[0] & 15) * 4;
	if (ip_bytes < IP_BYTES || bytes < ETH_HLEN + ip_bytes + ICMP_BYTES || is_sent_to_many(p, read32(ip + 16)) || !is_mine(l, read32(ip + 16)))
		return false;
	icmp = ip + ip_bytes;
	if (icmp[0] != ECHO_REQUEST || icmp[1] != 0)
		return false;
	icmp[0] = ECHO_REPLY;
	adjust(icmp + 2);
	memcpy(addr, ip + 12, 4);
	memcpy(ip + 12, ip + 16, 4);
	memcpy(ip + 16, addr, 4);
	swap_macs(p);
	return true;
}

static bool answer(const struct dm_loop *l, struct dm_mbuf *m)
{
	uint8_t *p = (uint8_t *)dm_pktmbuf_mtod(m);

	if (m->data_len < ETH_HLEN)
		return false;
	switch (read16(p + 12)) {
	case ETHERTYPE_ARP:
		return answer_arp(l, p, m->data_len);
	case ETHERTYPE_IP:
		return answer_echo(l, p, m->data_len);
	default:
		return false;
	}
}

uint16_t dm_loop_icmpecho(void *arg, struct dm_mbuf **mbufs, uint16_t n)
{
	const struct dm_loop *l = arg;
	uint16_t k = 0;

	for (uint16_t i = 0; i < n; i++) {
		struct dm_mbuf *m = mbufs[i];

		if (!answer(l, m))
			continue;
		m->ol_flags = 0; /* its checksums are in it */
		mbufs[i] = mbufs[k];
		mbufs[k++] = m;
	}
	return k;
}
