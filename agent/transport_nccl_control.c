/* Plans, beats and ends between the parties of an NCCL group; see the header.  Worker thread.
 *
 * A message is 32 bytes, little-endian: u32 magic, u32 kind, u64 seq, u64 a, u64 b; SECRET has 128 more.  A party may
 * be one call ahead: a message of a later call waits in the link's buffer until this party gets there. */
#include "agent/transport_nccl_control.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "agent/transport_host_internal.h"
#include "common/clock.h"

#define MESSAGE_MAGIC 0x4e504545u
#define MESSAGE_BYTES 32u
#define LONGEST_BYTES (MESSAGE_BYTES + CONTROL_SECRET_BYTES)
#define BEAT_NS       50000000u
#define SILENT_NS     (10u * BEAT_NS) /* a party that is alive and waits in this call has said something by then */
#define CULPRIT_NS    300000000u
#define NS_PER_US     1000u

enum message_kind { MESSAGE_SECRET = 1, MESSAGE_PLAN, MESSAGE_BEAT, MESSAGE_DONE, MESSAGE_LEAVE, MESSAGE_WORD };

struct message {
    enum message_kind kind;
    uint64_t seq, a, b;
};

struct control_link {
    int fd; /* -1: this party itself; owned by the mesh's group */
    char name[AGENT_ID_MAX];
    uint8_t in[LONGEST_BYTES], out[2 * LONGEST_BYTES];
    size_t in_n, out_n;
    bool ahead; /* `in` begins with a message of a later call */
    bool gone;
    int error;        /* errno of its end, 0 = closed */
    bool left;        /* it said LEAVE ... */
    uint32_t blamed;  /* ... because of this party; itself for reasons of its own */
    bool blamed_late; /* which was late, not gone */
    uint64_t words[CONTROL_WORDS];
    bool worded[CONTROL_WORDS];
    /* in the present call */
    bool watched, planned, done;
    struct control_plan plan; /* what it sends us */
    uint64_t groups, heard_ns;
};

struct control {
    struct transport_group *mesh;
    uint32_t n, self;
    uint64_t seq;
    const char *doing;
    bool agreeing;                       /* plans are awaited */
    const struct control_plan *expected; /* [n] while agreeing */
    bool finished;                       /* we have said DONE */
    uint32_t blamed;                     /* whom an error of ours names; self = none */
    uint64_t groups, received, beat_ns;
    bool has_secret;
    uint8_t secret[CONTROL_SECRET_BYTES];
    struct control_link *links; /* [n] */
    struct pollfd *polls;       /* [n + 1]: links, then the cancel descriptor */
};

/* ---- messages ---- */

static void link_lost(struct control_link *link, int error)
{
    link->gone = true;
    link->error = error;
}

