/* Running a program of the tree to its end, for tests of what it says. */
#ifndef EEP_TESTS_INTEGRATION_ITEST_RUN_H
#define EEP_TESTS_INTEGRATION_ITEST_RUN_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

static char said[65536];

/* Runs a program of the tree; its stdout and stderr are in `said`.  The exit code, 128 + signal, or -1 when it had to
 * be ended after two seconds: it had found nothing wrong. */
static inline int run(const char *command)
{
    char line[2048];
    const char *bin = getenv("EEP_BIN");
    snprintf(line, sizeof(line), "exec timeout -k 5 2 %s/%s 2>&1 </dev/null", bin ? bin : "build", command);
    FILE *p = popen(line, "r");
    ck_assert_ptr_nonnull(p);
    size_t n = fread(said, 1, sizeof(said) - 1, p);
    said[n] = '\0';
    int status = pclose(p);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return code == 124 ? -1 : code;
}

#define REFUSED(command, code, sentence)                                                                               \
    do {                                                                                                               \
        int got_ = run(command);                                                                                       \
        ck_assert_msg(got_ == (code), "%s: exit %d, not %d: %s", command, got_, code, said);                           \
        ck_assert_msg(strstr(said, sentence) != NULL, "%s: not said: \"%s\", but: %s", command, sentence, said);       \
    } while (0)

#endif
