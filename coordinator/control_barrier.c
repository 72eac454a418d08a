/* The control service, barriers.  Loop thread. */
#include <stdlib.h>

#include "common/clock.h"
#include "coordinator/store_edge.h"

#define LIST_MAX 1000

void control_barrier_arrive(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__BarrierRequest *request = (const Pb__BarrierRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct err err;
    struct call *call = call_new(session, frame, CALL_BARRIER);
    if (!call)
        return;
    const struct barrier_arrival arrival = {
        .request = call->request,
        .name = request->name,
        .size = request->size,
        .member = request->member,
        .expected = (const char *const *)request->expected,
        .n_expected = request->n_expected,
        .now_ns = clock_now_ns(),
        .deadline_ns = edge_deadline(request->deadline_ms),
    };
    if (barriers_arrive(edge->barriers, &arrival, &err) < 0)
        call_fail(call, err.code, err.text);
    edge_changed(edge);
}

void control_barrier_woken(struct call *call, const struct barrier_wake *wake)
{
    if (wake->code < 0) {
        call_fail(call, wake->code, wake->text);
        return;
    }
    Pb__BarrierReply done = PB__BARRIER_REPLY__INIT;
    done.has_round = 1;
    done.round = wake->round;
    call_reply(call, &done.base);
}

static void info_fill(Pb__BarrierInfo *ret_pb, const struct barrier_info *info)
{
    uint64_t now = clock_now_ns();
    pb__barrier_info__init(ret_pb);
    ret_pb->name = (char *)info->name;
    ret_pb->size = info->size;
    ret_pb->arrived = info->arrived;
    ret_pb->age_ms = (now - info->since_ns) / 1000000;
    ret_pb->deadline_in_ms = info->deadline_ns > now ? (info->deadline_ns - now) / 1000000 : 0;
}

struct listing {
    Pb__BarrierInfo barriers[LIST_MAX], *pointers[LIST_MAX];
    size_t n;
};

static bool list_each(void *user, const struct barrier_info *info)
{
    struct listing *l = user;
    info_fill(&l->barriers[l->n], info);
    l->pointers[l->n] = &l->barriers[l->n];
    return ++l->n < LIST_MAX;
}

void control_barrier_list(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    (void)message;
    struct listing *l = calloc(1, sizeof *l);
    if (!l) {
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
        return;
    }
    barriers_list(session->server->edge->barriers, list_each, l);
    Pb__BarrierListReply found = PB__BARRIER_LIST_REPLY__INIT;
    found.n_barriers = l->n;
    found.barriers = l->pointers;
    frame_reply(session, frame, &found.base);
    free(l);
}

struct showing {
    char *there[LIST_MAX], *missing[LIST_MAX];
    char names[2 * LIST_MAX][BARRIER_MEMBER_MAX]; /* a missing rank's name is the callback's own */
    size_t n_there, n_missing;
};

static bool show_each(void *user, const char *member, bool arrived)
{
    struct showing *s = user;
    size_t at = s->n_there + s->n_missing, *n = arrived ? &s->n_there : &s->n_missing;
    if (*n == LIST_MAX)
        return arrived; /* those who are missing may still be shown */
    snprintf(s->names[at], sizeof s->names[at], "%s", member);
    (arrived ? s->there : s->missing)[(*n)++] = s->names[at];
    return true;
}

void control_barrier_show(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const char *name = ((const Pb__BarrierShowRequest *)message)->name;
    struct showing *s = calloc(1, sizeof *s);
    struct barrier_info info;
    struct err err;
    int rc = s ? barriers_show(session->server->edge->barriers, name, &info, show_each, s, &err)
               : err_set(&err, ERR_NOMEM, "the coordinator is out of memory");
    if (rc < 0) {
        frame_fail(session, frame, err.code, err.text);
    } else {
        Pb__BarrierInfo found;
        info_fill(&found, &info);
        found.n_members = s->n_there;
        found.members = s->there;
        found.n_missing = s->n_missing;
        found.missing = s->missing;
        frame_reply(session, frame, &found.base);
    }
    free(s);
}
