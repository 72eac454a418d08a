/* A checkpoint folder, read by the engine itself.  See source.h. */
#include "tests/engine/source.h"

#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int source_config(const char *dir, char **ret_text, struct err *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(err, ERR_IO, "cannot open %s: %s", path, strerror(errno));
    size_t len = 0, cap = 1u << 20;
    char *text = malloc(cap + 1);
    if (text)
        len = fread(text, 1, cap, f);
    bool bad = !text || ferror(f) || len == cap;
    fclose(f);
    if (bad) {
        free(text);
        return err_set(err, ERR_IO, "cannot read %s", path);
    }
    text[len] = '\0';
    *ret_text = text;
    return 0;
}

static int source_files(const char *dir, struct source *s, struct err *err)
{
    char pattern[4096];
    glob_t found = {0};
    snprintf(pattern, sizeof pattern, "%s/model.safetensors", dir);
    int rc = glob(pattern, 0, NULL, &found);
    if (rc == GLOB_NOMATCH) {
        snprintf(pattern, sizeof pattern, "%s/model-*-of-*.safetensors", dir);
        rc = glob(pattern, 0, NULL, &found);
    }
    if (rc)
        return err_set(err, ERR_NOTFOUND, "no model.safetensors and no shards of one in %s", dir);
    s->file = calloc(found.gl_pathc, sizeof *s->file);
    rc = s->file ? 0 : err_set(err, ERR_NOMEM, "out of memory for %zu files", found.gl_pathc);
    for (size_t i = 0; i < found.gl_pathc && rc == 0; i++) {
        rc = safetensors_open(found.gl_pathv[i], &s->file[i], err);
        s->n_files += rc == 0;
    }
    globfree(&found);
    return rc;
}

int source_open(const char *dir, struct source *ret_source, struct err *err)
{
    struct source s = {0};
    int rc = source_config(dir, &s.config, err);
    if (rc == 0)
        rc = decoder_config_parse(s.config, &s.shape, err);
    if (rc == 0)
        rc = source_files(dir, &s, err);
    if (rc) {
        source_done(&s);
        return err_wrap(err, "checkpoint %s", dir);
    }
    *ret_source = s;
    return 0;
}

void source_done(struct source *s)
{
    for (size_t i = 0; i < s->n_files; i++)
        safetensors_close(s->file[i]);
    free(s->file);
    free(s->config);
    memset(s, 0, sizeof *s);
}

const struct safetensors_tensor *source_find(const struct source *s, const char *name)
{
    const struct safetensors_tensor *t = NULL;
    for (size_t i = 0; i < s->n_files && !t; i++)
        t = safetensors_find(s->file[i], name);
    return t;
}

const struct safetensors_tensor *source_dense(const struct source *s, size_t *cursor)
{
    size_t before = 0; /* tensors of the files before this one */
    for (size_t i = 0; i < s->n_files; before += safetensors_count(s->file[i]), i++) {
        while (*cursor - before < safetensors_count(s->file[i])) {
            const struct safetensors_tensor *t = safetensors_at(s->file[i], *cursor - before);
            ++*cursor;
            if (!strstr(t->name, ".experts."))
                return t;
        }
    }
    return NULL;
}

static const uint16_t *source_projection(const struct source *s, uint32_t layer, uint32_t expert,
                                         const char *const *names, uint64_t rows, uint64_t cols, struct err *err)
{
    char name[256];
    for (; *names; names++) {
        snprintf(name, sizeof name, *names, layer, expert);
        const struct safetensors_tensor *t = source_find(s, name);
        if (!t)
            continue;
        if (strcmp(t->dtype, "BF16") == 0 && t->dims == 2 && t->shape[0] == rows && t->shape[1] == cols &&
            (uintptr_t)t->data % 2 == 0)
            return (const uint16_t *)(const void *)t->data;
        err_set(err, ERR_INVALID, "tensor %s is not BF16 [%lu, %lu]", name, (unsigned long)rows, (unsigned long)cols);
        return NULL;
    }
    err_set(err, ERR_NOTFOUND, "no projection of expert %u of layer %u by any known name", expert, layer);
    return NULL;
}

int source_expert(const struct source *s, enum decoder_layout layout, uint32_t layer, uint32_t expert,
                  uint16_t *ret_w13, uint16_t *ret_w2, struct err *err)
{
    static const char *const gate_names[] = {"model.layers.%u.mlp.experts.%u.gate_proj.weight",
                                             "model.layers.%u.block_sparse_moe.experts.%u.w1.weight", NULL};
    static const char *const up_names[] = {"model.layers.%u.mlp.experts.%u.up_proj.weight",
                                           "model.layers.%u.block_sparse_moe.experts.%u.w3.weight", NULL};
    static const char *const down_names[] = {"model.layers.%u.mlp.experts.%u.down_proj.weight",
                                             "model.layers.%u.block_sparse_moe.experts.%u.w2.weight", NULL};
    uint32_t hidden = s->shape.hidden, inner = s->shape.expert_hidden;
    const uint16_t *gate = source_projection(s, layer, expert, gate_names, inner, hidden, err);
    const uint16_t *up = gate ? source_projection(s, layer, expert, up_names, inner, hidden, err) : NULL;
    const uint16_t *down = up ? source_projection(s, layer, expert, down_names, hidden, inner, err) : NULL;
    if (!down)
        return err ? err->code : ERR_NOTFOUND;
    if (layout == DECODER_LAYOUT_ROWS) {
        size_t n = (size_t)inner * hidden;
        memcpy(ret_w13, gate, n * sizeof *gate);
        memcpy(ret_w13 + n, up, n * sizeof *up);
        memcpy(ret_w2, down, n * sizeof *down);
        return 0;
    }
    /* [H, 2I]: gate columns, then up columns */
    for (uint32_t h = 0; h < hidden; h++) {
        for (uint32_t i = 0; i < inner; i++) {
            ret_w13[(size_t)h * 2 * inner + i] = gate[(size_t)i * hidden + h];
            ret_w13[(size_t)h * 2 * inner + inner + i] = up[(size_t)i * hidden + h];
        }
    }
    for (uint32_t h = 0; h < hidden; h++) {
        for (uint32_t i = 0; i < inner; i++)
            ret_w2[(size_t)i * hidden + h] = down[(size_t)h * inner + i];
    }
    return 0;
}
