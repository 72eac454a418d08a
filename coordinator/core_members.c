/* Membership: who is there, with which incarnation, until when.  Part of the coordinator's core; pure.
 *
 *   HELLO  -> connected --disconnect or silence--> away --lease ends--> gone
 *   another incarnation of the same id: the old one is gone at once
 *   gone or engineless while a rank of the view: a fault of the view, see core_repair.c */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

uint32_t members_find(const struct coordinator *c, const char *id)
{
    for (size_t i = 0; i < c->n_peers; i++)
        if (strcmp(c->peers[i].member.id, id) == 0)
            return (uint32_t)i;
    return NOBODY;
}

uint32_t members_by_conn(const struct coordinator *c, uint64_t conn)
{
    for (size_t i = 0; conn && i < c->n_peers; i++)
        if (c->peers[i].conn == conn)
            return (uint32_t)i;
    return NOBODY;
}

int members_rank(const struct coordinator *c, uint32_t peer)
{
    return c->view ? member_find(c->view->members, c->view->n, &c->peers[peer].member) : -1;
}

static uint32_t members_add(struct coordinator *c)
{
    if (c->n_peers == c->cap_peers) {
        size_t cap = c->cap_peers ? c->cap_peers * 2 : 16;
        struct peer *v = realloc(c->peers, cap * sizeof(*v));
        if (!v)
            abort();
        c->peers = v;
        c->cap_peers = cap;
    }
    memset(&c->peers[c->n_peers], 0, sizeof(struct peer));
    return (uint32_t)c->n_peers++;
}

/* After a restart the members of the view are away, and have a whole lease to come back. */
int members_recover(struct coordinator *c, const struct view *view)
{
    for (uint32_t r = 0; r < view->n; r++) {
        uint32_t i = members_add(c); /* may move the array */
        struct peer *p = &c->peers[i];
        p->member = view->members[r];
        p->engine = true; /* until its agent says otherwise */
        p->heard_ns = c->now_ns;
    }
    const struct commit_record *commit = &c->durable.commit;
    for (uint32_t i = 0; commit->epoch && !commit->settled && i < commit->n_old; i++) {
        if (members_find(c, commit->old[i].id) != NOBODY)
            continue;
        uint32_t k = members_add(c);
        struct peer *p = &c->peers[k];
        p->member = commit->old[i];
        p->engine = true;
        p->heard_ns = c->now_ns;
    }
    return 0;
}

static void members_close(struct coordinator *c, uint64_t conn, const char *why)
{
    struct coordinator_action *a = core_act(c, CA_CLOSE);
    a->conn = conn;
    snprintf(a->text, sizeof(a->text), "%s", why);
}

void members_evict(struct coordinator *c, uint32_t peer, const char *why)
{
    struct peer *p = &c->peers[peer];
    if (p->evicted)
        return;
    p->evicted = true;
    if (p->zombie != p->member.incarnation) /* it may come again and again */
        core_log(c, CORE_WARN, "agent %s is evicted: %s", p->member.id, why);
    p->zombie = p->member.incarnation;
    struct msg *m = core_send(c, peer, MSG_EVICTED);
    if (m)
        snprintf(m->evicted.why, sizeof(m->evicted.why), "%s", why);
    c->changed = true;
}

/* Nothing is expected of this incarnation any more. */
void members_lost(struct coordinator *c, uint32_t peer, const char *why)
{
    struct peer *p = &c->peers[peer];
    if (p->gone)
        return;
    p->gone = true;
    p->engine = false;
    c->changed = true;
    core_log(c, members_rank(c, peer) >= 0 ? CORE_ERROR : CORE_INFO, "agent %s is lost: %s", p->member.id, why);
    if (p->conn) {
        members_close(c, p->conn, why);
        p->conn = 0;
    }
    commit_peer_gone(c, peer, why);
    operation_peer_gone(c, peer, why);
    rounds_peer_gone(c, peer);
}

void members_disconnected(struct coordinator *c, uint32_t peer)
{
    struct peer *p = &c->peers[peer];
    p->conn = 0;
    p->heard_ns = c->now_ns;
    c->changed = true;
    bool matters = members_rank(c, peer) >= 0 || operation_party(c, peer) >= 0;
    if (p->zombie != p->member.incarnation)
        core_log(c, matters ? CORE_WARN : CORE_INFO, "agent %s disconnected", p->member.id);
    commit_peer_gone(c, peer, "disconnected");
    operation_peer_gone(c, peer, "disconnected");
    if (!matters)
        members_lost(c, peer, "a spare that disconnected");
}

