/* The state record: encoded and decoded, cut and turned over at any byte, and kept in memory that a kill may find half
 * written; and the way of a descriptor into a store and out of it again. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/keep.h"
#include "agent/record.h"
#include "agent/record_memory.h"
#include "common/msg.h"
#include "tests/harness/suite.h"

static struct view *view_of(uint64_t epoch, uint32_t n, uint64_t version)
{
    struct view *view = view_new(n);
    view->epoch = epoch;
    view->kv_bytes = NO_LIMIT;
    for (uint32_t i = 0; i < n; i++) {
        snprintf(view->members[i].id, sizeof view->members[i].id, "gpu%u", i);
        view->members[i].incarnation = 100 + i;
        view->members[i].serving = true;
    }
    view->map = expert_map_new(2, 4, n, 3);
    view->map->version = version;
    for (size_t i = 0; i < (size_t)2 * n * 3; i++) {
        view->map->held[i] = (int32_t)(i % 5) - 1;
        view->map->live[i] = view->map->held[i] >= 0;
    }
    return view;
}

/* A rank that has promised, before a flip. */
static void record_make(struct agent_record *r)
{
    memset(r, 0, sizeof *r);
    r->incarnation = 101;
    strcpy(r->id, "gpu1");
    r->held = r->engine = true;
    r->lease_ms = 3000;
    r->heartbeat_ms = 500;
    r->indoubt_ms = 30000;
    r->seen_epoch = 9;
    r->applied_epoch = 7;
    r->flipped_epoch = 5;
    r->flipped_hold_ns = 11;
    r->map_rank = 1;
    r->map_step = 12;
    r->map_unacked = 13;
    r->map_flip = 14;
    r->promise.epoch = 9;
    r->promise.limit = 21;
    r->promise.next = 20;
    r->promise.wave = 3;
    r->promise.kind = FLIP_VIEW;
    r->promise.engine = PROMISE_RUNNING;
    r->flip.epoch = 7;
    r->flip.step = 15;
    r->flip.wave = 2;
    r->flip.next_step = 15;
    r->flip.op = 4;
    r->flip.kind = FLIP_VIEW;
    r->run_to = 16;
    r->revoked = 6;
    r->attachment = 2;
    r->op = 5;
    r->torn_epoch = 6;
    strcpy(r->why, "step 3 failed");
    r->view = view_of(7, 3, 14);
    r->before = view_of(5, 2, 9);
    r->map = expert_map_ref(r->view->map);
    r->model = model_new(2, 4, 3, 1);
    r->model->manifest = blob_new("manifest", 8);
    r->model->manifest_digest = 77;
    r->model->expert_digest[5] = 55;
}

struct encoded {
    struct record_bytes parts[RECORD_PARTS];
};

static void encode(const struct agent_record *r, struct encoded *ret)
{
    struct err err;
    for (int i = 0; i < RECORD_PARTS; i++) {
        uint8_t *data;
        ck_assert_int_eq(agent_record_encode(r, (enum record_part)i, &data, &ret->parts[i].len, &err), 0);
        ret->parts[i].data = data;
    }
}

static void encoded_done(struct encoded *e)
{
    for (int i = 0; i < RECORD_PARTS; i++)
        free((void *)(uintptr_t)e->parts[i].data);
}

/* Everything but the references is the same byte by byte; those lead to the same. */
static void records_equal(const struct agent_record *a, const struct agent_record *b)
{
    ck_assert_mem_eq(a, b, offsetof(struct agent_record, view));
    ck_assert_uint_eq(a->view->epoch, b->view->epoch);
    ck_assert_uint_eq(expert_map_digest(a->view->map), expert_map_digest(b->view->map));
    ck_assert_uint_eq(expert_map_digest(a->map), expert_map_digest(b->map));
    ck_assert_uint_eq(a->map->version, b->map->version);
    ck_assert(view_same_members(a->before, b->before));
    ck_assert_uint_eq(a->model->manifest_digest, b->model->manifest_digest);
    ck_assert_mem_eq(a->model->expert_digest, b->model->expert_digest, 8 * sizeof(uint64_t));
}

