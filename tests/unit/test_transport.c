/* Transports: a contract suite that runs over a table of backends.  The parties are threads of this process. */
#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent/transport.h"
#include "common/address.h"
#include "common/clock.h"
#include "common/digest.h"
#include "tests/harness/suite.h"

#define PARTIES_MAX 8
#define MS          1000000ull

/* ---- backends ---- */

/* Opens the transport of one party and fills in where the others find it. */
struct backend {
    const char *name;
    struct transport *(*open)(uint32_t party, struct member *member);
};

static struct transport *host_open_at(const char *address, struct member *member)
{
    int fd;
    struct err err = {0};
    ck_assert_msg(address_listen(address, 0, &fd, member->data_address, &err) == 0, "%s", err.text);
    struct transport *t = transport_host_open(fd, &err);
    ck_assert_ptr_nonnull(t);
    return t;
}

static struct transport *host_tcp_open(uint32_t party, struct member *member)
{
    (void)party;
    return host_open_at("127.0.0.1:0", member);
}

static struct transport *host_unix_open(uint32_t party, struct member *member)
{
    char address[ADDRESS_MAX];
    snprintf(address, sizeof address, "unix:/tmp/eep-transport-%d-%u", (int)getpid(), party);
    return host_open_at(address, member);
}

static const struct backend backends[] = {{"host over tcp", host_tcp_open}, {"host over unix", host_unix_open}};
#define BACKENDS ((int)(sizeof backends / sizeof backends[0]))

/* ---- parties ---- */

struct farm;
struct party {
    struct farm *farm;
    uint32_t self;
    struct transport *transport;
    struct transport_group *group;
    struct memory_region region;
    int cancel_fd;
    unsigned delay_ms; /* before it begins */
    uint64_t timeout_ms;
    void (*play)(struct party *p);
    /* what play is about */
    const struct transfer *items;
    size_t n_items;
    const struct extent *extents;
    size_t n_extents;
    const uint8_t *have;
    uint64_t progress, progress_calls;
    int rc;
    uint64_t bytes;
    struct err err;
    pthread_t thread;
};
struct farm {
    uint32_t n;
    struct member members[PARTIES_MAX];
    struct party parties[PARTIES_MAX];
    struct blob *id;
};

static void farm_open(struct farm *f, const struct backend *backend, uint32_t n)
{
    memset(f, 0, sizeof *f);
    f->n = n;
    for (uint32_t i = 0; i < n; i++) {
        struct party *p = &f->parties[i];
        snprintf(f->members[i].id, sizeof f->members[i].id, "gpu%u", i);
        f->members[i].incarnation = 1000 + i;
        p->farm = f;
        p->self = i;
        p->transport = backend->open(i, &f->members[i]);
        p->cancel_fd = eventfd(0, EFD_CLOEXEC);
        p->timeout_ms = 10000;
    }
    ck_assert_int_eq(f->parties[0].transport->group_id(f->parties[0].transport, &f->id, NULL), 0);
}

static void farm_close(struct farm *f)
{
    for (uint32_t i = 0; i < f->n; i++) {
        struct party *p = &f->parties[i];
        p->transport->destroy(p->group);
        p->transport->close(p->transport);
        close(p->cancel_fd);
        free(p->region.base);
        if (strncmp(f->members[i].data_address, ADDRESS_UNIX, 5) == 0)
            unlink(f->members[i].data_address + 5);
    }
    blob_unref(f->id);
}

static void party_progress(void *user, uint64_t bytes)
{
    struct party *p = user;
    p->progress = bytes;
    p->progress_calls++;
}

static struct transport_call party_call(struct party *p)
{
    return (struct transport_call){
        .deadline_ns = clock_now_ns() + p->timeout_ms * MS,
        .cancel_fd = p->cancel_fd,
        .progress = party_progress,
        .user = p,
    };
}

static void play_create(struct party *p)
{
    struct transport_call call = party_call(p);
    p->rc = p->transport->group_create(p->transport, p->farm->id, p->farm->members, p->farm->n, p->self, &call,
                                       &p->group, &p->err);
}

