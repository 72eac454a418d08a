/* What the engine says: each message becomes an event of the agent's core, or a call of the worker.
 * Loop thread.  The engine is not trusted with our state: a message that makes no sense ends the connection. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent/engine_socket_internal.h"
#include "agent/weights.h"
#include "common/rpc.h"

/* ---- attach ---- */

static void raise_attached(struct engine_socket *s, struct agent_event event)
{
    const struct engine_conn *c = s->conn;
    event.text = c->peer;
    event.dispatch = c->dispatch;
    event.endpoint = c->endpoint;
    event.kv_bytes = c->kv_bytes;
    event.seals = c->seals;
    event.masks = c->masks;
    event.layers = c->layers;
    event.logical = c->logical;
    engine_socket_raise(s, event);
}

/* What the engine tells of itself; false: it was refused. */
static bool take_attach(struct engine_socket *s, const Eep__Engine__Attach *m)
{
    struct engine_conn *c = s->conn;
    char why[160];
    if (m->protocol != ENGINE_PROTOCOL) {
        snprintf(why, sizeof why, "the engine's libeep speaks protocol %u, this agent %u: use the libeep that came with it",
                 m->protocol, ENGINE_PROTOCOL);
        engine_conn_refuse(s, why);
        return false;
    }
    if (m->dispatch != DISPATCH_SOURCE_ROUTED && m->dispatch != DISPATCH_REPLICATED) {
        snprintf(why, sizeof why, "unknown kind of dispatch %u", m->dispatch);
        engine_conn_refuse(s, why);
        return false;
    }
    if (m->endpoint && strlen(m->endpoint) >= sizeof c->endpoint) {
        snprintf(why, sizeof why, "the endpoint is longer than %zu bytes", sizeof c->endpoint - 1);
        engine_conn_refuse(s, why);
        return false;
    }
    if (engine_socket_predecessor_lives(s, c->pid)) {
        snprintf(why, sizeof why, "the engine before it (pid %ld) has not ended: what it launched may still run on the GPU; "
                                  "end it, or attach again when it has ended",
                 (long)s->predecessor_pid);
        engine_conn_refuse(s, why);
        return false;
    }
    snprintf(c->endpoint, sizeof c->endpoint, "%s", m->endpoint ? m->endpoint : "");
    c->dispatch = m->dispatch;
    c->kv_bytes = m->kv_bytes;
    c->seals = m->seals != NULL;
    c->masks = m->has_masks && m->masks;
    c->layers = m->layers;
    c->logical = m->logical;
    c->attached = true;
    return true;
}

static void on_attach(struct engine_socket *s, const Eep__Engine__Attach *m)
{
    if (!take_attach(s, m))
        return;
    if (s->awaited) { /* first: the new one takes the page as it is when it is told of it */
        s->awaited = false;
        engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_DETACHED,
                                                    .text = "another engine attached to its re-adopted agent"});
    }
    engine_socket_attached(s);
    raise_attached(s, (struct agent_event){.type = AE_ENGINE_ATTACHED});
}

static void on_resume(struct engine_socket *s, const Eep__Engine__Resume *m)
{
    char why[200];
    if (!s->incarnation || m->incarnation != s->incarnation) {
        snprintf(why, sizeof why,
                 "agent %s is another incarnation now: it could not re-adopt what it held; attach anew", s->agent_id);
        engine_conn_refuse(s, why);
        return;
    }
    if (!take_attach(s, m->attach))
        return;
    s->awaited = false;
    const struct weights *w = worker_weights(s->worker);
    struct err err;
    if (w && m->regions && engine_socket_load_size(s, w->manifest.layers, w->manifest.slots, &err)) {
        engine_conn_fail(s, "%s", err.text);
        return;
    }
    engine_socket_resumed(s);
    raise_attached(s, (struct agent_event){
                          .type = AE_ENGINE_RESUMED, .epoch = m->view, .value = m->map, .regions = m->regions});
}

static void on_endpoint(struct engine_socket *s, const Eep__Engine__Endpoint *m)
{
    if (strlen(m->endpoint) >= sizeof s->conn->endpoint) {
        engine_conn_fail(s, "protocol error: an endpoint of %zu bytes", strlen(m->endpoint));
        return;
    }
    snprintf(s->conn->endpoint, sizeof s->conn->endpoint, "%s", m->endpoint);
    engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_ENDPOINT, .endpoint = s->conn->endpoint});
}

/* ---- a layout of the engine's own ---- */

static void answer_region(struct engine_socket *s, int code, const char *text, int fd)
{
    Eep__Engine__RegionAlloced body = EEP__ENGINE__REGION_ALLOCED__INIT;
    body.code = code;
    body.text = (char *)(uintptr_t)text;
    Eep__Engine__EngineDown down = EEP__ENGINE__ENGINE_DOWN__INIT;
    down.body_case = EEP__ENGINE__ENGINE_DOWN__BODY_REGION_ALLOCED;
    down.region_alloced = &body;
    engine_conn_send(s, &down, &fd, fd >= 0 ? 1 : 0);
}

