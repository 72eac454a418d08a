/* Mistakes of operators and strangers: each gets one sentence and its exit code, and a serving cluster goes on.
 *
 * Wrong options, addresses in use, one state folder or one agent id twice, checkpoints that are none, and bytes that
 * are no protocol at every socket that listens. */
#include "tests/integration/itest.h"
#include "tests/integration/itest_run.h"

#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

START_TEST(wrong_options_of_the_demo)
{
    REFUSED("tests/eep-demo --step-ms foo", 2, "whole number");
    REFUSED("tests/eep-demo --concurrency 0", 2, "from 1 to");
    REFUSED("tests/eep-demo --layout other", 2, "loader or fused");
    REFUSED("tests/eep-demo --dispatch other", 2, "source or replicated");
    REFUSED("tests/eep-demo --model /nonexistent", 2, "cannot read /nonexistent");
    REFUSED("tests/eep-demo surplus", 2, "unexpected argument");
}
END_TEST

/* Only commands that end at once: nothing here may start to serve. */
START_TEST(wrong_options_of_the_daemons)
{
    REFUSED("eep-coordinator --slots x", 2, "whole number");
    REFUSED("eep-coordinator --listen nonsense", 2, "host:port");
    REFUSED("eep-coordinator --listen 192.0.2.1:1", 2, "--insecure");
    REFUSED("eep-coordinator --tcpstore-listen 192.0.2.1:0", 2,
            "will not listen for TCPStore on 192.0.2.1:0: its protocol has no authentication");
    REFUSED("eep-coordinator --tcpstore-listen 0.0.0.0:0/job --insecure", 2, "or --tcpstore-insecure in a network");
    REFUSED("eep-coordinator --state ''", 2, "needs the name of a folder");
    REFUSED("eep-coordinator --state /nonexistent/x/y --listen 127.0.0.1:0", 1, "--state names another");
    REFUSED("eep-coordinator --cluster 'a b'", 2, "must be 1 to");
    REFUSED("eep-coordinator --on-prepare-timeout wait", 2,
            "--on-prepare-timeout is 'wait': it must be abort or continue");
    REFUSED("eep-coordinator --on-drain-timeout ''", 2, "--on-drain-timeout is '': it must be abort or continue");
    REFUSED("eepctl scale --to 2 --on-engine-timeout wait", 2, "it must be abort or continue");
    REFUSED("eepctl rebalance --on-engine-timeout abort", 2, "unrecognized option");
    REFUSED("eep-agent", 2, "--id NAME is required");
    REFUSED("eep-agent --id 'a b'", 2, "must be 1 to");
    REFUSED("eep-agent --id a --listen 192.0.2.1:0", 2, "--insecure");
    REFUSED("eep-agent --id a --listen 192.0.2.1:0 --insecure", 2, "cannot be reached from other hosts");
    REFUSED("eep-agent --id a --data-listen unix:/tmp/x", 2, "HOST:PORT");
    REFUSED("eep-agent --id a --shared-gpu", 2, "give --memory cuda as well");
    REFUSED("eep-agent --id a --advertise ''", 2, "must not be empty");
    REFUSED("eep-agent --id a --coordinator nonsense", 2, "host:port");
    REFUSED("eep-agent --id a --engine-socket /nonexistent/a.sock", 1, "choose another path");
    REFUSED("eep-agent --id a --checkpoint /nonexistent", 1, "No such file");
    REFUSED("eep-agent --id a --checkpoint /etc", 1, "has neither");
    REFUSED("eepctl plan", 2, "--input FILE is required");
    REFUSED("eepctl plan --policy best --input x", 2, "it is eplb or elastic");
    REFUSED("eepctl plan --input /nonexistent/x.json", 2, "/nonexistent/x.json");
    REFUSED("eepctl plan --input Makefile", 2, "line 1");
    REFUSED("eepctl -c nonsense status", 2, "host:port");
    REFUSED("eepctl -c 127.0.0.1:1 status", 3, "cannot be reached");
    REFUSED("eepctl -c unix:/nonexistent status", 3, "cannot be reached");
}
END_TEST