static void play_move(struct party *p)
{
    struct transport_call call = party_call(p);
    p->rc = p->transport->move(p->group, p->items, p->n_items, &call, &p->bytes, &p->err);
}

static void play_broadcast(struct party *p)
{
    struct transport_call call = party_call(p);
    p->rc = p->transport->broadcast(p->group, p->extents, p->n_extents, p->have, &call, &p->bytes, &p->err);
}

static void play_vanish(struct party *p)
{
    p->transport->destroy(p->group);
    p->group = NULL;
    p->rc = 0;
}

static void play_nothing(struct party *p)
{
    p->rc = 0;
}

static void *party_main(void *arg)
{
    struct party *p = arg;
    if (p->delay_ms)
        poll(NULL, 0, (int)p->delay_ms);
    p->play(p);
    return NULL;
}

/* All parties do this at the same time; those with a play of their own do that. */
static void farm_play(struct farm *f, void (*play)(struct party *))
{
    for (uint32_t i = 0; i < f->n; i++) {
        if (!f->parties[i].play)
            f->parties[i].play = play;
        ck_assert_int_eq(pthread_create(&f->parties[i].thread, NULL, party_main, &f->parties[i]), 0);
    }
    for (uint32_t i = 0; i < f->n; i++) {
        pthread_join(f->parties[i].thread, NULL);
        f->parties[i].play = NULL;
        f->parties[i].delay_ms = 0;
    }
}

static void farm_all_ok(struct farm *f)
{
    for (uint32_t i = 0; i < f->n; i++)
        ck_assert_msg(f->parties[i].rc == 0, "party %u: %s", i, f->parties[i].err.text);
}

static void farm_connect(struct farm *f)
{
    farm_play(f, play_create);
    farm_all_ok(f);
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint32_t below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(random_next(state) % n);
}

/* Host memory stands in for regions here: what lies where is the memory suite's matter. */
static void party_memory(struct party *p, size_t bytes, uint64_t seed)
{
    free(p->region.base);
    p->region = (struct memory_region){.base = malloc(bytes + 1), .bytes = bytes, .mapped = bytes, .fd = -1};
    uint64_t state = seed * 0x9e3779b97f4a7c15ULL | 1;
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t word = random_next(&state);
        memcpy((uint8_t *)p->region.base + i, &word, bytes - i < sizeof word ? bytes - i : sizeof word);
    }
}

static size_t descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    size_t n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

/* ---- groups ---- */

START_TEST(parties_connect_in_any_order)
{
    struct farm f;
    uint64_t state = 77;
    for (uint32_t n = 1; n <= PARTIES_MAX; n += n < 3 ? 1 : 2) {
        farm_open(&f, &backends[_i], n);
        for (uint32_t i = 0; i < n; i++)
            f.parties[i].delay_ms = below(&state, 60);
        farm_connect(&f);
        farm_close(&f);
    }
}
END_TEST

START_TEST(group_ids_are_secrets)
{
    struct farm f;
    struct blob *other;
    farm_open(&f, &backends[_i], 1);
    ck_assert_uint_eq(f.id->len, 32);
    ck_assert_int_eq(f.parties[0].transport->group_id(f.parties[0].transport, &other, NULL), 0);
    ck_assert_int_ne(memcmp(f.id->data, other->data, 32), 0);
    blob_unref(other);
    farm_close(&f);
}
END_TEST

START_TEST(a_party_that_does_not_come_is_named)
{
    struct farm f;
    farm_open(&f, &backends[_i], 4);
    f.parties[2].play = play_nothing;
    for (uint32_t i = 0; i < 4; i++)
        f.parties[i].timeout_ms = 300;
    uint64_t begin = clock_now_ns();
    farm_play(&f, play_create);
    ck_assert_uint_lt(clock_now_ns() - begin, 3000 * MS);
    for (uint32_t i = 0; i < 4; i++) {
        if (i == 2)
            continue;
        ck_assert_int_eq(f.parties[i].rc, ERR_TIMEOUT);
        ck_assert_msg(strstr(f.parties[i].err.text, "gpu2") != NULL, "%s", f.parties[i].err.text);
        for (uint32_t k = 0; k < 4; k++)
            if (k != 2)
                ck_assert_msg(!strstr(f.parties[i].err.text, f.members[k].id), "%s", f.parties[i].err.text);
        ck_assert_ptr_null(f.parties[i].group);
    }
    /* What is left over of this attempt does not disturb the next one. */
    for (uint32_t i = 0; i < 4; i++)
        f.parties[i].timeout_ms = 10000;
    blob_unref(f.id);
    ck_assert_int_eq(f.parties[1].transport->group_id(f.parties[1].transport, &f.id, NULL), 0);
    farm_connect(&f);
    farm_close(&f);
}
END_TEST

