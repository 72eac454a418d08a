/* eepctl, the operator's command: what its files share.  One file a command; main.c has their table.
 *
 * Data goes to stdout, progress and errors to stderr.  A command returns one of the exit codes below. */
#ifndef EEP_COORDINATOR_EEPCTL_CTL_H
#define EEP_COORDINATOR_EEPCTL_CTL_H

#include <argp.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "common/err.h"
#include "common/tls.h"
#include "common/topology.h"
#include "control.pb-c.h"

enum ctl_exit {
    CTL_OK = 0,
    CTL_FAILED = 1,
    CTL_USAGE = 2,
    CTL_UNREACHABLE = 3,
    CTL_DENIED = 4,
    CTL_STILL_RUNNING = 5, /* we stopped waiting; the operation goes on */
    CTL_ABORTED = 6,       /* the operation was rolled back */
    CTL_CONFLICT = 7,
};

enum ctl_output { CTL_TABLE, CTL_JSON };

struct ctl {
    const char *coordinator; /* address */
    struct tls_files tls;
    enum ctl_output output;
    struct rpc_client *client; /* connected by the first call */
};

struct ctl_command {
    const char *name;
    int (*run)(struct ctl *ctl, int argc, char **argv); /* argv[0] is "eepctl NAME" */
    const char *description;
};
extern const struct ctl_command ctl_commands[]; /* ended by a NULL name */

int cmd_status(struct ctl *ctl, int argc, char **argv);
int cmd_health(struct ctl *ctl, int argc, char **argv);
int cmd_agents(struct ctl *ctl, int argc, char **argv);
int cmd_scale(struct ctl *ctl, int argc, char **argv);
int cmd_drain(struct ctl *ctl, int argc, char **argv);
int cmd_abort(struct ctl *ctl, int argc, char **argv);
int cmd_pause(struct ctl *ctl, int argc, char **argv);
int cmd_resume(struct ctl *ctl, int argc, char **argv);
int cmd_restart(struct ctl *ctl, int argc, char **argv);
int cmd_watch(struct ctl *ctl, int argc, char **argv);
int cmd_history(struct ctl *ctl, int argc, char **argv);
int cmd_verify(struct ctl *ctl, int argc, char **argv);
int cmd_rebalance(struct ctl *ctl, int argc, char **argv);
int cmd_load(struct ctl *ctl, int argc, char **argv);
int cmd_plan(struct ctl *ctl, int argc, char **argv);
int cmd_model(struct ctl *ctl, int argc, char **argv);
int cmd_kv(struct ctl *ctl, int argc, char **argv);
int cmd_barrier(struct ctl *ctl, int argc, char **argv);
int cmd_version(struct ctl *ctl, int argc, char **argv);

/* ---- arguments (args.c) ---- */
/* Parses a command's own options (argp may have none) and the global ones, which are allowed after the command too.
 * A mistake prints one sentence and ends the process with CTL_USAGE; -h prints the help and ends it with CTL_OK. */
void ctl_parse(struct ctl *ctl, const struct argp *argp, int argc, char **argv, void *input);
extern const struct argp ctl_global_argp; /* input: struct ctl */
char *ctl_help_filter(int key, const char *text, void *input);
/* For parsers: end with a usage error when the text is no such number. */
uint32_t ctl_parse_u32(struct argp_state *state, const char *what, const char *text, uint32_t min, uint32_t max);
uint64_t ctl_parse_u64(struct argp_state *state, const char *what, const char *text);
/* Seconds, with decimals if wanted, as milliseconds: 0 < value <= 1000000 s. */
uint32_t ctl_parse_seconds_ms(struct argp_state *state, const char *what, const char *text);

/* ---- errors (output.c) ---- */
/* "eepctl: <sentence>" to stderr; returns the exit code that goes with it. */
int ctl_fail(const struct err *err);

/* ---- showing (show.c) ---- */
/* Parses --watch and shows once, or again and again; show prints to stdout, or returns an error.  Returns the exit code.
 * doc: the help text. */
int ctl_show(struct ctl *ctl, const char *doc, int argc, char **argv, int (*show)(struct ctl *ctl, struct err *err));
/* An escape sequence to put before a word, and PAINT_END after it; "" when out is no terminal or $NO_COLOR is set. */
enum ctl_paint { PAINT_END, PAINT_GOOD, PAINT_BUSY, PAINT_BAD };
const char *ctl_paint(FILE *out, enum ctl_paint paint);

/* ---- output (output.c) ---- */
void ctl_print_json(json_t *value);                 /* takes the reference */
json_t *ctl_json(const ProtobufCMessage *message);  /* fields by their names in the .proto; see output.c */
json_t *ctl_plan_json(const struct plan *plan);     /* its retirements and moves; parties by number */
const char *ctl_bytes(uint64_t bytes, char *buffer, size_t size); /* "1.5 GiB" */
const char *ctl_duration(uint64_t ns, char *buffer, size_t size); /* "12.3 ms" */
void ctl_wall_time(uint64_t ms, char *text, size_t size); /* UTC, as in ISO 8601 */
const char *ctl_kind(Pb__OpKind kind);
const char *ctl_outcome(Pb__OpOutcome outcome);
/* "scale-up 2 -> 4", with what is known of it. */
void ctl_print_operation(const Pb__Operation *op, FILE *out);
void ctl_print_plan(const Pb__PlanSummary *plan, FILE *out);

/* ---- waiting for an operation (follow.c) ---- */
/* Follows an operation to its end (op 0: the running or the last one), with a progress line; a coordinator that is
 * lost is looked for again for a while.  timeout_ms 0 = none.  Prints how it ended; returns the exit code. */
int ctl_follow(struct ctl *ctl, uint64_t op, uint32_t timeout_ms);
/* How long to look for a lost coordinator while something is under way. */
#define CTL_LOST_MS 60000
#define CTL_RETRY_MS 250
void ctl_sleep_ms(unsigned ms);

/* ---- scaling (scale.c), for scale, drain and rebalance ---- */
struct scale_options {
    bool has_target, dry_run, no_wait, drain, rebalance, engine_abort, engine_continue;
    uint32_t target, wait_agents_ms, timeout_ms, deadline_ms, mib_s;
    const char *key;
    const char *remove[256];
    size_t n_remove;
};
extern const struct argp scale_common_argp; /* input: struct scale_options */
/* Of a command that changes the ranks: the common options and what to do about engines that do not answer. */
#define SCALE_OPTIONS_MAX 16
size_t scale_options_all(const struct argp_option *more, struct argp_option *ret_all); /* [SCALE_OPTIONS_MAX] */
error_t scale_engine_parse(int key, char *arg, struct argp_state *state);
int scale_run(struct ctl *ctl, struct scale_options *options);

#endif
