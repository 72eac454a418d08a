/* The simulator: the shipping cores of coordinator and agent and the engine's gate, with a virtual clock, network,
 * disk, workers, engines, an operator and faults.  One thread, one seeded generator: a seed replays exactly.
 *
 *   sim.c       clock, event heap, generator, the story, one run from a seed
 *   network.c   connections (FIFO, delays, cuts) and the waves between agents
 *   process.c   the coordinator's process: core, journal, crash and restart
 *   agent.c     the agents' processes: core, page writes, crash and restart; state record, re-adoption
 *   worker.c    allocation, groups, transfers: what every slot really holds
 *   engine.c    engines: the gate one atomic step at a time, all-to-all steps, waves, requests
 *   check.c     the invariants (listed there), checked where the thing that could break them happens
 *   load.c      what agents report of the load of their experts
 *   scenario.c  what a seed means: sizes, delays, the operator's commands, faults, the quiet at the end
 *   main.c      the command line */
#ifndef EEP_TESTS_SIM_H
#define EEP_TESTS_SIM_H

#include "agent/core.h"
#include "agent/libeep/gate.h"
#include "coordinator/core.h"

#define SIM_AGENTS_MAX 64
#define SIM_BEGUN 8      /* steps that an engine remembers having begun */
#define SIM_STEPS 32768  /* ring of steps, by number: four repairs, and the longest lead of each */
#define SIM_KEYS 16
#define SIM_RESETS 40    /* so many repairs in SIM_RESETS_NS are a loop */
#define SIM_RESETS_NS (2000 * MS)
#define SIM_GARBAGE (-2) /* a slot that is being written, or was left half written */
#define US ((uint64_t)1000)
#define MS ((uint64_t)1000000)

enum sim_event_kind {
    SE_TO_COORDINATOR = 1, SE_TO_AGENT, SE_CUT_COORDINATOR, SE_CUT_AGENT, SE_CONNECT,
    SE_COORDINATOR_TICK, SE_DURABLE, SE_PLANNED, SE_COORDINATOR_CRASH, SE_COORDINATOR_RESTART,
    SE_AGENT_TICK, SE_AGENT_CALL, SE_BELL, SE_PEER_WAVE, SE_AGENT_RESTART, SE_AGENT_CRASH, SE_AGENT_LOSE,
    SE_WORK_END, SE_MOVE_BEGIN, SE_MOVE_END,
    SE_ENGINE, SE_STEP_END, SE_DEVICE_DONE, SE_REVOKE, SE_ENGINE_DEATH, SE_ENGINE_FAILS, SE_ATTACH, SE_DRAIN_DEADLINE,
    SE_RESUME, SE_ORPHAN,
    SE_OPERATOR, SE_FAULT, SE_REQUEST, SE_PROBE, SE_LOAD,
};

struct sim_event {
    uint64_t at, seq;
    enum sim_event_kind kind;
    uint32_t agent;
    uint64_t life;       /* of the actor; an event for an earlier life is void */
    uint64_t x, y, z, epoch;
    uint64_t engine_life; /* SE_AGENT_CALL: of the engine that calls; 0 = not from an engine */
    enum agent_event_type call;
    int code;
    struct msg *msg;     /* owned, or NULL */
};

/* A mistake of an engine, or of an agent's edge, planted by the simulator itself. */
enum sim_bug {
    SIM_BUG_NONE = 0,
    SIM_BUG_WAVE_BYPASSES_GATE,
    SIM_BUG_GATE_BEFORE_INTENT,
    SIM_BUG_FIRST_STEP_NOT_FORCED,
    SIM_BUG_RECORD_AFTER_ACTIONS, /* the state record is written after the actions of its step */
    SIM_BUG_READOPT_NEW_PAGE,     /* a re-adopting agent begins with the page of a new incarnation */
    SIM_BUG_JOURNAL_REPLAYED,     /* recovery applies a record of the journal a second time, after later ones */
};

struct sim_options {
    uint64_t seeds, first, max_events;
    uint32_t agents_min, agents_max;
    bool faults, verbose, expect_violation;
    enum agent_bug agent_bug;
    enum coordinator_bug coordinator_bug;
    enum sim_bug sim_bug;
    const char *bug_name;
};

struct sim_conn {
    uint32_t agent;
    bool at_agent, at_coordinator; /* open on this side */
    uint64_t to_agent_at, to_coordinator_at; /* last delivery planned: FIFO */
};

