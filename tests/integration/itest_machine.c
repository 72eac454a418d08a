/* Trouble of the machine, with the real daemons under load: a disk under the coordinator's journal that is full, fails, or
 * is read-only; a wall clock that steps; no memory on the rank that joins; a plan that takes longer than a lease; a
 * supervisor's watchdog. */
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "tests/harness/supervisor.h"
#include "tests/integration/itest.h"

/* Daemons that are started from now on have this library in them. */
static void preload(const struct cluster *c, const char *library, const char *name, const char *value)
{
    char path[512];
    setenv("ASAN_OPTIONS", "verify_asan_link_order=0", 1);
    snprintf(path, sizeof path, "%s/tests/%s", c->bin, library);
    setenv(name, value, 1);
    setenv("LD_PRELOAD", path, 1);
}

static void preload_end(void)
{
    unsetenv("LD_PRELOAD");
    unsetenv("ASAN_OPTIONS");
}

/* At the n-th write of the journal after its start.  A decision that could not be written is none. */
START_TEST(a_coordinator_whose_disk_is_full_ends_and_recovers)
{
    static const struct { const char *what, *says; } faults[] = {
        {"eio", "Input/output error"}, {"enospc", "No space left on device"}, {"erofs", "Read-only file system"}};
    struct cluster c;
    char fault[64], *text;
    int failed = 0;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    for (int n = 1; n <= 7; n++) {
        int to = itest_ranks(&c) == 2 ? 3 : 2;
        cluster_signal(&c.coordinator, SIGTERM);
        ck_assert_int_eq(cluster_wait(&c.coordinator, 10000), 0);
        snprintf(fault, sizeof fault, "journal.mdb:%s:%d:%s", n % 2 ? "write" : "sync", n, faults[n % 3].what);
        preload(&c, "fault_disk.so", "EEP_FAULT", fault);
        ck_assert_int_eq(cluster_coordinator_start(&c), 0);
        preload_end();
        if (!c.coordinator || cluster_wait_agents(&c, 3, 10000) < 0) {
            (void)cluster_wait(&c.coordinator, 1000);
            ck_assert_int_eq(c.coordinator, 0); /* it ended at its start */
            failed++;
            ck_assert_int_eq(cluster_coordinator_start(&c), 0);
            ck_assert_int_eq(cluster_wait_agents(&c, 3, 20000), 0);
            continue;
        }
        char ranks[8];
        snprintf(ranks, sizeof ranks, "%d", to);
        pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", ranks, NULL});
        int status = -1, code = -1;
        for (int i = 0; i < 1000 && status < 0 && code < 0; i++) {
            status = cluster_wait(&c.coordinator, 5);
            code = cluster_wait(&scale, 5);
        }
        if (status < 0) /* it may be that write of all which says that the operation has ended */
            status = cluster_wait(&c.coordinator, 500);
        if (status >= 0) { /* the disk was full in the middle: it says so, and the next process settles it */
            failed++;
            ck_assert_int_eq(status, 1);
            text = cluster_read(&c, "coordinator.log");
            ck_assert_msg(strstr(text, faults[n % 3].says), "%s", text);
            free(text);
            ck_assert_int_eq(cluster_coordinator_start(&c), 0);
            code = code < 0 ? cluster_wait(&scale, 30000) : code;
        }
        ck_assert_msg(code == 0 || code == 6, "exit %d with write %d", code, n);
        ck_assert_int_eq(cluster_wait_agents(&c, 3, 20000), 0);
        ck_assert_int_eq(itest_ranks(&c), code == 0 ? to : 5 - to);
    }
    ck_assert_int_ge(failed, 3);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    if (!c.coordinator || kill(c.coordinator, 0) != 0)
        ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Where it stays so: the coordinator says it and ends, everybody else serves on. */
START_TEST(a_coordinator_on_a_read_only_disk_does_not_start)
{
    struct cluster c;
    char path[256];
    if (geteuid() != 0 || unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0) {
        puts("a read-only disk was not tested: that needs root");
        return;
    }
    itest_start(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    cluster_sleep_ms(500); /* the feeder knows the view: it issues on without a coordinator */
    cluster_signal(&c.coordinator, SIGKILL);
    snprintf(path, sizeof path, "%s/state", c.dir);
    ck_assert_int_eq(mount(path, path, NULL, MS_BIND, NULL), 0);
    ck_assert_int_eq(mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL), 0);
    (void)cluster_coordinator_start(&c);
    if (c.coordinator)
        ck_assert_int_eq(cluster_wait(&c.coordinator, 5000), 1);
    char *text = cluster_read(&c, "coordinator.log");
    ck_assert_msg(strstr(text, "Read-only file system"), "%s", text);
    free(text);
    cluster_sleep_ms(500);
    ck_assert_int_eq(umount(path), 0);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 2, 20000), 0);
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "history");
    ck_assert_msg(!strstr(ctl_out, "repair"), "%s", ctl_out);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* How many of these come within so long. */
