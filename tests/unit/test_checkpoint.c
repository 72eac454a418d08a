/* The checkpoint loader: what it loads equals an independent reading of the same files, single or sharded; it reads no
 * more than it must; folders that are damaged or strange get one sentence each. */
#include <check.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/checkpoint.h"
#include "common/digest.h"
#include "tests/harness/folder.h"
#include "tests/harness/suite.h"

static const char *data_dir(void)
{
    const char *dir = getenv("EEP_TEST_DATA");
    return dir ? dir : "tests/data";
}

static const struct fixture {
    const char *name, *expert; /* expert: printf of layer, expert, part */
    const char *gate, *up, *down;
    uint32_t experts, inner;
} fixtures[] = {
    {"qwen3-moe-tiny", "model.layers.%u.mlp.experts.%u.%s.weight", "gate_proj", "up_proj", "down_proj", 16, 64},
    {"mixtral-tiny", "model.layers.%u.block_sparse_moe.experts.%u.%s.weight", "w1", "w3", "w2", 8, 128},
};
#define LAYERS 4u
#define HIDDEN 128u

/* ---- an independent reader: pread and the header's JSON, nothing of the loader ---- */

struct raw {
    uint8_t *bytes;
    size_t len;
    uint64_t header_len;
    json_t *header;
};

static void raw_open(struct raw *raw, const char *path)
{
    FILE *f = fopen(path, "r");
    ck_assert_msg(f != NULL, "%s", path);
    raw->bytes = malloc(8u << 20);
    raw->len = fread(raw->bytes, 1, 8u << 20, f);
    fclose(f);
    raw->header_len = 0;
    for (int i = 7; i >= 0; i--)
        raw->header_len = raw->header_len << 8 | raw->bytes[i];
    raw->header = json_loadb((char *)raw->bytes + 8, raw->header_len, 0, NULL);
    ck_assert_ptr_nonnull(raw->header);
}

static void raw_close(struct raw *raw)
{
    json_decref(raw->header);
    free(raw->bytes);
}

static const uint8_t *raw_tensor(const struct raw *raw, const char *name, size_t *ret_len)
{
    json_t *offsets = json_object_get(json_object_get(raw->header, name), "data_offsets");
    ck_assert_msg(offsets != NULL, "%s", name);
    json_int_t from = json_integer_value(json_array_get(offsets, 0)),
               to = json_integer_value(json_array_get(offsets, 1));
    *ret_len = (size_t)(to - from);
    return raw->bytes + 8 + raw->header_len + from;
}

/* ---- a temporary folder ---- */

static char folder[64];

static void setup(void)
{
    folder_make("checkpoint", folder);
}

static void teardown(void)
{
    folder_remove(folder);
}

static void text_write(const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

/* Writes those tensors of raw for which pick() returns `which`; shape_of may replace a shape. */
struct writer {
    const struct raw *raw;
    int (*pick)(const char *name, void *user);
    void *user;
};

static void shard_write(const struct writer *w, const char *file, int which)
{
    json_t *header = json_object(), *value;
    const char *name;
    char path[128];
    size_t at = 0;
    FILE *data = tmpfile();
    json_object_foreach(w->raw->header, name, value)
    {
        if (strcmp(name, "__metadata__") == 0 || w->pick(name, w->user) != which)
            continue;
        size_t len;
        const uint8_t *bytes = raw_tensor(w->raw, name, &len);
        fwrite(bytes, 1, len, data);
        json_t *copy = json_deep_copy(value);
        json_object_set_new(copy, "data_offsets", json_pack("[I,I]", (json_int_t)at, (json_int_t)(at + len)));
        json_object_set_new(header, name, copy);
        at += len;
    }
    char *text = json_dumps(header, JSON_COMPACT);
    uint64_t len = strlen(text);
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < 8; i++)
        fputc((int)(len >> (8 * i) & 0xff), f);
    fputs(text, f);
    rewind(data);
    for (int c; (c = fgetc(data)) != EOF;)
        fputc(c, f);
    fclose(f);
    fclose(data);
    free(text);
    json_decref(header);
}

static int pick_all(const char *name, void *user)
{
    (void)name, (void)user;
    return 1;
}

/* Spreads tensors over three files without any order. */
static int pick_by_hash(const char *name, void *user)
{
    (void)user;
    return (int)(digest_bytes(name, strlen(name), 0) % 3);
}