struct sim_write { /* one journal write that is not durable yet */
    uint64_t seq;
    unsigned parts;
    struct durable *durable;
};

struct sim_process { /* the coordinator's */
    bool up;
    uint64_t life, ticks, spins, paused_until;
    struct coordinator *core;
    struct coordinator_actions actions;
    struct durable disk;
    bool disk_used;
    struct sim_write writes[256];
    struct sim_write last, before; /* copies of the last two that became durable, for a planted mistake */
    uint32_t n_writes;
    uint64_t last_durable_at;
    struct plan_job *jobs[64]; /* plans that are being made */
};

enum engine_pc { ENGINE_NONE = 0, ENGINE_BOUNDARY, ENGINE_SLEEPING, ENGINE_ANNOUNCED, ENGINE_IN_STEP };

struct sim_begun { /* a step that an engine has begun: what it reads, and where */
    uint64_t step, view;
    bool launched; /* the processor has gone on, the device is still at it (or waits for the peers) */
    struct expert_map *map;
};

struct sim_engine {
    enum engine_pc pc;
    bool said;              /* its agent knows it: attached, not yet detached */
    bool orphan;            /* its agent's process is gone and may come back for it */
    uint64_t orphans;       /* how often */
    uint64_t orphan_at;
    uint64_t wave_view, wave_step; /* the last wave that it started, to be told again */
    uint64_t mute_at;       /* from then on it answers neither prepare nor drain; 0 = never */
    bool draining, wake;    /* wake: the eventfd is readable */
    uint64_t life, turn;    /* turn: of the loop; an older SE_ENGINE is void */
    struct gate_local local;
    uint64_t requests;      /* steps that its requests still need */
    bool flip, wave_start;
    uint64_t step;          /* in or announced */
    uint64_t revoked;       /* told to leave views up to this one */
    uint64_t broken;        /* a step of this view failed: the next one is awaited */
    uint64_t busy_until;    /* its stepping thread is elsewhere: no boundary before this */
    bool launching;         /* in a step that it launches without waiting for its peers */
    uint64_t device_at;     /* when the last step leaves the device: in order */
    struct view *views[3];  /* AA_ENGINE_COMMIT, newest first */
    struct expert_map *map, *pending;
    struct sim_begun begun[SIM_BEGUN];
    uint32_t n_begun;
    bool release_asked;
};

struct sim_agent {
    uint32_t index;
    bool up;                /* false: the process is dead; its engine may still be running for a moment */
    bool away;              /* not up, but what it held is kept: the next process may re-adopt it */
    struct agent_record record; /* as last kept */
    uint32_t die_after;     /* the process dies before the action that makes this 0 */
    bool dying;
    uint64_t wave_epoch, wave_step; /* what it told its peers last: said again to one that connects anew */
    uint64_t life, ticks, spins, incarnation, conn;
    uint64_t blocked_until; /* partition: no connection before this */
    uint64_t paused_until;  /* SIGSTOP: nothing of the process happens before this; its engine runs on */
    uint64_t clock_offset;  /* its clock is that of the simulation, shifted ... */
    int64_t clock_ppm;      /* ... and fast or slow by this */
    struct agent_core *core;
    struct agent_actions actions[8];
    uint32_t depth;
    struct control_page page;
    bool bell, stopping, exits;
    /* worker */
    struct work *queue[64];
    uint32_t n_queue;
    bool working;
    uint64_t work_life;
    uint32_t moves_left;
    int work_code;
    int32_t *content;       /* [layers][slots]; -1 nothing */
    bool dense;
    int corrupt, fail;      /* the next so many transfers, works go wrong */
    struct sim_engine engine;
    /* what it has promised, for check.c */
    uint64_t promised, limit, left_at, acked_map, acked_step, last_begun;
    bool promised_reset, has_left;
};

struct sim_commit { /* a durable decision */
    uint64_t epoch, step;
    uint32_t kind;
    bool start; /* of a cold start: the first view, or the one after a view that was given up */
    struct view *view;
};

struct sim_step {
    uint64_t step, view, version, digest;
    uint32_t begun;
    bool met, any_work;
};

struct sim_key {
    char key[OP_KEY_MAX];
    uint64_t op;
};

