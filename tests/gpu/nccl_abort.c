/* Parties of an NCCL group that die or stop in the middle: the others must give up by their deadline, say who it was,
 * and be able to go on with a new group.  Before that, that groups in order leave nothing behind.
 *
 *     nccl_abort [--parties N] [--mib N] [--gpus] [--cycles N]
 *
 * --gpus: party i uses GPU i; otherwise all share the first.  --cycles: N groups in order, and nothing else.
 *
 * Each case has processes of its own, forked before CUDA is used: they open GPU memory and the transport, make a group,
 * move weights and end the group, and tell the parent where they are; the parent sends SIGKILL or SIGSTOP to the last
 * party at the chosen place.  The survivors then do a whole operation without it, verified by digests.  Prints a table;
 * exit status 1 if anything was not as it should be, 77 without GPU or NCCL. */
#include <dirent.h>
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/memory.h"
#include "agent/transport_nccl.h"
#include "common/address.h"
#include "common/clock.h"
#include "common/digest.h"

#define PARTIES_MAX  8u
#define MS           UINT64_C(1000000)
#define CREATE_MS    10000u /* deadline of making a group */
#define STALL_MS     3000u  /* of a transfer that does not move */
#define ABORT_MS     3500u  /* what an abort may take beyond that */
#define SMALL_SLOTS  1600u
#define SMALL_BYTES  1036u
#define BIG_SLOTS    6u
#define BIG_BYTES    ((9u << 20) + 4u)
#define HEAP_KIB     128u /* that a group may leave behind */
#define RESIDENT_KIB 1024u
#define SKIPPED      77

enum place { NOWHERE, IN_CREATE, IN_MOVE, IN_DESTROY };
static const char *const place_names[] = {"nowhere", "creating", "moving", "destroying"};

struct options {
    uint32_t parties;
    size_t mib;
    uint32_t cycles;
    bool gpus;
};
struct play {
    const struct options *options;
    enum place place;
    uint32_t n;
    struct member members[PARTIES_MAX];
    int listeners[PARTIES_MAX];
    uint8_t ids[2][32];
};

/* ---- a party (child) ---- */

struct party {
    const struct play *play;
    uint32_t self;
    int from_parent, to_parent;
    struct memory_backend *memory;
    struct transport *transport;
    struct memory_region small, big, bulk;
};

static void party_say(const struct party *p, const char *what, int code, uint64_t ns, const char *text)
{
    dprintf(p->to_parent, "%s %d %llu %s\n", what, code, (unsigned long long)(ns / MS), text);
}

static void __attribute__((noreturn)) party_die(const struct party *p, const struct err *err, int status)
{
    party_say(p, "died", err->code, 0, err->text);
    _exit(status);
}

struct renewing {
    struct transport_call call;
    uint64_t stall_ms;
};

static void renew(void *user, uint64_t bytes)
{
    struct renewing *r = user;
    (void)bytes;
    r->call.deadline_ns = clock_now_ns() + r->stall_ms * MS;
}

static void renewing_init(struct renewing *r, uint64_t stall_ms, bool renewed)
{
    *r = (struct renewing){.stall_ms = stall_ms};
    r->call = (struct transport_call){.cancel_fd = -1, .progress = renewed ? renew : NULL, .user = r};
    renew(r, 0);
}

static uint8_t *content(uint64_t id, size_t len)
{
    uint8_t *bytes = malloc(len + 8);
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = digest_mix(id, i / 8);
        memcpy(bytes + i, &word, 8);
    }
    return bytes;
}

static uint64_t content_digest(uint64_t id, size_t len)
{
    uint8_t *bytes = content(id, len);
    uint64_t digest = digest_bytes(bytes, len, 0);
    free(bytes);
    return digest;
}