static int pick_but(const char *name, void *user)
{
    return strcmp(name, user) == 0 ? 0 : 1;
}

static void config_copy(const struct fixture *fx)
{
    char path[256], text[8192];
    snprintf(path, sizeof path, "%s/%s/config.json", data_dir(), fx->name);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    text_write("config.json", text);
}

static void sharded_write(const struct fixture *fx, const struct raw *raw)
{
    struct writer w = {raw, pick_by_hash, NULL};
    json_t *map = json_object(), *value;
    const char *name;
    for (int i = 0; i < 3; i++) {
        char file[64];
        snprintf(file, sizeof file, "model-%05d-of-00003.safetensors", i + 1);
        shard_write(&w, file, i);
    }
    json_object_foreach(raw->header, name, value)
    {
        char file[64];
        if (strcmp(name, "__metadata__") == 0)
            continue;
        snprintf(file, sizeof file, "model-%05d-of-00003.safetensors", pick_by_hash(name, NULL) + 1);
        json_object_set_new(map, name, json_string(file));
    }
    json_t *index = json_pack("{s:{s:i},s:o}", "metadata", "total_size", 1, "weight_map", map);
    char *text = json_dumps(index, 0);
    text_write("model.safetensors.index.json", text);
    free(text);
    json_decref(index);
    config_copy(fx);
}

static void fixture_raw(const struct fixture *fx, struct raw *ret_raw, char ret_dir[256])
{
    char path[300];
    snprintf(ret_dir, 256, "%s/%s", data_dir(), fx->name);
    snprintf(path, sizeof path, "%s/model.safetensors", ret_dir);
    raw_open(ret_raw, path);
}

/* ---- loading ---- */

struct loaded {
    struct memory_backend *memory;
    struct checkpoint *c;
    struct manifest manifest;
    struct model *model;
    struct weights *w;
    struct expert_map *map;
};

static void loaded_prepare(struct loaded *l, const char *dir, uint32_t slots)
{
    struct err err = {0};
    l->memory = memory_open("host", &err);
    ck_assert_msg(checkpoint_open(dir, &l->c, &err) == 0, "%s", err.text);
    ck_assert_msg(checkpoint_manifest(l->c, slots, &l->manifest, &err) == 0, "%s", err.text);
    ck_assert_msg(manifest_model(&l->manifest, &l->model, &err) == 0, "%s", err.text);
    ck_assert_msg(weights_allocate(l->memory, l->model, &l->w, &err) == 0, "%s", err.text);
    l->map = expert_map_new(l->manifest.layers, l->manifest.logical, 2, slots);
}

static void loaded_done(struct loaded *l)
{
    expert_map_unref(l->map);
    weights_free(l->w);
    model_unref(l->model);
    manifest_done(&l->manifest);
    checkpoint_close(l->c);
    l->memory->close(l->memory);
}

static const struct tensor *tensor_named(const struct manifest *m, const char *name)
{
    for (uint32_t i = 0; i < m->n_tensors; i++)
        if (strcmp(m->tensors[i].name, name) == 0)
            return &m->tensors[i];
    ck_abort_msg("no tensor %s", name);
}

/* The slot holds gate rows, then up rows; and the down projection: byte for byte as in the file. */
static void slot_compare(const struct loaded *l, const struct fixture *fx, const struct raw *raw, uint32_t layer,
                         uint32_t slot, uint32_t expert)
{
    const char *parts[] = {fx->gate, fx->up, fx->down};
    size_t offset = 0;
    for (int k = 0; k < 3; k++) {
        char name[128];
        size_t len;
        snprintf(name, sizeof name, k < 2 ? "layers.%u.experts.w13" : "layers.%u.experts.w2", layer);
        const struct tensor *t = tensor_named(&l->manifest, name);
        const struct region *r = &l->manifest.regions[t->region];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(name, sizeof name, fx->expert, layer, expert, parts[k]);
#pragma GCC diagnostic pop
        const uint8_t *want = raw_tensor(raw, name, &len);
        if (k == 2)
            offset = 0;
        const uint8_t *have = (uint8_t *)l->w->regions[t->region].base + slot * r->stride + offset;
        ck_assert_msg(memcmp(have, want, len) == 0, "%s", name);
        offset += len;
        ck_assert_uint_eq(k == 0 ? 0 : r->slot_bytes, k == 0 ? 0 : offset);
    }
}

