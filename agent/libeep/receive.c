/* libeep's own thread: takes the agent's messages, keeps what the stepping thread will need, and tells the engine.
 * Nothing here writes the control page or the expert maps: those belong to the stepping thread. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/libeep/internal.h"
#include "common/rpc.h"

void wake_stepping(struct eep *eep)
{
    uint64_t one = 1;
    ssize_t wrote = write(eep->wake_fd, &one, sizeof one); /* a full counter is awake enough */
    (void)wrote;
}

static void say(struct eep *eep, struct eep_event event)
{
    eep->on_event(eep->user, &event);
}

/* ---- revoke ----
 * The agent has shut the gate before it revokes.  Either we see in_step here and leave the word to the stepping thread,
 * which looks at left_owed when it comes out; or in_step is false, and the gate keeps the engine from another step. */

bool left_step_claim(struct eep *eep)
{
    return atomic_load(&eep->left_owed) && atomic_exchange(&eep->left_owed, false);
}

void left_step_send(struct eep *eep, uint64_t step, uint64_t failed_view)
{
    Eep__Engine__LeftStep body = EEP__ENGINE__LEFT_STEP__INIT;
    body.step = step;
    body.has_failed_view = failed_view != 0;
    body.failed_view = failed_view;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_LEFT_STEP;
    up.left_step = &body;
    struct err err;
    int rc = link_send(eep, &up, &err); /* without an agent nobody waits for it */
    (void)rc;
}

void wave_send(struct eep *eep, uint64_t view, uint64_t step)
{
    Eep__Engine__Wave body = EEP__ENGINE__WAVE__INIT;
    body.epoch = view;
    body.step = step;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_WAVE;
    up.wave = &body;
    struct err err;
    int rc = link_send(eep, &up, &err); /* if that fails, the next boundary says why */
    (void)rc;
}

static void revoke_signal(struct eep *eep)
{
    uint64_t one = 1;
    ssize_t wrote = write(eep->revoke_fd, &one, sizeof one);
    (void)wrote;
}

static void on_revoke(struct eep *eep, const Eep__Engine__Revoke *m)
{
    pthread_mutex_lock(&eep->lock); /* against the flip that clears the descriptor */
    uint64_t view = atomic_load(&eep->page->cur_view);
    bool current = m->epoch >= view && view != 0;
    if (current)
        revoke_signal(eep);
    pthread_mutex_unlock(&eep->lock);
    atomic_store(&eep->left_owed, true);
    if (!atomic_load(&eep->in_step) && left_step_claim(eep))
        left_step_send(eep, atomic_load(&eep->page->intent), 0);
    wake_stepping(eep);
    if (current)
        say(eep, (struct eep_event){.kind = EEP_EVENT_REVOKE, .epoch = m->epoch, .text = m->why});
}

/* ---- weights ---- */

void incoming_drop(struct eep *eep)
{
    for (uint32_t i = 0; i < eep->incoming.got; i++)
        close(eep->incoming.fds[i]);
    free(eep->incoming.fds);
    if (eep->incoming.manifest)
        blob_unref(eep->incoming.manifest);
    memset(&eep->incoming, 0, sizeof eep->incoming);
}

static int incoming_start(struct eep *eep, const Eep__Engine__Regions *m, struct err *err)
{
    incoming_drop(eep);
    if (!m->has_manifest)
        return err_set(err, ERR_PROTOCOL, "regions without a manifest");
    if (m->total > 1000000)
        return err_set(err, ERR_PROTOCOL, "%u regions", m->total);
    eep->incoming.manifest = blob_new(m->manifest.data, m->manifest.len);
    eep->incoming.fds = calloc(m->total ? m->total : 1, sizeof(int));
    eep->incoming.total = m->total;
    if (!eep->incoming.manifest || !eep->incoming.fds)
        return err_set(err, ERR_NOMEM, "no memory for %u regions", m->total);
    return 0;
}

static int on_regions(struct eep *eep, const Eep__Engine__Regions *m, struct engine_frame *frame, struct err *err)
{
    int rc = m->first == 0 ? incoming_start(eep, m, err) : 0;
    if (rc)
        return rc;
    if (!eep->incoming.manifest || m->first != eep->incoming.got || m->total != eep->incoming.total ||
        m->count != frame->n_fds || m->count > m->total - m->first)
        return err_set(err, ERR_PROTOCOL, "regions %u to %u of %u came out of order", m->first, m->first + m->count,
                       m->total);
    for (uint32_t i = 0; i < m->count; i++)
        eep->incoming.fds[eep->incoming.got++] = engine_frame_take(frame, i);
    if (eep->incoming.got < eep->incoming.total)
        return 0;
    pthread_mutex_lock(&eep->lock);
    rc = regions_install(eep, eep->incoming.manifest, eep->incoming.fds, eep->incoming.total, err);
    pthread_mutex_unlock(&eep->lock);
    eep->incoming.got = 0; /* the descriptors are closed */
    incoming_drop(eep);
    if (!rc)
        say(eep, (struct eep_event){.kind = EEP_EVENT_REGIONS});
    return rc;
}

