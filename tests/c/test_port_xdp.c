/*
 * The transport af_xdp against the kernel: a veth pair in a network namespace of this process's own. The parent is the primary (socket, umem,
 * map, program, link) and, on the other end of the pair, a packet socket. Children are workers: uid 65534, without a capability, with
 * the socket alone. They send back what comes; one is killed in the middle, the next one goes on with the same rings.
 * Laws: each frame that was sent comes back once, or is counted as missed, or was in the hands of the dead; none is changed; when the
 * socket has gone all buffers are in the pool.
 */
#include <arpa/inet.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include "fixture.h"
#include "xdp.h"

static struct dm_port_answer answer_of_take;
static int socket_of_take;

static int test_ask(struct dm_memory *m, const struct dm_port_request *request, int timeout_ms, struct dm_port_answer *answer, int *fds,
		    uint32_t fds_max, uint32_t *n_fds)
{
	(void)m, (void)timeout_ms, (void)fds_max;
	*answer = answer_of_take;
	*n_fds = request->op == DM_PORT_TAKE;
	if (*n_fds == 1)
		fds[0] = dup(socket_of_take);
	return 0;
}

#define dm_port_ask test_ask
#define dm_port_xdp test_port_xdp
#include "../../native/port_xdp.c"

enum { N_MBUFS = 2047, N_FRAMES = 20000, FRAME = 300, IN_HAND = 32, QUIET_MS = 300, DESCS = 256 };

static struct fixture f;
static struct dm_mempool *pool;
static struct dm_port_record *record;
static struct dm_xdp_interface nic;
static int map_fd, program_fd, link_fd, peer;

static void text_fail(int err, const char *text)
{
	if (err != 0)
		fprintf(stderr, "%s\n", text);
	CHECK(err == 0);
}

/* ---- the primary ---- */

static void make_program(void)
{
	char text[512] = "";
	struct bpf_insn code[] = {
		{ .code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 2, .src_reg = 1, .off = 16 }, /* xdp_md.rx_queue_index */
		{ .code = BPF_LD | BPF_DW | BPF_IMM, .dst_reg = 1, .src_reg = BPF_PSEUDO_MAP_FD, .imm = map_fd }, { 0 },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 3, .imm = XDP_PASS },
		{ .code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_redirect_map },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	uint32_t is_native;

	text_fail(dm_xdp_program_load((const uint8_t *)code, sizeof(code) / 8, 0, &program_fd, text), text);
	text_fail(dm_xdp_link(program_fd, nic.ifindex, DM_XDP_ATTACH_AUTO, &link_fd, &is_native, text), text);
	CHECK(is_native);
}

static void make_socket(struct dm_xdp_umem *u)
{
	struct dm_xdp_socket_spec s = {
		.ifindex = nic.ifindex, .n_rx = DESCS, .n_tx = DESCS, .n_fill = DESCS, .n_completion = DESCS, .need_wakeup = 1, .shared_fd = -1,
		.wait_ms = 1000,
	};
	uint32_t is_zerocopy;
	char text[512] = "";

	text_fail(dm_xdp_pool_umem(&f.m, (uintptr_t)pool, u, text), text);
	s.umem = *u;
	text_fail(dm_xdp_socket_open(&s, &socket_of_take, &is_zerocopy, text), text);
	text_fail(dm_xdp_map_set(map_fd, 0, socket_of_take, text), text);
	CHECK(dm_xdp_queue_probe(nic.ifindex, 0) == -EBUSY);
	answer_of_take = (struct dm_port_answer){ .n_values = V_N };
	memcpy(answer_of_take.values, (uint64_t[]){ u->vaddr, u->bytes, u->chunk_bytes, u->headroom, u->room, u->n_slots,
		(u->is_unaligned ? F_UNALIGNED : 0) | F_NEED_WAKEUP, DESCS, DESCS, DESCS, DESCS, 1514 }, V_N * sizeof(uint64_t));
}

static void make_record(const struct dm_xdp_umem *u)
{
	const size_t bytes = sizeof(*record) + sizeof(struct dm_queue_record) + u->n_slots * sizeof(uint64_t);
	struct dm_queue_record *q;

	record = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(record != MAP_FAILED);
	q = dm_port_queue(record, 0);
	q->posted = (uint64_t)(uintptr_t)(q + 1);
	q->n_posted_slots = u->n_slots;
	q->epoch = 1;
}

