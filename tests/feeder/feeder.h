/* eep-feeder: keeps requests going through whatever engines the view names, and checks every token.
 *
 *   main.c     options, signals, when to stop     watch.c    the view, by a watch as a router would
 *   jobs.c     requests: issue, retry, verify     targets.c  engines: connections and their protocol
 *   report.c   figures, status and report files
 *
 * One thread, one libevent loop. */
#ifndef EEP_TESTS_FEEDER_FEEDER_H
#define EEP_TESTS_FEEDER_FEEDER_H

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>

#include "agent/safetensors.h"
#include "common/rpc.h"
#include "common/topology.h"

#define TARGETS_MAX 256

struct feeder_options {
    const char *coordinator, *cluster, *data, *report, *status, *until_file;
    uint32_t concurrency, max_tokens, finish_ms;
    uint64_t requests;    /* 0 = no such end */
    uint64_t duration_ms; /* 0 = no such end */
    uint64_t drift_ms;    /* 0 = all prompts in turn */
};

/* An engine that the view names, or named. */
struct target {
    char endpoint[ENDPOINT_MAX], address[ADDRESS_MAX];
    struct bufferevent *bev; /* NULL: not connected */
    bool in_view, serving, draining;
    uint64_t not_before_ms; /* it refused, or its connection was lost */
    uint32_t outstanding;
    uint64_t last_used;
};

/* One request, which may run on several engines one after the other. */
struct job {
    bool active;
    uint64_t number;       /* of the request */
    uint32_t attempt;      /* part of the id on the wire */
    uint32_t prompt;       /* row of the reference */
    uint32_t got, base;    /* tokens verified; how many of them the present attempt had as prompt */
    struct target *target; /* NULL: waits for one */
    uint64_t issued_ns, last_ns, longest_ns;
};

struct figures {
    uint64_t issued, completed, wrong, failed, tokens;
    uint64_t handed_back, refused, lost; /* attempts that were continued elsewhere */
    uint64_t views, watch_losses;
    uint64_t longest_first_ns; /* issue to first token */
    uint64_t longest_ns, longest_request;
    struct samples {
        uint32_t *us;
        size_t n, cap;
    } gaps, request_gaps; /* between tokens; the longest of each request */
    char first_error[256];
};

struct feeder {
    struct feeder_options options;
    struct event_base *base;
    struct event *tick, *term, *interrupt;
    uint64_t began_ns, stopped_ns; /* 0 = still issuing */

    struct safetensors *reference;
    const int32_t *input, *greedy;
    uint32_t prompts, prompt_tokens, greedy_tokens;

    struct rpc *rpc;
    struct rpc_conn *conn; /* NULL: not connected */
    bool watching;
    uint64_t reconnect_ms;
    uint64_t epoch;
    uint32_t ranks;

    struct target *targets[TARGETS_MAX];
    uint32_t n_targets;
    uint64_t uses;
    struct job *jobs; /* [concurrency] */
    struct figures figures;
    uint64_t status_ms;
    int exit_code;
};

/* watch.c */
int watch_open(struct feeder *f, struct err *err) MUST_CHECK;
void watch_tick(struct feeder *f);

/* targets.c */
/* Replaces what is known of the view. */
void targets_update(struct feeder *f, const char *const *endpoints, const bool *serving, const bool *draining,
                    size_t n);
struct target *target_pick(struct feeder *f); /* connected and least loaded; NULL: nobody now */
int target_send(struct target *t, const char *line);
void target_back_off(struct target *t, uint64_t ms);
void targets_free(struct feeder *f);

/* jobs.c */
int jobs_open(struct feeder *f, struct err *err) MUST_CHECK;
void jobs_pump(struct feeder *f);                                     /* issues and retries what it can */
void jobs_line(struct feeder *f, struct target *t, const char *line); /* a reply */
void jobs_lost(struct feeder *f, struct target *t);                   /* its connection */
uint32_t jobs_active(const struct feeder *f);
void jobs_close(struct feeder *f);

/* report.c */
void figures_gap(struct figures *g, const struct job *job, uint64_t gap_ns);
void figures_request(struct figures *g, const struct job *job);
void figures_done(struct figures *g);
int report_write(struct feeder *f, struct err *err) MUST_CHECK;
void status_write(struct feeder *f);

#endif
