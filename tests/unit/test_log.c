/* Log lines: one event a line whatever the values hold, quoted so that they can be taken apart again. */
#include <check.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/log.h"

static int pipe_fds[2];
static char got[1 << 16];

static void setup(void)
{
    unsetenv("JOURNAL_STREAM");
    ck_assert_int_eq(pipe2(pipe_fds, O_NONBLOCK), 0);
}

static void teardown(void)
{
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

/* What was logged since the last call, without the time stamp of the first line. */
static const char *logged(void)
{
    ssize_t n = read(pipe_fds[0], got, sizeof got - 1);
    got[n > 0 ? n : 0] = '\0';
    char *level = strstr(got, " level=");
    return level ? level + 1 : got;
}

START_TEST(plain_line)
{
    struct log *log = log_new("eep-agent", "gpu3", LOG_LEVEL_INFO, pipe_fds[1]);
    log_event(log, LOG_LEVEL_WARN, "joined", "agent=%s rank=%u", "gpu3", 4u);
    ck_assert_str_eq(logged(), "level=warn daemon=eep-agent id=gpu3 event=joined agent=gpu3 rank=4\n");
    /* time=2026-01-31T12:00:00.123Z */
    ck_assert_int_eq(strncmp(got, "time=20", 7), 0);
    ck_assert_uint_eq(strcspn(got, " "), strlen("time=2026-01-31T12:00:00.123Z"));
    log_event(log, LOG_LEVEL_DEBUG, "quiet", NULL);
    ck_assert_str_eq(logged(), "");
    ck_assert(!log_wants(log, LOG_LEVEL_DEBUG));
    log_event(log, LOG_LEVEL_ERROR, "bare", NULL);
    ck_assert_str_eq(logged(), "level=error daemon=eep-agent id=gpu3 event=bare\n");
    log_free(log);
    log_event(NULL, LOG_LEVEL_ERROR, "nowhere", NULL);
}
END_TEST

START_TEST(quoting)
{
    static const struct {
        const char *value, *want;
    } cases[] = {
        {"a b", "\"a b\""},
        {"", "\"\""},
        {"say \"hi\"", "\"say \\\"hi\\\"\""},
        {"back\\slash", "\"back\\\\slash\""},
        {"x=1", "\"x=1\""},
        {"two\nlines\r", "\"two\\nlines\\x0d\""},
        {"unix:/run/eep.sock", "unix:/run/eep.sock"},
        {"\x1b[31mred", "\"\\x1b[31mred\""},
        {"%s%n", "%s%n"},
        {"gr\xc3\xb6\xc3\x9f" "er", "gr\xc3\xb6\xc3\x9f" "er"},
    };
    struct log *log = log_new("d", "", LOG_LEVEL_DEBUG, pipe_fds[1]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char want[128];
        log_event(log, LOG_LEVEL_DEBUG, "e", "why=%s n=%d", cases[i].value, 1);
        snprintf(want, sizeof want, "level=debug daemon=d event=e why=%s n=1\n", cases[i].want);
        ck_assert_str_eq(logged(), want);
    }
    log_free(log);
}
END_TEST

/* A value that holds the separator itself cannot forge a pair. */
START_TEST(no_forged_pairs)
{
    struct log *log = log_new("d", "", LOG_LEVEL_DEBUG, pipe_fds[1]);
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s n=%d", "x\x1flevel=error", 1);
    ck_assert_str_eq(logged(), "level=info daemon=d event=e pairs=\"why=x\\x1flevel=error\\x1fn=1\"\n");
    log_free(log);
}
END_TEST

START_TEST(long_values_are_cut)
{
    char *value = malloc(20001);
    memset(value, 'x', 20000);
    value[20000] = '\0';
    struct log *log = log_new("d", "", LOG_LEVEL_DEBUG, pipe_fds[1]);
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s n=%d", value, 1);
    const char *line = logged();
    ck_assert_uint_lt(strlen(line), 4096);
    ck_assert_ptr_nonnull(strstr(line, " truncated=true\n"));
    ck_assert_ptr_eq(strchr(line, '\n'), line + strlen(line) - 1);
    /* The same with quotes to close. */
    value[0] = ' ';
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s", value);
    ck_assert_ptr_nonnull(strstr(logged(), "x\" truncated=true\n"));
    log_free(log);
    free(value);
}
END_TEST

START_TEST(journal_prefix)
{
    struct stat st;
    char stream[64];
    ck_assert_int_eq(fstat(pipe_fds[1], &st), 0);
    snprintf(stream, sizeof stream, "%llu:%llu", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
    setenv("JOURNAL_STREAM", stream, 1);
    struct log *log = log_new("d", "", LOG_LEVEL_DEBUG, pipe_fds[1]);
    log_event(log, LOG_LEVEL_ERROR, "e", NULL);
    logged();
    ck_assert_int_eq(strncmp(got, "<3>time=", 8), 0);
    log_free(log);
    /* Another stream than ours: no prefix. */
    setenv("JOURNAL_STREAM", "1:1", 1);
    log = log_new("d", "", LOG_LEVEL_DEBUG, pipe_fds[1]);
    log_event(log, LOG_LEVEL_ERROR, "e", NULL);
    logged();
    ck_assert_int_eq(strncmp(got, "time=", 5), 0);
    log_free(log);
}
END_TEST

#define LINES 200
static void *log_many(void *arg)
{
    for (int i = 0; i < LINES; i++)
        log_event(arg, LOG_LEVEL_INFO, "many", "i=%d why=%s", i, "a few words that belong together");
    return NULL;
}

START_TEST(lines_stay_whole)
{
    FILE *file = tmpfile();
    struct log *log = log_new("d", "", LOG_LEVEL_DEBUG, fileno(file));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, log_many, log), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    rewind(file);
    int lines = 0;
    for (char line[512]; fgets(line, sizeof line, file); lines++) {
        ck_assert_int_eq(strncmp(line, "time=", 5), 0);
        ck_assert_ptr_nonnull(strstr(line, "why=\"a few words that belong together\"\n"));
    }
    ck_assert_int_eq(lines, 4 * LINES);
    log_free(log);
    fclose(file);
}
END_TEST

START_TEST(levels)
{
    enum log_level level = LOG_LEVEL_DEBUG;
    ck_assert_int_eq(log_level_parse("error", &level), 0);
    ck_assert_int_eq(level, LOG_LEVEL_ERROR);
    ck_assert_int_eq(log_level_parse("Error", &level), ERR_INVALID);
    ck_assert_int_eq(log_level_parse("", &level), ERR_INVALID);
    ck_assert_int_eq(level, LOG_LEVEL_ERROR);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("log");
    TCase *tc = tcase_create("log");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, plain_line);
    tcase_add_test(tc, quoting);
    tcase_add_test(tc, no_forged_pairs);
    tcase_add_test(tc, long_values_are_cut);
    tcase_add_test(tc, journal_prefix);
    tcase_add_test(tc, lines_stay_whole);
    tcase_add_test(tc, levels);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
