/* What the loader makes of experts that are not three projections in bf16: fused tensors with biases and block scales,
 * tensors beside the weights, names of any kind, layers for multi-token prediction, config.json of both kinds.
 * Every checkpoint is small, and its bytes say where they come from. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/checkpoint.h"
#include "tests/harness/folder.h"
#include "tests/harness/suite.h"

/* ---- a folder of named tensors ---- */

static char folder[64];
static char header[65536];
static uint64_t header_len, data_len;

static void setup(void)
{
    folder_make("parts", folder);
    header_len = data_len = 0;
}

static void teardown(void)
{
    folder_remove(folder);
}

static FILE *file_open(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    return f;
}

static void config(const char *text)
{
    FILE *f = file_open("config.json");
    fputs(text, f);
    fclose(f);
}

/* Where it begins among the bytes of the file. */
static uint64_t add(const char *name, const char *dtype, const char *shape, uint64_t bytes)
{
    uint64_t at = data_len;
    header_len += (uint64_t)snprintf(header + header_len, sizeof header - header_len,
                                     "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                                     header_len ? "," : "{", name, dtype, shape, (unsigned long long)at,
                                     (unsigned long long)(at + bytes));
    data_len += bytes;
    return at;
}

static uint8_t byte_at(uint64_t i)
{
    return (uint8_t)(i * 7 % 251);
}

static void write_out(void)
{
    FILE *f = file_open("model.safetensors");
    header[header_len++] = '}';
    for (int i = 0; i < 8; i++)
        fputc((int)(header_len >> 8 * i & 0xff), f);
    fwrite(header, 1, header_len, f);
    for (uint64_t i = 0; i < data_len; i++)
        fputc(byte_at(i), f);
    fclose(f);
}

/* ---- loading expert 2 of every layer into slot 1, and expert 0 into slot 0 ---- */

struct loaded {
    struct memory_backend *memory;
    struct checkpoint *c;
    struct checkpoint_info info;
    struct manifest m;
    struct model *model;
    struct weights *w;
};

static struct loaded load(void)
{
    struct loaded l = {0};
    struct err err = {0};
    write_out();
    l.memory = memory_open("host", &err);
    ck_assert_msg(checkpoint_open(folder, &l.c, &err) == 0, "%s", err.text);
    ck_assert_msg(checkpoint_manifest(l.c, 2, &l.m, &err) == 0, "%s", err.text);
    ck_assert_msg(manifest_model(&l.m, &l.model, &err) == 0, "%s", err.text);
    ck_assert_msg(weights_allocate(l.memory, l.model, &l.w, &err) == 0, "%s", err.text);
    struct expert_map *map = expert_map_new(l.m.layers, l.m.logical, 1, 2);
    for (uint32_t layer = 0; layer < l.m.layers; layer++) {
        map->held[expert_map_at(map, layer, 0, 0)] = 0;
        map->held[expert_map_at(map, layer, 0, 1)] = 2;
    }
    ck_assert_msg(checkpoint_load(l.c, l.w, map, 0, NULL, NULL, &err) == 0, "%s", err.text);
    for (uint32_t layer = 0; layer < l.m.layers; layer++) {
        ck_assert_msg(weights_slot_verify(l.w, layer, 0, 0, &err) == 0, "%s", err.text);
        ck_assert_msg(weights_slot_verify(l.w, layer, 1, 2, &err) == 0, "%s", err.text);
    }
    expert_map_unref(map);
    checkpoint_info(l.c, &l.info);
    return l;
}

static void unload(struct loaded *l)
{
    weights_free(l->w);
    model_unref(l->model);
    manifest_done(&l->m);
    checkpoint_close(l->c);
    l->memory->close(l->memory);
}

/* The part in this slot is the file's bytes from `from`; its tensor has this dtype and shape. */
static void part_is(const struct loaded *l, const char *name, uint32_t slot, const char *dtype, const char *shape,
                    uint64_t from, uint64_t bytes)
{
    for (uint32_t i = 0; i < l->m.n_tensors; i++) {
        const struct tensor *t = &l->m.tensors[i];
        const struct region *r = &l->m.regions[t->region];
        char text[128] = "";
        if (strcmp(t->name, name) != 0)
            continue;
        for (uint32_t d = 0; d < t->dims; d++)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%llu", d ? "," : "",
                     (unsigned long long)t->shape[d]);
        ck_assert_str_eq(t->dtype, dtype);
        ck_assert_str_eq(text, shape);
        if (r->kind == REGION_EXPERT)
            ck_assert_uint_ge(r->slot_bytes, bytes);
        const uint8_t *have = (uint8_t *)l->w->regions[t->region].base + t->offset + slot * r->stride;
        for (uint64_t k = 0; k < bytes; k++)
            ck_assert_msg(have[k] == byte_at(from + k), "%s: byte %llu", name, (unsigned long long)k);
        return;
    }
    ck_abort_msg("no tensor %s", name);
}

