/* eep-keeper: starts an agent, holds its descriptors, and starts it again when it dies: what systemd does with its descriptor
 * store, where no systemd runs.  It knows nothing of weights, and has no GPU context to lose.  Single thread.
 *
 *            start                     died by a signal, or with a status that is no end
 *   (begin) -------> child runs -------------------------------------------> pause -> start again, up to a limit
 *                       | exit 0, 2 (usage), 127 (not to be run), or asked to stop
 *                       v
 *                     the end, with its status */
#include <argp.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/keeper/store.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/log.h"
#include "common/options.h"

#define PAUSE_FIRST_MS 20
#define PAUSE_LAST_MS 1000 /* within the usual lease */
#define STATUS_NOT_RUN 127

struct options {
    char **command;
    uint32_t deaths_max, steady_ms;
    enum log_level level;
};

struct keeper {
    struct options options;
    struct log *log;
    struct store *store;
    int signal_fd;
    sigset_t signals, before;
    const char *outer; /* $NOTIFY_SOCKET as we got it; NULL: none */
    pid_t child;       /* 0: not running */
    bool stopping;
    uint64_t started_ms, start_at_ms;
    uint32_t deaths; /* quick ones in a row */
    unsigned pause_ms;
};

enum { KEY_DEATHS = 256, KEY_STEADY, KEY_LEVEL };

static const struct argp_option option_table[] = {
    {"max-deaths", KEY_DEATHS, "N", 0, "give up after so many quick deaths in a row (default 10)", 0},
    {"steady-ms", KEY_STEADY, "MS", 0, "a death after so long is no quick one (default 10000)", 0},
    {"log-level", KEY_LEVEL, "LEVEL", 0, "debug, info (default), warn or error", 0},
    OPTIONS_HELP(-1),
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    switch (key) {
    case KEY_DEATHS: o->deaths_max = (uint32_t)options_number(state, "--max-deaths", arg, 1, 1000000); return 0;
    case KEY_STEADY: o->steady_ms = (uint32_t)options_number(state, "--steady-ms", arg, 0, 86400000); return 0;
    case KEY_LEVEL:
        if (log_level_parse(arg, &o->level) < 0)
            argp_error(state, "unknown log level '%s': use debug, info, warn or error", arg);
        return 0;
    case ARGP_KEY_ARGS: o->command = state->argv + state->next; return 0;
    case ARGP_KEY_NO_ARGS: argp_error(state, "nothing to run: give the agent's command after --"); return 0;
    case ARGP_KEY_ARG: return ARGP_ERR_UNKNOWN; /* all of them at once, above */
    default: return options_help(key, state);
    }
}

/* ---- the child ---- */

/* After fork. */
_Noreturn static void child_run(struct keeper *k, pid_t parent)
{
    struct err err = {0};
    setpgid(0, 0); /* a Ctrl-C at the terminal is for us, and passed on once */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    sigprocmask(SIG_SETMASK, &k->before, NULL);
    if (getppid() != parent)
        _exit(0); /* we are gone already */
    if (store_hand_over(k->store, &err) == 0) {
        execvp(k->options.command[0], k->options.command);
        err_set(&err, ERR_IO, "cannot run %s: %s", k->options.command[0], strerror(errno));
    }
    fprintf(stderr, "eep-keeper: %s\n", err.text);
    _exit(STATUS_NOT_RUN);
}

static int child_start(struct keeper *k, struct err *err)
{
    pid_t parent = getpid(), pid = fork();
    if (pid < 0)
        return err_set(err, ERR_IO, "cannot start a process: %s", strerror(errno));
    if (pid == 0)
        child_run(k, parent);
    k->child = pid;
    k->started_ms = clock_now_ms();
    log_event(k->log, LOG_LEVEL_INFO, "started", "pid=%ld command=%s descriptors=%zu", (long)pid, k->options.command[0],
              store_count(k->store));
    return 0;
}

/* How the last child ended, as an exit status of ours. */
static int status_of(int status)
{
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static bool is_end(const struct keeper *k, int status)
{
    return k->stopping || (WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 2 ||
                                                 WEXITSTATUS(status) == STATUS_NOT_RUN));
}