/* The lower half of the slots is written by the owner, the upper half is to be filled. */
static void party_fill(struct party *p, struct memory_region *region, uint32_t slots, size_t bytes, uint64_t salt)
{
    struct err err = {0};
    uint64_t digest;
    for (uint32_t s = 0; s < slots; s++) {
        uint8_t *data = content(s < slots / 2 ? salt + p->self * 100000u + s : 77, bytes);
        if (p->memory->write(p->memory, region, s * bytes, data, bytes, &err) < 0)
            party_die(p, &err, 1);
        free(data);
    }
    if (p->memory->digest(p->memory, region, 0, slots * bytes, 0, &digest, &err) < 0) /* now it is there */
        party_die(p, &err, 1);
}

/* Who sends what into upper slot s of party d: any party, itself included, the same on all. */
static uint32_t source_of(uint32_t n, uint32_t d, uint32_t s)
{
    return (uint32_t)(digest_mix(s, d) % n);
}

static size_t items_add(const struct party *p, uint32_t n, const uint32_t *who, struct memory_region *region,
                        uint32_t slots, size_t bytes, struct transfer *items, size_t at)
{
    for (uint32_t d = 0; d < n; d++) {
        for (uint32_t s = 0; s < slots / 2; s++) {
            uint32_t src = source_of(n, d, s);
            if (who[src] != p->self && who[d] != p->self)
                continue;
            struct transfer *t = &items[at++];
            size_t first = bytes / 3;
            *t = (struct transfer){.src = src, .dst = d, .n = 2};
            t->from[0] = (struct extent){region, s * bytes, first};
            t->from[1] = (struct extent){region, s * bytes + first, bytes - first};
            t->to[0] = (struct extent){region, (slots / 2 + s) * bytes, first};
            t->to[1] = (struct extent){region, (slots / 2 + s) * bytes + first, bytes - first};
        }
    }
    return at;
}

static int slots_verify(const struct party *p, uint32_t n, const uint32_t *who, uint32_t self,
                        struct memory_region *region, uint32_t slots, size_t bytes, uint64_t salt, struct err *err)
{
    for (uint32_t s = 0; s < slots / 2; s++) {
        uint64_t digest;
        int rc = p->memory->digest(p->memory, region, (slots / 2 + s) * bytes, bytes, 0, &digest, err);
        if (rc < 0)
            return rc;
        uint32_t src = who[source_of(n, self, s)];
        if (digest != content_digest(salt + src * 100000u + s, bytes))
            return err_set(err, ERR_CORRUPT, "slot %u of %u does not hold what party %u sent", s, slots, src);
    }
    return 0;
}

/* Broadcasts the lower half of the big slots from the parties in mask. */
static int cast_verify(struct party *p, struct transport_group *group, uint32_t n, const uint32_t *who, uint32_t self,
                       uint32_t mask, struct err *err)
{
    uint8_t have[PARTIES_MAX];
    struct renewing r;
    uint64_t bytes = 0, digest;
    size_t len = (size_t)BIG_SLOTS / 2 * BIG_BYTES;
    for (uint32_t i = 0; i < n; i++)
        have[i] = mask >> i & 1;
    (void)who;
    uint64_t id = 900000 + mask;
    uint8_t *data = content(have[self] ? id : 5, len);
    int rc = p->memory->write(p->memory, &p->big, 0, data, len, err);
    if (rc == 0)
        rc = p->memory->digest(p->memory, &p->big, 0, len, 0, &digest, err);
    struct extent extents[3] = {{&p->big, 5000001, len - 5000001}, {&p->big, 0, 1001}, {&p->big, 1001, 5000000 - 1001}};
    renewing_init(&r, STALL_MS, true);
    if (rc == 0)
        rc = p->transport->broadcast(group, extents, 3, have, &r.call, &bytes, err);
    if (rc == 0 && bytes != (have[self] ? 0 : len - 1))
        rc = err_set(err, ERR_CORRUPT, "a broadcast of %zu bytes counted %llu", len - 1, (unsigned long long)bytes);
    for (int k = 0; k < 3 && rc == 0; k++) {
        rc = p->memory->digest(p->memory, &p->big, extents[k].offset, extents[k].len, 0, &digest, err);
        uint8_t *expected = content(id, len);
        if (rc == 0 && digest != digest_bytes(expected + extents[k].offset, extents[k].len, 0))
            rc = err_set(err, ERR_CORRUPT, "extent %d of a broadcast from %x is wrong", k, mask);
        free(expected);
    }
    free(data);
    return rc;
}

