/* The core's actions towards the engine: page stores, wake-ups, and messages.  Loop thread; nothing here blocks. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/engine_socket_internal.h"
#include "agent/weights.h"

/* ---- views and maps on the wire ---- */

/* What is routed to, in a fresh array that the caller frees; entries are the map's own. */
static int32_t *map_fill(const struct expert_map *map, Eep__Engine__ExpertMap *wire)
{
    size_t n = (size_t)map->layers * map->ranks * map->slots;
    int32_t *routed = malloc((n ? n : 1) * sizeof *routed);
    bool even = true;
    if (!routed)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        routed[i] = map->live[i] ? map->held[i] : -1;
        even = even && map->live[i] <= 1;
    }
    eep__engine__expert_map__init(wire);
    wire->layers = map->layers;
    wire->logical = map->logical;
    wire->ranks = map->ranks;
    wire->slots = map->slots;
    wire->version = map->version;
    wire->routed = routed;
    wire->n_routed = n;
    wire->has_entries = !even;
    if (!even)
        wire->entries = (ProtobufCBinaryData){n, map->live};
    return routed;
}

struct view_wire {
    Eep__Engine__View view;
    Eep__Engine__ExpertMap map;
    Eep__Engine__Member *members;
    Eep__Engine__Member **pointers;
};

static void view_wire_done(struct view_wire *w)
{
    free(w->members);
    free(w->pointers);
    free(w->map.routed);
}

/* Borrows the strings of `view`, which outlives the packing. */
static bool view_fill(const struct engine_socket *s, const struct view *view, struct view_wire *ret_wire)
{
    struct view_wire *w = ret_wire;
    memset(w, 0, sizeof *w);
    eep__engine__view__init(&w->view);
    w->members = calloc(view->n ? view->n : 1, sizeof *w->members);
    w->pointers = calloc(view->n ? view->n : 1, sizeof *w->pointers);
    if (!w->members || !w->pointers || (view->map && !map_fill(view->map, &w->map))) {
        view_wire_done(w);
        return false;
    }
    for (uint32_t i = 0; i < view->n; i++) {
        Eep__Engine__Member *m = &w->members[i];
        eep__engine__member__init(m);
        m->id = view->members[i].id;
        m->endpoint = view->members[i].endpoint;
        m->has_serving = m->has_draining = true;
        m->serving = view->members[i].serving;
        m->draining = view->members[i].draining;
        w->pointers[i] = m;
    }
    w->view.epoch = view->epoch;
    w->view.rank = view_rank(view, s->agent_id);
    w->view.kv_bytes = view->kv_bytes;
    w->view.members = w->pointers;
    w->view.n_members = view->n;
    w->view.map = view->map ? &w->map : NULL;
    return true;
}

static void send_prepare(struct engine_socket *s, const struct agent_action *a)
{
    struct view_wire w;
    if (!view_fill(s, a->view, &w)) {
        engine_conn_fail(s, "out of memory for a view");
        return;
    }
    Eep__Engine__Prepare body = EEP__ENGINE__PREPARE__INIT;
    body.op = a->op;
    body.attempt = a->attempt;
    body.view = &w.view;
    body.has_deadline_ms = true;
    body.deadline_ms = a->value < UINT32_MAX ? (uint32_t)a->value : UINT32_MAX;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_PREPARE;
    down.prepare = &body;
    engine_conn_send(s, &down, NULL, 0);
    view_wire_done(&w);
}

static void send_commit(struct engine_socket *s, const struct agent_action *a)
{
    struct view_wire w;
    if (!view_fill(s, a->view, &w)) {
        engine_conn_fail(s, "out of memory for a view");
        return;
    }
    Eep__Engine__Commit body = EEP__ENGINE__COMMIT__INIT;
    body.step = a->value;
    body.view = &w.view;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_COMMIT;
    down.commit = &body;
    engine_conn_send(s, &down, NULL, 0);
    view_wire_done(&w);
}

static void send_map(struct engine_socket *s, const struct agent_action *a)
{
    Eep__Engine__ExpertMap map;
    int32_t *routed = map_fill(a->map, &map);
    if (!routed) {
        engine_conn_fail(s, "out of memory for an expert map");
        return;
    }
    Eep__Engine__Map body = EEP__ENGINE__MAP__INIT;
    body.map = &map;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_MAP;
    down.map = &body;
    engine_conn_send(s, &down, NULL, 0);
    free(routed);
}

/* ---- weights ---- */

static void send_regions(struct engine_socket *s)
{
    const struct weights *w = worker_weights(s->worker);
    struct err err;
    if (!w) {
        engine_conn_fail(s, "there are no weights to give to the engine");
        return;
    }
    if (engine_socket_load_size(s, w->manifest.layers, w->manifest.slots, &err)) {
        engine_conn_fail(s, "%s", err.text);
        return;
    }
    struct blob *blob = w->model->manifest;
    uint32_t total = w->manifest.n_regions;
    for (uint32_t first = 0; first == 0 || first < total; first += ENGINE_FRAME_FDS_MAX) {
        uint32_t count = total - first < ENGINE_FRAME_FDS_MAX ? total - first : ENGINE_FRAME_FDS_MAX;
        int fds[ENGINE_FRAME_FDS_MAX];
        for (uint32_t i = 0; i < count; i++)
            fds[i] = w->regions[first + i].fd;
        Eep__Engine__Regions body = EEP__ENGINE__REGIONS__INIT;
        body.first = first;
        body.count = count;
        body.total = total;
        if (first == 0) {
            body.has_manifest = true;
            body.manifest.data = blob->data;
            body.manifest.len = blob->len;
        }
        Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
        down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_REGIONS;
        down.regions = &body;
        engine_conn_send(s, &down, fds, count);
    }
}

