/* Carries Ethernet frames between interfaces, each a fixed time after it came: netlab's switch where links have delay.

       netlab_delay MICROSECONDS INTERFACE...

   A frame whose destination address ends in n goes to the n-th interface (from 0), a broadcast to all others. Packet
   sockets with virtio-net headers: frames of several segments (GSO) pass whole, so one read and one write carry up to
   64 kB. Ends with SIGTERM, and then says what it has carried, what was dropped, and what that took. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PORTS 64
#define LARGEST (sizeof(struct virtio_net_hdr) + (1 << 17))
#define BUFFER_BYTES (256 << 20)

typedef struct Frame {
    struct Frame *next;
    long long due; /* nanoseconds of the monotonic clock */
    int from;
    size_t length;
    char bytes[]; /* the virtio-net header, then the frame */
} Frame;

static volatile sig_atomic_t ended;

static void end(int signal) {
    (void)signal;
    ended = 1;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_port(const char *name) {
    int port = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, htons(ETH_P_ALL));
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    int one = 1, size = BUFFER_BYTES;
    if (port < 0)
        fail("a packet socket");
    address.sll_ifindex = (int)if_nametoindex(name);
    if (!address.sll_ifindex)
        fail(name);
    if (setsockopt(port, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one))
        fail("PACKET_VNET_HDR");
    if (setsockopt(port, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one))
        fail("PACKET_IGNORE_OUTGOING");
    if (setsockopt(port, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) ||
        setsockopt(port, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size))
        fail("the size of a socket's buffers");
    if (bind(port, (struct sockaddr *)&address, sizeof address))
        fail(name);
    return port;
}

int main(int count, char **words) {
    static char space[LARGEST];
    int ports = count - 2, polled[PORTS];
    long long delay, frames = 0, bytes = 0, dropped = 0, late = 0;
    struct pollfd waits[PORTS];
    Frame *first = NULL, **last = &first;
    struct sched_param priority = {.sched_priority = 1};
    if (ports < 2 || ports > PORTS) {
        fprintf(stderr, "usage: netlab_delay MICROSECONDS INTERFACE... (2 to %d)\n", PORTS);
        return 2;
    }
    delay = atoll(words[1]) * 1000;
    for (int i = 0; i < ports; i++) {
        polled[i] = open_port(words[2 + i]);
        waits[i] = (struct pollfd){.fd = polled[i], .events = POLLIN};
    }
    signal(SIGTERM, end);
    signal(SIGINT, SIG_IGN);
    if (sched_setscheduler(0, SCHED_FIFO, &priority)) /* a frame is due when it is due, whatever the ranks compute */
        setpriority(PRIO_PROCESS, 0, -20);
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    while (!ended) {
        struct timespec wait = {0}, *limit = NULL;
        long long at = now();
        while (first && first->due <= at) {
            Frame *frame = first;
            unsigned char *to = (unsigned char *)frame->bytes + sizeof(struct virtio_net_hdr);
            int all = to[0] & 1;
            if (at - frame->due > late)
                late = at - frame->due;
            for (int i = 0; i < ports; i++)
                if ((all ? i != frame->from : i == to[5]) && send(polled[i], frame->bytes, frame->length, 0) < 0)
                    dropped++;
            frames++;
            bytes += (long long)(frame->length - sizeof(struct virtio_net_hdr));
            first = frame->next;
            if (!first)
                last = &first;
            free(frame);
        }
        if (first) {
            long long left = first->due - now();
            left = left > 0 ? left : 0;
            wait = (struct timespec){.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
            limit = &wait;
        }
        if (ppoll(waits, (nfds_t)ports, limit, NULL) <= 0)
            continue;
        for (int i = 0; i < ports; i++) {
            ssize_t length;
            if (!(waits[i].revents & POLLIN))
                continue;
            /* not more than some frames at once, so that those that are due do not wait for long */
            for (int n = 0; n < 16 && (length = recv(polled[i], space, sizeof space, 0)) > 0; n++) {
                Frame *frame = malloc(sizeof *frame + (size_t)length);
                if (!frame)
                    fail("memory");
                *frame = (Frame){.due = now() + delay, .from = i, .length = (size_t)length};
                memcpy(frame->bytes, space, (size_t)length);
                *last = frame;
                last = &frame->next;
            }
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    for (int i = 0; i < ports; i++) {
        struct tpacket_stats lost;
        socklen_t size = sizeof lost;
        if (!getsockopt(polled[i], SOL_PACKET, PACKET_STATISTICS, &lost, &size))
            dropped += lost.tp_drops;
    }
    printf("{\"frames\": %lld, \"bytes\": %lld, \"dropped\": %lld, \"latest_s\": %.6f, \"cpu_s\": %.3f}\n", frames,
           bytes, dropped, (double)late / 1e9,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    return 0;
}