/* ---- the worker ---- */

static void become_nobody(void)
{
	CHECK(setgid(65534) == 0 && setuid(65534) == 0);
	CHECK(socket(AF_XDP, SOCK_RAW, 0) < 0); /* nothing that it could do itself */
}

static struct dm_queue *start_queue(struct dm_port *port, struct xdp_queue *x)
{
	const struct dm_queue_spec spec = { .pool = pool, .n_rx_desc = DESCS, .n_tx_desc = DESCS };

	*port = (struct dm_port){ .m = &f.m, .transport = &test_port_xdp, .record = record };
	*x = (struct xdp_queue){ .q = { .record = dm_port_queue(record, 0), .self = dm_self(&f.m), .pool = pool, .port = port } };
	CHECK(xdp_queue_start(&x->q, &spec) == 0);
	return &x->q;
}

static void echo_for_ever(uint32_t owner_id)
{
	struct dm_mbuf *mbufs[IN_HAND];
	struct xdp_queue x;
	struct dm_port port;
	struct dm_queue *q;

	fixture_attach(&f, owner_id);
	become_nobody();
	q = start_queue(&port, &x);
	for (;;) {
		uint16_t n = dm_rx_burst(q, mbufs, IN_HAND), sent = 0;

		while (sent < n) {
			sent = (uint16_t)(sent + dm_tx_burst(q, mbufs + sent, (uint16_t)(n - sent)));
			idle(&x);
		}
	}
}

static pid_t begin_worker(uint32_t owner_id)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0)
		echo_for_ever(owner_id);
	return pid;
}

static void end_worker(pid_t pid)
{
	CHECK(kill(pid, SIGKILL) == 0);
	fixture_reap_child(pid);
}

/* ---- the other end ---- */

static void open_peer(void)
{
	struct sockaddr_ll addr = { .sll_family = AF_PACKET, .sll_protocol = htons(0x88b5), .sll_ifindex = (int)if_nametoindex("peer") };
	int bytes = 64 << 20;

	peer = socket(AF_PACKET, SOCK_RAW, htons(0x88b5));
	CHECK(peer >= 0 && bind(peer, (struct sockaddr *)&addr, sizeof(addr)) == 0);
	CHECK(setsockopt(peer, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)) == 0);
	bytes = 1;
	CHECK(setsockopt(peer, SOL_PACKET, PACKET_IGNORE_OUTGOING, &bytes, sizeof(bytes)) == 0);
}

static void frame_of(uint32_t i, uint8_t *frame)
{
	memset(frame, 0xff, 12);
	frame[12] = 0x88;
	frame[13] = 0xb5; /* local experimental */
	memcpy(frame + 14, &i, sizeof(i));
	for (uint32_t k = 18; k < FRAME; k++)
		frame[k] = (uint8_t)(i * 31 + k);
}

/* Whole, and the first of its number. */
static void judge_frame(const uint8_t *frame, ssize_t n, uint8_t *seen)
{
	uint8_t wanted[FRAME];
	uint32_t i;

	CHECK(n == FRAME);
	memcpy(&i, frame + 14, sizeof(i));
	CHECK(i < N_FRAMES && seen[i] == 0);
	frame_of(i, wanted);
	CHECK(memcmp(frame, wanted, FRAME) == 0);
	seen[i] = 1;
}

static uint32_t collect(uint8_t *seen, int wait_ms)
{
	struct pollfd p = { .fd = peer, .events = POLLIN };
	uint8_t frame[2048];
	uint32_t got = 0;
	ssize_t n;

	while (poll(&p, 1, wait_ms) == 1) {
		n = recv(peer, frame, sizeof(frame), MSG_DONTWAIT);
		if (n < 0)
			break;
		judge_frame(frame, n, seen);
		got++;
	}
	return got;
}

