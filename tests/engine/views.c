/* Meshes of views: built in the background when a view is prepared, adopted when it is switched to; built on the spot
 * when nobody prepared it.  See engine.h.
 *
 *   PREPARE -> builder thread -> eep_prepared -> (in e->prepare) -> adopted in the step that switches
 *                  |                                  |
 *                  +-- ABORT, REVOKE, newer attempt --+--> dropped
 *
 * Which mesh a view gets is decided alike on all its ranks: the prepared one where one was prepared for exactly these
 * engines (all have it, or the view would not have been committed), else the present one where the engines are the same
 * and nothing was revoked (a change of map only), else one by the epoch (a repair). */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/engine/engine.h"

struct prepare {
    struct engine *engine;
    struct prepare *previous; /* joined and freed by this one's thread */
    pthread_t thread;
    uint64_t op, attempt;
    uint32_t limit_ms;
    struct mesh_peer *peers; /* [n], owned */
    uint32_t n;
    int32_t self;
    /* under the engine's lock */
    bool cancelled, silent;
    struct mesh *mesh;
};

/* "request=127.0.0.1:1 mesh=127.0.0.1:1 id=5eed" */
static void peer_parse(const struct eep_member *m, struct mesh_peer *ret_peer)
{
    *ret_peer = (struct mesh_peer){.serving = m->serving};
    const char *mesh = m->endpoint ? strstr(m->endpoint, "mesh=") : NULL;
    const char *id = m->endpoint ? strstr(m->endpoint, "id=") : NULL;
    if (mesh)
        snprintf(ret_peer->address, sizeof ret_peer->address, "%.*s", (int)strcspn(mesh + 5, " "), mesh + 5);
    if (id)
        ret_peer->id = strtoull(id + 3, NULL, 16);
}

static struct mesh_peer *peers_of(const struct engine *e, const struct eep_view *view)
{
    struct mesh_peer *peers = calloc(view->n ? view->n : 1, sizeof *peers);
    for (uint32_t r = 0; peers && r < view->n; r++)
        peer_parse(&view->members[r], &peers[r]);
    /* The view may be older than this process's latest word, but it is us. */
    if (peers && view->rank >= 0)
        peers[view->rank].id = e->id;
    return peers;
}

/* ---- preparing ---- */

static bool prepare_cancelled(void *user)
{
    struct prepare *p = user;
    pthread_mutex_lock(&p->engine->lock);
    bool cancelled = p->cancelled || p->engine->stop || p->engine->detached;
    pthread_mutex_unlock(&p->engine->lock);
    return cancelled;
}

static void prepare_free(struct prepare *p)
{
    if (!p)
        return;
    pthread_join(p->thread, NULL);
    mesh_free(p->mesh);
    free(p->peers);
    free(p);
}

static void *prepare_main(void *user)
{
    struct prepare *p = user;
    struct engine *e = p->engine;
    struct mesh *mesh = NULL;
    struct err err = {0};
    prepare_free(p->previous);
    p->previous = NULL;
    struct mesh_build build = {.lot = e->lot,
                               .key = {.op = p->op, .attempt = p->attempt},
                               .peers = p->peers,
                               .n = p->n,
                               .self = (uint32_t)p->self,
                               .limit_ms = p->limit_ms,
                               .cancelled = prepare_cancelled,
                               .user = p};
    int rc = p->self < 0 ? 0 : mesh_build(&build, &mesh, &err);
    pthread_mutex_lock(&e->lock);
    bool silent = p->silent;
    if (rc == 0 && p->cancelled)
        rc = err_set(&err, ERR_ABORTED, "the view was revoked");
    else if (rc == 0) {
        p->mesh = mesh;
        mesh = NULL;
    }
    pthread_mutex_unlock(&e->lock);
    mesh_free(mesh);
    if (!silent)
        eep_prepared(e->eep, p->op, p->attempt, rc, rc ? err.text : NULL);
    log_event(e->log, rc ? LOG_LEVEL_WARN : LOG_LEVEL_INFO, "prepared",
              "op=%" PRIu64 " attempt=%" PRIu64 " ranks=%u why=%s", p->op, p->attempt, p->n, rc ? err.text : "");
    return NULL;
}

