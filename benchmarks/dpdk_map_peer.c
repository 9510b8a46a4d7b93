/* One DPDK process, primary or secondary, that grows and shrinks the memory map when it is told to.
 *
 * usage: dpdk_map_peer EAL-OPTIONS        (--proc-type says which side it plays; N secondaries are N processes)
 *
 * One JSON line goes to standard output when rte_eal_init() has returned, and one for each command on standard input:
 *
 *     (start)     {"ready_ns": T, "call_ns": D, "pages": P}   T on CLOCK_MONOTONIC; D the time of rte_eal_init()
 *     grow N      {"ns": D, "pages": P}                       D the time of the one rte_malloc_socket() call
 *     shrink      {"ns": D, "pages": P}                       D the time of the one rte_free() of the latest growth
 *     device A    {"pages": P}                                A, a PCI device that is bound to vfio-pci, opened until the end
 *     exit, EOF   (ends with rte_eal_cleanup())
 *     failure     {"error": "text"}
 *
 * P is the number of pages in the shared memory map after the step, so that the reader can check that a growth of N
 * pages was one; it is counted outside the timed interval.
 *
 * Laws: every allocation is N pages less SLACK_BYTES, so that with DPDK's element header it needs exactly N pages that
 * the heap does not have; growths are a stack, the latest goes first. The benchmarks build this with the installed
 * libdpdk (pkg-config); nothing of the product uses it.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_malloc.h>
#include <rte_memory.h>
#include <rte_vfio.h>

#include <linux/vfio.h>

enum {
    PAGE_BYTES = 2 * 1024 * 1024,
    SLACK_BYTES = 4096,        /* room for DPDK's 128 B element header and the alignment; less than a page */
    ALIGN_BYTES = 64,          /* RTE_CACHE_LINE_SIZE: DPDK rounds every request up to it */
    MAX_GROWTHS = 4096,        /* depth of the stack of growths that were not given back */
    MAX_COMMAND_BYTES = 64,
};

struct growths {
    void *objs[MAX_GROWTHS];
    size_t n_objs;
};

/* EAL writes its log to standard output (22.11: eal_log.c, console_log_write), so the answers have their own stream. */
static FILE *answers;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

__attribute__((format(printf, 1, 2))) static void answer(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(answers, format, args);
    va_end(args);
    fputc('\n', answers);
    fflush(answers);
}

static int count_page(const struct rte_memseg_list *list, const struct rte_memseg *seg, void *arg)
{
    (void)seg;
    if (!list->external)
        ++*(size_t *)arg;
    return 0;
}

static size_t n_pages_in_map(void)
{
    size_t n_pages = 0;
    rte_memseg_walk(count_page, &n_pages);
    return n_pages;
}

static void grow(struct growths *growths, size_t n_pages)
{
    if (n_pages == 0 || growths->n_objs == MAX_GROWTHS) {
        answer("{\"error\": \"grow: 1 page or more, at most %d growths held at once\"}", MAX_GROWTHS);
        return;
    }
    int64_t start_ns = now_ns();
    void *obj = rte_malloc_socket(NULL, n_pages * PAGE_BYTES - SLACK_BYTES, ALIGN_BYTES, SOCKET_ID_ANY);
    int64_t end_ns = now_ns();
    if (obj == NULL) {
        answer("{\"error\": \"rte_malloc_socket() of %zu pages failed after %" PRId64 " ns: %s\"}", n_pages,
               end_ns - start_ns, rte_strerror(rte_errno));
        return;
    }
    growths->objs[growths->n_objs++] = obj;
    answer("{\"ns\": %" PRId64 ", \"pages\": %zu}", end_ns - start_ns, n_pages_in_map());
}

static void shrink(struct growths *growths)
{
    if (growths->n_objs == 0) {
        answer("{\"error\": \"shrink: no growth is held\"}");
        return;
    }
    void *obj = growths->objs[--growths->n_objs];
    int64_t start_ns = now_ns();
    rte_free(obj);
    int64_t end_ns = now_ns();
    answer("{\"ns\": %" PRId64 ", \"pages\": %zu}", end_ns - start_ns, n_pages_in_map());
}

/* Its container has all memory from here on, and follows the map. */
static void hold_device(char *address)
{
    struct vfio_device_info info = {.argsz = sizeof(info)};
    int fd;
    address[strcspn(address, "\n")] = '\0';
    if (rte_vfio_setup_device("/sys/bus/pci/devices", address, &fd, &info) != 0)
        answer("{\"error\": \"rte_vfio_setup_device: %s\"}", rte_strerror(rte_errno));
    else
        answer("{\"pages\": %zu}", n_pages_in_map());
}

static void serve(void)
{
    static struct growths growths;
    char command[MAX_COMMAND_BYTES];
    while (fgets(command, sizeof(command), stdin) != NULL) {
        size_t n_pages;
        if (sscanf(command, "grow %zu", &n_pages) == 1)
            grow(&growths, n_pages);
        else if (strcmp(command, "shrink\n") == 0)
            shrink(&growths);
        else if (strncmp(command, "device ", 7) == 0)
            hold_device(command + 7);
        else if (strcmp(command, "exit\n") == 0)
            return;
        else
            answer("{\"error\": \"unknown command; there are: grow N, shrink, device ADDRESS, exit\"}");
    }
}

int main(int argc, char **argv)
{
    int answers_fd = dup(STDOUT_FILENO);
    answers = answers_fd < 0 ? NULL : fdopen(answers_fd, "w");
    if (answers == NULL || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
        perror("dpdk_map_peer: standard output");
        return EXIT_FAILURE;
    }

    int64_t start_ns = now_ns();
    int err = rte_eal_init(argc, argv);
    int64_t ready_ns = now_ns();
    if (err < 0) {
        answer("{\"error\": \"rte_eal_init: %s\"}", rte_strerror(rte_errno));
        return EXIT_FAILURE;
    }
    answer("{\"ready_ns\": %" PRId64 ", \"call_ns\": %" PRId64 ", \"pages\": %zu}", ready_ns, ready_ns - start_ns,
           n_pages_in_map());
    serve();
    return rte_eal_cleanup() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
