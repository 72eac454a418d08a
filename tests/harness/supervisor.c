/* See supervisor.h. */
#include "tests/harness/supervisor.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void supervisor_fail(struct supervisor *s, const char *fmt, ...)
{
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    s->fail(s->user, text);
}

/* ---- looking ---- */

static bool look_status(struct supervisor *s, struct look *ret)
{
    if (cluster_ctl(s->cluster, s->out, sizeof s->out, "-o", "json", "status", NULL) != 0)
        return false;
    json_t *all = json_loads(s->out, JSON_DISABLE_EOF_CHECK, NULL);
    json_t *view = json_object_get(all, "view");
    ret->ranks = (unsigned)json_array_size(json_object_get(view, "members"));
    ret->running = json_is_true(json_object_get(all, "op_running"));
    ret->degraded = json_string_length(json_object_get(view, "degraded")) > 0;
    json_decref(all);
    return true;
}

bool supervisor_look(struct supervisor *s, struct look *ret)
{
    *ret = (struct look){.all_connected = true};
    memset(ret->rank, -1, sizeof ret->rank);
    if (cluster_ctl(s->cluster, s->out, sizeof s->out, "-o", "json", "agents", NULL) != 0)
        return false;
    json_t *all = json_loads(s->out, JSON_DISABLE_EOF_CHECK, NULL), *agent;
    size_t i;
    json_array_foreach(json_object_get(all, "agents"), i, agent)
    {
        const char *id = json_string_value(json_object_get(json_object_get(agent, "member"), "id"));
        int n = id && strncmp(id, "gpu", 3) == 0 ? atoi(id + 3) : -1;
        if (n < 0 || n >= s->cluster->options.agents)
            continue;
        bool there = json_is_true(json_object_get(agent, "connected"));
        ret->rank[n] = (int)json_integer_value(json_object_get(agent, "rank"));
        ret->all_connected &= there;
        ret->attached += there && json_is_true(json_object_get(agent, "engine"));
    }
    json_decref(all);
    return look_status(s, ret); /* later: what an agent that is back has changed is in it */
}

long supervisor_completed(struct supervisor *s)
{
    char *text = cluster_read(s->cluster, "feeder.json");
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    long n = o ? (long)json_integer_value(json_object_get(o, "completed")) : -1;
    json_decref(o);
    free(text);
    return n;
}

void supervisor_read_logs(struct supervisor *s)
{
    static const char *const signs[] = {"Sanitizer", "runtime error", "Assertion"};
    int agents = s->cluster->options.agents;
    char name[32];
    for (int i = 0; i <= 2 * agents; i++) {
        snprintf(name, sizeof name,
                 i == 2 * agents ? "coordinator.log"
                 : i % 2         ? "engine-%d.log"
                                 : "agent-%d.log",
                 i / 2);
        char *text = cluster_read(s->cluster, name);
        for (size_t k = 0; text && k < sizeof signs / sizeof signs[0]; k++)
            if (strstr(text, signs[k]))
                supervisor_fail(s, "%s has \"%s\"", name, signs[k]);
        free(text);
    }
}

/* ---- starting again ---- */

void supervisor_restart(struct supervisor *s)
{
    struct cluster *c = s->cluster;
    int status = cluster_wait(&c->coordinator, 0);
    if (status >= 0)
        supervisor_fail(s, "the coordinator has ended with status %d", status);
    if (!c->coordinator && cluster_coordinator_start(c) < 0)
        supervisor_fail(s, "the coordinator does not start again");
    for (int i = 0; i < c->options.agents; i++) {
        status = cluster_wait(&c->agent[i], 0);
        if (status >= 0)
            supervisor_fail(s, "agent %d has ended with status %d", i, status);
        status = cluster_wait(&c->engine[i], 0);
        if (status > 1)
            supervisor_fail(s, "engine %d has ended with status %d", i, status);
        if (!c->agent[i])
            cluster_agent_start(c, i);
        if (!c->engine[i])
            cluster_engine_start(c, i);
    }
}

void supervisor_progress(struct supervisor *s)
{
    long before = supervisor_completed(s);
    for (uint64_t end = cluster_now_ms() + 20000; cluster_now_ms() < end; cluster_sleep_ms(50)) {
        supervisor_restart(s); /* a loss may be noticed only now, and end in a start anew */
        if (supervisor_completed(s) > before)
            return;
    }
    supervisor_fail(s, "no request completes any more (%ld so far)", before);
}

void supervisor_heal(struct supervisor *s)
{
    uint64_t end = cluster_now_ms() + s->heal_ms;
    struct look look = {0};
    for (;;) {
        supervisor_restart(s);
        if (supervisor_look(s, &look) && look.attached == (unsigned)s->cluster->options.agents && look.all_connected &&
            !look.running && !look.degraded && look.ranks > 0)
            return;
        if (cluster_now_ms() > end)
            supervisor_fail(s, "not whole again after %u ms: %u ranks, %u engines attached, %s%s", s->heal_ms,
                            look.ranks, look.attached, look.running ? "an operation runs, " : "",
                            look.degraded ? "degraded" : "");
        cluster_sleep_ms(100);
    }
}

void supervisor_end(struct supervisor *s)
{
    supervisor_heal(s);
    cluster_sleep_ms(1000); /* an incarnation that was just evicted takes its engine with it */
    supervisor_heal(s);
    int code = cluster_feeder_stop(s->cluster, 70000);
    char *report = cluster_read(s->cluster, "report.json");
    if (code != 0)
        supervisor_fail(s, "feeder exit %d: %.1500s", code, report ? report : "no report");
    free(report);
}

int supervisor_wait(struct supervisor *s, pid_t *pid, const char *name)
{
    int code = -1;
    char file[64];
    for (uint64_t end = cluster_now_ms() + s->operation_ms; *pid > 0 && cluster_now_ms() < end; supervisor_restart(s))
        code = cluster_wait(pid, 100);
    s->out[0] = '\0';
    static const char *const ends[] = {"log", "out"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof file, "%s.%s", name, ends[i]);
        char *text = cluster_read(s->cluster, file);
        size_t used = strlen(s->out);
        snprintf(s->out + used, sizeof s->out - used, "%s", text ? text : "");
        free(text);
    }
    if (*pid > 0) {
        cluster_signal(pid, SIGKILL);
        supervisor_fail(s, "eepctl (%s) has not ended after %u ms: %.1500s", name, s->operation_ms, s->out);
    }
    return code;
}

void supervisor_scale(struct supervisor *s, const char *to)
{
    uint64_t end = cluster_now_ms() + s->heal_ms;
    for (;;) {
        const char *const args[] = {"scale", "--to", to, "--wait-for-agents=10", NULL};
        pid_t scale = cluster_ctl_start(s->cluster, "again", args);
        int code = supervisor_wait(s, &scale, "again");
        if (code == 0)
            return;
        if ((code != 7 && code != 3) || cluster_now_ms() > end)
            supervisor_fail(s, "scale --to %s afterwards: exit %d: %.1500s", to, code, s->out);
        cluster_sleep_ms(200);
    }
}
