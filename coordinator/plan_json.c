/* The planners behind JSON: the answers.  Pure, but for jansson.  The input is read in plan_json_problem.c. */
#include "coordinator/plan_json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/plan_json_problem.h"
#include "coordinator/planner_eplb.h"

static json_t *matrix_json(const int32_t *cells, uint32_t rows, uint32_t columns)
{
    json_t *matrix = json_array();
    for (uint32_t row = 0; row < rows; row++) {
        json_t *line = json_array();
        for (uint32_t i = 0; i < columns; i++)
            json_array_append_new(line, json_integer(cells[(size_t)row * columns + i]));
        json_array_append_new(matrix, line);
    }
    return matrix;
}

static json_t *logcnt_json(const int32_t *phy2log, const struct problem *p)
{
    int32_t *count = calloc((size_t)p->layers * p->logical, sizeof *count);
    if (!count)
        return NULL;
    for (size_t i = 0; i < (size_t)p->layers * p->physical; i++)
        if (phy2log[i] >= 0)
            count[i / p->physical * p->logical + (size_t)phy2log[i]]++;
    json_t *matrix = matrix_json(count, p->layers, p->logical);
    free(count);
    return matrix;
}

/* Mean over layers of the mean load of a rank over the highest.  entries: NULL = even shares. */
static double balance_of(const struct problem *p, const int32_t *phy2log, const int32_t *entries, const double *load)
{
    double sum = 0, share[p->logical];
    uint32_t slots = p->physical / p->gpus;
    for (uint32_t layer = 0; layer < p->layers; layer++) {
        const int32_t *row = phy2log + (size_t)layer * p->physical;
        const int32_t *times = entries ? entries + (size_t)layer * p->physical : NULL;
        const double *w = load + (size_t)layer * p->logical;
        double total = 0, peak = 0;
        memset(share, 0, sizeof share);
        for (uint32_t i = 0; i < p->physical; i++)
            if (row[i] >= 0)
                share[row[i]] += times ? times[i] : 1;
        for (uint32_t e = 0; e < p->logical; e++) {
            total += w[e];
            share[e] = share[e] > 0 ? w[e] / share[e] : 0;
        }
        for (uint32_t rank = 0; rank < p->gpus; rank++) {
            double mine = 0;
            for (uint32_t i = rank * slots; i < (rank + 1) * slots; i++)
                mine += row[i] >= 0 ? share[row[i]] * (times ? times[i] : 1) : 0;
            peak = fmax(peak, mine);
        }
        sum += peak > 0 ? total / p->gpus / peak : 1;
    }
    return sum / p->layers;
}

/* The final map against each sample, when there are several. */
static json_t *samples_json(const struct problem *p, const int32_t *phy2log, const int32_t *entries)
{
    json_t *list = json_array();
    for (uint32_t s = 0; s < p->samples; s++)
        json_array_append_new(
            list, json_real(balance_of(p, phy2log, entries, p->sample + (size_t)s * p->layers * p->logical)));
    return list;
}

static int out_of_memory(struct err *err)
{
    return err_set(err, ERR_NOMEM, "no memory for the answer");
}

static int answer_eplb(const struct problem *p, json_t **ret_output, struct err *err)
{
    size_t n = (size_t)p->layers * p->logical;
    float *load = calloc(n, sizeof *load);
    int32_t *phy2log = calloc((size_t)p->layers * p->physical, sizeof *phy2log);
    uint32_t *logcnt = calloc(n, sizeof *logcnt);
    int rc = load && phy2log && logcnt ? 0 : out_of_memory(err);
    for (size_t i = 0; i < n && rc == 0; i++)
        load[i] = (float)p->load[i];
    struct eplb_input in = {.layers = p->layers,
                            .logical = p->logical,
                            .physical = p->physical,
                            .groups = p->groups,
                            .nodes = p->nodes,
                            .gpus = p->gpus,
                            .load = load};
    if (rc == 0)
        rc = eplb_place(&in, phy2log, logcnt, err);
    if (rc == 0) {
        json_t *out = json_object();
        json_object_set_new(out, "phy2log", matrix_json(phy2log, p->layers, p->physical));
        json_object_set_new(out, "logcnt", logcnt_json(phy2log, p));
        json_object_set_new(out, "balance_after", json_real(balance_of(p, phy2log, NULL, p->load)));
        if (p->samples > 1)
            json_object_set_new(out, "balance_samples", samples_json(p, phy2log, NULL));
        *ret_output = out;
    }
    free(load);
    free(phy2log);
    free(logcnt);
    return rc;
}

/* What the target's ranks route to, from a map over parties, [layers][physical], and how often: one behind the other.
 */
static int32_t *target_rows(const struct problem *p, const struct expert_map *map)
{
    size_t n = (size_t)p->layers * p->physical;
    int32_t *phy2log = calloc(2 * n, sizeof *phy2log);
    for (size_t i = 0; phy2log && i < n; i++) {
        uint32_t layer = (uint32_t)(i / p->physical), slot = (uint32_t)(i % p->physical);
        size_t at = expert_map_at(map, layer, p->party[slot / p->slots], slot % p->slots);
        phy2log[i] = map->live[at] ? map->held[at] : -1;
        phy2log[n + i] = map->live[at];
    }
    return phy2log;
}

