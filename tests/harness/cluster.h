/* A whole cluster on loopback in a temporary folder: one coordinator, agents, their engines, a request feeder.
 *
 * Used by the demo, the integration tests and the benchmarks.  Every process is a child of the caller, in a group of its
 * own (a Ctrl-C at the terminal reaches only the caller), and dies with it.  cluster_stop ends them all and removes
 * the folder.  $EEP_ENGINE is a command line to run in the place of eep-engine, with the same arguments after it.
 * Not thread safe; several clusters side by side are fine. */
#ifndef EEP_TESTS_HARNESS_CLUSTER_H
#define EEP_TESTS_HARNESS_CLUSTER_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define CLUSTER_AGENTS_MAX 16

struct cluster_options {
    const char *bin;          /* folder of the binaries; NULL = $EEP_BIN or "build" */
    const char *model;        /* checkpoint folder */
    int agents;               /* named gpu0 .. */
    int loaders;              /* agents that get the path of the checkpoint (the first ones); 0 = none but by layout */
    const char *layout;       /* of the engines: "loader" (default) or "fused" (sealed by the engine) */
    const char *dispatch;     /* "source" (default) or "replicated" */
    int step_ms;              /* minimum duration of an engine step */
    bool keeper;              /* agents run under eep-keeper, which `agent` is then */
    int busy_us;              /* spinning at the beginning of each step, where it is computed */
    /* Of the agents; NULL: $EEP_TEST_MEMORY and $EEP_TEST_TRANSPORT, or else "host" (transport "auto" with memory "cuda").
       With "cuda" the agents are spread over the GPUs that there are, and share them. */
    const char *memory, *transport;
    const char *coordinator_args[32]; /* NULL terminated */
    const char *agent_args[8];        /* the same, for every agent */
    const char *engine_args[4];       /* of engines that are started from now on */
    const char *network;              /* every process on a host of its own: struct network's name; NULL = loopback */
    const char *agents_connect;       /* where agents find the coordinator, if not at its own socket */
    bool agent_edges;                 /* agents look for dir/edge at their transitions: tests/harness/fault_edge.c */
    const volatile sig_atomic_t *interrupted; /* or NULL: once it is not 0, every wait but cluster_stop's gives up */
};

enum cluster_role { CLUSTER_COORDINATOR, CLUSTER_AGENT, CLUSTER_ENGINE, CLUSTER_FEEDER };

struct cluster {
    struct cluster_options options;
    char dir[128];            /* temporary folder: sockets, state, logs */
    char bin[256];
    char address[192];        /* of the coordinator: unix:... */
    int gpus;                 /* with memory "cuda" */
    pid_t coordinator, feeder;
    pid_t agent[CLUSTER_AGENTS_MAX], engine[CLUSTER_AGENTS_MAX];
};

/* Creates the folder and starts the coordinator.  0 or -1 with a sentence on stderr. */
int cluster_start(struct cluster *c, const struct cluster_options *options);
int cluster_coordinator_start(struct cluster *c); /* again, on the same state */
int cluster_agent_start(struct cluster *c, int i);
int cluster_engine_start(struct cluster *c, int i);
int cluster_all_start(struct cluster *c);         /* every agent with its engine */
/* Arguments after the common ones, NULL terminated; report in dir/report.json, status in dir/feeder.json. */
int cluster_feeder_start(struct cluster *c, const char *const *args);
/* Sends SIGTERM and waits up to timeout_ms: the feeder stops issuing and reports.  Returns its exit status, -1: none. */
int cluster_feeder_stop(struct cluster *c, int timeout_ms);
int cluster_feeder_wait(struct cluster *c, int timeout_ms);

/* Signals one process; SIGKILL is waited for.  *pid becomes 0 when it has ended. */
void cluster_signal(pid_t *pid, int signal);
/* The process of agent i itself: the keeper's child, if there is a keeper; 0 between two of them. */
pid_t cluster_agent_pid(const struct cluster *c, int i);
/* Waits for the end of a child; its exit status (128 + signal when killed), -1 when it runs on after timeout_ms. */
int cluster_wait(pid_t *pid, int timeout_ms);

/* Runs eepctl with these arguments (NULL terminated); output (stdout, then stderr) in out.  Returns the exit code. */
int cluster_ctl(struct cluster *c, char *out, size_t size, ...) __attribute__((sentinel));
/* The same without waiting: stdout and stderr go to dir/<name>.out and .err. */
pid_t cluster_ctl_start(struct cluster *c, const char *name, const char *const *args);

/* Polls `eepctl agents -o json` until n agents are connected with an engine attached.  0, or -1 after timeout_ms. */
int cluster_wait_agents(struct cluster *c, int n, int timeout_ms);
/* Reads a file of the folder; caller frees.  NULL when it is not there. */
char *cluster_read(const struct cluster *c, const char *name);
/* The last line of every log, to stderr. */
void cluster_logs_show(const struct cluster *c);
/* Ends the engines, which say in their logs then how long their steps took; how many did not end cleanly. */
int cluster_engines_stop(struct cluster *c);
/* Ends everything; keep: leaves the folder (to look at the logs).  Exit statuses other than 0 of daemons that had to
 * stop by SIGTERM are counted and returned: 0 = all clean. */
int cluster_stop(struct cluster *c, bool keep);

/* A sanitizer's allocator keeps freed memory for a while, and its own records grow: resident bytes say nothing there. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CLUSTER_RSS_MEANS_LITTLE true
#else
#define CLUSTER_RSS_MEANS_LITTLE false
#endif
/* Resident bytes and open descriptors of a process. */
long cluster_rss(pid_t pid);
int cluster_fds(pid_t pid);
uint64_t cluster_now_ms(void);
void cluster_sleep_ms(int ms);

#endif
