/* One safetensors file, open and mapped read-only, everything in its header checked before a byte of a tensor is used.
 *
 * The format: u64 length of the header, the header (a JSON object: name -> {dtype, shape, data_offsets}, and
 * "__metadata__"), then one buffer that the tensors cover without holes or overlap.  Worker thread. */
#ifndef EEP_AGENT_SAFETENSORS_H
#define EEP_AGENT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "agent/manifest.h"

#define SAFETENSORS_HEADER_MAX 100000000u

struct safetensors;
struct safetensors_tensor {
    const struct safetensors *file;
    const char *name; /* owned by the file */
    char dtype[16];
    uint32_t dims;
    uint64_t shape[TENSOR_DIMS_MAX];
    const uint8_t *data; /* in the mapping; not touched by us */
    uint64_t bytes;
};

/* Errors are one sentence that names the file and, where it is one's fault, the tensor. */
int safetensors_open(const char *path, struct safetensors **ret_file, struct err *err) MUST_CHECK;
void safetensors_close(struct safetensors *file); /* takes NULL */
size_t safetensors_count(const struct safetensors *file);
/* Reads bytes [from, from + len) of the tensor, without the mapping: a file that became shorter since it was opened, or a
 * disk that fails, is an error with file and tensor in it and not a SIGBUS.  Blocks; any thread. */
int safetensors_read(const struct safetensors_tensor *t, uint64_t from, void *ret_data, size_t len,
                     struct err *err) MUST_CHECK;
/* In the order of their names. */
const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t i);
const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name); /* or NULL */

#endif
