/* Log lines: one event a line whatever the values hold, quoted so that they can be taken apart again. */
#include <check.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/log.h"
#include "tests/harness/suite.h"

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
        {"gr\xc3\xb6\xc3\x9f"
         "er",
         "gr\xc3\xb6\xc3\x9f"
         "er"},
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
        log_event(arg, LOG_LEVEL_DEBUG, "many", "i=%d why=%s", i, "a few words that belong together");
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

START_TEST(json)
{
    struct log *log = log_new("d", "gpu0", LOG_LEVEL_DEBUG, pipe_fds[1]);
    char big[8000], want[160];
    log_format_set(log, LOG_FORMAT_JSON, "");
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s n=%d zero=%s hex=%s", "a \"b\"\n\x01\\ gr\xc3\xb6\xc3\x9f", 12, "007",
              "12ab");
    (void)logged();
    snprintf(want, sizeof want, "\"%s", strstr(got, "level\""));
    ck_assert_str_eq(
        want, "\"level\":\"info\",\"daemon\":\"d\",\"id\":\"gpu0\",\"event\":\"e\",\"why\":\"a \\\"b\\\"\\n\\u0001\\\\ "
              "gr\xc3\xb6\xc3\x9f\",\"n\":12,\"zero\":\"007\",\"hex\":\"12ab\"}\n");
    memset(big, 'x', sizeof big - 1);
    big[0] = '\xff'; /* no UTF-8 */
    big[sizeof big - 1] = '\0';
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s", big);
    (void)logged();
    json_t *root = json_loads(got, 0, NULL); /* what is cut is still JSON */
    ck_assert_msg(json_is_true(json_object_get(root, "truncated")), "%s", got);
    json_decref(root);
    log_event(log, LOG_LEVEL_INFO, "e", "why=%s", "\xff is no UTF-8");
    (void)logged();
    root = json_loads(got, 0, NULL);
    ck_assert_str_eq(json_string_value(json_object_get(root, "why")), "? is no UTF-8");
    json_decref(root);
    log_free(log);
}
END_TEST

/* A stand-in for journald: fields, a value with a newline, the level; and lines on stderr when it has gone. */
START_TEST(native_journal)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char folder[] = "/tmp/eep-log-XXXXXX", stream[64], entry[4096], id[33], want[64];
    struct stat st;
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(name.sun_path, sizeof name.sun_path, "%s/socket", folder);
    int journal = socket(AF_UNIX, SOCK_DGRAM, 0);
    ck_assert_int_eq(bind(journal, (struct sockaddr *)&name, sizeof name), 0);
    ck_assert_int_eq(fstat(pipe_fds[1], &st), 0);
    snprintf(stream, sizeof stream, "%llu:%llu", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
    setenv("JOURNAL_STREAM", stream, 1);

    struct log *log = log_new("eep-agent", "gpu0", LOG_LEVEL_INFO, pipe_fds[1]);
    log_format_set(log, LOG_FORMAT_AUTO, name.sun_path);
    log_event(log, LOG_LEVEL_WARN, "work-failed", "op=%d bytes_per_s=%d why=%s", 7, 8, "two\nlines");
    ssize_t n = recv(journal, entry, sizeof entry - 1, MSG_DONTWAIT);
    ck_assert_int_gt(n, 0);
    log_message_id("work-failed", id);
    snprintf(want, sizeof want, "MESSAGE_ID=%s\n", id);
    const char *const fields[] = {"PRIORITY=4\n",
                                  "SYSLOG_IDENTIFIER=eep-agent\n",
                                  want,
                                  "EEP_EVENT=work-failed\n",
                                  "EEP_ID=gpu0\n",
                                  "MESSAGE=work-failed op=7 bytes_per_s=8 why=\"two\\nlines\"\n",
                                  "EEP_OP=7\n",
                                  "EEP_BYTES_PER_S=8\n"};
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        ck_assert_msg(memmem(entry, (size_t)n, fields[i], strlen(fields[i])) != NULL, "no %s", fields[i]);
    static const char binary[] = "EEP_WHY\n\x09\0\0\0\0\0\0\0two\nlines\n";
    ck_assert_ptr_nonnull(memmem(entry, (size_t)n, binary, sizeof binary - 1));
    ck_assert_str_eq(logged(), "");

    close(journal);
    log_event(log, LOG_LEVEL_INFO, "e", NULL);
    ck_assert_str_eq(logged(), "level=info daemon=eep-agent id=gpu0 event=e\n");
    log_free(log);
    unlink(name.sun_path);
    rmdir(folder);
}
END_TEST

/* The table of docs/messages.md tells the ids that are written: they are kept by whoever filters on them. */
START_TEST(message_ids_are_documented)
{
    FILE *f = fopen("docs/messages.md", "r");
    char line[1024], event[64], id[64], is[33];
    int rows = 0;
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "| `%63[a-z-]` | %32[0-9a-f] |", event, id) == 2 && strlen(id) == 32) {
            log_message_id(event, is);
            ck_assert_msg(strcmp(id, is) == 0, "%s has MESSAGE_ID %s", event, is);
            rows++;
        }
    fclose(f);
    ck_assert_int_gt(rows, 40);
}
END_TEST

START_TEST(rates)
{
    static char lines[1 << 20];
    struct log *log = log_new("d", "", LOG_LEVEL_INFO, pipe_fds[1]);
    ck_assert_int_ge(fcntl(pipe_fds[1], F_SETPIPE_SZ, 1 << 20), 0);
    for (int i = 0; i < 2000; i++)
        log_event(log, LOG_LEVEL_WARN, "storm", NULL);
    log_event(log, LOG_LEVEL_ERROR, "storm", NULL); /* errors always */
    sleep(1);
    log_event(log, LOG_LEVEL_WARN, "storm", NULL);
    ssize_t n = read(pipe_fds[0], lines, sizeof lines - 1);
    ck_assert_int_gt(n, 0);
    lines[n] = '\0';
    int count = 0, suppressed = 0, told = 0;
    for (char *p = lines; (p = strstr(p, "event=storm")); p++, count++)
        if (sscanf(p, "event=storm suppressed=%d", &suppressed) == 1)
            told += suppressed;
    ck_assert_int_lt(count, 1000); /* 202, more when the clock went on to the next second */
    ck_assert_int_eq(count + told, 2002);
    log_free(log);
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
    tcase_add_test(tc, json);
    tcase_add_test(tc, native_journal);
    tcase_add_test(tc, message_ids_are_documented);
    tcase_add_test(tc, rates);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