static void link_flush(struct control_link *link)
{
    while (link->out_n > 0 && !link->gone) {
        ssize_t sent = send(link->fd, link->out, link->out_n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (sent < 0) {
            link_lost(link, errno);
            return;
        }
        link->out_n -= (size_t)sent;
        memmove(link->out, link->out + sent, link->out_n);
    }
}

static void link_say(struct control_link *link, const struct message *m, const uint8_t *secret)
{
    size_t len = MESSAGE_BYTES + (secret ? CONTROL_SECRET_BYTES : 0);
    if (link->gone || link->out_n + len > sizeof link->out)
        return; /* beats do not pile up (see control_beat), and all else fits */
    uint8_t *p = link->out + link->out_n;
    uint32_t words[2] = {htole32(MESSAGE_MAGIC), htole32((uint32_t)m->kind)};
    uint64_t longs[3] = {htole64(m->seq), htole64(m->a), htole64(m->b)};
    memcpy(p, words, sizeof words);
    memcpy(p + sizeof words, longs, sizeof longs);
    if (secret)
        memcpy(p + MESSAGE_BYTES, secret, CONTROL_SECRET_BYTES);
    link->out_n += len;
    link_flush(link);
}

static bool message_read(const uint8_t *p, struct message *ret_message)
{
    uint32_t words[2];
    uint64_t longs[3];
    memcpy(words, p, sizeof words);
    memcpy(longs, p + sizeof words, sizeof longs);
    uint32_t kind = le32toh(words[1]);
    *ret_message = (struct message){
        .kind = (enum message_kind)kind,
        .seq = le64toh(longs[0]),
        .a = le64toh(longs[1]),
        .b = le64toh(longs[2]),
    };
    return le32toh(words[0]) == MESSAGE_MAGIC && kind >= MESSAGE_SECRET && kind <= MESSAGE_WORD;
}

static int plan_take(struct control *c, struct control_link *link, const struct message *m, struct err *err)
{
    link->plan = (struct control_plan){.bytes = m->a, .shape = m->b};
    link->planned = true;
    if (!c->agreeing)
        return 0; /* compared when we get there */
    const struct control_plan *in = &c->expected[link - c->links];
    if (link->plan.bytes != in->bytes)
        return err_set(err, ERR_PROTOCOL, "party %s sends %llu bytes where the plan has %llu; the plans differ",
                       link->name, (unsigned long long)m->a, (unsigned long long)in->bytes);
    if (link->plan.shape != in->shape)
        return err_set(err, ERR_PROTOCOL, "party %s cuts its %llu bytes otherwise than the plan; the plans differ",
                       link->name, (unsigned long long)m->a);
    return 0;
}

static int message_take(struct control *c, struct control_link *link, const struct message *m, struct err *err)
{
    switch (m->kind) {
    case MESSAGE_SECRET:
        memcpy(c->secret, link->in + MESSAGE_BYTES, sizeof c->secret);
        explicit_bzero(link->in + MESSAGE_BYTES, CONTROL_SECRET_BYTES);
        c->has_secret = true;
        return 0;
    case MESSAGE_PLAN:
        return plan_take(c, link, m, err);
    case MESSAGE_BEAT:
        link->groups = m->a > link->groups ? m->a : link->groups;
        return 0;
    case MESSAGE_DONE:
        link->done = true;
        return 0;
    case MESSAGE_WORD:
        if (m->b >= CONTROL_WORDS)
            return err_set(err, ERR_PROTOCOL, "party %s says word %llu of a group", link->name,
                           (unsigned long long)m->b);
        link->words[m->b] = m->a;
        link->worded[m->b] = true;
        return 0;
    case MESSAGE_LEAVE:
        link->left = true;
        link->blamed = m->a < c->n ? (uint32_t)m->a : (uint32_t)(link - c->links);
        link->blamed_late = (int64_t)m->b == ERR_TIMEOUT;
        return 0;
    }
    return 0;
}

/* Takes the messages in the buffer that belong to this call. */
static int link_digest(struct control *c, struct control_link *link, struct err *err)
{
    while (link->in_n >= MESSAGE_BYTES) {
        struct message m;
        if (!message_read(link->in, &m))
            return err_set(err, ERR_PROTOCOL, "party %s sent something that is no message of a group", link->name);
        size_t len = MESSAGE_BYTES + (m.kind == MESSAGE_SECRET ? CONTROL_SECRET_BYTES : 0);
        if (link->in_n < len)
            return 0;
        link->ahead = m.seq > c->seq;
        bool late = m.seq < c->seq && m.kind != MESSAGE_BEAT && m.kind != MESSAGE_LEAVE;
        if ((link->ahead && !link->done) || late)
            return err_set(err, ERR_PROTOCOL, "party %s is at transfer %llu of the group, this one is %llu", link->name,
                           (unsigned long long)m.seq, (unsigned long long)c->seq);
        if (link->ahead)
            return 0;
        int rc = m.seq == c->seq || m.kind == MESSAGE_LEAVE ? message_take(c, link, &m, err) : 0;
        if (rc < 0)
            return rc;
        link->heard_ns = clock_now_ns();
        link->in_n -= len;
        memmove(link->in, link->in + len, link->in_n);
    }
    return 0;
}

static int link_receive(struct control *c, struct control_link *link, struct err *err)
{
    while (!link->gone && !link->ahead) {
        int rc = link_digest(c, link, err);
        if (rc < 0 || link->ahead)
            return rc;
        ssize_t got = recv(link->fd, link->in + link->in_n, sizeof link->in - link->in_n, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (got <= 0)
            link_lost(link, got < 0 ? errno : 0);
        else
            link->in_n += (size_t)got;
    }
    return 0;
}

/* ---- a call ---- */

void control_begin(struct control *c, const char *doing)
{
    c->seq++;
    c->doing = doing;
    c->agreeing = c->finished = false;
    c->groups = c->received = 0;
    c->blamed = c->self;
    for (uint32_t i = 0; i < c->n; i++) {
        struct control_link *link = &c->links[i];
        link->watched = link->planned = link->done = link->ahead = false;
        link->groups = 0;
        link->heard_ns = clock_now_ns();
    }
}

void control_watch(struct control *c, uint32_t peer)
{
    c->links[peer].watched = peer != c->self;
}

static void control_say(struct control *c, enum message_kind kind, uint64_t a)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].watched)
            link_say(&c->links[i], &(struct message){.kind = kind, .seq = c->seq, .a = a}, NULL);
}

