/* Is the history of one key linearizable?  A register with missing as a value of its own.
 *
 * The search of Wing and Gong with Lowe's memory of places that were tried: which operations are done, and what the value
 * is then.  An operation without an answer may have happened at any time since, or never. */
#ifndef EEP_TESTS_HARNESS_LINEAR_H
#define EEP_TESTS_HARNESS_LINEAR_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LINEAR_MISSING 0u
#define LINEAR_OPS_MAX 4096
#define LINEAR_WORDS (LINEAR_OPS_MAX / 64)
#define LINEAR_STEPS_MAX 2000000u

enum linear_kind { LINEAR_SET, LINEAR_GET, LINEAR_CAS, LINEAR_DELETE, LINEAR_APPEND, LINEAR_ADD };
struct linear_op {
    enum linear_kind kind;
    uint32_t value;    /* SET, CAS: the new one, unique; GET: what was read; APPEND: the word; ADD: the sum, as answered */
    uint32_t amount;   /* ADD: more than 0 */
    uint32_t expected; /* CAS */
    bool swapped;      /* CAS: as answered; then `seen` is what was there */
    uint32_t seen;
    bool known; /* it was answered */
    uint64_t begin_ns, end_ns; /* end: UINT64_MAX when not known */
};

/* A value of several words, as one number: that of a single word is the word. */
static inline uint32_t linear_append(uint32_t value, uint32_t word)
{
    if (value == LINEAR_MISSING)
        return word;
    uint64_t h = ((uint64_t)value << 32 | word) * 0x9e3779b97f4a7c15ull;
    return (uint32_t)((h ^ h >> 29) * 0xbf58476d1ce4e5b9ull >> 32) | 0x80000000u; /* no word of a short test */
}

struct linear {
    const struct linear_op *ops;
    size_t n;
    uint64_t done[LINEAR_WORDS];
    uint64_t *memo; /* open addressing: hashes of places that lead nowhere */
    size_t memo_cap, memo_n;
    unsigned steps;
};

static inline bool linear_is_done(const struct linear *l, size_t i)
{
    return l->done[i / 64] >> i % 64 & 1;
}

/* What the value is after it, or false: it cannot be done at this value. */
static inline bool linear_apply(const struct linear_op *op, uint32_t value, uint32_t *ret_value)
{
    switch (op->kind) {
    case LINEAR_SET: *ret_value = op->value; return true;
    case LINEAR_DELETE: *ret_value = LINEAR_MISSING; return true;
    case LINEAR_GET: *ret_value = value; return !op->known || op->value == value;
    case LINEAR_APPEND: *ret_value = linear_append(value, op->value); return true;
    case LINEAR_ADD: *ret_value = value + op->amount; return !op->known || op->value == *ret_value;
    case LINEAR_CAS:
        if (!op->known || op->swapped) {
            *ret_value = op->value;
            return value == op->expected;
        }
        *ret_value = value;
        return value == op->seen && value != op->expected;
    }
    return false;
}

static inline uint64_t linear_hash(const struct linear *l, uint32_t value)
{
    uint64_t h = (1469598103934665603ull ^ value) * 0x9e3779b97f4a7c15ull;
    for (size_t i = 0; i < (l->n + 63) / 64; i++) {
        h ^= l->done[i];
        h *= 1099511628211ull;
        h ^= h >> 29;
    }
    return h | 1;
}

/* true: this place is new. */
static inline bool linear_remember(struct linear *l, uint64_t hash)
{
    if (2 * (l->memo_n + 1) > l->memo_cap) {
        size_t cap = l->memo_cap ? 2 * l->memo_cap : 4096;
        uint64_t *memo = calloc(cap, sizeof *memo);
        for (size_t i = 0; i < l->memo_cap; i++)
            if (l->memo[i]) {
                size_t k = l->memo[i] % cap;
                while (memo[k])
                    k = (k + 1) % cap;
                memo[k] = l->memo[i];
            }
        free(l->memo);
        l->memo = memo;
        l->memo_cap = cap;
    }
    size_t k = hash % l->memo_cap;
    while (l->memo[k]) {
        if (l->memo[k] == hash)
            return false;
        k = (k + 1) % l->memo_cap;
    }
    l->memo[k] = hash;
    l->memo_n++;
    return true;
}

/* ops are in the order of their beginnings.  1: linearizable from here, 0: not, -1: given up. */
static inline int linear_search(struct linear *l, uint32_t value)
{
    if (++l->steps > LINEAR_STEPS_MAX)
        return -1;
    /* Whatever is next has begun before the first end of those that are left. */
    uint64_t first_end = UINT64_MAX;
    bool left = false;
    for (size_t i = 0; i < l->n && l->ops[i].begin_ns <= first_end; i++)
        if (!linear_is_done(l, i)) {
            left = left || l->ops[i].known;
            if (l->ops[i].end_ns < first_end)
                first_end = l->ops[i].end_ns;
        }
    if (!left && first_end == UINT64_MAX)
        return 1; /* only such as may never have happened */
    if (!linear_remember(l, linear_hash(l, value)))
        return 0;
    for (size_t i = 0; i < l->n && l->ops[i].begin_ns <= first_end; i++) {
        uint32_t next;
        if (linear_is_done(l, i) || !linear_apply(&l->ops[i], value, &next))
            continue;
        l->done[i / 64] |= 1ull << i % 64;
        int rc = linear_search(l, next);
        if (rc != 0)
            return rc;
        l->done[i / 64] &= ~(1ull << i % 64);
    }
    return 0;
}

static inline int linear_by_begin(const void *a, const void *b)
{
    uint64_t x = ((const struct linear_op *)a)->begin_ns, y = ((const struct linear_op *)b)->begin_ns;
    return x < y ? -1 : x > y;
}

/* An unanswered change whose value nobody ever saw may as well never have happened; where values build on others, all
 * stay. */
static inline size_t linear_prune(struct linear_op *ops, size_t n)
{
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (ops[i].kind == LINEAR_APPEND || ops[i].kind == LINEAR_ADD)
            return n;
    for (size_t i = 0; i < n; i++) {
        bool keep = ops[i].known;
        if (!ops[i].known && ops[i].kind == LINEAR_DELETE)
            keep = true;
        for (size_t k = 0; !keep && ops[i].kind != LINEAR_GET && k < n; k++)
            keep = k != i && ((ops[k].kind == LINEAR_GET && ops[k].known && ops[k].value == ops[i].value) ||
                              (ops[k].kind == LINEAR_CAS && (ops[k].expected == ops[i].value ||
                                                             (ops[k].known && ops[k].seen == ops[i].value))));
        if (keep)
            ops[kept++] = ops[i];
    }
    return kept;
}

/* Changes the array.  1: linearizable, beginning with a missing key; 0: not; -1: the search was given up. */
static inline int linear_check(struct linear_op *ops, size_t n)
{
    n = linear_prune(ops, n);
    if (n > LINEAR_OPS_MAX)
        return -1;
    qsort(ops, n, sizeof *ops, linear_by_begin);
    struct linear *l = calloc(1, sizeof *l);
    l->ops = ops;
    l->n = n;
    int rc = linear_search(l, LINEAR_MISSING);
    free(l->memo);
    free(l);
    return rc;
}

#endif
