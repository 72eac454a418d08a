/* Mutual TLS with the real programs: who may connect as what, who may not and what is said then, certificates that are
 * exchanged without a restart, and strangers who send garbage to the port. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/control_methods.h"
#include "common/rpc.h"
#include "common/tls.h"
#include "control.pb-c.h"
#include "tests/harness/daemon.h"
#include "tests/harness/suite.h"
#include "tests/integration/itest_run.h"

static char dir[64]; /* dir/ca: our certificates; dir/other: those of another CA */
static struct daemon_process d;
static const char *more_args[2]; /* of coordinators that are started from now on */

static void ca(const char *folder, const char *args)
{
    char command[512];
    snprintf(command, sizeof command, "systemd/eep-ca issue %s/%s %s", dir, folder, args);
    ck_assert_msg(system(command) == 0, "%s", command);
}

static void setup(void)
{
    char command[256];
    strcpy(dir, "/tmp/eep-tls-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(command, sizeof command, "systemd/eep-ca init %s/ca && systemd/eep-ca init %s/other", dir, dir);
    ck_assert_int_eq(system(command), 0);
    static const char *const roles[] = {"eep coordinator", "eep operator", "eep reader", "eep agent/gpu0"};
    for (size_t i = 0; i < sizeof roles / sizeof roles[0]; i++)
        ca("ca", roles[i]);
    ca("other", "eep operator");
    ca("other", "eep coordinator");
}

static void teardown(void)
{
    char command[256];
    daemon_process_stop(&d, SIGKILL);
    snprintf(command, sizeof command, "rm -rf %s %s", dir, d.dir);
    ck_assert_int_eq(system(command), 0);
}

/* A coordinator on a port of the loopback, with the certificate of this folder. */
static void start(const char *folder, const char *name)
{
    static char cert[256], key[256], authority[256];
    daemon_process_init(&d);
    snprintf(cert, sizeof cert, "%s/%s/%s.crt", dir, folder, name);
    snprintf(key, sizeof key, "%s/%s/%s.key", dir, folder, name);
    snprintf(authority, sizeof authority, "%s/%s/ca.crt", dir, folder);
    const char *extra[] = {"--tls-cert", cert, "--tls-key", key, "--tls-ca", authority, "--log-level", "info"};
    d.own_level = true;
    memcpy(d.extra, extra, sizeof extra);
    memcpy(d.extra + sizeof extra / sizeof extra[0], more_args, sizeof more_args);
    ck_assert(daemon_process_start(&d));
}

/* eepctl with the certificate folder/name, and the CA of our folder. */
static const char *ctl(const char *folder, const char *name, const char *args)
{
    static char command[1024];
    snprintf(command, sizeof command,
             "eepctl -c %s --tls-cert %s/%s/%s.crt --tls-key %s/%s/%s.key --tls-ca %s/ca/ca.crt %s", d.address, dir,
             folder, name, dir, folder, name, dir, args);
    return command;
}

static bool logged(const char *says)
{
    static char text[1 << 20];
    char path[80];
    snprintf(path, sizeof path, "%s/log", d.dir);
    for (int i = 0; i < 1000; i++) {
        FILE *f = fopen(path, "r");
        ck_assert_ptr_nonnull(f);
        text[fread(text, 1, sizeof text - 1, f)] = '\0';
        fclose(f);
        if (strstr(text, says))
            return true;
        usleep(10000);
    }
    fprintf(stderr, "%s\n", text);
    return false;
}

START_TEST(roles)
{
    start("ca", "coordinator");
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    REFUSED(ctl("ca", "operator", "kv put a 1"), 0, "");
    REFUSED(ctl("ca", "reader", "kv get a"), 0, "1");
    REFUSED(ctl("ca", "reader", "kv put a 2"), 4, "a reader may not call");
    REFUSED(ctl("ca", "agent-gpu0", "status"), 4, "does not say that it is eep://eep/reader");
    ca("ca", "west operator"); /* of another cluster, under the same CA */
    REFUSED(ctl("ca", "operator", "status"), 4, "does not say that it is eep://eep/operator");
    ck_assert(logged("event=connection-refused"));
}
END_TEST

START_TEST(certificates)
{
    char command[1024];
    start("ca", "coordinator");
    REFUSED(ctl("other", "operator", "status"), 4, "does not take our certificate");
    ca("ca", "eep operator -1");
    REFUSED(ctl("ca", "operator", "status"), 4, "does not take our certificate");
    snprintf(command, sizeof command, "eepctl -c %s status", d.address); /* plain, to a port that speaks TLS */
    ck_assert_int_ne(run(command), 0);
    snprintf(command, sizeof command, "eepctl -c %s --tls-cert x status", d.address);
    REFUSED(command, 2, "all three, or none");
    REFUSED(ctl("ca", "nobody", "status"), 2, "nobody.crt");
    ca("ca", "eep operator");
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
}
END_TEST

START_TEST(a_false_coordinator)
{
    start("other", "coordinator");
    REFUSED(ctl("ca", "operator", "status"), 4, "its certificate is not good");
    daemon_process_stop(&d, SIGTERM);
    start("ca", "agent-gpu0"); /* signed by our CA, but no coordinator */
    REFUSED(ctl("ca", "operator", "status"), 4, "does not say that it is eep://eep/coordinator");
}
END_TEST

START_TEST(no_downgrade)
{
    char command[1024];
    start("ca", "coordinator");
    snprintf(
        command, sizeof command,
        "openssl s_client -connect %s -cert %s/ca/operator.crt -key %s/ca/operator.key -CAfile %s/ca/ca.crt -brief "
        "-no_tls1_3 </dev/null 2>&1 | grep -q 'alert protocol version'",
        d.address, dir, dir, dir);
    ck_assert_int_eq(system(command), 0);
    snprintf(
        command, sizeof command,
        "openssl s_client -connect %s -cert %s/ca/operator.crt -key %s/ca/operator.key -CAfile %s/ca/ca.crt -brief "
        "</dev/null 2>&1 | grep -q 'Protocol version: TLSv1.3'",
        d.address, dir, dir, dir);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

START_TEST(an_agent_speaks_for_itself_only)
{
    char command[1024];
    static const char agent[] =
        "eep-agent --id %s --coordinator %s --engine-socket %s/%s.sock --tls-cert %s/ca/agent-gpu0.crt "
        "--tls-key %s/ca/agent-gpu0.key --tls-ca %s/ca/ca.crt";
    start("ca", "coordinator");
    snprintf(command, sizeof command, agent, "gpu1", d.address, dir, "gpu1", dir, dir, dir);
    REFUSED(command, -1, "does not say that it is eep://eep/agent/gpu1");
    snprintf(command, sizeof command, agent, "gpu0", d.address, dir, "gpu0", dir, dir, dir);
    REFUSED(command, -1, "coordinator-connected"); /* serves until it is ended */
}
END_TEST

/* The file is exchanged, the process is told, and new connections see it. */
START_TEST(rotation)
{
    ca("ca", "eep coordinator 20");
    start("ca", "coordinator");
    ck_assert(logged("event=certificate-expires hours_left=4"));
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    ca("ca", "eep coordinator 2");
    kill(d.pid, SIGHUP);
    ck_assert(logged("level=error daemon=eep-coordinator id=eep event=certificate-expires hours_left=4"));
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    ca("ca", "eep coordinator -1");
    kill(d.pid, SIGHUP);
    ck_assert(logged("event=certificate-expired"));
    REFUSED(ctl("ca", "operator", "status"), 4, "certificate has expired");
}
END_TEST

/* Without an option the unit's credentials count; half of them is a mistake, the unit's "none" is not. */
START_TEST(credentials_of_the_unit)
{
    static const char check[] = "eep-coordinator --state /nonexistent --listen 127.0.0.1:0 --check-config";
    char folder[80], command[1024];
    snprintf(folder, sizeof folder, "%s/credentials", dir);
    snprintf(command, sizeof command,
             "mkdir %s && cp %s/ca/coordinator.crt %s/tls-cert && cp %s/ca/coordinator.key %s/tls-key && "
             "cp %s/ca/ca.crt %s/tls-ca",
             folder, dir, folder, dir, folder, dir, folder);
    ck_assert_int_eq(system(command), 0);
    setenv("CREDENTIALS_DIRECTORY", folder, 1);
    daemon_process_init(&d);
    d.extra[0] = "--log-level";
    d.extra[1] = "info";
    d.own_level = true;
    ck_assert(daemon_process_start(&d));
    unsetenv("CREDENTIALS_DIRECTORY");
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    kill(d.pid, SIGHUP);
    ck_assert(logged("a new one waits for a restart"));
    setenv("CREDENTIALS_DIRECTORY", folder, 1);
    REFUSED(check, 0, "");
    snprintf(command, sizeof command, "printf none >%s/tls-key", folder);
    ck_assert_int_eq(system(command), 0);
    REFUSED(check, 2, "a credential tls-cert, but no tls-key: put all of its three files");
    REFUSED("eep-agent --id a --check-config", 2, "but no tls-key");
    snprintf(command, sizeof command, "printf none >%s/tls-cert", folder);
    ck_assert_int_eq(system(command), 0);
    REFUSED(check, 0, "");
    unsetenv("CREDENTIALS_DIRECTORY");
}
END_TEST

static long memory_kb(pid_t pid)
{
    char path[64], line[256];
    long kb = 0;
    snprintf(path, sizeof path, "/proc/%ld/status", (long)pid);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof line, f))
        (void)sscanf(line, "VmRSS: %ld kB", &kb);
    fclose(f);
    return kb;
}