static int on_load(struct eep *eep, const Eep__Engine__Load *m, struct err *err)
{
    if (!eep->seals)
        return err_set(err, ERR_PROTOCOL, "asked to fill weights, but this engine brings no layout of its own");
    if (m->layers != eep->moe_layers || m->slots == 0 || (uint64_t)m->layers * m->slots != m->n_held)
        return err_set(err, ERR_PROTOCOL, "asked to fill %zu slots in %u layers of %u", m->n_held, m->layers, m->slots);
    for (size_t i = 0; i < m->n_held; i++)
        if (m->held[i] < -1 || m->held[i] >= (int32_t)eep->logical_experts)
            return err_set(err, ERR_PROTOCOL, "asked to load expert %d of %u", m->held[i], eep->logical_experts);
    pthread_mutex_lock(&eep->lock);
    eep->building_void = eep->building != NULL; /* of a cold start that was given up; the engine may still look at it */
    eep->load_slots = m->slots;
    pthread_mutex_unlock(&eep->lock);
    say(eep, (struct eep_event){
                 .kind = EEP_EVENT_LOAD, .load_map = m->held, .load_layers = m->layers, .load_slots = m->slots});
    return 0;
}

static void on_answer(struct eep *eep, int code, const char *text, int fd)
{
    pthread_mutex_lock(&eep->lock);
    if (eep->waiting && !eep->answered) {
        eep->answered = true;
        eep->answer_code = code;
        eep->answer_fd = fd;
        snprintf(eep->answer_text, sizeof eep->answer_text, "%s", text ? text : "");
        pthread_cond_broadcast(&eep->cond);
        fd = -1;
    }
    pthread_mutex_unlock(&eep->lock);
    if (fd >= 0)
        close(fd);
}

static void on_sealed(struct eep *eep, const Eep__Engine__Sealed *m)
{
    struct err err = {.code = 0};
    int code = m->code;
    pthread_mutex_lock(&eep->lock);
    if (code == 0)
        code = seal_finish(eep, &err);
    pthread_mutex_unlock(&eep->lock);
    on_answer(eep, code, m->code ? m->text : err.text, -1);
}

/* ---- views and maps ---- */

static int shape_check(struct eep *eep, const struct routing *routing, struct err *err)
{
    const struct maps_box *maps = atomic_load(&eep->maps);
    if (routing->routed && maps && !maps_fit(maps, routing))
        return err_set(err, ERR_PROTOCOL,
                       "a map of %u layers, %u experts, %u slots on %u ranks does not fit the weights (at most %u ranks)",
                       routing->layers, routing->logical, routing->slots, routing->ranks, eep->max_ranks);
    return 0;
}

static int on_prepare(struct eep *eep, const Eep__Engine__Prepare *m, struct err *err)
{
    struct view_box *view;
    int rc = view_from_wire(m->view, &view, err);
    if (rc)
        return rc;
    if (view->pub.n > eep->max_ranks) {
        char why[128];
        snprintf(why, sizeof why, "the view has %u ranks, this engine's maps are made for %u", view->pub.n,
                 eep->max_ranks);
        rc = eep_prepared(eep, m->op, m->attempt, ERR_LIMIT, why);
        (void)rc; /* if that fails, the connection is at its end, and poll says so */
    } else {
        say(eep, (struct eep_event){
                     .kind = EEP_EVENT_PREPARE, .op = m->op, .attempt = m->attempt, .view = &view->pub,
                     .deadline_ms = m->has_deadline_ms ? m->deadline_ms : UINT32_MAX});
    }
    view_release(view);
    return 0;
}

static int on_commit(struct eep *eep, const Eep__Engine__Commit *m, struct err *err)
{
    struct commit *commit = calloc(1, sizeof *commit);
    if (!commit)
        return err_set(err, ERR_NOMEM, "no memory for a view");
    int rc = view_from_wire(m->view, &commit->view, err);
    if (rc) {
        free(commit);
        return rc;
    }
    rc = shape_check(eep, &commit->view->routing, err);
    if (!rc && commit->view->pub.n > eep->max_ranks)
        rc = err_set(err, ERR_LIMIT, "the view has %u ranks, this engine's maps are made for %u", commit->view->pub.n,
                     eep->max_ranks);
    if (rc) {
        view_release(commit->view);
        free(commit);
        return rc;
    }
    pthread_mutex_lock(&eep->lock);
    commit_add(eep, commit);
    pthread_cond_broadcast(&eep->cond);
    pthread_mutex_unlock(&eep->lock);
    wake_stepping(eep);
    return 0;
}

static int on_map(struct eep *eep, const Eep__Engine__Map *m, struct err *err)
{
    struct map_update *update = calloc(1, sizeof *update);
    if (!update)
        return err_set(err, ERR_NOMEM, "no memory for an expert map");
    int rc = routing_from_wire(m->map, &update->routing, err);
    if (!rc)
        rc = shape_check(eep, &update->routing, err);
    if (rc) {
        update_free(update);
        return rc;
    }
    pthread_mutex_lock(&eep->lock);
    update_add(eep, update);
    pthread_mutex_unlock(&eep->lock);
    wake_stepping(eep);
    return 0;
}