void prepare_start(struct engine *e, const struct eep_event *event)
{
    prepare_drop(e, 0, true);
    struct prepare *p = calloc(1, sizeof *p);
    struct mesh_peer *peers = peers_of(e, event->view);
    if (!p || !peers)
        goto fail;
    *p = (struct prepare){.engine = e,
                          .op = event->op,
                          .attempt = event->attempt,
                          .limit_ms =
                              e->options.stall_ms < event->deadline_ms ? e->options.stall_ms : event->deadline_ms,
                          .peers = peers,
                          .n = event->view->n,
                          .self = event->view->rank};
    pthread_mutex_lock(&e->lock);
    p->previous = e->prepare;
    bool started = pthread_create(&p->thread, NULL, prepare_main, p) == 0;
    if (started)
        e->prepare = p;
    pthread_mutex_unlock(&e->lock);
    if (started)
        return;
fail:
    free(p);
    free(peers);
    eep_prepared(e->eep, event->op, event->attempt, ERR_NOMEM, "out of memory for a mesh");
}

void prepare_drop(struct engine *e, uint64_t op, bool silent)
{
    struct mesh *mesh = NULL;
    pthread_mutex_lock(&e->lock);
    struct prepare *p = e->prepare;
    if (p && (op == 0 || p->op == op)) {
        p->cancelled = true;
        p->silent |= silent;
        mesh = p->mesh;
        p->mesh = NULL;
    }
    pthread_mutex_unlock(&e->lock);
    mesh_lot_kick(e->lot);
    mesh_free(mesh);
}

void prepare_finish(struct engine *e)
{
    prepare_drop(e, 0, true);
    pthread_mutex_lock(&e->lock);
    struct prepare *p = e->prepare;
    e->prepare = NULL;
    pthread_mutex_unlock(&e->lock);
    prepare_free(p);
}

static struct mesh *prepare_adopt(struct engine *e, const struct mesh_peer *peers, uint32_t n, uint32_t self)
{
    struct mesh *mesh = NULL;
    pthread_mutex_lock(&e->lock);
    struct prepare *p = e->prepare;
    if (p && p->mesh && !p->cancelled && mesh_matches(p->mesh, peers, n, self)) {
        mesh = p->mesh;
        p->mesh = NULL;
    }
    pthread_mutex_unlock(&e->lock);
    return mesh;
}

/* ---- switching ---- */

/* A rank that had completed its step when the view was revoked must not keep the mesh of it: those who had not have
 * thrown theirs away. */
static bool mesh_is_void(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    bool is_void = e->mesh_epoch <= e->void_epoch;
    pthread_mutex_unlock(&e->lock);
    return is_void;
}

static bool repair_cancelled(void *user)
{
    struct engine *e = user;
    pthread_mutex_lock(&e->lock);
    bool stop = e->stop || e->detached;
    pthread_mutex_unlock(&e->lock);
    return stop || eep_revoked(e->eep);
}

int engine_switch(struct engine *e, const struct eep_step *step, struct err *err)
{
    const struct eep_view *view = step->view;
    struct mesh_peer *peers = peers_of(e, view);
    if (!peers)
        return err_set(err, ERR_NOMEM, "out of memory for a view of %u ranks", view->n);
    uint32_t self = (uint32_t)view->rank;
    const char *how = "prepared";
    int rc = 0;
    struct mesh *mesh = prepare_adopt(e, peers, view->n, self);
    if (!mesh && e->mesh && !mesh_is_void(e) && mesh_matches(e->mesh, peers, view->n, self)) {
        mesh = e->mesh;
        e->mesh = NULL;
        how = "kept";
    } else if (!mesh) {
        struct mesh_build build = {.lot = e->lot,
                                   .key = {.epoch = view->epoch},
                                   .peers = peers,
                                   .n = view->n,
                                   .self = self,
                                   .limit_ms = e->options.stall_ms,
                                   .cancelled = repair_cancelled,
                                   .user = e};
        rc = mesh_build(&build, &mesh, err);
        how = "repair";
    }
    free(peers);
    mesh_free(e->mesh);
    e->mesh = mesh;
    if (rc)
        return rc;
    e->mesh_epoch = view->epoch;
    e->rank = view->rank;
    log_event(e->log, LOG_LEVEL_INFO, "view",
              "epoch=%" PRIu64 " step=%" PRIu64 " rank=%d ranks=%u mesh=%s held_us=%" PRIu64, view->epoch, step->step,
              view->rank, view->n, how, step->held_ns / 1000);
    return 0;
}