/* A whole operation among `who`: a group, a move of many small and a few big items, broadcasts, all verified. */
static int party_operation(struct party *p, const uint32_t *who, uint32_t n, const uint8_t id[32], struct err *err)
{
    struct member members[PARTIES_MAX];
    uint32_t self = 0;
    for (uint32_t i = 0; i < n; i++) {
        members[i] = p->play->members[who[i]];
        self = who[i] == p->self ? i : self;
    }
    party_fill(p, &p->small, SMALL_SLOTS, SMALL_BYTES, 1);
    party_fill(p, &p->big, BIG_SLOTS, BIG_BYTES, 50000000);
    struct transport_group *group = NULL;
    struct renewing r;
    struct blob *blob = blob_new(id, 32);
    renewing_init(&r, CREATE_MS, false);
    int rc = p->transport->group_create(p->transport, blob, members, n, self, &r.call, &group, err);
    blob_unref(blob);
    if (rc < 0)
        return err_wrap(err, "creating");
    struct transfer *items = calloc((SMALL_SLOTS + BIG_SLOTS) * n, sizeof *items);
    size_t n_items = items_add(p, n, who, &p->small, SMALL_SLOTS, SMALL_BYTES, items, 0);
    n_items = items_add(p, n, who, &p->big, BIG_SLOTS, BIG_BYTES, items, n_items);
    uint64_t bytes = 0;
    renewing_init(&r, STALL_MS, true);
    rc = p->transport->move(group, items, n_items, &r.call, &bytes, err);
    if (rc == 0)
        rc = slots_verify(p, n, who, self, &p->small, SMALL_SLOTS, SMALL_BYTES, 1, err);
    if (rc == 0)
        rc = slots_verify(p, n, who, self, &p->big, BIG_SLOTS, BIG_BYTES, 50000000, err);
    for (uint32_t mask = 1; mask < 1u << n && rc == 0; mask++)
        rc = cast_verify(p, group, n, who, self, mask, err);
    free(items);
    p->transport->destroy(group);
    return rc;
}

/* Every party sends its bulk region to the next: long enough to be interrupted. */
static int party_bulk(struct party *p, struct transport_group *group, uint64_t *ret_bytes, struct err *err)
{
    uint32_t n = p->play->n;
    size_t half = p->bulk.bytes / 2;
    struct transfer items[2] = {{.src = p->self, .dst = (p->self + 1) % n, .n = 1},
                                {.src = (p->self + n - 1) % n, .dst = p->self, .n = 1}};
    items[0].from[0] = (struct extent){&p->bulk, 0, half};
    items[1].to[0] = (struct extent){&p->bulk, half, half};
    struct renewing r;
    renewing_init(&r, STALL_MS, true);
    return p->transport->move(group, items, 2, &r.call, ret_bytes, err);
}

static void party_wait(const struct party *p)
{
    char c;
    if (read(p->from_parent, &c, 1) != 1)
        _exit(1);
}

static void party_open(struct party *p)
{
    const struct play *play = p->play;
    struct err err = {0};
    char memory[32], gpu[16] = "";
    if (play->options->gpus)
        snprintf(gpu, sizeof gpu, "%u", p->self);
    snprintf(memory, sizeof memory, "cuda%s%s", gpu[0] ? ":" : "", gpu);
    p->memory = memory_open(memory, &err);
    if (!p->memory)
        party_die(p, &err, err.code == ERR_UNSUPPORTED || err.code == ERR_NOTFOUND ? SKIPPED : 1);
    p->transport = transport_nccl_open(&(struct transport_nccl_options){.listen_fd = play->listeners[p->self],
                                                                        .gpu = gpu,
                                                                        .shared_gpu = !play->options->gpus},
                                       &err);
    if (!p->transport)
        party_die(p, &err, err.code == ERR_UNSUPPORTED ? SKIPPED : 1);
    if (p->memory->alloc(p->memory, "small", SMALL_SLOTS * SMALL_BYTES, &p->small, &err) < 0 ||
        p->memory->alloc(p->memory, "big", (size_t)BIG_SLOTS * BIG_BYTES, &p->big, &err) < 0 ||
        p->memory->alloc(p->memory, "bulk", play->options->mib << 20, &p->bulk, &err) < 0)
        party_die(p, &err, 1);
}