static void dense_compare(const struct loaded *l, const struct raw *raw)
{
    json_t *value;
    const char *name;
    size_t dense = 0;
    json_object_foreach(raw->header, name, value)
    {
        size_t len;
        if (strcmp(name, "__metadata__") == 0 || strstr(name, ".experts."))
            continue;
        const struct tensor *t = tensor_named(&l->manifest, name);
        const uint8_t *want = raw_tensor(raw, name, &len);
        ck_assert_uint_eq(t->offset % 256, 0);
        ck_assert_str_eq(t->dtype, json_string_value(json_object_get(value, "dtype")));
        ck_assert_uint_eq(t->dims, json_array_size(json_object_get(value, "shape")));
        ck_assert_msg(memcmp((uint8_t *)l->w->regions[t->region].base + t->offset, want, len) == 0, "%s", name);
        dense++;
    }
    ck_assert_uint_eq(dense + (size_t)2 * LAYERS, l->manifest.n_tensors);
}

static void all_compare(const char *dir, const struct fixture *fx, const struct raw *raw)
{
    struct loaded l;
    struct err err = {0};
    loaded_prepare(&l, dir, fx->experts);
    ck_assert_uint_eq(checkpoint_layers(l.c), LAYERS);
    ck_assert_uint_eq(checkpoint_experts(l.c), fx->experts);
    const struct tensor *w13 = tensor_named(&l.manifest, "layers.3.experts.w13");
    ck_assert_uint_eq(w13->dims, 2);
    ck_assert_uint_eq(w13->shape[0], 2 * fx->inner);
    ck_assert_uint_eq(w13->shape[1], HIDDEN);
    const struct tensor *w2 = tensor_named(&l.manifest, "layers.3.experts.w2");
    ck_assert_uint_eq(w2->shape[0], HIDDEN);
    ck_assert_uint_eq(w2->shape[1], fx->inner);
    ck_assert_str_eq(w2->dtype, "BF16");
    ck_assert_ptr_nonnull(strstr(l.manifest.config, "num_local_experts"));

    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t e = 0; e < fx->experts; e++) /* not in the order of the slots */
            l.map->held[expert_map_at(l.map, layer, 1, (e * 5 + layer) % fx->experts)] = (int32_t)e;
    ck_assert_msg(checkpoint_load(l.c, l.w, l.map, 1, NULL, NULL, &err) == 0, "%s", err.text);
    dense_compare(&l, raw);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t slot = 0; slot < fx->experts; slot++) {
            uint32_t e = (uint32_t)l.map->held[expert_map_at(l.map, layer, 1, slot)];
            slot_compare(&l, fx, raw, layer, slot, e);
            ck_assert_int_eq(weights_slot_verify(l.w, layer, slot, e, &err), 0);
        }
    uint64_t dense;
    ck_assert_int_eq(weights_dense_digest(l.w, 0, &dense, &err), 0);
    ck_assert_uint_eq(dense, l.model->dense_digest[0]);
    loaded_done(&l);
}

START_TEST(one_file_equals_an_independent_reading)
{
    struct raw raw;
    char dir[256];
    fixture_raw(&fixtures[_i], &raw, dir);
    all_compare(dir, &fixtures[_i], &raw);
    raw_close(&raw);
}
END_TEST

START_TEST(shards_equal_one_file)
{
    struct raw raw;
    char dir[256];
    fixture_raw(&fixtures[_i], &raw, dir);
    sharded_write(&fixtures[_i], &raw);
    all_compare(folder, &fixtures[_i], &raw);

    struct loaded one, many;
    loaded_prepare(&one, dir, 4);
    loaded_prepare(&many, folder, 4);
    ck_assert_uint_eq(one.model->manifest_digest, many.model->manifest_digest);
    loaded_done(&one);
    loaded_done(&many);
    raw_close(&raw);
}
END_TEST

static bool count_calls(void *user, uint64_t bytes)
{
    (void)bytes;
    ++*(int *)user;
    return false;
}

