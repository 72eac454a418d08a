/* The store's durable keys on disk.  `queue` guards the lists between the loop and the writer; it is never held during
 * a transaction.  The environment is the writer's alone once it runs.
 *
 * A commit writes pages, flushes them, and writes the page that makes them valid, which has to be flushed as well.  With
 * MDB_NOMETASYNC LMDB leaves that second flush to whatever flush comes next: to that of the next commit when there is one,
 * which saves it, or to one of its own when nobody else writes.  Until then the batch is *settling*, and not reported. */
#include "coordinator/store_disk.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <utlist.h>

#include "common/clock.h"
#include "common/digest.h"
#include "coordinator/mdb_file.h"

#define FILE_NAME "store.mdb"
#define RECORD_VERSION 1
#define RECORD_HEADER 24
/* Keys in the file: what they are, then their name. */
#define KEY_VALUE 'k'
#define KEY_REQUEST 'r'
#define KEY_REVISION 'v' /* one: revisions of the next start begin here */
/* Revisions are not written one by one: a start begins so far ahead that none is used twice. */
#define REVISION_AHEAD ((uint64_t)1 << 32)

struct waiting {
    struct store_batch batch;
    struct waiting *prev, *next;
};

struct store_disk {
    MDB_env *env;
    MDB_dbi dbi;
    int event_fd;
    uint64_t revision_next; /* as written, of the next start; the writer's */

    pthread_mutex_t queue;
    pthread_cond_t more;
    bool started, stop;
    pthread_t writer;
    struct waiting *waiting, *writing; /* oldest first; writing: in the transaction now */
    uint64_t settling, settling_first; /* committed and not flushed: its last batch, 0 = none; its first revision */
    bool settles;                      /* commits have to settle (STORE_FSYNC) */
    size_t waiting_bytes;
    uint64_t done; /* number of the last batch on disk */
    uint64_t busy_since_ns; /* the writer is at a transaction or a flush; 0: it waits */
    struct err failed;
};

int store_durability_parse(const char *text, enum store_durability *ret_durability)
{
    static const char *const names[] = {"fsync", "os", "none"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i]) == 0) {
            *ret_durability = (enum store_durability)i;
            return 0;
        }
    }
    return ERR_INVALID;
}

/* ---- records ---- */

static uint64_t checksum(uint64_t version, uint64_t revision, const char *key, size_t key_len, const void *data,
                         size_t len)
{
    uint64_t head[3] = {version, revision, key_len};
    return digest_bytes(head, sizeof head, 0) + digest_bytes(key, key_len, 3) +
           digest_bytes(data, len, 3 + digest_words(key_len));
}

static int record_put(MDB_txn *txn, MDB_dbi dbi, char *key, size_t key_len, uint64_t revision, const void *data,
                      size_t len)
{
    MDB_val k = {key_len, key}, v = {RECORD_HEADER + len, NULL};
    int rc = mdb_put(txn, dbi, &k, &v, MDB_RESERVE);
    if (rc != 0)
        return rc;
    uint64_t head[3] = {RECORD_VERSION, checksum(RECORD_VERSION, revision, key, key_len, data, len), revision};
    memcpy(v.mv_data, head, sizeof head);
    if (len)
        memcpy((uint8_t *)v.mv_data + RECORD_HEADER, data, len);
    return 0;
}

static int op_write(MDB_txn *txn, MDB_dbi dbi, const struct store_op *op)
{
    char key[1 + STORE_KEY_DURABLE_MAX];
    bool request = op->kind == STORE_OP_REQUEST || op->kind == STORE_OP_REQUEST_END;
    key[0] = request ? KEY_REQUEST : KEY_VALUE;
    memcpy(key + 1, op->key, op->key_len);
    if (op->kind == STORE_OP_PUT || op->kind == STORE_OP_REQUEST)
        return record_put(txn, dbi, key, 1 + op->key_len, op->revision, op->data, op->len);
    MDB_val k = {1 + op->key_len, key};
    int rc = mdb_del(txn, dbi, &k, NULL);
    return rc == MDB_NOTFOUND ? 0 : rc;
}

