/* Verification: every rank of the view compares its own weights with their digests.  Part of the coordinator's core; pure. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

static void verify_finish(struct coordinator *c, int code, const char *text)
{
    core_reply(c, c->verify.request, code, 0, c->verify.bad ? OUTCOME_FAILED : OUTCOME_DONE, NULL, "%s", text);
    c->out->v[c->out->n - 1].msg = (struct msg){
        .type = MSG_VERIFIED,
        .verified = {.slots = c->verify.slots, .dense = c->verify.dense, .bytes = c->verify.bytes, .bad = c->verify.bad},
    };
    c->verify.request = 0;
    arrivals_reset(&c->verify.missing);
}

void verify_start(struct coordinator *c, uint64_t request)
{
    if (!c->view) {
        core_reply(c, request, ERR_NOTFOUND, 0, 0, NULL, "nothing to verify: no view is committed yet");
        return;
    }
    if (c->verify.request) {
        core_reply(c, request, ERR_CONFLICT, 0, 0, NULL, "another verification is running");
        return;
    }
    memset(&c->verify.slots, 0, sizeof(c->verify) - offsetof(__typeof__(c->verify), slots));
    arrivals_reset(&c->verify.missing);
    c->verify.request = request;
    c->verify.id = ++c->last_verify;
    c->verify.deadline_ns = c->now_ns + (uint64_t)c->config.transfer_ms * 1000000;
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        if (arrivals_expect(&c->verify.missing, p, c->peers[p].member.incarnation) < 0)
            abort();
        struct msg *m = core_send(c, p, MSG_VERIFY);
        if (!m) {
            char text[160];
            snprintf(text, sizeof(text), "agent %s is not connected: verify again when it is back",
                     c->peers[p].member.id);
            verify_finish(c, ERR_UNREACHABLE, text);
            return;
        }
        m->verify.request = c->verify.id;
    }
}

void verify_result(struct coordinator *c, uint32_t peer, const struct msg_verified *v)
{
    if (!c->verify.request || v->request != c->verify.id ||
        arrivals_add(&c->verify.missing, peer, c->peers[peer].member.incarnation, 0) != ARRIVAL_COUNTED)
        return;
    c->verify.slots += v->slots;
    c->verify.dense += v->dense;
    c->verify.bytes += v->bytes;
    c->verify.bad += v->bad;
    if (v->bad && !c->verify.text[0])
        snprintf(c->verify.text, sizeof(c->verify.text), "%s: %.180s", c->peers[peer].member.id, v->text);
    if (!arrivals_complete(&c->verify.missing))
        return;
    char text[512];
    if (c->verify.bad)
        snprintf(text, sizeof(text), "%llu of %llu slots or dense regions differ; first: %s",
                 (unsigned long long)c->verify.bad, (unsigned long long)(c->verify.slots + c->verify.dense),
                 c->verify.text);
    else
        snprintf(text, sizeof(text), "%llu expert slots and %llu dense regions (%llu bytes) are as loaded",
                 (unsigned long long)c->verify.slots, (unsigned long long)c->verify.dense,
                 (unsigned long long)c->verify.bytes);
    verify_finish(c, c->verify.bad ? ERR_CORRUPT : 0, text);
}

void verify_check(struct coordinator *c)
{
    if (!c->verify.request)
        return;
    for (size_t i = 0; i < c->verify.missing.n; i++) {
        const struct arrival *a = &c->verify.missing.v[i];
        if (!a->arrived && !c->peers[a->id].conn) {
            char text[160];
            snprintf(text, sizeof(text), "agent %s went away while verifying", c->peers[a->id].member.id);
            verify_finish(c, ERR_UNREACHABLE, text);
            return;
        }
    }
    if (c->now_ns >= c->verify.deadline_ns) {
        char names[128], text[256];
        core_names(c, &c->verify.missing, names, sizeof(names));
        snprintf(text, sizeof(text), "no answer from %s in time", names);
        verify_finish(c, ERR_TIMEOUT, text);
    }
}