static void control_beat(struct control *c)
{
    uint64_t now = clock_now_ns();
    if (c->finished || now - c->beat_ns < BEAT_NS)
        return;
    c->beat_ns = now;
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].watched && c->links[i].out_n == 0)
            link_say(&c->links[i], &(struct message){.kind = MESSAGE_BEAT, .seq = c->seq, .a = c->groups}, NULL);
}

/* A watched party that has not said DONE is gone, or has given up. */
static bool link_over(const struct control_link *link)
{
    return link->watched && !link->done && (link->gone || link->left);
}

static int link_gone(struct control *c, const struct control_link *link, struct err *err)
{
    c->blamed = (uint32_t)(link - c->links);
    if (link->left && link->blamed == c->blamed)
        return err_set(err, ERR_UNREACHABLE, "party %s has given up %s", link->name, c->doing);
    if (link->left) {
        c->blamed = link->blamed;
        return err_set(err, link->blamed_late ? ERR_TIMEOUT : ERR_UNREACHABLE, "party %s has given up %s because %s %s",
                       link->name, c->doing, link->blamed == c->self ? "this party" : c->links[link->blamed].name,
                       link->blamed_late ? "does not go on" : "is gone");
    }
    return err_set(err, ERR_UNREACHABLE, "party %s is gone in the middle of %s: %s", link->name, c->doing,
                   link->error ? strerror(link->error) : "it closed the connection");
}

static const char *late_how(const struct control *c, uint32_t i)
{
    if (!c->agreeing)
        return "has not finished";
    return c->expected[i].bytes > 0 ? "sends nothing" : "takes nothing";
}

/* Names those who are waited for; when some of them say nothing at all, only those. */
static int control_late(struct control *c, struct err *err)
{
    uint64_t now = clock_now_ns();
    bool silent = false;
    for (uint32_t i = 0; i < c->n; i++)
        silent |= !c->agreeing && c->links[i].watched && !c->links[i].done && now - c->links[i].heard_ns > SILENT_NS;
    char names[384] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < c->n && len < sizeof names - AGENT_ID_MAX - 48; i++) {
        const struct control_link *link = &c->links[i];
        uint64_t quiet = now - link->heard_ns;
        if (!link->watched || link->done || (c->agreeing && link->planned) || (silent && quiet <= SILENT_NS))
            continue;
        c->blamed = c->blamed == c->self ? i : c->blamed;
        len += (size_t)snprintf(names + len, sizeof names - len, "%s%s (", len ? ", " : "", link->name);
        if (silent)
            len += (size_t)snprintf(names + len, sizeof names - len, "silent for %llu ms)",
                                    (unsigned long long)(quiet / 1000000u));
        else
            len += (size_t)snprintf(names + len, sizeof names - len, "%s)", late_how(c, i));
    }
    return err_set(err, ERR_TIMEOUT, "%s stalled after %llu bytes received; waiting for %s", c->doing,
                   (unsigned long long)c->received, names[0] ? names : "this GPU's own stream");
}

static uint64_t others_groups(const struct control *c)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < c->n; i++)
        sum += c->links[i].groups + c->links[i].done;
    return sum;
}

