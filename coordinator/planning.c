/* See planning.h.  The threads touch nothing but their job and, under the lock, the list of what is done. */
#include "coordinator/planning.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define STACK_BYTES (8u << 20) /* the planner has arrays of a layer there */

struct planned {
    struct planning *planning;
    struct plan_job *job;
    struct planned *next;
};

struct planning {
    pthread_mutex_t lock;
    pthread_cond_t idle; /* no thread is at work */
    uint32_t at_work;
    struct planned *done, **done_end;
    int fd;
};

static void planned_done(struct planned *one)
{
    struct planning *p = one->planning;
    const uint64_t count = 1;
    *p->done_end = one;
    p->done_end = &one->next;
    if (write(p->fd, &count, sizeof count) < 0) {
        /* it can only be full of wake-ups that nobody has read yet */
    }
}

static void *thread_main(void *arg)
{
    struct planned *one = arg;
    struct planning *p = one->planning;
    pthread_setname_np(pthread_self(), "planner");
    plan_job_run(one->job);
    pthread_mutex_lock(&p->lock);
    planned_done(one);
    if (--p->at_work == 0)
        pthread_cond_signal(&p->idle);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int planning_new(struct planning **ret_planning, struct err *err)
{
    struct planning *p = calloc(1, sizeof *p);
    if (!p)
        return err_set(err, ERR_NOMEM, "no memory for the planner");
    p->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->fd < 0) {
        int rc = err_set(err, ERR_NOMEM, "eventfd: %s", strerror(errno));
        free(p);
        return rc;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->idle, NULL);
    p->done_end = &p->done;
    *ret_planning = p;
    return 0;
}

void planning_free(struct planning *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    while (p->at_work)
        pthread_cond_wait(&p->idle, &p->lock);
    pthread_mutex_unlock(&p->lock);
    for (struct plan_job *job; (job = planning_completed(p));)
        plan_job_free(job);
    close(p->fd);
    pthread_cond_destroy(&p->idle);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* Signals are the loop thread's. */
static int thread_start(struct planned *one)
{
    pthread_t thread;
    pthread_attr_t attr;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&thread, &attr, thread_main, one);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

void planning_submit(struct planning *p, struct plan_job *job)
{
    struct planned *one = calloc(1, sizeof *one);
    if (!one)
        abort(); /* as everywhere where the core's word could not be kept */
    *one = (struct planned){.planning = p, .job = job};
    pthread_mutex_lock(&p->lock);
    p->at_work++;
    pthread_mutex_unlock(&p->lock);
    int rc = thread_start(one);
    if (rc == 0)
        return;
    job->code = err_set(&job->err, ERR_NOMEM, "cannot start a thread for the planner: %s", strerror(rc));
    pthread_mutex_lock(&p->lock);
    p->at_work--;
    planned_done(one);
    pthread_mutex_unlock(&p->lock);
}

int planning_fd(const struct planning *p)
{
    return p->fd;
}

struct plan_job *planning_completed(struct planning *p)
{
    uint64_t count;
    pthread_mutex_lock(&p->lock);
    struct planned *one = p->done;
    if (one && !(p->done = one->next)) {
        p->done_end = &p->done;
        if (read(p->fd, &count, sizeof count) < 0) {
            /* nothing to read: as well */
        }
    }
    pthread_mutex_unlock(&p->lock);
    struct plan_job *job = one ? one->job : NULL;
    free(one);
    return job;
}
