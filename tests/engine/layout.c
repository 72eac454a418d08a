/* Allocating, filling and sealing the fused layout.  See layout.h. */
#include "tests/engine/layout.h"

#include "tests/engine/compute.h"

#include <stdlib.h>
#include <string.h>

#define DENSE_REGION "dense"
#define DENSE_ALIGN  256u

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + DENSE_ALIGN - 1) / DENSE_ALIGN * DENSE_ALIGN;
}

static int layout_err(struct err *err, int rc, const char *what)
{
    return err_set(err, rc, "%s: %s", what, eep_last_error());
}

static int layout_dense(struct eep *eep, const struct source *source, struct err *err)
{
    const struct safetensors_tensor *t;
    struct eep_region_spec spec = {.name = DENSE_REGION};
    void *data;
    for (size_t i = 0; (t = source_dense(source, &i));)
        spec.bytes += aligned(t->bytes);
    int rc = eep_region_alloc(eep, &spec, &data);
    if (rc)
        return layout_err(err, rc, "the dense region was not allocated");
    uint64_t at = 0;
    for (size_t i = 0; (t = source_dense(source, &i)); at += aligned(t->bytes)) {
        rc = compute_write(eep_device(eep), (uint8_t *)data + at, t->data, t->bytes, err);
        if (rc)
            return rc;
        rc = eep_tensor_add(eep, DENSE_REGION, t->name, at, t->dtype, t->dims, t->shape);
        if (rc)
            return layout_err(err, rc, t->name);
    }
    return 0;
}

static int layout_part(struct eep *eep, uint32_t layer, uint32_t slots, const char *part, uint64_t rows, uint64_t cols,
                       uint8_t **ret_data, struct err *err)
{
    uint64_t bytes = rows * cols * sizeof(uint16_t);
    struct eep_region_spec spec = {.expert = true,
                                   .layer = layer,
                                   .part = part,
                                   .slots = slots,
                                   .stride = bytes,
                                   .slot_bytes = bytes,
                                   .dtype = "BF16",
                                   .dims = 2,
                                   .shape = {rows, cols}};
    void *data;
    int rc = eep_region_alloc(eep, &spec, &data);
    if (rc)
        return layout_err(err, rc, "a region for experts was not allocated");
    *ret_data = data;
    return 0;
}

static int layout_experts(struct eep *eep, const struct source *source, const int32_t *load_map, uint32_t layer,
                          uint32_t slots, struct err *err)
{
    uint64_t hidden = source->shape.hidden, inner = source->shape.expert_hidden;
    size_t w13_bytes = 4 * hidden * inner, w2_bytes = 2 * hidden * inner;
    uint8_t *w13 = NULL, *w2 = NULL;
    uint16_t *staged = malloc(w13_bytes + w2_bytes); /* the regions may be memory that only a copy reaches */
    int rc = staged ? layout_part(eep, layer, slots, "w13t", hidden, 2 * inner, &w13, err)
                    : err_set(err, ERR_NOMEM, "out of memory for an expert");
    if (rc == 0)
        rc = layout_part(eep, layer, slots, "w2t", inner, hidden, &w2, err);
    for (uint32_t s = 0; s < slots && rc == 0; s++) {
        int32_t expert = load_map[(size_t)layer * slots + s];
        if (expert < 0)
            continue;
        rc = source_expert(source, DECODER_LAYOUT_TRANSPOSED, layer, (uint32_t)expert, staged,
                           staged + w13_bytes / sizeof *staged, err);
        if (rc == 0)
            rc = compute_write(eep_device(eep), w13 + s * w13_bytes, staged, w13_bytes, err);
        if (rc == 0)
            rc = compute_write(eep_device(eep), w2 + s * w2_bytes, staged + w13_bytes / sizeof *staged, w2_bytes, err);
    }
    free(staged);
    return rc;
}

int layout_seal(struct eep *eep, const struct source *source, const int32_t *load_map, uint32_t layers, uint32_t slots,
                struct err *err)
{
    if (layers != source->shape.layers)
        return err_set(err, ERR_INVALID, "asked to fill %u layers, the checkpoint has %u", layers,
                       source->shape.layers);
    int rc = layout_dense(eep, source, err);
    for (uint32_t l = 0; l < layers && rc == 0; l++)
        rc = layout_experts(eep, source, load_map, l, slots, err);
    if (rc)
        return rc;
    rc = eep_seal(eep, source->config);
    return rc ? layout_err(err, rc, "the layout was not sealed") : 0;
}
