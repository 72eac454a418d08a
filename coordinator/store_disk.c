/* The store's durable keys on disk: the threads between the loop, the log and the records.  `queue` guards what they
 * share; it is never held during a write.
 *
 *     loop --batches--> writer: into the log, one transaction for all that wait --> reported
 *                          | a generation of the log is full, or nothing has come for a while
 *                          v
 *                       applier: its changes into the records, in large transactions --> its entries can be dropped
 *
 * Entries of the log are written and dropped by the writer alone, the records are the applier's alone, once they run.
 * One generation is applied at a time: while it is, the writer fills the next one, and then waits for it. */
#include "coordinator/store_disk.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "common/clock.h"
#include "coordinator/store_log.h"
#include "coordinator/store_records.h"

#define WRITE_BYTES ((size_t)2 << 20) /* of changes in one transaction: its dirty pages are in memory */
#define IDLE_S      1                 /* without a change: then the log goes into the records */

struct store_disk {
    char *dir;
    bool sync;
    struct store_log *log;
    struct store_records records;
    int event_fd;

    pthread_mutex_t queue;
    pthread_cond_t more, turned; /* for the writer, for the applier */
    bool started, stop, apply_stop;
    pthread_t writer, applier;
    struct store_changes *waiting; /* oldest first */
    size_t waiting_bytes;          /* and of what is being written */
    uint64_t writing;              /* first revision of what is being written; 0 = nothing is */
    uint64_t done;                 /* number of the last batch on disk */
    uint64_t busy_since_ns;        /* the writer is at a write, or waits for the applier; 0: it waits for work */
    bool applying;
    struct store_log_part part; /* what is being applied */
    uint64_t applied;           /* entries of the log below it are in the records */
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

/* ---- from the log into the records ---- */

static int apply(struct store_disk *d, struct store_log_part part, struct err *err)
{
    struct store_changes *list;
    int rc;
    while ((rc = store_log_read(d->log, &part, WRITE_BYTES, &list, err)) == 0 && list) {
        rc = store_records_write(&d->records, list, err);
        store_changes_free(list);
        if (rc < 0)
            break;
    }
    return rc == 0 ? store_records_sync(&d->records, err) : rc;
}

static void disk_tell(struct store_disk *d)
{
    ssize_t ignored = write(d->event_fd, &(uint64_t){1}, sizeof(uint64_t));
    (void)ignored; /* fails only when the counter is full: readable all the same */
}

static void disk_failed(struct store_disk *d, const struct err *err)
{
    if (!d->failed.code)
        d->failed = *err;
    disk_tell(d);
}

static void *applier_main(void *arg)
{
    struct store_disk *d = arg;
    pthread_mutex_lock(&d->queue);
    for (;;) {
        if (!d->applying && d->apply_stop)
            break;
        if (!d->applying) {
            pthread_cond_wait(&d->turned, &d->queue);
            continue;
        }
        struct store_log_part part = d->part;
        struct err err;
        pthread_mutex_unlock(&d->queue);
        int rc = apply(d, part, &err);
        pthread_mutex_lock(&d->queue);
        if (rc < 0)
            disk_failed(d, &err);
        else
            d->applied = part.end;
        d->applying = false;
        pthread_cond_signal(&d->more);
    }
    pthread_mutex_unlock(&d->queue);
    return NULL;
}

/* ---- the writer: all of it with the queue locked, also on return ---- */

static struct store_changes *waiting_take(struct store_disk *d)
{
    struct store_changes *list = NULL;
    for (size_t bytes = 0; d->waiting && bytes < WRITE_BYTES;) {
        struct store_changes *c = d->waiting;
        DL_DELETE(d->waiting, c);
        DL_APPEND(list, c);
        bytes += c->batch.bytes;
    }
    return list;
}

/* What waits, in one transaction. */
static void writer_commit(struct store_disk *d)
{
    struct store_changes *c, *list = waiting_take(d);
    uint64_t number = list->prev->batch.number, applied = d->applied;
    size_t bytes = 0;
    struct err err;
    DL_FOREACH(list, c)
    bytes += c->batch.bytes;
    d->writing = list->batch.first_revision;
    pthread_mutex_unlock(&d->queue);
    int rc = store_log_write(d->log, list, applied, &err);
    store_changes_free(list);
    pthread_mutex_lock(&d->queue);
    d->writing = 0;
    d->waiting_bytes -= bytes;
    if (rc < 0) {
        disk_failed(d, &err);
        return;
    }
    d->done = number;
    pthread_mutex_unlock(&d->queue); /* who is told will take it */
    disk_tell(d);
    pthread_mutex_lock(&d->queue);
}

/* The generation goes to the applier, which has none.  All of it is on the medium: a log that ends before what is in
 * the records would undo half of a batch. */
static void writer_turn(struct store_disk *d)
{
    d->part = store_log_turn(d->log);
    d->applying = true;
    pthread_cond_signal(&d->turned);
}

static void writer_drop(struct store_disk *d)
{
    uint64_t applied = d->applied;
    struct err err;
    d->busy_since_ns = clock_now_ns();
    pthread_mutex_unlock(&d->queue);
    int rc = store_log_write(d->log, NULL, applied, &err);
    pthread_mutex_lock(&d->queue);
    d->busy_since_ns = 0;
    if (rc < 0)
        disk_failed(d, &err);
}

static void writer_idle(struct store_disk *d)
{
    if (store_log_droppable(d->log, d->applied) && !d->failed.code) {
        writer_drop(d);
        return;
    }
    if (!store_log_bytes(d->log) || d->applying || d->failed.code) {
        pthread_cond_wait(&d->more, &d->queue);
        return;
    }
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_S;
    if (pthread_cond_timedwait(&d->more, &d->queue, &until) == ETIMEDOUT && !d->waiting && !d->stop && !d->failed.code)
        writer_turn(d);
}

static void *writer_main(void *arg)
{
    struct store_disk *d = arg;
    pthread_mutex_lock(&d->queue);
    for (;;) {
        bool full = store_log_bytes(d->log) >= STORE_LOG_BYTES, ok = !d->failed.code;
        if (!ok || !d->waiting)
            d->busy_since_ns = 0;
        else if (!d->busy_since_ns)
            d->busy_since_ns = clock_now_ns();
        if (ok && d->waiting && !full) {
            writer_commit(d);
            d->busy_since_ns = 0;
        } else if (ok && d->waiting && !d->applying) {
            writer_turn(d);
        } else if (ok && d->waiting) {
            pthread_cond_wait(&d->more, &d->queue);
        } else if (d->stop) {
            break;
        } else {
            writer_idle(d);
        }
    }
    pthread_mutex_unlock(&d->queue);
    return NULL;
}

int store_disk_submit(struct store_disk *d, struct store_batch *batch, struct err *err)
{
    struct store_changes *c = calloc(1, sizeof *c);
    if (!c) {
        store_batch_done(batch);
        return err_set(err, ERR_NOMEM, "no memory to queue a write of the store");
    }
    c->batch = *batch;
    batch->data = NULL;
    pthread_mutex_lock(&d->queue);
    d->waiting_bytes += c->batch.bytes;
    DL_APPEND(d->waiting, c);
    pthread_mutex_unlock(&d->queue);
    pthread_cond_signal(&d->more);
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
    int rc = d->failed.code;
    if (rc != 0) {
        if (err)
            *err = d->failed;
    } else {
        *ret_batch = d->done;
        *ret_first_revision = d->writing ? d->writing : d->waiting ? d->waiting->batch.first_revision : UINT64_MAX;
    }
    pthread_mutex_unlock(&d->queue);
    return rc;
}

/* ---- opening ---- */

/* What an earlier process has left in its log goes into the records; then the log is made anew. */
static int log_open(struct store_disk *d, struct err *err)
{
    int rc = store_log_open(d->dir, d->sync, &d->log, err);
    if (rc < 0)
        return rc;
    const struct store_log_part part = store_log_turn(d->log);
    if (part.first == part.end)
        return 0;
    rc = apply(d, part, err);
    store_log_close(d->log);
    d->log = NULL;
    if (rc == 0)
        rc = store_log_remove(d->dir, err);
    return rc == 0 ? store_log_open(d->dir, d->sync, &d->log, err) : rc;
}

static int load(struct store_disk *d, struct store *store, struct err *err)
{
    int rc = store_records_open(d->dir, d->sync, &d->records, err);
    if (rc == 0)
        rc = log_open(d, err);
    if (rc == 0)
        rc = store_records_load(&d->records, store, err);
    return rc == 0 ? store_records_start(&d->records, store_revision(store), err) : rc;
}

/* Signals are the loop thread's. */
static int thread_start(pthread_t *thread, void *(*run)(void *), struct store_disk *d, struct err *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, NULL, run, d);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc == 0 ? 0 : err_set(err, ERR_NOMEM, "cannot start the store's writer: %s", strerror(rc));
}

