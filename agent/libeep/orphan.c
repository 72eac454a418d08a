/* The agent's process has died without a word: the engine goes on stepping in its view, on the page and the memory that
 * outlive that process, and libeep's thread looks for the next one.  It is told where we are and says again what may
 * have got lost; so do we.  When nobody comes in time, or who comes is somebody else, that is the end.
 *
 * Nothing here touches the page.  libeep's thread. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/libeep/internal.h"
#include "common/clock.h"
#include "common/rpc.h"

#define RETRY_MS 50

/* The connection's remains are dropped; from here on nothing is sent. */
static void link_drop(struct eep *eep)
{
    pthread_mutex_lock(&eep->send_lock);
    atomic_store(&eep->orphan, true);
    if (eep->sock >= 0)
        close(eep->sock);
    eep->sock = -1;
    engine_writer_done(&eep->writer);
    pthread_mutex_unlock(&eep->send_lock);
    engine_reader_done(&eep->reader);
    incoming_drop(eep);
}

static int resume_send(struct eep *eep, struct err *err)
{
    Eep__Engine__Attach attach;
    Eep__Engine__Resume body = EEP__ENGINE__RESUME__INIT;
    pthread_mutex_lock(&eep->lock);
    attach_fill(eep, &attach);
    char *endpoint = eep->endpoint ? strdup(eep->endpoint) : NULL;
    body.regions = eep->regions != NULL;
    pthread_mutex_unlock(&eep->lock);
    attach.endpoint = endpoint;
    body.protocol = ENGINE_PROTOCOL;
    body.incarnation = eep->incarnation;
    body.attach = &attach;
    body.view = atomic_load(&eep->view_epoch);
    body.map = atomic_load(&eep->page->map_applied);
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_RESUME;
    up.resume = &body;
    pthread_mutex_lock(&eep->send_lock);
    int rc = link_send_locked(eep, &up, err);
    pthread_mutex_unlock(&eep->send_lock);
    free(endpoint);
    return rc;
}

/* The first frame: 0 resumed, 1 not there yet, ERR_UNREACHABLE the connection has ended, else: refused. */
static int answer_take(struct eep *eep, struct err *err)
{
    struct engine_frame frame = {.n_fds = 0};
    int filled = engine_reader_fill(&eep->reader, eep->sock, err);
    int rc = engine_reader_next(&eep->reader, ENGINE_FRAME_DOWN, &frame, filled < 0 ? NULL : err);
    if (rc <= 0)
        return filled < 0 ? filled : rc < 0 ? rc : 1;
    Eep__Engine__EngineDown *down =
        (Eep__Engine__EngineDown *)engine_frame_unpack(&eep__engine__engine_down__descriptor, &frame);
    rc = 0;
    if (down && down->body_case == EEP__ENGINE__ENGINE_DOWN__BODY_REFUSED)
        rc = err_set(err, ERR_CONFLICT, "the agent's next process refused: %s", down->refused->why);
    else if (down && down->body_case == EEP__ENGINE__ENGINE_DOWN__BODY_DETACH)
        rc = err_set(err, ERR_CONFLICT, "the agent's next process refused: %s",
                     down->detach->why ? down->detach->why : "no reason given");
    else if (!down || down->body_case != EEP__ENGINE__ENGINE_DOWN__BODY_RESUMED)
        rc = err_set(err, ERR_PROTOCOL, "the agent's first message is not an answer to resume");
    rpc_unpack_free(down ? &down->base : NULL);
    engine_frame_done(&frame);
    return rc;
}

/* How long it may still take; 0: no longer. */
static uint32_t patience_left(const struct eep *eep, uint64_t since_ms)
{
    bool held = atomic_load(&eep->page->engine_state) == PAGE_ENGINE_HELD;
    uint64_t limit = eep->patience.orphan_ms, gone = clock_now_ms() - since_ms;
    if (held && eep->patience.held_ms > limit)
        limit = eep->patience.held_ms;
    return gone < limit ? (uint32_t)(limit - gone) : 0;
}

/* One try, or one look at the try that waits for its answer: 0 resumed, 1 go on, else the end. */
static int orphan_try(struct eep *eep, struct err *err)
{
    int rc = 0;
    if (eep->sock < 0) {
        int sock;
        if (link_open(eep->path, &sock, err))
            return 1;
        pthread_mutex_lock(&eep->send_lock);
        eep->sock = sock;
        pthread_mutex_unlock(&eep->send_lock);
        rc = resume_send(eep, err);
    }
    if (!rc)
        rc = answer_take(eep, err);
    if (rc == ERR_UNREACHABLE || rc == ERR_IO || rc == ERR_TIMEOUT) {
        link_drop(eep);
        return 1;
    }
    return rc;
}

/* Heard again: what was not said while it was away, in the view that is still in use. */
static void say_again(struct eep *eep)
{
    pthread_mutex_lock(&eep->send_lock);
    atomic_store(&eep->orphan, false);
    pthread_mutex_unlock(&eep->send_lock);
    uint64_t view = atomic_load(&eep->view_epoch);
    uint64_t failed = atomic_load(&eep->failed_view), wave = atomic_load(&eep->wave_view);
    if (failed && failed == view)
        left_step_send(eep, atomic_load(&eep->failed_step), failed);
    if (wave && wave == view)
        wave_send(eep, wave, atomic_load(&eep->wave_step));
}

int orphan_wait(struct eep *eep, struct err *err)
{
    if (!eep->incarnation || eep->cut || eep->patience.orphan_ms == 0 || atomic_load(&eep->leaving))
        return ERR_UNREACHABLE;
    uint64_t since_ms = clock_now_ms();
    uint32_t left;
    link_drop(eep);
    pthread_mutex_lock(&eep->lock); /* who waits for an answer waits in vain */
    eep->losses++;
    pthread_cond_broadcast(&eep->cond);
    pthread_mutex_unlock(&eep->lock);
    while ((left = patience_left(eep, since_ms)) > 0) {
        int rc = orphan_try(eep, err);
        if (rc == 0)
            say_again(eep);
        if (rc <= 0)
            return rc;
        struct pollfd p[2] = {{.fd = eep->stop_fd, .events = POLLIN}, {.fd = eep->sock, .events = POLLIN}};
        int ready = poll(p, 2, (int)(left < RETRY_MS ? left : RETRY_MS)); /* a negative descriptor is passed over */
        if (ready > 0 && p[0].revents)
            return err_set(err, ERR_ABORTED, "eep_detach was called");
    }
    return err_set(err, ERR_UNREACHABLE, "the agent's process ended and did not come back within %llu ms",
                   (unsigned long long)(clock_now_ms() - since_ms));
}