/* Into weights that are in use: what is read must be what the model was started with. */
START_TEST(lost_experts_are_read_again)
{
    const struct fixture *fx = &fixtures[_i];
    struct raw raw;
    struct loaded l;
    struct err err = {0};
    char dir[256];
    fixture_raw(fx, &raw, dir);
    loaded_prepare(&l, dir, fx->experts);
    for (uint32_t e = 0; e < fx->experts; e++)
        l.map->held[expert_map_at(l.map, 1, 1, e)] = (int32_t)e;
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 1, NULL, NULL, &err), 0);
    uint64_t before = checkpoint_bytes_read(l.c), *known = &l.model->expert_digest[fx->experts + 3], digest = *known;
    struct expert_map *again = expert_map_new(LAYERS, fx->experts, 2, fx->experts);
    again->held[expert_map_at(again, 1, 0, 5)] = 3;
    ck_assert_msg(checkpoint_reload(l.c, l.w, again, 0, NULL, NULL, &err) == 0, "%s", err.text);
    slot_compare(&l, fx, &raw, 1, 5, 3);
    ck_assert_uint_eq(checkpoint_bytes_read(l.c) - before, 3ull * fx->inner * HIDDEN * 2);
    ck_assert_uint_eq(checkpoint_reload_bytes(l.c, again, 0), 3ull * fx->inner * HIDDEN * 2);
    /* as another agent reads it, in pieces that begin anywhere */
    uint64_t bytes = checkpoint_expert_bytes(l.c, 1);
    uint8_t *in_slot = malloc(bytes), *piece = malloc(bytes);
    ck_assert_uint_eq(bytes, weights_slot_bytes(l.w, 1));
    ck_assert_int_eq(weights_slot_read(l.w, 1, 5, 0, in_slot, bytes, &err), 0);
    for (uint64_t from = 0, len = 1; from < bytes; from += len, len = len * 3 + 1) {
        len = len < bytes - from ? len : bytes - from;
        ck_assert_msg(checkpoint_expert_read(l.c, 1, 3, from, piece, len, &err) == 0, "%s", err.text);
        ck_assert_mem_eq(piece, in_slot + from, len);
    }
    ck_assert_int_eq(checkpoint_expert_read(l.c, 1, 3, 1, piece, bytes, &err), ERR_INVALID);
    ck_assert_int_eq(checkpoint_expert_read(l.c, 1, 3, UINT64_MAX, piece, 2, &err), ERR_INVALID);
    ck_assert_int_eq(checkpoint_expert_read(l.c, LAYERS, 3, 0, piece, 1, &err), ERR_INVALID);
    ck_assert_int_eq(checkpoint_expert_read(l.c, 1, (uint32_t)fx->experts, 0, piece, 1, &err), ERR_INVALID);
    free(in_slot);
    free(piece);
    *known = digest + 1;
    ck_assert_int_eq(checkpoint_reload(l.c, l.w, again, 0, NULL, NULL, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "expert 3 of MoE layer 1 is not what the model was started with"));
    ck_assert_uint_eq(*known, digest + 1);
    *known = 0;
    ck_assert_int_eq(checkpoint_reload(l.c, l.w, again, 0, NULL, NULL, &err), ERR_NOTFOUND);
    expert_map_unref(again);
    loaded_done(&l);
    raw_close(&raw);
}
END_TEST

START_TEST(only_what_is_needed_is_read)
{
    const struct fixture *fx = &fixtures[_i];
    struct raw raw;
    struct loaded l;
    struct err err = {0};
    char dir[256];
    fixture_raw(fx, &raw, dir);
    loaded_prepare(&l, dir, 2);
    ck_assert_uint_eq(checkpoint_bytes_read(l.c), 0);
    uint64_t dense = 0, one = 3ull * fx->inner * HIDDEN * 2;
    json_t *value;
    const char *name;
    json_object_foreach(raw.header, name, value)
    {
        size_t len = 0;
        if (strcmp(name, "__metadata__") != 0 && !strstr(name, ".experts."))
            raw_tensor(&raw, name, &len);
        dense += len;
    }
    /* Rank 0 holds nothing, rank 1 two experts of one layer. */
    l.map->held[expert_map_at(l.map, 2, 1, 0)] = 3;
    l.map->held[expert_map_at(l.map, 2, 1, 1)] = 7;
    int calls = 0;
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, count_calls, &calls, &err), 0);
    ck_assert_uint_eq(checkpoint_bytes_read(l.c), dense);
    ck_assert_int_gt(calls, 0);
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 1, NULL, NULL, &err), 0);
    ck_assert_uint_eq(checkpoint_bytes_read(l.c), 2 * dense + 2 * one);
    ck_assert_uint_eq(l.model->expert_bytes, one);

    /* Digests are known of what was loaded, and of nothing else. */
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t e = 0; e < fx->experts; e++)
            ck_assert_int_eq(l.model->expert_digest[layer * fx->experts + e] != 0, layer == 2 && (e == 3 || e == 7));
    loaded_done(&l);
    raw_close(&raw);
}
END_TEST

