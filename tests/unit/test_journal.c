/* The journal: every part there and back, group commit, damage that is found by name, two coordinators on one state,
 * and kill -9 of a process that was told its writes are durable. */
#include <check.h>
#include <fcntl.h>
#include <lmdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/journal.h"
#include "tests/harness/suite.h"

static char dir[64];

static void setup(void)
{
    strcpy(dir, "/tmp/eep-journal-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    strcat(dir, "/state"); /* made by journal_open */
}

static void teardown(void)
{
    static const char *const files[] = {"/journal.mdb", "/journal.mdb-lock", "/journal.lock", ""};
    char path[128];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s%s", dir, files[i]);
        remove(path);
    }
    *strrchr(dir, '/') = '\0';
    ck_assert_int_eq(rmdir(dir), 0); /* nothing else was left there */
}

static struct journal *open_ok(void)
{
    struct journal *j;
    struct err err = {0};
    int rc = journal_open(dir, "test", &j, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
    return j;
}

static struct durable load_ok(struct journal *j, bool want_found)
{
    struct durable d;
    struct err err = {0};
    bool found;
    int rc = journal_load(j, &d, &found, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
    ck_assert_int_eq(found, want_found);
    return d;
}

static struct member member_make(unsigned i)
{
    struct member m = {.incarnation = i + 1, .node = i};
    snprintf(m.id, sizeof m.id, "gpu%u", i);
    snprintf(m.address, sizeof m.address, "h:%u", i);
    return m;
}

static struct view *view_make(uint32_t n, uint64_t epoch)
{
    struct view *view = view_new(n);
    view->epoch = epoch;
    for (uint32_t i = 0; i < n; i++)
        view->members[i] = member_make(i);
    view->map = expert_map_new(2, 3, n, 2);
    view->map->version = 4;
    for (uint32_t i = 0; i < 2 * n * 2; i++)
        view->map->held[i] = (int32_t)(i % 3), view->map->live[i] = i % 2;
    return view;
}

static void op_make(struct op_record *op, uint64_t id, uint32_t outcome)
{
    *op = (struct op_record){.op = id,
                             .kind = OP_SCALE_UP,
                             .outcome = outcome,
                             .target = 3,
                             .flip = FLIP_VIEW,
                             .epoch = 9,
                             .key = "my key",
                             .why = "because",
                             .n = 3,
                             .n_old = 2,
                             .started_ms = 100,
                             .ended_ms = 200,
                             .bytes = 300,
                             .hold_ns_max = 400};
    op->parties = calloc(3, sizeof *op->parties);
    op->stays = calloc(3, 1);
    for (unsigned i = 0; i < 3; i++) {
        op->parties[i] = member_make(i);
        op->stays[i] = i != 1;
    }
}

static struct durable durable_make(void)
{
    struct durable d = {.epoch = 10, .map_version = 5, .op = 7};
    d.view = view_make(3, 8);
    op_make(&d.open, 7, OUTCOME_RUNNING);
    d.commit = (struct commit_record){
        .epoch = 8, .op = 6, .step = 1000, .wave = 11, .kind = FLIP_VIEW, .settled = true, .n_old = 2};
    d.commit.view = view_make(3, 8);
    d.commit.old = calloc(2, sizeof *d.commit.old);
    d.commit.old[0] = member_make(0);
    d.commit.old[1] = member_make(5);
    d.model = model_new(2, 3, 2, 1);
    d.model->manifest = blob_new("m", 1);
    d.model->manifest_digest = 77;
    d.model->expert_digest[5] = 55;
    d.model->dense_digest[0] = 44;
    op_make(&d.ended, 6, OUTCOME_DONE);
    return d;
}

static void same_op(const struct op_record *a, const struct op_record *b)
{
    ck_assert_uint_eq(a->op, b->op);
    ck_assert_uint_eq(a->kind, b->kind);
    ck_assert_uint_eq(a->outcome, b->outcome);
    ck_assert_uint_eq(a->target, b->target);
    ck_assert_uint_eq(a->flip, b->flip);
    ck_assert_uint_eq(a->epoch, b->epoch);
    ck_assert_str_eq(a->key, b->key);
    ck_assert_str_eq(a->why, b->why);
    ck_assert_uint_eq(a->n, b->n);
    ck_assert_uint_eq(a->n_old, b->n_old);
    ck_assert_mem_eq(a->stays, b->stays, a->n);
    for (uint32_t i = 0; i < a->n; i++)
        ck_assert_str_eq(a->parties[i].id, b->parties[i].id);
    ck_assert_uint_eq(a->started_ms, b->started_ms);
    ck_assert_uint_eq(a->ended_ms, b->ended_ms);
    ck_assert_uint_eq(a->bytes, b->bytes);
    ck_assert_uint_eq(a->hold_ns_max, b->hold_ns_max);
}

static void same_view(const struct view *a, const struct view *b)
{
    ck_assert_ptr_nonnull(b);
    ck_assert_uint_eq(a->epoch, b->epoch);
    ck_assert(view_same_members(a, b));
    ck_assert_uint_eq(a->map->version, b->map->version);
    ck_assert_uint_eq(expert_map_digest(a->map), expert_map_digest(b->map));
}

static void same_durable(const struct durable *a, const struct durable *b)
{
    ck_assert_uint_eq(a->epoch, b->epoch);
    ck_assert_uint_eq(a->map_version, b->map_version);
    ck_assert_uint_eq(a->op, b->op);
    same_view(a->view, b->view);
    same_op(&a->open, &b->open);
    ck_assert_uint_eq(a->commit.epoch, b->commit.epoch);
    ck_assert_uint_eq(a->commit.op, b->commit.op);
    ck_assert_uint_eq(a->commit.step, b->commit.step);
    ck_assert_uint_eq(a->commit.wave, b->commit.wave);
    ck_assert_uint_eq(a->commit.kind, b->commit.kind);
    ck_assert_uint_eq(a->commit.settled, b->commit.settled);
    same_view(a->commit.view, b->commit.view);
    ck_assert_uint_eq(a->commit.n_old, b->commit.n_old);
    ck_assert_str_eq(a->commit.old[1].id, b->commit.old[1].id);
    ck_assert_uint_eq(a->model->manifest_digest, b->model->manifest_digest);
    ck_assert_uint_eq(a->model->expert_digest[5], b->model->expert_digest[5]);
    ck_assert_uint_eq(a->model->dense_digest[0], b->model->dense_digest[0]);
}

START_TEST(there_and_back)
{
    struct journal *j = open_ok();
    struct durable none = load_ok(j, false), d = durable_make();
    ck_assert_uint_eq(none.epoch, 0);
    ck_assert_int_eq(journal_write(j, &d, DURABLE_ALL, NULL), 0);
    journal_close(j);
    j = open_ok();
    struct durable got = load_ok(j, true);
    same_durable(&d, &got);
    ck_assert_uint_eq(got.ended.op, 0); /* history is not state */
    durable_done(&got);

    /* Only the named parts are written, and what is no more is removed. */
    d.epoch = 20;
    d.map_version = 50;
    durable_done(&d);
    d = (struct durable){.epoch = 20, .map_version = 50, .op = 8};
    ck_assert_int_eq(journal_write(j, &d, DURABLE_META | DURABLE_OP, NULL), 0);
    got = load_ok(j, true);
    ck_assert_uint_eq(got.epoch, 20);
    ck_assert_uint_eq(got.open.op, 0);
    ck_assert_ptr_nonnull(got.view);
    ck_assert_ptr_nonnull(got.model);
    durable_done(&got);
    ck_assert_int_eq(journal_write(j, &d, DURABLE_VIEW | DURABLE_COMMIT | DURABLE_MODEL, NULL), 0);
    got = load_ok(j, true);
    ck_assert(!got.view && !got.model && got.commit.epoch == 0);
    durable_done(&got);
    journal_close(j);
}
END_TEST

START_TEST(one_coordinator_and_one_cluster)
{
    struct journal *j = open_ok(), *second;
    struct err err = {0};
    ck_assert_int_eq(journal_open(dir, "test", &second, &err), ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "in use by another coordinator"));
    journal_close(j);
    ck_assert_int_eq(journal_open(dir, "other", &second, &err), ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "'test', not 'other'"));
    journal_close(open_ok());
    ck_assert_int_eq(journal_open("/nowhere/at/all", "test", &second, &err), ERR_IO);
}
END_TEST

