/* Two transports as one: groups, and how items are divided.  Broadcasts: transport_auto_broadcast.c.  Worker thread.
 *
 * Who reaches whom is found out when a group is made, and is the same for all parties, because all of them decide by
 * the same table:
 *
 *     all parties meet over the mesh
 *       each tells its card          (what it takes to reach it: host, GPU)
 *       each tells whom it reaches   (by the cards; both sides must reach each other)
 *     the parties fall into islands: in their order, each joins the first one that it reaches all of
 *       several islands: each tells whether it can open the far transport; then a far group of all parties
 *     in each island a near group
 *
 * With one island there is no far group, and the far transport is not even opened.  Within an operation near goes
 * first: the two take turns on one thread, and near is the faster one by far. */
#include "agent/transport_auto_internal.h"

#include <stdlib.h>
#include <string.h>

#define FAR_ID_BYTES 32u /* of a host transport, and of nccl */

/* ---- ids: near's, then one for far, then one to meet by ---- */

static int auto_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    struct transport *near = ((struct transport_auto *)self)->options.near;
    struct blob *near_id, *rest;
    int rc = near->group_id(near, &near_id, err);
    if (rc < 0)
        return rc;
    rc = transport_secret(2 * FAR_ID_BYTES, &rest, err);
    if (rc == 0) {
        uint8_t *bytes = malloc(near_id->len + rest->len);
        struct blob *id = NULL;
        if (bytes) {
            memcpy(bytes, near_id->data, near_id->len);
            memcpy(bytes + near_id->len, rest->data, rest->len);
            id = blob_new(bytes, near_id->len + rest->len);
            explicit_bzero(bytes, near_id->len + rest->len);
        }
        free(bytes);
        if (id)
            *ret_id = id;
        else
            rc = err_set(err, ERR_NOMEM, "out of memory");
        blob_unref(rest);
    }
    blob_unref(near_id);
    return rc;
}

/* A piece of the id; for the islands' near groups each another one, since two islands may share a host. */
static struct blob *id_part(const struct blob *id, size_t at, size_t len, uint32_t island)
{
    struct blob *part = blob_new(id->data + at, len);
    if (part)
        for (size_t i = 0; i < sizeof island; i++)
            part->data[i] ^= (uint8_t)(island >> 8 * i);
    return part;
}

static int subgroup_create(struct transport *by, const struct blob *id, size_t at, size_t len, uint32_t island,
                           const struct member *parties, uint32_t n, uint32_t self, const struct transport_call *call,
                           struct transport_group **ret_group, struct err *err)
{
    struct blob *part = id_part(id, at, len, island);
    if (!part)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = by->group_create(by, part, parties, n, self, call, ret_group, err);
    blob_unref(part);
    return rc;
}

/* ---- the meeting ---- */

/* Every party has its row of the table; afterwards each has all of them. */
static int meeting_exchange(struct transport *mesh, struct transport_group *meeting, uint32_t n, uint32_t self,
                            uint8_t *table, size_t row, const struct transport_call *call, struct err *err)
{
    struct memory_region region = {.base = table, .bytes = n * row, .mapped = n * row, .fd = -1};
    struct transfer *items = calloc(2 * n, sizeof *items);
    uint64_t bytes;
    size_t k = 0;
    if (!items)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < n; i++) {
        if (i == self)
            continue;
        items[k] = (struct transfer){.src = self, .dst = i, .n = 1};
        items[k++].from[0] = (struct extent){&region, self * row, row};
        items[k] = (struct transfer){.src = i, .dst = self, .n = 1};
        items[k++].to[0] = (struct extent){&region, i * row, row};
    }
    const struct transport_call quiet = {.deadline_ns = call->deadline_ns, .cancel_fd = call->cancel_fd};
    int rc = mesh->move(meeting, items, k, &quiet, &bytes, err);
    free(items);
    return rc;
}

/* reach[i * n + k]: party i reaches party k. */
static int meeting_reach(struct transport_auto *t, struct transport_group *meeting, const struct member *parties,
                         uint32_t n, uint32_t self, uint8_t *reach, const struct transport_call *call, struct err *err)
{
    uint8_t *cards = calloc(n, TRANSPORT_CARD_BYTES);
    if (!cards)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = t->options.card(t->options.user, cards + self * TRANSPORT_CARD_BYTES, err);
    if (rc == 0)
        rc = meeting_exchange(t->options.mesh, meeting, n, self, cards, TRANSPORT_CARD_BYTES, call, err);
    for (uint32_t i = 0; i < n && rc == 0; i++)
        reach[self * n + i] = i == self || (parties[i].node == parties[self].node &&
                                            t->options.reaches(t->options.user, cards + i * TRANSPORT_CARD_BYTES));
    if (rc == 0)
        rc = meeting_exchange(t->options.mesh, meeting, n, self, reach, n, call, err);
    free(cards);
    return rc;
}