static int threads_start(struct store_disk *d, struct err *err)
{
    int rc = thread_start(&d->applier, applier_main, d, err);
    if (rc == 0 && (rc = thread_start(&d->writer, writer_main, d, err)) == 0)
        d->started = true;
    return rc;
}

static void queue_init(struct store_disk *d)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&d->queue, NULL);
    pthread_cond_init(&d->more, &attributes);
    pthread_cond_init(&d->turned, &attributes);
    pthread_condattr_destroy(&attributes);
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
    d->sync = durability == STORE_FSYNC;
    queue_init(d);
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = d->event_fd < 0 ? err_set(err, ERR_NOMEM, "eventfd: %s", strerror(errno)) : 0;
    d->dir = strdup(dir);
    if (rc == 0 && !d->dir)
        rc = err_set(err, ERR_NOMEM, "no memory for the store's file");
    if (rc == 0)
        rc = load(d, store, err);
    if (rc == 0)
        rc = threads_start(d, err);
    if (rc < 0) {
        store_disk_close(d);
        return rc;
    }
    *ret_disk = d;
    return 0;
}

/* ---- closing ---- */

static void threads_stop(struct store_disk *d)
{
    pthread_mutex_lock(&d->queue);
    d->stop = true;
    pthread_cond_signal(&d->more);
    pthread_mutex_unlock(&d->queue);
    pthread_join(d->writer, NULL);
    pthread_mutex_lock(&d->queue);
    d->apply_stop = true;
    pthread_cond_signal(&d->turned);
    pthread_mutex_unlock(&d->queue);
    pthread_join(d->applier, NULL);
}

/* The rest of the log, into the records; then there is no log.  If it fails, the next start does it. */
static void log_end(struct store_disk *d)
{
    struct err err;
    int rc = apply(d, store_log_turn(d->log), &err);
    store_log_close(d->log);
    d->log = NULL;
    if (rc == 0)
        (void)!store_log_remove(d->dir, &err);
}

void store_disk_close(struct store_disk *d)
{
    if (!d)
        return;
    if (d->started) {
        threads_stop(d);
        if (!d->failed.code)
            log_end(d);
    }
    store_changes_free(d->waiting); /* after a failure */
    store_log_close(d->log);
    store_records_close(&d->records);
    if (d->event_fd >= 0)
        close(d->event_fd);
    pthread_cond_destroy(&d->more);
    pthread_cond_destroy(&d->turned);
    pthread_mutex_destroy(&d->queue);
    free(d->dir);
    free(d);
}