static int control_poll(struct control *c, uint64_t wait_us, const struct transport_call *call, struct err *err)
{
    for (uint32_t i = 0; i < c->n; i++) {
        const struct control_link *link = &c->links[i];
        bool look = link->watched && !link->gone && !link->left && (!link->done || link->out_n > 0);
        short events = (short)(POLLRDHUP | (link->ahead ? 0 : POLLIN) | (link->out_n ? POLLOUT : 0));
        c->polls[i] = (struct pollfd){.fd = look ? link->fd : -1, .events = events};
    }
    c->polls[c->n] = (struct pollfd){.fd = call->cancel_fd, .events = POLLIN};
    struct timespec wait = {.tv_sec = (time_t)(wait_us / 1000000u), .tv_nsec = (long)(wait_us % 1000000u) * 1000};
    int got = ppoll(c->polls, c->n + 1u, &wait, NULL);
    if (got < 0 && errno != EINTR)
        return err_set(err, ERR_IO, "cannot wait for the parties: %s", strerror(errno));
    if (got > 0 && c->polls[c->n].revents != 0)
        return err_set(err, ERR_ABORTED, "%s was cancelled", c->doing);
    for (uint32_t i = 0; i < c->n && got > 0; i++) {
        struct control_link *link = &c->links[i];
        if (c->polls[i].fd < 0 || c->polls[i].revents == 0)
            continue;
        link_flush(link);
        int rc = link_receive(c, link, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int control_wait(struct control *c, uint64_t wait_us, const struct transport_call *call, struct err *err)
{
    uint64_t before = others_groups(c);
    control_beat(c);
    int rc = control_poll(c, wait_us, call, err);
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < c->n; i++)
        if (link_over(&c->links[i]))
            return link_gone(c, &c->links[i], err);
    if (others_groups(c) != before && call->progress)
        call->progress(call->user, c->received);
    if (clock_now_ns() >= call->deadline_ns) /* read again: progress may have moved it */
        return control_late(c, err);
    return 0;
}

void control_progress(struct control *c, uint64_t received, const struct transport_call *call)
{
    c->groups++;
    c->received = received;
    if (call->progress)
        call->progress(call->user, received);
}

/* Until the deadline in pieces, so that beats go on. */
static int control_sleep(struct control *c, const struct transport_call *call, struct err *err)
{
    uint64_t now = clock_now_ns(), left = call->deadline_ns > now ? call->deadline_ns - now : 0;
    return control_wait(c, (left < BEAT_NS ? left : BEAT_NS) / NS_PER_US + 1, call, err);
}

/* What came before the call began, which no poll will announce again. */
static int control_catch_up(struct control *c, struct err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < c->n && rc == 0; i++)
        if (c->links[i].watched)
            rc = link_receive(c, &c->links[i], err);
    return rc;
}

static bool all_planned(const struct control *c)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].watched && !c->links[i].planned)
            return false;
    return true;
}

int control_agree(struct control *c, const struct control_plan *out, const struct control_plan *in,
                  const struct transport_call *call, struct err *err)
{
    c->agreeing = true;
    c->expected = in;
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].watched)
            link_say(&c->links[i],
                     &(struct message){.kind = MESSAGE_PLAN, .seq = c->seq, .a = out[i].bytes, .b = out[i].shape},
                     NULL);
    int rc = control_catch_up(c, err);
    while (rc == 0 && !all_planned(c))
        rc = control_sleep(c, call, err);
    c->agreeing = false;
    c->expected = NULL;
    return rc;
}

int control_secret(struct control *c, uint8_t secret[CONTROL_SECRET_BYTES], const struct transport_call *call,
                   struct err *err)
{
    if (c->self == 0) {
        for (uint32_t i = 1; i < c->n; i++)
            link_say(&c->links[i], &(struct message){.kind = MESSAGE_SECRET, .seq = c->seq}, secret);
        return 0;
    }
    int rc = control_catch_up(c, err);
    while (rc == 0 && !c->has_secret)
        rc = control_sleep(c, call, err);
    if (rc == 0)
        memcpy(secret, c->secret, CONTROL_SECRET_BYTES);
    explicit_bzero(c->secret, sizeof c->secret);
    return rc;
}

void control_word_say(struct control *c, uint32_t which, uint64_t mine)
{
    struct control_link *own = &c->links[c->self];
    if (own->worded[which])
        return;
    own->words[which] = mine;
    own->worded[which] = true;
    for (uint32_t i = 0; i < c->n; i++)
        if (i != c->self)
            link_say(&c->links[i], &(struct message){.kind = MESSAGE_WORD, .seq = c->seq, .a = mine, .b = which}, NULL);
}

bool control_word_said(const struct control *c, uint32_t which, uint64_t word)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].worded[which] && c->links[i].words[which] == word)
            return true;
    return false;
}

static bool all_worded(const struct control *c, uint32_t which)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (!c->links[i].worded[which])
            return false;
    return true;
}

int control_word(struct control *c, uint32_t which, uint64_t mine, uint64_t *ret_words,
                 const struct transport_call *call, struct err *err)
{
    control_word_say(c, which, mine);
    int rc = control_catch_up(c, err);
    while (rc == 0 && !all_worded(c, which))
        rc = control_sleep(c, call, err);
    for (uint32_t i = 0; i < c->n && rc == 0; i++)
        ret_words[i] = c->links[i].words[which];
    return rc;
}