struct sim {
    const struct sim_options *options;
    uint64_t seed, random, now, seq, n_events;
    struct sim_event *heap;
    size_t n_heap, cap_heap;
    bool recording, failed, faulty, ended, ended_lost;
    char violation[512];
    /* the story */
    char (*ring)[280];
    uint64_t n_notes;
    /* the scenario */
    uint32_t n, layers, logical, slots, first_ranks;
    uint64_t delay_min, delay_max, disk_max, step_ns, transfer_max;
    uint32_t p_interleave, p_duplicate, p_target, p_zombie, dispatch; /* p_: in 1000 */
    bool run_ahead, calm, final_done, wire, careless, drift;
    uint32_t p_mute;         /* engines that become mute, at once or after a while */
    bool prepare_blocks;     /* an engine waits for a mute peer for ever, and does not say so in time */
    bool restarts;           /* the operator gives views up, lost ones and others */
    uint32_t ahead;          /* steps that an engine launches before the peers have come to the first of them */
    uint32_t pair[2];        /* engines that cannot talk to each other (until the calm), if p_pair */
    uint32_t p_pair;
    uint64_t quick_attach;
    struct coordinator_config config;
    uint32_t ops_left;
    uint64_t request, calm_at, probes, quiet_probes, final_request, final_op, fault_at;
    uint32_t final_target, n_requests, last_target;
    int final_stage;
    char last_key[OP_KEY_MAX];
    struct op_record history[SIM_KEYS]; /* ended operations with a key, as the journal has them */
    uint32_t n_history;
    struct sim_key keys[SIM_KEYS];
    struct { uint64_t request; int key; } asked[32];
    uint32_t n_keys, n_asked;
    uint64_t load_every, loads; /* ns between reports of load, 0 = there are none; reports so far */
    uint64_t rebalances;        /* that have ended as done */
    uint64_t reloads;           /* pieces of work in which lost experts were read again */
    uint64_t masked;            /* views that were decided without some experts */
    uint64_t copies, lends;     /* experts that were read out of memory, and from the checkpoint of another */
    uint64_t left_out;       /* operations that went on without a rank */
    uint64_t restart_request, given_up; /* the last one; views that were given up, by whomever */
    uint64_t ops_done, ops_aborted, ops_refused, flips, resets, reset_times[SIM_RESETS];
    /* the world */
    struct sim_process coordinator;
    struct sim_agent *agents; /* [n] */
    struct sim_conn *conns;
    size_t n_conns, cap_conns;
    struct sim_commit *commits;
    size_t n_commits, cap_commits;
    struct sim_step *steps; /* [SIM_STEPS] */
    uint64_t max_prepared, prepared_op, max_map, max_map_digest, aborted[64];
    uint32_t n_aborted, prepared_kind;
    uint8_t *covered; /* [layers][logical] under the last durable view */
    uint64_t losses, losses_covered;
    struct model *model;
};

