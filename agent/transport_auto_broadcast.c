/* The same bytes to many over two transports: to one party of each island that has nobody with the bytes by far, from
 * there (and in the other islands) on by near.  In segments, so that those who wait for their island's party see
 * progress.  Worker thread. */
#include <stdlib.h>

#include "agent/transport_auto_internal.h"

#define SEGMENT_BYTES ((uint64_t)256 << 20)

struct cast {
    uint8_t far[RANKS_MAX];  /* of all parties */
    uint8_t near[RANKS_MAX]; /* of our island's, by place */
    bool any_far, any_near;
};

static int cast_plan(const struct auto_group *g, const uint8_t *have, struct cast *ret_cast, struct err *err)
{
    bool held[RANKS_MAX] = {0}; /* islands with a party that has the bytes, or will get them by far */
    struct cast c = {0};
    bool any = false;
    for (uint32_t i = 0; i < g->n; i++) {
        held[g->island[i]] |= have[i] == TRANSPORT_HAS;
        any |= have[i] == TRANSPORT_HAS;
    }
    if (!any)
        return err_set(err, ERR_INVALID, "no party has the bytes that are to be broadcast");
    for (uint32_t i = 0; i < g->n; i++) {
        uint8_t near = have[i];
        c.far[i] = have[i] == TRANSPORT_HAS ? TRANSPORT_HAS : TRANSPORT_ABSENT;
        if (have[i] == TRANSPORT_WANTS && !held[g->island[i]]) {
            held[g->island[i]] = true;
            c.any_far = true;
            c.far[i] = TRANSPORT_WANTS;
            near = TRANSPORT_HAS;
        }
        if (g->island[i] == g->island[g->self])
            c.near[g->place[i]] = near;
    }
    c.any_near = held[g->island[g->self]];
    *ret_cast = c;
    return 0;
}

/* The extents of bytes [from, from + len) of the whole. */
static size_t segment_extents(const struct extent *extents, size_t n, uint64_t from, uint64_t len, struct extent *part)
{
    size_t k = 0;
    uint64_t at = 0;
    for (size_t i = 0; i < n; at += extents[i++].len) {
        uint64_t begin = at > from ? at : from, end = at + extents[i].len;
        end = end < from + len ? end : from + len;
        if (begin >= end)
            continue;
        part[k] = extents[i];
        part[k].offset += (size_t)(begin - at);
        part[k++].len = (size_t)(end - begin);
    }
    return k;
}

static int cast_segment(struct auto_group *g, const struct cast *c, const struct extent *part, size_t n,
                        const struct transport_call *call, uint64_t *bytes, struct err *err)
{
    struct auto_step step;
    uint64_t received = 0;
    int rc = 0;
    if (c->any_far) {
        auto_step_init(&step, call, *bytes, NULL);
        rc = g->t->far->broadcast(g->far, part, n, c->far, &step.call, &received, err);
        *bytes += rc == 0 ? received : 0;
    }
    if (rc == 0 && c->any_near) {
        auto_step_init(&step, call, *bytes, NULL);
        rc = g->t->options.near->broadcast(g->near, part, n, c->near, &step.call, &received, err);
        *bytes += rc == 0 ? received : 0;
    }
    return rc;
}

int auto_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    struct auto_group *g = (struct auto_group *)group;
    struct cast c = {0};
    uint64_t total = 0, bytes = 0;
    if (!g->near)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct extent *part = calloc(n + 1, sizeof *part);
    int rc = part ? cast_plan(g, have, &c, err) : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < n; i++)
        total += extents[i].len;
    const uint64_t segment = c.any_far ? SEGMENT_BYTES : total;
    for (uint64_t at = 0; at < total && rc == 0; at += segment) {
        size_t k = segment_extents(extents, n, at, segment, part);
        rc = cast_segment(g, &c, part, k, call, &bytes, err);
    }
    free(part);
    if (rc < 0)
        auto_group_drop(g);
    else
        *ret_bytes = bytes;
    return rc;
}