START_TEST(it_comes_back_as_it_was)
{
    struct agent_record r, back;
    struct encoded e;
    struct err err = {.text = ""};
    record_make(&r);
    encode(&r, &e);
    ck_assert_msg(agent_record_decode(e.parts, &back, &err) == 0, "%s", err.text);
    records_equal(&r, &back);
    agent_record_done(&back);
    encoded_done(&e);
    agent_record_done(&r);
}
END_TEST

START_TEST(nonsense_is_refused)
{
    struct agent_record r, back;
    struct err err;
    for (int i = 0; i < 9; i++) {
        struct encoded e;
        record_make(&r);
        switch (i) {
        case 0: r.incarnation = 0; break;
        case 1: r.id[0] = '\0'; break;
        case 2: r.map_rank = 2; break;
        case 3: r.applied_epoch = 6; break;
        case 4: r.promise.epoch = 7; break;
        case 5: r.promise.kind = 9; break;
        case 6: r.flip.leaver = true; break;
        case 7: r.seen_epoch = 8; break;
        default:
            model_unref(r.model);
            r.model = NULL;
        }
        encode(&r, &e);
        ck_assert_msg(agent_record_decode(e.parts, &back, &err) == ERR_CORRUPT, "case %d was accepted", i);
        encoded_done(&e);
        agent_record_done(&r);
    }
}
END_TEST

/* Any byte turned over, any length cut: decoded to something valid, or refused; never more. */
START_TEST(any_byte_may_be_wrong)
{
    struct agent_record r, back;
    struct err err;
    struct encoded e;
    record_make(&r);
    encode(&r, &e);
    unsigned seed = 1, refused = 0;
    for (int n = 0; n < 20000; n++) {
        int i = rand_r(&seed) % RECORD_PARTS;
        struct record_bytes good = e.parts[i];
        uint8_t *copy = malloc(good.len);
        memcpy(copy, good.data, good.len);
        size_t at = (size_t)rand_r(&seed) % good.len;
        copy[at] ^= (uint8_t)(1 + rand_r(&seed) % 255);
        e.parts[i] = (struct record_bytes){copy, n % 3 ? good.len : at};
        if (agent_record_decode(e.parts, &back, &err) == 0)
            agent_record_done(&back);
        else
            refused++;
        e.parts[i] = good;
        free(copy);
    }
    ck_assert_uint_gt(refused, 5000);
    encoded_done(&e);
    agent_record_done(&r);
}
END_TEST

/* ---- memory ---- */

static struct record_memory *memory_again(const struct record_memory *m)
{
    struct record_memory *again;
    struct err err = {.text = ""};
    ck_assert_msg(record_memory_adopt(dup(record_memory_fd(m)), "eep", "host", &again, &err) == 0, "%s", err.text);
    return again;
}

static uint64_t *head_of(const struct record_memory *m, int copy)
{
    void *at = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, record_memory_fd(m), 0);
    ck_assert_ptr_ne(at, MAP_FAILED);
    return (uint64_t *)at + (1 + copy) * 512; /* checksum, seq, ... */
}

START_TEST(the_newest_whole_copy_counts)
{
    struct record_memory *m, *again;
    struct agent_record r, back;
    struct err err;
    ck_assert_int_eq(record_memory_new("eep", "host", &m, &err), 0);
    again = memory_again(m);
    ck_assert_int_eq(record_memory_read(again, &back, &err), ERR_NOTFOUND);
    record_memory_close(again);
    record_make(&r);
    for (uint64_t run_to = 100; run_to < 105; run_to++) {
        r.run_to = run_to;
        ck_assert_int_eq(record_memory_write(m, &r, &err), 0);
    }
    uint64_t *first = head_of(m, 0), *second = head_of(m, 1);
    uint64_t *newest = first[1] > second[1] ? first : second, seq = newest[1];
    ck_assert_int_eq(record_memory_write(m, &r, &err), 0); /* unchanged: nothing is written */
    ck_assert_uint_eq(newest[1], seq);
    again = memory_again(m);
    ck_assert_int_eq(record_memory_read(again, &back, &err), 0);
    records_equal(&r, &back);
    agent_record_done(&back);
    r.run_to = 105; /* and the next process goes on with it */
    ck_assert_int_eq(record_memory_write(again, &r, &err), 0);
    newest = first[1] > second[1] ? first : second;
    ck_assert_uint_eq(newest[1], seq + 1);
    record_memory_close(again);
    newest[0] = 0; /* killed in the middle of a write: the other copy */
    again = memory_again(m);
    ck_assert_int_eq(record_memory_read(again, &back, &err), 0);
    ck_assert_uint_eq(back.run_to, 104);
    agent_record_done(&back);
    record_memory_close(again);
    newest[0] = 12345; /* no kill does that */
    again = memory_again(m);
    ck_assert_int_eq(record_memory_read(again, &back, &err), ERR_CORRUPT);
    record_memory_close(again);
    record_memory_close(m);
    agent_record_done(&r);
}
END_TEST

