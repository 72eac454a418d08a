/* See safetensors.h.  Worker thread. */
#include "agent/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/dtype.h"

struct safetensors {
    char *path;
    int fd;
    uint8_t *map;
    size_t size;
    const uint8_t *buffer; /* after the header */
    uint64_t buffer_bytes;
    json_t *header; /* owns the names */
    struct safetensors_tensor *tensors;
    size_t n;
};

/* ---- the header ---- */

static int file_map(struct safetensors *file, const char *path, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOTFOUND : ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    int rc = 0;
    if (fstat(fd, &st) < 0)
        rc = err_set(err, ERR_IO, "%s: cannot stat: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        rc = err_set(err, ERR_INVALID, "%s: is not a regular file", path);
    else if (st.st_size < 8)
        rc =
            err_set(err, ERR_INVALID, "%s: %lld bytes are too few for a safetensors file", path, (long long)st.st_size);
    if (rc == 0) {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED)
            rc = err_set(err, ERR_IO, "%s: cannot map: %s", path, strerror(errno));
        else
            file->map = map, file->size = (size_t)st.st_size;
    }
    file->fd = fd;
    return rc;
}

static int header_parse(struct safetensors *file, const char *path, struct err *err)
{
    uint64_t len;
    memcpy(&len, file->map, sizeof len);
    len = le64toh(len);
    if (len > SAFETENSORS_HEADER_MAX)
        return err_set(err, ERR_LIMIT,
                       "%s: a header of %llu bytes is over the limit of %u; this is no safetensors file", path,
                       (unsigned long long)len, SAFETENSORS_HEADER_MAX);
    if (len > file->size - 8)
        return err_set(err, ERR_INVALID, "%s: the header has %llu bytes, but the file ends after %zu; it is truncated",
                       path, (unsigned long long)len, file->size);
    json_error_t json;
    file->header = json_loadb((const char *)file->map + 8, (size_t)len, JSON_REJECT_DUPLICATES, &json);
    if (!file->header)
        return err_set(err, ERR_INVALID, "%s: the header is no valid JSON at byte %d: %s", path, json.position,
                       json.text);
    if (!json_is_object(file->header))
        return err_set(err, ERR_INVALID, "%s: the header is no JSON object", path);
    file->buffer = file->map + 8 + len;
    file->buffer_bytes = file->size - 8 - len;
    return 0;
}

/* ---- one tensor ---- */

static bool json_u64(const json_t *value, uint64_t *ret_value)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *ret_value = (uint64_t)json_integer_value(value);
    return true;
}

static int shape_parse(const json_t *shape, const char *path, struct safetensors_tensor *t, struct err *err)
{
    if (!json_is_array(shape))
        return err_set(err, ERR_INVALID, "%s: tensor \"%s\" has no shape", path, t->name);
    if (json_array_size(shape) > TENSOR_DIMS_MAX)
        return err_set(err, ERR_LIMIT, "%s: tensor \"%s\" has %zu dimensions, at most %d are known", path, t->name,
                       json_array_size(shape), TENSOR_DIMS_MAX);
    t->dims = (uint32_t)json_array_size(shape);
    for (uint32_t d = 0; d < t->dims; d++)
        if (!json_u64(json_array_get(shape, d), &t->shape[d]))
            return err_set(err, ERR_INVALID, "%s: dimension %u of tensor \"%s\" is no size", path, d, t->name);
    return 0;
}

static int tensor_parse(const struct safetensors *file, const char *path, const json_t *value,
                        struct safetensors_tensor *t, struct err *err)
{
    const char *dtype = json_string_value(json_object_get(value, "dtype"));
    uint32_t bits = dtype ? dtype_bits(dtype) : 0;
    if (bits == 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: tensor \"%s\" has unknown dtype \"%.32s\"", path, t->name,
                       dtype ? dtype : "");
    strcpy(t->dtype, dtype); /* the names in the table fit */
    int rc = shape_parse(json_object_get(value, "shape"), path, t, err);
    if (rc < 0)
        return rc;
    const json_t *offsets = json_object_get(value, "data_offsets");
    uint64_t from, to, bytes;
    if (json_array_size(offsets) != 2 || !json_u64(json_array_get(offsets, 0), &from) ||
        !json_u64(json_array_get(offsets, 1), &to) || from > to)
        return err_set(err, ERR_INVALID, "%s: tensor \"%s\" has no data_offsets [from, to]", path, t->name);
    if (!dtype_bytes(bits, t->dims, t->shape, &bytes))
        return err_set(err, ERR_INVALID, "%s: the shape of tensor \"%s\" is out of bounds", path, t->name);
    if (bytes != to - from)
        return err_set(err, ERR_INVALID, "%s: tensor \"%s\" has %llu bytes by shape and dtype, but a range of %llu",
                       path, t->name, (unsigned long long)bytes, (unsigned long long)(to - from));
    if (to > file->buffer_bytes)
        return err_set(err, ERR_INVALID, "%s: tensor \"%s\" ends at byte %llu of %llu; the file is truncated", path,
                       t->name, (unsigned long long)to, (unsigned long long)file->buffer_bytes);
    t->file = file;
    t->data = file->buffer + from;
    t->bytes = bytes;
    return 0;
}