/* Each party joins the first island that it reaches all of, and that reaches it. */
static void islands_make(struct auto_group *g, const uint8_t *reach)
{
    for (uint32_t i = 0; i < g->n; i++) {
        uint32_t island = 0;
        for (; island < g->islands; island++) {
            bool all = true;
            for (uint32_t k = 0; k < i; k++)
                all = all && (g->island[k] != island || (reach[i * g->n + k] && reach[k * g->n + i]));
            if (all)
                break;
        }
        g->island[i] = island;
        g->islands = island == g->islands ? island + 1 : g->islands;
        for (uint32_t k = 0; k < i; k++)
            g->place[i] += g->island[k] == island;
    }
}

/* Opens the far transport if it is not, and hears whether everybody could: nobody waits for one who could not. */
static int meeting_far(struct transport_auto *t, struct transport_group *meeting, const struct member *parties,
                       uint32_t n, uint32_t self, const struct transport_call *call, struct err *err)
{
    uint8_t able[RANKS_MAX] = {0};
    struct err why = {0};
    if (!t->far)
        t->far = t->options.far_open(t->options.user, &why);
    able[self] = t->far != NULL;
    int rc = meeting_exchange(t->options.mesh, meeting, n, self, able, 1, call, err);
    if (!able[self])
        return err_set(err, why.code, "not all parties reach each other directly, and for that: %.400s", why.text);
    for (uint32_t i = 0; i < n && rc == 0; i++)
        if (!able[i])
            rc = err_set(err, ERR_UNSUPPORTED,
                         "not all parties reach each other directly, and party %s cannot use transport %s; its log "
                         "says why",
                         parties[i].id, t->far->name);
    return rc;
}

static int group_meet(struct auto_group *g, const struct blob *id, const struct member *parties,
                      const struct transport_call *call, struct err *err)
{
    struct transport *mesh = g->t->options.mesh;
    struct transport_group *meeting = NULL;
    uint8_t *reach = calloc(g->n, g->n);
    if (!reach)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc =
        subgroup_create(mesh, id, id->len - FAR_ID_BYTES, FAR_ID_BYTES, 0, parties, g->n, g->self, call, &meeting, err);
    if (rc == 0)
        rc = meeting_reach(g->t, meeting, parties, g->n, g->self, reach, call, err);
    if (rc == 0) {
        islands_make(g, reach);
        if (g->islands > 1)
            rc = meeting_far(g->t, meeting, parties, g->n, g->self, call, err);
    }
    mesh->destroy(meeting);
    free(reach);
    return rc;
}

/* ---- groups ---- */

static int group_near(struct auto_group *g, const struct blob *id, const struct member *parties,
                      const struct transport_call *call, struct err *err)
{
    struct transport *near = g->t->options.near;
    struct member *here = calloc(g->n, sizeof *here);
    uint32_t n = 0;
    if (!here)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < g->n; i++)
        if (g->island[i] == g->island[g->self])
            here[n++] = parties[i];
    int rc = subgroup_create(near, id, 0, id->len - 2 * FAR_ID_BYTES, g->island[g->self], here, n, g->place[g->self],
                             call, &g->near, err);
    free(here);
    return rc;
}

/* Also when one of the two fails in a call: the parties of the other one must not wait for us. */
void auto_group_drop(struct auto_group *g)
{
    g->t->options.near->destroy(g->near);
    if (g->far)
        g->t->far->destroy(g->far);
    g->near = g->far = NULL;
}

static void auto_destroy(struct transport_group *group)
{
    if (!group)
        return;
    auto_group_drop((struct auto_group *)group);
    free(group);
}

static int auto_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                             uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                             struct err *err)
{
    struct transport_auto *t = (struct transport_auto *)self;
    if (!id || id->len <= 2 * FAR_ID_BYTES)
        return err_set(err, ERR_INVALID, "a group id of transport auto has more than %u bytes", 2 * FAR_ID_BYTES);
    if (n == 0 || n > RANKS_MAX || self_party >= n)
        return err_set(err, ERR_INVALID, "a group cannot have %u parties, of which this is %u", n, self_party);
    struct auto_group *g = calloc(1, sizeof *g);
    if (!g)
        return err_set(err, ERR_NOMEM, "out of memory");
    *g = (struct auto_group){.t = t, .n = n, .self = self_party};
    int rc = group_meet(g, id, parties, call, err);
    if (rc == 0)
        rc = group_near(g, id, parties, call, err);
    if (rc == 0 && g->islands > 1)
        rc = subgroup_create(t->far, id, id->len - 2 * FAR_ID_BYTES, FAR_ID_BYTES, 0, parties, n, self_party, call,
                             &g->far, err);
    if (rc < 0)
        auto_destroy((struct transport_group *)g);
    else
        *ret_group = (struct transport_group *)g;
    return rc;
}