static bool cancel_at_once(void *user, uint64_t bytes)
{
    (void)user, (void)bytes;
    return true;
}

START_TEST(loading_is_cancelled_and_maps_are_checked)
{
    struct loaded l;
    struct err err = {0};
    char dir[256];
    snprintf(dir, sizeof dir, "%s/%s", data_dir(), fixtures[0].name);
    loaded_prepare(&l, dir, 2);
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, cancel_at_once, NULL, &err), ERR_ABORTED);
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 2, NULL, NULL, &err), ERR_INVALID);
    struct expert_map *other = expert_map_new(LAYERS, 16, 1, 3);
    ck_assert_int_eq(checkpoint_load(l.c, l.w, other, 0, NULL, NULL, &err), ERR_INVALID);
    expert_map_unref(other);
    l.map->held[expert_map_at(l.map, 0, 0, 0)] = 16;
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, NULL, NULL, &err), ERR_INVALID);

    struct checkpoint *mixtral;
    snprintf(dir, sizeof dir, "%s/%s", data_dir(), fixtures[1].name);
    ck_assert_int_eq(checkpoint_open(dir, &mixtral, &err), 0);
    ck_assert_int_eq(checkpoint_load(mixtral, l.w, l.map, 0, NULL, NULL, &err), ERR_CONFLICT);
    checkpoint_close(mixtral);
    loaded_done(&l);
}
END_TEST

/* A shard that is cut after it was opened: an error with file and tensor, and no SIGBUS. */
START_TEST(a_file_that_becomes_shorter_is_named)
{
    struct raw raw;
    struct loaded l;
    struct err err = {0};
    char dir[256], path[128];
    fixture_raw(&fixtures[0], &raw, dir);
    sharded_write(&fixtures[0], &raw);
    loaded_prepare(&l, folder, 2);
    snprintf(path, sizeof path, "%s/model-00002-of-00003.safetensors", folder);
    ck_assert_int_eq(truncate(path, 20000), 0);
    l.map->held[expert_map_at(l.map, 2, 0, 0)] = 3;
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, NULL, NULL, &err), ERR_IO);
    ck_assert_msg(strstr(err.text, path) && strstr(err.text, "tensor \"") && strstr(err.text, "became shorter"), "%s",
                  err.text);
    loaded_done(&l);
    raw_close(&raw);
}
END_TEST

/* ---- experts with block scales, of shapes whose pieces end inside a word ---- */

/* inner 3, hidden 5: gate and up of 15 bytes each, scales of 4 times 1 and 5 floats. */
static void scaled_write(uint32_t layers, uint32_t experts)
{
    static const struct {
        const char *name, *dtype;
        int rows, columns, bytes;
    } piece[] = {
        {"gate_proj.weight", "F8_E4M3", 3, 5, 15},     {"up_proj.weight", "F8_E4M3", 3, 5, 15},
        {"down_proj.weight", "F8_E4M3", 5, 3, 15},     {"gate_proj.weight_scale_inv", "F32", 1, 5, 20},
        {"up_proj.weight_scale_inv", "F32", 1, 5, 20}, {"down_proj.weight_scale_inv", "F32", 5, 1, 20},
    };
    json_t *header = json_object();
    json_int_t at = 0;
    char name[128], path[128];
    for (uint32_t i = 0; i < layers * experts * 6; i++) {
        uint32_t k = i % 6;
        snprintf(name, sizeof name, "model.layers.%u.mlp.experts.%u.%s", i / 6 / experts, i / 6 % experts,
                 piece[k].name);
        json_object_set_new(header, name,
                            json_pack("{s:s,s:[i,i],s:[I,I]}", "dtype", piece[k].dtype, "shape", piece[k].rows,
                                      piece[k].columns, "data_offsets", at, at + piece[k].bytes));
        at += piece[k].bytes;
    }
    char *text = json_dumps(header, JSON_COMPACT);
    uint64_t len = strlen(text);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fwrite(&len, sizeof len, 1, f);
    fputs(text, f);
    for (json_int_t i = 0; i < at; i++)
        fputc((int)(i * 7 % 251), f);
    fclose(f);
    free(text);
    json_decref(header);
    text_write("config.json", "{}");
}