/* Operators who ask much and read nothing: together they get no more memory than connections-mib, and others are served. */
START_TEST(deaf_operators)
{
    enum { READERS = 40, GETS = 8, VALUE = 1000000 };
    static char paths[3][128];
    const struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    struct rpc_client *clients[READERS];
    ProtobufCMessage *reply;
    struct tls *tls;
    struct err err;
    more_args[0] = "--connections-mib";
    more_args[1] = "16";
    start("ca", "coordinator");
    more_args[0] = NULL;
    snprintf(paths[0], sizeof paths[0], "%s/ca/operator.crt", dir);
    snprintf(paths[1], sizeof paths[1], "%s/ca/operator.key", dir);
    snprintf(paths[2], sizeof paths[2], "%s/ca/ca.crt", dir);
    const struct tls_files files = {.cert = paths[0], .key = paths[1], .ca = paths[2]};
    ck_assert_msg(tls_open(&files, &tls, &err) == 0, "%s", err.text);
    for (int i = 0; i < READERS; i++)
        ck_assert_msg(rpc_client_connect_tls(d.address, &self, &pb__control__descriptor, tls, "coordinator", 5000, &clients[i], &err) == 0,
                      "%s", err.text);
    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    set.key = (char *)"big";
    set.value.data = calloc(1, VALUE);
    set.value.len = VALUE;
    ck_assert_int_eq(rpc_client_call(clients[0], CONTROL_KV_SET, &set.base, 10000, &reply, &err), 0);
    rpc_unpack_free(reply);
    free(set.value.data);
    long before_kb = memory_kb(d.pid);
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    get.key = (char *)"big";
    for (int i = 0; i < READERS; i++) {
        uint64_t call;
        for (int k = 0; k < GETS; k++)
            (void)!rpc_client_start(clients[i], CONTROL_KV_GET, &get.base, &call, &err); /* it may be cut off already */
    }
    ck_assert(logged("event=cut-off"));
    ck_assert(logged("the most of all connections"));
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    long grown_kb = memory_kb(d.pid) - before_kb;
    ck_assert_msg(getenv("ASAN_OPTIONS") != NULL || grown_kb < 40000, "grown by %ld KiB", grown_kb);
    for (int i = 0; i < READERS; i++)
        rpc_client_free(clients[i]);
    tls_free(tls);
}
END_TEST

