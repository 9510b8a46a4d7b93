/*
 * Pools of packets and the operations on a packet: what DPDK's rte_mbuf does, and the laws.
 */
#include "dpdkmem_mbuf.h"
#include "fixture.h"

static struct fixture f;

static struct dm_mempool *make_pool(const char *name, uint32_t n, uint32_t priv_size, uint32_t room)
{
	const struct dm_pktmbuf_pool_spec spec = { .name = name, .n = n, .cache_size = 4, .priv_size = priv_size, .data_room_size = room };
	struct dm_mempool *pool = NULL;

	if (dm_pktmbuf_pool_create(&f.m, &spec, &pool) != 0)
		fprintf(stderr, "%s\n", dm_error_text(&f.m));
	CHECK(dm_pktmbuf_pool_check(pool) == 0);
	return pool;
}

static int create(struct dm_pktmbuf_pool_spec spec)
{
	struct dm_mempool *pool;
	int err;

	spec.name = "judged";
	err = dm_pktmbuf_pool_create(&f.m, &spec, &pool);
	if (err == 0)
		CHECK(dm_mempool_free(&f.m, pool) == 0);
	return err;
}

static void a_pool_is_judged_before_it_is_made(void)
{
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8 }) == 0);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8, .priv_size = 8, .data_room_size = 65535 }) == 0);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8, .priv_size = 7 }) == -EINVAL);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8, .data_room_size = 65536 }) == -EINVAL);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8, .flags = DM_MEMPOOL_NO_CACHE_ALIGN }) == -EINVAL);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 0 }) == -EINVAL);
	CHECK(create((struct dm_pktmbuf_pool_spec){ .n = 8, .priv_size = 65536 }) == -EINVAL);
}

static void a_pool_of_other_things_is_none_of_packets(void)
{
	const struct dm_mempool_spec spec = { .name = "things", .n = 4, .elt_size = 2500, .private_data_size = 64 };
	struct dm_mempool *things, *packets = make_pool("packets", 4, 16, 1000);

	CHECK(dm_mempool_create(&f.m, &spec, &things) == 0);
	CHECK(dm_pktmbuf_pool_check(things) == -EINVAL && dm_pktmbuf_data_room_size(things) == 0 && dm_pktmbuf_priv_size(things) == 0);
	CHECK(dm_pktmbuf_pool_check(NULL) == -EINVAL);
	CHECK(dm_pktmbuf_pool_check(packets) == 0 && dm_pktmbuf_data_room_size(packets) == 1000 && dm_pktmbuf_priv_size(packets) == 16);
	CHECK(dm_mempool_free(&f.m, things) == 0 && dm_mempool_free(&f.m, packets) == 0);
}

static void judge_fresh(struct dm_mempool *pool, void *arg, void *obj, uint32_t obj_idx)
{
	const struct dm_mbuf *m = obj;

	(void)obj_idx;
	CHECK((uintptr_t)m % 64 == 0 && m->pool == pool && m->buf_addr == (char *)obj + 64 + 24 && m->buf_len == 512);
	CHECK(m->buf_iova == dm_mempool_virt2iova(obj) + 64 + 24 && dm_mbuf_is_valid(m, NULL, 0) == 0);
	++*(int *)arg;
}

static void every_mbuf_begins_a_line_and_knows_its_buffer(void)
{
	struct dm_mempool *pool = make_pool("fresh", 1000, 24, 512);
	int n = 0;

	CHECK(dm_mempool_obj_iter(pool, judge_fresh, &n) == 1000 && n == 1000);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
}

static void bytes_come_and_go_at_both_ends(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mempool *pool = make_pool("ends", 4, 0, 300);
	struct dm_mbuf *m = dm_pktmbuf_alloc(pool, self);

	CHECK(dm_pktmbuf_headroom(m) == 128 && dm_pktmbuf_tailroom(m) == 172);
	CHECK(dm_pktmbuf_append(m, 173) == NULL && dm_pktmbuf_append(m, 100) == (char *)m->buf_addr + 128);
	CHECK(dm_pktmbuf_prepend(m, 129) == NULL && dm_pktmbuf_prepend(m, 28) == (char *)m->buf_addr + 100);
	CHECK(m->pkt_len == 128 && m->data_len == 128 && dm_pktmbuf_mtod(m) == (char *)m->buf_addr + 100);
	CHECK(dm_pktmbuf_iova(m) == m->buf_iova + 100);
	CHECK(dm_pktmbuf_adj(m, 129) == NULL && dm_pktmbuf_adj(m, 8) == (char *)m->buf_addr + 108);
	CHECK(dm_pktmbuf_trim(m, 121) == -EINVAL && dm_pktmbuf_trim(m, 20) == 0 && m->pkt_len == 100);
	CHECK(dm_mbuf_is_valid(m, NULL, 0) == 0);
	dm_pktmbuf_free(m, self);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
}