/* -1: it will be started again. */
static int child_ended(struct keeper *k, int status)
{
    uint64_t lived_ms = clock_now_ms() - k->started_ms;
    char how[64];
    if (WIFSIGNALED(status))
        snprintf(how, sizeof how, "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(how, sizeof how, "status %d", WEXITSTATUS(status));
    k->child = 0;
    if (is_end(k, status)) {
        log_event(k->log, LOG_LEVEL_INFO, "ended", "how=%s lived_ms=%llu", how, (unsigned long long)lived_ms);
        return status_of(status);
    }
    bool quick = lived_ms < k->options.steady_ms;
    k->deaths = quick ? k->deaths + 1 : 1;
    if (!quick)
        k->pause_ms = PAUSE_FIRST_MS;
    if (k->deaths >= k->options.deaths_max) {
        log_event(k->log, LOG_LEVEL_ERROR, "given-up", "why=%s how=%s deaths=%u", "it died too often, too quickly", how,
                  k->deaths);
        return status_of(status);
    }
    log_event(k->log, LOG_LEVEL_WARN, "died", "how=%s lived_ms=%llu again_in_ms=%u descriptors=%zu", how,
              (unsigned long long)lived_ms, k->pause_ms, store_count(k->store));
    k->start_at_ms = clock_now_ms() + k->pause_ms;
    k->pause_ms = k->pause_ms < PAUSE_LAST_MS / 2 ? k->pause_ms * 2 : PAUSE_LAST_MS;
    return -1;
}

/* ---- the loop ---- */

static void pass_on(void *user, const char *line)
{
    const struct keeper *k = user;
    if (!k->outer)
        return;
    setenv("NOTIFY_SOCKET", k->outer, 1);
    daemon_notify(line);
    unsetenv("NOTIFY_SOCKET");
}

/* The child's exit status once it is time to end; -1 until then. */
static int signals_read(struct keeper *k)
{
    struct signalfd_siginfo info;
    int status, end = -1;
    while (read(k->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
        int number = (int)info.ssi_signo;
        if (number == SIGCHLD)
            continue;
        if (number != SIGHUP)
            k->stopping = true;
        if (k->child)
            kill(k->child, number);
        else if (k->stopping)
            end = 0;
    }
    if (k->child && waitpid(k->child, &status, WNOHANG) == k->child) {
        store_read(k->store, pass_on, k); /* its last words, before the next one gets what it kept */
        end = child_ended(k, status);
    }
    return end;
}

static int keeper_run(struct keeper *k, struct err *err)
{
    int end = -1, rc = child_start(k, err);
    while (rc == 0 && end < 0) {
        struct pollfd p[2] = {{.fd = k->signal_fd, .events = POLLIN}, {.fd = store_fd(k->store), .events = POLLIN}};
        int left = k->child ? -1 : clock_left_ms(k->start_at_ms);
        if (poll(p, 2, left) < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait: %s", strerror(errno));
        store_read(k->store, pass_on, k);
        end = signals_read(k);
        if (end < 0 && !k->child && clock_left_ms(k->start_at_ms) == 0)
            rc = child_start(k, err);
    }
    return rc < 0 ? rc : end;
}

/* Every region of the weights is a descriptor, here and in the child. */
static void limit_raise(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static int keeper_open(struct keeper *k, struct err *err)
{
    const char *outer = getenv("NOTIFY_SOCKET");
    k->outer = outer && *outer ? strdup(outer) : NULL;
    unsetenv("NOTIFY_SOCKET");
    limit_raise();
    sigemptyset(&k->signals);
    sigaddset(&k->signals, SIGTERM);
    sigaddset(&k->signals, SIGINT);
    sigaddset(&k->signals, SIGHUP);
    sigaddset(&k->signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &k->signals, &k->before);
    k->signal_fd = signalfd(-1, &k->signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (k->signal_fd < 0)
        return err_set(err, ERR_IO, "cannot receive signals: %s", strerror(errno));
    return store_new(&k->store, err);
}

int main(int argc, char **argv)
{
    const struct argp argp = {
        .options = option_table,
        .parser = parse,
        .args_doc = "-- eep-agent [OPTION...]",
        .doc = "Runs an agent and holds the descriptors of its weights, so that the agent can die and be started again "
               "without its engine noticing.  What systemd's descriptor store does, where no systemd runs.\v"
               "Example:\n"
               "  eep-keeper -- eep-agent --id gpu0 --checkpoint /models/qwen3\n"
               "\n"
               "SIGTERM and SIGINT are passed on.  Exit status: that of the agent, 128 + N when signal N killed it for "
               "the last time.",
    };
    struct keeper k = {.options = {.deaths_max = 10, .steady_ms = 10000, .level = LOG_LEVEL_INFO},
                       .signal_fd = -1,
                       .pause_ms = PAUSE_FIRST_MS};
    argp_err_exit_status = 2;
    if (argp_parse(&argp, argc, argv, ARGP_NO_HELP | ARGP_IN_ORDER, NULL, &k.options))
        return 2;
    struct err err = {0};
    k.log = log_new("eep-keeper", "", k.options.level, -1);
    int rc = keeper_open(&k, &err);
    if (rc == 0)
        rc = keeper_run(&k, &err);
    if (rc < 0) {
        fprintf(stderr, "eep-keeper: %s\n", err.text);
        if (k.child)
            kill(k.child, SIGTERM);
        rc = 1;
    }
    store_free(k.store);
    if (k.signal_fd >= 0)
        close(k.signal_fd);
    log_free(k.log);
    free((char *)(uintptr_t)k.outer); /* ours, read only in between */
    return rc;
}