/* An agent that believes to serve, and that this cluster has no place for. */
static bool members_stranger(const struct coordinator *c, uint32_t peer, const struct msg_hello *hello)
{
    if (hello->engine == PROMISE_JOINER || members_rank(c, peer) >= 0)
        return false;
    /* a leaver that has not been told, or has not let go yet */
    const struct commit_record *commit = &c->durable.commit;
    return !commit->epoch || member_find(commit->old, commit->n_old, &c->peers[peer].member) < 0;
}

static void members_welcome(struct coordinator *c, uint32_t peer)
{
    struct msg *m = core_send(c, peer, MSG_WELCOME);
    m->welcome.lease_ms = c->config.lease_ms;
    m->welcome.heartbeat_ms = c->config.heartbeat_ms;
    m->welcome.indoubt_ms = c->config.indoubt_ms;
    m->welcome.load_window_ms = c->config.load_window_ms;
    m->welcome.view = view_ref(c->view);
    m->welcome.member = members_rank(c, peer) >= 0;
}

/* The planted mistake: who has answered a stage is known by name alone, so that its next incarnation counts for it. */
static void members_count_by_id(struct coordinator *c, uint32_t peer, uint64_t incarnation)
{
    int party = operation_party(c, peer);
    if (party < 0 || (uint32_t)party < c->durable.open.n_old || c->commit.state != COMMIT_IDLE)
        return;
    c->durable.open.parties[party].incarnation = incarnation;
    for (size_t i = 0; i < c->op.stage.n; i++)
        if (c->op.stage.v[i].id == peer)
            c->op.stage.v[i].incarnation = incarnation;
}

void members_hello(struct coordinator *c, uint64_t conn, const struct msg_hello *hello)
{
    uint32_t peer = members_find(c, hello->id);
    if (peer == NOBODY)
        peer = members_add(c);
    struct peer *p = &c->peers[peer];
    struct msg_hello as_before = *hello;
    if (c->bug == COORDINATOR_BUG_INCARNATION_IGNORED && p->member.incarnation) {
        as_before.incarnation = p->member.incarnation;
        hello = &as_before;
    }
    bool known = p->member.incarnation == hello->incarnation;
    if (c->bug == COORDINATOR_BUG_COUNT_BY_ID && p->member.incarnation && !known)
        members_count_by_id(c, peer, hello->incarnation);
    if (p->member.incarnation && !known && !p->gone)
        members_lost(c, peer, "a new incarnation of it has come");
    p = &c->peers[peer];
    if (p->conn && p->conn != conn) {
        members_close(c, p->conn, "the agent has connected again");
        commit_peer_gone(c, peer, "connected again");
        operation_peer_gone(c, peer, "connected again");
    }
    /* Its lease may have ended while the view had to wait for it: then it is a rank as before, weights and all. */
    bool put_out = c->commit.state == COMMIT_DECIDING && c->commit.kind == FLIP_RESET && members_rank(c, peer) >= 0 &&
                   operation_party(c, peer) < 0; /* but not while a view without it is being written */
    if (known && put_out && (c->op.reload || c->op.masked)) {
        /* It may have last copies, which are needless only when that view is durable. */
        members_close(c, conn, "a view without it is being written");
        return;
    }
    bool evicted = known && (p->evicted || put_out);
    uint64_t zombie = p->zombie;
    if (!known)
        memset(p, 0, sizeof(*p));
    p->zombie = zombie;
    snprintf(p->member.id, sizeof(p->member.id), "%s", hello->id);
    snprintf(p->member.address, sizeof(p->member.address), "%s", hello->address);
    snprintf(p->member.data_address, sizeof(p->member.data_address), "%s", hello->data_address);
    snprintf(p->member.endpoint, sizeof(p->member.endpoint), "%s", hello->endpoint);
    p->member.incarnation = hello->incarnation;
    p->member.node = hello->node;
    p->conn = conn;
    p->heard_ns = c->now_ns;
    p->gone = evicted;
    p->holds = hello->engine != PROMISE_JOINER;
    p->engine = hello->dispatch != DISPATCH_NONE;
    p->dispatch = hello->dispatch;
    p->slots = hello->slots;
    p->can_load = hello->can_load;
    p->masks = hello->masks;
    p->reload_ns = p->lend_ns = 0; /* it may have another checkpoint now */
    p->layers = hello->layers;
    p->logical = hello->logical;
    p->applied_epoch = hello->applied_epoch;
    p->map_version = hello->map_version;
    c->changed = true;
    if (!evicted && members_stranger(c, peer, hello) && upkeep_gives_up(c)) {
        p->outcast = p->gone = true; /* it hears of it when the journal has it */
        return;
    }
    if (evicted || members_stranger(c, peer, hello)) {
        p->evicted = false;
        members_evict(c, peer, evicted ? "the view went on without it"
                                       : "it serves a view that this cluster does not know");
        p->gone = true;
        return;
    }
    const struct model *model = c->view ? c->durable.model : NULL;
    if (model && hello->can_load && hello->layers && (hello->layers != model->layers || hello->logical != model->logical))
        core_log(c, CORE_WARN,
                 "agent %s: its checkpoint (%u layers of %u experts) is not the model that serves (%u of %u): it can "
                 "join, but a start of the cluster with it fails; start it with the model's own --checkpoint",
                 hello->id, hello->layers, hello->logical, model->layers, model->logical);
    core_log(c, CORE_INFO, "agent %s connected, incarnation %016llx, %s", hello->id,
             (unsigned long long)hello->incarnation, members_rank(c, peer) >= 0 ? "a rank of the view" : "spare");
    members_welcome(c, peer);
    commit_hello_decided(c, peer, hello);
    operation_hello(c, peer, hello);
    commit_hello(c, peer, hello);
    rounds_hello(c, peer);
    operation_peer_ready(c);
}