static void has_no(const struct loaded *l, const char *name)
{
    for (uint32_t i = 0; i < l->m.n_tensors; i++)
        ck_assert_str_ne(l->m.tensors[i].name, name);
}

static void refused(int code, const char *says)
{
    struct checkpoint *c;
    struct err err = {0};
    write_out();
    int rc = checkpoint_open(folder, &c, &err);
    ck_assert_msg(rc == code && strstr(err.text, says), "%d: %s", rc, err.text);
    ck_assert_msg(strstr(err.text, folder) && !strchr(err.text, '\n'), "%s", err.text);
}

/* ---- the tests ---- */

/* As gpt-oss stores it: MXFP4 blocks, their scales and a bias, all experts of a layer in one tensor; sizes are odd. */
START_TEST(fused_tensors_are_read_in_slices)
{
    char name[96];
    uint64_t blocks[2], scales[2], bias[2];
    for (uint32_t layer = 0; layer < 2; layer++) {
        snprintf(name, sizeof name, "model.layers.%u.mlp.experts.gate_up_proj_blocks", layer);
        blocks[layer] = add(name, "U8", "3,5,2,7", 210);
        snprintf(name, sizeof name, "model.layers.%u.mlp.experts.gate_up_proj_scales", layer);
        scales[layer] = add(name, "U8", "3,5,2", 30);
        snprintf(name, sizeof name, "model.layers.%u.mlp.experts.down_proj_bias", layer);
        bias[layer] = add(name, "BF16", "3,5", 30);
        snprintf(name, sizeof name, "model.layers.%u.mlp.router.bias", layer);
        add(name, "BF16", "3", 6);
    }
    config("{\"model_type\": \"gpt_oss\", \"num_local_experts\": 3, \"num_hidden_layers\": 2}");
    struct loaded l = load();
    ck_assert_uint_eq(l.m.layers, 2);
    ck_assert_uint_eq(l.m.logical, 3);
    ck_assert_uint_eq(l.info.expert_bytes, 70 + 10 + 10);
    ck_assert_uint_eq(l.info.dense_bytes, 12);
    ck_assert_uint_eq(l.model->expert_bytes, 90);
    ck_assert_str_eq(l.info.model_type, "gpt_oss");
    part_is(&l, "layers.1.experts.gate_up_proj_blocks", 1, "U8", "5,2,7", blocks[1] + 2 * 70, 70);
    part_is(&l, "layers.1.experts.gate_up_proj_scales", 1, "U8", "5,2", scales[1] + 2 * 10, 10);
    part_is(&l, "layers.0.experts.down_proj_bias", 1, "BF16", "5", bias[0] + 2 * 10, 10);
    part_is(&l, "layers.0.experts.gate_up_proj_blocks", 0, "U8", "5,2,7", blocks[0], 70);
    unload(&l);
}
END_TEST

