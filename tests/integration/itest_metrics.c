/* Metrics of both daemons: a cluster scales, and what they count is right; who asks for too much, or too slowly, does
 * not disturb; addresses beyond the loopback are refused.  promtool looks at the text where it is installed. */
#include "tests/harness/suite.h"
#include "tests/integration/itest.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "common/address.h"
#include "common/metrics_http.h"
#include "tests/integration/itest_run.h"

static char answer[1 << 18];

/* A request as it stands, the whole answer; how many bytes came before the end. */
static size_t ask(const char *address, const char *request)
{
    struct err err;
    int fd;
    size_t n = 0;
    ck_assert_msg(address_connect(address, 5000, &fd, &err) == 0, "%s", err.text);
    ck_assert_int_eq(send(fd, request, strlen(request), MSG_NOSIGNAL), (ssize_t)strlen(request));
    for (struct pollfd p = {.fd = fd, .events = POLLIN}; poll(&p, 1, 20000) == 1 && n < sizeof answer - 1;) {
        ssize_t got = recv(fd, answer + n, sizeof answer - 1 - n, 0);
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    answer[n] = '\0';
    close(fd);
    return n;
}

static void scrape(const char *address)
{
    ask(address, "GET /metrics HTTP/1.1\r\nHost: eep\r\n\r\n");
    ck_assert_msg(strncmp(answer, "HTTP/1.1 200 ", 13) == 0, "%s", answer);
    ck_assert_ptr_nonnull(strstr(answer, "Content-Type: text/plain; version=0.0.4"));
}

/* The value of a sample, named as it stands in the text. */
static double value(const char *sample)
{
    char line[256];
    snprintf(line, sizeof line, "\n%s ", sample);
    const char *at = strstr(answer, line);
    ck_assert_msg(at != NULL, "there is no %s in %s", sample, answer);
    return strtod(at + strlen(line), NULL);
}

/* The text is what promtool takes, where there is one. */
static void promtool_check(const struct cluster *c)
{
    char path[256], command[512];
    if (system("command -v promtool >/dev/null 2>&1") != 0) {
        const char *ci = getenv("CI");
        ck_assert_msg(!ci || strcmp(ci, "true") != 0, "promtool is not installed (make deps-test)");
        puts("promtool check metrics: not tested: it is not installed (make deps-test)");
        return;
    }
    snprintf(path, sizeof path, "%s/metrics.txt", c->dir);
    FILE *f = fopen(path, "w");
    const char *body = strstr(answer, "\r\n\r\n");
    ck_assert(f && body);
    fputs(body + 4, f);
    fclose(f);
    snprintf(command, sizeof command, "promtool check metrics <%s", path);
    ck_assert_int_eq(system(command), 0);
}

/* ---- what docs and rules say ---- */

static char *slurp(const char *path)
{
    static char text[65536];
    FILE *f = fopen(path, "r");
    ck_assert_msg(f != NULL, "cannot open %s", path);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* Families that were seen in an answer, " name" each. */
static char seen[16384];

static void all_documented(void)
{
    const char *docs = slurp("docs/metrics.md");
    for (const char *at = answer; (at = strstr(at, "\n# TYPE ")); at++) {
        char name[64], quoted[80];
        ck_assert_int_eq(sscanf(at, "\n# TYPE %63s", name), 1);
        snprintf(quoted, sizeof quoted, "| `%s` |", name);
        ck_assert_msg(strstr(docs, quoted) != NULL, "docs/metrics.md has no %s", name);
        snprintf(seen + strlen(seen), sizeof seen - strlen(seen), " %s ", name);
    }
}

/* Every name of a metric in the text that begins with eep_ is served, by itself or as a part of a histogram. */
static void only_served(const char *path)
{
    unsigned n = 0;
    for (const char *at = slurp(path); (at = strstr(at, "eep_")); n++) {
        char name[64], spaced[80];
        size_t len = strspn(at, "abcdefghijklmnopqrstuvwxyz_");
        snprintf(name, sizeof name, "%.*s", (int)len, at);
        static const char *const parts[] = {"", "_bucket", "_sum", "_count"};
        bool found = false;
        for (size_t i = 0; i < 4 && !found; i++) {
            size_t part = strlen(parts[i]);
            if (len < part || strcmp(name + len - part, parts[i]) != 0)
                continue;
            snprintf(spaced, sizeof spaced, " %.*s ", (int)(len - part), name);
            found = strstr(seen, spaced) != NULL;
        }
        ck_assert_msg(found, "%s names %s, which no daemon serves", path, name);
        at += len;
    }
    ck_assert_uint_gt(n, 10);
}

static void coordinator_counts(struct cluster *c, const char *address)
{
    scrape(address);
    ck_assert_double_eq(value("eep_ranks"), 3);
    ck_assert_double_eq(value("eep_ranks_wanted"), 3);
    ck_assert_double_ge(value("eep_epoch"), 2);
    ck_assert_double_eq(value("eep_view_degraded"), 0);
    ck_assert_double_eq(value("eep_agents{state=\"serving\"}"), 3);
    ck_assert_double_eq(value("eep_agents{state=\"spare\"}"), 0);
    ck_assert_double_eq(value("eep_rank_engines{state=\"attached\"}"), 3);
    ck_assert_double_eq(value("eep_operations_total{kind=\"start\",result=\"done\"}"), 1);
    ck_assert_double_eq(value("eep_operations_total{kind=\"scale-up\",result=\"done\"}"), 1);
    ck_assert_double_eq(value("eep_operations_total{kind=\"scale-up\",result=\"failed\"}"), 0);
    ck_assert_double_eq(value("eep_operation_running"), 0);
    ck_assert_double_gt(value("eep_moved_bytes_total"), 0);
    ck_assert_double_ge(value("eep_planned_bytes_total"), value("eep_moved_bytes_total"));
    ck_assert_double_eq(value("eep_operation_phase_seconds_count{phase=\"PROMISE\"}"), 2);
    ck_assert_double_eq(value("eep_operation_phase_seconds_bucket{phase=\"PROMISE\",le=\"+Inf\"}"), 2);
    ck_assert_double_eq(value("eep_operation_pause_seconds_count"), 2);
    ck_assert_double_gt(value("eep_expert_balance"), 0);
    ck_assert_double_le(value("eep_expert_balance"), 1);
    ck_assert_double_eq(value("eep_calls_total{call=\"Scale\",service=\"cluster\"}"), 2);
    ck_assert_double_eq(value("eep_calls_total{call=\"KvSet\",service=\"store\"}"), 1);
    ck_assert_double_ge(value("eep_store_call_seconds_count"), 1);
    ck_assert_double_eq(value("eep_store_disk_wait_seconds_count"), 1);
    ck_assert_double_eq(value("eep_store_keys"), 1);
    ck_assert_double_eq(value("eep_connections{role=\"agent\"}"), 3);
    ck_assert_double_ge(value("eep_journal_write_seconds_count"), 4);
    ck_assert_double_gt(value("eep_journal_write_seconds_sum"), 0);
    ck_assert_double_gt(value("process_resident_memory_bytes"), 1e6);
    ck_assert_double_gt(value("process_open_fds"), 5);
    ck_assert_double_gt(value("process_cpu_seconds_total"), 0);
    double age = (double)time(NULL) - value("process_start_time_seconds");
    ck_assert_msg(age > -5 && age < 600, "it began %g s ago", age);
    promtool_check(c);
    all_documented();
}

static void agent_counts(struct cluster *c, const char *address)
{
    scrape(address);
    ck_assert_double_eq(value("eep_agent_serving"), 1);
    ck_assert_double_eq(value("eep_agent_engine_attached"), 1);
    ck_assert_double_eq(value("eep_agent_coordinator_connected"), 1);
    ck_assert_double_eq(value("eep_agent_operations_total{role=\"new\",result=\"done\"}"), 1);
    ck_assert_double_eq(value("eep_agent_work_total{work=\"WEIGHTS\",result=\"done\"}"), 1);
    ck_assert_double_eq(value("eep_agent_work_total{work=\"WEIGHTS\",result=\"failed\"}"), 0);
    ck_assert_double_gt(value("eep_agent_work_bytes_total{work=\"WEIGHTS\"}"), 0);
    ck_assert_double_eq(value("eep_agent_work_seconds_count{work=\"WEIGHTS\"}"), 1);
    ck_assert_double_ge(value("eep_agent_pause_seconds_count"), 1);
    ck_assert_double_eq(value("eep_agent_gpu_errors_total{library=\"nccl\"}"), 0);
    ck_assert_double_eq(value("eep_agent_incarnations_total"), 1);
    ck_assert_double_gt(value("process_resident_memory_bytes"), 1e6);
    promtool_check(c);
    all_documented();
}

/* A coordinator, three agents and their engines; where the coordinator and the last agent serve metrics. */
static void start(struct cluster *c, char coordinator[192], char agent[192])
{
    static char listen[192];
    /* the folder is not known before: a name of our own, removed with its listener */
    snprintf(listen, sizeof listen, "unix:/tmp/eep-metrics-%d.sock", (int)getpid());
    snprintf(coordinator, 192, "%s", listen);
    ck_assert_int_eq(cluster_start(c, &(struct cluster_options){.model = QWEN,
                                                                .agents = 3,
                                                                .loaders = 2,
                                                                .step_ms = 2,
                                                                .coordinator_args = {"--slots", "8", "--lead-ms", "100",
                                                                                     "--metrics-listen", listen}}),
                     0);
    for (int i = 0; i < 3; i++) {
        static char own[192];
        snprintf(own, sizeof own, "unix:%s/m%d.sock", c->dir, i);
        c->options.agent_args[0] = "--metrics-listen";
        c->options.agent_args[1] = own;
        ck_assert_int_eq(cluster_agent_start(c, i), 0);
        ck_assert_int_eq(cluster_engine_start(c, i), 0);
        snprintf(agent, 192, "%s", own);
    }
    ck_assert_int_eq(cluster_wait_agents(c, 3, 30000), 0);
}

static void wait_ready(struct cluster *c)
{
    for (uint64_t end = cluster_now_ms() + 20000; cluster_now_ms() < end; cluster_sleep_ms(100))
        if (cluster_ctl(c, ctl_out, sizeof ctl_out, "health", NULL) == 0)
            return;
    ck_abort_msg("never ready: %s; logs in %s", ctl_out, c->dir);
}

START_TEST(what_is_counted)
{
    struct cluster c;
    char coordinator[192], agent[192];
    start(&c, coordinator, agent);
    scrape(coordinator); /* before the first view */
    ck_assert_double_eq(value("eep_epoch"), 0);
    ck_assert_double_eq(value("eep_agents{state=\"spare\"}"), 3);
    ck_assert_double_eq(value("eep_operations_total{kind=\"start\",result=\"done\"}"), 0);
    CTL(&c, 1, "health");
    CTL_SAYS("not ready: ");

    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    CTL(&c, 0, "scale", "--to", "3");
    CTL(&c, 0, "kv", "put", "a", "b");
    itest_fed(&c);
    coordinator_counts(&c, coordinator);
    agent_counts(&c, agent);
    CTL(&c, 0, "health");
    CTL_SAYS("ready: 3 ranks");
    ask(agent, "GET /healthz HTTP/1.1\r\nHost: eep\r\n\r\n");
    ck_assert_msg(strncmp(answer, "HTTP/1.1 200 ", 13) == 0, "%s", answer);

    only_served("docs/metrics.md");
    only_served("systemd/eep.rules.yml");

    /* an engine that dies with the last copy of some experts, and comes back; then the coordinator */
    cluster_signal(&c.engine[2], SIGKILL);
    itest_wait_status(&c, "degraded: ", 20000);
    scrape(coordinator);
    ck_assert_double_eq(value("eep_view_degraded"), 1);
    ck_assert_double_eq(value("eep_rank_engines{state=\"missing\"}"), 1);
    CTL(&c, 1, "health");
    CTL_SAYS("not ready: ");
    CTL_SAYS("no copy");
    ck_assert_int_eq(cluster_engine_start(&c, 2), 0);
    wait_ready(&c);
    cluster_signal(&c.coordinator, SIGKILL);
    CTL(&c, 3, "health");
    for (int i = 0; i < 200; i++) {
        ask(agent, "GET /healthz HTTP/1.1\r\nHost: eep\r\n\r\n");
        if (strncmp(answer, "HTTP/1.1 503 ", 13) == 0)
            break;
        cluster_sleep_ms(50);
    }
    ck_assert_msg(strncmp(answer, "HTTP/1.1 503 ", 13) == 0 && strstr(answer, "no coordinator"), "%s", answer);
    cluster_stop(&c, false); /* not clean: it was killed */
    unlink(coordinator + strlen(ADDRESS_UNIX));
}
END_TEST

/* ---- requests that are none ---- */

START_TEST(nothing_else_is_served)
{
    struct cluster c;
    char coordinator[192], agent[192];
    static char request[16384];
    start(&c, coordinator, agent);
    const struct {
        const char *text, *status;
    } cases[] = {
        {"GET / HTTP/1.1\r\nHost: eep\r\n\r\n", "HTTP/1.1 404 "},
        {"GET /metrics/../etc HTTP/1.1\r\nHost: eep\r\n\r\n", "HTTP/1.1 404 "},
        {"DELETE /metrics HTTP/1.1\r\nHost: eep\r\n\r\n", "HTTP/1.1 501 "},
        {"POST /metrics HTTP/1.1\r\nHost: eep\r\nContent-Length: 1000000\r\n\r\n", "HTTP/1.1 "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ask(coordinator, cases[i].text);
        ck_assert_msg(strncmp(answer, cases[i].status, strlen(cases[i].status)) == 0 && !strstr(answer, "eep_ranks"),
                      "%s: %s", cases[i].text, answer);
    }
    memset(request, 'x', sizeof request - 1); /* a line without end */
    memcpy(request, "GET /", 5);
    struct err err;
    int fd;
    ck_assert_int_eq(address_connect(coordinator, 5000, &fd, &err), 0);
    (void)!send(fd, request, sizeof request - 1, MSG_NOSIGNAL);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    ck_assert_int_eq(poll(&p, 1, 20000), 1); /* it ends, with an answer or without */
    close(fd);
    scrape(coordinator);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
    ck_assert_int_ne(access(coordinator + strlen(ADDRESS_UNIX), F_OK), 0); /* the socket's file goes with the daemon */
}
END_TEST

/* More connections than there may be, none of which says anything, and one that dribbles: descriptors stay bounded, the
 * daemon does its work, and metrics come once their time is over. */
START_TEST(slow_ones_are_bounded)
{
    struct cluster c;
    char coordinator[192], agent[192];
    int fds[4 * METRICS_CONNS_MAX];
    struct err err;
    start(&c, coordinator, agent);
    scrape(coordinator);
    int before = cluster_fds(c.coordinator);
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        ck_assert_int_eq(address_connect(coordinator, 5000, &fds[i], &err), 0);
    CTL(&c, 0, "scale", "--to", "2");
    ck_assert_int_le(cluster_fds(c.coordinator), before + METRICS_CONNS_MAX + 6); /* the commit's, too */
    struct pollfd p = {.fd = fds[0], .events = POLLIN};
    uint64_t end = cluster_now_ms() + 30000;
    while (poll(&p, 1, 200) == 0 && cluster_now_ms() < end)
        (void)!send(fds[0], "G", 1, MSG_NOSIGNAL);
    ck_assert_msg(cluster_now_ms() < end, "a connection that dribbles was kept");
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        close(fds[i]);
    scrape(coordinator);
    ck_assert_double_eq(value("eep_ranks"), 2);
    for (int i = 0; i < 300; i++) /* none of ours is mixed up with another's */
        scrape(coordinator);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(beyond_the_loopback_is_refused)
{
    static const char *const daemons[] = {"eep-coordinator --state /nowhere", "eep-agent --id gpu0"};
    for (size_t i = 0; i < 2; i++) {
        char line[256];
        snprintf(line, sizeof line, "%s --metrics-listen 192.0.2.1:9420 --check-config", daemons[i]);
        REFUSED(line, 2, "will not listen for metrics on 192.0.2.1:9420");
        snprintf(line, sizeof line, "%s --metrics-listen nonsense --check-config", daemons[i]);
        REFUSED(line, 2, "nonsense");
        snprintf(line, sizeof line, "%s --metrics-listen 192.0.2.1:9420 --insecure --check-config", daemons[i]);
        REFUSED(line, 0, "");
        snprintf(line, sizeof line, "%s --metrics-listen 127.0.0.1:9420 --check-config", daemons[i]);
        REFUSED(line, 0, "");
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("metrics");
    TCase *tc = tcase_create("metrics");
    tcase_set_timeout(tc, 180);
    tcase_add_test(tc, what_is_counted);
    tcase_add_test(tc, nothing_else_is_served);
    tcase_add_test(tc, slow_ones_are_bounded);
    tcase_add_test(tc, beyond_the_loopback_is_refused);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