void members_engine(struct coordinator *c, uint32_t peer, const struct msg_engine *engine)
{
    struct peer *p = &c->peers[peer];
    bool had = p->engine;
    p->engine = engine->attached;
    p->dispatch = engine->attached ? engine->dispatch : DISPATCH_NONE;
    p->can_load = engine->can_load;
    p->masks = engine->masks;
    p->layers = engine->layers;
    p->logical = engine->logical;
    c->changed = true;
    int rank = members_rank(c, peer);
    if (engine->torn_epoch)
        repair_torn(c, peer, engine);
    if (engine->attached) {
        snprintf(p->member.endpoint, sizeof(p->member.endpoint), "%s", engine->endpoint);
        core_log(c, CORE_INFO, "agent %s: engine attached", p->member.id);
        if (rank >= 0 && strcmp(c->view->members[rank].endpoint, engine->endpoint) != 0) {
            struct view *view = view_copy(c->view);
            if (!view)
                abort();
            memcpy(view->members[rank].endpoint, p->member.endpoint, sizeof(view->members[rank].endpoint));
            view_unref(c->view);
            c->view = view;
        }
        operation_peer_ready(c);
        return;
    }
    if (!had)
        return;
    core_log(c, rank >= 0 ? CORE_ERROR : CORE_INFO, "agent %s: engine gone: %s", p->member.id, engine->why);
    if (!silent_spares(c, peer))
        operation_peer_gone(c, peer, "its engine is gone");
}

void members_tick(struct coordinator *c)
{
    uint64_t lease_ns = 1000000ULL * c->config.lease_ms;
    for (uint32_t i = 0; i < c->n_peers; i++) {
        const struct peer *p = &c->peers[i];
        if (!p->gone && c->now_ns >= p->heard_ns + lease_ns)
            members_lost(c, i, p->conn ? "no heartbeat within its lease" : "it did not come back within its lease");
    }
}

uint64_t members_deadline(const struct coordinator *c)
{
    uint64_t first = UINT64_MAX;
    uint64_t lease_ns = 1000000ULL * c->config.lease_ms;
    for (size_t i = 0; i < c->n_peers; i++)
        if (!c->peers[i].gone && c->peers[i].heard_ns + lease_ns < first)
            first = c->peers[i].heard_ns + lease_ns;
    return first;
}

static int by_name(const void *a, const void *b, void *user)
{
    const struct coordinator *c = user;
    return strverscmp(c->peers[*(const uint32_t *)a].member.id, c->peers[*(const uint32_t *)b].member.id);
}

uint32_t members_spares(const struct coordinator *c, bool cold, uint32_t *ret_peers, uint32_t max)
{
    uint32_t all[RANKS_MAX], n = 0;
    for (uint32_t i = 0; i < c->n_peers && n < RANKS_MAX; i++) {
        const struct peer *p = &c->peers[i];
        if (p->conn && !p->gone && !p->evicted && p->engine && members_rank(c, i) < 0 &&
            (!cold || (p->can_load && p->layers && p->logical)))
            all[n++] = i;
    }
    qsort_r(all, n, sizeof(all[0]), by_name, (void *)(uintptr_t)c);
    if (n > max)
        n = max;
    memcpy(ret_peers, all, n * sizeof(all[0]));
    return n;
}