static void on_region_alloc(struct engine_socket *s, const Eep__Engine__RegionAlloc *m)
{
    struct region region = {.kind = m->expert ? REGION_EXPERT : REGION_DENSE,
                            .bytes = m->bytes,
                            .layer = m->layer,
                            .slots = m->slots,
                            .stride = m->stride,
                            .slot_bytes = m->slot_bytes};
    if (!s->load_map || s->sealing) {
        answer_region(s, ERR_CONFLICT, "regions are allocated during a cold start, before they are sealed", -1);
        return;
    }
    if (!*m->name || strlen(m->name) >= sizeof region.name || (m->part && strlen(m->part) >= sizeof region.part)) {
        answer_region(s, ERR_INVALID, "the name of the region or of its part is empty or too long", -1);
        return;
    }
    snprintf(region.name, sizeof region.name, "%s", m->name);
    snprintf(region.part, sizeof region.part, "%s", m->part ? m->part : "");
    struct memory_region memory;
    struct err err;
    int rc = worker_region_alloc(s->worker, &region, &memory, &err);
    if (rc) {
        answer_region(s, rc, err.text, -1);
        return;
    }
    s->allocated = true;
    answer_region(s, 0, NULL, memory.fd);
}

static void on_seal(struct engine_socket *s, const Eep__Engine__Seal *m)
{
    struct err err = {.code = 0};
    struct manifest manifest;
    if (!s->load_map || !s->allocated || s->sealing) {
        engine_socket_sealed(s, ERR_CONFLICT, "nothing to seal: no cold start has allocated regions here");
        return;
    }
    struct blob *blob = blob_new(m->manifest.data, m->manifest.len);
    int rc = blob ? manifest_decode(blob, &manifest, &err) : err_set(&err, ERR_NOMEM, "out of memory");
    blob_unref(blob);
    if (!rc) {
        const struct expert_map *map = s->load_map;
        if (manifest.layers != map->layers || manifest.logical != map->logical || manifest.slots != map->slots)
            rc = err_set(&err, ERR_INVALID,
                         "the manifest has %u layers of %u experts in %u slots, the cold start %u of %u in %u",
                         manifest.layers, manifest.logical, manifest.slots, map->layers, map->logical, map->slots);
        if (!rc)
            rc = engine_socket_load_size(s, manifest.layers, manifest.slots, &err);
        if (!rc) {
            s->sealing = true;
            worker_seal(s->worker, s->load_work, &manifest, s->load_map, s->load_self);
        }
        manifest_done(&manifest);
    }
    if (rc)
        engine_socket_sealed(s, rc, err.text);
}

/* ---- the rest ---- */

static void on_prepared(struct engine_socket *s, const Eep__Engine__Prepared *m)
{
    engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_PREPARED,
                                                .op = m->op,
                                                .attempt = m->attempt,
                                                .code = m->has_code ? m->code : 0,
                                                .text = m->why});
}

static void dispatch(struct engine_socket *s, const Eep__Engine__EngineUp *up)
{
    switch (up->body_case) {
    case EEP__ENGINE__ENGINE_UP__BODY_PREPARED: on_prepared(s, up->prepared); return;
    case EEP__ENGINE__ENGINE_UP__BODY_DRAINED:
        engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_DRAINED});
        return;
    case EEP__ENGINE__ENGINE_UP__BODY_RELEASED:
        engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_RELEASED});
        return;
    case EEP__ENGINE__ENGINE_UP__BODY_REGION_ALLOC: on_region_alloc(s, up->region_alloc); return;
    case EEP__ENGINE__ENGINE_UP__BODY_SEAL: on_seal(s, up->seal); return;
    case EEP__ENGINE__ENGINE_UP__BODY_WAVE:
        engine_socket_raise(
            s, (struct agent_event){.type = AE_ENGINE_WAVE, .epoch = up->wave->epoch, .value = up->wave->step});
        return;
    case EEP__ENGINE__ENGINE_UP__BODY_LEFT_STEP:
        engine_socket_raise(s, (struct agent_event){.type = AE_ENGINE_LEFT_STEP,
                                                    .value = up->left_step->step,
                                                    .epoch = up->left_step->has_failed_view ? up->left_step->failed_view : 0});
        return;
    case EEP__ENGINE__ENGINE_UP__BODY_ENDPOINT: on_endpoint(s, up->endpoint); return;
    case EEP__ENGINE__ENGINE_UP__BODY_GOODBYE:
        s->conn->goodbye = true;
        engine_conn_fail(s, "the engine said goodbye%s%s", up->goodbye->why ? ": " : "",
                         up->goodbye->why ? up->goodbye->why : "");
        return;
    default: engine_conn_fail(s, "protocol error: a message that this agent does not know"); return;
    }
}

void engine_socket_up(struct engine_socket *s, struct engine_frame *frame)
{
    Eep__Engine__EngineUp *up =
        (Eep__Engine__EngineUp *)engine_frame_unpack(&eep__engine__engine_up__descriptor, frame);
    if (!up)
        engine_conn_fail(s, "protocol error: a malformed message of %zu bytes", frame->len);
    else if (s->conn->attached == (up->body_case == EEP__ENGINE__ENGINE_UP__BODY_ATTACH ||
                                   up->body_case == EEP__ENGINE__ENGINE_UP__BODY_RESUME))
        engine_conn_fail(s, "protocol error: %s", s->conn->attached ? "it attached twice" : "it did not attach first");
    else if (up->body_case == EEP__ENGINE__ENGINE_UP__BODY_ATTACH)
        on_attach(s, up->attach);
    else if (up->body_case == EEP__ENGINE__ENGINE_UP__BODY_RESUME)
        on_resume(s, up->resume);
    else
        dispatch(s, up);
    rpc_unpack_free(up ? &up->base : NULL);
}