struct history {
    unsigned n;
    uint64_t op[JOURNAL_HISTORY_MAX + 10];
};

static bool history_add(void *user, const struct op_record *record)
{
    struct history *h = user;
    ck_assert_str_eq(record->key, "my key");
    h->op[h->n++] = record->op;
    return true;
}

static bool history_stop(void *user, const struct op_record *record)
{
    history_add(user, record);
    return false;
}

START_TEST(history)
{
    static struct history h;
    struct journal *j = open_ok();
    ck_assert_int_eq(journal_history(j, 10, history_add, &h, NULL), 0);
    ck_assert_uint_eq(h.n, 0);
    const uint64_t total = JOURNAL_HISTORY_MAX + 25;
    for (uint64_t op = 1; op <= total; op++) { /* queued, or it would be one sync each */
        struct durable *d = calloc(1, sizeof *d);
        d->op = op;
        op_make(&d->ended, op, OUTCOME_ABORTED);
        ck_assert_int_eq(journal_submit(j, op, d, DURABLE_META | DURABLE_HISTORY, NULL), 0);
    }
    journal_close(j);
    j = open_ok();
    struct durable got = load_ok(j, true);
    ck_assert_uint_eq(got.op, total);
    durable_done(&got);
    memset(&h, 0, sizeof h);
    ck_assert_int_eq(journal_history(j, UINT32_MAX, history_add, &h, NULL), 0);
    ck_assert_uint_eq(h.n, JOURNAL_HISTORY_MAX);
    for (uint64_t i = 0; i < h.n; i++)
        ck_assert_uint_eq(h.op[i], total - i);
    memset(&h, 0, sizeof h);
    ck_assert_int_eq(journal_history(j, 3, history_add, &h, NULL), 0);
    ck_assert_uint_eq(h.n, 3);
    memset(&h, 0, sizeof h);
    ck_assert_int_eq(journal_history(j, 3, history_stop, &h, NULL), 0);
    ck_assert_uint_eq(h.n, 1);
    journal_close(j);
}
END_TEST