/* ---- move ---- */

static void step_progress(void *user, uint64_t bytes)
{
    struct auto_step *s = user;
    if (s->outer->progress)
        s->outer->progress(s->outer->user, s->before + bytes);
    s->call.deadline_ns = s->outer->deadline_ns;
}

static void step_arrived(void *user, size_t item, uint32_t extent, size_t offset, size_t len)
{
    struct auto_step *s = user;
    s->outer->arrived(s->outer->user, s->index[item], extent, offset, len);
}

void auto_step_init(struct auto_step *s, const struct transport_call *outer, uint64_t before, const size_t *index)
{
    *s = (struct auto_step){.outer = outer, .before = before, .index = index};
    s->call = *outer;
    s->call.progress = step_progress;
    s->call.arrived = index && outer->arrived ? step_arrived : NULL;
    s->call.user = s;
    step_progress(s, 0); /* that the step before has ended is progress */
}

static int move_check(const struct auto_group *g, const struct transfer *items, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++)
        if (items[i].src >= g->n || items[i].dst >= g->n || items[i].n > SLOT_EXTENTS_MAX)
            return err_set(err, ERR_INVALID, "item %zu of a transfer is between parties %u and %u of %u", i,
                           items[i].src, items[i].dst, g->n);
    return 0;
}

/* The items of one of the two, renumbered for it. */
static size_t move_part(const struct auto_group *g, const struct transfer *items, size_t n, bool near,
                        struct transfer *part, size_t *index)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if ((g->island[items[i].src] == g->island[items[i].dst]) != near)
            continue;
        part[k] = items[i];
        if (near) {
            part[k].src = g->place[items[i].src];
            part[k].dst = g->place[items[i].dst];
        }
        index[k++] = i;
    }
    return k;
}

static int move_both(struct auto_group *g, const struct transfer *items, size_t n, struct transfer *part, size_t *index,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    struct auto_step step;
    uint64_t near_bytes = 0, far_bytes = 0;
    size_t k = move_part(g, items, n, true, part, index);
    auto_step_init(&step, call, 0, index);
    int rc = g->t->options.near->move(g->near, part, k, &step.call, &near_bytes, err);
    if (rc == 0 && g->far) {
        k = move_part(g, items, n, false, part, index);
        auto_step_init(&step, call, near_bytes, index);
        rc = g->t->far->move(g->far, part, k, &step.call, &far_bytes, err);
    }
    if (rc == 0)
        *ret_bytes = near_bytes + far_bytes;
    return rc;
}

static int auto_move(struct transport_group *group, const struct transfer *items, size_t n,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    struct auto_group *g = (struct auto_group *)group;
    if (!g->near)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct transfer *part = calloc(n + 1, sizeof *part);
    size_t *index = calloc(n + 1, sizeof *index);
    int rc = part && index ? move_check(g, items, n, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = move_both(g, items, n, part, index, call, ret_bytes, err);
    free(part);
    free(index);
    if (rc < 0)
        auto_group_drop(g);
    return rc;
}

/* ---- the table ---- */

static int auto_health(struct transport *self, struct err *err)
{
    struct transport_auto *t = (struct transport_auto *)self;
    struct transport *near = t->options.near;
    int rc = near->health ? near->health(near, err) : 0;
    return rc == 0 && t->far && t->far->health ? t->far->health(t->far, err) : rc;
}

static void auto_close(struct transport *self)
{
    struct transport_auto *t = (struct transport_auto *)self;
    t->options.near->close(t->options.near);
    if (t->far)
        t->far->close(t->far);
    t->options.mesh->close(t->options.mesh);
    if (t->options.done)
        t->options.done(t->options.user);
    free(t);
}

struct transport *transport_auto_open(const struct transport_auto_options *options, struct err *err)
{
    struct transport_auto *t = calloc(1, sizeof *t);
    if (!t) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    t->options = *options;
    t->base = (struct transport){
        .name = "auto",
        .group_id = auto_group_id,
        .group_create = auto_group_create,
        .move = auto_move,
        .broadcast = auto_broadcast,
        .destroy = auto_destroy,
        .health = auto_health,
        .close = auto_close,
    };
    return &t->base;
}