static void part_equals(const struct loaded *l, const char *name, const char *dtype, uint64_t rows, uint64_t columns,
                        size_t offset, const struct raw *raw, const char *piece)
{
    const struct tensor *t = tensor_named(&l->manifest, name);
    size_t len;
    const uint8_t *want = raw_tensor(raw, piece, &len);
    ck_assert_str_eq(t->dtype, dtype);
    ck_assert_uint_eq(t->shape[0], rows);
    ck_assert_uint_eq(t->shape[1], columns);
    const struct region *r = &l->manifest.regions[t->region];
    ck_assert_mem_eq((uint8_t *)l->w->regions[t->region].base + r->stride + offset, want, len);
}

START_TEST(block_scales_are_parts_of_their_own)
{
    struct raw raw;
    struct loaded l;
    struct err err = {0};
    char path[128];
    scaled_write(2, 4);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    raw_open(&raw, path);
    loaded_prepare(&l, folder, 2);
    ck_assert_uint_eq(l.model->expert_bytes, 3 * 15 + 3 * 20);
    l.map->held[expert_map_at(l.map, 1, 0, 1)] = 2;
    ck_assert_msg(checkpoint_load(l.c, l.w, l.map, 0, NULL, NULL, &err) == 0, "%s", err.text);
    part_equals(&l, "layers.1.experts.w13", "F8_E4M3", 6, 5, 0, &raw, "model.layers.1.mlp.experts.2.gate_proj.weight");
    part_equals(&l, "layers.1.experts.w13", "F8_E4M3", 6, 5, 15, &raw, "model.layers.1.mlp.experts.2.up_proj.weight");
    part_equals(&l, "layers.1.experts.w2", "F8_E4M3", 5, 3, 0, &raw, "model.layers.1.mlp.experts.2.down_proj.weight");
    part_equals(&l, "layers.1.experts.w13_scale_inv", "F32", 2, 5, 0, &raw,
                "model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv");
    part_equals(&l, "layers.1.experts.w13_scale_inv", "F32", 2, 5, 20, &raw,
                "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv");
    part_equals(&l, "layers.1.experts.w2_scale_inv", "F32", 5, 1, 0, &raw,
                "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv");
    ck_assert_msg(weights_slot_verify(l.w, 1, 1, 2, &err) == 0, "%s", err.text);
    loaded_done(&l);
    raw_close(&raw);
}
END_TEST

/* ---- folders that are not what they should be ---- */

static void refused(int code, const char *says)
{
    struct checkpoint *c;
    struct err err = {0};
    int rc = checkpoint_open(folder, &c, &err);
    ck_assert_msg(rc == code, "%d: %s", rc, err.text);
    ck_assert_msg(strstr(err.text, says) != NULL, "%s", err.text);
    ck_assert_msg(strstr(err.text, folder) != NULL, "%s", err.text);
    ck_assert_ptr_null(strchr(err.text, '\n'));
}

START_TEST(a_missing_expert_is_named)
{
    struct raw raw;
    char dir[256];
    fixture_raw(&fixtures[0], &raw, dir);
    char lost[] = "model.layers.2.mlp.experts.5.up_proj.weight";
    struct writer w = {&raw, pick_but, lost};
    config_copy(&fixtures[0]);
    shard_write(&w, "model.safetensors", 1);
    refused(ERR_INVALID, "layer 2: expert 5 has no tensor \"model.layers.2.mlp.experts.5.up_proj.weight\"");
    raw_close(&raw);
}
END_TEST

/* Changes the header of the fixture: one entry gets another name, or another shape. */
static void header_change(const struct fixture *fx, const char *name, const char *new_name, json_t *new_shape)
{
    struct raw raw;
    char dir[256];
    fixture_raw(fx, &raw, dir);
    json_t *value = json_deep_copy(json_object_get(raw.header, name));
    ck_assert_ptr_nonnull(value);
    if (new_shape)
        json_object_set_new(value, "shape", new_shape);
    json_object_del(raw.header, name);
    json_object_set_new(raw.header, new_name ? new_name : name, value);
    struct writer w = {&raw, pick_all, NULL};
    shard_write(&w, "model.safetensors", 1);
    config_copy(fx);
    raw_close(&raw);
}