/* Waits for one completion. */
static int completed(struct journal *j, uint64_t *ret_seq, struct err *err)
{
    int code;
    while (!journal_completed(j, ret_seq, &code, err)) {
        struct pollfd p = {.fd = journal_fd(j), .events = POLLIN};
        ck_assert_int_eq(poll(&p, 1, 5000), 1);
    }
    return code;
}

START_TEST(completions_in_order)
{
    struct journal *j = open_ok();
    const uint64_t n = 300;
    for (uint64_t seq = 1; seq <= n; seq++) {
        struct durable *d = calloc(1, sizeof *d);
        d->epoch = seq;
        if (seq % 2)
            op_make(&d->ended, seq, OUTCOME_DONE);
        unsigned parts = seq % 2 ? DURABLE_META | DURABLE_HISTORY : DURABLE_META;
        ck_assert_int_eq(journal_submit(j, seq, d, parts, NULL), 0);
    }
    for (uint64_t seq = 1; seq <= n; seq++) {
        uint64_t got = 0;
        ck_assert_int_eq(completed(j, &got, NULL), 0);
        ck_assert_uint_eq(got, seq);
    }
    uint64_t seq;
    int code;
    ck_assert(!journal_completed(j, &seq, &code, NULL));
    struct pollfd p = {.fd = journal_fd(j), .events = POLLIN};
    ck_assert_int_eq(poll(&p, 1, 0), 0);
    struct durable got = load_ok(j, true);
    ck_assert_uint_eq(got.epoch, n);
    static struct history h;
    ck_assert_int_eq(journal_history(j, UINT32_MAX, history_add, &h, NULL), 0);
    ck_assert_uint_eq(h.n, n / 2); /* a batch keeps every one of them */
    journal_close(j);
}
END_TEST