static int stranger(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    ck_assert_int_eq(inet_pton(AF_INET, "127.0.0.1", &to.sin_addr), 1);
    to.sin_port = htons((uint16_t)atoi(strrchr(d.address, ':') + 1));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct linger reset = {.l_onoff = 1}; /* or the test runs out of ports */
    ck_assert_int_eq(setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset), 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    return fd;
}

START_TEST(ten_thousand_strangers)
{
    unsigned char garbage[2048];
    unsigned seed = 1;
    int idle[200];
    start("ca", "coordinator");
    long before_kb = 0;
    for (int i = 0; i < 10000; i++) {
        size_t n = (seed = seed * 1103515245u + 12345u) >> 16 & 2047;
        for (size_t k = 0; k < n; k++)
            garbage[k] = (unsigned char)((seed = seed * 1103515245u + 12345u) >> 16);
        if (i % 3 == 0 && n > 5)
            memcpy(garbage, "\x16\x03\x01\x40", 4); /* TLS, it seems */
        int fd = stranger();
        ssize_t sent = send(fd, garbage, n, MSG_NOSIGNAL);
        (void)sent; /* it may be cut off already */
        close(fd);
        if (i == 1000)
            before_kb = memory_kb(d.pid);
        if (i % 2500 == 2499)
            REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    }
    long grown_kb = memory_kb(d.pid) - before_kb;
    /* 64 connections of one address may be there at once, with some 80 KiB each; 2 KiB lost by each would be 18 MiB */
    ck_assert_msg(getenv("ASAN_OPTIONS") != NULL || grown_kb < 12288, "grown by %ld KiB", grown_kb);

    /* who connects and is silent fills only the places of its own address, and for five seconds */
    for (int i = 0; i < 200; i++)
        idle[i] = stranger();
    char byte;
    int cut = 0;
    usleep(200000);
    for (int i = 0; i < 200; i++)
        cut += recv(idle[i], &byte, 1, MSG_DONTWAIT) == 0 || errno == ECONNRESET;
    ck_assert_int_ge(cut, 200 - 64);
    usleep(5500000);
    REFUSED(ctl("ca", "operator", "status"), 0, "no view yet");
    for (int i = 0; i < 200; i++)
        close(idle[i]);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tls");
    TCase *t = tcase_create("tls");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, roles);
    tcase_add_test(t, certificates);
    tcase_add_test(t, a_false_coordinator);
    tcase_add_test(t, no_downgrade);
    tcase_add_test(t, an_agent_speaks_for_itself_only);
    tcase_add_test(t, rotation);
    tcase_add_test(t, credentials_of_the_unit);
    tcase_add_test(t, deaf_operators);
    tcase_add_test(t, ten_thousand_strangers);
    suite_add_tcase(s, t);
    return suite_run(s);
}
