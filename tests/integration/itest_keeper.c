/* eep-keeper by itself, over shell scripts: what it restarts, when it gives up, what it passes on, what it holds. */
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "tests/integration/itest.h"

static char dir[64], out[128];

static void setup(void)
{
    strcpy(dir, "/tmp/eep-keeper-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(out, sizeof(out), "%s/out", dir);
}

static void teardown(void)
{
    unlink(out);
    rmdir(dir);
}

/* The keeper with this script as its child; stdout of both goes to `out`. */
static pid_t keeper(const char *script, const char *deaths)
{
    const char *bin = getenv("EEP_BIN");
    char path[256];
    snprintf(path, sizeof(path), "%s/eep-keeper", bin ? bin : "build");
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen(out, "w", stdout) || !freopen("/dev/null", "w", stderr))
            _exit(126);
        execl(path, path, "--max-deaths", deaths, "--", "sh", "-c", script, (char *)NULL);
        _exit(126);
    }
    return pid;
}

static int ends(pid_t pid)
{
    int code = cluster_wait(&pid, 10000);
    if (pid > 0)
        kill(pid, SIGKILL);
    return code;
}

static const char *said(void)
{
    static char text[4096];
    FILE *f = fopen(out, "re");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof(text) - 1, f)] = '\0';
    fclose(f);
    return text;
}

START_TEST(an_end_is_an_end)
{
    ck_assert_int_eq(ends(keeper("echo run; exit 0", "10")), 0);
    ck_assert_str_eq(said(), "run\n");
    ck_assert_int_eq(ends(keeper("echo run; exit 2", "10")), 2); /* a mistake in its options: again is no better */
    ck_assert_str_eq(said(), "run\n");
}
END_TEST

START_TEST(a_death_is_not)
{
    ck_assert_int_eq(ends(keeper("echo run; kill -9 $$", "3")), 128 + SIGKILL);
    ck_assert_str_eq(said(), "run\nrun\nrun\n");
    ck_assert_int_eq(ends(keeper("echo run; exit 75", "2")), 75);
    ck_assert_str_eq(said(), "run\nrun\n");
}
END_TEST

START_TEST(signals_are_passed_on)
{
    pid_t pid = keeper("trap 'echo asked; exit 0' TERM; echo ready; while :; do sleep 0.01; done", "10");
    while (access(out, F_OK) != 0 || !strstr(said(), "ready"))
        cluster_sleep_ms(5);
    kill(pid, SIGTERM);
    ck_assert_int_eq(ends(pid), 0);
    ck_assert_str_eq(said(), "ready\nasked\n");
}
END_TEST

START_TEST(the_child_is_told_what_there_is)
{
    ck_assert_int_eq(ends(keeper("[ \"$LISTEN_PID\" = $$ ] && [ \"$LISTEN_FDS\" = 0 ] && [ \"$FDSTORE\" -gt 0 ] && "
                                 "echo \"$NOTIFY_SOCKET\"", "10")), 0);
    ck_assert_int_eq(strncmp(said(), "@eep-keeper-", 12), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, an_end_is_an_end);
    tcase_add_test(t, a_death_is_not);
    tcase_add_test(t, signals_are_passed_on);
    tcase_add_test(t, the_child_is_told_what_there_is);
}

int main(void)
{
    return suite_main("keeper", add, 60);
}