/* What this process holds: descriptors, threads, resident KiB (once free memory is given back), and what of it malloc
 * has given out. */
struct holds {
    unsigned fds, threads, kib, heap_kib;
};

static unsigned entries(const char *path)
{
    unsigned n = 0;
    DIR *dir = opendir(path);
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

static struct holds holds_now(void)
{
    unsigned pages = 0;
    malloc_trim(0);
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%*u %u", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return (struct holds){entries("/proc/self/fd"), entries("/proc/self/task"), pages * 4,
                          (unsigned)(mallinfo2().uordblks / 1024)};
}

/* Groups made, used and ended again and again hold nothing in the end. */
static void party_cycles(struct party *p)
{
    struct err err = {0};
    struct holds before = {0}, now = {0};
    uint32_t cycles = p->play->options->cycles;
    char text[200] = "";
    int rc = 0;
    for (uint32_t k = 0; k < cycles && rc == 0; k++) {
        struct transport_group *group = NULL;
        struct renewing r;
        uint64_t bytes;
        uint8_t id[32];
        memcpy(id, p->play->ids[0], sizeof id);
        id[3] = (uint8_t)k;
        id[20] ^= 0x55;
        struct blob *blob = blob_new(id, sizeof id);
        renewing_init(&r, CREATE_MS, false);
        rc = p->transport->group_create(p->transport, blob, p->play->members, p->play->n, p->self, &r.call, &group,
                                        &err);
        blob_unref(blob);
        if (rc == 0)
            rc = party_bulk(p, group, &bytes, &err);
        p->transport->destroy(group);
        for (int i = 0; i < 100 && (k == 2 || k == cycles - 1); i++) { /* ends are in the background */
            poll(NULL, 0, 20);
            now = holds_now();
            if (k > 2 && now.fds <= before.fds && now.threads <= before.threads)
                break;
        }
        before = k == 2 ? now : before;
    }
    uint32_t more = cycles - 3;
    snprintf(text, sizeof text,
             "%u descriptors, %u threads, %u KiB of heap in %u KiB; after %u more groups %u, %u, %u in %u", before.fds,
             before.threads, before.heap_kib, before.kib, more, now.fds, now.threads, now.heap_kib, now.kib);
    if (rc == 0 && (now.fds > before.fds || now.threads > before.threads ||
                    now.heap_kib > before.heap_kib + more * HEAP_KIB || now.kib > before.kib + more * RESIDENT_KIB))
        rc = ERR_LIMIT;
    party_say(p, "cycled", rc, 0, rc < 0 && rc != ERR_LIMIT ? err.text : text);
}

static void party_close(struct party *p, const uint32_t *who, uint32_t n)
{
    struct err err = {0};
    uint64_t begin = clock_now_ns();
    int rc = party_operation(p, who, n, p->play->ids[1], &err);
    party_say(p, "next", rc, clock_now_ns() - begin, err.text);
    if (p->play->place == NOWHERE)
        party_cycles(p);
    begin = clock_now_ns();
    rc = p->transport->health(p->transport, &err);
    p->transport->close(p->transport);
    party_say(p, "closed", rc, clock_now_ns() - begin, rc < 0 ? err.text : "");
    p->memory->release(p->memory, &p->small);
    p->memory->release(p->memory, &p->big);
    p->memory->release(p->memory, &p->bulk);
    p->memory->close(p->memory);
}