/* More than the first size of the map. */
START_TEST(map_grows)
{
    struct journal *j = open_ok();
    struct durable d = {.epoch = 1};
    d.model = model_new(1, 1, 1, 0);
    d.model->manifest = blob_new(NULL, 40 << 20);
    memset(d.model->manifest->data, 0x5a, 40 << 20);
    struct err err = {0};
    int rc = journal_write(j, &d, DURABLE_META | DURABLE_MODEL, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
    journal_close(j);
    j = open_ok();
    struct durable got = load_ok(j, true);
    ck_assert_uint_eq(got.model->manifest->len, 40 << 20);
    ck_assert_int_eq(got.model->manifest->data[(40 << 20) - 1], 0x5a);
    durable_done(&got);
    ck_assert_int_eq(journal_write(j, &d, DURABLE_META | DURABLE_MODEL, &err), 0);
    durable_done(&d);
    journal_close(j);
}
END_TEST

/* After a failed write nothing more is written, and every later one says so. */
START_TEST(write_errors_stick)
{
    struct journal *j = open_ok();
    struct durable *d = calloc(1, sizeof *d);
    d->epoch = 1;
    ck_assert_int_eq(journal_submit(j, 1, d, DURABLE_META, NULL), 0);
    uint64_t seq;
    struct err err = {0};
    ck_assert_int_eq(completed(j, &seq, &err), 0);
    /* Descriptors of the data file become read-only behind LMDB's back. */
    char path[128], link[64], target[256];
    snprintf(path, sizeof path, "%s/journal.mdb", dir);
    int replaced = 0, null = open("/dev/full", O_RDWR | O_CLOEXEC);
    ck_assert_int_ge(null, 0);
    for (int fd = 3; fd < 64; fd++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof target - 1);
        target[n > 0 ? n : 0] = '\0';
        if (strcmp(target, path) == 0)
            replaced += dup2(null, fd) == fd;
    }
    close(null);
    ck_assert_int_gt(replaced, 0);
    for (uint64_t i = 2; i <= 3; i++) {
        d = calloc(1, sizeof *d);
        d->epoch = i;
        ck_assert_int_eq(journal_submit(j, i, d, DURABLE_META, NULL), 0);
        ck_assert_int_eq(completed(j, &seq, &err), ERR_IO);
        ck_assert_uint_eq(seq, i);
        ck_assert_ptr_nonnull(strstr(err.text, "a write has failed"));
    }
    struct durable now = {.epoch = 4};
    ck_assert_int_eq(journal_write(j, &now, DURABLE_META, &err), ERR_IO);
    journal_close(j);
    j = open_ok();
    struct durable got = load_ok(j, true);
    ck_assert_uint_eq(got.epoch, 1);
    journal_close(j);
}
END_TEST

/* ---- damage ---- */

static void env_open(MDB_env **ret_env, MDB_txn **ret_txn, MDB_dbi *ret_dbi)
{
    char path[128];
    snprintf(path, sizeof path, "%s/journal.mdb", dir);
    ck_assert_int_eq(mdb_env_create(ret_env), 0);
    ck_assert_int_eq(mdb_env_open(*ret_env, path, MDB_NOSUBDIR, 0600), 0);
    ck_assert_int_eq(mdb_txn_begin(*ret_env, NULL, 0, ret_txn), 0);
    ck_assert_int_eq(mdb_dbi_open(*ret_txn, NULL, 0, ret_dbi), 0);
}

