/* The coordinator's process: the shipping core over a journal whose writes become durable late, in order, or, at a
 * crash, not at all.  Single thread. */
#include "tests/sim/sim.h"

#include "common/topology_wire.h"
#include "coordinator/durable_wire.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static void reschedule(struct sim *s)
{
    struct sim_process *p = &s->coordinator;
    uint64_t at = coordinator_deadline(p->core);

    p->ticks++;
    p->spins = at <= s->now ? p->spins + 1 : 0;
    if (p->spins > 200)
        sim_fail(s, "the coordinator wants CE_TICK %" PRIu64 " ns ago, again and again: it would spin", s->now - at);
    if (at == UINT64_MAX)
        return;
    sim_push(s, at > s->now ? at - s->now : 1, SE_COORDINATOR_TICK, 0, p->life)->x = p->ticks;
}

static void write_free(struct sim_write *w)
{
    if (w->durable) {
        durable_done(w->durable);
        free(w->durable);
    }
    *w = (struct sim_write){0};
}

static void journal(struct sim *s, struct coordinator_action *action)
{
    struct sim_process *p = &s->coordinator;
    uint64_t at = s->now + sim_between(s, 100 * US, s->disk_max);

    if (p->n_writes == sizeof p->writes / sizeof *p->writes) {
        sim_fail(s, "the coordinator has %u journal writes under way", p->n_writes);
        return;
    }
    if (at <= p->last_durable_at)
        at = p->last_durable_at + 1;
    p->last_durable_at = at;
    p->writes[p->n_writes++] = (struct sim_write){action->seq, action->parts, action->durable};
    action->durable = NULL;
    sim_push(s, at - s->now, SE_DURABLE, 0, p->life);
}

/* Another thread makes it: at once, or it takes so long that something may happen before. */
static void plan(struct sim *s, struct coordinator_action *action)
{
    struct sim_process *p = &s->coordinator;
    uint32_t i = 0;

    while (i < sizeof p->jobs / sizeof *p->jobs && p->jobs[i])
        i++;
    if (i == sizeof p->jobs / sizeof *p->jobs) {
        sim_fail(s, "the coordinator waits for %u plans", i);
        return;
    }
    p->jobs[i] = action->job;
    action->job = NULL;
    sim_push(s, sim_chance(s, 200) ? sim_between(s, 10 * MS, 2000 * MS) : sim_between(s, 100 * US, 10 * MS), SE_PLANNED, 0,
             p->life)->x = i;
}

static void perform(struct sim *s, struct coordinator_action *action)
{
    char text[200];

    switch (action->type) {
    case CA_SEND:
        if (s->recording && action->msg.type != MSG_WELCOME) {
            network_describe(&action->msg, text, sizeof text);
            sim_note(s, "coordinator -> a%02u %s", s->conns[action->conn - 1].agent, text);
        }
        check_coordinator_sends(s, action->conn, &action->msg);
        network_to_agent(s, action->conn, &action->msg);
        scenario_target(s, &action->msg);
        return;
    case CA_CLOSE:
        sim_note(s, "coordinator closes connection %" PRIu64 ": %s", action->conn, action->text);
        if (s->conns[action->conn - 1].at_coordinator) {
            s->conns[action->conn - 1].at_coordinator = false;
            network_break(s, action->conn, false);
        }
        return;
    case CA_JOURNAL: journal(s, action); return;
    case CA_PLAN: plan(s, action); return;
    case CA_REPLY:
        sim_note(s, "coordinator answers request %" PRIu64 ": code %d op %" PRIu64 " %s", action->request, action->code,
                 action->op, action->text);
        scenario_reply(s, action);
        return;
    case CA_CHANGED: return;
    case CA_PHASE: sim_note(s, "coordinator op %" PRIu64 ": %s", action->op, action->text); return;
    case CA_LOG:
        if (action->level >= CORE_INFO)
            sim_note(s, "coordinator says: %s", action->text);
        return;
    }
}

void process_event(struct sim *s, const struct coordinator_event *event)
{
    struct sim_process *p = &s->coordinator;

    if (!p->up)
        return;
    coordinator_step(p->core, s->now, event, &p->actions);
    for (size_t i = 0; i < p->actions.n && !s->failed; i++)
        perform(s, &p->actions.v[i]);
    coordinator_actions_clear(&p->actions);
    reschedule(s);
}

/* A write changes on disk only the parts that it names: a part that the core forgot to name is lost in a crash. */
static void disk_apply(struct sim *s, struct sim_write *w)
{
    struct durable *disk = &s->coordinator.disk, old = *disk;
    struct durable *from = w->durable;

    if (w->parts & DURABLE_META) {
        disk->epoch = from->epoch;
        disk->map_version = from->map_version;
        disk->op = from->op;
        disk->wanted = from->wanted;
        disk->paused = from->paused;
        disk->paused_ms = from->paused_ms;
        memcpy(disk->paused_why, from->paused_why, sizeof disk->paused_why);
    }
    if (w->parts & DURABLE_VIEW) {
        disk->view = from->view;
        from->view = old.view;
    }
    if (w->parts & DURABLE_OP) {
        disk->open = from->open;
        from->open = old.open;
    }
    if (w->parts & DURABLE_COMMIT) {
        disk->commit = from->commit;
        from->commit = old.commit;
    }
    if (w->parts & DURABLE_MODEL) {
        disk->model = from->model;
        from->model = old.model;
    }
    if (w->parts & DURABLE_HISTORY) {
        disk->ended = from->ended;
        from->ended = old.ended;
        if (disk->ended.key[0] && s->n_history < SIM_KEYS &&
            op_record_copy(&s->history[s->n_history], &disk->ended) == 0)
            s->n_history++;
        scenario_ended(s, &disk->ended);
    }
    s->coordinator.disk_used = true;
    check_durable(s, w->parts);
}

