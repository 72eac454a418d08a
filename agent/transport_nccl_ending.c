/* Communicators end in the background, each on a detached thread, by ncclCommAbort.
 *
 * Also those of groups that are over in order.  ncclCommFinalize and ncclCommDestroy wait for the peers, and where one
 * of them is stopped, not even an abort gets NCCL out of that again (seen with 2.28.3 between two GPUs of a host).  An
 * abort is a local matter.  It loses nothing, because every transfer has been confirmed by its receiver (DONE); and
 * since NCCL may pass bytes between two parties through a third, a party waits until the others have left the group
 * too.
 *
 * What ended in order, with every party still there, may be kept for a while before that: the next group can take it
 * over, whole or shrunk.  Its connections stay open meanwhile; when one closes, a party is gone or has let go, and so
 * does this one.
 *
 * An abort may never return (a kernel that does not see it, a driver that hangs): the worker goes on, and
 * nccl_endings_check tells of it, so that the agent can restart and adopt its weights again.
 *
 * Threads: those started here, under `lock`; the functions of the header on the worker's. */
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "agent/transport_nccl_internal.h"
#include "common/clock.h"

#define OTHERS_LIMIT_NS 5000000000u /* for the other parties to leave the group as well */
#define OTHERS_LOOK_MS  20u
#define OVERDUE_NS      15000000000u /* then something is wrong with this process */
#define CLOSE_LIMIT_MS  8000u
#define POLL_NS         500000
#define KEEP_LOOK_MS    200u

struct nccl_ending {
    struct nccl_shared *shared;
    struct nccl_ending *next; /* in shared->endings */
    struct nccl_gear gear;
    struct control *control; /* NULL after a failure, and when it has been left */
    struct nccl_keep *keep;  /* or NULL */
    int wake_fd;             /* of what is kept; else -1 */
    uint64_t since_ns;
    /* under the lock */
    bool failed;
    bool kept;    /* it can be asked for */
    bool asked;   /* ... and was */
    bool drop;    /* another one is kept instead */
    bool lingers; /* it waits or is kept; an abort has not begun */
};

static void shared_free(struct nccl_shared *shared)
{
    cuda_device_close(shared->device);
    pthread_cond_destroy(&shared->ended);
    pthread_mutex_destroy(&shared->lock);
    free(shared);
}

static void ending_sleep(void)
{
    nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
}

static bool ending_hurries(const struct nccl_ending *e)
{
    pthread_mutex_lock(&e->shared->lock);
    bool hurries = e->shared->hurry;
    pthread_mutex_unlock(&e->shared->lock);
    return hurries;
}

static void bell_ring(int fd)
{
    uint64_t one = 1;
    if (fd >= 0 && write(fd, &one, sizeof one) < 0)
        return; /* it is rung already */
}

static void ending_wait(const struct nccl_ending *e)
{
    while (!control_ended(e->control, OTHERS_LOOK_MS) && clock_now_ns() - e->since_ns < OTHERS_LIMIT_NS &&
           !ending_hurries(e))
        ;
}

/* From now on it can be asked for; whatever was kept before is let go. */
static void ending_offer(struct nccl_ending *e, bool offer)
{
    pthread_mutex_lock(&e->shared->lock);
    for (struct nccl_ending *other = e->shared->endings; other && offer; other = other->next)
        if (other->kept) {
            other->drop = true;
            bell_ring(other->wake_fd);
        }
    e->kept = offer && !e->shared->hurry;
    pthread_mutex_unlock(&e->shared->lock);
}

