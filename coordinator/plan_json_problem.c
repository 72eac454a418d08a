/* The input of `eepctl plan`, field by field.  See plan_json_problem.h.  Pure, but for jansson. */
#include "coordinator/plan_json_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_MAX_FIELD 65535 /* of every size in the input */

void problem_done(struct problem *p)
{
    free(p->load);
    free(p->sample);
    expert_map_unref(p->now);
    free(p->leaving);
    free(p->joining);
    free(p->node);
    free(p->number);
    free(p->party);
}

/* ---- fields ---- */

static int field_size(const json_t *input, const char *key, uint32_t min, uint32_t *ret_size, struct err *err)
{
    const json_t *value = json_object_get(input, key);
    if (!value)
        return err_set(err, ERR_INVALID, "`%s` is missing", key);
    json_int_t n = json_integer_value(value);
    if (!json_is_integer(value) || n < min || n > SIZE_MAX_FIELD)
        return err_set(err, ERR_INVALID, "`%s` must be a whole number from %u to %u", key, min, SIZE_MAX_FIELD);
    *ret_size = (uint32_t)n;
    return 0;
}

static int field_size_or(const json_t *input, const char *key, uint32_t min, uint32_t other, uint32_t *ret_size,
                         struct err *err)
{
    if (json_object_get(input, key))
        return field_size(input, key, min, ret_size, err);
    *ret_size = other;
    return 0;
}

static int field_number(const json_t *input, const char *key, double *value, struct err *err)
{
    const json_t *field = json_object_get(input, key);
    if (field && !json_is_number(field))
        return err_set(err, ERR_INVALID, "`%s` must be a number", key);
    if (field)
        *value = json_number_value(field);
    return 0;
}

/* One [layers][logical] matrix of loads. */
static int load_matrix(const struct problem *p, const json_t *matrix, double *ret_load, struct err *err)
{
    if (json_array_size(matrix) != p->layers)
        return err_set(err, ERR_INVALID, "every sample of `load` must have the same %u layers", p->layers);
    for (uint32_t layer = 0; layer < p->layers; layer++) {
        const json_t *row = json_array_get(matrix, layer);
        if (!json_is_array(row) || json_array_size(row) != p->logical)
            return err_set(err, ERR_INVALID, "layer %u of `load` must be an array of %u numbers, one per expert", layer,
                           p->logical);
        for (uint32_t e = 0; e < p->logical; e++) {
            const json_t *value = json_array_get(row, e);
            double load = json_number_value(value);
            if (!json_is_number(value) || !(load >= 0) || !isfinite(load))
                return err_set(err, ERR_INVALID, "`load` of expert %u of layer %u must be a number >= 0", e, layer);
            ret_load[(size_t)layer * p->logical + e] = load;
        }
    }
    return 0;
}

static int problem_load(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *load = json_object_get(input, "load"), *first = json_array_get(load, 0);
    const json_t *row = json_array_get(first, 0);
    bool several = json_is_array(row);
    if (!json_is_array(load) || !json_array_size(load) || !json_is_array(first) || !json_array_size(first) ||
        (several && !json_array_size(row)))
        return err_set(err, ERR_INVALID,
                       "`load` must be [layers][experts], or several of them: "
                       "[samples][layers][experts]");
    p->samples = several ? (uint32_t)json_array_size(load) : 1;
    p->layers = (uint32_t)json_array_size(several ? first : load);
    p->logical = (uint32_t)json_array_size(several ? row : first);
    if (p->layers > SIZE_MAX_FIELD || p->logical > SIZE_MAX_FIELD)
        return err_set(err, ERR_LIMIT, "`load` has %u layers of %u experts: at most %u", p->layers, p->logical,
                       SIZE_MAX_FIELD);
    size_t n = (size_t)p->layers * p->logical;
    p->load = calloc(n, sizeof *p->load);
    p->sample = calloc(n * p->samples, sizeof *p->sample);
    if (!p->load || !p->sample)
        return err_set(err, ERR_NOMEM, "no memory for %u samples of load", p->samples);
    for (uint32_t s = 0; s < p->samples; s++) {
        const json_t *matrix = several ? json_array_get(load, s) : load;
        int rc = load_matrix(p, matrix, p->sample + s * n, err);
        if (rc < 0)
            return several ? err_wrap(err, "sample %u", s) : rc;
        for (size_t i = 0; i < n; i++)
            p->load[i] += p->sample[s * n + i] / p->samples;
    }
    return 0;
}

