/* Communicators end in the background, each on a detached thread, by ncclCommAbort.
 *
 * Also those of groups that are over in order.  ncclCommFinalize and ncclCommDestroy wait for the peers, and where one
 * of them is stopped, not even an abort gets NCCL out of that again (seen with 2.28.3 between two GPUs of a host).  An
 * abort is a local matter.  It loses nothing, because every transfer has been confirmed by its receiver (DONE); and
 * since NCCL may pass bytes between two parties through a third, a party waits until the others have left the group
 * too.
 *
 * An abort may never return (a kernel that does not see it, a driver that hangs): the worker goes on, and
 * nccl_endings_check tells of it, so that the agent can restart and adopt its weights again.
 *
 * Threads: those started here, under `lock`; the functions of the header on the worker's. */
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "agent/transport_nccl_internal.h"
#include "common/clock.h"

#define OTHERS_LIMIT_NS 5000000000u /* for the other parties to leave the group as well */
#define OTHERS_LOOK_MS  20u
#define OVERDUE_NS      15000000000u /* then something is wrong with this process */
#define CLOSE_LIMIT_MS  8000u
#define POLL_NS         500000

struct nccl_ending {
    struct nccl_shared *shared;
    struct nccl_ending *next; /* in shared->endings */
    struct nccl_gear gear;
    struct control *control; /* NULL after a failure */
    uint64_t since_ns;
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

static void ending_wait(const struct nccl_ending *e)
{
    while (!control_ended(e->control, OTHERS_LOOK_MS) && clock_now_ns() - e->since_ns < OTHERS_LIMIT_NS &&
           !ending_hurries(e))
        ;
    control_close(e->control, 0);
}

static void ending_run(const struct nccl_ending *e)
{
    const struct nccl_library *nccl = &e->shared->library;
    const struct cuda_driver *cu = &e->shared->device->driver;
    (void)!cuda_device_use(e->shared->device, NULL);
    if (e->control)
        ending_wait(e);
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

void nccl_ending_start(struct nccl_shared *shared, const struct nccl_gear *gear, struct control *control)
{
    struct nccl_ending *e = calloc(1, sizeof *e);
    if (!e)
        abort(); /* a communicator that cannot be ended would write into slots for ever */
    *e = (struct nccl_ending){
        .shared = shared,
        .gear = *gear,
        .control = control,
        .since_ns = clock_now_ns(),
    };
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
        if (!failed_only || !e->control)
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

int nccl_endings_check(struct nccl_shared *shared, struct err *err)
{
    uint64_t now = clock_now_ns(), oldest = 0;
    pthread_mutex_lock(&shared->lock);
    for (const struct nccl_ending *e = shared->endings; e; e = e->next)
        oldest = now - e->since_ns > oldest ? now - e->since_ns : oldest;
    pthread_mutex_unlock(&shared->lock);
    if (oldest < OVERDUE_NS)
        return 0;
    return err_set(err, ERR_IO,
                   "the abort of an NCCL communicator has not returned for %llu s; restart this agent, it takes its "
                   "weights over",
                   (unsigned long long)(oldest / 1000000000u));
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
