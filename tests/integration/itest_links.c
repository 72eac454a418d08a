/* Slow links and many of them: latency between agents and coordinator (a delaying proxy), and a thousand agents that
 * reconnect at once when the coordinator comes back, beside a view that serves. */
#include <event2/event.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "agent/coordinator_link.h"
#include "common/loop.h"
#include "common/rand.h"
#include "tests/harness/proxy.h"
#include "tests/integration/itest.h"

/* 20 to 40 ms each way: far more than a step, and less than the lead, so that nobody is held and nothing is repeated.
 */
START_TEST(latency_costs_time_and_nothing_else)
{
    struct cluster c;
    char listen_path[160], target[160], address[192];
    struct cluster_options o = {.agents = 4, .loaders = 2, .step_ms = 5, .agents_connect = address};
    static const char *const args[] = {"--slots",    "8",    "--lead-ms",      "1000",
                                       "--lease-ms", "1500", "--heartbeat-ms", "200"};
    memcpy(o.coordinator_args, args, sizeof args);
    o.model = QWEN;
    ck_assert_int_eq(cluster_start(&c, &o), 0);
    snprintf(listen_path, sizeof listen_path, "%s/proxy.sock", c.dir);
    snprintf(target, sizeof target, "%s/coordinator.sock", c.dir);
    snprintf(address, sizeof address, "unix:%s", listen_path);
    pid_t proxy = proxy_start(listen_path, target, 20, 20);
    ck_assert_int_gt(proxy, 0);
    ck_assert_int_eq(cluster_all_start(&c), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 4, 30000), 0);
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    CTL(&c, 0, "scale", "--to", "4");
    CTL(&c, 0, "scale", "--to", "3");
    CTL(&c, 0, "history");
    ck_assert_msg(!strstr(ctl_out, "repair") && !strstr(ctl_out, "aborted"), "%s", ctl_out);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
    cluster_signal(&proxy, SIGKILL);
}
END_TEST

/* ---- a thousand spares ---- */

#define STORM 1000

struct storm {
    struct event_base *base;
    struct coordinator_link *link[STORM];
    struct storm_agent {
        struct storm *storm;
        int i;
        bool welcomed;
        uint64_t incarnation;
    } agent[STORM];
    int welcomed;
};

static void on_up(void *user)
{
    struct storm_agent *a = user;
    struct msg m = {.type = MSG_HELLO};
    snprintf(m.hello.id, sizeof m.hello.id, "storm%d", a->i);
    snprintf(m.hello.address, sizeof m.hello.address, "127.0.0.1:1");
    snprintf(m.hello.data_address, sizeof m.hello.data_address, "127.0.0.1:1");
    m.hello.incarnation = a->incarnation;
    m.hello.engine = PROMISE_JOINER;
    coordinator_link_send(a->storm->link[a->i], &m);
}

static void on_down(void *user)
{
    struct storm_agent *a = user;
    a->storm->welcomed -= a->welcomed;
    a->welcomed = false;
}

static void on_msg(void *user, const struct msg *msg)
{
    struct storm_agent *a = user;
    if (msg->type != MSG_WELCOME || a->welcomed)
        return;
    a->welcomed = true;
    a->storm->welcomed++;
}

static void storm_until(struct storm *s, int welcomed, int timeout_ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    while (s->welcomed != welcomed) {
        const struct timeval turn = {.tv_usec = 10000};
        event_base_loopexit(s->base, &turn);
        event_base_dispatch(s->base);
        ck_assert_msg(cluster_now_ms() < end, "%d of %d are welcome", s->welcomed, welcomed);
    }
}

START_TEST(a_thousand_agents_reconnect_at_once)
{
    struct cluster c;
    static struct storm s;
    struct err err;
    itest_start(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    s.base = event_base_new();
    struct rpc *rpc = rpc_new(s.base);
    struct log *log = log_new("storm", "storm", LOG_LEVEL_ERROR, -1);
    for (int i = 0; i < STORM; i++) {
        struct rpc_identity self = {.role = RPC_ROLE_AGENT, .cluster = "eep", .software = "storm"};
        s.agent[i] = (struct storm_agent){.storm = &s, .i = i};
        ck_assert_int_eq(rand_u64(&s.agent[i].incarnation, &err), 0);
        self.incarnation = s.agent[i].incarnation;
        snprintf(self.agent, sizeof self.agent, "storm%d", i);
        struct coordinator_link_config config = {.base = s.base,
                                                 .rpc = rpc,
                                                 .log = log,
                                                 .address = c.address,
                                                 .self = &self,
                                                 .on_up = on_up,
                                                 .on_down = on_down,
                                                 .on_msg = on_msg,
                                                 .user = &s.agent[i]};
        ck_assert_int_eq(coordinator_link_new(&config, &s.link[i], &err), 0);
    }
    storm_until(&s, STORM, 60000);
    cluster_signal(&c.coordinator, SIGKILL);
    storm_until(&s, 0, 10000);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    uint64_t began = cluster_now_ms();
    storm_until(&s, STORM, 60000);
    printf("%d agents are back after %llu ms\n", STORM, (unsigned long long)(cluster_now_ms() - began));
    /* the two that serve have kept their ranks, and their requests */
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "history");
    ck_assert_msg(!strstr(ctl_out, "repair"), "%s", ctl_out);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    for (int i = 0; i < STORM; i++)
        coordinator_link_free(s.link[i]);
    rpc_free(rpc);
    log_free(log);
    loop_free(s.base);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, latency_costs_time_and_nothing_else);
    tcase_add_test(t, a_thousand_agents_reconnect_at_once);
}

int main(void)
{
    return suite_main("links", add, 180);
}
