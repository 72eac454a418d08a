/* Reading experts from other agents: see expert_read.h.  Worker thread. */
#include "agent/expert_read.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "peer.pb-c.h"

#define METHOD_READ_EXPERT 0u
#define CANCEL_MS          100
#define CONNECT_FIRST_MS   1000 /* then twice as long each time: an attempt cannot be cancelled */

struct source {
    struct rpc_client *client; /* NULL: not connected yet, or lost */
    struct err lost;           /* code < 0: for good */
};

struct expert_sources {
    struct expert_sources_config config;
    struct source *sources; /* [config.n] */
};

int expert_sources_open(const struct expert_sources_config *config, struct expert_sources **ret_sources, struct err *err)
{
    struct expert_sources *s = calloc(1, sizeof *s);
    if (s)
        s->sources = calloc(config->n + 1, sizeof *s->sources);
    if (!s || !s->sources) {
        free(s);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    s->config = *config;
    *ret_sources = s;
    return 0;
}

void expert_sources_close(struct expert_sources *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < s->config.n; i++)
        rpc_client_free(s->sources[i].client);
    free(s->sources);
    free(s);
}

static bool source_cancelled(const struct expert_sources *s)
{
    return s->config.cancelled && s->config.cancelled(s->config.user);
}

static int source_connect(struct expert_sources *s, uint32_t i, struct err *err)
{
    const struct member *m = &s->config.members[i];
    uint64_t until_ms = clock_now_ms() + s->config.timeout_ms;
    char who[AGENT_ID_MAX + 8];
    snprintf(who, sizeof who, "agent/%s", m->id);
    for (uint64_t attempt_ms = CONNECT_FIRST_MS;; attempt_ms *= 2) {
        uint64_t now_ms = clock_now_ms(), left_ms = until_ms > now_ms ? until_ms - now_ms : 1;
        int rc = rpc_client_connect_tls(m->address, s->config.self, &pb__peer__descriptor, s->config.tls, who,
                                        (int)(left_ms < attempt_ms ? left_ms : attempt_ms), &s->sources[i].client, err);
        if (rc != ERR_TIMEOUT || clock_now_ms() >= until_ms)
            return rc;
        if (source_cancelled(s))
            return err_set(err, ERR_ABORTED, "cancelled");
    }
}

/* The answer to a call, or ERR_ABORTED, or ERR_TIMEOUT. */
static int source_wait(struct expert_sources *s, struct rpc_client *client, uint64_t call, ProtobufCMessage **ret_reply,
                       struct err *err)
{
    uint64_t until_ms = clock_now_ms() + s->config.timeout_ms;
    for (;;) {
        ProtobufCMessage *more;
        int rc = rpc_client_next(client, call, CANCEL_MS, ret_reply, err);
        if (rc == 0)
            return err_set(err, ERR_PROTOCOL, "it answered without a reply");
        int end = rc == 1 ? rpc_client_next(client, call, 0, &more, err) : 0;
        if (end == 1)
            rpc_unpack_free(more);
        if (end != 0) { /* one reply, which ends the call */
            rpc_unpack_free(*ret_reply);
            return err_set(err, ERR_PROTOCOL, "it answered with a stream");
        }
        if (rc != ERR_TIMEOUT)
            return rc < 0 ? rc : 0;
        if (source_cancelled(s))
            return err_set(err, ERR_ABORTED, "cancelled");
        if (clock_now_ms() >= until_ms)
            return err_set(err, ERR_TIMEOUT, "no answer within %u ms", s->config.timeout_ms);
    }
}

static int source_failed(struct expert_sources *s, uint32_t i, int rc, struct err *err)
{
    struct source *source = &s->sources[i];
    err_wrap(err, "agent %s", s->config.members[i].id);
    if (!source->client || rc == ERR_TIMEOUT || rc == ERR_PROTOCOL || rc == ERR_UNREACHABLE)
        source->lost = *err;
    return rc;
}

int expert_sources_begin(struct expert_sources *s, uint32_t i, const struct expert_read *read, uint64_t *ret_call,
                         struct err *err)
{
    struct source *source = &s->sources[i];
    Pb__ReadExpertRequest request = PB__READ_EXPERT_REQUEST__INIT;
    if (source->lost.code < 0)
        return err_set(err, source->lost.code, "%s", source->lost.text);
    request.manifest = read->manifest;
    request.slots = read->slots;
    request.layer = read->layer;
    request.expert = read->expert;
    request.offset = read->offset;
    request.length = read->length;
    request.memory_only = read->memory_only;
    int rc = source->client ? 0 : source_connect(s, i, err);
    if (rc == 0)
        rc = rpc_client_start(source->client, METHOD_READ_EXPERT, &request.base, ret_call, err);
    return rc < 0 ? source_failed(s, i, rc, err) : 0;
}

int expert_sources_end(struct expert_sources *s, uint32_t i, uint64_t call, const struct expert_read *read, void *ret_data,
                       struct err *err)
{
    struct source *source = &s->sources[i];
    ProtobufCMessage *reply;
    if (source->lost.code < 0)
        return err_set(err, source->lost.code, "%s", source->lost.text);
    int rc = source_wait(s, source->client, call, &reply, err);
    if (rc < 0)
        return source_failed(s, i, rc, err);
    const Pb__ReadExpertReply *got = (const Pb__ReadExpertReply *)reply;
    if (got->data.len != read->length)
        rc = err_set(err, ERR_PROTOCOL, "it sent %zu bytes instead of %u", got->data.len, read->length);
    else
        memcpy(ret_data, got->data.data, read->length);
    rpc_unpack_free(reply);
    return rc < 0 ? source_failed(s, i, rc, err) : 0;
}
