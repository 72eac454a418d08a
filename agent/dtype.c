/* See dtype.h.  Pure. */
#include "agent/dtype.h"

#include <stddef.h>
#include <string.h>

static const struct {
    const char *name;
    uint32_t bits;
} dtype_table[] = {
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},      {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"F64", 64},    {"I64", 64},    {"U64", 64},    {"C64", 64},
};

uint32_t dtype_bits(const char *name)
{
    for (size_t i = 0; i < sizeof dtype_table / sizeof dtype_table[0]; i++)
        if (strcmp(dtype_table[i].name, name) == 0)
            return dtype_table[i].bits;
    return 0;
}

bool dtype_bytes(uint32_t bits, uint32_t dims, const uint64_t *shape, uint64_t *ret_bytes)
{
    uint64_t product = bits;
    for (uint32_t i = 0; i < dims; i++)
        if (__builtin_mul_overflow(product, shape[i], &product))
            return false;
    if (product % 8 != 0)
        return false;
    *ret_bytes = product / 8;
    return true;
}