static int pings(int fd, int ms)
{
    char text[512];
    int n = 0;
    for (uint64_t end = cluster_now_ms() + (uint64_t)ms; cluster_now_ms() < end; cluster_sleep_ms(10))
        for (ssize_t got; (got = recv(fd, text, sizeof text - 1, MSG_DONTWAIT)) >= 0;) {
            text[got] = '\0';
            n += strstr(text, "WATCHDOG=1") != NULL;
        }
    return n;
}

/* systemd kills and restarts who does not say in time that its loop turns. */
START_TEST(the_watchdog_is_fed_by_a_loop_that_turns_only)
{
    struct cluster c;
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(un.sun_path, sizeof un.sun_path, "/tmp/eep-notify-%d", (int)getpid());
    unlink(un.sun_path);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&un, sizeof un), 0);
    setenv("NOTIFY_SOCKET", un.sun_path, 1);
    setenv("WATCHDOG_USEC", "400000", 1);
    itest_start(&c, (struct cluster_options){.agents = 1, .loaders = 1, .step_ms = 5});
    unsetenv("NOTIFY_SOCKET");
    unsetenv("WATCHDOG_USEC");
    (void)pings(fd, 200);
    ck_assert_int_ge(pings(fd, 1200), 4); /* of both daemons, each at half the time */
    kill(c.agent[0], SIGSTOP);
    (void)pings(fd, 100);
    ck_assert_int_ge(pings(fd, 1200), 2);
    kill(c.coordinator, SIGSTOP);
    (void)pings(fd, 100);
    ck_assert_int_eq(pings(fd, 1200), 0);
    kill(c.coordinator, SIGCONT);
    kill(c.agent[0], SIGCONT);
    ck_assert_int_ge(pings(fd, 1200), 4);
    close(fd);
    unlink(un.sun_path);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* A day forwards, two back: no lease ends, no time-out passes, nothing is decided by it. */
START_TEST(a_clock_that_steps_is_noticed_by_nobody)
{
    struct cluster c;
    char path[192];
    static const char *const offsets[] = {"86400", "-86400", "0"};
    char bin[256] = "";
    const char *folder = getenv("EEP_BIN");
    snprintf(bin, sizeof bin, "%s", folder ? folder : "build");
    struct cluster before = {0};
    snprintf(before.bin, sizeof before.bin, "%s", bin);
    snprintf(path, sizeof path, "/tmp/eep-clock-%d", (int)getpid());
    preload(&before, "fault_clock.so", "EEP_FAULT_CLOCK", path);
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    for (int i = 0; i < 3; i++) {
        FILE *f = fopen(path, "we");
        ck_assert_ptr_nonnull(f);
        fprintf(f, "%s\n", offsets[i]);
        fclose(f);
        cluster_sleep_ms(400);
        CTL(&c, 0, "scale", "--to", i % 2 ? "2" : "3", "--deadline", "20");
    }
    CTL(&c, 0, "history");
    ck_assert_msg(!strstr(ctl_out, "repair") && !strstr(ctl_out, "aborted"), "%s", ctl_out);
    char *text = cluster_read(&c, "coordinator.log");
    ck_assert_msg(!strstr(text, "lost"), "%s", text);
    free(text);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    preload_end();
    unlink(path);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(a_new_rank_without_memory_aborts_the_operation_only)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    char path[64];
    unsigned long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)c.agent[2]);
    FILE *f = fopen(path, "re");
    ck_assert(f && fscanf(f, "%lu", &pages) == 1);
    fclose(f);
    rlim_t now = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE), none = RLIM_INFINITY;
    if (now < ((rlim_t)1 << 40)) { /* not a sanitizer's */
        ck_assert_int_eq(prlimit(c.agent[2], RLIMIT_AS, &(struct rlimit){now + (256 << 10), none}, NULL), 0);
        CTL(&c, 6, "scale", "--to", "3");
        CTL_SAYS("gpu2");
        ck_assert_int_eq(itest_ranks(&c), 2);
        ck_assert_int_eq(prlimit(c.agent[2], RLIMIT_AS, &(struct rlimit){none, none}, NULL), 0);
    }
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void plans_take(const char *path, const char *ms)
{
    FILE *f = fopen(path, "we");
    ck_assert_ptr_nonnull(f);
    fprintf(f, "%s\n", ms);
    fclose(f);
}