static bool all_done(const struct control *c)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (c->links[i].watched && (!c->links[i].done || c->links[i].out_n > 0) && !c->links[i].gone &&
            !c->links[i].left)
            return false;
    return true;
}

int control_finish(struct control *c, const struct transport_call *call, struct err *err)
{
    control_say(c, MESSAGE_DONE, 0);
    c->finished = true;
    int rc = control_catch_up(c, err);
    while (rc == 0 && !all_done(c))
        rc = control_sleep(c, call, err);
    for (uint32_t i = 0; i < c->n && rc == 0; i++)
        if (link_over(&c->links[i]))
            rc = link_gone(c, &c->links[i], err);
    return rc;
}

const char *control_culprit(struct control *c)
{
    uint64_t until = clock_now_ns() + CULPRIT_NS;
    struct transport_call call = {.deadline_ns = until, .cancel_fd = -1};
    do {
        for (uint32_t i = 0; i < c->n; i++)
            if (link_over(&c->links[i])) {
                (void)link_gone(c, &c->links[i], NULL);
                return c->links[c->blamed].name;
            }
    } while (clock_now_ns() < until && control_poll(c, 20000, &call, NULL) == 0);
    return NULL;
}

void control_end(struct control *c)
{
    control_begin(c, "ending the group");
    c->mesh->host = NULL; /* the mesh's own state is the worker's; from here on only the links are used */
    for (uint32_t i = 0; i < c->n; i++) {
        control_watch(c, i);
        if (i != c->self)
            link_say(&c->links[i], &(struct message){.kind = MESSAGE_LEAVE, .seq = c->seq, .a = c->self}, NULL);
    }
}

bool control_ended(struct control *c, uint32_t wait_ms)
{
    const struct transport_call call = {.cancel_fd = -1};
    if (control_catch_up(c, NULL) < 0 || control_poll(c, wait_ms * UINT64_C(1000), &call, NULL) < 0)
        return true; /* it says something else: it has no part in this group any more */
    for (uint32_t i = 0; i < c->n; i++)
        if (i != c->self && !c->links[i].left && !c->links[i].gone)
            return false;
    return true;
}

bool control_all_there(struct control *c, int wake_fd, uint32_t wait_ms)
{
    for (uint32_t i = 0; i < c->n; i++) {
        if (i != c->self && (!c->links[i].left || c->links[i].gone))
            return false;
        c->polls[i] = (struct pollfd){.fd = i == c->self ? -1 : c->links[i].fd, .events = POLLIN | POLLRDHUP};
    }
    c->polls[c->n] = (struct pollfd){.fd = wake_fd, .events = POLLIN};
    if (poll(c->polls, c->n + 1u, (int)wait_ms) <= 0)
        return true;
    for (uint32_t i = 0; i < c->n; i++)
        if (c->polls[i].fd >= 0 && c->polls[i].revents != 0) /* nobody says anything any more */
            return false;
    return true;
}

/* ---- open and close ---- */

int control_open(struct transport *mesh, const struct blob *id, const struct member *parties, uint32_t n, uint32_t self,
                 const struct transport_call *call, struct control **ret_control, struct err *err)
{
    struct control *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = mesh->group_create(mesh, id, parties, n, self, call, &c->mesh, err);
    if (rc == 0) {
        c->links = calloc(n, sizeof *c->links);
        c->polls = calloc(n + 1u, sizeof *c->polls);
        if (!c->links || !c->polls)
            rc = err_set(err, ERR_NOMEM, "out of memory");
    }
    if (rc < 0) {
        control_close(c, 0);
        return rc;
    }
    c->n = n;
    c->self = self;
    c->seq = (uint64_t)-1; /* creating the group is call 0, as the first transfer is 1 on every transport */
    for (uint32_t i = 0; i < n; i++) {
        c->links[i].fd = c->mesh->links[i].fd;
        snprintf(c->links[i].name, sizeof c->links[i].name, "%s", c->mesh->links[i].name);
    }
    *ret_control = c;
    return 0;
}

void control_close(struct control *c, int rc)
{
    if (!c)
        return;
    const struct message leave = {.kind = MESSAGE_LEAVE, .seq = c->seq, .a = c->blamed, .b = (uint64_t)(int64_t)rc};
    for (uint32_t i = 0; i < c->n && rc < 0; i++)
        if (i != c->self)
            link_say(&c->links[i], &leave, NULL);
    host_group_destroy(c->mesh);
    free(c->links);
    free(c->polls);
    free(c);
}
