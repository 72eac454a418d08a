/* See cluster.h. */
#include "tests/harness/cluster.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <jansson.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/harness/network.h"

#define ARGS_MAX 64
#define CLUSTER_COORDINATOR_TCP "10.77.0.1:7420"
#define ENGINE   "tests/eep-engine"

uint64_t cluster_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void cluster_sleep_ms(int ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

/* The host of a process, by the number in its name. */
static int cluster_host(const char *log)
{
    const char *dash = strchr(log, '-');
    bool numbered = strncmp(log, "agent-", 6) == 0 || strncmp(log, "engine-", 7) == 0;
    return numbered ? atoi(dash + 1) : NETWORK_COORDINATOR;
}

static void cluster_preload(const struct cluster *c)
{
    char text[512];
    const char *asan = getenv("ASAN_OPTIONS"); /* a sanitizer wants to be first */
    snprintf(text, sizeof(text), "%s:verify_asan_link_order=0", asan ? asan : "");
    setenv("ASAN_OPTIONS", text, 1);
    snprintf(text, sizeof(text), "%s/edge", c->dir);
    setenv("EEP_FAULT_EDGE", text, 1);
    snprintf(text, sizeof(text), "%s/tests/fault_edge.so", c->bin);
    setenv("LD_PRELOAD", text, 1);
}

/* A child whose stdout and stderr go to dir/<log>.out and dir/<log>.log. */
static pid_t cluster_spawn(const struct cluster *c, const char *log, const char *program, const char *const *args)
{
    char path[512], out[256], err[256], shell[1024];
    const char *argv[ARGS_MAX + 5];
    int n = 0;
    const char *engine = strcmp(program, ENGINE) == 0 ? getenv("EEP_ENGINE") : NULL;
    if (engine) { /* a command line instead: the shell takes it apart, and becomes it */
        snprintf(path, sizeof(path), "/bin/sh");
        snprintf(shell, sizeof(shell), "exec %s \"$@\"", engine);
        argv[n++] = path;
        argv[n++] = "-c";
        argv[n++] = shell;
    } else {
        snprintf(path, sizeof(path), "%s/%s", c->bin, program);
    }
    snprintf(out, sizeof(out), "%s/%s.out", c->dir, log);
    snprintf(err, sizeof(err), "%s/%s.log", c->dir, log);
    argv[n++] = path;
    for (int i = 0; args[i] && n < ARGS_MAX; i++)
        argv[n++] = args[i];
    argv[n] = NULL;
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid < 0)
        perror("fork");
    if (pid != 0)
        return pid;
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(127);
    if (c->options.network && network_enter(c->options.network, cluster_host(log)) < 0)
        _exit(127);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int in = open("/dev/null", O_RDONLY), fo = open(out, O_WRONLY | O_CREAT | O_APPEND, 0600),
        fe = open(err, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (in < 0 || fo < 0 || fe < 0)
        _exit(127);
    dup2(in, 0);
    dup2(fo, 1);
    dup2(fe, 2);
    close(in);
    close(fo);
    close(fe);
    if (c->options.agent_edges && strcmp(program, "eep-agent") == 0)
        cluster_preload(c);
    execv(path, (char *const *)(uintptr_t)argv);
    dprintf(2, "cannot run %s: %s\n", path, strerror(errno));
    _exit(127);
}

int cluster_wait(pid_t *pid, int timeout_ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    for (;;) {
        int status;
        if (*pid <= 0)
            return -1;
        pid_t r = waitpid(*pid, &status, WNOHANG);
        if (r == *pid || (r < 0 && errno == ECHILD)) {
            *pid = 0;
            return r < 0 ? -1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        }
        if (cluster_now_ms() >= end)
            return -1;
        cluster_sleep_ms(5);
    }
}

static bool cluster_interrupted(const struct cluster *c)
{
    return c->options.interrupted && *c->options.interrupted;
}

/* cluster_wait, given up when the caller was interrupted. */
static int cluster_wait_or_interrupted(const struct cluster *c, pid_t *pid, int timeout_ms)
{
    int status = -1;
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    do
        status = cluster_wait(pid, 20);
    while (*pid > 0 && cluster_now_ms() < end && !cluster_interrupted(c));
    return status;
}

void cluster_signal(pid_t *pid, int signal)
{
    if (*pid <= 0)
        return;
    kill(*pid, signal);
    if (signal == SIGKILL)
        (void)cluster_wait(pid, 5000);
}

/* Until the coordinator accepts connections, or has ended (a test may want that), at most 10 s. */
static int cluster_wait_listening(struct cluster *c)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%.100s", c->address + strlen("unix:"));
    for (uint64_t end = cluster_now_ms() + 10000; cluster_now_ms() < end; cluster_sleep_ms(10)) {
        if (cluster_interrupted(c))
            return -1;
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int rc = fd < 0 ? -1 : connect(fd, (struct sockaddr *)&a, sizeof(a));
        if (fd >= 0)
            close(fd);
        siginfo_t ended = {0};
        if (rc == 0 || waitid(P_PID, (id_t)c->coordinator, &ended, WEXITED | WNOHANG | WNOWAIT) < 0 || ended.si_pid)
            return 0;
    }
    fprintf(stderr, "the coordinator does not listen at %s; see %s/coordinator.log\n", c->address, c->dir);
    return -1;
}

