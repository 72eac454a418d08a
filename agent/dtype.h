/* Element types by the names that safetensors uses, and how many bits an element takes.  Pure. */
#ifndef EEP_AGENT_DTYPE_H
#define EEP_AGENT_DTYPE_H

#include <stdbool.h>
#include <stdint.h>

/* 0 for a name that is not in the table. */
uint32_t dtype_bits(const char *name);
/* Bytes of a tensor of this shape; false when the product overflows or is no whole number of bytes. */
bool dtype_bytes(uint32_t bits, uint32_t dims, const uint64_t *shape, uint64_t *ret_bytes);

#endif
