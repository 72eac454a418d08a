/* Connections between agents and the coordinator: FIFO in each direction with random delays, cut at any moment, so that
 * what was under way is lost and the two sides notice at different times.  Single thread. */
#include "tests/sim/sim.h"

#include "common/msg_wire.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t network_delay(struct sim *s)
{
    uint64_t d = sim_between(s, s->delay_min, s->delay_max);

    return sim_chance(s, 10) ? d * 10 : d; /* now and then a slow one */
}

void network_connect(struct sim *s, struct sim_agent *a)
{
    struct agent_event event = {.type = AE_LINK_UP};

    if (a->conn)
        return;
    if (!s->coordinator.up || s->now < a->blocked_until) {
        sim_push(s, 50 * MS, SE_CONNECT, a->index, a->life);
        return;
    }
    if (s->n_conns == s->cap_conns) {
        size_t cap = s->cap_conns ? s->cap_conns * 2 : 64;
        struct sim_conn *conns = realloc(s->conns, cap * sizeof *conns);
        if (!conns) {
            sim_fail(s, "out of memory");
            return;
        }
        s->conns = conns;
        s->cap_conns = cap;
    }
    s->conns[s->n_conns++] = (struct sim_conn){.agent = a->index, .at_agent = true, .at_coordinator = true};
    a->conn = s->n_conns;
    sim_note(s, "%s a%02u connects: connection %" PRIu64, "net", a->index, a->conn);
    agent_event(s, a, &event);
}

/* A side that closes a connection, or dies, is told nothing; the other side finds out a little later.  What arrives
 * before it does is still delivered. */
void network_break(struct sim *s, uint64_t conn, bool half_open)
{
    struct sim_conn *c = &s->conns[conn - 1];
    uint64_t slow = half_open ? 60 * MS : 2 * MS;

    if (c->at_agent)
        sim_push(s, sim_between(s, 0, 2 * MS), SE_CUT_AGENT, c->agent, 0)->x = conn;
    if (c->at_coordinator)
        sim_push(s, sim_between(s, 0, slow), SE_CUT_COORDINATOR, c->agent, 0)->x = conn;
}

/* In some seeds as a struct, in others through its bytes. */
static struct msg *message_copy(struct sim *s, const struct msg *msg)
{
    struct msg *copy = calloc(1, sizeof *copy);
    struct err err = {0};
    uint8_t *data = NULL;
    size_t len = 0;

    if (!copy || !s->wire) {
        if (copy)
            msg_copy(copy, msg);
        return copy;
    }
    int rc = msg_pack(msg, &data, &len, &err);
    if (rc == 0)
        rc = msg->type < MSG_WELCOME && msg->type != MSG_VERIFY ? msg_unpack_up(data, len, 0, copy, &err)
                                                                : msg_unpack_down(data, len, 0, copy, &err);
    if (rc < 0)
        sim_fail(s, "%s does not survive its way over the wire: %s", msg_type_name(msg->type), err.text);
    free(data);
    return copy;
}

static void deliver(struct sim *s, uint64_t *last, enum sim_event_kind kind, uint32_t agent, uint64_t conn,
                    const struct msg *msg, uint64_t extra)
{
    uint64_t at = s->now + network_delay(s) + extra;
    struct sim_event *e;

    if (at <= *last)
        at = *last + 1;
    *last = at;
    e = sim_push(s, at - s->now, kind, agent, 0);
    e->x = conn;
    e->msg = message_copy(s, msg);
}

/* The protocol must stand repetition of what it is made of: late, and not in order. */
static bool repeatable(enum msg_type type)
{
    switch (type) {
    case MSG_PROMISE:
    case MSG_REFUSE:
    case MSG_FLIPPED:
    case MSG_STAGE_DONE:
    case MSG_MAP_ACK:
    case MSG_PREPARE:
    case MSG_GO:
    case MSG_ABORT:
    case MSG_DISMISS:
    case MSG_MAP:
    case MSG_OP_BEGIN:
    case MSG_OP_END:
    case MSG_OP_ABORT:
    case MSG_STAGE: return true;
    default: return false;
    }
}

void network_to_agent(struct sim *s, uint64_t conn, const struct msg *msg)
{
    struct sim_conn *c = &s->conns[conn - 1];

    if (!c->at_coordinator)
        return;
    deliver(s, &c->to_agent_at, SE_TO_AGENT, c->agent, conn, msg, 0);
    if (repeatable(msg->type) && sim_chance(s, s->p_duplicate)) {
        uint64_t fifo = c->to_agent_at;
        deliver(s, &fifo, SE_TO_AGENT, c->agent, conn, msg, sim_between(s, 0, 400 * MS));
    }
}

void network_to_coordinator(struct sim *s, struct sim_agent *a, const struct msg *msg)
{
    struct sim_conn *c;

    if (!a->conn)
        return;
    c = &s->conns[a->conn - 1];
    deliver(s, &c->to_coordinator_at, SE_TO_COORDINATOR, a->index, a->conn, msg, 0);
    if (repeatable(msg->type) && sim_chance(s, s->p_duplicate)) {
        uint64_t fifo = c->to_coordinator_at;
        deliver(s, &fifo, SE_TO_COORDINATOR, a->index, a->conn, msg, sim_between(s, 0, 400 * MS));
    }
}

