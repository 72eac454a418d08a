/* Region memory: a table of functions, one file a backend (memory_host.c: memfd; memory_cuda.c: GPU memory).
 *
 * A region is allocated once, stays at one address for the life of the agent, and can be exported as a descriptor
 * that an engine in another process maps.  All calls are made by the worker thread, except `close`. */
#ifndef EEP_AGENT_MEMORY_H
#define EEP_AGENT_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

struct memory_region {
    void *base;
    size_t bytes;   /* as asked; the mapping is rounded up to the backend's granularity */
    size_t mapped;
    int fd;         /* exportable by SCM_RIGHTS; the region owns it */
};

/* A piece of a region and the host memory that its bytes are put into first. */
#define MEMORY_STAGE_BYTES ((size_t)4 << 20) /* a multiple of 8: digests may be taken stage by stage */
#define MEMORY_STAGES      16u               /* at most as many are lent at a time */
struct memory_stage {
    struct memory_region *region;
    size_t offset, len;
    void *data; /* len bytes; any thread may fill them until stage_write */
    unsigned index; /* the backend's */
};

/* Bytes [offset, offset + len) of a region, whose digest counts words from first_word. */
struct memory_range {
    const struct memory_region *region;
    size_t offset, len;
    uint64_t first_word;
};

struct memory_backend {
    const char *name; /* "host" */
    const char *gpu;  /* UUID of the GPU whose memory it is; NULL: host memory */
    bool in_place;    /* data of a stage is the region's own memory: what is written there is there */
    /* May block.  Zeroed memory.  ERR_NOMEM names the size and the region. */
    int (*alloc)(struct memory_backend *self, const char *label, size_t bytes, struct memory_region *ret_region, struct err *err);
    /* Adopts a descriptor that somebody else allocated (an engine's own region). */
    int (*adopt)(struct memory_backend *self, int fd, size_t bytes, struct memory_region *ret_region, struct err *err);
    void (*release)(struct memory_backend *self, struct memory_region *region);
    /* Host bytes into the region.  `data` is free again on return, but a device may take the bytes a little later: they
     * are in the memory for everybody once a later digest or copy has returned. */
    int (*write)(struct memory_backend *self, struct memory_region *region, size_t offset, const void *data, size_t len, struct err *err);
    /* Bytes of the region into host memory, with everything that was written before. */
    int (*read)(struct memory_backend *self, const struct memory_region *region, size_t offset, void *ret_data, size_t len, struct err *err);
    /* Writing without a copy of one's own, several pieces at a time: stage_take lends host memory for a piece of at most
     * MEMORY_STAGE_BYTES, other threads may fill it meanwhile (read a file into it), and stage_write, in any order, does
     * with it what write() does.  stage_take blocks while every buffer is on its way to the device; ERR_LIMIT when all of
     * them are lent.  A stage is over with stage_write, also when that fails.  stages_free takes back what is lent -
     * nobody may write there any more - and frees the buffers, which are made as they are needed. */
    int (*stage_take)(struct memory_backend *self, struct memory_region *region, size_t offset, size_t len, struct memory_stage *ret_stage, struct err *err);
    int (*stage_write)(struct memory_backend *self, const struct memory_stage *stage, struct err *err);
    void (*stages_free)(struct memory_backend *self);
    /* The digest of design section 5 over [offset, offset + len), word index counted from 0 at offset. */
    int (*digest)(struct memory_backend *self, const struct memory_region *region, size_t offset, size_t len, uint64_t first_word, uint64_t *ret_digest, struct err *err);
    /* The digests of n ranges, as digest() gives them one by one; a device reads all of them in one go and is waited for
     * once.  ret_digests[n] are undefined on failure. */
    int (*digests)(struct memory_backend *self, const struct memory_range *ranges, size_t n, uint64_t *ret_digests, struct err *err);
    int (*copy)(struct memory_backend *self, struct memory_region *dst, size_t dst_offset, const struct memory_region *src, size_t src_offset, size_t len, struct err *err);
    /* 0, or why nothing here works any more in this process (a GPU that is lost).  Never blocks.  NULL: cannot happen. */
    int (*health)(struct memory_backend *self, struct err *err);
    void (*close)(struct memory_backend *self);
};

/* Look-up by name: "host", "cuda" (the first GPU), "cuda:1" or "cuda:GPU-uuid"; see gpu.h.  NULL and a sentence otherwise:
 * ERR_INVALID for an unknown name, ERR_UNSUPPORTED without GPU backend or driver, ERR_NOTFOUND without such a GPU. */
struct memory_backend *memory_open(const char *name, struct err *err);

#endif
