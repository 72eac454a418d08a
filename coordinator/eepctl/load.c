/* eepctl load: what the experts were asked for; as JSON a whole problem for `eepctl plan`. */
#include "common/topology_wire.h"
#include "coordinator/eepctl/client.h"

static json_t *tokens_json(const Pb__LoadSample *sample, const struct expert_map *map)
{
    json_t *layers = json_array();
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        json_t *row = json_array();
        for (uint32_t e = 0; e < map->logical; e++) {
            size_t at = (size_t)layer * map->logical + e;
            json_array_append_new(row, json_integer(at < sample->n_tokens ? (json_int_t)sample->tokens[at] : 0));
        }
        json_array_append_new(layers, row);
    }
    return layers;
}

static void map_json(const struct expert_map *map, json_t *out)
{
    json_t *current = json_array(), *dormant = json_array(), *entries = json_array();
    uint32_t slots = map->ranks * map->slots;
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        json_t *row = json_array(), *times = json_array();
        for (uint32_t i = 0; i < slots; i++) {
            size_t at = (size_t)layer * slots + i;
            json_array_append_new(row, json_integer(map->held[at]));
            json_array_append_new(times, json_integer(map->live[at]));
            if (map->held[at] >= 0 && !map->live[at])
                json_array_append_new(dormant, json_pack("[iii]", (int)layer, (int)i, (int)map->held[at]));
        }
        json_array_append_new(current, row);
        json_array_append_new(entries, times);
    }
    json_object_set_new(out, "current", current);
    json_object_set_new(out, "dormant", dormant);
    json_object_set_new(out, "entries", entries);
    json_object_set_new(out, "physical", json_integer(slots));
    json_object_set_new(out, "gpus", json_integer(map->ranks));
    json_object_set_new(out, "slots_per_rank", json_integer(map->slots));
}

/* One line: the fields of `eepctl plan`'s input, and what else is known. */
static int print_json(const Pb__LoadReply *reply)
{
    struct expert_map *map = NULL;
    struct err err;
    if (!reply->map) {
        err_set(&err, ERR_NOTFOUND, "no view is committed yet, so no expert has a load");
        return ctl_fail(&err);
    }
    if (expert_map_from_pb(reply->map, &map, &err) < 0)
        return ctl_fail(&err);
    json_t *out = json_object(), *load = json_array(), *info = json_array();
    for (size_t i = 0; i < reply->n_samples; i++) {
        const Pb__LoadSample *s = reply->samples[i];
        json_array_append_new(load, tokens_json(s, map));
        json_array_append_new(info, json_pack("{sIsIsisIsf}", "age_ms", (json_int_t)s->age_ms, "span_ms",
                                              (json_int_t)s->span_ms, "windows", (int)s->windows, "total",
                                              (json_int_t)s->total, "balance", s->balance));
    }
    if (!reply->n_samples) { /* nothing was counted: one sample of zeros, which is what it is */
        const Pb__LoadSample none = PB__LOAD_SAMPLE__INIT;
        json_array_append_new(load, tokens_json(&none, map));
    }
    json_object_set_new(out, "load", load);
    map_json(map, out);
    json_object_set_new(out, "uneven", json_boolean(reply->uneven));
    json_object_set_new(out, "nodes", json_integer(reply->nodes));
    json_object_set_new(out, "expert_bytes", json_integer((json_int_t)reply->expert_bytes));
    json_object_set_new(out, "samples", info);
    json_object_set_new(out, "horizon_ms", json_integer(reply->horizon_ms));
    json_object_set_new(out, "window_ms", json_integer(reply->window_ms));
    json_object_set_new(out, "balance", json_real(reply->balance));
    json_object_set_new(out, "balance_samples", json_real(reply->balance_samples));
    json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(out);
    expert_map_unref(map);
    return CTL_OK;
}

static void print_table(const Pb__LoadReply *reply)
{
    char a[32], b[32];
    if (!reply->n_samples) {
        printf("no load has been counted within the last %s\n",
               ctl_duration(reply->horizon_ms * UINT64_C(1000000), a, sizeof a));
        return;
    }
    printf("balance %.3f over all samples, %.3f in the mean of each\n", reply->balance, reply->balance_samples);
    for (size_t i = 0; i < reply->n_samples; i++) {
        const Pb__LoadSample *s = reply->samples[i];
        printf("  %s ago, over %s: %llu tokens, balance %.3f\n", ctl_duration(s->age_ms * 1000000, a, sizeof a),
               ctl_duration(s->span_ms * 1000000, b, sizeof b), (unsigned long long)s->total, s->balance);
    }
}

int cmd_load(struct ctl *ctl, int argc, char **argv)
{
    const struct argp argp = {
        .doc =
            "Shows how many tokens the experts got of late, in samples over the coordinator's horizon, and how well "
            "the present placement balances them: the mean load of a rank over the highest, per layer, in the mean.  "
            "With -o json it is a problem for `eepctl plan`.\v"
            "Examples:\n"
            "  eepctl load\n"
            "  eepctl load -o json >load.json; eepctl plan --input load.json\n",
    };
    ctl_parse(ctl, &argp, argc, argv, NULL);
    struct err err;
    Pb__LoadReply *reply;
    if (client_ask(ctl, CONTROL_LOAD, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    int status = CTL_OK;
    if (ctl->output == CTL_JSON)
        status = print_json(reply);
    else
        print_table(reply);
    rpc_unpack_free(&reply->base);
    return status;
}
