/* The canonical encoding of a manifest: one manifest, one string of bytes.
 *
 *   "EEPMANI" u8 version | str producer | u32 layers, logical, slots | u32 n, regions | u32 n, tensors
 *   | u8 has_config, str32 config
 *   region: u8 kind | str name | u64 bytes | dense: u32 dense_group
 *                                          | expert: u32 layer, str part, u32 slots, u64 stride, u64 slot_bytes
 *   tensor: str name | u32 region | u64 offset | str dtype | u8 dims | dims x u64
 *   str: u8 length, bytes without NUL; str32: u32 length.  Integers are little-endian; nothing follows the end.
 *
 * Decoding checks every length before it reads or allocates, and the whole by manifest_validate.  Pure. */
#include <stdlib.h>
#include <string.h>

#include "agent/manifest.h"

#define MANIFEST_MAGIC      "EEPMANI"
#define MANIFEST_VERSION    1
#define MANIFEST_BYTES_MAX  (32u << 20) /* encoded */
#define MANIFEST_LAYERS_MAX 65536u
#define REGION_BYTES_MIN    15u /* encoded: bounds what a small blob can make us allocate */
#define TENSOR_BYTES_MIN    17u

/* ---- encoding ---- */

struct writer {
    uint8_t *data; /* NULL: only count */
    size_t len;
};

static void put(struct writer *w, const void *data, size_t len)
{
    if (w->data && len > 0)
        memcpy(w->data + w->len, data, len);
    w->len += len;
}

static void put_int(struct writer *w, uint64_t value, size_t bytes)
{
    uint8_t le[8];
    for (size_t i = 0; i < bytes; i++)
        le[i] = (uint8_t)(value >> (8 * i));
    put(w, le, bytes);
}

static void put_str(struct writer *w, const char *s)
{
    size_t len = strlen(s);
    put_int(w, len, 1);
    put(w, s, len);
}

static void put_region(struct writer *w, const struct region *r)
{
    put_int(w, r->kind, 1);
    put_str(w, r->name);
    put_int(w, r->bytes, 8);
    if (r->kind == REGION_DENSE) {
        put_int(w, r->dense_group, 4);
        return;
    }
    put_int(w, r->layer, 4);
    put_str(w, r->part);
    put_int(w, r->slots, 4);
    put_int(w, r->stride, 8);
    put_int(w, r->slot_bytes, 8);
}

static void put_manifest(struct writer *w, const struct manifest *m)
{
    put(w, MANIFEST_MAGIC, strlen(MANIFEST_MAGIC));
    put_int(w, MANIFEST_VERSION, 1);
    put_str(w, m->producer);
    put_int(w, m->layers, 4);
    put_int(w, m->logical, 4);
    put_int(w, m->slots, 4);
    put_int(w, m->n_regions, 4);
    for (uint32_t i = 0; i < m->n_regions; i++)
        put_region(w, &m->regions[i]);
    put_int(w, m->n_tensors, 4);
    for (uint32_t i = 0; i < m->n_tensors; i++) {
        const struct tensor *t = &m->tensors[i];
        put_str(w, t->name);
        put_int(w, t->region, 4);
        put_int(w, t->offset, 8);
        put_str(w, t->dtype);
        put_int(w, t->dims, 1);
        for (uint32_t d = 0; d < t->dims; d++)
            put_int(w, t->shape[d], 8);
    }
    put_int(w, m->config != NULL, 1);
    if (m->config) {
        size_t len = strlen(m->config);
        put_int(w, len, 4);
        put(w, m->config, len);
    }
}

int manifest_encode(const struct manifest *m, struct blob **ret_blob, struct err *err)
{
    int rc = manifest_validate(m, err);
    if (rc < 0)
        return rc;
    struct writer w = {0};
    put_manifest(&w, m);
    if (w.len > MANIFEST_BYTES_MAX || m->layers > MANIFEST_LAYERS_MAX)
        return err_set(err, ERR_LIMIT,
                       "manifest: %zu bytes and %u layers are more than the %u bytes and %u layers allowed", w.len,
                       m->layers, MANIFEST_BYTES_MAX, MANIFEST_LAYERS_MAX);
    uint8_t *data = malloc(w.len);
    if (!data)
        return err_set(err, ERR_NOMEM, "out of memory");
    w = (struct writer){.data = data};
    put_manifest(&w, m);
    struct blob *blob = blob_new(data, w.len);
    free(data);
    if (!blob)
        return err_set(err, ERR_NOMEM, "out of memory");
    *ret_blob = blob;
    return 0;
}

/* ---- decoding ---- */

struct reader {
    const uint8_t *at;
    size_t left;
    bool bad; /* something did not fit; everything read since is 0 */
};

static const uint8_t *take(struct reader *r, size_t len)
{
    if (r->bad || len > r->left) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *at = r->at;
    r->at += len;
    r->left -= len;
    return at;
}

static uint64_t take_int(struct reader *r, size_t bytes)
{
    const uint8_t *le = take(r, bytes);
    uint64_t value = 0;
    for (size_t i = 0; le && i < bytes; i++)
        value |= (uint64_t)le[i] << (8 * i);
    return value;
}

static uint32_t take_u32(struct reader *r)
{
    return (uint32_t)take_int(r, 4);
}