/* ---- all of them ---- */

static int compare_data(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->data != y->data)
        return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; /* empty ones first */
}

static int compare_name(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Sorted by place, each tensor begins where the one before ended. */
static int coverage_check(const struct safetensors *file, const char *path, struct err *err)
{
    uint64_t end = 0;
    const char *before = "the header";
    for (size_t i = 0; i < file->n; i++) {
        const struct safetensors_tensor *t = &file->tensors[i];
        uint64_t from = (uint64_t)(t->data - file->buffer);
        if (from < end)
            return err_set(err, ERR_INVALID, "%s: tensors \"%s\" and \"%s\" overlap at byte %llu", path, before,
                           t->name, (unsigned long long)from);
        if (from > end)
            return err_set(err, ERR_INVALID, "%s: %llu bytes before tensor \"%s\" belong to no tensor", path,
                           (unsigned long long)(from - end), t->name);
        end = from + t->bytes;
        before = t->name;
    }
    if (end != file->buffer_bytes)
        return err_set(err, ERR_INVALID, "%s: %llu bytes after the last tensor belong to no tensor", path,
                       (unsigned long long)(file->buffer_bytes - end));
    return 0;
}

static int tensors_parse(struct safetensors *file, const char *path, struct err *err)
{
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof *file->tensors);
    if (!file->tensors)
        return err_set(err, ERR_NOMEM, "out of memory");
    const char *name;
    json_t *value;
    json_object_foreach(file->header, name, value)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        struct safetensors_tensor t = {.name = name};
        int rc = tensor_parse(file, path, value, &t, err);
        if (rc < 0)
            return rc;
        file->tensors[file->n++] = t;
    }
    qsort(file->tensors, file->n, sizeof *file->tensors, compare_data);
    int rc = coverage_check(file, path, err);
    qsort(file->tensors, file->n, sizeof *file->tensors, compare_name);
    return rc;
}

int safetensors_open(const char *path, struct safetensors **ret_file, struct err *err)
{
    struct safetensors *file = calloc(1, sizeof *file);
    if (!file)
        return err_set(err, ERR_NOMEM, "out of memory");
    file->fd = -1;
    file->path = strdup(path);
    int rc = file->path ? file_map(file, path, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = header_parse(file, path, err);
    if (rc == 0)
        rc = tensors_parse(file, path, err);
    if (rc < 0) {
        safetensors_close(file);
        return rc;
    }
    *ret_file = file;
    return 0;
}

void safetensors_close(struct safetensors *file)
{
    if (!file)
        return;
    if (file->map)
        munmap(file->map, file->size);
    if (file->fd >= 0)
        close(file->fd);
    json_decref(file->header);
    free(file->tensors);
    free(file->path);
    free(file);
}

int safetensors_read(const struct safetensors_tensor *t, uint64_t from, void *ret_data, size_t len, struct err *err)
{
    const struct safetensors *file = t->file;
    uint64_t at = (uint64_t)(t->data - file->map) + from;
    for (size_t done = 0; done < len;) {
        ssize_t got = pread(file->fd, (uint8_t *)ret_data + done, len - done, (off_t)(at + done));
        if (got > 0)
            done += (size_t)got;
        else if (got == 0)
            return err_set(err, ERR_IO, "%s: tensor \"%s\": the file became shorter: it ends before byte %llu",
                           file->path, t->name, (unsigned long long)(at + len));
        else if (errno != EINTR)
            return err_set(err, ERR_IO, "%s: tensor \"%s\": cannot read at byte %llu: %s", file->path, t->name,
                           (unsigned long long)(at + done), strerror(errno));
    }
    return 0;
}

size_t safetensors_count(const struct safetensors *file)
{
    return file->n;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t i)
{
    return &file->tensors[i];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const struct safetensors_tensor key = {.name = name};
    return file->n == 0 ? NULL : bsearch(&key, file->tensors, file->n, sizeof *file->tensors, compare_name);
}
