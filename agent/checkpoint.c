/* Opens a checkpoint folder: config.json, and model.safetensors or the shards that model.safetensors.index.json names.
 * Which tensor is what: checkpoint_experts.c; layout: checkpoint_layout.c; bytes: checkpoint_load.c.  Worker thread. */
#include "agent/checkpoint.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/checkpoint_internal.h"

#define SINGLE_NAME "model.safetensors"
#define INDEX_NAME  "model.safetensors.index.json"
#define CONFIG_NAME "config.json"
#define INDEX_MAX   (256u << 20)
#define SHARDS_MAX  4096u

static char *path_join(const char *dir, const char *name)
{
    char *path;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

/* ---- config.json: its number of experts is compared with what is there ---- */

static int config_open(struct checkpoint *c, struct err *err)
{
    char *path = path_join(c->dir, CONFIG_NAME);
    int rc = path ? checkpoint_config_read(path, &c->config, err) : err_set(err, ERR_NOMEM, "out of memory");
    free(path);
    return rc;
}

static int config_check(const struct checkpoint *c, struct err *err)
{
    const struct checkpoint_config *config = &c->config;
    if (config->experts > 0 && config->experts != c->experts)
        return err_set(err, ERR_INVALID, "%s/%s: %s is %u, but the layers have %u experts", c->dir, CONFIG_NAME,
                       config->experts_key, config->experts, c->experts);
    return 0;
}

/* ---- the files ---- */

static int file_add(struct checkpoint *c, const char *path, struct err *err)
{
    struct safetensors **files = realloc(c->files, (c->n_files + 1) * sizeof *files);
    if (!files)
        return err_set(err, ERR_NOMEM, "out of memory");
    c->files = files;
    int rc = safetensors_open(path, &files[c->n_files], err);
    if (rc == 0)
        c->n_files++;
    return rc;
}

static int single_open(struct checkpoint *c, const char *path, struct err *err)
{
    int rc = file_add(c, path, err);
    if (rc < 0)
        return rc;
    c->n_all = safetensors_count(c->files[0]);
    c->all = calloc(c->n_all + 1, sizeof *c->all);
    if (!c->all)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < c->n_all; i++)
        c->all[i] = safetensors_at(c->files[0], i);
    return 0;
}

