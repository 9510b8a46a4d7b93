/* Round trip of one cache line between two CPUs.
 *
 * usage: core_latency CPU_A CPU_B
 *
 * Two pinned threads pass a counter back and forth through one cache line, without any pause instruction. The program
 * prints the median over several batches, in nanoseconds for a round trip (there and back). The figure stands beside
 * every two-core measurement, because on a virtual machine the distance between two vCPUs drifts several-fold
 * within an hour, and figures from two runs say nothing about each other.
 *
 * Left out on purpose: a hang cannot happen (both threads only wait for each other), so there is no deadline; if one of
 * the CPUs is busy with somebody else's work, the figure rises, which is the truth about that moment.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    N_BATCHES = 9,         /* odd, so that the median is one of them */
    N_ROUND_TRIPS = 10000, /* per batch: 1 to 3 ms at 100 to 300 ns a round trip */
    CACHE_LINE_BYTES = 64,
};

/* Even values are written by the echoing thread, odd ones by the asking thread; each only ever adds one. */
static alignas(2 * CACHE_LINE_BYTES) _Atomic uint32_t ball;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int pin_to(int cpu)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET((size_t)cpu, &cpus);
    return pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
}

static void wait_for(uint32_t value)
{
    while (atomic_load_explicit(&ball, memory_order_acquire) != value) {
    }
}

static void *echo(void *arg)
{
    int err = pin_to(*(const int *)arg);
    for (uint32_t i = 0; i < (uint32_t)N_BATCHES * N_ROUND_TRIPS; i++) {
        wait_for(2 * i + 1);
        atomic_store_explicit(&ball, 2 * i + 2, memory_order_release);
    }
    return (void *)(intptr_t)err;
}

static int by_value(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: core_latency CPU_A CPU_B\n");
        return 2;
    }
    int cpu_a = atoi(argv[1]), cpu_b = atoi(argv[2]);
    pthread_t echoer;
    int err = pin_to(cpu_a);
    if (err == 0)
        err = pthread_create(&echoer, NULL, echo, &cpu_b);
    if (err != 0) {
        fprintf(stderr, "core_latency: cannot use CPUs %d and %d: %s\n", cpu_a, cpu_b, strerror(err));
        return 1;
    }

    double round_trip_ns[N_BATCHES];
    uint32_t i = 0;
    for (int batch = 0; batch < N_BATCHES; batch++) {
        int64_t start_ns = now_ns();
        for (int trip = 0; trip < N_ROUND_TRIPS; trip++, i++) {
            atomic_store_explicit(&ball, 2 * i + 1, memory_order_release);
            wait_for(2 * i + 2);
        }
        round_trip_ns[batch] = (double)(now_ns() - start_ns) / N_ROUND_TRIPS;
    }

    void *echo_err;
    pthread_join(echoer, &echo_err);
    if (echo_err != NULL) {
        fprintf(stderr, "core_latency: cannot use CPU %d: %s\n", cpu_b, strerror((int)(intptr_t)echo_err));
        return 1;
    }
    qsort(round_trip_ns, N_BATCHES, sizeof(round_trip_ns[0]), by_value);
    printf("%.1f\n", round_trip_ns[N_BATCHES / 2]);
    return 0;
}