/* Plans take 4 s, a lease 1.5: keys are read and written meanwhile, nobody is lost, the operation goes on after it; and one
 * that is aborted before its plan has come does not hold up the next. */
START_TEST(a_plan_that_takes_long_holds_up_nobody)
{
    struct cluster c;
    char path[192];
    const char *folder = getenv("EEP_BIN");
    struct cluster before = {0};
    snprintf(before.bin, sizeof before.bin, "%s", folder ? folder : "build");
    snprintf(path, sizeof path, "/tmp/eep-plan-%d", (int)getpid());
    preload(&before, "fault_plan.so", "EEP_FAULT_PLAN", path);
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    preload_end();
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    plans_take(path, "4000");
    CTL(&c, 0, "scale", "--to", "3", "--no-wait");
    itest_wait_status(&c, "PLAN", 3000);
    uint64_t began = cluster_now_ms(), slowest = 0;
    unsigned asked = 0;
    while (cluster_now_ms() - began < 3000) {
        uint64_t at = cluster_now_ms();
        CTL(&c, 0, "kv", "put", "while", "planning");
        CTL(&c, 0, "kv", "get", "while");
        CTL_SAYS("planning");
        slowest = cluster_now_ms() - at > slowest ? cluster_now_ms() - at : slowest;
        asked++;
    }
    CTL(&c, 0, "status");
    CTL_SAYS("PLAN");
    printf("%u writes and reads while a plan was made, the slowest pair took %llu ms\n", asked, (unsigned long long)slowest);
    ck_assert_uint_lt(slowest, 1500); /* two processes each; without the thread the first would take 4 s */
    itest_wait_ranks(&c, 3, 10000);

    itest_wait_status(&c, "scale-up to 3 ranks, done", 10000);
    CTL(&c, 0, "scale", "--to", "2", "--no-wait");
    itest_wait_status(&c, "PLAN", 3000);
    CTL(&c, 0, "abort");
    unlink(path);
    CTL(&c, 0, "scale", "--to", "2", "--deadline", "20");
    ck_assert_int_eq(itest_ranks(&c), 2);
    cluster_sleep_ms(4500); /* the late plan comes, and is nobody's */
    CTL(&c, 0, "scale", "--to", "3");
    char *text = cluster_read(&c, "coordinator.log");
    ck_assert_msg(!strstr(text, "lost"), "%s", text);
    free(text);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, a_coordinator_whose_disk_is_full_ends_and_recovers);
    tcase_add_test(t, a_coordinator_on_a_read_only_disk_does_not_start);
    tcase_add_test(t, the_watchdog_is_fed_by_a_loop_that_turns_only);
    tcase_add_test(t, a_clock_that_steps_is_noticed_by_nobody);
    tcase_add_test(t, a_plan_that_takes_long_holds_up_nobody);
    tcase_add_test(t, a_new_rank_without_memory_aborts_the_operation_only);
}

int main(void)
{
    return suite_main("machine", add, 180);
}