static int problem_sizes(struct problem *p, const json_t *input, struct err *err)
{
    int rc = field_size(input, "physical", 1, &p->physical, err);
    if (rc == 0)
        rc = field_size(input, "gpus", 1, &p->gpus, err);
    if (rc == 0)
        rc = field_size_or(input, "groups", 1, 1, &p->groups, err);
    if (rc == 0)
        rc = field_size_or(input, "nodes", 1, 1, &p->nodes, err);
    return rc;
}

/* ---- the present map ---- */

static int problem_leave(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *leave = json_object_get(input, "leave"), *value;
    size_t i;
    if (leave && !json_is_array(leave))
        return err_set(err, ERR_INVALID, "`leave` must be an array of rank numbers");
    json_array_foreach(leave, i, value)
    {
        json_int_t rank = json_integer_value(value);
        if (!json_is_integer(value) || rank < 0 || rank >= p->old)
            return err_set(err, ERR_INVALID, "`leave` names a rank that is none of 0 to %u", p->old - 1);
        if (p->leaving[rank])
            return err_set(err, ERR_INVALID, "`leave` names rank %u twice", (unsigned)rank);
        p->leaving[rank] = 1;
    }
    return 0;
}

static int problem_join(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *join = json_object_get(input, "join"), *value;
    size_t i;
    json_array_foreach(join, i, value)
    {
        json_int_t rank = json_integer_value(value);
        if (!json_is_integer(value) || rank < p->old || rank >= p->parties)
            return err_set(err, ERR_INVALID, "`join` must number the %u joiners from %u to %u", p->n_join, p->old,
                           p->parties - 1);
        for (uint32_t other = p->old; other < p->old + i; other++)
            if (p->number[other] == rank)
                return err_set(err, ERR_INVALID, "`join` names rank %u twice", (unsigned)rank);
        p->number[p->old + i] = (uint32_t)rank;
        p->joining[p->old + i] = 1;
    }
    return 0;
}

static int current_layer(struct problem *p, const json_t *row, uint32_t layer, struct err *err)
{
    if (!json_is_array(row) || json_array_size(row) != (size_t)p->old * p->slots)
        return err_set(err, ERR_INVALID, "layer %u of `current` must be an array of %u experts, one per slot", layer,
                       p->old * p->slots);
    for (uint32_t i = 0; i < p->old * p->slots; i++) {
        const json_t *value = json_array_get(row, i);
        json_int_t e = json_integer_value(value);
        if (!json_is_integer(value) || e < -1 || e >= p->logical)
            return err_set(err, ERR_INVALID, "slot %u of layer %u of `current` must be an expert below %u, or -1", i,
                           layer, p->logical);
        size_t at = expert_map_at(p->now, layer, i / p->slots, i % p->slots);
        p->now->held[at] = (int32_t)e;
        p->now->live[at] = e >= 0;
    }
    return 0;
}