static void play_create_with_other_id(struct party *p)
{
    struct blob *id = blob_new(p->farm->id->data, 32);
    id->data[p->self * 16] ^= 1;
    struct transport_call call = party_call(p);
    p->rc =
        p->transport->group_create(p->transport, id, p->farm->members, p->farm->n, p->self, &call, &p->group, &p->err);
    blob_unref(id);
}

START_TEST(another_group_id_does_not_get_in)
{
    /* The one who connects is wrong in the half that it shows, then the other one in the half that it answers. */
    for (uint32_t who = 0; who < 2; who++) {
        struct farm f;
        farm_open(&f, &backends[_i], 2);
        f.parties[who].play = play_create_with_other_id;
        f.parties[0].timeout_ms = f.parties[1].timeout_ms = 250;
        farm_play(&f, play_create);
        ck_assert_int_eq(f.parties[1 - who].rc, ERR_TIMEOUT); /* the one who knows the id lets nobody else in */
        ck_assert_ptr_null(f.parties[1 - who].group);
        farm_close(&f);
    }
}
END_TEST

START_TEST(an_older_incarnation_does_not_get_in)
{
    struct farm f, old;
    farm_open(&f, &backends[_i], 2);
    old = f;
    old.members[0].incarnation = 5; /* as party 0 knows itself, but nobody else */
    f.parties[0].farm = &old;
    f.parties[0].timeout_ms = f.parties[1].timeout_ms = 250;
    farm_play(&f, play_create);
    ck_assert_int_eq(f.parties[0].rc, ERR_TIMEOUT);
    ck_assert_int_eq(f.parties[1].rc, ERR_TIMEOUT);
    farm_close(&f);
}
END_TEST

static void play_cancel_first(struct party *p)
{
    poll(NULL, 0, 100);
    p->rc = eventfd_write(p->farm->parties[0].cancel_fd, 1);
}

START_TEST(creating_is_cancelled)
{
    struct farm f;
    farm_open(&f, &backends[_i], 2);
    f.parties[1].play = play_cancel_first;
    uint64_t begin = clock_now_ns();
    farm_play(&f, play_create);
    ck_assert_int_eq(f.parties[0].rc, ERR_ABORTED);
    ck_assert_uint_lt(clock_now_ns() - begin, 5000 * MS);
    farm_close(&f);
}
END_TEST

/* Whoever connects without knowing the group, or says nothing, or too little, is no hindrance. */
START_TEST(strangers_do_not_disturb)
{
    struct farm f;
    farm_open(&f, &backends[_i], 3);
    int fds[100];
    for (int i = 0; i < 100; i++) {
        uint8_t junk[200];
        memset(junk, i, sizeof junk);
        memcpy(junk, "EEPDATA1", 8);
        ck_assert_int_eq(address_connect(f.members[2].data_address, 1000, &fds[i], NULL), 0);
        ssize_t sent = send(fds[i], junk, (size_t)(i * 2), MSG_NOSIGNAL);
        ck_assert_int_eq(sent, i * 2);
    }
    f.parties[0].delay_ms = 50;
    farm_connect(&f);
    farm_close(&f);
    for (int i = 0; i < 100; i++)
        close(fds[i]);
}
END_TEST