static const struct {
    const char *name, *to;
    int rows, columns; /* 0: the shape stays */
    int code;
    const char *says;
} changes[] = {
    {"model.layers.1.mlp.experts.15.down_proj.weight", "model.layers.1.mlp.experts.16.down_proj.weight", 0, 0,
     ERR_INVALID, "layer 1 has 17 experts, but layer 0 has 16"},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.3.w4.weight", 0, 0, ERR_INVALID,
     "\"model.layers.1.mlp.experts.3.w4.weight\": most experts have no tensor \"w4.weight\""},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv", 0, 0,
     ERR_INVALID, "most experts have no tensor \"gate_proj.weight_scale_inv\""},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.gate_up_proj", 0, 0, ERR_INVALID,
     "most experts have no tensor \"gate_up_proj\""},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.3", 0, 0, ERR_UNSUPPORTED,
     "\"model.layers.1.mlp.experts.3\" belongs to experts"},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.blocks.1.mlp.experts.3.gate_proj.weight", 0, 0,
     ERR_UNSUPPORTED, "\"model.blocks.1.mlp.experts.3.gate_proj.weight\" belongs to experts"},
    {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.3.w3.weight", 0, 0, ERR_INVALID,
     "most experts have no tensor \"w3.weight\""},
    {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.3.w1.weight", 0, 0, ERR_INVALID,
     "most experts have no tensor \"w1.weight\""},
    {"model.layers.1.mlp.gate.weight", "other.layers.1.mlp.experts.16.w1.weight", 0, 0, ERR_UNSUPPORTED,
     "two stacks of layers have experts"},
    {"model.layers.1.mlp.gate.weight", "model.layers.1.other.experts.3.gate_proj.weight", 0, 0, ERR_UNSUPPORTED,
     "layer 1 has two sets of experts"},
    {"model.layers.0.mlp.experts.7.up_proj.weight", NULL, 32, 256, ERR_INVALID,
     "\"model.layers.0.mlp.experts.7.up_proj.weight\" is BF16 [32, 256], but"},
    {"model.layers.0.mlp.experts.0.gate_proj.weight", NULL, 128, 64, ERR_INVALID,
     "\"model.layers.0.mlp.experts.0.gate_proj.weight\" is BF16 [128, 64]; the experts of a layer must be alike"},
};

START_TEST(strange_experts_are_refused)
{
    header_change(&fixtures[0], changes[_i].name, changes[_i].to,
                  changes[_i].rows ? json_pack("[i,i]", changes[_i].rows, changes[_i].columns) : NULL);
    refused(changes[_i].code, changes[_i].says);
}
END_TEST

static int pick_layers_with(const char *name, void *user)
{
    return strstr(name, user) ? 0 : 1;
}

START_TEST(layers_must_agree_and_exist)
{
    struct raw raw;
    char dir[256];
    fixture_raw(&fixtures[0], &raw, dir);
    config_copy(&fixtures[0]);
    char last[] = "layers.3.mlp.experts.15.";
    struct writer w = {&raw, pick_layers_with, last};
    shard_write(&w, "model.safetensors", 1);
    refused(ERR_INVALID, "layer 3 has 15 experts, but layer 0 has 16");

    char everywhere[] = ".experts.15.";
    w.user = everywhere;
    shard_write(&w, "model.safetensors", 1);
    refused(ERR_INVALID, "num_local_experts is 16, but the layers have 15 experts");

    char all[] = ".experts.";
    w.user = all;
    shard_write(&w, "model.safetensors", 1);
    refused(ERR_UNSUPPORTED, "no mixture-of-experts checkpoint");

    /* A layer without experts is dense, and the others close ranks. */
    char layer1[] = "layers.1.mlp.experts.";
    w.user = layer1;
    shard_write(&w, "model.safetensors", 1);
    struct loaded l;
    loaded_prepare(&l, folder, 1);
    ck_assert_uint_eq(checkpoint_layers(l.c), 3);
    l.map->held[expert_map_at(l.map, 1, 0, 0)] = 4;
    struct err err = {0};
    ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, NULL, NULL, &err), 0);
    size_t len;
    const uint8_t *want = raw_tensor(&raw, "model.layers.2.mlp.experts.4.down_proj.weight", &len);
    const struct tensor *t = tensor_named(&l.manifest, "layers.1.experts.w2");
    ck_assert_mem_eq(l.w->regions[t->region].base, want, len);
    loaded_done(&l);
    raw_close(&raw);
}
END_TEST