/* Opens each shard that the map names once; *ret_shards: file name -> position in c->files. */
static int shards_open(struct checkpoint *c, const char *path, const json_t *map, json_t *ret_shards, struct err *err)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)map, name, value)
    {
        const char *file = json_string_value(value);
        if (!file || file[0] == '\0' || strchr(file, '/') || strcmp(file, "..") == 0)
            return err_set(err, ERR_INVALID, "%s: tensor \"%s\" does not name a file of this folder", path, name);
        if (json_object_get(ret_shards, file))
            continue;
        if (c->n_files == SHARDS_MAX)
            return err_set(err, ERR_LIMIT, "%s: names more than %u files", path, SHARDS_MAX);
        char *shard = path_join(c->dir, file);
        int rc = shard ? file_add(c, shard, err) : err_set(err, ERR_NOMEM, "out of memory");
        if (rc == ERR_NOTFOUND)
            rc = err_set(err, ERR_NOTFOUND, "%s: tensor \"%s\" is said to be in %s, which does not exist", path, name,
                         shard);
        free(shard);
        if (rc == 0 && json_object_set_new(ret_shards, file, json_integer((json_int_t)c->n_files - 1)) < 0)
            rc = err_set(err, ERR_NOMEM, "out of memory");
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int name_compare(const void *a, const void *b)
{
    const struct safetensors_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* The index and the shards must agree: every tensor is where the index says, and no shard has one more. */
static int shards_match(struct checkpoint *c, const char *path, const json_t *map, const json_t *shards,
                        struct err *err)
{
    const char *name;
    json_t *value;
    c->all = calloc(json_object_size(map) + 1, sizeof *c->all);
    if (!c->all)
        return err_set(err, ERR_NOMEM, "out of memory");
    json_object_foreach((json_t *)map, name, value)
    {
        const char *file = json_string_value(value);
        size_t at = (size_t)json_integer_value(json_object_get(shards, file));
        const struct safetensors_tensor *t = safetensors_find(c->files[at], name);
        if (!t)
            return err_set(err, ERR_INVALID, "%s: tensor \"%s\" is not in %s, where the index has it", path, name,
                           file);
        c->all[c->n_all++] = t;
    }
    qsort(c->all, c->n_all, sizeof *c->all, name_compare);
    for (size_t i = 0; i < c->n_files; i++)
        for (size_t k = 0; k < safetensors_count(c->files[i]); k++) {
            const struct safetensors_tensor *t = safetensors_at(c->files[i], k);
            const struct safetensors_tensor **at = bsearch(&t, c->all, c->n_all, sizeof *c->all, name_compare);
            if (!at || *at != t)
                return err_set(err, ERR_INVALID, "%s: a shard has tensor \"%s\", which the index %s", path, t->name,
                               at ? "has in another file" : "does not name");
        }
    return 0;
}

static int index_open(struct checkpoint *c, const char *path, struct err *err)
{
    char *text = NULL;
    json_t *index = NULL, *shards = json_object();
    int rc =
        shards ? checkpoint_json_read(path, INDEX_MAX, &text, &index, err) : err_set(err, ERR_NOMEM, "out of memory");
    const json_t *map = json_object_get(index, "weight_map");
    if (rc == 0 && json_object_size(map) == 0)
        rc = err_set(err, ERR_INVALID, "%s: has no weight_map", path);
    if (rc == 0)
        rc = shards_open(c, path, map, shards, err);
    if (rc == 0)
        rc = shards_match(c, path, map, shards, err);
    json_decref(index);
    json_decref(shards);
    free(text);
    return rc;
}

/* ---- the folder ---- */

static int weights_open(struct checkpoint *c, struct err *err)
{
    char *single = path_join(c->dir, SINGLE_NAME), *index = path_join(c->dir, INDEX_NAME);
    int rc;
    if (!single || !index)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    else if (access(c->dir, X_OK) != 0)
        rc = err_set(err, ERR_NOTFOUND, "checkpoint folder '%s': %s", c->dir, strerror(errno));
    else if (access(single, F_OK) == 0)
        rc = single_open(c, single, err);
    else if (access(index, F_OK) == 0)
        rc = index_open(c, index, err);
    else
        rc = err_set(err, ERR_NOTFOUND, "%s: has neither %s nor %s", c->dir, SINGLE_NAME, INDEX_NAME);
    free(single);
    free(index);
    return rc;
}

int checkpoint_open(const char *dir, struct checkpoint **ret_checkpoint, struct err *err)
{
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c || !(c->dir = strdup(dir))) {
        free(c);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    int rc = weights_open(c, err);
    if (rc == 0)
        rc = config_open(c, err);
    if (rc == 0)
        rc = checkpoint_classify(c, err);
    if (rc == 0)
        rc = config_check(c, err);
    if (rc < 0) {
        checkpoint_close(c);
        return rc;
    }
    *ret_checkpoint = c;
    return 0;
}

void checkpoint_close(struct checkpoint *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_files; i++)
        safetensors_close(c->files[i]);
    free(c->files);
    free(c->all);
    free(c->dense);
    free(c->apart);
    free(c->layer_numbers);
    free(c->pieces);
    checkpoint_config_done(&c->config);
    free(c->dir);
    free(c);
}

uint32_t checkpoint_layers(const struct checkpoint *c)
{
    return c->layers;
}

uint32_t checkpoint_experts(const struct checkpoint *c)
{
    return c->experts;
}

static uint64_t tensors_bytes(const struct safetensors_tensor *const *tensors, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += tensors[i]->bytes;
    return sum;
}

void checkpoint_info(const struct checkpoint *c, struct checkpoint_info *ret_info)
{
    *ret_info = (struct checkpoint_info){
        .model_type = c->config.model_type,
        .hidden_layers = c->config.hidden_layers,
        .files = c->n_files,
        .layer_numbers = c->layer_numbers,
        .dense_tensors = c->n_dense,
        .dense_bytes = tensors_bytes(c->dense, c->n_dense),
        .apart_layers = c->apart_layers,
        .apart_tensors = c->n_apart,
        .apart_bytes = tensors_bytes(c->apart, c->n_apart),
        .bytes = tensors_bytes(c->all, c->n_all),
    };
    for (uint32_t layer = 0; layer < c->layers; layer++) {
        uint64_t sum = 0;
        for (uint32_t k = 0; k < c->n_tails; k++)
            sum += checkpoint_piece(c, layer, 0, k).bytes;
        if (sum > ret_info->expert_bytes)
            ret_info->expert_bytes = sum;
    }
}

void checkpoint_readers_set(struct checkpoint *c, unsigned n)
{
    c->n_readers = n;
}

uint64_t checkpoint_bytes_read(const struct checkpoint *c)
{
    return c->bytes_read;
}