/* Party 2 is in two groups, and the members of the second one knock while it still waits for the first. */
static void play_two_groups(struct party *p)
{
    struct transport_call call = party_call(p);
    struct farm *first = p->farm;
    const struct member *m = first->members;
    struct member ax[2] = {m[0], m[2]}, bx[2] = {m[1], m[2]};
    uint8_t second[32] = {42};
    struct blob *id = blob_new(second, 32);
    struct transport_group *a = NULL, *b = NULL;
    p->rc = 0;
    if (p->self != 1)
        p->rc = p->transport->group_create(p->transport, first->id, ax, 2, p->self == 2, &call, &a, &p->err);
    if (p->rc == 0 && p->self != 0)
        p->rc = p->transport->group_create(p->transport, id, bx, 2, p->self == 2, &call, &b, &p->err);
    p->transport->destroy(a);
    p->transport->destroy(b);
    blob_unref(id);
}

START_TEST(early_members_of_the_next_group_wait)
{
    struct farm f;
    farm_open(&f, &backends[_i], 3);
    f.parties[0].delay_ms = 150;
    farm_play(&f, play_two_groups);
    farm_all_ok(&f);
    farm_close(&f);
}
END_TEST

/* ---- moves ---- */

#define SLOTS      24
#define SLOT_BYTES 70001u /* two extents and no round numbers */

static void slot_extents(struct party *p, uint32_t slot, struct extent *ret_extents)
{
    ret_extents[0] = (struct extent){&p->region, (size_t)slot * SLOT_BYTES, 50000};
    ret_extents[1] = (struct extent){&p->region, (size_t)slot * SLOT_BYTES + 50000, SLOT_BYTES - 50000};
}

/* Random moves: the lower half of all slots are sources, the upper half destinations, each used once. */
static size_t moves_make(struct farm *f, uint64_t *state, struct transfer *items, uint32_t *src_slots,
                         uint32_t *dst_slots)
{
    size_t n = 0;
    for (uint32_t dst = 0; dst < f->n; dst++)
        for (uint32_t slot = SLOTS / 2; slot < SLOTS; slot++) {
            if (below(state, 4) == 0)
                continue;
            struct transfer t = {.src = below(state, f->n), .dst = dst, .n = 2};
            src_slots[n] = below(state, SLOTS / 2);
            dst_slots[n] = slot;
            slot_extents(&f->parties[t.src], src_slots[n], t.from);
            slot_extents(&f->parties[t.dst], dst_slots[n], t.to);
            items[n++] = t;
        }
    return n;
}

START_TEST(moves_arrive)
{
    static struct transfer items[PARTIES_MAX * SLOTS], own[PARTIES_MAX][PARTIES_MAX * SLOTS];
    static uint32_t src_slots[PARTIES_MAX * SLOTS], dst_slots[PARTIES_MAX * SLOTS];
    static uint8_t *expected[PARTIES_MAX];
    uint64_t state = 4711;
    struct farm f;
    for (uint32_t n = 1; n <= 5; n += 2) {
        farm_open(&f, &backends[_i], n);
        farm_connect(&f);
        for (uint32_t i = 0; i < n; i++) {
            party_memory(&f.parties[i], SLOTS * SLOT_BYTES, i + 1);
            expected[i] = malloc(SLOTS * SLOT_BYTES);
        }
        for (int call = 0; call < 4; call++) { /* the last one is empty for everybody */
            size_t n_items = call == 3 ? 0 : moves_make(&f, &state, items, src_slots, dst_slots);
            uint64_t bytes[PARTIES_MAX] = {0};
            for (uint32_t i = 0; i < n; i++)
                memcpy(expected[i], f.parties[i].region.base, SLOTS * SLOT_BYTES);
            for (size_t k = 0; k < n_items; k++) {
                memcpy(expected[items[k].dst] + dst_slots[k] * SLOT_BYTES,
                       (uint8_t *)f.parties[items[k].src].region.base + src_slots[k] * SLOT_BYTES, SLOT_BYTES);
                if (items[k].src != items[k].dst)
                    bytes[items[k].dst] += SLOT_BYTES;
            }
            for (uint32_t i = 0; i < n; i++) { /* each knows only its own side, and only its own items */
                struct party *p = &f.parties[i];
                p->n_items = 0;
                for (size_t k = 0; k < n_items; k++) {
                    struct transfer t = items[k];
                    if (t.src != i)
                        memset(t.from, 0, sizeof t.from);
                    if (t.dst != i)
                        memset(t.to, 0, sizeof t.to);
                    if (t.src == i || t.dst == i)
                        own[i][p->n_items++] = t;
                }
                p->items = own[i];
                p->delay_ms = below(&state, 20);
            }
            farm_play(&f, play_move);
            farm_all_ok(&f);
            for (uint32_t i = 0; i < n; i++) {
                ck_assert_int_eq(memcmp(f.parties[i].region.base, expected[i], SLOTS * SLOT_BYTES), 0);
                ck_assert_uint_eq(f.parties[i].bytes, bytes[i]);
            }
        }
        for (uint32_t i = 0; i < n; i++)
            free(expected[i]);
        farm_close(&f);
    }
}
END_TEST