int cluster_coordinator_start(struct cluster *c)
{
    char state[192];
    const char *args[ARGS_MAX] = {"--listen", c->address, "--state", state, NULL};
    int n = 4;
    snprintf(state, sizeof(state), "%s/state", c->dir);
    if (c->options.network) {
        args[n++] = "--listen";
        args[n++] = CLUSTER_COORDINATOR_TCP;
        args[n++] = "--insecure";
    }
    for (int i = 0; i < 32 && c->options.coordinator_args[i]; i++)
        args[n++] = c->options.coordinator_args[i];
    args[n] = NULL;
    c->coordinator = cluster_spawn(c, "coordinator", "eep-coordinator", args);
    return c->coordinator > 0 ? cluster_wait_listening(c) : -1;
}

/* What --list-gpus says: a line for each. */
static int cluster_count_gpus(const struct cluster *c)
{
    int n = 0;
    pid_t pid = cluster_spawn(c, "gpus", "eep-agent", (const char *[]){"--list-gpus", NULL});
    if (cluster_wait(&pid, 20000) == 0) {
        char *text = cluster_read(c, "gpus.out");
        for (const char *at = text; at && (at = strchr(at, '\n')); at++)
            n++;
        free(text);
    }
    return n;
}

/* Agents and GPUs in turn; several agents of one GPU must say that they share it. */
static int cluster_memory_args(struct cluster *c, int i, const char **args, char *memory, size_t size)
{
    int n = 0;
    if (strcmp(c->options.memory, "cuda") == 0) {
        snprintf(memory, size, "cuda:%d", i % c->gpus);
        args[n++] = "--memory";
        args[n++] = memory;
        if (c->options.agents > c->gpus)
            args[n++] = "--shared-gpu";
    }
    args[n++] = "--transport";
    args[n++] = c->options.transport;
    return n;
}

static void cluster_choose_memory(struct cluster *c)
{
    const char *memory = getenv("EEP_TEST_MEMORY"), *transport = getenv("EEP_TEST_TRANSPORT");
    if (!c->options.memory)
        c->options.memory = memory ? memory : "host";
    if (!c->options.transport)
        c->options.transport = transport ? transport : strcmp(c->options.memory, "cuda") == 0 ? "auto" : "host";
}

int cluster_start(struct cluster *c, const struct cluster_options *options)
{
    memset(c, 0, sizeof(*c));
    c->options = *options;
    const char *bin = options->bin ? options->bin : getenv("EEP_BIN");
    snprintf(c->bin, sizeof(c->bin), "%s", bin ? bin : "build");
    const char *tmp = getenv("TMPDIR");
    bool fits = tmp && tmp[0] && strlen(tmp) < 60; /* the path of a unix socket has at most 107 characters */
    snprintf(c->dir, sizeof(c->dir), "%s/eep.XXXXXX", fits ? tmp : "/tmp");
    if (!mkdtemp(c->dir)) {
        fprintf(stderr, "cannot create a folder in %s: %s; set TMPDIR to a folder that exists and can be written\n",
                fits ? tmp : "/tmp", strerror(errno));
        c->dir[0] = '\0';
        return -1;
    }
    snprintf(c->address, sizeof(c->address), "unix:%s/coordinator.sock", c->dir);
    cluster_choose_memory(c);
    if (strcmp(c->options.memory, "cuda") == 0 && (c->gpus = cluster_count_gpus(c)) == 0) {
        char *text = cluster_read(c, "gpus.log");
        fprintf(stderr, "no GPU to keep weights on: %s\n", text ? text : "");
        free(text);
        return -1;
    }
    return cluster_coordinator_start(c);
}