/* Gate and up are fused with all that stands beside them: scales of blocks, a bias, a scale of the whole tensor. */
START_TEST(what_stands_beside_the_weights_is_fused_alike)
{
    static const struct {
        const char *tail, *dtype, *shape;
        uint64_t bytes;
    } tails[] = {
        {"w1.weight", "F8_E5M2", "6,8", 48},
        {"w2.weight", "F8_E5M2", "8,6", 48},
        {"w3.weight", "F8_E5M2", "6,8", 48},
        {"w1.weight_scale", "F8_E8M0", "3,1", 3},
        {"w2.weight_scale", "F8_E8M0", "4,1", 4},
        {"w3.weight_scale", "F8_E8M0", "3,1", 3},
        {"w1.bias", "F32", "6", 24},
        {"w2.bias", "F32", "8", 32},
        {"w3.bias", "F32", "6", 24},
        {"w1.input_scale", "F32", "", 4},
        {"w2.input_scale", "F32", "", 4},
        {"w3.input_scale", "F32", "", 4},
        {"w1.weight_shape", "I32", "5", 20},
        {"w3.weight_shape", "I32", "5", 20},
        {"w2.weight_shape", "I32", "5", 20},
    };
    uint64_t at[3][15];
    for (uint32_t e = 0; e < 3; e++)
        for (size_t k = 0; k < 15; k++) {
            char name[96];
            snprintf(name, sizeof name, "model.layers.4.block_sparse_moe.experts.%u.%s", e, tails[k].tail);
            at[e][k] = add(name, tails[k].dtype, tails[k].shape, tails[k].bytes);
        }
    config("{\"num_local_experts\": 3}");
    struct loaded l = load();
    ck_assert_uint_eq(l.info.layer_numbers[0], 4);
    ck_assert_uint_eq(l.info.expert_bytes, 3 * 48 + 10 + 80 + 12 + 60);
    part_is(&l, "layers.0.experts.w13", 1, "F8_E5M2", "12,8", at[2][0], 48);
    part_is(&l, "layers.0.experts.w2", 1, "F8_E5M2", "8,6", at[2][1], 48);
    part_is(&l, "layers.0.experts.w13_scale", 1, "F8_E8M0", "6,1", at[2][3], 3);
    part_is(&l, "layers.0.experts.w2_scale", 0, "F8_E8M0", "4,1", at[0][4], 4);
    part_is(&l, "layers.0.experts.w13_bias", 1, "F32", "12", at[2][6], 24);
    part_is(&l, "layers.0.experts.w13_input_scale", 1, "F32", "2", at[2][9], 4);
    part_is(&l, "layers.0.experts.w13_shape", 1, "I32", "2,5", at[2][12], 20); /* 5 counts no rows of 6 */
    unload(&l);
}
END_TEST

/* No gate projection: nothing is fused, and parts have the checkpoint's names. */
START_TEST(other_names_are_kept)
{
    uint64_t up = 0, in = 0;
    for (uint32_t e = 0; e < 3; e++) {
        char name[96];
        snprintf(name, sizeof name, "backbone.layers.0.mixer.experts.%u.up_proj.weight", e);
        up = add(name, "F16", "4,2", 16);
        snprintf(name, sizeof name, "backbone.layers.0.mixer.experts.%u.down_proj.weight", e);
        add(name, "F16", "2,4", 16);
        snprintf(name, sizeof name, "backbone.layers.0.mixer.experts.%u.lora.in.qweight", e);
        in = add(name, "I32", "2", 8);
    }
    config("{\"num_experts\": 3}");
    struct loaded l = load();
    part_is(&l, "layers.0.experts.up_proj", 1, "F16", "4,2", up, 16);
    part_is(&l, "layers.0.experts.lora_in.qweight", 1, "I32", "2", in, 8);
    has_no(&l, "layers.0.experts.w2");
    unload(&l);
}
END_TEST

