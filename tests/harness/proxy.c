/* See proxy.h.  One thread, one poll loop; each direction of a connection is a queue of chunks with the time at which
 * they are due. */
#include "tests/harness/proxy.h"

#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/harness/cluster.h"

#define PAIRS_MAX 64
#define CHUNK     65536

struct chunk {
    uint64_t due_ms;
    size_t len;
    struct chunk *next;
    char data[];
};
struct way {
    int from, to;
    bool ended; /* nothing more comes */
    uint64_t last_ms;
    struct chunk *first, **end;
};
struct proxy {
    int listen, delay_ms, jitter_ms;
    const char *target;
    struct way way[2 * PAIRS_MAX]; /* two for each pair */
    int pairs;
};

static int unix_socket(const char *path, bool listens)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%.100s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int rc = fd < 0    ? -1
             : listens ? bind(fd, (struct sockaddr *)&a, sizeof a)
                       : connect(fd, (struct sockaddr *)&a, sizeof a);
    if (rc == 0 && listens)
        rc = listen(fd, 64);
    if (rc < 0 && fd >= 0)
        close(fd);
    return rc < 0 ? -1 : fd;
}

static void pair_open(struct proxy *p)
{
    int a = accept4(p->listen, NULL, NULL, SOCK_CLOEXEC);
    int b = a < 0 || p->pairs == PAIRS_MAX ? -1 : unix_socket(p->target, false);
    if (b < 0) {
        if (a >= 0)
            close(a);
        return;
    }
    struct way *w = &p->way[2 * p->pairs++];
    w[0] = (struct way){.from = a, .to = b, .end = &w[0].first};
    w[1] = (struct way){.from = b, .to = a, .end = &w[1].first};
}

static void pair_close(struct proxy *p, int k)
{
    struct way *w = &p->way[2 * k];
    close(w[0].from);
    close(w[1].from);
    for (int i = 0; i < 2; i++)
        for (struct chunk *c = w[i].first, *next; c; c = next) {
            next = c->next;
            free(c);
        }
    p->pairs--;
    if (k == p->pairs)
        return;
    for (int i = 0; i < 2; i++) {
        w[i] = p->way[2 * p->pairs + i];
        if (!w[i].first)
            w[i].end = &w[i].first;
    }
}

static void way_read(const struct proxy *p, struct way *w)
{
    struct chunk *c = malloc(sizeof *c + CHUNK);
    ssize_t n = c ? read(w->from, c->data, CHUNK) : -1;
    if (n <= 0) {
        w->ended = true;
        free(c);
        return;
    }
    uint64_t due = cluster_now_ms() + (uint64_t)p->delay_ms + (p->jitter_ms ? (uint64_t)(rand() % p->jitter_ms) : 0);
    *c = (struct chunk){.due_ms = due > w->last_ms ? due : w->last_ms, .len = (size_t)n};
    w->last_ms = c->due_ms;
    *w->end = c;
    w->end = &c->next;
}

static void way_write(struct way *w)
{
    while (w->first && w->first->due_ms <= cluster_now_ms()) {
        struct chunk *c = w->first;
        for (size_t done = 0; done < c->len;) {
            ssize_t n = write(w->to, c->data + done, c->len - done);
            if (n <= 0) {
                w->ended = true;
                break;
            }
            done += (size_t)n;
        }
        w->first = c->next;
        if (!w->first)
            w->end = &w->first;
        free(c);
    }
}

static void proxy_turn(struct proxy *p)
{
    struct pollfd fds[1 + 2 * PAIRS_MAX];
    fds[0] = (struct pollfd){.fd = p->listen, .events = POLLIN};
    for (int i = 0; i < 2 * p->pairs; i++)
        fds[1 + i] = (struct pollfd){.fd = p->way[i].ended ? -1 : p->way[i].from, .events = POLLIN};
    int n = 2 * p->pairs;
    if (poll(fds, (nfds_t)(1 + n), 1) < 0)
        return;
    for (int i = 0; i < n; i++) {
        if (fds[1 + i].revents)
            way_read(p, &p->way[i]);
        way_write(&p->way[i]);
    }
    for (int k = p->pairs; k-- > 0;) {
        const struct way *w = &p->way[2 * k];
        if ((w[0].ended && !w[0].first) || (w[1].ended && !w[1].first))
            pair_close(p, k);
    }
    if (fds[0].revents)
        pair_open(p);
}

pid_t proxy_start(const char *listen_path, const char *target_path, int delay_ms, int jitter_ms)
{
    static struct proxy p;
    p = (struct proxy){
        .listen = unix_socket(listen_path, true), .delay_ms = delay_ms, .jitter_ms = jitter_ms, .target = target_path};
    pid_t parent = getpid(), pid = p.listen < 0 ? -1 : fork();
    if (pid == 0) {
        signal(SIGPIPE, SIG_IGN);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (getppid() == parent)
            proxy_turn(&p);
        _exit(0);
    }
    if (p.listen >= 0)
        close(p.listen);
    return pid;
}