static void __attribute__((noreturn)) party_main(struct party *p)
{
    const struct play *play = p->play;
    struct err err = {0};
    party_open(p);
    party_say(p, "ready", 0, 0, transport_nccl_version(p->transport));
    party_wait(p);

    struct transport_group *group = NULL;
    struct renewing r;
    struct blob *id = blob_new(play->ids[0], 32);
    party_say(p, place_names[IN_CREATE], 0, 0, "");
    uint64_t begin = clock_now_ns(), bytes = 0;
    renewing_init(&r, CREATE_MS, false);
    int rc = p->transport->group_create(p->transport, id, play->members, play->n, p->self, &r.call, &group, &err);
    blob_unref(id);
    party_say(p, "created", rc, clock_now_ns() - begin, err.text);
    if (rc == 0) {
        party_say(p, place_names[IN_MOVE], 0, 0, "");
        begin = clock_now_ns();
        rc = party_bulk(p, group, &bytes, &err);
        party_say(p, "moved", rc, clock_now_ns() - begin, err.text);
    }
    party_say(p, place_names[IN_DESTROY], 0, 0, "");
    begin = clock_now_ns();
    p->transport->destroy(group);
    party_say(p, "destroyed", 0, clock_now_ns() - begin, "");

    uint32_t who[PARTIES_MAX], n = play->place == NOWHERE ? play->n : play->n - 1;
    for (uint32_t i = 0; i < n; i++)
        who[i] = i;
    party_wait(p);
    if (p->self < n)
        party_close(p, who, n);
    _exit(0);
}

/* ---- the parent ---- */

struct child {
    pid_t pid;
    int in, out; /* to it, from it */
    FILE *lines;
    char what[32], text[ERR_TEXT_MAX]; /* of the last line */
    int code;
    unsigned long long ms;
};

static int failures;

static void fail(const char *why, const struct child *c)
{
    failures++;
    printf("  FAILED: %s%s%s\n", why, c ? ": " : "", c ? c->text : "");
}

/* The next line of a child; false at its end, or after limit_ms. */
static bool child_line(struct child *c, uint64_t until_ns)
{
    char line[ERR_TEXT_MAX + 64];
    for (size_t at = 0; at < sizeof line - 1; at++) {
        uint64_t now = clock_now_ns();
        struct pollfd poll_fd = {.fd = c->out, .events = POLLIN};
        if (now >= until_ns || poll(&poll_fd, 1, (int)((until_ns - now) / MS) + 1) <= 0 ||
            read(c->out, &line[at], 1) != 1)
            return false;
        if (line[at] != '\n')
            continue;
        line[at] = '\0';
        c->text[0] = '\0';
        return sscanf(line, "%31s %d %llu %511[^\n]", c->what, &c->code, &c->ms, c->text) >= 3;
    }
    return false;
}

/* Reads on until the line `what`. */
static bool child_until(struct child *c, const char *what, uint64_t limit_ms)
{
    uint64_t until = clock_now_ns() + limit_ms * MS;
    while (child_line(c, until))
        if (strcmp(c->what, what) == 0 || strcmp(c->what, "died") == 0)
            return strcmp(c->what, what) == 0;
    return false;
}

static void play_open(struct play *play, const struct options *options, enum place place)
{
    *play = (struct play){.options = options, .place = place, .n = options->parties};
    struct err err = {0};
    if (getrandom(play->ids, sizeof play->ids, 0) != sizeof play->ids)
        exit(1);
    for (uint32_t i = 0; i < play->n; i++) {
        struct member *m = &play->members[i];
        snprintf(m->id, sizeof m->id, "gpu%u", i);
        m->incarnation = 1 + i;
        if (address_listen("127.0.0.1:0", 0, &play->listeners[i], m->data_address, &err) < 0) {
            printf("%s\n", err.text);
            exit(1);
        }
    }
}

