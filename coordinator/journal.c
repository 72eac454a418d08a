/* The journal: the LMDB environment, its lock, and the writer thread.  Records: coordinator/journal_records.c.
 *
 * `db` guards the environment: growing the map is allowed only while no transaction of this process is open.
 * `queue` guards the lists between the loop and the writer; it is never held during a transaction. */
#include "coordinator/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <lmdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "common/clock.h"
#include "common/topology.h"
#include "coordinator/journal_parts.h"
#include "coordinator/mdb_file.h"

#define BATCH_MAX 64
#define PATH_BYTES 4096
#define IDLE_S 2 /* who reads the history waits at most so long for the writer */

/* A write that is queued, and later its completion. */
struct entry {
    uint64_t seq;
    struct durable *durable;
    unsigned parts;
    int code;
    uint64_t submitted_ns, ended_ns;
    struct entry *prev, *next;
};

struct journal {
    int lock_fd, event_fd;
    MDB_env *env;
    MDB_dbi dbi;
    pthread_mutex_t db;
    struct err failed; /* code 0 = not; under db */

    pthread_mutex_t queue;
    pthread_cond_t more, idle; /* idle: nothing waits and nothing is being written */
    bool started, stop, writing;
    pthread_t writer;
    struct entry *waiting, *done;
    uint64_t took_ns; /* the loop's */
    uint64_t writing_since_ns;
};

static void entry_free(struct entry *entry)
{
    if (entry->durable) {
        durable_done(entry->durable);
        free(entry->durable);
    }
    free(entry);
}

/* ---- transactions; all under db ---- */

static int write_once(struct journal *j, const char *cluster, const struct journal_batch *batch, size_t n)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(j->env, NULL, 0, &txn);
    if (rc != 0)
        return rc;
    rc = cluster ? journal_put_cluster(txn, j->dbi, cluster) : journal_put(txn, j->dbi, batch, n);
    if (rc != 0) {
        mdb_txn_abort(txn);
        return rc;
    }
    return mdb_txn_commit(txn);
}

/* cluster, or batch: one synced transaction, in a map that grows as needed. */
static int journal_txn(struct journal *j, const char *cluster, const struct journal_batch *batch, size_t n,
                       struct err *err)
{
    if (j->failed.code != 0) {
        if (err)
            *err = j->failed;
        return j->failed.code;
    }
    int rc;
    while ((rc = write_once(j, cluster, batch, n)) == MDB_MAP_FULL) {
        rc = mdb_file_grow(j->env);
        if (rc != 0)
            break;
    }
    if (rc == 0)
        return 0;
    journal_mdb_err(&j->failed, rc, "a write has failed");
    if (err)
        *err = j->failed;
    return j->failed.code;
}

/* ---- opening ---- */

static int folder_sync(const char *path, struct err *err)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 || fsync(fd) < 0 ? err_set(err, ERR_IO, "cannot sync the folder %s: %s", path, strerror(errno)) : 0;
    if (fd >= 0)
        close(fd);
    return rc;
}

/* A new folder is itself on disk before anything in it is promised. */
static int folder_make(const char *dir, struct err *err)
{
    if (mkdir(dir, 0700) < 0)
        return errno == EEXIST ? 0 : err_set(err, ERR_IO, "cannot make the state folder %s: %s; --state names another one",
                                                     dir, strerror(errno));
    char copy[PATH_BYTES];
    snprintf(copy, sizeof copy, "%s", dir);
    return folder_sync(dirname(copy), err);
}

