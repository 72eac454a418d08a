/* See checkpoint_readers.h.
 *
 * A ring with three counters that only rise: taken <= claimed <= put <= taken + READINGS.  A thread claims the oldest
 * reading that nobody has, reads without the lock, and marks it as done. */
#include "agent/checkpoint_readers.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "common/digest.h"

#define BLOCK_BYTES ((size_t)256 << 10) /* read and digested at once: stays in a core's own cache; a multiple of 8 */
#define PAGE_BYTES  4096u
#define READERS_MIN 4u /* also with fewer processors: a disk answers several requests at once */

struct readers {
    pthread_mutex_t lock;
    pthread_cond_t wanted, done;
    bool stopping;
    uint64_t put, claimed, taken;
    struct reading ring[READINGS];
    bool read[READINGS];
    unsigned n;
    pthread_t threads[READERS_MAX];
};

static bool readers_stopping(struct readers *r)
{
    pthread_mutex_lock(&r->lock);
    bool stopping = r->stopping;
    pthread_mutex_unlock(&r->lock);
    return stopping;
}

/* Maps the pages of a block by one call instead of a fault for each; where the kernel does not know it, they fault. */
static void pages_map(uint8_t *data, size_t len)
{
    size_t before = (size_t)((uintptr_t)data % PAGE_BYTES);
    (void)madvise(data - before, before + len, MADV_POPULATE_WRITE);
}

static void reading_do(struct readers *r, struct reading *reading)
{
    uint8_t *data = reading->data;
    for (size_t at = 0; at < reading->len && reading->code == 0;) {
        size_t len = reading->len - at < BLOCK_BYTES ? reading->len - at : BLOCK_BYTES;
        if (reading->in_place)
            pages_map(data + at, len);
        if (readers_stopping(r))
            reading->code = err_set(&reading->err, ERR_ABORTED, "stopped");
        else
            reading->code = safetensors_read(reading->tensor, reading->from + at, data + at, len, &reading->err);
        if (reading->digest_len > 0) {
            size_t end = at + len == reading->len ? reading->digest_len : at + len;
            reading->digest += digest_bytes(data + at, end - at, reading->first_word + at / 8);
        }
        at += len;
    }
}

static void *reader_main(void *user)
{
    struct readers *r = user;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        while (!r->stopping && r->claimed == r->put)
            pthread_cond_wait(&r->wanted, &r->lock);
        if (r->stopping)
            break;
        size_t at = r->claimed++ % READINGS;
        pthread_mutex_unlock(&r->lock);
        reading_do(r, &r->ring[at]);
        pthread_mutex_lock(&r->lock);
        r->read[at] = true;
        pthread_cond_signal(&r->done);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

unsigned readers_default(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
    return n < (int)READERS_MIN ? READERS_MIN : n > (int)READERS_MAX ? READERS_MAX : (unsigned)n;
}

int readers_start(unsigned n, struct readers **ret_readers, struct err *err)
{
    struct readers *r = calloc(1, sizeof *r);
    if (!r)
        return err_set(err, ERR_NOMEM, "out of memory");
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->wanted, NULL);
    pthread_cond_init(&r->done, &attr);
    pthread_condattr_destroy(&attr);
    unsigned want = n == 0 ? readers_default() : n < READERS_MAX ? n : READERS_MAX;
    int failed = 0;
    while (r->n < want && failed == 0) {
        failed = pthread_create(&r->threads[r->n], NULL, reader_main, r);
        r->n += failed == 0;
    }
    if (r->n == 0) {
        readers_stop(r);
        return err_set(err, ERR_NOMEM, "cannot start a thread that reads: %s", strerror(failed));
    }
    *ret_readers = r; /* fewer than wanted will do */
    return 0;
}

void readers_stop(struct readers *r)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    r->stopping = true;
    pthread_cond_broadcast(&r->wanted);
    pthread_mutex_unlock(&r->lock);
    for (unsigned i = 0; i < r->n; i++)
        pthread_join(r->threads[i], NULL);
    pthread_cond_destroy(&r->done);
    pthread_cond_destroy(&r->wanted);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

/* `put` and `taken` are changed by the calling thread alone. */
bool readers_full(const struct readers *r)
{
    return r->put - r->taken == READINGS;
}

bool readers_empty(const struct readers *r)
{
    return r->put == r->taken;
}

void readers_put(struct readers *r, const struct reading *reading)
{
    pthread_mutex_lock(&r->lock);
    size_t at = r->put % READINGS;
    r->ring[at] = *reading;
    r->read[at] = false;
    r->put++;
    pthread_cond_signal(&r->wanted);
    pthread_mutex_unlock(&r->lock);
}

const struct reading *readers_take(struct readers *r, unsigned ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000)
        until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&r->lock);
    size_t at = r->taken % READINGS;
    int rc = 0;
    while (!r->read[at] && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&r->done, &r->lock, &until);
    const struct reading *oldest = r->read[at] ? &r->ring[at] : NULL;
    if (oldest)
        r->taken++;
    pthread_mutex_unlock(&r->lock);
    return oldest;
}