static void first_write_durable(struct sim *s)
{
    struct sim_process *p = &s->coordinator;

    if (s->options->sim_bug == SIM_BUG_JOURNAL_REPLAYED) {
        write_free(&p->before);
        p->before = p->last;
        p->last = (struct sim_write){.parts = p->writes[0].parts, .durable = calloc(1, sizeof *p->last.durable)};
        if (!p->last.durable || durable_copy(p->last.durable, p->writes[0].durable) < 0)
            abort();
    }
    disk_apply(s, &p->writes[0]);
    write_free(&p->writes[0]);
    memmove(p->writes, p->writes + 1, --p->n_writes * sizeof *p->writes);
}

void process_durable(struct sim *s, const struct sim_event *e)
{
    struct sim_process *p = &s->coordinator;
    struct coordinator_event event = {.type = CE_JOURNALED, .wall_ms = s->now / MS};

    if (!p->up || p->life != e->life)
        return;
    event.seq = p->writes[0].seq;
    sim_note(s, "journal write %" PRIu64 " (parts %#x) durable", event.seq, p->writes[0].parts);
    first_write_durable(s);
    process_event(s, &event);
}

void process_planned(struct sim *s, const struct sim_event *e)
{
    struct sim_process *p = &s->coordinator;
    struct coordinator_event event = {.type = CE_PLANNED, .wall_ms = s->now / MS};

    if (!p->up || p->life != e->life)
        return;
    event.job = p->jobs[e->x];
    p->jobs[e->x] = NULL;
    plan_job_run(event.job);
    sim_note(s, "plan %" PRIu64 " is made", event.job->seq);
    process_event(s, &event);
    plan_job_free(event.job);
}

static void jobs_drop(struct sim_process *p)
{
    for (size_t i = 0; i < sizeof p->jobs / sizeof *p->jobs; i++) {
        plan_job_free(p->jobs[i]);
        p->jobs[i] = NULL;
    }
}

void process_tick(struct sim *s, const struct sim_event *e)
{
    struct coordinator_event event = {.type = CE_TICK, .wall_ms = s->now / MS};

    if (s->coordinator.up && s->coordinator.life == e->life && s->coordinator.ticks == e->x)
        process_event(s, &event);
}

/* The open operation as the file has it: what its record does not carry is lost. */
static void disk_read(struct sim *s)
{
    struct op_record *open = &s->coordinator.disk.open, read;
    struct err err = {0};
    Pb__OpRecord *pb = open->op ? op_record_to_pb(open) : NULL;

    if (!pb)
        return;
    if (op_record_from_pb(pb, &read, &err) < 0) {
        sim_fail(s, "the open operation cannot be read from the journal: %s", err.text);
    } else {
        op_record_done(open);
        *open = read;
    }
    pb_free(pb);
}

void process_start(struct sim *s)
{
    struct sim_process *p = &s->coordinator;

    p->up = true;
    p->life++;
    p->last_durable_at = 0;
    disk_read(s);
    p->core = coordinator_new(&s->config, p->disk_used ? &p->disk : NULL, s->now);
    if (!p->core) {
        sim_fail(s, "coordinator_new failed");
        return;
    }
    coordinator_plant(p->core, s->options->coordinator_bug);
    sim_note(s,
             "coordinator starts: epoch %" PRIu64 " map %" PRIu64 " open op %" PRIu64 " e%" PRIu64 ", commit e%" PRIu64,
             p->disk.epoch, p->disk.map_version, p->disk.open.op, p->disk.open.epoch, p->disk.commit.epoch);
    reschedule(s);
}

void process_crash(struct sim *s, uint64_t restart_in)
{
    struct sim_process *p = &s->coordinator;
    bool survives = p->n_writes > 0 && sim_chance(s, 500);

    sim_note(s, "COORDINATOR CRASHES%s",
             survives ? ", the write in flight survives" : p->n_writes ? ", writes are lost" : "");
    s->fault_at = s->now;
    p->up = false;
    p->paused_until = 0;
    p->life++;
    jobs_drop(p);
    if (survives)
        first_write_durable(s);
    if (p->before.durable)
        disk_apply(s, &p->before);
    write_free(&p->before);
    write_free(&p->last);
    for (uint32_t i = 0; i < p->n_writes; i++)
        write_free(&p->writes[i]);
    p->n_writes = 0;
    coordinator_free(p->core);
    p->core = NULL;
    s->n_asked = 0;
    for (uint32_t i = 0; i < s->n; i++)
        if (s->agents[i].conn)
            network_break(s, s->agents[i].conn, false);
    for (size_t i = 0; i < s->n_conns; i++)
        s->conns[i].at_coordinator = false;
    sim_push(s, restart_in, SE_COORDINATOR_RESTART, 0, 0);
}

void process_done(struct sim *s)
{
    struct sim_process *p = &s->coordinator;

    coordinator_free(p->core);
    coordinator_actions_done(&p->actions);
    jobs_drop(p);
    for (uint32_t i = 0; i < p->n_writes; i++)
        write_free(&p->writes[i]);
    write_free(&p->before);
    write_free(&p->last);
    durable_done(&p->disk);
    for (uint32_t i = 0; i < s->n_history; i++)
        op_record_done(&s->history[i]);
}
