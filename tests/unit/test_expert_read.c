/* Experts read from other agents: the calls of a reader, against real links, and against one that misbehaves. */
#include <check.h>
#include <event2/thread.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent/expert_read.h"
#include "agent/peer_link.h"
#include "common/address.h"
#include "common/loop.h"
#include "tests/harness/suite.h"

static const struct rpc_identity reader = {.role = RPC_ROLE_PEER, .cluster = "west", .agent = "gpu0", .incarnation = 5, .software = "test"};

/* An agent's links in a thread of their own: expert 7 is `hello, world`, expert 8 is never answered, expert 9 answered when
 * the next read comes, others are not there. */
struct lender {
    struct event_base *base;
    struct rpc *rpc;
    struct peer_links *links;
    pthread_t thread;
    struct member member;
    uint64_t late;
    struct expert_read last;
};

static void lender_read(void *user, uint64_t id, const struct expert_read *read)
{
    struct lender *l = user;
    l->last = *read;
    if (l->late)
        peer_links_answer(l->links, l->late, ERR_STALE, "too late", NULL);
    l->late = read->expert == 9 ? id : 0;
    if (read->expert == 7) {
        struct blob *data = blob_new(&"hello, world"[read->offset], read->length);
        peer_links_answer(l->links, id, 0, NULL, data);
        blob_unref(data);
    } else if (read->expert < 8) {
        peer_links_answer(l->links, id, ERR_NOTFOUND, "it does not hold that expert", NULL);
    }
}

static void lender_wave(void *user, uint64_t epoch, uint64_t step)
{
    (void)user, (void)epoch, (void)step;
}