/* Into a zeroed array of `max` bytes. */
static void take_str(struct reader *r, char *ret_s, size_t max)
{
    size_t len = (size_t)take_int(r, 1);
    const uint8_t *s = take(r, len);
    if (!s)
        return;
    if (len >= max || memchr(s, '\0', len)) {
        r->bad = true;
        return;
    }
    memcpy(ret_s, s, len);
}

static void take_region(struct reader *r, struct region *ret_region)
{
    uint64_t kind = take_int(r, 1);
    ret_region->kind = kind == REGION_EXPERT ? REGION_EXPERT : REGION_DENSE;
    r->bad = r->bad || (kind != REGION_DENSE && kind != REGION_EXPERT);
    take_str(r, ret_region->name, sizeof ret_region->name);
    ret_region->bytes = take_int(r, 8);
    if (ret_region->kind == REGION_DENSE) {
        ret_region->dense_group = take_u32(r);
        return;
    }
    ret_region->layer = take_u32(r);
    take_str(r, ret_region->part, sizeof ret_region->part);
    ret_region->slots = take_u32(r);
    ret_region->stride = take_int(r, 8);
    ret_region->slot_bytes = take_int(r, 8);
}

static void take_tensor(struct reader *r, struct tensor *ret_tensor)
{
    take_str(r, ret_tensor->name, sizeof ret_tensor->name);
    ret_tensor->region = take_u32(r);
    ret_tensor->offset = take_int(r, 8);
    take_str(r, ret_tensor->dtype, sizeof ret_tensor->dtype);
    ret_tensor->dims = (uint32_t)take_int(r, 1);
    if (ret_tensor->dims > TENSOR_DIMS_MAX) {
        r->bad = true;
        ret_tensor->dims = 0;
    }
    for (uint32_t d = 0; d < ret_tensor->dims; d++)
        ret_tensor->shape[d] = take_int(r, 8);
}

/* A count of records of at least `min` bytes, and zeroed room for them; NULL with bad set when they cannot be there. */
static void *take_array(struct reader *r, size_t min, size_t size, uint32_t *ret_n)
{
    uint32_t n = take_u32(r);
    if (r->bad || n > r->left / min) {
        r->bad = true;
        return NULL;
    }
    void *array = calloc(n > 0 ? n : 1, size);
    if (!array)
        r->bad = true;
    else
        *ret_n = n;
    return array;
}

static void take_config(struct reader *r, char **ret_config)
{
    uint64_t has = take_int(r, 1);
    if (has == 0)
        return;
    size_t len = take_u32(r);
    const uint8_t *s = take(r, len);
    if (!s || has != 1 || memchr(s, '\0', len)) {
        r->bad = true;
        return;
    }
    *ret_config = malloc(len + 1);
    if (!*ret_config) {
        r->bad = true;
        return;
    }
    memcpy(*ret_config, s, len);
    (*ret_config)[len] = '\0';
}

static void take_manifest(struct reader *r, struct manifest *m)
{
    take_str(r, m->producer, sizeof m->producer);
    m->layers = take_u32(r);
    m->logical = take_u32(r);
    m->slots = take_u32(r);
    r->bad = r->bad || m->layers > MANIFEST_LAYERS_MAX;
    m->regions = take_array(r, REGION_BYTES_MIN, sizeof *m->regions, &m->n_regions);
    for (uint32_t i = 0; i < m->n_regions && !r->bad; i++)
        take_region(r, &m->regions[i]);
    m->tensors = take_array(r, TENSOR_BYTES_MIN, sizeof *m->tensors, &m->n_tensors);
    for (uint32_t i = 0; i < m->n_tensors && !r->bad; i++)
        take_tensor(r, &m->tensors[i]);
    take_config(r, &m->config);
}

int manifest_decode(const struct blob *blob, struct manifest *ret_m, struct err *err)
{
    if (blob->len > MANIFEST_BYTES_MAX)
        return err_set(err, ERR_LIMIT, "manifest: %zu bytes are more than the %u allowed", blob->len,
                       MANIFEST_BYTES_MAX);
    struct reader r = {.at = blob->data, .left = blob->len};
    const uint8_t *magic = take(&r, strlen(MANIFEST_MAGIC));
    if (!magic || memcmp(magic, MANIFEST_MAGIC, strlen(MANIFEST_MAGIC)) != 0)
        return err_set(err, ERR_CORRUPT, "manifest: these bytes are no manifest");
    uint64_t version = take_int(&r, 1);
    if (version != MANIFEST_VERSION)
        return err_set(err, ERR_CORRUPT, "manifest: version %llu, but this build reads version %d",
                       (unsigned long long)version, MANIFEST_VERSION);
    struct manifest m = {0};
    take_manifest(&r, &m);
    if (r.bad || r.left != 0) {
        manifest_done(&m);
        return err_set(err, ERR_CORRUPT, "manifest: the encoding of %zu bytes is damaged near byte %zu", blob->len,
                       blob->len - r.left);
    }
    if (manifest_validate(&m, err) < 0) {
        manifest_done(&m);
        return err_set(err, ERR_CORRUPT, "%s", err ? err->text : "");
    }
    *ret_m = m;
    return 0;
}
