/* Messages as plain structs: what they own, and their names.  Pure, any thread. */
#include "common/msg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void msg_done(struct msg *msg)
{
    switch (msg->type) {
    case MSG_STAGE_DONE:
        blob_unref(msg->stage_done.blob);
        model_unref(msg->stage_done.model);
        break;
    case MSG_LOAD:
        free(msg->load.tokens);
        break;
    case MSG_WELCOME:
        view_unref(msg->welcome.view);
        break;
    case MSG_OP_BEGIN:
        free(msg->op_begin.parties);
        model_unref(msg->op_begin.model);
        break;
    case MSG_STAGE:
        expert_map_unref(msg->stage.map);
        plan_unref(msg->stage.plan);
        view_unref(msg->stage.view);
        blob_unref(msg->stage.blob);
        free(msg->stage.sources);
        break;
    case MSG_GO:
        view_unref(msg->go.view);
        break;
    case MSG_MAP:
        expert_map_unref(msg->map.map);
        break;
    default: /* owns nothing */
        break;
    }
    memset(msg, 0, sizeof *msg);
}

static struct member *members_duplicate(const struct member *from, uint32_t n)
{
    if (n == 0)
        return NULL;
    struct member *to = calloc(n, sizeof *to);
    if (!to) {
        /* A message without its parties would be a lie, and there is nobody to report to. */
        fputs("out of memory while copying a message\n", stderr);
        abort();
    }
    memcpy(to, from, n * sizeof *to);
    return to;
}

static uint64_t *tokens_duplicate(const struct msg_load *from)
{
    size_t n = (size_t)from->layers * from->slots;
    uint64_t *to = n ? malloc(n * sizeof *to) : NULL;
    if (n && !to) {
        fputs("out of memory while copying a message\n", stderr);
        abort();
    }
    if (n)
        memcpy(to, from->tokens, n * sizeof *to);
    return to;
}

void msg_copy(struct msg *ret_copy, const struct msg *msg)
{
    memcpy(ret_copy, msg, sizeof *msg);
    switch (msg->type) {
    case MSG_STAGE_DONE:
        blob_ref(ret_copy->stage_done.blob);
        model_ref(ret_copy->stage_done.model);
        break;
    case MSG_LOAD:
        ret_copy->load.tokens = tokens_duplicate(&msg->load);
        break;
    case MSG_WELCOME:
        view_ref(ret_copy->welcome.view);
        break;
    case MSG_OP_BEGIN:
        ret_copy->op_begin.parties = members_duplicate(msg->op_begin.parties, msg->op_begin.n);
        model_ref(ret_copy->op_begin.model);
        break;
    case MSG_STAGE:
        expert_map_ref(ret_copy->stage.map);
        plan_ref(ret_copy->stage.plan);
        view_ref(ret_copy->stage.view);
        blob_ref(ret_copy->stage.blob);
        ret_copy->stage.sources = members_duplicate(msg->stage.sources, msg->stage.n_sources);
        break;
    case MSG_GO:
        view_ref(ret_copy->go.view);
        break;
    case MSG_MAP:
        expert_map_ref(ret_copy->map.map);
        break;
    default:
        break;
    }
}

const char *msg_type_name(enum msg_type type)
{
    switch (type) {
    case MSG_HELLO:
        return "HELLO";
    case MSG_HEARTBEAT:
        return "HEARTBEAT";
    case MSG_ENGINE:
        return "ENGINE";
    case MSG_STAGE_DONE:
        return "STAGE_DONE";
    case MSG_PROGRESS:
        return "PROGRESS";
    case MSG_PROMISE:
        return "PROMISE";
    case MSG_REFUSE:
        return "REFUSE";
    case MSG_FLIPPED:
        return "FLIPPED";
    case MSG_MAP_ACK:
        return "MAP_ACK";
    case MSG_VERIFIED:
        return "VERIFIED";
    case MSG_LEAVE:
        return "LEAVE";
    case MSG_LOAD:
        return "LOAD";
    case MSG_WELCOME:
        return "WELCOME";
    case MSG_EVICTED:
        return "EVICTED";
    case MSG_OP_BEGIN:
        return "OP_BEGIN";
    case MSG_STAGE:
        return "STAGE";
    case MSG_NOTIFY:
        return "NOTIFY";
    case MSG_OP_END:
        return "OP_END";
    case MSG_OP_ABORT:
        return "OP_ABORT";
    case MSG_PREPARE:
        return "PREPARE";
    case MSG_GO:
        return "GO";
    case MSG_ABORT:
        return "ABORT";
    case MSG_DISMISS:
        return "DISMISS";
    case MSG_MAP:
        return "MAP";
    case MSG_VERIFY:
        return "VERIFY";
    }
    return "unknown";
}

const char *op_kind_name(enum op_kind kind)
{
    switch (kind) {
    case OP_START:
        return "start";
    case OP_SCALE_UP:
        return "scale-up";
    case OP_SCALE_DOWN:
        return "scale-down";
    case OP_REPAIR:
        return "repair";
    case OP_REBALANCE:
        return "rebalance";
    }
    return "unknown";
}

const char *op_role_name(enum op_role role)
{
    switch (role) {
    case ROLE_EXISTING:
        return "existing";
    case ROLE_NEW:
        return "new";
    case ROLE_REMAINING:
        return "remaining";
    case ROLE_REMOVING:
        return "removing";
    }
    return "unknown";
}

const char *op_stage_name(enum op_stage stage)
{
    switch (stage) {
    case STAGE_ALLOCATE:
        return "ALLOCATE";
    case STAGE_GROUP_ID:
        return "GROUP_ID";
    case STAGE_GROUP:
        return "GROUP";
    case STAGE_MAPPING:
        return "MAPPING";
    case STAGE_WEIGHTS:
        return "WEIGHTS";
    case STAGE_KV:
        return "KV";
    case STAGE_ENGINE_PREPARE:
        return "ENGINE_PREPARE";
    case STAGE_DRAIN:
        return "DRAIN";
    case STAGE_GRACE:
        return "GRACE";
    case STAGE_FILL:
        return "FILL";
    case STAGE_LET_GO:
        return "LET_GO";
    case STAGE_RELOAD:
        return "RELOAD";
    case STAGE_MAX:
        break;
    }
    return "unknown";
}

const char *notify_name(enum notify_type what)
{
    switch (what) {
    case NOTIFY_NEW_CORE_ENGINES_INIT_READY:
        return "NEW_CORE_ENGINES_INIT_READY";
    case NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY:
        return "NEW_CORE_ENGINES_WEIGHTS_INIT_READY";
    case NOTIFY_RECONFIGURE_FINISHED:
        return "RECONFIGURE_FINISHED";
    case NOTIFY_SHUTDOWN_COMPLETE:
        return "SHUTDOWN_COMPLETE";
    }
    return "unknown";
}
