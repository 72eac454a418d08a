/* One call of the transport over GPU memory: messages and copies until nothing is due any more, or the deadline passes.
 * Worker thread. */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "agent/transport_cuda_peer_internal.h"
#include "common/clock.h"

#define LOOK_NS  20000  /* between two looks at copies in flight */
#define SLACK_NS 1000ul /* of the sleep between them; 50000 is usual, a tenth of a small round */

static int take_hello(struct peer_group *g, uint32_t peer, const struct note_head *head, struct err *err)
{
    const struct cuda_device *device = g->transport->device;
    uint64_t words[2] = {htole64(head->a), htole64(head->b)};
    unsigned char uuid[16];
    int index;
    bool reaches;
    memcpy(uuid, words, sizeof words);
    g->links[peer].want_hello = false;
    int rc = peer_gpu_reach(device, uuid, &index, &reaches, err);
    if (rc == 0 && index < 0)
        return err_set(err, ERR_UNSUPPORTED, "the GPU of party %s is not visible here; see CUDA_VISIBLE_DEVICES",
                       g->base.links[peer].name);
    if (rc == 0 && !reaches)
        rc = err_set(err, ERR_UNSUPPORTED, "GPU %d cannot reach GPU %d of party %s; use another transport",
                     device->gpu.index, index, g->base.links[peer].name);
    return rc;
}

static int take_offer(struct call_job *job, uint32_t peer, const struct note_head *head, const uint8_t *body,
                      struct err *err)
{
    struct peer_group *g = job->g;
    struct peer_link *link = &g->links[peer];
    const char *name = g->base.links[peer].name;
    if (head->a != link->expected)
        return err_set(err, ERR_PROTOCOL, "party %s sends %llu bytes where the plan has %llu; the plans differ", name,
                       (unsigned long long)head->a, (unsigned long long)link->expected);
    size_t n = (size_t)head->len / sizeof(struct offer_run);
    struct offer_run *runs = calloc(n + 1, sizeof *runs);
    if (!runs)
        return err_set(err, ERR_NOMEM, "out of memory");
    uint64_t total = 0;
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        memcpy(&runs[i], body + i * sizeof *runs, sizeof *runs);
        runs[i] = (struct offer_run){le64toh(runs[i].region), le64toh(runs[i].offset), le64toh(runs[i].len)};
        const struct offer_run *r = &runs[i];
        if (r->region >= link->n_mapped || r->offset > link->mapped[r->region].mapped ||
            r->len > link->mapped[r->region].mapped - r->offset || r->len > link->expected - total)
            rc = err_set(err, ERR_PROTOCOL, "party %s offers bytes outside of its memory", name);
        else
            total += r->len;
    }
    if (rc == 0 && total != link->expected)
        rc = err_set(err, ERR_PROTOCOL, "party %s offers %llu bytes but lists %llu", name, (unsigned long long)head->a,
                     (unsigned long long)total);
    if (rc == 0)
        rc = job->offered(job, peer, runs, err);
    free(runs);
    link->want_offer = false;
    return rc;
}

static int take_note(void *user, uint32_t peer, const struct note_head *head, const uint8_t *body, struct err *err)
{
    struct call_job *job = user;
    struct peer_link *link = &job->g->links[peer];
    switch (head->kind) {
    case NOTE_HELLO:
        return take_hello(job->g, peer, head, err);
    case NOTE_OFFER:
        return take_offer(job, peer, head, body, err);
    default:
        break;
    }
    link->want_taken = head->b == 0;
    if (job->call->progress)
        job->call->progress(job->call->user, job->g->base.received);
    return 0;
}

int peer_tell_taken(struct peer_group *g, uint32_t peer, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    const struct note_head head = {
        .kind = NOTE_TAKEN,
        .seq = g->base.seq,
        .a = link->taken,
        .b = link->taken == link->to_take,
    };
    return peer == g->base.self ? 0 : peer_note(g, peer, &head, NULL, -1, err);
}