/* True when it was asked for; what it had is handed over then. */
static bool ending_keep(struct nccl_ending *e)
{
    const uint64_t until = clock_now_ns() + e->keep->ms * UINT64_C(1000000);
    struct nccl_kept *kept = calloc(1, sizeof *kept);
    bool asked = false, over = !kept || !control_all_there(e->control, -1, 0);
    if (!over)
        ending_offer(e, true);
    while (!over && !asked) {
        over = !control_all_there(e->control, e->wake_fd, KEEP_LOOK_MS) || clock_now_ns() >= until;
        pthread_mutex_lock(&e->shared->lock);
        over = over || e->drop || e->shared->hurry;
        e->kept = e->kept && !over;
        asked = e->asked;
        if (asked && !over) {
            *kept = (struct nccl_kept){.who = *e->keep, .gear = e->gear, .control = e->control};
            e->shared->handed = kept;
        }
        if (asked || over) {
            e->kept = false;
            e->shared->answered = e->shared->answered || asked;
            pthread_cond_broadcast(&e->shared->ended);
        }
        pthread_mutex_unlock(&e->shared->lock);
    }
    if (asked && !over)
        return true;
    free(kept);
    return false;
}

/* True when nothing is left to be ended. */
static bool ending_linger(struct nccl_ending *e)
{
    ending_wait(e);
    if (e->keep && ending_keep(e))
        return true;
    control_close(e->control, 0);
    pthread_mutex_lock(&e->shared->lock);
    e->lingers = false;
    e->since_ns = clock_now_ns();
    pthread_mutex_unlock(&e->shared->lock);
    return false;
}

static void ending_run(struct nccl_ending *e)
{
    const struct nccl_library *nccl = &e->shared->library;
    const struct cuda_driver *cu = &e->shared->device->driver;
    (void)!cuda_device_use(e->shared->device, NULL);
    if (e->control && ending_linger(e))
        return;
    if (cuda_health(NULL) < 0)
        return; /* the end of the process frees it */
    if (e->gear.comm)
        nccl->ncclCommAbort(e->gear.comm);
    /* An aborted kernel ends within moments; before that, nothing that it uses may go. */
    while (e->gear.stream && cu->cuStreamQuery(e->gear.stream) == CUDA_ERROR_NOT_READY)
        ending_sleep();
    for (size_t i = 0; i < GROUPS_IN_FLIGHT; i++)
        if (e->gear.events[i])
            cu->cuEventDestroy(e->gear.events[i]);
    if (e->gear.stream)
        cu->cuStreamDestroy(e->gear.stream);
    if (e->gear.warm)
        cu->cuMemFree(e->gear.warm);
}

static void *ending_main(void *arg)
{
    struct nccl_ending *e = arg;
    struct nccl_shared *shared = e->shared;
    ending_run(e);
    pthread_mutex_lock(&shared->lock);
    struct nccl_ending **at = &shared->endings;
    while (*at != e)
        at = &(*at)->next;
    *at = e->next;
    bool last = shared->closed && !shared->endings;
    pthread_cond_broadcast(&shared->ended);
    pthread_mutex_unlock(&shared->lock);
    if (e->wake_fd >= 0)
        close(e->wake_fd);
    free(e->keep);
    free(e);
    if (last)
        shared_free(shared);
    return NULL;
}

static int ending_thread(struct nccl_ending *e)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    int rc = pthread_create(&thread, NULL, ending_main, e);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        pthread_detach(thread);
    return rc;
}

void nccl_ending_start(struct nccl_shared *shared, const struct nccl_gear *gear, struct control *control,
                       const struct nccl_keep *keep)
{
    struct nccl_ending *e = calloc(1, sizeof *e);
    if (!e)
        abort(); /* a communicator that cannot be ended would write into slots for ever */
    *e = (struct nccl_ending){
        .shared = shared,
        .gear = *gear,
        .control = control,
        .wake_fd = -1,
        .since_ns = clock_now_ns(),
        .failed = !control,
        .lingers = control != NULL,
    };
    if (control && keep && keep->ms > 0 && keep->key != 0) {
        e->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        e->keep = e->wake_fd >= 0 ? malloc(sizeof *e->keep) : NULL; /* without, it is not kept */
        if (e->keep)
            *e->keep = *keep;
    }
    pthread_mutex_lock(&shared->lock);
    e->next = shared->endings;
    shared->endings = e;
    pthread_mutex_unlock(&shared->lock);
    if (ending_thread(e) != 0)
        ending_main(e); /* no thread to be had: here, then */
}