/* Changes the stored value of a key: flips one byte at `at` (from the end if negative), or deletes it. */
static void damage(const char *key, long at, bool remove_it)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    env_open(&env, &txn, &dbi);
    MDB_val k = {strlen(key), (void *)key}, v;
    if (remove_it) {
        ck_assert_int_eq(mdb_del(txn, dbi, &k, NULL), 0);
    } else {
        ck_assert_int_eq(mdb_get(txn, dbi, &k, &v), 0);
        uint8_t *copy = malloc(v.mv_size);
        memcpy(copy, v.mv_data, v.mv_size);
        copy[at < 0 ? (long)v.mv_size + at : at] ^= 0x10;
        v.mv_data = copy;
        ck_assert_int_eq(mdb_put(txn, dbi, &k, &v, 0), 0);
        free(copy);
    }
    ck_assert_int_eq(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

static void load_refused(int want, const char *why)
{
    struct journal *j = open_ok();
    struct durable d;
    bool found;
    struct err err = {0};
    ck_assert_int_eq(journal_load(j, &d, &found, &err), want);
    ck_assert_msg(strstr(err.text, why) != NULL, "'%s' does not say '%s'", err.text, why);
    journal_close(j);
}

START_TEST(damage_is_found_by_name)
{
    static const char *const keys[] = {"meta", "view", "op", "commit", "model", "history/0000000000000001"};
    static const long places[] = {0, 8, 16, -1};
    struct durable d = durable_make();
    struct journal *j = open_ok();
    ck_assert_int_eq(journal_write(j, &d, DURABLE_ALL, NULL), 0);
    journal_close(j);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        for (size_t k = 0; k < sizeof places / sizeof *places; k++) {
            char why[64];
            snprintf(why, sizeof why, "'%s'", keys[i]);
            damage(keys[i], places[k], false);
            load_refused(ERR_CORRUPT, why);
            damage(keys[i], places[k], false); /* and back */
        }
    }
    j = open_ok();
    struct durable got = load_ok(j, true);
    same_durable(&d, &got);
    durable_done(&got);
    journal_close(j);

    damage("cluster", -1, false);
    struct err err = {0};
    ck_assert_int_eq(journal_open(dir, "test", &j, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "'cluster'"));
    damage("cluster", -1, false);
    damage("meta", 0, true);
    load_refused(ERR_CORRUPT, "'meta' is missing");
    durable_done(&d);
}
END_TEST

