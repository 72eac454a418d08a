/* What the integration tests share: a served cluster under load, and what must be true at its end. */
#ifndef EEP_TESTS_INTEGRATION_ITEST_H
#define EEP_TESTS_INTEGRATION_ITEST_H

#include <check.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/harness/cluster.h"
#include "tests/harness/suite.h"

#define QWEN "tests/data/qwen3-moe-tiny"
#define MIXTRAL "tests/data/mixtral-tiny"

/* eepctl with these arguments must exit with `code`; its output is in ctl_out. */
static char ctl_out[65536];
#define CTL(c, code, ...)                                                                                              \
    do {                                                                                                               \
        int got_ = cluster_ctl(c, ctl_out, sizeof(ctl_out), __VA_ARGS__, NULL);                                        \
        ck_assert_msg(got_ == (code), "eepctl exited with %d, not %d: %s", got_, code, ctl_out);                       \
    } while (0)
#define CTL_SAYS(text) ck_assert_msg(strstr(ctl_out, text) != NULL, "not said: \"%s\", but: %s", text, ctl_out)

static inline void itest_start(struct cluster *c, struct cluster_options o)
{
    static const char *const quick[] = {"--slots", "8", "--lead-ms", "100", "--lease-ms", "1500", "--heartbeat-ms", "200", NULL};
    if (!o.model)
        o.model = QWEN;
    if (!o.coordinator_args[0])
        memcpy(o.coordinator_args, quick, sizeof(quick));
    ck_assert_int_eq(cluster_start(c, &o), 0);
    ck_assert_int_eq(cluster_all_start(c), 0);
    ck_assert_msg(cluster_wait_agents(c, o.agents, 30000) == 0, "agents did not come up, logs in %s", c->dir);
}

static inline void itest_feed(struct cluster *c, const char *concurrency)
{
    ck_assert_int_eq(cluster_feeder_start(c, (const char *[]){"--concurrency", concurrency, NULL}), 0);
}

/* Stops the load; every request that was issued has completed with exactly the reference's tokens.  Returns how many. */
static inline double itest_fed(struct cluster *c)
{
    int code = cluster_feeder_stop(c, 60000);
    char *text = cluster_read(c, "report.json");
    ck_assert_msg(text != NULL, "no report of the feeder (exit %d), logs in %s", code, c->dir);
    json_t *r = json_loads(text, 0, NULL);
    double issued = json_number_value(json_object_get(r, "issued"));
    double completed = json_number_value(json_object_get(r, "completed"));
    double wrong = json_number_value(json_object_get(r, "wrong"));
    ck_assert_msg(code == 0 && issued > 0 && completed == issued && wrong == 0, "feeder exit %d: %s; logs in %s", code, text, c->dir);
    free(text);
    json_decref(r);
    return completed;
}

/* Waits until `eepctl status` says this. */
static inline void itest_wait_status(struct cluster *c, const char *says, int timeout_ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    do {
        (void)cluster_ctl(c, ctl_out, sizeof(ctl_out), "status", NULL);
        if (strstr(ctl_out, says))
            return;
        cluster_sleep_ms(100);
    } while (cluster_now_ms() < end);
    ck_abort_msg("status never said \"%s\": %s; logs in %s", says, ctl_out, c->dir);
}

/* Number of ranks in the committed view. */
static inline int itest_ranks(struct cluster *c)
{
    int n = -1;
    if (cluster_ctl(c, ctl_out, sizeof(ctl_out), "-o", "json", "status", NULL) == 0) {
        json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
        n = (int)json_array_size(json_object_get(json_object_get(root, "view"), "members"));
        json_decref(root);
    }
    return n;
}
static inline void itest_wait_ranks(struct cluster *c, int ranks, int timeout_ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    while (itest_ranks(c) != ranks) {
        ck_assert_msg(cluster_now_ms() < end, "never %d ranks: %s; logs in %s", ranks, ctl_out, c->dir);
        cluster_sleep_ms(100);
    }
}

/* 4 ranks of 8 slots hold 16 experts a layer twice: two of them have room for everything. */
static inline void itest_serve_four(struct cluster *c, struct cluster_options o)
{
    o.agents = 4;
    o.loaders = o.loaders ? o.loaders : 4;
    o.step_ms = 5;
    itest_start(c, o);
    CTL(c, 0, "scale", "--to", "2");
    CTL(c, 0, "scale", "--to", "4");
    itest_feed(c, "4");
    cluster_sleep_ms(300);
}

/* A rank with everything that is on its host. */
static inline void itest_kill_rank(struct cluster *c, int i)
{
    cluster_signal(&c->agent[i], SIGKILL);
    cluster_signal(&c->engine[i], SIGKILL);
}

/* Ranks 1 and 3, together: the first death alone is repaired without. */
static inline void itest_kill_two(struct cluster *c)
{
    kill(c->agent[1], SIGSTOP);
    itest_kill_rank(c, 3);
    itest_kill_rank(c, 1);
}

#endif
