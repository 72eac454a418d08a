/* What systemd's watchdog is told: a coordinator whose disk does not answer stops feeding it, and says why before.  The test
 * is the other end of $NOTIFY_SOCKET.  The agent's worker, stuck or slow: tests/unit/test_worker.c. */
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "tests/harness/daemon.h"
#include "tests/integration/itest.h"
#include "tests/integration/itest_run.h"

static struct daemon_process d;
static int notify_fd;

static void setup(void)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    daemon_process_init(&d);
    snprintf(sun.sun_path, sizeof sun.sun_path, "%s/notify", d.dir);
    notify_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(bind(notify_fd, (struct sockaddr *)&sun, sizeof sun), 0);
    setenv("NOTIFY_SOCKET", sun.sun_path, 1);
    setenv("WATCHDOG_USEC", "300000", 1); /* it is to be fed every 100 ms */
}

static void teardown(void)
{
    daemon_process_done(&d);
    close(notify_fd);
}

/* What comes within so long: how often the watchdog was fed, how often there was a word, the last one. */
static unsigned fed_within(int ms, unsigned *ret_words, char last[512])
{
    unsigned fed = 0;
    *ret_words = 0;
    for (uint64_t end = cluster_now_ms() + (uint64_t)ms, now; (now = cluster_now_ms()) < end;) {
        struct pollfd p = {.fd = notify_fd, .events = POLLIN};
        if (poll(&p, 1, (int)(end - now)) != 1)
            break;
        ssize_t n = recv(notify_fd, last, 511, 0);
        ck_assert_int_gt(n, 0);
        last[n] = '\0';
        fed += strstr(last, "WATCHDOG=1") != NULL;
        (*ret_words)++;
    }
    return fed;
}

static bool logged(const char *says)
{
    static char text[1 << 16];
    char path[80];
    snprintf(path, sizeof path, "%s/log", d.dir);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return strstr(text, says) != NULL;
}

static void start(const char *fault)
{
    static char library[256];
    const char *bin = getenv("EEP_BIN"), *extra[] = {"--stuck-ms", "500"};
    memcpy(d.extra, extra, sizeof extra);
    ck_assert(daemon_process_start(&d)); /* its files are made, without the fault */
    daemon_process_stop(&d, SIGTERM);
    snprintf(library, sizeof library, "%s/tests/fault_disk.so", bin && *bin ? bin : "build");
    d.preload = library;
    setenv("EEP_FAULT", fault, 1);
    ck_assert(daemon_process_start(&d));
}

static const char *ctl(const char *args)
{
    static char command[256];
    snprintf(command, sizeof command, "eepctl -c %s %s", d.address, args);
    return command;
}

START_TEST(a_disk_that_does_not_answer)
{
    static const struct {
        const char *fault, *what, *says;
    } cases[] = {{"state/journal.mdb:sync:1:stall", "pause", "a write of the journal takes "},
                 {"state/store.log:sync:2:stall", "kv put a 1", "a write of the store takes "}};
    unsigned words;
    char last[512];
    start(cases[_i].fault);
    ck_assert_uint_ge(fed_within(1500, &words, last), 5);
    ck_assert(!logged("event=stuck"));
    (void)run(ctl(cases[_i].what)); /* is not answered, or not before it is on disk */
    (void)fed_within(1500, &words, last);
    ck_assert(logged("level=error daemon=eep-coordinator id=eep event=stuck"));
    ck_assert_msg(logged(cases[_i].says), "%s", last);
    ck_assert_uint_eq(fed_within(1000, &words, last), 0);
    ck_assert_uint_ge(words, 3); /* the loop turns, and says how things stand */
    ck_assert_ptr_nonnull(strstr(last, cases[_i].says));
    ck_assert_int_eq(run(ctl("status")), 0);
    (void)run(ctl("history")); /* does not stop the loop either */
    ck_assert_uint_eq(fed_within(300, &words, last), 0);
    ck_assert_uint_ge(words, 1);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, a_disk_that_does_not_answer, 0, 2);
}

int main(void)
{
    return suite_main("watchdog", add, 60);
}