/* A whole record under another key of the same kind. */
START_TEST(mix_ups_are_found)
{
    struct journal *j = open_ok();
    for (uint64_t op = 1; op <= 2; op++) {
        struct durable d = {.op = op};
        op_make(&d.ended, op, OUTCOME_DONE);
        ck_assert_int_eq(journal_write(j, &d, DURABLE_META | DURABLE_HISTORY, NULL), 0);
        op_record_done(&d.ended);
    }
    journal_close(j);
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    env_open(&env, &txn, &dbi);
    static char first[] = "history/0000000000000001", second[] = "history/0000000000000002";
    MDB_val from = {strlen(first), first}, to = {strlen(second), second}, v;
    ck_assert_int_eq(mdb_get(txn, dbi, &from, &v), 0);
    char copy[1024];
    ck_assert_uint_le(v.mv_size, sizeof copy);
    memcpy(copy, v.mv_data, v.mv_size);
    v.mv_data = copy;
    ck_assert_int_eq(mdb_put(txn, dbi, &to, &v, 0), 0);
    ck_assert_int_eq(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    load_refused(ERR_CORRUPT, second);
}
END_TEST

/* Counters that are behind what was recorded with them would be used again. */
START_TEST(counters_behind)
{
    struct durable d = durable_make();
    static const char *const names[] = {"epoch", "map_version", "op"};
    for (int i = 0; i < 3; i++) {
        struct durable bad = d;
        bad.epoch = i == 0 ? 7 : 10;
        bad.map_version = i == 1 ? 3 : 5;
        bad.op = i == 2 ? 6 : 7;
        struct journal *j = open_ok();
        ck_assert_int_eq(journal_write(j, &bad, DURABLE_ALL & ~(unsigned)DURABLE_HISTORY, NULL), 0);
        journal_close(j);
        load_refused(ERR_CORRUPT, names[i]);
    }
    durable_done(&d);
}
END_TEST

/* ---- kill -9 ---- */

/* Writes epochs 1, 2, 3 ... with a view of the same epoch, and tells through the pipe what is durable. */
static void write_forever(int out)
{
    struct journal *j;
    struct durable found;
    bool any;
    if (journal_open(dir, "test", &j, NULL) < 0 || journal_load(j, &found, &any, NULL) < 0)
        _exit(1);
    for (uint64_t epoch = found.epoch + 1;; epoch++) {
        struct durable *d = calloc(1, sizeof *d);
        d->epoch = epoch;
        d->map_version = 4;
        d->view = view_make(2, epoch);
        op_make(&d->ended, epoch, OUTCOME_DONE);
        d->op = epoch;
        unsigned parts = DURABLE_META | DURABLE_VIEW | DURABLE_HISTORY;
        if (journal_submit(j, epoch, d, parts, NULL) < 0)
            _exit(1);
        if (epoch % 4)
            continue; /* four to a batch, as they fall */
        for (int i = 0; i < 4;) {
            uint64_t seq;
            int code;
            struct pollfd p = {.fd = journal_fd(j), .events = POLLIN};
            if (!journal_completed(j, &seq, &code, NULL)) {
                poll(&p, 1, -1);
                continue;
            }
            if (code != 0 || write(out, &seq, sizeof seq) != sizeof seq)
                _exit(1);
            i++;
        }
    }
}

static bool history_count(void *user, const struct op_record *record)
{
    uint64_t *expect = user;
    ck_assert_uint_eq(record->op, *expect);
    --*expect;
    return *expect > 0;
}

START_TEST(kill_9)
{
    uint64_t acknowledged = 0;
    for (int round = 0; round < 10; round++) {
        int fds[2];
        ck_assert_int_eq(pipe(fds), 0);
        pid_t child = fork();
        if (child == 0) {
            close(fds[0]);
            write_forever(fds[1]);
        }
        close(fds[1]);
        uint64_t before = acknowledged;
        /* Some writes, then death at any moment. */
        for (int i = 0; i < 8 + round; i++)
            ck_assert_int_eq(read(fds[0], &acknowledged, sizeof acknowledged), sizeof acknowledged);
        usleep((useconds_t)round * 137);
        kill(child, SIGKILL);
        while (read(fds[0], &acknowledged, sizeof acknowledged) == sizeof acknowledged)
            ;
        close(fds[0]);
        int status;
        ck_assert_int_eq(waitpid(child, &status, 0), child);
        ck_assert(WIFSIGNALED(status));
        ck_assert_uint_gt(acknowledged, before);

        struct journal *j = open_ok();
        struct durable d = load_ok(j, true);
        ck_assert_uint_ge(d.epoch, acknowledged);
        ck_assert_uint_eq(d.view->epoch, d.epoch); /* all parts of a write, or none */
        uint64_t expect = d.epoch;
        ck_assert_int_eq(journal_history(j, JOURNAL_HISTORY_MAX, history_count, &expect, NULL), 0);
        /* The child goes on in steps of four from here. */
        d.epoch = acknowledged = (d.epoch + 3) / 4 * 4;
        for (uint64_t op = d.op + 1; op <= d.epoch; op++) {
            op_make(&d.ended, op, OUTCOME_DONE);
            ck_assert_int_eq(journal_write(j, &d, DURABLE_META | DURABLE_HISTORY, NULL), 0);
            op_record_done(&d.ended);
        }
        durable_done(&d);
        journal_close(j);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("journal");
    TCase *tc = tcase_create("journal");
    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, there_and_back);
    tcase_add_test(tc, one_coordinator_and_one_cluster);
    tcase_add_test(tc, history);
    tcase_add_test(tc, completions_in_order);
    tcase_add_test(tc, map_grows);
    tcase_add_test(tc, write_errors_stick);
    tcase_add_test(tc, damage_is_found_by_name);
    tcase_add_test(tc, mix_ups_are_found);
    tcase_add_test(tc, counters_behind);
    tcase_add_test(tc, kill_9);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