/* ---- the loop ---- */

static int dispatch(struct eep *eep, const Eep__Engine__EngineDown *down, struct engine_frame *frame, struct err *err)
{
    switch (down->body_case) {
    case EEP__ENGINE__ENGINE_DOWN__BODY_REGIONS: return on_regions(eep, down->regions, frame, err);
    case EEP__ENGINE__ENGINE_DOWN__BODY_LOAD: return on_load(eep, down->load, err);
    case EEP__ENGINE__ENGINE_DOWN__BODY_PREPARE: return on_prepare(eep, down->prepare, err);
    case EEP__ENGINE__ENGINE_DOWN__BODY_COMMIT: return on_commit(eep, down->commit, err);
    case EEP__ENGINE__ENGINE_DOWN__BODY_MAP: return on_map(eep, down->map, err);
    case EEP__ENGINE__ENGINE_DOWN__BODY_ABORT:
        on_answer(eep, ERR_ABORTED, "the operation was aborted", -1);
        say(eep, (struct eep_event){.kind = EEP_EVENT_ABORT, .op = down->abort->op});
        return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_DRAIN:
        say(eep, (struct eep_event){.kind = EEP_EVENT_DRAIN, .deadline_ms = down->drain->deadline_ms});
        return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_REVOKE: on_revoke(eep, down->revoke); return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_RELEASE:
        on_answer(eep, ERR_ABORTED, "the weights are released", -1);
        say(eep, (struct eep_event){.kind = EEP_EVENT_RELEASE});
        return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_REGION_ALLOCED:
        on_answer(eep, down->region_alloced->code, down->region_alloced->text, engine_frame_take(frame, 0));
        return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_SEALED: on_sealed(eep, down->sealed); return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_LEASE:
        eep->patience.orphan_ms = down->lease->orphan_ms;
        eep->patience.held_ms = down->lease->held_ms;
        return 0;
    case EEP__ENGINE__ENGINE_DOWN__BODY_DETACH:
        eep->cut = true;
        return err_set(err, ERR_UNREACHABLE, "the agent cut this engine off: %s",
                       down->detach->why ? down->detach->why : "no reason given");
    default: return err_set(err, ERR_PROTOCOL, "a message from the agent that this libeep does not know");
    }
}

/* Everything that has arrived; 0 to go on. */
static int drain_socket(struct eep *eep, struct err *err)
{
    int rc = engine_reader_fill(&eep->reader, eep->sock, err);
    int filled = rc;
    for (;;) {
        struct engine_frame frame = {.n_fds = 0};
        rc = engine_reader_next(&eep->reader, ENGINE_FRAME_DOWN, &frame, filled < 0 ? NULL : err);
        if (rc <= 0)
            break;
        Eep__Engine__EngineDown *down =
            (Eep__Engine__EngineDown *)engine_frame_unpack(&eep__engine__engine_down__descriptor, &frame);
        rc = down ? dispatch(eep, down, &frame, err) : err_set(err, ERR_PROTOCOL, "a malformed message from the agent");
        rpc_unpack_free(down ? &down->base : NULL);
        engine_frame_done(&frame);
        if (rc)
            return rc;
    }
    return filled < 0 ? filled : rc < 0 ? rc : 0;
}

static void end(struct eep *eep, const char *why)
{
    pthread_mutex_lock(&eep->lock);
    snprintf(eep->dead_why, sizeof eep->dead_why, "%.255s", why);
    atomic_store(&eep->dead, true);
    pthread_cond_broadcast(&eep->cond);
    revoke_signal(eep); /* an engine inside an all-to-all must come out of it */
    pthread_mutex_unlock(&eep->lock);
    wake_stepping(eep);
}

/* Until the connection ends: why.  ERR_ABORTED: eep_detach was called. */
static int serve(struct eep *eep, struct err *err)
{
    /* What came along with the handshake's answer is in the reader already. */
    int rc = drain_socket(eep, err);
    while (!rc) {
        struct pollfd p[2] = {{.fd = eep->sock, .events = POLLIN}, {.fd = eep->stop_fd, .events = POLLIN}};
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait for the agent: %s", strerror(errno));
        if (p[1].revents)
            return err_set(err, ERR_ABORTED, "eep_detach was called");
        if (p[0].revents)
            rc = drain_socket(eep, err);
    }
    return rc;
}

void *receive_main(void *user)
{
    struct eep *eep = user;
    struct err err = {.code = 0};
    int rc;
    do
        rc = serve(eep, &err);
    while (rc == ERR_UNREACHABLE && (rc = orphan_wait(eep, &err)) == 0);
    end(eep, err.text);
    if (!atomic_load(&eep->leaving))
        say(eep, (struct eep_event){.kind = EEP_EVENT_DETACHED, .text = err.text});
    return NULL;
}