static int call_copies(struct call_job *job, struct err *err)
{
    struct peer_group *g = job->g;
    struct batch batch;
    int rc;
    while ((rc = peer_copies_finish(g, &batch, err)) > 0) {
        g->links[batch.peer].taken += batch.bytes;
        if (batch.peer != g->base.self)
            g->base.received += batch.bytes;
        rc = peer_tell_taken(g, batch.peer, err);
        if (rc < 0)
            return rc;
        if (job->call->progress)
            job->call->progress(job->call->user, g->base.received);
    }
    return rc < 0 ? rc : peer_copies_start(g, err);
}

/* Fills in what each link waits for; false when nothing is due any more. */
static bool call_wants(const struct peer_group *g, struct pollfd *polls)
{
    bool any = g->n_batches > 0;
    for (uint32_t i = 0; i < g->base.n; i++) {
        const struct peer_link *link = &g->links[i];
        polls[i] = (struct pollfd){.fd = -1};
        if (peer_link_waits(link))
            polls[i].events |= POLLIN;
        if (link->notes)
            polls[i].events |= POLLOUT;
        if (polls[i].events == 0)
            continue;
        polls[i].fd = g->base.links[i].fd;
        any = true;
    }
    return any;
}

static int call_late(const struct peer_group *g, struct err *err)
{
    char names[256] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < g->base.n && len < sizeof names - AGENT_ID_MAX - 16; i++) {
        const struct peer_link *link = &g->links[i];
        if (peer_link_waits(link) || link->notes)
            len +=
                (size_t)snprintf(names + len, sizeof names - len, "%s%s (%s)", len ? ", " : "", g->base.links[i].name,
                                 link->want_hello || link->want_offer ? "sends nothing" : "takes nothing");
    }
    return err_set(err, ERR_TIMEOUT, "a transfer stalled after %llu bytes received; waiting for %s",
                   (unsigned long long)g->base.received, len ? names : "copies on the GPU");
}

static int call_links(struct call_job *job, const struct pollfd *polls, struct err *err)
{
    struct peer_group *g = job->g;
    int rc = 0;
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        if (polls[i].revents == 0)
            continue;
        if (polls[i].events & POLLIN)
            rc = peer_link_receive(g, i, take_note, job, err);
        if (rc == 0 && (polls[i].events & POLLOUT))
            rc = peer_link_send(g, i, err);
    }
    return rc;
}

static int call_loop(struct call_job *job, struct pollfd *polls, struct err *err)
{
    struct peer_group *g = job->g;
    const uint32_t n = g->base.n;
    for (;;) {
        int rc = call_copies(job, err);
        if (rc < 0 || !call_wants(g, polls))
            return rc;
        polls[n] = (struct pollfd){.fd = job->call->cancel_fd, .events = POLLIN};
        /* Copies do not wake us: look again soon.  The deadline is read again, progress may have moved it. */
        int ms = host_poll_ms(job->call->deadline_ns);
        struct timespec wait = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
        if (g->n_batches > 0)
            wait = (struct timespec){.tv_nsec = LOOK_NS};
        int got = ppoll(polls, n + 1u, &wait, NULL);
        if (got < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait for the parties: %s", strerror(errno));
        if (got > 0 && polls[n].revents != 0)
            return err_set(err, ERR_ABORTED, "the transfer was cancelled");
        if (got > 0 && (rc = call_links(job, polls, err)) < 0)
            return rc;
        if (got <= 0 && clock_now_ns() >= job->call->deadline_ns)
            return call_late(g, err);
    }
}

int peer_call_run(struct call_job *job, struct err *err)
{
    struct pollfd *polls = calloc(job->g->base.n + 1u, sizeof *polls);
    (void)prctl(PR_SET_TIMERSLACK, SLACK_NS); /* of this thread; where it fails, ends are noticed later */
    int rc = polls ? call_loop(job, polls, err) : err_set(err, ERR_NOMEM, "out of memory");
    free(polls);
    if (rc < 0)
        peer_copies_drop(job->g); /* nothing may write into slots that are the caller's again */
    return rc;
}