/* With the lock held. */
static bool endings_run(const struct nccl_shared *shared, bool failed_only)
{
    for (const struct nccl_ending *e = shared->endings; e; e = e->next)
        if (!failed_only || e->failed)
            return true;
    return false;
}

bool nccl_endings_wait(struct nccl_shared *shared, bool failed_only, uint32_t limit_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(limit_ms / 1000u);
    until.tv_nsec += (long)(limit_ms % 1000u) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&shared->lock);
    int rc = 0;
    while (endings_run(shared, failed_only) && rc == 0)
        rc = pthread_cond_timedwait(&shared->ended, &shared->lock, &until);
    bool over = !endings_run(shared, failed_only);
    pthread_mutex_unlock(&shared->lock);
    return over;
}

unsigned nccl_endings_count(struct nccl_shared *shared)
{
    unsigned n = 0;
    pthread_mutex_lock(&shared->lock);
    for (const struct nccl_ending *e = shared->endings; e; e = e->next)
        n += !e->kept;
    pthread_mutex_unlock(&shared->lock);
    return n;
}

int nccl_endings_check(struct nccl_shared *shared, struct err *err)
{
    uint64_t now = clock_now_ns(), oldest = 0;
    pthread_mutex_lock(&shared->lock);
    for (const struct nccl_ending *e = shared->endings; e; e = e->next)
        if (!e->lingers && now > e->since_ns)
            oldest = now - e->since_ns > oldest ? now - e->since_ns : oldest;
    pthread_mutex_unlock(&shared->lock);
    if (oldest < OVERDUE_NS)
        return 0;
    return err_set(err, ERR_IO,
                   "the abort of an NCCL communicator has not returned for %llu s; restart this agent, it takes its "
                   "weights over",
                   (unsigned long long)(oldest / 1000000000u));
}

/* ---- what is kept ---- */

struct nccl_kept *nccl_kept_take(struct nccl_shared *shared)
{
    pthread_mutex_lock(&shared->lock);
    struct nccl_ending *e = shared->endings;
    while (e && (!e->kept || e->drop))
        e = e->next;
    if (e) {
        e->asked = true;
        shared->answered = false;
        bell_ring(e->wake_fd);
        while (!shared->answered) /* it looks at once, and does nothing else meanwhile; it may be freed by then */
            pthread_cond_wait(&shared->ended, &shared->lock);
    }
    struct nccl_kept *kept = shared->handed;
    shared->handed = NULL;
    pthread_mutex_unlock(&shared->lock);
    return kept;
}

void nccl_kept_drop(struct nccl_shared *shared, struct nccl_kept *kept)
{
    if (!kept)
        return;
    nccl_ending_start(shared, &kept->gear, kept->control, NULL); /* all have left: it waits for nobody */
    free(kept);
}

struct nccl_shared *nccl_shared_new(struct nccl_library library, struct cuda_device *device)
{
    struct nccl_shared *shared = calloc(1, sizeof *shared);
    if (!shared)
        return NULL;
    shared->library = library;
    shared->device = device;
    nccl_library_describe(&library, shared->version, sizeof shared->version);
    pthread_mutex_init(&shared->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&shared->ended, &attr);
    pthread_condattr_destroy(&attr);
    return shared;
}

void nccl_shared_close(struct nccl_shared *shared)
{
    pthread_mutex_lock(&shared->lock);
    shared->hurry = true;
    pthread_mutex_unlock(&shared->lock);
    (void)nccl_endings_wait(shared, false, CLOSE_LIMIT_MS);
    pthread_mutex_lock(&shared->lock);
    shared->closed = true;
    bool over = !shared->endings;
    pthread_mutex_unlock(&shared->lock);
    if (over)
        shared_free(shared);
}
