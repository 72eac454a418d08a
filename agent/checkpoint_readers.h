/* Threads that read pieces of tensors from files into memory, several at a time, for the loader: reading from the page
 * cache is a copy, which one thread does at a fraction of what the memory and the link to a GPU can take, and a disk wants
 * several requests as well.
 *
 * The loader puts readings in and takes them out in the same order, at most READINGS at a time.  Calls are made by one
 * thread (the worker).  The threads touch nothing but the readings' own memory and files: no CUDA call is made by them. */
#ifndef EEP_AGENT_CHECKPOINT_READERS_H
#define EEP_AGENT_CHECKPOINT_READERS_H

#include <stdbool.h>

#include "agent/safetensors.h"

#define READERS_MAX 8u
#define READINGS    12u

struct reading {
    const struct safetensors_tensor *tensor;
    uint64_t from; /* in the tensor */
    void *data;
    size_t len;
    bool in_place; /* data is shared memory, whose pages may not be mapped here yet */
    /* digest_len > 0: take the digest of so many bytes at data, len of them read now, while they are in the cache. */
    size_t digest_len;
    uint64_t first_word;
    uint64_t digest;
    int code; /* of the reading; the sentence is in err */
    struct err err;
};

struct readers;
unsigned readers_default(void); /* as many as there are processors for us, from 4 to READERS_MAX */
/* n = 0: readers_default(). */
int readers_start(unsigned n, struct readers **ret_readers, struct err *err) MUST_CHECK;
/* Ends the threads, once each has read what it is at, and forgets the rest; takes NULL. */
void readers_stop(struct readers *r);
bool readers_full(const struct readers *r);
bool readers_empty(const struct readers *r);
/* Neither full nor NULL; the reading is copied. */
void readers_put(struct readers *r, const struct reading *reading);
/* The oldest one, when it is read; NULL when it is not within ms.  Valid until the next call of readers_put. */
const struct reading *readers_take(struct readers *r, unsigned ms);

#endif