void network_describe(const struct msg *m, char *text, size_t size)
{
    const char *name = msg_type_name(m->type);

    switch (m->type) {
    case MSG_HELLO:
        snprintf(text, size, "%s applied %" PRIu64 " promised %" PRIu64 " limit %" PRIu64 " next %" PRIu64
                 " op %" PRIu64 " map %" PRIu64 " dispatch %u", name, m->hello.applied_epoch, m->hello.promised_epoch,
                 m->hello.limit, m->hello.next, m->hello.op, m->hello.map_version, m->hello.dispatch);
        break;
    case MSG_STAGE:
        snprintf(text, size, "%s %s op %" PRIu64 " round %u attempt %" PRIu64 " step %" PRIu64, name,
                 op_stage_name(m->stage.stage), m->stage.op, m->stage.round, m->stage.attempt, m->stage.step);
        break;
    case MSG_STAGE_DONE:
        snprintf(text, size, "%s %s op %" PRIu64 " round %u code %d %.80s", name, op_stage_name(m->stage_done.stage),
                 m->stage_done.op, m->stage_done.round, m->stage_done.code, m->stage_done.text);
        break;
    case MSG_PROMISE:
        snprintf(text, size, "%s e%" PRIu64 " limit %" PRIu64 " next %" PRIu64 " engine %u", name, m->promise.epoch,
                 m->promise.limit, m->promise.next, m->promise.engine);
        break;
    case MSG_REFUSE: snprintf(text, size, "%s e%" PRIu64 " %s", name, m->refuse.epoch, m->refuse.why); break;
    case MSG_FLIPPED: snprintf(text, size, "%s e%" PRIu64, name, m->flipped.epoch); break;
    case MSG_MAP_ACK:
        snprintf(text, size, "%s version %" PRIu64 " from step %" PRIu64, name, m->map_ack.version, m->map_ack.step);
        break;
    case MSG_PREPARE:
        snprintf(text, size, "%s e%" PRIu64 " kind %u op %" PRIu64 " lead %u ms", name, m->prepare.epoch,
                 m->prepare.kind, m->prepare.op, m->prepare.lead_ms);
        break;
    case MSG_GO:
        snprintf(text, size, "%s e%" PRIu64 " step %" PRIu64 " kind %u ranks %u map %" PRIu64, name, m->go.epoch,
                 m->go.step, m->go.kind, m->go.view ? m->go.view->n : 0,
                 m->go.view && m->go.view->map ? m->go.view->map->version : 0);
        break;
    case MSG_ABORT: snprintf(text, size, "%s e%" PRIu64, name, m->abort.epoch); break;
    case MSG_MAP: snprintf(text, size, "%s version %" PRIu64, name, m->map.map ? m->map.map->version : 0); break;
    case MSG_OP_BEGIN:
        snprintf(text, size, "%s op %" PRIu64 " %s as %s, party %u of %u", name, m->op_begin.op,
                 op_kind_name(m->op_begin.kind), op_role_name(m->op_begin.role), m->op_begin.self, m->op_begin.n);
        break;
    case MSG_OP_END:
    case MSG_OP_ABORT:
    case MSG_DISMISS:
        snprintf(text, size, "%s op %" PRIu64 " e%" PRIu64 " %.100s", name, m->op_end.op, m->op_end.epoch,
                 m->op_end.why);
        break;
    case MSG_NOTIFY: snprintf(text, size, "%s %s op %" PRIu64, name, notify_name(m->notify.what), m->notify.op); break;
    case MSG_ENGINE: snprintf(text, size, "%s %s", name, m->engine.attached ? "attached" : m->engine.why); break;
    case MSG_EVICTED: snprintf(text, size, "%s %s", name, m->evicted.why); break;
    default: snprintf(text, size, "%s", name);
    }
}

static void arrived_at_agent(struct sim *s, struct sim_event *e)
{
    struct sim_agent *a = &s->agents[e->agent];
    struct agent_event event = {.type = AE_MSG, .msg = e->msg};
    char text[200];

    if (!a->up || a->conn != e->x)
        return;
    if (s->recording) {
        network_describe(e->msg, text, sizeof text);
        sim_note(s, "a%02u <- %s", e->agent, text);
    }
    check_agent_receives(s, a, e->msg);
    agent_event(s, a, &event);
}

static void arrived_at_coordinator(struct sim *s, struct sim_event *e)
{
    struct coordinator_event event = {.type = CE_MSG, .conn = e->x, .msg = e->msg};
    char text[200];

    if (!s->coordinator.up || !s->conns[e->x - 1].at_coordinator)
        return;
    if (s->recording && e->msg->type != MSG_HEARTBEAT) {
        network_describe(e->msg, text, sizeof text);
        sim_note(s, "coordinator <- a%02u %s", e->agent, text);
    }
    process_event(s, &event);
}

void network_arrived(struct sim *s, struct sim_event *e)
{
    struct sim_conn *c = &s->conns[e->x - 1];
    struct sim_agent *a = &s->agents[e->agent];

    switch (e->kind) {
    case SE_TO_AGENT: arrived_at_agent(s, e); return;
    case SE_TO_COORDINATOR: arrived_at_coordinator(s, e); return;
    case SE_CUT_AGENT:
        if (!c->at_agent)
            return;
        c->at_agent = false;
        if (a->up && a->conn == e->x) {
            struct agent_event event = {.type = AE_LINK_DOWN};
            a->conn = 0;
            sim_note(s, "a%02u loses connection %" PRIu64, e->agent, e->x);
            sim_push(s, sim_between(s, MS, 50 * MS), SE_CONNECT, a->index, a->life);
            agent_event(s, a, &event);
        }
        return;
    default:
        if (!c->at_coordinator)
            return;
        c->at_coordinator = false;
        if (s->coordinator.up) {
            struct coordinator_event event = {.type = CE_DISCONNECTED, .conn = e->x};
            sim_note(s, "coordinator loses a%02u's connection %" PRIu64, e->agent, e->x);
            process_event(s, &event);
        }
    }
}