START_TEST(what_is_in_use_stays_with_its_owner)
{
    struct cluster c;
    char line[1024], path[256];
    itest_start(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 2});
    CTL(&c, 1, "drain", "nobody");
    CTL_SAYS("no view is committed yet");
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");

    snprintf(line, sizeof(line), "eep-coordinator --state %s/other --listen %s", c.dir, c.address);
    REFUSED(line, 1, "is in use by a running process");
    snprintf(line, sizeof(line), "eep-coordinator --state %s/state --listen 127.0.0.1:0", c.dir);
    REFUSED(line, 1, "in use by another coordinator");
    snprintf(line, sizeof(line), "eep-coordinator --state %s/other --cluster other --listen 127.0.0.1:0", c.dir);
    REFUSED(line, 1, "belongs to cluster");
    snprintf(line, sizeof(line), "eep-agent --id gpu7 --coordinator %s --engine-socket %s/engine-0.sock", c.address,
             c.dir);
    REFUSED(line, 1, "is in use by a running process");
    /* these two go on trying, and say why in vain */
    snprintf(line, sizeof(line), "eep-agent --id gpu0 --coordinator %s --engine-socket %s/second.sock", c.address,
             c.dir);
    REFUSED(line, -1, "every agent needs an --id of its own");
    snprintf(line, sizeof(line), "eep-agent --id gpu7 --cluster other --coordinator %s --engine-socket %s/second.sock",
             c.address, c.dir);
    REFUSED(line, -1, "this is cluster");

    /* a checkpoint that is damaged is no mistake of usage: 1, so that a supervisor tries again */
    snprintf(path, sizeof(path), "%s/damaged", c.dir);
    ck_assert_int_eq(mkdir(path, 0700), 0);
    snprintf(path, sizeof(path), "%s/damaged/model.safetensors", c.dir);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs("no safetensors file at all", f);
    fclose(f);
    snprintf(line, sizeof(line),
             "eep-agent --id gpu7 --coordinator %s --engine-socket %s/second.sock --checkpoint %s/damaged", c.address,
             c.dir, c.dir);
    REFUSED(line, 1, "model.safetensors");

    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Connects to unix:/path or a loopback address and sends; the caller closes.  It is not waited for an answer. */
static int stranger(const char *address, const void *bytes, size_t len)
{
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    bool local = strncmp(address, "unix:", 5) == 0;
    if (local)
        snprintf(un.sun_path, sizeof(un.sun_path), "%.100s", address + 5);
    else
        in.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1));
    int fd = socket(local ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    int rc = local ? connect(fd, (struct sockaddr *)&un, sizeof(un)) : connect(fd, (struct sockaddr *)&in, sizeof(in));
    ck_assert_msg(rc == 0, "cannot connect to %s: %s", address, strerror(errno));
    ssize_t sent = send(fd, bytes, len, MSG_NOSIGNAL | MSG_DONTWAIT);
    (void)sent; /* it may have been closed on us already */
    return fd;
}

/* The addresses that agent i tells others, of its log: address= and data= of its first line. */
static void agent_address(const struct cluster *c, int i, const char *key, char *ret, size_t size)
{
    char name[32];
    snprintf(name, sizeof(name), "agent-%d.log", i);
    char *text = cluster_read(c, name);
    const char *at = text ? strstr(text, key) : NULL;
    ck_assert_msg(at != NULL, "no %s in %s", key, name);
    at += strlen(key);
    snprintf(ret, size, "%.*s", (int)strcspn(at, " \n"), at);
    free(text);
}

START_TEST(strangers_bytes_harm_nobody)
{
    static const char http[] = "GET / HTTP/1.1\r\nHost: example\r\n\r\n", zeros[100] = "", one[1] = "\x01";
    char noise[4096], addresses[8][192];
    struct cluster c;
    int fds[8 * 5], n = 0;
    memset(noise, 0xff, sizeof(noise));
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    snprintf(addresses[0], sizeof(addresses[0]), "%s", c.address);
    for (int i = 0; i < 2; i++) {
        agent_address(&c, i, " address=", addresses[1 + i], sizeof(addresses[0]));
        agent_address(&c, i, " data=", addresses[3 + i], sizeof(addresses[0]));
        snprintf(addresses[5 + i], sizeof(addresses[0]), "unix:%s/engine-%d.sock", c.dir, i);
    }
    agent_address(&c, 2, " data=", addresses[7], sizeof(addresses[0])); /* whose mesh is yet to come */
    for (int i = 0; i < 8; i++) {
        fds[n++] = stranger(addresses[i], http, sizeof(http) - 1);
        fds[n++] = stranger(addresses[i], zeros, sizeof(zeros));
        fds[n++] = stranger(addresses[i], noise, sizeof(noise));
        fds[n++] = stranger(addresses[i], one, sizeof(one));
        fds[n++] = stranger(addresses[i], "", 0);
    }
    CTL(&c, 0, "scale", "--to", "3"); /* while they are all connected */
    CTL(&c, 0, "scale", "--to", "2");
    for (int i = 0; i < n; i++)
        close(fds[i]);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, wrong_options_of_the_demo);
    tcase_add_test(t, wrong_options_of_the_daemons);
    tcase_add_test(t, what_is_in_use_stays_with_its_owner);
    tcase_add_test(t, strangers_bytes_harm_nobody);
}

int main(void)
{
    return suite_main("wrong use", add, 120);
}