static int revision_write(MDB_txn *txn, MDB_dbi dbi, uint64_t revision)
{
    char key[] = {KEY_REVISION};
    return record_put(txn, dbi, key, 1, revision, NULL, 0);
}

/* What is in these batches, in one transaction. */
static int write_once(struct store_disk *d, const struct waiting *list, uint64_t revision_next)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(d->env, NULL, 0, &txn);
    if (rc != 0)
        return rc;
    const struct waiting *w;
    DL_FOREACH(list, w) {
        size_t at = 0;
        struct store_op op;
        while (rc == 0 && store_batch_next(&w->batch, &at, &op))
            rc = op_write(txn, d->dbi, &op);
    }
    if (rc == 0 && revision_next != d->revision_next)
        rc = revision_write(txn, d->dbi, revision_next);
    if (rc != 0) {
        mdb_txn_abort(txn);
        return rc;
    }
    rc = mdb_txn_commit(txn);
    if (rc == 0)
        d->revision_next = revision_next;
    return rc;
}

static int write_list(struct store_disk *d, const struct waiting *list, uint64_t revision_next)
{
    int rc;
    while ((rc = write_once(d, list, revision_next)) == MDB_MAP_FULL) {
        rc = mdb_file_grow(d->env);
        if (rc != 0)
            break;
    }
    return rc;
}

/* ---- the writer ---- */

static void writer_tell(struct store_disk *d)
{
    ssize_t ignored = write(d->event_fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)ignored; /* fails only when the counter is full: readable all the same */
}

/* With the queue locked, also on return: what waits, in one transaction.  Its flush is also that of what was settling. */
static void writer_commit(struct store_disk *d)
{
    struct waiting *w, *next, *list = d->writing = d->waiting;
    d->waiting = NULL;
    pthread_mutex_unlock(&d->queue);
    uint64_t number = list->prev->batch.number, revision = d->revision_next;
    if (list->prev->batch.last_revision + REVISION_AHEAD / 2 > revision)
        revision += REVISION_AHEAD;
    int rc = write_list(d, list, revision);

    pthread_mutex_lock(&d->queue);
    if (rc != 0) {
        mdb_file_err(&d->failed, rc, FILE_NAME, "a write has failed");
    } else if (d->settles) {
        d->done = d->settling ? d->settling : d->done;
        d->settling = number;
        d->settling_first = list->batch.first_revision;
    } else {
        d->done = number;
    }
    d->writing = NULL;
    DL_FOREACH_SAFE(list, w, next) {
        d->waiting_bytes -= w->batch.bytes;
        store_batch_done(&w->batch);
        free(w);
    }
    writer_tell(d);
}

/* With the queue locked, also on return: nobody else writes. */
static void writer_settle(struct store_disk *d)
{
    pthread_mutex_unlock(&d->queue);
    int rc = mdb_env_sync(d->env, 1);
    pthread_mutex_lock(&d->queue);
    if (rc == 0)
        d->done = d->settling;
    else
        mdb_file_err(&d->failed, rc, FILE_NAME, "a write has failed");
    d->settling = 0;
    writer_tell(d);
}

static void *writer_main(void *arg)
{
    struct store_disk *d = arg;
    pthread_mutex_lock(&d->queue);
    for (;;) {
        d->busy_since_ns = (d->waiting || d->settling) && !d->failed.code ? clock_now_ns() : 0;
        if (d->waiting && !d->failed.code)
            writer_commit(d);
        else if (d->settling && !d->failed.code)
            writer_settle(d);
        else if (d->stop)
            break;
        else
            pthread_cond_wait(&d->more, &d->queue);
    }
    pthread_mutex_unlock(&d->queue);
    return NULL;
}