/* What a party was told of one item: up to where in each extent, and the digest of those bytes at that moment. */
struct told {
    size_t at[2];
    uint64_t digest[2];
    bool bad;
};
static struct told told[PARTIES_MAX][PARTIES_MAX * SLOTS];

static void party_arrived(void *user, size_t item, uint32_t extent, size_t offset, size_t len)
{
    struct party *p = user;
    struct told *t = &told[p->self][item];
    const struct extent *to = &p->items[item].to[extent];
    t->bad |= p->items[item].dst != p->self || extent >= 2 || offset != t->at[extent] || len == 0 ||
              len > to->len - offset || offset % 8 != 0 || (len % 8 != 0 && offset + len != to->len);
    if (t->bad)
        return;
    t->at[extent] += len;
    t->digest[extent] += digest_bytes((uint8_t *)to->region->base + to->offset + offset, len, offset / 8);
}

static void play_move_told(struct party *p)
{
    struct transport_call call = party_call(p);
    call.arrived = party_arrived;
    p->rc = p->transport->move(p->group, p->items, p->n_items, &call, &p->bytes, &p->err);
}

START_TEST(what_comes_is_told_once_it_is_there)
{
    static struct transfer items[PARTIES_MAX * SLOTS];
    static uint32_t src_slots[PARTIES_MAX * SLOTS], dst_slots[PARTIES_MAX * SLOTS];
    uint64_t state = 42;
    struct farm f;
    farm_open(&f, &backends[_i], 3);
    farm_connect(&f);
    for (uint32_t i = 0; i < 3; i++)
        party_memory(&f.parties[i], SLOTS * SLOT_BYTES, i + 1);
    for (int call = 0; call < 3; call++) {
        size_t n = moves_make(&f, &state, items, src_slots, dst_slots);
        memset(told, 0, sizeof told);
        for (uint32_t i = 0; i < 3; i++) {
            f.parties[i].items = items;
            f.parties[i].n_items = n;
        }
        farm_play(&f, play_move_told);
        farm_all_ok(&f);
        for (uint32_t i = 0; i < 3; i++)
            for (size_t k = 0; k < n; k++)
                for (uint32_t e = 0; e < 2; e++) {
                    const struct extent *to = &items[k].to[e];
                    bool comes = items[k].dst == i && items[k].src != i;
                    ck_assert(!told[i][k].bad);
                    ck_assert_uint_eq(told[i][k].at[e], comes ? to->len : 0);
                    if (comes)
                        ck_assert_uint_eq(told[i][k].digest[e],
                                          digest_bytes((uint8_t *)to->region->base + to->offset, to->len, 0));
                }
    }
    farm_close(&f);
}
END_TEST

/* One large item from party 0 to 1. */
static void one_move(struct farm *f, struct transfer *t, size_t bytes)
{
    *t = (struct transfer){.src = 0, .dst = 1, .n = 1};
    for (uint32_t i = 0; i < f->n; i++) {
        party_memory(&f->parties[i], bytes, i + 1);
        f->parties[i].items = t;
        f->parties[i].n_items = 1;
    }
    t->from[0] = (struct extent){&f->parties[0].region, 0, bytes};
    t->to[0] = (struct extent){&f->parties[1].region, 0, bytes};
}