static void *lender_main(void *user)
{
    struct lender *l = user;
    event_base_loop(l->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static void lender_start(struct lender *l)
{
    static const struct rpc_identity self = {.role = RPC_ROLE_PEER, .cluster = "west", .agent = "gpu1", .incarnation = 6, .software = "test"};
    struct err err = {0};
    evthread_use_pthreads();
    *l = (struct lender){.base = event_base_new()};
    l->rpc = rpc_new(l->base);
    const struct peer_links_config config = {
        .base = l->base, .rpc = l->rpc, .listen = "127.0.0.1:0", .listen_fd = -1, .self = &self,
        .on_wave = lender_wave, .on_read = lender_read, .user = l};
    ck_assert_msg(peer_links_open(&config, &l->links, &err) == 0, "%s", err.text);
    l->member.incarnation = 6;
    strcpy(l->member.id, "gpu1");
    snprintf(l->member.address, sizeof l->member.address, "%s", peer_links_address(l->links));
    ck_assert_int_eq(pthread_create(&l->thread, NULL, lender_main, l), 0);
}

static void lender_stop(struct lender *l)
{
    event_base_loopbreak(l->base);
    pthread_join(l->thread, NULL);
    peer_links_close(l->links);
    rpc_free(l->rpc);
    loop_free(l->base);
    libevent_global_shutdown();
}

static int expert_sources_read(struct expert_sources *s, uint32_t i, const struct expert_read *read, void *ret_data, struct err *err)
{
    uint64_t call;
    int rc = expert_sources_begin(s, i, read, &call, err);
    return rc < 0 ? rc : expert_sources_end(s, i, call, read, ret_data, err);
}

static struct expert_sources *sources_of(const struct member *members, uint32_t n, bool (*cancelled)(void *))
{
    struct expert_sources *s;
    struct err err;
    const struct expert_sources_config config = {
        .self = &reader, .members = members, .n = n, .timeout_ms = 400, .cancelled = cancelled};
    ck_assert_int_eq(expert_sources_open(&config, &s, &err), 0);
    return s;
}

START_TEST(bytes_come_and_what_is_missing_is_said)
{
    struct lender l;
    struct err err;
    char text[16] = "";
    lender_start(&l);
    struct expert_sources *s = sources_of(&l.member, 1, NULL);
    struct expert_read read = {.manifest = 42, .slots = 4, .layer = 3, .expert = 7, .offset = 7, .length = 5, .memory_only = true};
    ck_assert_msg(expert_sources_read(s, 0, &read, text, &err) == 0, "%s", err.text);
    ck_assert_str_eq(text, "world");
    ck_assert(l.last.manifest == read.manifest && l.last.slots == read.slots && l.last.layer == read.layer &&
              l.last.expert == read.expert && l.last.offset == read.offset && l.last.length == read.length && l.last.memory_only);
    read.expert = 1;
    ck_assert_int_eq(expert_sources_read(s, 0, &read, text, &err), ERR_NOTFOUND);
    ck_assert_str_eq(err.text, "agent gpu1: it does not hold that expert");
    for (int i = 0; i < 100; i++) { /* which is no reason not to ask again */
        read.expert = i % 3 ? 7 : 1;
        ck_assert_int_eq(expert_sources_read(s, 0, &read, text, &err), i % 3 ? 0 : ERR_NOTFOUND);
    }
    read.expert = 7;
    uint64_t calls[EXPERT_READS_AHEAD];
    for (unsigned k = 0; k < EXPERT_READS_AHEAD; k++) { /* several under way */
        read.offset = 2 * k;
        ck_assert_int_eq(expert_sources_begin(s, 0, &read, &calls[k], &err), 0);
    }
    for (unsigned k = 0; k < EXPERT_READS_AHEAD; k++) {
        ck_assert_int_eq(expert_sources_end(s, 0, calls[k], &read, text, &err), 0);
        ck_assert_mem_eq(text, &"hello, world"[2 * k], 5);
    }
    read.length = EXPERT_READ_MAX + 1;
    ck_assert_int_eq(expert_sources_read(s, 0, &read, text, &err), ERR_INVALID);
    read.length = 0;
    ck_assert_int_eq(expert_sources_read(s, 0, &read, text, &err), ERR_INVALID);
    expert_sources_close(s);
    lender_stop(&l);
}
END_TEST

static bool always(void *user)
{
    (void)user;
    return true;
}

START_TEST(who_does_not_answer_is_asked_once)
{
    struct lender l;
    struct err err;
    char text[16];
    lender_start(&l);
    struct expert_sources *s = sources_of(&l.member, 1, NULL);
    const struct expert_read mute = {.expert = 8, .length = 4}, fine = {.expert = 7, .length = 4};
    ck_assert_int_eq(expert_sources_read(s, 0, &mute, text, &err), ERR_TIMEOUT);
    ck_assert_str_eq(err.text, "agent gpu1: no answer within 400 ms");
    ck_assert_int_eq(expert_sources_read(s, 0, &fine, text, &err), ERR_TIMEOUT);
    expert_sources_close(s);
    s = sources_of(&l.member, 1, always);
    ck_assert_int_eq(expert_sources_read(s, 0, &mute, text, &err), ERR_ABORTED);
    expert_sources_close(s);
    /* its caller is gone when the answer comes */
    const struct expert_read late = {.expert = 9, .length = 4};
    s = sources_of(&l.member, 1, NULL);
    ck_assert_int_eq(expert_sources_read(s, 0, &late, text, &err), ERR_TIMEOUT);
    expert_sources_close(s);
    usleep(100000);
    s = sources_of(&l.member, 1, NULL);
    ck_assert_int_eq(expert_sources_read(s, 0, &fine, text, &err), 0);
    expert_sources_close(s);
    lender_stop(&l);
}
END_TEST

START_TEST(nobody_there_and_another_cluster)
{
    struct lender l;
    struct err err;
    char text[16];
    int fd;
    struct member members[2] = {{.id = "gpu2", .incarnation = 1}};
    const struct expert_read fine = {.expert = 7, .length = 4};
    ck_assert_int_eq(address_listen("127.0.0.1:0", 0, &fd, members[0].address, &err), 0);
    close(fd);
    lender_start(&l);
    members[1] = l.member;
    struct expert_sources *s = sources_of(members, 2, NULL);
    ck_assert_int_eq(expert_sources_read(s, 0, &fine, text, &err), ERR_UNREACHABLE);
    ck_assert_ptr_nonnull(strstr(err.text, "agent gpu2: "));
    ck_assert_int_eq(expert_sources_read(s, 1, &fine, text, &err), 0);
    expert_sources_close(s);
    const struct rpc_identity stranger = {.role = RPC_ROLE_PEER, .cluster = "east", .agent = "gpu0", .incarnation = 5, .software = "t"};
    const struct expert_sources_config config = {.self = &stranger, .members = &l.member, .n = 1, .timeout_ms = 400};
    ck_assert_int_eq(expert_sources_open(&config, &s, &err), 0);
    ck_assert_int_lt(expert_sources_read(s, 0, &fine, text, &err), 0);
    ck_assert_ptr_nonnull(strstr(err.text, "cluster"));
    expert_sources_close(s);
    lender_stop(&l);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("expert_read");
    TCase *tc = tcase_create("expert_read");
    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, bytes_come_and_what_is_missing_is_said);
    tcase_add_test(tc, who_does_not_answer_is_asked_once);
    tcase_add_test(tc, nobody_there_and_another_cluster);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