static void layers_add(const char *stack, uint32_t from, uint32_t to)
{
    for (uint32_t layer = from; layer < to; layer++) {
        char name[128];
        for (uint32_t e = 0; e < 3; e++) {
            static const char *const words[] = {"gate_proj", "up_proj", "down_proj"};
            for (int k = 0; k < 3; k++) {
                snprintf(name, sizeof name, "%slayers.%u.mlp.experts.%u.%s.weight", stack, layer, e, words[k]);
                add(name, "BF16", "2,2", 8);
            }
        }
        snprintf(name, sizeof name, "%slayers.%u.mlp.shared_experts.up_proj.weight", stack, layer);
        add(name, "BF16", "2,2", 8);
    }
}

START_TEST(layers_for_multi_token_prediction_are_apart)
{
    add("model.layers.0.mlp.up_proj.weight", "BF16", "2,2", 8); /* a leading dense layer */
    layers_add("model.", 1, 3);
    layers_add("model.", 3, 5); /* beyond num_hidden_layers */
    add("model.layers.3.eh_proj.weight", "BF16", "2,4", 16);
    add("vision.layers.7.mlp.weight", "BF16", "2", 4); /* another stack */
    layers_add("mtp.", 0, 1);
    add("mtp.fc.weight", "BF16", "2", 4);
    config("{\"num_hidden_layers\": 3, \"n_routed_experts\": 3, \"num_nextn_predict_layers\": 2}");
    struct loaded l = load();
    ck_assert_uint_eq(l.m.layers, 2);
    ck_assert_uint_eq(l.info.layer_numbers[0], 1);
    ck_assert_uint_eq(l.info.layer_numbers[1], 2);
    ck_assert_uint_eq(l.info.dense_bytes, 8 + 2 * 8 + 4);
    ck_assert_uint_eq(l.info.apart_layers, 3);
    ck_assert_uint_eq(l.info.apart_tensors, 2 * 10 + 1 + 10 + 1);
    ck_assert_uint_eq(l.info.apart_bytes, 2 * 80 + 16 + 80 + 4);
    ck_assert_uint_eq(l.info.bytes, 8 + 2 * 80 + 4 + l.info.apart_bytes);
    ck_assert_uint_eq(checkpoint_bytes_read(l.c), l.info.dense_bytes + 2 * 2 * 24);
    has_no(&l, "model.layers.3.eh_proj.weight");
    has_no(&l, "mtp.fc.weight");
    unload(&l);
}
END_TEST

/* config.json of models of several kinds of input, and keys that are null or of the wrong kind. */
static const struct {
    const char *config, *says; /* NULL: it is taken, with 2 layers */
} configs[] = {
    {"{\"text_config\": {\"num_hidden_layers\": 2, \"num_experts\": 3}, \"dtype\": \"bfloat16\"}", NULL},
    {"{\"num_hidden_layers\": 9, \"text_config\": {\"num_hidden_layers\": 2, \"num_local_experts\": 3}}", NULL},
    {"{\"num_hidden_layers\": 2, \"num_experts\": null, \"num_local_experts\": 3, \"torch_dtype\": \"bfloat16\"}",
     NULL},
    {"{\"text_config\": {\"num_hidden_layers\": 2, \"num_experts\": 4}}", "num_experts is 4, but the layers have 3"},
    {"{\"num_hidden_layers\": 2, \"n_routed_experts\": \"3\"}", "n_routed_experts is not a whole number"},
    {"{\"num_hidden_layers\": -1}", "num_hidden_layers is not a whole number"},
    {"{\"num_hidden_layers\": 1}", "no layer below that has experts"},
};

START_TEST(config_of_both_kinds)
{
    layers_add("model.language_model.", 1, 4);
    config(configs[_i].config);
    if (configs[_i].says) {
        refused(ERR_INVALID, configs[_i].says);
        return;
    }
    struct loaded l = load();
    ck_assert_uint_eq(l.m.layers, 1);
    ck_assert_uint_eq(l.info.apart_layers, 2);
    ck_assert_uint_eq(l.info.hidden_layers, 2);
    unload(&l);
}
END_TEST

/* ---- fused tensors that are wrong ---- */