static void send_load(struct engine_socket *s, const struct agent_action *a)
{
    const struct expert_map *map = a->map;
    size_t n = (size_t)map->layers * map->slots;
    int32_t *held = malloc((n ? n : 1) * sizeof *held);
    if (!held || a->self >= map->ranks) {
        engine_conn_fail(s, "cannot ask the engine to load slots of party %u", a->self);
        free(held);
        return;
    }
    for (uint32_t layer = 0; layer < map->layers; layer++)
        memcpy(held + (size_t)layer * map->slots, map->held + expert_map_at(map, layer, a->self, 0),
               map->slots * sizeof *held);
    engine_socket_discard(s);
    expert_map_unref(s->load_map);
    s->load_map = expert_map_ref(a->map);
    s->load_self = a->self;
    s->load_work = a->work.id;
    Eep__Engine__Load body = EEP__ENGINE__LOAD__INIT;
    body.layers = map->layers;
    body.slots = map->slots;
    body.held = held;
    body.n_held = n;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_LOAD;
    down.load = &body;
    engine_conn_send(s, &down, NULL, 0);
    free(held);
}

void engine_socket_sealed(struct engine_socket *s, int code, const char *text)
{
    if (s->sealing) {
        s->sealing = false;
        if (code == 0)
            s->allocated = false; /* they are the rank's weights now */
        else if (!s->conn)
            engine_socket_discard(s);
    }
    if (code == 0) {
        expert_map_unref(s->load_map);
        s->load_map = NULL;
    }
    if (!s->conn || !s->conn->attached)
        return;
    Eep__Engine__Sealed body = EEP__ENGINE__SEALED__INIT;
    body.code = code;
    body.text = (char *)(uintptr_t)text;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_SEALED;
    down.sealed = &body;
    engine_conn_send(s, &down, NULL, 0);
}

/* ---- short ones ---- */

static void send_abort(struct engine_socket *s, const struct agent_action *a)
{
    Eep__Engine__Abort body = EEP__ENGINE__ABORT__INIT;
    body.op = a->op;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_ABORT;
    down.abort = &body;
    engine_socket_discard(s);
    engine_conn_send(s, &down, NULL, 0);
}

static void send_drain(struct engine_socket *s, const struct agent_action *a)
{
    Eep__Engine__Drain body = EEP__ENGINE__DRAIN__INIT;
    body.deadline_ms = a->value < UINT32_MAX ? (uint32_t)a->value : UINT32_MAX;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_DRAIN;
    down.drain = &body;
    engine_conn_send(s, &down, NULL, 0);
}

static void send_revoke(struct engine_socket *s, const struct agent_action *a)
{
    Eep__Engine__Revoke body = EEP__ENGINE__REVOKE__INIT;
    body.epoch = a->epoch;
    body.why = (char *)(uintptr_t)a->text;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_REVOKE;
    down.revoke = &body;
    engine_conn_send(s, &down, NULL, 0);
}

static void send_release(struct engine_socket *s)
{
    Eep__Engine__Release body = EEP__ENGINE__RELEASE__INIT;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_RELEASE;
    down.release = &body;
    engine_socket_discard(s);
    engine_conn_send(s, &down, NULL, 0);
}

static void send_lease(struct engine_socket *s, const struct agent_action *a)
{
    if (!s->incarnation)
        return; /* nobody comes after us */
    Eep__Engine__Lease body = EEP__ENGINE__LEASE__INIT;
    body.orphan_ms = a->value < UINT32_MAX ? (uint32_t)a->value : UINT32_MAX;
    body.held_ms = a->epoch < UINT32_MAX ? (uint32_t)a->epoch : UINT32_MAX;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_LEASE;
    down.lease = &body;
    engine_conn_send(s, &down, NULL, 0);
}

static void send_resumed(struct engine_socket *s)
{
    Eep__Engine__Resumed body = EEP__ENGINE__RESUMED__INIT;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_RESUMED;
    down.resumed = &body;
    engine_conn_send(s, &down, NULL, 0);
}

static void cut_off(struct engine_socket *s, const struct agent_action *a)
{
    Eep__Engine__Detach body = EEP__ENGINE__DETACH__INIT;
    body.why = (char *)(uintptr_t)a->text;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_DETACH;
    down.detach = &body;
    engine_conn_send(s, &down, NULL, 0);
    engine_conn_fail(s, "cut off: %s", a->text);
}

void engine_socket_perform(struct engine_socket *s, const struct agent_action *a)
{
    uint64_t one = 1;
    ssize_t wrote;
    if (a->type == AA_PAGE) {
        page_store(s->page, a->word, a->value);
        return;
    }
    if (a->type == AA_WAKE) {
        wrote = write(s->wake_fd, &one, sizeof one); /* a full counter is awake enough */
        (void)wrote;
        return;
    }
    if (!s->conn || !s->conn->attached || s->conn->failed)
        return;
    switch (a->type) {
    case AA_ENGINE_PREPARE: send_prepare(s, a); return;
    case AA_ENGINE_COMMIT: send_commit(s, a); return;
    case AA_ENGINE_ABORT: send_abort(s, a); return;
    case AA_ENGINE_MAP: send_map(s, a); return;
    case AA_ENGINE_DRAIN: send_drain(s, a); return;
    case AA_ENGINE_REVOKE: send_revoke(s, a); return;
    case AA_ENGINE_REGIONS: send_regions(s); return;
    case AA_ENGINE_RELEASE: send_release(s); return;
    case AA_ENGINE_LOAD: send_load(s, a); return;
    case AA_ENGINE_DETACH: cut_off(s, a); return;
    case AA_ENGINE_LEASE: send_lease(s, a); return;
    case AA_ENGINE_RESUME: send_resumed(s); return;
    default: return; /* not ours */
    }
}