/* What lies in a slot of `current` without being routed to, as in the output. */
static int problem_dormant(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *dormant = json_object_get(input, "dormant"), *item;
    size_t i;
    if (dormant && !json_is_array(dormant))
        return err_set(err, ERR_INVALID, "`dormant` must be an array of [layer, slot, expert]");
    json_array_foreach(dormant, i, item)
    {
        json_int_t v[3] = {-1, -1, -1};
        for (size_t k = 0; k < 3 && json_array_size(item) == 3; k++)
            v[k] = json_is_integer(json_array_get(item, k)) ? json_integer_value(json_array_get(item, k)) : -1;
        if (v[0] < 0 || v[0] >= p->layers || v[1] < 0 || v[1] >= (json_int_t)p->old * p->slots)
            return err_set(err, ERR_INVALID, "item %zu of `dormant` names no layer and slot of `current`", i);
        size_t at = expert_map_at(p->now, (uint32_t)v[0], (uint32_t)v[1] / p->slots, (uint32_t)v[1] % p->slots);
        if (p->now->held[at] < 0 || p->now->held[at] != v[2])
            return err_set(err, ERR_INVALID, "item %zu of `dormant` names another expert than `current`", i);
        p->now->live[at] = 0;
    }
    return 0;
}

/* How often each slot of `current` stands in the present map: at least once where something is routed to it. */
static int problem_entries(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *entries = json_object_get(input, "entries");
    uint32_t slots = p->old * p->slots;
    if (entries && json_array_size(entries) != p->layers)
        return err_set(err, ERR_INVALID, "`entries` must be [layers][slots of the present view], like `current`");
    for (uint32_t layer = 0; entries && layer < p->layers; layer++) {
        const json_t *row = json_array_get(entries, layer);
        if (json_array_size(row) != slots)
            return err_set(err, ERR_INVALID, "layer %u of `entries` must be an array of %u numbers, one per slot",
                           layer, slots);
        for (uint32_t i = 0; i < slots; i++) {
            const json_t *value = json_array_get(row, i);
            json_int_t n = json_integer_value(value);
            size_t at = expert_map_at(p->now, layer, i / p->slots, i % p->slots);
            if (!json_is_integer(value) || n < p->now->live[at] || n > (p->now->live[at] ? ENTRIES_MAX : 0))
                return err_set(err, ERR_INVALID,
                               "slot %u of layer %u of `entries` must be 1 to %u where `current` routes to it, else 0",
                               i, layer, ENTRIES_MAX);
            p->now->live[at] = (uint8_t)n;
        }
    }
    int rc = entries ? expert_map_validate(p->now, NULL, err) : 0;
    return rc < 0 ? err_wrap(err, "`entries`") : 0;
}

/* Every expert must be routed to somewhere. */
static int problem_covered(const struct problem *p, struct err *err)
{
    for (uint32_t layer = 0; layer < p->layers; layer++)
        for (uint32_t e = 0; e < p->logical; e++)
            if (expert_map_live_count(p->now, layer, (int32_t)e, NULL) == 0)
                return err_set(err, ERR_INVALID, "expert %u of layer %u is nowhere in `current`: it is lost already", e,
                               layer);
    return 0;
}

/* Nodes hold equally many target ranks, one after the other; a leaver is where the old numbering puts it. */
static void problem_nodes(struct problem *p)
{
    uint32_t per_node = (p->gpus + p->nodes - 1) / p->nodes, target = 0;
    for (uint32_t party = 0; party < p->parties; party++) {
        if (!p->leaving[party])
            p->party[target++] = party;
        p->node[party] = p->leaving[party] ? party / per_node : (target - 1) / per_node;
    }
}

static int problem_parties(struct problem *p, const json_t *input, struct err *err)
{
    p->leaving = calloc(p->parties, 1);
    p->joining = calloc(p->parties, 1);
    p->node = calloc(p->parties, sizeof *p->node);
    p->number = calloc(p->parties, sizeof *p->number);
    p->party = calloc(p->parties, sizeof *p->party);
    p->now = expert_map_new(p->layers, p->logical, p->parties, p->slots);
    if (!p->leaving || !p->joining || !p->node || !p->number || !p->party || !p->now)
        return err_set(err, ERR_NOMEM, "no memory for %u ranks", p->parties);
    for (uint32_t party = 0; party < p->old; party++)
        p->number[party] = party;
    int rc = problem_leave(p, input, err);
    if (rc == 0)
        rc = problem_join(p, input, err);
    uint32_t stay = 0;
    for (uint32_t party = 0; party < p->parties; party++)
        stay += !p->leaving[party];
    if (rc == 0 && stay != p->gpus)
        rc =
            err_set(err, ERR_INVALID, "%u ranks that stay and join are not the %u `gpus` of the target", stay, p->gpus);
    if (rc == 0)
        problem_nodes(p);
    return rc;
}

