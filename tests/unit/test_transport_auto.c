/* Two transports as one: who is served by which, over stand-ins (the bytes themselves are the contract suite's matter,
 * test_transport_gpu.c).  Every party is a thread. */
#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/address.h"
#include "common/clock.h"
#include "tests/harness/suite.h"
#include "tests/unit/transport_standin.h"

#define PARTIES_MAX 6
#define SLOT        4096

struct party {
    pthread_t thread;
    uint32_t self, n;
    const struct member *members;
    struct blob *id;
    struct standins standins;
    struct transport *transport;
    struct transport_group *group;
    uint8_t *memory; /* [n] slots: own bytes, and room for those of each other party */
    struct memory_region region;
    uint64_t bytes, arrived, progress;
    int rc;
    struct err err;
};
struct stage {
    uint32_t n;
    struct member members[PARTIES_MAX];
    struct party parties[PARTIES_MAX];
};

static void stage_open(struct stage *s, uint32_t n, const uint32_t *islands)
{
    *s = (struct stage){.n = n};
    for (uint32_t i = 0; i < n; i++) {
        struct party *p = &s->parties[i];
        int fd;
        *p = (struct party){.self = i, .n = n, .members = s->members};
        snprintf(s->members[i].id, sizeof s->members[i].id, "gpu%u", i);
        s->members[i].incarnation = i + 1;
        ck_assert_int_eq(address_listen("127.0.0.1:0", 0, &fd, s->members[i].data_address, &p->err), 0);
        p->transport = standins_open(&p->standins, islands[i], fd, &p->err);
        ck_assert_ptr_nonnull(p->transport);
        p->memory = calloc(n, SLOT);
        memset(p->memory + i * SLOT, (int)i + 1, SLOT);
        p->region = (struct memory_region){.base = p->memory, .bytes = n * SLOT, .mapped = n * SLOT, .fd = -1};
    }
    struct blob *id;
    struct transport *first = s->parties[0].transport;
    ck_assert_int_eq(first->group_id(first, &id, &s->parties[0].err), 0);
    for (uint32_t i = 0; i < n; i++)
        s->parties[i].id = blob_ref(id);
    blob_unref(id);
}

static void stage_close(struct stage *s)
{
    for (uint32_t i = 0; i < s->n; i++) {
        struct party *p = &s->parties[i];
        p->transport->destroy(p->group);
        p->transport->close(p->transport);
        ck_assert_uint_eq(p->standins.closed, 1);
        blob_unref(p->id);
        free(p->memory);
    }
}

static void together(struct stage *s, void *(*play)(void *party))
{
    for (uint32_t i = 0; i < s->n; i++)
        ck_assert_int_eq(pthread_create(&s->parties[i].thread, NULL, play, &s->parties[i]), 0);
    for (uint32_t i = 0; i < s->n; i++)
        pthread_join(s->parties[i].thread, NULL);
}

static void on_progress(void *user, uint64_t bytes)
{
    ((struct party *)user)->progress = bytes;
}

/* Item k of a party's list is what comes from party k (or goes to it): see items_make. */
static void on_arrived(void *user, size_t item, uint32_t extent, size_t offset, size_t len)
{
    struct party *p = user;
    (void)extent, (void)offset;
    if (item >= p->n) /* those of the second half are received */
        p->arrived += len;
}

static struct transport_call call_make(struct party *p)
{
    return (struct transport_call){.deadline_ns = clock_now_ns() + 10000000000u,
                                   .cancel_fd = -1,
                                   .progress = on_progress,
                                   .arrived = on_arrived,
                                   .user = p};
}

static void *play_create(void *party)
{
    struct party *p = party;
    struct transport_call call = call_make(p);
    p->rc = p->transport->group_create(p->transport, p->id, p->members, p->n, p->self, &call, &p->group, &p->err);
    return NULL;
}

/* Everybody's bytes to everybody. */
static void *play_move(void *party)
{
    struct party *p = party;
    struct transfer items[2 * PARTIES_MAX];
    struct transport_call call = call_make(p);
    for (uint32_t i = 0; i < p->n; i++) {
        items[i] = (struct transfer){.src = p->self, .dst = i, .n = i == p->self ? 0 : 1};
        items[i].from[0] = (struct extent){&p->region, p->self * SLOT, SLOT};
        items[p->n + i] = (struct transfer){.src = i, .dst = p->self, .n = i == p->self ? 0 : 1};
        items[p->n + i].to[0] = (struct extent){&p->region, i * SLOT, SLOT};
    }
    p->rc = p->transport->move(p->group, items, 2 * p->n, &call, &p->bytes, &p->err);
    return NULL;
}