static void children_start(struct play *play, struct child *children)
{
    int to[PARTIES_MAX][2], from[PARTIES_MAX][2];
    fflush(stdout);
    for (uint32_t i = 0; i < play->n; i++)
        if (pipe(to[i]) < 0 || pipe(from[i]) < 0)
            exit(1);
    for (uint32_t i = 0; i < play->n; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (uint32_t k = 0; k < play->n; k++) {
                close(to[k][1]);
                close(from[k][0]);
                if (k == i)
                    continue;
                close(to[k][0]);
                close(from[k][1]);
                close(play->listeners[k]);
            }
            struct party p = {.play = play, .self = i, .from_parent = to[i][0], .to_parent = from[i][1]};
            party_main(&p);
        }
        children[i] = (struct child){.pid = pid, .in = to[i][1], .out = from[i][0]};
    }
    for (uint32_t i = 0; i < play->n; i++) {
        close(to[i][0]);
        close(from[i][1]);
        close(play->listeners[i]);
    }
}

static void children_end(struct play *play, struct child *children)
{
    for (uint32_t i = 0; i < play->n; i++) {
        close(children[i].in);
        uint64_t until = clock_now_ns() + 5000 * MS;
        while (child_line(&children[i], until))
            ;
        kill(children[i].pid, SIGKILL);
        kill(children[i].pid, SIGCONT);
        waitpid(children[i].pid, NULL, 0);
        close(children[i].out);
    }
}

static void go(struct child *c)
{
    if (write(c->in, "g", 1) != 1)
        fail("a party is not there any more", NULL);
}

/* One party's outcome of the call that was hit. */
static void outcome_check(const struct play *play, struct child *c, uint32_t i, int sig, uint64_t since_ns)
{
    const char *victim = play->members[play->n - 1].id, *what = play->place == IN_CREATE ? "created" : "moved";
    uint64_t limit = (play->place == IN_CREATE ? CREATE_MS : STALL_MS) + ABORT_MS;
    if (!child_until(c, what, limit + 5000)) {
        fail("no answer", c);
        return;
    }
    uint64_t ms = (clock_now_ns() - since_ns) / MS;
    printf("  gpu%u: %-11s after %5llu ms: %s\n", i, c->code < 0 ? err_code_name(c->code) : "well",
           (unsigned long long)ms, c->text);
    if (c->code >= 0)
        fail("it did not notice (or was done before the signal)", NULL);
    else if (c->code != (sig == SIGKILL ? ERR_UNREACHABLE : ERR_TIMEOUT) || !strstr(c->text, victim))
        fail("not the right error", c);
    if (ms > (sig == SIGKILL ? 2000 : limit))
        fail("too late", NULL);
}

static void rest_check(struct child *children, uint32_t n, bool nowhere)
{
    for (uint32_t i = 0; i < n; i++)
        go(&children[i]);
    for (uint32_t i = 0; i < n; i++) {
        struct child *c = &children[i];
        if (!child_until(c, "next", 60000) || c->code < 0) {
            fail("the next operation", c);
            continue;
        }
        unsigned long long ms = c->ms;
        if (nowhere) {
            if (!child_until(c, "cycled", 120000) || c->code < 0)
                fail("the groups leave something behind", c);
            printf("  gpu%u: %s\n", i, c->text);
        }
        if (!child_until(c, "closed", 60000) || c->code < 0)
            fail("closing", c);
        printf("  gpu%u: next operation well in %llu ms, closed in %llu ms\n", i, ms, c->ms);
    }
}

struct took {
    uint64_t created_ms, moved_ms;
};

