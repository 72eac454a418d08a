/* One server process for a benchmark or a test of the store: started, waited for, ended by its process id. */
#ifndef EEP_TESTS_HARNESS_DAEMON_H
#define EEP_TESTS_HARNESS_DAEMON_H

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

struct daemon_process {
    char dir[64];
    char bin[256];
    const char *extra[16]; /* more arguments, NULL terminated */
    const char *preload;   /* LD_PRELOAD, or NULL */
    bool own_level;        /* no --log-level: `extra` or a file says it */
    pid_t pid;
    char address[128];     /* of the first --listen 127.0.0.1:0 */
    char tcpstore[128];    /* of the first --tcpstore-listen, "" = none */
};

/* Makes the folder; not started yet. */
static inline void daemon_process_init(struct daemon_process *d)
{
    const char *bin = getenv("EEP_BIN");
    memset(d, 0, sizeof *d);
    snprintf(d->dir, sizeof d->dir, "/tmp/eep-store-XXXXXX");
    if (!mkdtemp(d->dir))
        abort();
    snprintf(d->bin, sizeof d->bin, "%s/eep-coordinator", bin && *bin ? bin : "build");
}

/* Starts it on the folder's state.  false: it ended, or said no addresses within ten seconds; its log is in dir/log. */
static inline bool daemon_process_start(struct daemon_process *d)
{
    char state[80], ports[80], log[80];
    snprintf(state, sizeof state, "%s/state", d->dir);
    snprintf(ports, sizeof ports, "%s/ports", d->dir);
    snprintf(log, sizeof log, "%s/log", d->dir);
    unlink(ports);
    d->pid = fork();
    if (d->pid == 0) {
        const char *args[32] = {d->bin, "--state", state, "--listen", "127.0.0.1:0", "--port-file", ports,
                                "--log-level", "warn"};
        int n = d->own_level ? 7 : 9, fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        for (int i = 0; d->extra[i]; i++)
            args[n++] = d->extra[i];
        args[n] = NULL;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (d->preload) {
            setenv("LD_PRELOAD", d->preload, 1);
            const char *asan = getenv("ASAN_OPTIONS"); /* a sanitizer wants to be first */
            char options[512];
            snprintf(options, sizeof options, "%s:verify_asan_link_order=0", asan ? asan : "");
            setenv("ASAN_OPTIONS", options, 1);
        }
        dup2(fd, 2);
        execv(d->bin, (char *const *)args);
        _exit(127);
    }
    for (int i = 0; i < 1000; i++) {
        usleep(10000);
        FILE *f = fopen(ports, "r");
        if (f) {
            d->tcpstore[0] = '\0';
            if (fscanf(f, "%127s %127s", d->address, d->tcpstore) < 1)
                d->address[0] = '\0';
            fclose(f);
            if (d->address[0])
                return true;
        }
        int status;
        if (waitpid(d->pid, &status, WNOHANG) == d->pid) {
            d->pid = 0;
            return false;
        }
    }
    return false;
}

/* Ends it and waits; the wait status. */
static inline int daemon_process_stop(struct daemon_process *d, int signal_number)
{
    int status = 0;
    if (d->pid > 0) {
        kill(d->pid, signal_number);
        waitpid(d->pid, &status, 0);
        d->pid = 0;
    }
    return status;
}

static inline void daemon_process_done(struct daemon_process *d)
{
    char command[96];
    daemon_process_stop(d, SIGKILL);
    snprintf(command, sizeof command, "rm -rf '%s'", d->dir);
    if (system(command) != 0)
        fprintf(stderr, "cannot remove %s\n", d->dir);
}

#endif