static uint32_t send_frames(uint32_t from, uint32_t to, uint8_t *seen)
{
	uint8_t frame[FRAME];
	uint32_t got = 0;

	for (uint32_t i = from; i < to; i++) {
		frame_of(i, frame);
		while (send(peer, frame, FRAME, MSG_DONTWAIT) != FRAME)
			got += collect(seen, 0);
		if (i % 32 == 0)
			got += collect(seen, 1);
	}
	return got;
}

static uint32_t n_posted(void)
{
	struct dm_queue_record *q = dm_port_queue(record, 0);
	uint32_t n = 0;

	for (uint32_t i = 0; i < q->n_posted_slots; i++)
		n += ((uint64_t *)(uintptr_t)q->posted)[i] != 0;
	return n;
}

static void traffic(void)
{
	uint8_t *seen = calloc(N_FRAMES, 1);
	struct dm_queue_record *q = dm_port_queue(record, 0);
	uint64_t missed = 0;
	uint32_t got;
	pid_t worker = begin_worker(FIXTURE_CHILD);

	while (__atomic_load_n(&q->state, __ATOMIC_ACQUIRE) != DM_QUEUE_RUNNING)
		usleep(1000);
	got = send_frames(0, N_FRAMES / 2, seen);
	end_worker(worker);
	CHECK(n_posted() > 0);
	worker = begin_worker(FIXTURE_CHILD + 1);
	got += send_frames(N_FRAMES / 2, N_FRAMES, seen);
	got += collect(seen, QUIET_MS);
	end_worker(worker);
	CHECK(dm_xdp_socket_retire(map_fd, 0, socket_of_take, nic.ifindex, DESCS, 1000, &missed) == 0);
	printf("sent %d, came back %u, missed %llu, received %llu, sent on %llu, posted %u\n", N_FRAMES, got, (unsigned long long)missed,
	       (unsigned long long)q->rx_packets, (unsigned long long)q->tx_packets, n_posted());
	CHECK(got + missed <= N_FRAMES && got + missed + IN_HAND >= N_FRAMES);
	CHECK(q->tx_packets >= got);
	free(seen);
}

static void need_root(void)
{
	const char *require = getenv("DPDKMEM_REQUIRE");

	if (geteuid() == 0 && unshare(CLONE_NEWNET) == 0)
		return;
	fprintf(stderr, "skipped: needs root and network namespaces\n");
	exit(require != NULL && strstr(require, "namespaces") != NULL ? 1 : 77);
}

static void make_pool(uint32_t data_room, uint32_t flags)
{
	const struct dm_pktmbuf_pool_spec spec = {
		.name = data_room == 0 ? "umem" : "umem2", .n = N_MBUFS, .cache_size = 64, .data_room_size = data_room, .flags = flags, .numa_node = DM_NUMA_ANY,
	};
	int err = dm_pktmbuf_pool_create(&f.m, &spec, &pool);

	text_fail(err, dm_error_text(&f.m));
}

/* One pool after the other on the same queue: the first socket has gone for certain. */
static void run(const char *what, uint32_t data_room, uint32_t flags, bool is_unaligned)
{
	struct dm_xdp_umem u;

	printf("%s: ", what);
	fflush(stdout);
	make_pool(data_room, flags);
	make_socket(&u);
	CHECK(u.is_unaligned == is_unaligned);
	make_record(&u);
	traffic();
}

int main(void)
{
	char text[512] = "";

	need_root();
	CHECK(system("echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6") == 0); /* the kernel sends nothing of its own, and all is counted */
	CHECK(system("ip link set lo up && ip link add dut type veth peer name peer && ip link set dut up && ip link set peer up") == 0);
	fixture_open(&f);
	CHECK(dm_self(&f.m) != NULL);
	CHECK(dm_xdp_interface_get("none", &nic, text) == -ENODEV);
	text_fail(dm_xdp_interface_get("dut", &nic, text), text);
	CHECK(nic.mtu == 1500 && nic.n_queues >= 1 && nic.ifindex != 0);
	open_peer();
	text_fail(dm_xdp_map_create(1, &map_fd, text), text);
	make_program();
	run("unaligned chunks", 0, 0, true);
	run("aligned chunks", 1920, DM_MEMPOOL_NO_SPREAD, false);
	close(link_fd);
	return 0;
}
