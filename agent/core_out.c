/* Actions of the agent's core: how they are appended, and what they own.  Pure; the thread of the core. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

void *acore_alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) {
        fputs("out of memory in the agent's core\n", stderr);
        abort();
    }
    return p;
}

void work_done(struct work *work)
{
    free(work->parties);
    free(work->sources);
    model_unref(work->model);
    plan_unref(work->plan);
    expert_map_unref(work->map);
    blob_unref(work->blob);
    memset(work, 0, sizeof(*work));
}

void agent_actions_clear(struct agent_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++) {
        struct agent_action *a = &actions->v[i];
        msg_done(&a->msg);
        work_done(&a->work);
        view_unref(a->view);
        expert_map_unref(a->map);
    }
    actions->n = 0;
}

void agent_actions_done(struct agent_actions *actions)
{
    agent_actions_clear(actions);
    free(actions->v);
    memset(actions, 0, sizeof(*actions));
}

struct agent_action *acore_act(struct agent_core *core, enum agent_action_type type)
{
    struct agent_actions *out = core->out;
    if (out->n == out->cap) {
        size_t cap = out->cap ? out->cap * 2 : 16;
        struct agent_action *v = realloc(out->v, cap * sizeof(*v));
        if (!v) {
            fputs("out of memory in the agent's core\n", stderr);
            abort();
        }
        out->v = v;
        out->cap = cap;
    }
    struct agent_action *a = &out->v[out->n++];
    memset(a, 0, sizeof(*a));
    a->type = type;
    return a;
}

void acore_log(struct agent_core *core, enum agent_log_level level, const char *fmt, ...)
{
    struct agent_action *a = acore_act(core, AA_LOG);
    va_list args;
    va_start(args, fmt);
    vsnprintf(a->text, sizeof(a->text), fmt, args);
    va_end(args);
    a->level = (int)level;
    a->epoch = core->applied_epoch;
    a->op = agent_operation_running(core) ? core->op.op : 0;
}

struct msg *acore_send(struct agent_core *core, enum msg_type type)
{
    if (!core->welcomed)
        return NULL;
    struct agent_action *a = acore_act(core, AA_SEND);
    a->msg.type = type;
    return &a->msg;
}

void acore_page(struct agent_core *core, enum page_word word, uint64_t value)
{
    struct agent_action *a = acore_act(core, AA_PAGE);
    a->word = word;
    a->value = value;
}

void acore_say(struct agent_core *core, enum agent_action_type type, const char *text)
{
    struct agent_action *a = acore_act(core, type);
    snprintf(a->text, sizeof(a->text), "%s", text ? text : "");
}