static int problem_current(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *current = json_object_get(input, "current"), *join = json_object_get(input, "join");
    int rc = field_size(input, "slots_per_rank", 1, &p->slots, err);
    if (rc < 0)
        return rc;
    if (!json_is_array(current) || json_array_size(current) != p->layers)
        return err_set(err, ERR_INVALID,
                       "`current` must be [layers][slots of the present view], with the %u layers "
                       "of `load`",
                       p->layers);
    size_t cells = json_array_size(json_array_get(current, 0));
    if (cells == 0 || cells % p->slots || cells / p->slots > SIZE_MAX_FIELD)
        return err_set(err, ERR_INVALID,
                       "a layer of `current` has %zu slots, which are no ranks of %u "
                       "(`slots_per_rank`)",
                       cells, p->slots);
    if ((uint64_t)p->gpus * p->slots != p->physical)
        return err_set(err, ERR_INVALID, "`physical` is %u, but %u `gpus` of %u `slots_per_rank` are %llu", p->physical,
                       p->gpus, p->slots, (unsigned long long)p->gpus * p->slots);
    if (join && !json_is_array(join))
        return err_set(err, ERR_INVALID, "`join` must be an array of rank numbers");
    p->old = (uint32_t)(cells / p->slots);
    p->n_join = (uint32_t)json_array_size(join);
    p->parties = p->old + p->n_join;
    rc = problem_parties(p, input, err);
    for (uint32_t layer = 0; layer < p->layers && rc == 0; layer++)
        rc = current_layer(p, json_array_get(current, layer), layer, err);
    if (rc == 0)
        rc = problem_dormant(p, input, err);
    if (rc == 0)
        rc = problem_entries(p, input, err);
    if (rc == 0)
        rc = problem_covered(p, err);
    return rc;
}

static int problem_options(struct problem *p, const json_t *input, struct err *err)
{
    const json_t *uneven = json_object_get(input, "uneven");
    plan_options_default(&p->options);
    p->options.uneven = json_is_true(uneven);
    double bytes = 0;
    if (uneven && !json_is_boolean(uneven))
        return err_set(err, ERR_INVALID, "`uneven` must be true or false");
    int rc = field_number(input, "target_balance", &p->options.target_balance, err);
    if (rc == 0)
        rc = field_number(input, "lambda", &p->options.lambda, err);
    if (rc == 0)
        rc = field_number(input, "cross_cost", &p->options.cross_cost, err);
    if (rc == 0)
        rc = field_number(input, "dip", &p->options.dip, err);
    if (rc == 0)
        rc = field_number(input, "expert_bytes", &bytes, err);
    if (rc == 0 && !(bytes >= 0 && bytes <= 1e15))
        rc = err_set(err, ERR_INVALID, "`expert_bytes` must be a number of bytes");
    p->expert_bytes = rc == 0 ? (uint64_t)bytes : 0;
    return rc;
}

int problem_read(struct problem *p, const json_t *input, struct err *err)
{
    if (!json_is_object(input))
        return err_set(err, ERR_INVALID, "the input must be a JSON object");
    int rc = problem_load(p, input, err);
    if (rc == 0)
        rc = problem_sizes(p, input, err);
    if (rc == 0 && p->policy == PLAN_ELASTIC)
        rc = problem_current(p, input, err);
    if (rc == 0 && p->policy == PLAN_ELASTIC)
        rc = problem_options(p, input, err);
    return rc;
}