static void a_chain_is_one_packet_and_is_freed_as_one(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mempool *pool = make_pool("chain", 8, 0, 300);
	struct dm_mbuf *m[4];

	CHECK(dm_pktmbuf_alloc_bulk(pool, self, m, 4) == 0);
	for (int i = 0; i < 4; i++)
		CHECK(dm_pktmbuf_append(m[i], 10) != NULL);
	for (int i = 1; i < 4; i++)
		CHECK(dm_pktmbuf_chain(m[0], m[i]) == 0);
	CHECK(m[0]->nb_segs == 4 && m[0]->pkt_len == 40 && dm_pktmbuf_lastseg(m[0]) == m[3]);
	CHECK(dm_mbuf_is_valid(m[0], NULL, 0) == 0);
	CHECK(dm_pktmbuf_append(m[0], 5) != NULL && m[3]->data_len == 15 && m[0]->pkt_len == 45);
	CHECK(dm_mbuf_is_valid(m[0], NULL, 0) == 0);
	CHECK(dm_pktmbuf_trim(m[0], 15) == 0 && dm_mbuf_is_valid(m[0], NULL, 0) == 0);
	dm_pktmbuf_free(m[0], self);
	CHECK(dm_mempool_avail_count(pool) == 8);
	for (int i = 0; i < 4; i++)
		CHECK(m[i]->next == NULL && m[i]->nb_segs == 1 && m[i]->refcnt == 1);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
}

static void an_mbuf_goes_back_with_its_last_reference(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mempool *pool = make_pool("shared", 4, 0, 300), *other = make_pool("other", 4, 0, 300);
	struct dm_mbuf *m = dm_pktmbuf_alloc(pool, self), *n = dm_pktmbuf_alloc(other, self);
	struct dm_mbuf *both[] = { m, n, m };

	dm_mbuf_refcnt_update(m, 1);
	CHECK(dm_mbuf_refcnt_read(m) == 2);
	dm_pktmbuf_free(m, self);
	CHECK(dm_mempool_avail_count(pool) == 3 && dm_mbuf_refcnt_read(m) == 1);
	dm_mbuf_refcnt_update(m, 1);
	dm_pktmbuf_free_bulk(both, 3, self);
	CHECK(dm_mempool_avail_count(pool) == 4 && dm_mempool_avail_count(other) == 4);
	CHECK(dm_mempool_free(&f.m, pool) == 0 && dm_mempool_free(&f.m, other) == 0);
}

static void breach(struct dm_mbuf *m, const char *words)
{
	char text[200] = "";

	CHECK(dm_mbuf_is_valid(m, text, sizeof(text)) == -EUCLEAN);
	if (strstr(text, words) == NULL)
		fprintf(stderr, "\"%s\" says nothing of \"%s\"\n", text, words);
	CHECK(strstr(text, words) != NULL);
}

static void each_broken_law_is_named(void)
{
	const struct dm_self *self = dm_self(&f.m);
	struct dm_mempool *pool = make_pool("laws", 4, 0, 300);
	struct dm_mbuf *m = dm_pktmbuf_alloc(pool, self), *n = dm_pktmbuf_alloc(pool, self), was;

	CHECK(dm_pktmbuf_append(m, 10) != NULL && dm_pktmbuf_append(n, 10) != NULL && dm_pktmbuf_chain(m, n) == 0);
	was = *m;
	m->pkt_len = 21, breach(m, "pkt_len is 21"), *m = was;
	m->data_len = 200, breach(m, "data [128, 328)"), *m = was;
	m->nb_segs = 3, breach(m, "nb_segs is 3"), *m = was;
	m->nb_segs = 1, breach(m, "more than 1"), *m = was;
	m->refcnt = 0, breach(m, "nobody refers"), *m = was;
	m->buf_addr = n->buf_addr, breach(m, "its buffer"), *m = was;
	m->buf_len = 299, breach(m, "299 bytes"), *m = was;
	m->pool = (struct dm_mempool *)(void *)((char *)pool + 64), breach(m, "no pool of packets"), *m = was;
	was = *n;
	n->pkt_len = 9, breach(m, "segment 1"), *n = was;
	n->next = m, breach(m, "more than 2"), *n = was;
	CHECK(dm_mbuf_is_valid(NULL, NULL, 0) == -EUCLEAN && dm_mbuf_is_valid(m, NULL, 0) == 0);
	dm_pktmbuf_free(m, self);
	CHECK(dm_mempool_free(&f.m, pool) == 0);
}

int main(void)
{
	fixture_open(&f);
	a_pool_is_judged_before_it_is_made();
	a_pool_of_other_things_is_none_of_packets();
	every_mbuf_begins_a_line_and_knows_its_buffer();
	bytes_come_and_go_at_both_ends();
	a_chain_is_one_packet_and_is_freed_as_one();
	an_mbuf_goes_back_with_its_last_reference();
	each_broken_law_is_named();
	fixture_close(&f);
	return 0;
}