START_TEST(of_another_cluster_or_memory_it_means_nothing)
{
    struct record_memory *m, *again;
    struct err err;
    ck_assert_int_eq(record_memory_new("eep", "host", &m, &err), 0);
    ck_assert_int_eq(record_memory_adopt(dup(record_memory_fd(m)), "other", "host", &again, &err), ERR_CONFLICT);
    ck_assert_int_eq(record_memory_adopt(dup(record_memory_fd(m)), "eep", "cuda:1", &again, &err), ERR_CONFLICT);
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    ck_assert_int_eq(record_memory_adopt(fd, "eep", "host", &again, &err), ERR_CORRUPT);
    record_memory_close(m);
}
END_TEST

/* A process that does nothing but write, killed at any moment: what it leaves is one of the states that it wrote.  It reads
 * first, as an agent does: only so does it know which copy is the good one. */
START_TEST(a_kill_at_any_moment_leaves_a_whole_record)
{
    struct record_memory *m;
    struct err err;
    unsigned seed = 3;
    ck_assert_int_eq(record_memory_new("eep", "host", &m, &err), 0);
    for (int k = 0; k < 60; k++) {
        pid_t pid = fork();
        if (pid == 0) {
            struct record_memory *mine = memory_again(m);
            struct agent_record r;
            int read = record_memory_read(mine, &r, &err);
            if (read == 0)
                agent_record_done(&r);
            else if (read != ERR_NOTFOUND)
                _exit(1);
            record_make(&r);
            for (uint64_t n = 1;; n++) {
                r.run_to = r.map_step = n;
                if (n % 3 == 0) {
                    view_unref(r.before);
                    r.before = view_of(5, 2 + (uint32_t)(n % 4), n);
                }
                if (record_memory_write(mine, &r, &err) < 0)
                    _exit(1);
            }
        }
        usleep(2000 + (useconds_t)rand_r(&seed) % 3000);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        struct record_memory *again = memory_again(m);
        struct agent_record back;
        int rc = record_memory_read(again, &back, &err);
        ck_assert_msg(rc == 0 || (rc == ERR_NOTFOUND && k == 0), "kill %d: %s", k, err.text);
        if (rc == 0) {
            ck_assert_uint_eq(back.run_to, back.map_step);
            agent_record_done(&back);
        }
        record_memory_close(again);
    }
    record_memory_close(m);
}
END_TEST

START_TEST(without_a_store_nothing_is_kept)
{
    struct err err;
    unsetenv("NOTIFY_SOCKET");
    unsetenv("FDSTORE");
    struct keep *keep = keep_open();
    ck_assert(!keep_active(keep));
    ck_assert_int_eq(keep_push(keep, "record", 0, &err), 0);
    ck_assert_int_eq(keep_take(keep, "record"), -1);
    keep_remove_all(keep, "");
    keep_close(keep);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("record");
    TCase *tc = tcase_create("record");
    tcase_add_test(tc, it_comes_back_as_it_was);
    tcase_add_test(tc, nonsense_is_refused);
    tcase_add_test(tc, any_byte_may_be_wrong);
    tcase_add_test(tc, the_newest_whole_copy_counts);
    tcase_add_test(tc, of_another_cluster_or_memory_it_means_nothing);
    tcase_add_test(tc, a_kill_at_any_moment_leaves_a_whole_record);
    tcase_add_test(tc, without_a_store_nothing_is_kept);
    tcase_set_timeout(tc, 60);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