START_TEST(damaged_folders_get_one_sentence)
{
    struct raw raw;
    char dir[256], path[128];
    refused(ERR_NOTFOUND, "has neither model.safetensors nor");
    fixture_raw(&fixtures[1], &raw, dir);
    struct writer w = {&raw, pick_all, NULL};
    shard_write(&w, "model.safetensors", 1);
    refused(ERR_NOTFOUND, "config.json: cannot open");
    text_write("config.json", "{\"num_experts\": 8, ");
    refused(ERR_INVALID, "config.json: is no valid JSON in line 1");
    text_write("config.json", "[]");
    refused(ERR_INVALID, "config.json: is no JSON object");
    text_write("config.json", "{\"num_experts\": 9}");
    refused(ERR_INVALID, "num_experts is 9, but the layers have 8");
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    ck_assert_int_eq(truncate(path, 100000), 0);
    refused(ERR_INVALID, "truncated");
    ck_assert_int_eq(unlink(path), 0);

    sharded_write(&fixtures[1], &raw);
    snprintf(path, sizeof path, "%s/model-00002-of-00003.safetensors", folder);
    char aside[160];
    snprintf(aside, sizeof aside, "%s.aside", path);
    ck_assert_int_eq(rename(path, aside), 0);
    refused(ERR_NOTFOUND, "model-00002-of-00003.safetensors, which does not exist");
    ck_assert_int_eq(rename(aside, path), 0);
    struct checkpoint *c;
    ck_assert_int_eq(checkpoint_open(folder, &c, NULL), 0);
    checkpoint_close(c);

    text_write("model.safetensors.index.json", "{\"weight_map\": {\"a\": \"../../etc/passwd\"}}");
    refused(ERR_INVALID, "does not name a file of this folder");
    text_write("model.safetensors.index.json",
               "{\"weight_map\": {\"lm_head.weights\": \"model-00001-of-00003.safetensors\"}}");
    refused(ERR_INVALID, "\"lm_head.weights\" is not in model-00001-of-00003.safetensors");
    text_write("model.safetensors.index.json", "{}");
    refused(ERR_INVALID, "has no weight_map");
    text_write("model.safetensors.index.json", "{\"weight_map\": {\"a\": \"b\", \"a\": \"b\"}}");
    refused(ERR_INVALID, "no valid JSON");
    raw_close(&raw);
}
END_TEST

START_TEST(an_index_that_forgets_a_tensor_is_refused)
{
    struct raw raw;
    char dir[256], path[128];
    fixture_raw(&fixtures[1], &raw, dir);
    sharded_write(&fixtures[1], &raw);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    json_t *index = json_load_file(path, 0, NULL);
    json_object_del(json_object_get(index, "weight_map"), "model.norm.weight");
    ck_assert_int_eq(json_dump_file(index, path, 0), 0);
    json_decref(index);
    refused(ERR_INVALID, "a shard has tensor \"model.norm.weight\", which the index does not name");
    raw_close(&raw);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("checkpoint");
    TCase *t = tcase_create("checkpoint");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_loop_test(t, one_file_equals_an_independent_reading, 0, 2);
    tcase_add_loop_test(t, shards_equal_one_file, 0, 2);
    tcase_add_loop_test(t, lost_experts_are_read_again, 0, 2);
    tcase_add_loop_test(t, only_what_is_needed_is_read, 0, 2);
    tcase_add_test(t, loading_is_cancelled_and_maps_are_checked);
    tcase_add_test(t, a_file_that_becomes_shorter_is_named);
    tcase_add_test(t, block_scales_are_parts_of_their_own);
    tcase_add_test(t, a_missing_expert_is_named);
    tcase_add_loop_test(t, strange_experts_are_refused, 0, (int)(sizeof changes / sizeof changes[0]));
    tcase_add_test(t, layers_must_agree_and_exist);
    tcase_add_test(t, damaged_folders_get_one_sentence);
    tcase_add_test(t, an_index_that_forgets_a_tensor_is_refused);
    suite_add_tcase(s, t);
    return suite_run(s);
}