int cluster_agent_start(struct cluster *c, int i)
{
    char id[16], socket[192], log[32], program[512], memory[24], host[24], at[32], node[8];
    const char *coordinator = c->options.network          ? CLUSTER_COORDINATOR_TCP
                              : c->options.agents_connect ? c->options.agents_connect
                                                          : c->address;
    const char *args[ARGS_MAX] = {"--steady-ms", "200",          "--",       program,           "--id", id,
                                  "--coordinator", coordinator, "--engine-socket", socket, NULL};
    int n = 10;
    if (c->options.network) {
        network_address(i, host);
        snprintf(at, sizeof(at), "%s:0", host);
        snprintf(node, sizeof(node), "%d", i);
        const char *const more[] = {"--listen", at, "--data-listen", at, "--insecure", "--node", node};
        for (size_t k = 0; k < sizeof(more) / sizeof(more[0]); k++)
            args[n++] = more[k];
    }
    snprintf(program, sizeof(program), "%s/eep-agent", c->bin);
    snprintf(id, sizeof(id), "gpu%d", i);
    snprintf(log, sizeof(log), "agent-%d", i);
    snprintf(socket, sizeof(socket), "%s/engine-%d.sock", c->dir, i);
    bool fused = c->options.layout && strcmp(c->options.layout, "fused") == 0;
    if (i < c->options.loaders && !fused) {
        args[n++] = "--checkpoint";
        args[n++] = c->options.model;
    }
    n += cluster_memory_args(c, i, args + n, memory, sizeof(memory));
    for (int k = 0; k < 8 && c->options.agent_args[k]; k++)
        args[n++] = c->options.agent_args[k];
    args[n] = NULL;
    c->agent[i] = c->options.keeper ? cluster_spawn(c, log, "eep-keeper", args)
                                    : cluster_spawn(c, log, "eep-agent", args + 4);
    return c->agent[i] > 0 ? 0 : -1;
}

pid_t cluster_agent_pid(const struct cluster *c, int i)
{
    char path[96];
    int pid = 0;
    if (!c->options.keeper || c->agent[i] <= 0)
        return c->agent[i];
    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", c->agent[i], c->agent[i]);
    FILE *f = fopen(path, "re");
    if (f && fscanf(f, "%d", &pid) != 1)
        pid = 0;
    if (f)
        fclose(f);
    return pid;
}

int cluster_engine_start(struct cluster *c, int i)
{
    char socket[192], step[16], busy[16], log[32], host[24], at[32];
    const char *args[ARGS_MAX] = {"--socket", socket, "--step-ms", step, "--busy-us", busy, "--attach-ms", "30000", NULL};
    int n = 8;
    snprintf(log, sizeof(log), "engine-%d", i);
    snprintf(socket, sizeof(socket), "%s/engine-%d.sock", c->dir, i);
    snprintf(step, sizeof(step), "%d", c->options.step_ms);
    snprintf(busy, sizeof(busy), "%d", c->options.busy_us);
    if (c->options.network) {
        network_address(i, host);
        snprintf(at, sizeof(at), "%s:0", host);
        args[n++] = "--listen";
        args[n++] = at;
    }
    if (c->options.dispatch) {
        args[n++] = "--dispatch";
        args[n++] = c->options.dispatch;
    }
    if (c->options.layout) {
        args[n++] = "--layout";
        args[n++] = c->options.layout;
        if (strcmp(c->options.layout, "fused") == 0 && i < c->options.loaders) {
            args[n++] = "--checkpoint";
            args[n++] = c->options.model;
        }
    }
    for (int k = 0; k < 4 && c->options.engine_args[k]; k++)
        args[n++] = c->options.engine_args[k];
    args[n] = NULL;
    c->engine[i] = cluster_spawn(c, log, ENGINE, args);
    return c->engine[i] > 0 ? 0 : -1;
}

