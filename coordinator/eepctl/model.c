/* eepctl model: what is in a checkpoint folder, and what of it each rank would hold.  Asks no coordinator; reads the
 * headers of the files, never the weights. */
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint.h"
#include "coordinator/eepctl/ctl.h"
#include "coordinator/eepctl/table.h"

struct model_arguments {
    const char *verb, *dir;
    uint32_t ranks;
};

/* What a rank holds when so many share the experts. */
struct share {
    uint32_t ranks, slots;
    uint64_t bytes;
};

struct inspected {
    const char *dir;
    struct checkpoint *c;
    struct checkpoint_info info;
    struct manifest manifest; /* with one slot: a part's tensors are those of one expert */
    struct share shares[16];
    size_t n_shares;
};

static uint64_t rank_bytes(const struct manifest *m, uint32_t slots)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < m->n_regions; i++)
        sum += m->regions[i].kind == REGION_EXPERT ? slots * m->regions[i].stride : m->regions[i].bytes;
    return sum;
}

static void share_add(struct inspected *in, uint32_t ranks)
{
    uint32_t slots = (in->manifest.logical + ranks - 1) / ranks;
    in->shares[in->n_shares++] = (struct share){ranks, slots, rank_bytes(&in->manifest, slots)};
}

static int inspect(const struct model_arguments *o, struct inspected *ret_in, struct err *err)
{
    struct inspected in = {.dir = o->dir};
    int rc = checkpoint_open(o->dir, &in.c, err);
    if (rc < 0)
        return rc;
    checkpoint_info(in.c, &in.info);
    rc = checkpoint_manifest(in.c, 1, &in.manifest, err);
    if (rc < 0) {
        checkpoint_close(in.c);
        return rc;
    }
    for (uint32_t n = 1; !o->ranks && n <= in.manifest.logical && n <= RANKS_MAX; n *= 2)
        share_add(&in, n);
    if (o->ranks)
        share_add(&in, o->ranks);
    *ret_in = in;
    return 0;
}

/* ---- output ---- */

static json_t *tensor_json(const struct region *r, const struct tensor *t)
{
    json_t *shape = json_array();
    for (uint32_t d = 0; d < t->dims; d++)
        json_array_append_new(shape, json_integer((json_int_t)t->shape[d]));
    return json_pack("{s:s, s:s, s:o, s:I}", "name", r->part, "dtype", t->dtype, "shape", shape, "bytes",
                     (json_int_t)r->slot_bytes);
}

static const struct region *part_of(const struct inspected *in, uint32_t tensor)
{
    const struct region *r = &in->manifest.regions[in->manifest.tensors[tensor].region];
    return r->kind == REGION_EXPERT && r->layer == 0 ? r : NULL;
}

static void print_json(const struct inspected *in)
{
    const struct checkpoint_info *info = &in->info;
    json_t *parts = json_array(), *numbers = json_array(), *shares = json_array();
    for (uint32_t i = 0; i < in->manifest.n_tensors; i++)
        if (part_of(in, i))
            json_array_append_new(parts, tensor_json(part_of(in, i), &in->manifest.tensors[i]));
    for (uint32_t i = 0; i < in->manifest.layers; i++)
        json_array_append_new(numbers, json_integer(info->layer_numbers[i]));
    for (size_t i = 0; i < in->n_shares; i++)
        json_array_append_new(shares,
                              json_pack("{s:i, s:i, s:I}", "ranks", (int)in->shares[i].ranks, "slots",
                                        (int)in->shares[i].slots, "bytes_per_rank", (json_int_t)in->shares[i].bytes));
    json_t *out =
        json_pack("{s:s, s:i, s:i, s:I, s:I, s:o}", "model_type", info->model_type, "moe_layers",
                  (int)in->manifest.layers, "logical_experts", (int)in->manifest.logical, "expert_bytes",
                  (json_int_t)info->expert_bytes, "dense_bytes", (json_int_t)info->dense_bytes, "parts", parts);
    json_object_update_new(out, json_pack("{s:i, s:o, s:I, s:i, s:I, s:I, s:I, s:I, s:o}", "hidden_layers",
                                          (int)info->hidden_layers, "moe_layer_numbers", numbers, "dense_tensors",
                                          (json_int_t)info->dense_tensors, "mtp_layers", (int)info->apart_layers,
                                          "mtp_tensors", (json_int_t)info->apart_tensors, "mtp_bytes",
                                          (json_int_t)info->apart_bytes, "files", (json_int_t)info->files, "bytes",
                                          (json_int_t)info->bytes, "ranks", shares));
    ctl_print_json(out);
}