START_TEST(both_serve_one_operation)
{
    static const uint32_t islands[] = {0, 1, 0, 2, 1, 0};
    struct stage s;
    stage_open(&s, 6, islands);
    together(&s, play_create);
    for (uint32_t i = 0; i < s.n; i++)
        ck_assert_msg(s.parties[i].rc == 0, "%s", s.parties[i].err.text);
    together(&s, play_move);
    for (uint32_t i = 0; i < s.n; i++) {
        const struct party *p = &s.parties[i];
        ck_assert_msg(p->rc == 0, "%s", p->err.text);
        ck_assert_uint_eq(p->bytes, 5 * SLOT);
        ck_assert_uint_eq(p->arrived, 5 * SLOT); /* items have the caller's numbers */
        for (uint32_t k = 0; k < s.n; k++)
            ck_assert_uint_eq(p->memory[k * SLOT + 5], k + 1);
        ck_assert_uint_eq(p->standins.near.groups, 1);
        ck_assert_uint_eq(p->standins.near.parties, islands[i] == 0 ? 3 : islands[i] == 1 ? 2 : 1);
        ck_assert_uint_eq(p->standins.far.parties, 6);
        ck_assert_uint_eq(p->standins.far_opened, 1);
    }
    stage_close(&s);
}
END_TEST

START_TEST(one_island_needs_no_far_transport)
{
    struct stage s;
    stage_open(&s, 3, (const uint32_t[]){4, 4, 4});
    for (uint32_t i = 0; i < s.n; i++)
        s.parties[i].standins.far_missing = true;
    together(&s, play_create);
    together(&s, play_move);
    for (uint32_t i = 0; i < s.n; i++) {
        ck_assert_msg(s.parties[i].rc == 0, "%s", s.parties[i].err.text);
        ck_assert_uint_eq(s.parties[i].standins.far_opened, 0);
    }
    stage_close(&s);
}
END_TEST

/* The number of the node is the operator's word: what claims to be another host is one. */
START_TEST(other_nodes_are_far)
{
    struct stage s;
    stage_open(&s, 2, (const uint32_t[]){4, 4});
    s.members[1].node = 7;
    together(&s, play_create);
    for (uint32_t i = 0; i < s.n; i++)
        ck_assert_uint_eq(s.parties[i].standins.far.groups, 1);
    stage_close(&s);
}
END_TEST

START_TEST(a_far_transport_that_is_missing_is_named_by_all_at_once)
{
    struct stage s;
    stage_open(&s, 3, (const uint32_t[]){0, 1, 1});
    s.parties[1].standins.far_missing = true;
    uint64_t begin = clock_now_ns();
    together(&s, play_create);
    ck_assert_uint_lt(clock_now_ns() - begin, 3000000000u); /* nobody waits for it until the deadline */
    for (uint32_t i = 0; i < s.n; i++) {
        const struct party *p = &s.parties[i];
        ck_assert_int_eq(p->rc, ERR_UNSUPPORTED);
        ck_assert_msg(strstr(p->err.text, i == 1 ? "libfar.so.2" : "party gpu1"), "%s", p->err.text);
        ck_assert_ptr_null(p->group);
    }
    s.parties[1].standins.far_missing = false; /* it was installed meanwhile */
    together(&s, play_create);
    for (uint32_t i = 0; i < s.n; i++)
        ck_assert_msg(s.parties[i].rc == 0, "%s", s.parties[i].err.text);
    stage_close(&s);
}
END_TEST

/* Large enough for several segments; the bytes cross to the other island once, though two there want them. */
enum { CAST_BYTES = (256 << 20) + 12345 };

static void *play_cast(void *party)
{
    struct party *p = party;
    static const uint8_t have[] = {TRANSPORT_HAS, TRANSPORT_ABSENT, TRANSPORT_WANTS, TRANSPORT_WANTS};
    struct transport_call call = call_make(p);
    struct extent all = {&p->region, 0, CAST_BYTES};
    p->rc = p->transport->broadcast(p->group, &all, 1, have, &call, &p->bytes, &p->err);
    return NULL;
}

START_TEST(a_broadcast_crosses_once)
{
    struct stage s;
    stage_open(&s, 4, (const uint32_t[]){0, 0, 1, 1});
    together(&s, play_create);
    for (uint32_t i = 0; i < s.n; i++) {
        struct party *p = &s.parties[i];
        free(p->memory);
        p->memory = malloc(CAST_BYTES);
        memset(p->memory, i == 0 ? 9 : 0, CAST_BYTES);
        p->region = (struct memory_region){.base = p->memory, .bytes = CAST_BYTES, .mapped = CAST_BYTES, .fd = -1};
    }
    together(&s, play_cast);
    for (uint32_t i = 0; i < s.n; i++) {
        const struct party *p = &s.parties[i];
        ck_assert_msg(p->rc == 0, "%s", p->err.text);
        ck_assert_uint_eq(p->bytes, i < 2 ? 0 : CAST_BYTES);
        ck_assert_uint_eq(p->memory[CAST_BYTES - 1], i == 1 ? 0 : 9);
        ck_assert_uint_eq(p->memory[77], i == 1 ? 0 : 9);
    }
    ck_assert_uint_ge(s.parties[3].progress, 256 << 20);
    stage_close(&s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("transport of two");
    TCase *t = tcase_create("auto");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, both_serve_one_operation);
    tcase_add_test(t, one_island_needs_no_far_transport);
    tcase_add_test(t, other_nodes_are_far);
    tcase_add_test(t, a_far_transport_that_is_missing_is_named_by_all_at_once);
    tcase_add_test(t, a_broadcast_crosses_once);
    suite_add_tcase(s, t);
    return suite_run(s);
}