static int journal_lock(struct journal *j, const char *dir, struct err *err)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/journal.lock", dir);
    j->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (j->lock_fd < 0)
        return err_set(err, ERR_IO, "cannot write in the state folder, %s: %s; --state names another one", path,
                       strerror(errno));
    if (flock(j->lock_fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK
                   ? err_set(err, ERR_CONFLICT, "the state folder %s is in use by another coordinator", dir)
                   : err_set(err, ERR_IO, "cannot lock %s: %s", path, strerror(errno));
    return 0;
}

static int read_begin(struct journal *j, MDB_txn **ret_txn, struct err *err)
{
    int rc = mdb_txn_begin(j->env, NULL, MDB_RDONLY, ret_txn);
    return rc == 0 ? 0 : journal_mdb_err(err, rc, "cannot read");
}

static int cluster_check(struct journal *j, const char *dir, const char *cluster, struct err *err)
{
    MDB_txn *txn;
    char found[AGENT_ID_MAX];
    int rc = read_begin(j, &txn, err);
    if (rc < 0)
        return rc;
    rc = journal_get_cluster(txn, j->dbi, found, sizeof found, err);
    mdb_txn_abort(txn);
    if (rc == ERR_NOTFOUND)
        return journal_txn(j, cluster, NULL, 0, err);
    if (rc == 0 && strcmp(found, cluster) != 0)
        return err_set(err, ERR_CONFLICT, "the state folder %s belongs to cluster '%s', not '%s'", dir, found, cluster);
    return rc;
}

static void *writer_main(void *arg);

/* Signals are the loop thread's. */
static int writer_start(struct journal *j, struct err *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&j->writer, NULL, writer_main, j);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return err_set(err, ERR_NOMEM, "cannot start the journal's writer: %s", strerror(rc));
    j->started = true;
    return 0;
}

int journal_open(const char *dir, const char *cluster, struct journal **ret_journal, struct err *err)
{
    if (strlen(dir) > PATH_BYTES - 32 || strlen(cluster) >= AGENT_ID_MAX)
        return err_set(err, ERR_INVALID, "the path of the state folder or the name of the cluster is too long");
    struct journal *j = calloc(1, sizeof *j);
    if (!j)
        return err_set(err, ERR_NOMEM, "no memory for the journal");
    j->lock_fd = -1;
    pthread_mutex_init(&j->db, NULL);
    pthread_mutex_init(&j->queue, NULL);
    pthread_cond_init(&j->more, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&j->idle, &attributes);
    pthread_condattr_destroy(&attributes);
    j->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = j->event_fd < 0 ? err_set(err, ERR_NOMEM, "eventfd: %s", strerror(errno)) : 0;
    if (rc == 0)
        rc = folder_make(dir, err);
    if (rc == 0)
        rc = journal_lock(j, dir, err);
    if (rc == 0)
        rc = mdb_file_open(dir, "journal.mdb", 0, &j->env, &j->dbi, err);
    if (rc == 0)
        rc = cluster_check(j, dir, cluster, err);
    if (rc == 0)
        rc = writer_start(j, err);
    if (rc < 0) {
        journal_close(j);
        return rc;
    }
    *ret_journal = j;
    return 0;
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    if (j->started) {
        pthread_mutex_lock(&j->queue);
        j->stop = true;
        pthread_cond_signal(&j->more);
        pthread_mutex_unlock(&j->queue);
        pthread_join(j->writer, NULL);
    }
    struct entry *entry, *next;
    DL_FOREACH_SAFE(j->done, entry, next) entry_free(entry);
    if (j->env)
        mdb_env_close(j->env);
    if (j->event_fd >= 0)
        close(j->event_fd);
    if (j->lock_fd >= 0)
        close(j->lock_fd);
    pthread_cond_destroy(&j->more);
    pthread_cond_destroy(&j->idle);
    pthread_mutex_destroy(&j->queue);
    pthread_mutex_destroy(&j->db);
    free(j);
}

/* ---- reading, and writing at once ---- */

int journal_load(struct journal *j, struct durable *ret_durable, bool *ret_found, struct err *err)
{
    MDB_txn *txn;
    pthread_mutex_lock(&j->db);
    int rc = read_begin(j, &txn, err);
    if (rc == 0) {
        rc = journal_get(txn, j->dbi, ret_durable, ret_found, err);
        mdb_txn_abort(txn);
    }
    pthread_mutex_unlock(&j->db);
    return rc;
}

int journal_history(struct journal *j, unsigned max, bool (*each)(void *user, const struct op_record *record),
                    void *user, struct err *err)
{
    MDB_txn *txn;
    struct timespec until;
    int late = 0;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_S;
    pthread_mutex_lock(&j->queue);
    while (j->started && (j->waiting || j->writing) && late == 0)
        late = pthread_cond_timedwait(&j->idle, &j->queue, &until);
    pthread_mutex_unlock(&j->queue);
    if (late)
        return err_set(err, ERR_TIMEOUT, "the journal has been writing for %d s, its disk is slow or stuck: ask again later",
                       IDLE_S);
    pthread_mutex_lock(&j->db);
    int rc = read_begin(j, &txn, err);
    if (rc == 0) {
        rc = journal_get_history(txn, j->dbi, max, each, user, err);
        mdb_txn_abort(txn);
    }
    pthread_mutex_unlock(&j->db);
    return rc;
}