int cluster_all_start(struct cluster *c)
{
    for (int i = 0; i < c->options.agents; i++)
        if (cluster_agent_start(c, i) < 0 || cluster_engine_start(c, i) < 0)
            return -1;
    return 0;
}

int cluster_feeder_start(struct cluster *c, const char *const *extra)
{
    char report[192], status[192];
    const char *args[ARGS_MAX] = {"--coordinator", c->address, "--data", c->options.model, "--report", report,
                                  "--status", status, NULL};
    int n = 8;
    snprintf(report, sizeof(report), "%s/report.json", c->dir);
    snprintf(status, sizeof(status), "%s/feeder.json", c->dir);
    unlink(report);
    unlink(status);
    for (int i = 0; extra && extra[i] && n < ARGS_MAX - 1; i++)
        args[n++] = extra[i];
    args[n] = NULL;
    c->feeder = cluster_spawn(c, "feeder", "tests/eep-feeder", args);
    return c->feeder > 0 ? 0 : -1;
}

int cluster_feeder_wait(struct cluster *c, int timeout_ms)
{
    return cluster_wait_or_interrupted(c, &c->feeder, timeout_ms);
}

int cluster_feeder_stop(struct cluster *c, int timeout_ms)
{
    cluster_signal(&c->feeder, SIGTERM);
    return cluster_wait_or_interrupted(c, &c->feeder, timeout_ms);
}

pid_t cluster_ctl_start(struct cluster *c, const char *name, const char *const *args)
{
    const char *all[ARGS_MAX] = {"-c", c->address, NULL};
    int n = 2;
    char path[256];
    for (int i = 0; args[i] && n < ARGS_MAX - 1; i++)
        all[n++] = args[i];
    all[n] = NULL;
    snprintf(path, sizeof(path), "%s/%s.out", c->dir, name);
    unlink(path);
    snprintf(path, sizeof(path), "%s/%s.log", c->dir, name);
    unlink(path);
    return cluster_spawn(c, name, "eepctl", all);
}

char *cluster_read(const struct cluster *c, const char *name)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", c->dir, name);
    FILE *f = fopen(path, "re");
    if (!f)
        return NULL;
    char *text = NULL;
    size_t cap = 0, len = 0, got;
    do {
        char *grown = realloc(text, cap + 65536 + 1);
        if (!grown)
            break;
        text = grown;
        cap += 65536;
        got = fread(text + len, 1, cap - len, f);
        len += got;
    } while (got > 0);
    fclose(f);
    if (text)
        text[len] = '\0';
    return text;
}

int cluster_ctl(struct cluster *c, char *out, size_t size, ...)
{
    static unsigned count;
    const char *args[ARGS_MAX];
    char name[32], file[64];
    int n = 0;
    va_list ap;
    va_start(ap, size);
    while (n < ARGS_MAX - 4 && (args[n] = va_arg(ap, const char *)))
        n++;
    va_end(ap);
    args[n] = NULL;
    snprintf(name, sizeof(name), "ctl-%u", count++);
    pid_t pid = cluster_ctl_start(c, name, args);
    int status = cluster_wait_or_interrupted(c, &pid, 120000);
    if (pid > 0)
        cluster_signal(&pid, SIGKILL);
    if (size)
        out[0] = '\0';
    static const char *const ends[] = {"out", "log"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof(file), "%s.%s", name, ends[i]);
        char *text = cluster_read(c, file);
        size_t used = size ? strlen(out) : 0;
        if (text && size)
            snprintf(out + used, size - used, "%s", text);
        free(text);
        snprintf(file, sizeof(file), "%s.%s", name, ends[i]);
        char path[256];
        snprintf(path, sizeof(path), "%s/%s", c->dir, file);
        unlink(path);
    }
    return status;
}

void cluster_logs_show(const struct cluster *c)
{
    DIR *d = opendir(c->dir);
    const struct dirent *e;
    while (d && (e = readdir(d))) {
        const char *dot = strrchr(e->d_name, '.');
        char *text = dot && strcmp(dot, ".log") == 0 ? cluster_read(c, e->d_name) : NULL;
        size_t len = text ? strlen(text) : 0;
        while (len > 0 && text[len - 1] == '\n')
            text[--len] = '\0';
        if (len > 0) {
            const char *line = strrchr(text, '\n');
            fprintf(stderr, "  %.*s: %s\n", (int)(dot - e->d_name), e->d_name, line ? line + 1 : text);
        }
        free(text);
    }
    if (d)
        closedir(d);
}