static const struct {
    const char *dtype, *shape;
    uint64_t bytes;
    int code;
    const char *says;
} wrong[] = {
    {"U8", "4,2", 8, ERR_INVALID, "the first dimension of \"model.layers.1.mlp.experts.bias\" is 4, and not 3"},
    {"U8", "", 1, ERR_INVALID, "has no first dimension"},
    {"U8", "3,0", 0, ERR_INVALID, "is empty"},
    {"F4", "4,3", 6, ERR_INVALID, "is 4, and not 3"},
    {"I8", "3,2", 6, 0, NULL},
};

START_TEST(fused_tensors_must_fit)
{
    add("model.layers.0.mlp.experts.bias", "U8", "3,2", 6);
    add("model.layers.1.mlp.experts.bias", wrong[_i].dtype, wrong[_i].shape, wrong[_i].bytes);
    config("{}");
    if (wrong[_i].says) {
        refused(wrong[_i].code, wrong[_i].says);
        return;
    }
    struct loaded l = load();
    ck_assert_uint_eq(l.info.expert_bytes, 2);
    unload(&l);
}
END_TEST

START_TEST(half_a_byte_cannot_be_a_slice)
{
    add("model.layers.0.mlp.experts.bias", "F4", "2,3", 3);
    config("{}");
    refused(ERR_UNSUPPORTED, "no whole number of bytes");
}
END_TEST

START_TEST(a_layer_without_a_fused_tensor_is_named)
{
    add("model.layers.0.mlp.experts.bias", "U8", "3,2", 6);
    add("model.layers.0.mlp.experts.blocks", "U8", "3,2", 6);
    add("model.layers.1.mlp.experts.blocks", "U8", "3,2", 6);
    config("{}");
    refused(ERR_INVALID, "layer 1 has no tensor \"model.layers.1.mlp.experts.bias\"");
}
END_TEST

/* Numbers in names must not ask for memory. */
START_TEST(a_huge_expert_number_is_a_hole)
{
    layers_add("model.", 0, 2);
    add("model.layers.1.mlp.experts.999999.up_proj.weight", "BF16", "2,2", 8);
    config("{}");
    refused(ERR_INVALID, "layer 1 has 1000000 experts, but layer 0 has 3");
}
END_TEST

/* Every dtype of safetensors, in one file: dense, and of its right size. */
static const struct {
    const char *name;
    uint32_t bits;
} dtypes[] = {
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},          {"F4", 4},          {"F6_E2M3", 6}, {"F6_E3M2", 6},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},     {"I16", 16},        {"U16", 16},    {"F16", 16},
    {"BF16", 16},   {"I32", 32},    {"U32", 32},        {"F32", 32},        {"F64", 64},    {"I64", 64},
    {"U64", 64},    {"C64", 64},    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
};

START_TEST(all_dtypes)
{
    uint64_t at[sizeof dtypes / sizeof *dtypes];
    layers_add("model.", 0, 1);
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        at[i] = add(dtypes[i].name, dtypes[i].name, "4,2", dtypes[i].bits);
    config("{}");
    struct loaded l = load();
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        part_is(&l, dtypes[i].name, 0, dtypes[i].name, "4,2", at[i], dtypes[i].bits);
    unload(&l);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("parts of checkpoints");
    TCase *t = tcase_create("parts");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, fused_tensors_are_read_in_slices);
    tcase_add_test(t, what_stands_beside_the_weights_is_fused_alike);
    tcase_add_test(t, other_names_are_kept);
    tcase_add_test(t, layers_for_multi_token_prediction_are_apart);
    tcase_add_loop_test(t, config_of_both_kinds, 0, (int)(sizeof configs / sizeof *configs));
    tcase_add_loop_test(t, fused_tensors_must_fit, 0, (int)(sizeof wrong / sizeof *wrong));
    tcase_add_test(t, half_a_byte_cannot_be_a_slice);
    tcase_add_test(t, a_layer_without_a_fused_tensor_is_named);
    tcase_add_test(t, a_huge_expert_number_is_a_hole);
    tcase_add_test(t, all_dtypes);
    suite_add_tcase(s, t);
    return suite_run(s);
}