START_TEST(progress_is_reported_now_and_then)
{
    struct farm f;
    struct transfer t;
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    one_move(&f, &t, 16u << 20);
    farm_play(&f, play_move);
    farm_all_ok(&f);
    ck_assert_uint_ge(f.parties[1].progress_calls, 2);
    ck_assert_uint_le(f.parties[1].progress_calls, 16);
    ck_assert_uint_gt(f.parties[1].progress, 8u << 20);
    ck_assert_uint_ge(f.parties[0].progress_calls, 1); /* a sender lives, too */
    ck_assert_uint_eq(f.parties[0].progress, 0);
    farm_close(&f);
}
END_TEST

START_TEST(a_party_that_is_gone_is_named)
{
    for (uint32_t who = 0; who < 2; who++) {
        struct farm f;
        struct transfer t;
        farm_open(&f, &backends[_i], 3);
        farm_connect(&f);
        one_move(&f, &t, 16u << 20);
        f.parties[who].play = play_vanish;
        f.parties[who].delay_ms = 30;
        farm_play(&f, play_move);
        struct party *other = &f.parties[1 - who];
        ck_assert_int_eq(other->rc, ERR_UNREACHABLE);
        ck_assert_msg(strstr(other->err.text, f.members[who].id) != NULL, "%s", other->err.text);
        ck_assert_int_eq(f.parties[2].rc, 0); /* it had no part in it */
        play_move(other);
        ck_assert_int_eq(other->rc, ERR_INVALID);
        ck_assert_ptr_nonnull(strstr(other->err.text, "failed before"));
        farm_close(&f);
    }
}
END_TEST

START_TEST(a_party_that_stalls_is_named)
{
    for (uint32_t who = 0; who < 2; who++) {
        struct farm f;
        struct transfer t;
        farm_open(&f, &backends[_i], 2);
        farm_connect(&f);
        one_move(&f, &t, 16u << 20);
        f.parties[who].play = play_nothing;
        f.parties[1 - who].timeout_ms = 200;
        farm_play(&f, play_move);
        ck_assert_int_eq(f.parties[1 - who].rc, ERR_TIMEOUT);
        ck_assert_ptr_nonnull(strstr(f.parties[1 - who].err.text, f.members[who].id));
        ck_assert_ptr_nonnull(strstr(f.parties[1 - who].err.text, who == 0 ? "sends nothing" : "takes nothing"));
        farm_close(&f);
    }
}
END_TEST

START_TEST(moving_is_cancelled)
{
    struct farm f;
    struct transfer t;
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    one_move(&f, &t, 16u << 20);
    f.parties[1].play = play_cancel_first;
    farm_play(&f, play_move);
    ck_assert_int_eq(f.parties[0].rc, ERR_ABORTED);
    farm_close(&f);
}
END_TEST

/* A deadline that progress moves on: the transfer takes longer than the time-out, but never stands still so long. */
struct renewed {
    struct transport_call call;
    uint64_t timeout_ms;
};

static void renew(void *user, uint64_t bytes)
{
    (void)bytes;
    struct renewed *r = user;
    r->call.deadline_ns = clock_now_ns() + r->timeout_ms * MS;
}

static void play_move_renewed(struct party *p)
{
    struct renewed r = {.timeout_ms = 400};
    r.call = (struct transport_call){.cancel_fd = -1, .progress = renew, .user = &r};
    renew(&r, 0);
    p->rc = p->transport->move(p->group, p->items, p->n_items, &r.call, &p->bytes, &p->err);
}

/* Lets 2 MiB through every 100 ms. */
static void play_slow_relay(struct party *p)
{
    size_t part = 2u << 20;
    struct transfer t = *p->items;
    p->rc = 0;
    for (int i = 0; i < 8 && p->rc == 0; i++) {
        struct transport_call call = party_call(p);
        poll(NULL, 0, 100);
        t.from[0] = (struct extent){&p->region, (size_t)i * part, part};
        p->rc = p->transport->move(p->group, &t, 1, &call, &p->bytes, &p->err);
    }
}