int journal_write(struct journal *j, const struct durable *durable, unsigned parts, struct err *err)
{
    struct journal_batch batch = {.durable = durable, .parts = parts};
    pthread_mutex_lock(&j->db);
    int rc = journal_txn(j, NULL, &batch, 1, err);
    pthread_mutex_unlock(&j->db);
    return rc;
}

/* ---- the writer ---- */

int journal_submit(struct journal *j, uint64_t seq, struct durable *durable, unsigned parts, struct err *err)
{
    struct entry *entry = calloc(1, sizeof *entry);
    if (!entry) {
        durable_done(durable);
        free(durable);
        return err_set(err, ERR_NOMEM, "no memory to queue a write of the journal");
    }
    entry->seq = seq;
    entry->durable = durable;
    entry->parts = parts;
    entry->submitted_ns = clock_now_ns();
    pthread_mutex_lock(&j->queue);
    DL_APPEND(j->waiting, entry);
    pthread_cond_signal(&j->more);
    pthread_mutex_unlock(&j->queue);
    return 0;
}

/* Writes what waits, at most BATCH_MAX at once, in one transaction.  Called and returns with queue locked. */
static void writer_batch(struct journal *j)
{
    struct entry *entries[BATCH_MAX];
    struct journal_batch batch[BATCH_MAX];
    size_t n = 0;
    while (j->waiting && n < BATCH_MAX) {
        struct entry *entry = j->waiting;
        DL_DELETE(j->waiting, entry);
        entries[n] = entry;
        batch[n++] = (struct journal_batch){.durable = entry->durable, .parts = entry->parts};
    }
    j->writing = true;
    j->writing_since_ns = clock_now_ns();
    pthread_mutex_unlock(&j->queue);
    pthread_mutex_lock(&j->db);
    int code = journal_txn(j, NULL, batch, n, NULL);
    pthread_mutex_unlock(&j->db);
    uint64_t ended_ns = clock_now_ns();
    for (size_t i = 0; i < n; i++) {
        durable_done(entries[i]->durable);
        free(entries[i]->durable);
        entries[i]->durable = NULL;
        entries[i]->code = code;
        entries[i]->ended_ns = ended_ns;
    }
    pthread_mutex_lock(&j->queue);
    j->writing = false;
    if (!j->waiting)
        pthread_cond_signal(&j->idle);
    for (size_t i = 0; i < n; i++)
        DL_APPEND(j->done, entries[i]);
    ssize_t ignored = write(j->event_fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)ignored; /* fails only when the counter is full: readable all the same */
}

static void *writer_main(void *arg)
{
    struct journal *j = arg;
    pthread_mutex_lock(&j->queue);
    for (;;) {
        if (j->waiting)
            writer_batch(j);
        else if (j->stop)
            break;
        else
            pthread_cond_wait(&j->more, &j->queue);
    }
    pthread_mutex_unlock(&j->queue);
    return NULL;
}

int journal_fd(const struct journal *j)
{
    return j->event_fd;
}

bool journal_completed(struct journal *j, uint64_t *ret_seq, int *ret_code, struct err *err)
{
    pthread_mutex_lock(&j->queue);
    struct entry *entry = j->done;
    if (entry)
        DL_DELETE(j->done, entry);
    if (!j->done) {
        uint64_t count;
        ssize_t ignored = read(j->event_fd, &count, sizeof count);
        (void)ignored; /* not readable: it is clear already */
    }
    pthread_mutex_unlock(&j->queue);
    if (!entry)
        return false;
    if (entry->code != 0 && err) {
        pthread_mutex_lock(&j->db);
        *err = j->failed;
        pthread_mutex_unlock(&j->db);
    }
    *ret_seq = entry->seq;
    *ret_code = entry->code;
    j->took_ns = entry->ended_ns - entry->submitted_ns;
    entry_free(entry);
    return true;
}

uint64_t journal_writing_ns(struct journal *j, uint64_t now_ns)
{
    pthread_mutex_lock(&j->queue);
    uint64_t ns = j->writing && now_ns > j->writing_since_ns ? now_ns - j->writing_since_ns : 0;
    pthread_mutex_unlock(&j->queue);
    return ns;
}

uint64_t journal_took_ns(const struct journal *j)
{
    return j->took_ns;
}