int store_disk_submit(struct store_disk *d, struct store_batch *batch, struct err *err)
{
    struct waiting *w = calloc(1, sizeof *w);
    if (!w) {
        store_batch_done(batch);
        return err_set(err, ERR_NOMEM, "no memory to queue a write of the store");
    }
    w->batch = *batch;
    batch->data = NULL;
    pthread_mutex_lock(&d->queue);
    d->waiting_bytes += w->batch.bytes;
    DL_APPEND(d->waiting, w);
    pthread_cond_signal(&d->more);
    pthread_mutex_unlock(&d->queue);
    return 0;
}

uint64_t store_disk_writing_ns(struct store_disk *d, uint64_t now_ns)
{
    pthread_mutex_lock(&d->queue);
    uint64_t ns = d->busy_since_ns && now_ns > d->busy_since_ns ? now_ns - d->busy_since_ns : 0;
    pthread_mutex_unlock(&d->queue);
    return ns;
}

size_t store_disk_waiting_bytes(const struct store_disk *d)
{
    struct store_disk *unlocked = (struct store_disk *)d;
    pthread_mutex_lock(&unlocked->queue);
    size_t bytes = d->waiting_bytes;
    pthread_mutex_unlock(&unlocked->queue);
    return bytes;
}

int store_disk_fd(const struct store_disk *d)
{
    return d->event_fd;
}

int store_disk_done(struct store_disk *d, uint64_t *ret_batch, uint64_t *ret_first_revision, struct err *err)
{
    uint64_t count;
    ssize_t ignored = read(d->event_fd, &count, sizeof count);
    (void)ignored; /* not readable: it is clear already */
    pthread_mutex_lock(&d->queue);
    const struct waiting *first = d->writing ? d->writing : d->waiting;
    int rc = d->failed.code;
    if (rc != 0) {
        if (err)
            *err = d->failed;
    } else {
        *ret_batch = d->done;
        *ret_first_revision = d->settling ? d->settling_first : first ? first->batch.first_revision : UINT64_MAX;
    }
    pthread_mutex_unlock(&d->queue);
    return rc;
}

/* ---- opening ---- */

/* A key as people may read it, for a sentence. */
static void key_text(const MDB_val *key, char *text, size_t size)
{
    size_t n = key->mv_size ? key->mv_size - 1 : 0;
    if (n > size - 1)
        n = size - 1;
    for (size_t i = 0; i < n; i++) {
        char c = ((const char *)key->mv_data)[1 + i];
        text[i] = c >= 32 && c < 127 ? c : '?';
    }
    text[n] = '\0';
}

static int record_load(struct store_disk *d, struct store *store, const MDB_val *key, const MDB_val *value,
                       struct err *err)
{
    char name[128], whole[1 + STORE_KEY_DURABLE_MAX + 1];
    uint64_t head[3];
    key_text(key, name, sizeof name);
    if (key->mv_size < 1 || key->mv_size >= sizeof whole || value->mv_size < sizeof head)
        return err_set(err, ERR_CORRUPT, FILE_NAME ": the record of key '%s' is cut off", name);
    memcpy(head, value->mv_data, sizeof head);
    const uint8_t *data = (const uint8_t *)value->mv_data + RECORD_HEADER;
    size_t len = value->mv_size - RECORD_HEADER;
    if (head[1] != checksum(head[0], head[2], key->mv_data, key->mv_size, data, len))
        return err_set(err, ERR_CORRUPT,
                       FILE_NAME ": the record of key '%s' does not fit its checksum; restore the file from a backup, "
                       "or move it away and start without the keys", name);
    if (head[0] != RECORD_VERSION)
        return err_set(err, ERR_UNSUPPORTED, FILE_NAME ": the record of key '%s' has version %llu, this program knows %d",
                       name, (unsigned long long)head[0], RECORD_VERSION);
    memcpy(whole, key->mv_data, key->mv_size);
    whole[key->mv_size] = '\0';
    if (whole[0] == KEY_REVISION) {
        d->revision_next = head[2];
        return 0;
    }
    if (whole[0] != KEY_VALUE && whole[0] != KEY_REQUEST)
        return err_set(err, ERR_UNSUPPORTED, FILE_NAME ": a record of an unknown kind, key '%s'", name);
    const struct store_op op = {.kind = whole[0] == KEY_VALUE ? STORE_OP_PUT : STORE_OP_REQUEST, .key = whole + 1,
                                .key_len = key->mv_size - 1, .data = data, .len = len, .revision = head[2]};
    int rc = store_load(store, &op, err);
    return rc < 0 ? err_wrap(err, FILE_NAME ": key '%s'", name) : 0;
}