/* sim.c */
bool sim_run(const struct sim_options *options, uint64_t seed, bool record, struct sim *ret_sim);
void sim_done(struct sim *s);
uint64_t sim_random(struct sim *s);
uint64_t sim_between(struct sim *s, uint64_t low, uint64_t high); /* inclusive */
bool sim_chance(struct sim *s, uint32_t per_mille);
struct sim_event *sim_push(struct sim *s, uint64_t delay, enum sim_event_kind kind, uint32_t agent, uint64_t life);
void sim_note(struct sim *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void sim_fail(struct sim *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void sim_print_story(const struct sim *s);
uint64_t sim_clock(const struct sim *s, const struct sim_agent *a);             /* the agent's own */
uint64_t sim_clock_delay(const struct sim *s, const struct sim_agent *a, uint64_t at); /* until its clock shows `at` */

/* network.c */
void network_connect(struct sim *s, struct sim_agent *a);
void network_to_agent(struct sim *s, uint64_t conn, const struct msg *msg);
void network_to_coordinator(struct sim *s, struct sim_agent *a, const struct msg *msg);
void network_break(struct sim *s, uint64_t conn, bool half_open);
void network_arrived(struct sim *s, struct sim_event *e);
void network_describe(const struct msg *msg, char *ret_text, size_t size);

/* process.c */
void process_start(struct sim *s);
void process_crash(struct sim *s, uint64_t restart_in);
void process_event(struct sim *s, const struct coordinator_event *event);
void process_durable(struct sim *s, const struct sim_event *e);
void process_planned(struct sim *s, const struct sim_event *e);
void process_tick(struct sim *s, const struct sim_event *e);
void process_done(struct sim *s);

/* agent.c */
void agent_start(struct sim *s, struct sim_agent *a);
void agent_crash(struct sim *s, struct sim_agent *a, uint64_t restart_in);
void agent_lose(struct sim *s, struct sim_agent *a, uint64_t restart_in); /* the process only: what it holds is kept */
bool agent_lives(const struct sim_agent *a); /* this incarnation: its weights are there, its engine may step */
void agent_event(struct sim *s, struct sim_agent *a, struct agent_event *event);
void agent_call(struct sim *s, const struct sim_event *e);
void agent_tick(struct sim *s, const struct sim_event *e);
void agent_ring(struct sim *s, struct sim_agent *a);
void agent_done(struct sim *s, struct sim_agent *a);
struct sim_agent *agent_of(struct sim *s, const struct member *member); /* by id; NULL when unknown */
bool agent_is(const struct sim_agent *a, const struct member *member);  /* this incarnation, alive */
/* It has the checkpoint. */
static inline bool agent_can_load(const struct sim *s, const struct sim_agent *a)
{
    return a->index <= s->first_ranks || a->index % 2;
}

/* worker.c */
void worker_add(struct sim *s, struct sim_agent *a, struct work *work); /* takes what it owns */
void worker_stop_op(struct sim *s, struct sim_agent *a, uint64_t op);
void worker_event(struct sim *s, const struct sim_event *e);
void worker_clear(struct sim_agent *a);

/* engine.c */
void engine_attach(struct sim *s, struct sim_agent *a);
bool engine_fails(struct sim *s, struct sim_agent *a); /* its step fails by itself; false: it is in none */
void engine_death(struct sim *s, struct sim_agent *a, const char *why, bool tell);
void engine_wake(struct sim *s, struct sim_agent *a);
void engine_turn(struct sim *s, struct sim_agent *a); /* one atomic step of its loop */
bool engine_interleave(struct sim *s, struct sim_agent *a);
void engine_action(struct sim *s, struct sim_agent *a, struct agent_action *action);
void engine_event(struct sim *s, const struct sim_event *e);
bool engine_takes_requests(struct sim *s, const struct sim_agent *a);
void engine_request(struct sim *s, struct sim_agent *a, uint64_t steps);
void engine_forget(struct sim_agent *a);
void engine_attached(struct sim *s, struct sim_agent *a); /* the agent has taken it: it may step */
void engine_orphaned(struct sim *s, struct sim_agent *a);

/* check.c */
void check_coordinator_sends(struct sim *s, uint64_t conn, const struct msg *msg);
void check_agent_sends(struct sim *s, struct sim_agent *a, const struct msg *msg);
void check_agent_receives(struct sim *s, struct sim_agent *a, const struct msg *msg);
void check_gate_store(struct sim *s, struct sim_agent *a, uint64_t value);
void check_durable(struct sim *s, unsigned parts);
void check_begin(struct sim *s, struct sim_agent *a);
void check_destroy(struct sim *s, struct sim_agent *a, uint32_t layer, uint32_t slot, const char *by);
/* Of some expert of the committed view.  careful: those who were asked to stop do not count as holders. */
bool check_last_copy(struct sim *s, const struct sim_agent *a, bool careful);
bool check_is_quiet(struct sim *s, char *ret_why, size_t size);
const struct sim_commit *check_commit(const struct sim *s, uint64_t epoch);
struct sim_step *check_step(struct sim *s, uint64_t step);
bool check_void(const struct sim *s, const struct sim_agent *a, uint64_t view);
bool check_given_up(const struct sim *s, uint64_t view); /* another cold start was decided since */

/* load.c */
void load_start(struct sim *s);   /* what the seed means: is load reported, does the coordinator rebalance by itself */
void load_report(struct sim *s);  /* every agent of the view says what its slots got */

/* scenario.c */
void scenario_start(struct sim *s);
void scenario_event(struct sim *s, const struct sim_event *e);
void scenario_reply(struct sim *s, const struct coordinator_action *reply);
void scenario_ended(struct sim *s, const struct op_record *record); /* the journal has its end */
void scenario_target(struct sim *s, const struct msg *msg); /* a message of the commit: a good moment for a fault */

#endif