static json_t *dormant_json(const struct problem *p, const struct expert_map *map)
{
    json_t *list = json_array();
    for (uint32_t layer = 0; layer < p->layers; layer++) {
        for (uint32_t i = 0; i < p->physical; i++) {
            size_t at = expert_map_at(map, layer, p->party[i / p->slots], i % p->slots);
            if (map->held[at] >= 0 && !map->live[at])
                json_array_append_new(list, json_pack("[iii]", (int)layer, (int)i, (int)map->held[at]));
        }
    }
    return list;
}

static json_t *moves_json(const struct problem *p, const struct plan *plan)
{
    json_t *list = json_array();
    uint32_t *target = calloc(p->parties, sizeof *target);
    for (uint32_t rank = 0; target && rank < p->gpus; rank++)
        target[p->party[rank]] = rank;
    for (uint32_t i = 0; target && i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        json_array_append_new(list, json_pack("[iiiii]", (int)m->layer, (int)(target[m->dst] * p->slots + m->dst_slot),
                                              (int)p->number[m->src], (int)m->expert, (int)m->round));
    }
    free(target);
    return list;
}

static void report_json(const struct problem *p, const struct plan *plan, json_t *out)
{
    /* without a change of ranks there is no commit: the plan is through when its rounds are */
    bool commits = plan->rounds_before > 0 || p->gpus != p->old;
    uint64_t total = plan->arrivals_before + plan->arrivals_after, before = commits ? plan->arrivals_before : total;
    uint32_t rounds = plan->rounds_before + plan->rounds_after;
    json_object_set_new(out, "rounds_before_commit", json_integer(commits ? plan->rounds_before : rounds));
    json_object_set_new(out, "rounds_after_commit", json_integer(commits ? plan->rounds_after : 0));
    json_object_set_new(out, "arrivals_before_commit", json_integer((json_int_t)before));
    json_object_set_new(out, "arrivals_total", json_integer((json_int_t)total));
    json_object_set_new(out, "bytes_before_commit", json_integer((json_int_t)(before * p->expert_bytes)));
    json_object_set_new(out, "bytes_total", json_integer((json_int_t)(total * p->expert_bytes)));
    json_object_set_new(out, "bounds",
                        json_pack("{sIsIsI}", "hard", (json_int_t)plan->bound_hard, "fill",
                                  (json_int_t)plan->bound_fill, "balance", (json_int_t)plan->bound_balance));
    json_object_set_new(out, "balance_before", json_real(plan->balance_before));
    json_object_set_new(out, "balance_at_commit", json_real(commits ? plan->balance_at_commit : plan->balance_after));
    json_object_set_new(out, "balance_after", json_real(plan->balance_after));
    json_object_set_new(out, "balance_ceiling", json_real(plan->balance_ceiling));
}

static int answer_plan(const struct problem *p, const struct plan_input *in, const struct plan *plan,
                       json_t **ret_output, struct err *err)
{
    bool commits = plan->rounds_before > 0 || p->gpus != p->old;
    struct expert_map *commit =
        plan_map_after(in, plan, commits ? plan->rounds_before : plan->rounds_before + plan->rounds_after);
    int32_t *at_commit = commit ? target_rows(p, commit) : NULL, *after = target_rows(p, plan->target);
    size_t cells = (size_t)p->layers * p->physical;
    expert_map_unref(commit);
    json_t *out = at_commit && after ? json_object() : NULL;
    if (out) {
        json_object_set_new(out, "phy2log", matrix_json(after, p->layers, p->physical));
        json_object_set_new(out, "logcnt", logcnt_json(after, p));
        json_object_set_new(out, "phy2log_at_commit", matrix_json(at_commit, p->layers, p->physical));
        if (p->options.uneven) {
            json_object_set_new(out, "entries", matrix_json(after + cells, p->layers, p->physical));
            json_object_set_new(out, "entries_at_commit", matrix_json(at_commit + cells, p->layers, p->physical));
        }
        json_object_set_new(out, "dormant", dormant_json(p, plan->target));
        json_object_set_new(out, "moves", moves_json(p, plan));
        report_json(p, plan, out);
        if (p->samples > 1) {
            json_object_set_new(out, "balance_samples", samples_json(p, after, after + cells));
            json_object_set_new(out, "balance_samples_before", json_real(plan->samples_before));
            json_object_set_new(out, "balance_samples_after", json_real(plan->samples_after));
            json_object_set_new(out, "jointly", json_boolean(plan->joint));
        }
    }
    free(at_commit);
    free(after);
    if (!out)
        return out_of_memory(err);
    *ret_output = out;
    return 0;
}

static int answer_elastic(const struct problem *p, json_t **ret_output, struct err *err)
{
    struct plan_input in = {.now = p->now,
                            .leaving = p->leaving,
                            .joining = p->joining,
                            .node = p->nodes > 1 ? p->node : NULL,
                            .load = p->load,
                            .samples = p->sample,
                            .n_samples = p->samples > 1 ? p->samples : 0};
    struct plan *plan = NULL;
    int rc = plan_make_window(&in, &p->options, &plan, err);
    if (rc == 0)
        rc = plan_validate(&in, plan, err);
    if (rc == 0)
        rc = answer_plan(p, &in, plan, ret_output, err);
    plan_unref(plan);
    return rc;
}

int plan_json(enum plan_policy policy, const json_t *input, json_t **ret_output, struct err *err)
{
    struct problem p = {.policy = policy};
    int rc = problem_read(&p, input, err);
    if (rc == 0)
        rc = policy == PLAN_EPLB ? answer_eplb(&p, ret_output, err) : answer_elastic(&p, ret_output, err);
    problem_done(&p);
    return rc;
}