static void print_parts(const struct inspected *in)
{
    struct table table;
    char bytes[32];
    table_init(&table, (const char *const[]){"PART", "DTYPE", "SHAPE", "BYTES", NULL});
    for (uint32_t i = 0; i < in->manifest.n_tensors; i++) {
        const struct tensor *t = &in->manifest.tensors[i];
        const struct region *r = part_of(in, i);
        char shape[160] = "";
        size_t n = 0;
        if (!r)
            continue;
        for (uint32_t d = 0; d < t->dims; d++)
            n += (size_t)snprintf(shape + n, sizeof shape - n, "%s%llu", d ? " x " : "",
                                  (unsigned long long)t->shape[d]);
        table_cell(&table, "%s", r->part);
        table_cell(&table, "%s", t->dtype);
        table_cell(&table, "%s", shape);
        table_cell(&table, "%s", ctl_bytes(r->slot_bytes, bytes, sizeof bytes));
    }
    table_print(&table, stdout);
    table_done(&table);
}

static void print_text(const struct inspected *in)
{
    const struct checkpoint_info *info = &in->info;
    char a[32], b[32];
    printf("%s: %s, %s in %zu file%s\n", in->dir, *info->model_type ? info->model_type : "no model_type",
           ctl_bytes(info->bytes, a, sizeof a), info->files, info->files == 1 ? "" : "s");
    printf("experts: %u in each of %u MoE layers (%u to %u", in->manifest.logical, in->manifest.layers,
           info->layer_numbers[0], info->layer_numbers[in->manifest.layers - 1]);
    if (info->hidden_layers)
        printf(", of %u layers", info->hidden_layers);
    printf("); one of one layer has %s:\n\n", ctl_bytes(info->expert_bytes, a, sizeof a));
    print_parts(in);
    printf("\ndense weights, on every rank: %s in %zu tensors\n", ctl_bytes(info->dense_bytes, a, sizeof a),
           info->dense_tensors);
    if (info->apart_tensors)
        printf("not loaded, for multi-token prediction: %s in %zu tensors of %u layer%s\n",
               ctl_bytes(info->apart_bytes, b, sizeof b), info->apart_tensors, info->apart_layers,
               info->apart_layers == 1 ? "" : "s");
    putchar('\n');
    struct table table;
    table_init(&table, (const char *const[]){"RANKS", "SLOTS", "BYTES PER RANK", NULL});
    for (size_t i = 0; i < in->n_shares; i++) {
        table_cell(&table, "%u", in->shares[i].ranks);
        table_cell(&table, "%u", in->shares[i].slots);
        table_cell(&table, "%s", ctl_bytes(in->shares[i].bytes, a, sizeof a));
    }
    table_print(&table, stdout);
    table_done(&table);
}

/* ---- the command ---- */

enum { KEY_RANKS = 256 };

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct model_arguments *o = state->input;
    switch (key) {
    case KEY_RANKS:
        o->ranks = ctl_parse_u32(state, "--ranks", arg, 1, RANKS_MAX);
        return 0;
    case ARGP_KEY_ARG:
        if (!o->verb)
            o->verb = arg;
        else if (!o->dir)
            o->dir = arg;
        else
            return ARGP_ERR_UNKNOWN;
        return 0;
    case ARGP_KEY_END:
        if (!o->verb || strcmp(o->verb, "inspect") != 0 || !o->dir || !*o->dir)
            argp_error(state, "model needs: inspect DIR, a folder with config.json and model*.safetensors");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int cmd_model(struct ctl *ctl, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"ranks", KEY_RANKS, "N", 0, "what each of N ranks would hold (default: of 1, 2, 4 and so on)", 0},
        {0},
    };
    const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "inspect DIR",
        .doc =
            "Shows what is in a checkpoint folder: MoE layers, experts and their parts, dense weights, and the expert "
            "slots and bytes that a rank needs.  It reads headers only, here, and asks no coordinator.\v"
            "Examples:\n"
            "  eepctl model inspect /models/qwen3\n"
            "  eepctl model inspect /models/deepseek-v3 --ranks 32\n"
            "  eepctl model inspect /models/qwen3 -o json | jq .expert_bytes\n",
    };
    struct model_arguments o = {0};
    ctl_parse(ctl, &argp, argc, argv, &o);
    struct inspected in;
    struct err err = {0};
    int rc = inspect(&o, &in, &err);
    if (rc < 0) {
        if (rc == ERR_INVALID) /* what is in the files is no mistake in our arguments */
            err.code = ERR_UNSUPPORTED;
        return ctl_fail(&err);
    }
    if (ctl->output == CTL_JSON)
        print_json(&in);
    else
        print_text(&in);
    manifest_done(&in.manifest);
    checkpoint_close(in.c);
    return CTL_OK;
}
