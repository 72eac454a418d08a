/* The engine as a child of the agent.  Loop thread. */
#include "agent/engine_process.h"

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "common/clock.h"
#include "common/daemon.h"

#define RESTART_FIRST_MS 200
#define RESTART_LAST_MS 10000
#define STEADY_NS (10 * UINT64_C(1000000000)) /* one that ran so long is restarted quickly */
#define KILL_AFTER_MS 5000
#define LOOK_AGAIN_MS 500

extern char **environ;

struct engine_process {
    struct event_base *base;
    struct log *log;
    char *command;
    char **env; /* ours, with EEP_SOCKET; env[0] is owned */
    pid_t pid;  /* 0 = not running */
    uint64_t started_ns;
    unsigned restart_ms;
    bool stopping;
    bool (*wanted)(void *user);
    void *wanted_user;
    struct event *child, *timer; /* SIGCHLD; restart or kill */
    void (*on_stopped)(void *user);
    void *user;
};

static int spawn(struct engine_process *p, struct err *err)
{
    posix_spawnattr_t attr;
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_init(&attr);
    posix_spawnattr_setpgroup(&attr, 0);
    posix_spawnattr_setsigmask(&attr, &none);
    posix_spawnattr_setsigdefault(&attr, &all);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    char *const argv[] = {(char *)"sh", (char *)"-c", p->command, NULL};
    pid_t pid;
    int rc = posix_spawn(&pid, "/bin/sh", NULL, &attr, argv, p->env);
    posix_spawnattr_destroy(&attr);
    if (rc != 0)
        return err_set(err, ERR_IO, "could not start the engine command: %s", strerror(rc));
    p->pid = pid;
    p->started_ns = clock_now_ns();
    log_event(p->log, LOG_LEVEL_INFO, "engine-started", "pid=%ld", (long)pid);
    return 0;
}

static int spawn_if_wanted(struct engine_process *p, struct err *err)
{
    if (p->wanted(p->wanted_user))
        return spawn(p, err);
    daemon_timer_in(p->timer, LOOK_AGAIN_MS);
    return 0;
}

static void restart_later(struct engine_process *p)
{
    if (clock_now_ns() - p->started_ns >= STEADY_NS)
        p->restart_ms = RESTART_FIRST_MS;
    daemon_retry_in(p->timer, &p->restart_ms, RESTART_LAST_MS);
}

static void on_child(evutil_socket_t signal_number, short what, void *user)
{
    (void)signal_number, (void)what;
    struct engine_process *p = user;
    int status;
    if (!p->pid || waitpid(p->pid, &status, WNOHANG) != p->pid)
        return;
    if (WIFSIGNALED(status))
        log_event(p->log, p->stopping ? LOG_LEVEL_INFO : LOG_LEVEL_WARN, "engine-ended", "pid=%ld signal=%s",
                  (long)p->pid, strsignal(WTERMSIG(status)));
    else
        log_event(p->log, p->stopping ? LOG_LEVEL_INFO : LOG_LEVEL_WARN, "engine-ended", "pid=%ld status=%d",
                  (long)p->pid, WEXITSTATUS(status));
    if (p->stopping)
        kill(-p->pid, SIGKILL); /* what its shell has left behind */
    p->pid = 0;
    event_del(p->timer);
    if (p->stopping)
        p->on_stopped(p->user);
    else
        restart_later(p);
}

static void on_timer(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct engine_process *p = user;
    struct err err;
    if (p->stopping) {
        if (p->pid)
            kill(-p->pid, SIGKILL);
        else
            p->on_stopped(p->user);
    } else if (!p->pid && spawn_if_wanted(p, &err) < 0) {
        log_event(p->log, LOG_LEVEL_ERROR, "engine-not-started", "why=%s", err.text);
        restart_later(p);
    }
}

static char **environment_with(const char *socket)
{
    size_t n = 0, k = 1;
    while (environ[n])
        n++;
    char **env = calloc(n + 2, sizeof *env);
    if (!env || asprintf(&env[0], "EEP_SOCKET=%s", socket) < 0) {
        free(env);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        /* $NOTIFY_SOCKET is between systemd and the agent. */
        if (strncmp(environ[i], "EEP_SOCKET=", 11) != 0 && strncmp(environ[i], "NOTIFY_SOCKET=", 14) != 0 &&
            strncmp(environ[i], "FDSTORE=", 8) != 0)
            env[k++] = environ[i];
    }
    return env;
}

int engine_process_start(struct event_base *base, struct log *log, const char *command, const char *socket,
                         bool (*wanted)(void *user), void *user, struct engine_process **ret_process, struct err *err)
{
    struct engine_process *p = calloc(1, sizeof *p);
    if (!p)
        return err_set(err, ERR_NOMEM, "out of memory");
    p->base = base;
    p->log = log;
    p->wanted = wanted;
    p->wanted_user = user;
    p->restart_ms = RESTART_FIRST_MS;
    p->command = strdup(command);
    p->env = environment_with(socket);
    p->child = evsignal_new(base, SIGCHLD, on_child, p);
    p->timer = event_new(base, -1, 0, on_timer, p);
    int rc = p->command && p->env && p->child && p->timer && event_add(p->child, NULL) == 0
                 ? spawn_if_wanted(p, err)
                 : err_set(err, ERR_NOMEM, "out of memory");
    if (rc < 0) {
        engine_process_free(p);
        return rc;
    }
    *ret_process = p;
    return 0;
}

void engine_process_stop(struct engine_process *p, void (*on_stopped)(void *user), void *user)
{
    p->stopping = true;
    p->on_stopped = on_stopped;
    p->user = user;
    if (p->pid)
        kill(-p->pid, SIGTERM);
    daemon_timer_in(p->timer, p->pid ? KILL_AFTER_MS : 0);
}

void engine_process_free(struct engine_process *p)
{
    if (!p)
        return;
    if (p->pid) {
        kill(-p->pid, SIGKILL);
        waitpid(p->pid, NULL, 0);
    }
    if (p->child)
        event_free(p->child);
    if (p->timer)
        event_free(p->timer);
    if (p->env)
        free(p->env[0]);
    free(p->env);
    free(p->command);
    free(p);
}
