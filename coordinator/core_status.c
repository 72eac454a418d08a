/* What the coordinator's core tells about itself: the view, the operation, every agent.  Reads only; pure. */
#include <stdio.h>
#include <string.h>

#include "coordinator/core_internal.h"

static void status_operation(const struct coordinator *c, struct op_info *info)
{
    const struct operation *op = &c->op;
    info->record = c->durable.open;
    info->phase = op_phase_name(op->phase);
    info->plan = op->plan;
    if (op->plan) {
        info->rounds = op->plan->rounds_before + op->plan->rounds_after;
        info->round = op->round;
    }
    info->bytes_done = op->bytes_done;
    for (uint32_t i = 0; op->progress && i < c->durable.open.n; i++)
        info->bytes_done += op->progress[i];
    info->bytes_planned = op->bytes_planned;
    info->phase_since_ns = op->phase_since_ns;
    const struct arrivals *set = operation_awaited(c);
    bool commits = set == &c->commit.promised || set == &c->commit.flipped;
    info->deadline_ns = commits ? c->commit.deadline_ns : op->deadline_ns;
    core_names(c, set, info->awaited, sizeof(info->awaited));
    if (op->halted_ns) {
        snprintf(info->awaited, sizeof(info->awaited), "`eepctl resume`");
        info->phase_since_ns = op->halted_ns;
        info->deadline_ns = 0;
    } else if (op->waits_for_agents) {
        snprintf(info->awaited, sizeof(info->awaited), "spare agents");
        info->deadline_ns = op->wait_ns;
    }
    for (uint32_t i = 0; i < op->n_times && i < 32; i++) {
        info->phases[i].phase = op_phase_name(op->times[i].phase);
        info->phases[i].ns = op->times[i].ns;
    }
    info->n_phases = op->n_times;
}

void coordinator_status(const struct coordinator *c, uint64_t now_ns, struct coordinator_status *ret)
{
    (void)now_ns;
    memset(ret, 0, sizeof(*ret));
    ret->view = c->view;
    ret->model = c->durable.model;
    ret->epoch = c->durable.epoch;
    ret->map_version = c->durable.map_version;
    ret->commit_state = commit_state_name(c->commit.state);
    ret->n_agents = c->n_peers;
    ret->op_running = c->op.phase != PHASE_NONE;
    ret->last = &c->last;
    if (ret->op_running)
        status_operation(c, &ret->op);
    else
        ret->op = c->last;
    memcpy(ret->degraded, c->degraded, sizeof(ret->degraded));
    ret->degraded_since_ns = c->torn || !c->mask.since_ns ? c->torn_ns : c->mask.since_ns;
    ret->masked = c->mask.count;
    if (c->degraded[0])
        repair_missing(c, ret->missing, sizeof(ret->missing));
    if (c->lost_ns && c->config.restart_after_ms)
        ret->gives_up_ns = c->lost_ns + 1000000ULL * c->config.restart_after_ms;
    ret->wanted = c->durable.wanted;
    ret->paused = c->durable.paused;
    ret->paused_why = c->durable.paused_why;
    ret->paused_ms = c->durable.paused_ms;
}

bool coordinator_agent(const struct coordinator *c, uint64_t now_ns, size_t i, struct agent_info *ret)
{
    if (i >= c->n_peers)
        return false;
    const struct peer *p = &c->peers[i];
    memset(ret, 0, sizeof(*ret));
    ret->member = p->member;
    ret->rank = members_rank(c, (uint32_t)i);
    ret->connected = p->conn != 0;
    ret->engine = p->engine;
    ret->applied_epoch = p->applied_epoch;
    uint64_t lease_end = p->heard_ns + 1000000ULL * c->config.lease_ms;
    ret->lease_left_ms = p->gone || lease_end < now_ns ? 0 : (lease_end - now_ns) / 1000000;
    int party = operation_party(c, (uint32_t)i);
    if (p->gone)
        ret->state = MEMBER_LOST;
    else if (ret->rank >= 0)
        ret->state = party >= 0 && !c->durable.open.stays[party] ? MEMBER_LEAVING : MEMBER_SERVING;
    else
        ret->state = party >= 0 ? (c->durable.open.stays[party] ? MEMBER_JOINING : MEMBER_LEAVING) : MEMBER_SPARE;
    ret->member.serving = ret->rank >= 0 && p->engine;
    ret->member.draining = ret->rank >= 0 && c->view->members[ret->rank].draining;
    return true;
}