static void play_receive_parts(struct party *p)
{
    size_t part = 2u << 20;
    struct renewed r = {.timeout_ms = 400};
    r.call = (struct transport_call){.cancel_fd = -1, .progress = renew, .user = &r};
    renew(&r, 0);
    struct transfer t = *p->items;
    p->rc = 0;
    for (int i = 0; i < 8 && p->rc == 0; i++) {
        t.to[0] = (struct extent){&p->region, (size_t)i * part, part};
        p->rc = p->transport->move(p->group, &t, 1, &r.call, &p->bytes, &p->err);
    }
}

START_TEST(progress_renews_the_deadline)
{
    struct farm f;
    struct transfer t;
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    one_move(&f, &t, 16u << 20);
    f.parties[0].play = play_slow_relay;
    f.parties[1].play = play_receive_parts;
    farm_play(&f, NULL);
    farm_all_ok(&f);
    ck_assert_int_eq(memcmp(f.parties[0].region.base, f.parties[1].region.base, 16u << 20), 0);
    f.parties[0].play = f.parties[1].play = play_move_renewed;
    farm_play(&f, NULL);
    farm_all_ok(&f);
    farm_close(&f);
}
END_TEST

START_TEST(different_plans_are_noticed)
{
    struct farm f;
    struct transfer t, shorter;
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    one_move(&f, &t, 1000);
    shorter = t;
    shorter.to[0].len = 999;
    f.parties[1].items = &shorter;
    farm_play(&f, play_move);
    ck_assert_int_eq(f.parties[1].rc, ERR_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(f.parties[1].err.text, "gpu0 sends 1000 bytes where the plan has 999"));
    farm_close(&f);

    /* a call that one side has not made */
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    one_move(&f, &t, 1000);
    f.parties[0].n_items = 0;
    play_move(&f.parties[0]);
    f.parties[0].n_items = 1;
    farm_play(&f, play_move);
    ck_assert_int_eq(f.parties[1].rc, ERR_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(f.parties[1].err.text, "gpu0 is at transfer 2"));
    farm_close(&f);

    farm_open(&f, &backends[_i], 1);
    farm_connect(&f);
    one_move(&f, &t, 10);
    farm_play(&f, play_move);
    ck_assert_int_eq(f.parties[0].rc, ERR_INVALID); /* party 1 of 1 */
    farm_close(&f);
}
END_TEST

/* ---- broadcasts ---- */

/* The bytes in three extents with gaps, in another order than they lie in memory. */
static void broadcast_once(struct farm *f, size_t bytes, uint32_t mask, uint64_t *state)
{
    static struct extent extents[PARTIES_MAX][3];
    uint8_t have[PARTIES_MAX];
    size_t a = bytes / 3, b = bytes / 2;
    for (uint32_t i = 0; i < f->n; i++) {
        struct party *p = &f->parties[i];
        have[i] = mask >> i & 1;
        party_memory(p, bytes + 20, have[i] ? 99 : i + 1);
        extents[i][0] = (struct extent){&p->region, b + 20, bytes - b};
        extents[i][1] = (struct extent){&p->region, 0, a};
        extents[i][2] = (struct extent){&p->region, a + 10, b - a};
        p->extents = extents[i];
        p->n_extents = 3;
        p->have = have;
        p->delay_ms = below(state, 5);
    }
    farm_play(f, play_broadcast);
    farm_all_ok(f);
    uint32_t sender = (uint32_t)__builtin_ctz(mask);
    for (uint32_t i = 0; i < f->n; i++) {
        ck_assert_uint_eq(f->parties[i].bytes, have[i] ? 0 : bytes);
        for (int k = 0; k < 3; k++)
            ck_assert_msg(memcmp((uint8_t *)f->parties[i].region.base + extents[i][k].offset,
                                 (uint8_t *)f->parties[sender].region.base + extents[i][k].offset,
                                 extents[i][k].len) == 0,
                          "party %u extent %d, mask %x, %zu bytes", i, k, mask, bytes);
    }
}