static int load(struct store_disk *d, struct store *store, struct err *err)
{
    MDB_txn *txn;
    MDB_cursor *cursor;
    MDB_val key, value;
    int mdb = mdb_txn_begin(d->env, NULL, MDB_RDONLY, &txn), rc = 0;
    if (mdb != 0)
        return mdb_file_err(err, mdb, FILE_NAME, "cannot read");
    mdb = mdb_cursor_open(txn, d->dbi, &cursor);
    if (mdb == 0) {
        while (rc == 0 && (mdb = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0)
            rc = record_load(d, store, &key, &value, err);
        mdb_cursor_close(cursor);
    }
    mdb_txn_abort(txn);
    if (rc == 0 && mdb != MDB_NOTFOUND)
        rc = mdb_file_err(err, mdb, FILE_NAME, "cannot read");
    return rc;
}

/* Signals are the loop thread's. */
static int writer_start(struct store_disk *d, struct err *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&d->writer, NULL, writer_main, d);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return err_set(err, ERR_NOMEM, "cannot start the store's writer: %s", strerror(rc));
    d->started = true;
    return 0;
}

int store_disk_open(const char *dir, enum store_durability durability, struct store *store,
                    struct store_disk **ret_disk, struct err *err)
{
    if (durability == STORE_NONE) {
        store_load_end(store, 0);
        *ret_disk = NULL;
        return 0;
    }
    struct store_disk *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NOMEM, "no memory for the store's file");
    d->settles = durability == STORE_FSYNC;
    pthread_mutex_init(&d->queue, NULL);
    pthread_cond_init(&d->more, NULL);
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = d->event_fd < 0 ? err_set(err, ERR_NOMEM, "eventfd: %s", strerror(errno)) : 0;
    if (rc == 0)
        rc = mdb_file_open(dir, FILE_NAME, durability == STORE_OS ? MDB_NOSYNC : MDB_NOMETASYNC, &d->env, &d->dbi, err);
    if (rc == 0)
        rc = load(d, store, err);
    if (rc == 0) {
        store_load_end(store, d->revision_next);
        int mdb = write_list(d, NULL, store_revision(store) + REVISION_AHEAD);
        if (mdb == 0 && d->settles)
            mdb = mdb_env_sync(d->env, 1);
        if (mdb != 0)
            rc = mdb_file_err(err, mdb, FILE_NAME, "cannot write");
    }
    if (rc == 0)
        rc = writer_start(d, err);
    if (rc < 0) {
        store_disk_close(d);
        return rc;
    }
    *ret_disk = d;
    return 0;
}

void store_disk_close(struct store_disk *d)
{
    if (!d)
        return;
    if (d->started) {
        pthread_mutex_lock(&d->queue);
        d->stop = true;
        pthread_cond_signal(&d->more);
        pthread_mutex_unlock(&d->queue);
        pthread_join(d->writer, NULL);
    }
    struct waiting *w, *next;
    DL_FOREACH_SAFE(d->waiting, w, next) { /* after a failure */
        store_batch_done(&w->batch);
        free(w);
    }
    if (d->env) {
        (void)mdb_env_sync(d->env, 1); /* what the operating system still has; too late to tell anybody */
        mdb_env_close(d->env);
    }
    if (d->event_fd >= 0)
        close(d->event_fd);
    pthread_cond_destroy(&d->more);
    pthread_mutex_destroy(&d->queue);
    free(d);
}