/* False when there is nothing to test on. */
static bool play_run(const struct options *options, enum place place, int sig, uint64_t delay_ms, struct took *ret_took)
{
    struct play play;
    struct child children[PARTIES_MAX];
    struct took took = {0};
    play_open(&play, options, place);
    children_start(&play, children);
    uint32_t survivors = place == NOWHERE ? play.n : play.n - 1;
    struct child *victim = &children[play.n - 1];
    for (uint32_t i = 0; i < play.n; i++) {
        if (child_until(&children[i], "ready", 120000))
            continue;
        int status = 0;
        printf("party %u cannot begin: %s\n", i, children[i].text);
        waitpid(children[i].pid, &status, strcmp(children[i].what, "died") == 0 ? 0 : WNOHANG);
        failures++;
        children_end(&play, children);
        return !WIFEXITED(status) || WEXITSTATUS(status) != SKIPPED;
    }
    printf("%s %s, %u parties, %s\n",
           sig == SIGKILL   ? "SIGKILL"
           : sig == SIGSTOP ? "SIGSTOP"
                            : "no signal",
           place_names[place], play.n, children[0].text);
    for (uint32_t i = 0; i < play.n; i++)
        go(&children[i]);
    if (place != NOWHERE) {
        if (!child_until(victim, place_names[place], 60000))
            fail("the victim does not get there", victim);
        if (delay_ms > 0)
            poll(NULL, 0, (int)delay_ms);
        uint64_t since = clock_now_ns();
        kill(victim->pid, sig);
        for (uint32_t i = 0; i < survivors && place != IN_DESTROY; i++)
            outcome_check(&play, &children[i], i, sig, since);
    }
    for (uint32_t i = 0; i < survivors && (place == NOWHERE || place == IN_DESTROY); i++) {
        struct child *c = &children[i];
        bool well = child_until(c, "created", 60000) && c->code == 0;
        took.created_ms = c->ms;
        well = well && child_until(c, "moved", 60000) && c->code == 0;
        printf("  gpu%u: created in %llu ms; %zu MiB each way in %llu ms, %.2f GB/s in\n", i,
               (unsigned long long)took.created_ms, options->mib / 2, c->ms,
               c->ms ? (double)(options->mib << 19) / 1e6 / (double)c->ms : 0.0);
        took.moved_ms = c->ms;
        if (!well)
            fail("not well", c);
    }
    for (uint32_t i = 0; i < survivors; i++)
        if (!child_until(&children[i], "destroyed", 20000) || children[i].ms > 500)
            fail("destroying waits", &children[i]);
    rest_check(children, survivors, place == NOWHERE);
    children_end(&play, children);
    if (ret_took)
        *ret_took = took;
    return true;
}

int main(int argc, char **argv)
{
    struct options o = {.parties = 3, .mib = 2048, .cycles = 13};
    bool only_cycles = false;
    signal(SIGPIPE, SIG_IGN);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--gpus") == 0)
            o.gpus = true;
        else if (strcmp(argv[i], "--parties") == 0 && i + 1 < argc)
            o.parties = (uint32_t)atoi(argv[++i]);
        else if (strcmp(argv[i], "--cycles") == 0 && i + 1 < argc)
            o.cycles = (uint32_t)atoi(argv[++i]), only_cycles = true;
        else if (strcmp(argv[i], "--mib") == 0 && i + 1 < argc)
            o.mib = (size_t)atoi(argv[++i]);
    }
    if (o.cycles < 4 || o.parties < 2 || o.parties > PARTIES_MAX || o.mib < 2) {
        fprintf(stderr, "usage: nccl_abort [--parties 2..%u] [--mib N] [--gpus] [--cycles 4..]\n", PARTIES_MAX);
        return 2;
    }
    struct took took = {0};
    if (!play_run(&o, NOWHERE, 0, 0, &took))
        return SKIPPED;
    for (int k = 0; k < 2 && !only_cycles; k++) {
        int sig = k == 0 ? SIGKILL : SIGSTOP;
        play_run(&o, IN_CREATE, sig, took.created_ms / 4, NULL);
        play_run(&o, IN_CREATE, sig, took.created_ms / 2, NULL);
        play_run(&o, IN_MOVE, sig, took.moved_ms / 3, NULL);
        play_run(&o, IN_DESTROY, sig, 0, NULL);
    }
    printf("%s\n", failures ? "nccl_abort: FAILED" : "nccl_abort: all well");
    return failures ? 1 : 0;
}