START_TEST(broadcasts_reach_everybody)
{
    static const size_t sizes[] = {0, 1, 100, 65536, 65537, 200000, 3000001};
    uint64_t state = 99;
    for (uint32_t n = 1; n <= PARTIES_MAX; n = n == 1 ? 2 : n == 2 ? 3 : n + 5) {
        struct farm f;
        farm_open(&f, &backends[_i], n);
        farm_connect(&f);
        uint32_t all = (1u << n) - 1;
        for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++) {
            broadcast_once(&f, sizes[k], 1u << below(&state, n), &state);
            broadcast_once(&f, sizes[k], all, &state);
            broadcast_once(&f, sizes[k], n > 1 ? all & ~(1u << below(&state, n)) : 1, &state);
            broadcast_once(&f, sizes[k], 1 + below(&state, all), &state);
        }
        farm_close(&f);
    }
}
END_TEST

START_TEST(every_mask_works)
{
    uint64_t state = 5;
    struct farm f;
    farm_open(&f, &backends[_i], 4);
    farm_connect(&f);
    for (uint32_t mask = 1; mask < 16; mask++)
        broadcast_once(&f, 500001, mask, &state);
    farm_close(&f);
}
END_TEST

START_TEST(a_broadcast_without_sender_is_refused)
{
    struct farm f;
    uint8_t have[2] = {0, 0};
    farm_open(&f, &backends[_i], 2);
    farm_connect(&f);
    f.parties[0].have = f.parties[1].have = have;
    farm_play(&f, play_broadcast);
    ck_assert_int_eq(f.parties[0].rc, ERR_INVALID);
    ck_assert_int_eq(f.parties[1].rc, ERR_INVALID);
    farm_close(&f);
}
END_TEST

START_TEST(no_descriptor_is_left_behind)
{
    size_t before = descriptors();
    for (int round = 0; round < 3; round++) {
        struct farm f;
        struct transfer t;
        farm_open(&f, &backends[_i], 3);
        farm_connect(&f);
        one_move(&f, &t, 100000);
        farm_play(&f, play_move);
        farm_all_ok(&f);
        for (uint32_t i = 0; i < 3; i++)
            play_vanish(&f.parties[i]);
        farm_close(&f);
    }
    ck_assert_uint_eq(descriptors(), before);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("transport");
    TCase *t = tcase_create("groups");
    tcase_set_timeout(t, 60);
    tcase_add_loop_test(t, parties_connect_in_any_order, 0, BACKENDS);
    tcase_add_loop_test(t, group_ids_are_secrets, 0, BACKENDS);
    tcase_add_loop_test(t, a_party_that_does_not_come_is_named, 0, BACKENDS);
    tcase_add_loop_test(t, another_group_id_does_not_get_in, 0, BACKENDS);
    tcase_add_loop_test(t, an_older_incarnation_does_not_get_in, 0, BACKENDS);
    tcase_add_loop_test(t, creating_is_cancelled, 0, BACKENDS);
    tcase_add_loop_test(t, strangers_do_not_disturb, 0, BACKENDS);
    tcase_add_loop_test(t, early_members_of_the_next_group_wait, 0, BACKENDS);
    tcase_add_loop_test(t, no_descriptor_is_left_behind, 0, BACKENDS);
    suite_add_tcase(s, t);
    t = tcase_create("moves");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, moves_arrive, 0, BACKENDS);
    tcase_add_loop_test(t, what_comes_is_told_once_it_is_there, 0, BACKENDS);
    tcase_add_loop_test(t, progress_is_reported_now_and_then, 0, BACKENDS);
    tcase_add_loop_test(t, a_party_that_is_gone_is_named, 0, BACKENDS);
    tcase_add_loop_test(t, a_party_that_stalls_is_named, 0, BACKENDS);
    tcase_add_loop_test(t, moving_is_cancelled, 0, BACKENDS);
    tcase_add_loop_test(t, progress_renews_the_deadline, 0, BACKENDS);
    tcase_add_loop_test(t, different_plans_are_noticed, 0, BACKENDS);
    suite_add_tcase(s, t);
    t = tcase_create("broadcasts");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, broadcasts_reach_everybody, 0, BACKENDS);
    tcase_add_loop_test(t, every_mask_works, 0, BACKENDS);
    tcase_add_loop_test(t, a_broadcast_without_sender_is_refused, 0, BACKENDS);
    suite_add_tcase(s, t);
    return suite_run(s);
}
