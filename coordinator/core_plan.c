/* Plans: what the planner is asked, and what becomes of its answer.  Part of the coordinator's core; pure.
 *
 *   plan_ask --CA_PLAN--> (some other thread, up to seconds) --CE_PLANNED--> plan_arrived
 *
 * Everything goes on meanwhile.  An operation waits in PHASE_PLAN; when it has ended by then (aborted, a death), the plan is
 * thrown away, and when the map is another one than it was made for, it is asked for again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* The parties, and the present map over them: with empty slots for the joiners. */
static int job_input(const struct coordinator *c, struct plan_input *ret_in)
{
    const struct op_record *r = &c->durable.open;
    int32_t from[RANKS_MAX];
    uint8_t *leaving = calloc(r->n, 1), *joining = calloc(r->n, 1);
    uint32_t *node = calloc(r->n, sizeof(*node));
    for (uint32_t i = 0; i < r->n; i++)
        from[i] = i < r->n_old ? (int32_t)i : -1;
    *ret_in = (struct plan_input){.leaving = leaving, .joining = joining, .node = node};
    if (leaving && joining && node)
        ret_in->now = expert_map_select(c->view->map, from, r->n);
    if (!ret_in->now) {
        plan_input_done(ret_in);
        return ERR_NOMEM;
    }
    for (uint32_t i = 0; i < r->n; i++) {
        leaving[i] = !r->stays[i];
        joining[i] = i >= r->n_old;
        node[i] = r->parties[i].node;
    }
    ret_in->load = balance_load(c);
    if (ret_in->load && (ret_in->samples = load_matrix(&c->load)))
        ret_in->n_samples = load_samples(&c->load);
    return 0;
}

static void job_options(const struct coordinator *c, struct plan_options *options)
{
    plan_options_default(options);
    options->target_balance = c->config.commit_balance;
    options->cross_cost = c->config.cross_cost;
    options->lambda = c->config.lambda;
    options->dip = c->config.dip;
    options->joiners_only = true; /* before the commit only WEIGHTS moves anything in a scale-up */
    options->uneven = !c->config.even_split;
    options->fill = c->durable.open.kind != OP_SCALE_DOWN; /* which ends with its commit */
}

int plan_ask(struct coordinator *c, enum plan_purpose purpose, uint64_t request, double balance, struct err *err)
{
    const struct op_record *r = &c->durable.open;
    struct plan_job *job = calloc(1, sizeof(*job));
    if (!job || job_input(c, &job->in) < 0) {
        free(job);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    job_options(c, &job->options);
    job->seq = ++c->plan_seq;
    job->purpose = purpose;
    job->request = request;
    job->balance = balance;
    job->epoch = c->view->epoch;
    job->map_version = c->view->map->version;
    job->kind = r->kind;
    job->to_joiners = r->kind == OP_SCALE_UP;
    job->from = c->view->n;
    for (uint32_t i = 0; i < r->n; i++)
        job->to += r->stays[i];
    job->expert_bytes = c->durable.model->expert_bytes;
    job->dense_bytes = c->durable.model->dense_bytes * (r->n - r->n_old);
    job->automatic = c->op.automatic;
    core_act(c, CA_PLAN)->job = job;
    return 0;
}

void plan_operation(struct coordinator *c)
{
    struct err err = {0};
    operation_phase(c, PHASE_PLAN, "where the experts go");
    c->op.deadline_ns = c->now_ns + 1000000ULL * c->config.stage_ms;
    if (plan_ask(c, PLAN_OPERATION, 0, 0, &err) < 0) {
        operation_abort(c, "no plan: %s", err.text);
        return;
    }
    c->op.plan_seq = c->plan_seq;
}

/* What a rebalance is to bring: for the mean of the load, and in the mean of its samples. */
static void plan_why(const struct plan_job *job, char *ret_text, size_t size)
{
    const struct plan *p = job->plan;
    char samples[64] = "";
    if (p->samples_before > 0)
        snprintf(samples, sizeof(samples), ", of samples %.3f -> %.3f%s", p->samples_before, p->samples_after,
                 p->joint ? " (jointly)" : "");
    snprintf(ret_text, size, "%sbalance %.3f -> %.3f (at most %.3f)%s, %llu arrivals", job->automatic ? "automatic: " : "",
             p->balance_before, p->balance_after, p->balance_ceiling, samples,
             (unsigned long long)(p->arrivals_before + p->arrivals_after));
}

static void operation_planned(struct coordinator *c, struct plan_job *job)
{
    struct operation *op = &c->op;
    if (op->phase != PHASE_PLAN || op->plan_seq != job->seq || op->plan)
        return; /* the one that asked has ended */
    if (!c->view || c->view->epoch != job->epoch || c->view->map->version != job->map_version) {
        core_log(c, CORE_INFO, "the map has changed while a plan was made: it is made again");
        plan_operation(c);
        return;
    }
    if (job->code < 0) {
        operation_abort(c, "no plan: %s", job->err.text);
        return;
    }
    op->plan = job->plan;
    op->in = job->in;
    op->bytes_planned = plan_job_bytes(job);
    op->round = 0;
    if (job->kind == OP_REBALANCE)
        plan_why(job, op->why, sizeof(op->why));
    job->plan = NULL;
    job->in = (struct plan_input){0};
    operation_next(c);
}

static void dry_run_planned(struct coordinator *c, const struct plan_job *job)
{
    char why[256];
    if (job->code < 0) {
        core_reply(c, job->request, job->code, 0, 0, NULL, "%s", job->err.text);
    } else if (job->kind == OP_REBALANCE) {
        plan_why(job, why, sizeof(why));
        core_reply(c, job->request, 0, 0, OUTCOME_DONE, job->plan, "would move %llu bytes; %s",
                   (unsigned long long)plan_job_bytes(job), why);
    } else {
        core_reply(c, job->request, 0, 0, OUTCOME_DONE, job->plan, "would scale from %u to %u ranks and move %llu bytes",
                   job->from, job->to, (unsigned long long)plan_job_bytes(job));
    }
}

void plan_arrived(struct coordinator *c, struct plan_job *job)
{
    switch (job->purpose) {
    case PLAN_OPERATION:
        operation_planned(c, job);
        break;
    case PLAN_DRY_RUN:
        dry_run_planned(c, job);
        break;
    case PLAN_POLICY:
        balance_planned(c, job);
        break;
    }
}