int cluster_wait_agents(struct cluster *c, int n, int timeout_ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms;
    char *out = malloc(65536);
    int there = 0;
    while (out && there < n && cluster_now_ms() < end && !cluster_interrupted(c)) {
        there = 0;
        if (cluster_ctl(c, out, 65536, "-o", "json", "agents", NULL) == 0) {
            json_t *root = json_loads(out, JSON_DISABLE_EOF_CHECK, NULL);
            json_t *list = json_is_object(root) ? json_object_get(root, "agents") : root;
            size_t i;
            json_t *agent;
            json_array_foreach(list, i, agent)
            {
                /* after a restart the coordinator knows its members before they are back */
                there += json_is_true(json_object_get(agent, "engine")) &&
                         json_is_true(json_object_get(agent, "connected"));
            }
            json_decref(root);
        }
        if (there < n)
            cluster_sleep_ms(50);
    }
    free(out);
    return there >= n ? 0 : -1;
}

static int cluster_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

/* A test may have stopped it.  Never later: a SIGCONT takes away the SIGSTOP by which the leak checker of a sanitized
 * build stops its own process at the end, and then both wait for ever. */
static void cluster_terminate(pid_t pid)
{
    if (pid <= 0)
        return;
    kill(pid, SIGCONT);
    kill(pid, SIGTERM);
}

/* After SIGTERM: a while, SIGKILL.  Counts processes that did not end cleanly. */
static int cluster_end(pid_t *pid, const char *what, int i)
{
    if (*pid <= 0)
        return 0;
    int status = cluster_wait(pid, 4000);
    if (*pid > 0 && strcmp(what, "agent") == 0) /* two SIGTERMs are one to a process that had no time between them */
        kill(*pid, SIGTERM);
    if (*pid > 0)
        status = cluster_wait(pid, 4000);
    if (*pid > 0) {
        fprintf(stderr, "%s %d did not stop on SIGTERM\n", what, i);
        cluster_signal(pid, SIGKILL);
        return 1;
    }
    if (status != 0)
        fprintf(stderr, "%s %d ended with status %d\n", what, i, status);
    return status != 0;
}

int cluster_engines_stop(struct cluster *c)
{
    int bad = 0;
    for (int i = 0; i < CLUSTER_AGENTS_MAX; i++)
        cluster_terminate(c->engine[i]);
    for (int i = 0; i < CLUSTER_AGENTS_MAX; i++)
        bad += cluster_end(&c->engine[i], "engine", i);
    return bad;
}

int cluster_stop(struct cluster *c, bool keep)
{
    int bad = 0;
    if (!c->dir[0])
        return 0;
    if (c->feeder > 0)
        kill(c->feeder, SIGKILL);
    (void)cluster_wait(&c->feeder, 2000);
    bad += cluster_engines_stop(c);
    /* the second SIGTERM says: at once, without waiting to be drained */
    for (int i = 0; i < CLUSTER_AGENTS_MAX; i++)
        cluster_terminate(c->agent[i]);
    cluster_sleep_ms(20);
    for (int i = 0; i < CLUSTER_AGENTS_MAX; i++)
        if (c->agent[i] > 0)
            kill(c->agent[i], SIGTERM);
    for (int i = 0; i < CLUSTER_AGENTS_MAX; i++)
        bad += cluster_end(&c->agent[i], "agent", i);
    cluster_terminate(c->coordinator);
    bad += cluster_end(&c->coordinator, "coordinator", 0);
    if (!keep && nftw(c->dir, cluster_remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0)
        fprintf(stderr, "could not remove %s: %s\n", c->dir, strerror(errno));
    c->dir[0] = '\0';
    return bad;
}

long cluster_rss(pid_t pid)
{
    char path[64], line[256];
    long kb = -1;
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "VmRSS: %ld", &kb) == 1)
            break;
    if (f)
        fclose(f);
    return kb < 0 ? -1 : kb * 1024;
}

int cluster_fds(pid_t pid)
{
    char path[64];
    int n = -2; /* . and .. */
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    DIR *d = opendir(path);
    if (!d)
        return -1;
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}
