/* The memory of the state record.  See record_memory.h.  Loop thread. */
#include "agent/record_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/digest.h"

#define RECORD_MAGIC   0x3144524f43455245ULL
#define RECORD_NAME    64
#define PAGE_BYTES     ((size_t)4096)
#define PART_BYTES_MAX ((size_t)64 << 20) /* no frame is longer; pages that are not written do not exist */

struct copy_header {
    _Atomic uint64_t checksum; /* of what follows; 0 = being written, or never written */
    uint64_t seq;
    uint64_t len[RECORD_PARTS], digest[RECORD_PARTS];
};

struct file_header {
    uint64_t magic;
    char cluster[RECORD_NAME], memory[RECORD_NAME];
    uint64_t checksum; /* of all before */
};

/* file_header | 2 x copy_header, each on a page | parts of copy 0 | parts of copy 1 */
#define FILE_BYTES (3 * PAGE_BYTES + 2 * (size_t)RECORD_PARTS * PART_BYTES_MAX)

struct record_memory {
    int fd;
    uint8_t *base;
    uint64_t seq;
    int newest;               /* which copy; -1 = none yet */
    struct agent_record in[2]; /* what they hold; zeroed = not known */
};

static struct copy_header *header_of(const struct record_memory *m, int k)
{
    return (struct copy_header *)(void *)(m->base + (size_t)(1 + k) * PAGE_BYTES);
}

static uint8_t *part_of(const struct record_memory *m, int k, int part)
{
    return m->base + 3 * PAGE_BYTES + ((size_t)k * RECORD_PARTS + (size_t)part) * PART_BYTES_MAX;
}

static uint64_t header_sum(const struct copy_header *h)
{
    uint64_t sum = digest_bytes((const uint8_t *)h + sizeof h->checksum, sizeof *h - sizeof h->checksum, 0);
    return sum ? sum : 1;
}

static uint64_t file_sum(const struct file_header *f)
{
    return digest_bytes(f, offsetof(struct file_header, checksum), 0);
}

static int memory_map(int fd, struct record_memory **ret_memory, struct err *err)
{
    struct record_memory *m = calloc(1, sizeof *m);
    void *base = m ? mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0) : MAP_FAILED;
    if (base == MAP_FAILED) {
        free(m);
        return err_set(err, ERR_NOMEM, "cannot map the state record: %s", strerror(errno));
    }
    m->fd = fd;
    m->base = base;
    m->newest = -1;
    *ret_memory = m;
    return 0;
}

int record_memory_new(const char *cluster, const char *memory, struct record_memory **ret_memory, struct err *err)
{
    struct record_memory *m;
    int fd = memfd_create("eep-record", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)FILE_BYTES) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0) {
        int saved = errno;
        if (fd >= 0)
            close(fd);
        return err_set(err, ERR_NOMEM, "cannot make memory for the state record: %s", strerror(saved));
    }
    int rc = memory_map(fd, &m, err);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    struct file_header *f = (struct file_header *)(void *)m->base;
    f->magic = RECORD_MAGIC;
    snprintf(f->cluster, sizeof f->cluster, "%s", cluster);
    snprintf(f->memory, sizeof f->memory, "%s", memory);
    f->checksum = file_sum(f);
    *ret_memory = m;
    return 0;
}

/* Long names are cut alike on both sides. */
static bool same_name(const char *kept, const char *ours)
{
    return strncmp(kept, ours, RECORD_NAME - 1) == 0;
}

int record_memory_adopt(int fd, const char *cluster, const char *memory, struct record_memory **ret_memory,
                        struct err *err)
{
    struct record_memory *m;
    struct stat st;
    int rc = 0;
    if (fstat(fd, &st) < 0 || (size_t)st.st_size != FILE_BYTES)
        rc = err_set(err, ERR_CORRUPT, "the state record is not one of this version");
    if (rc == 0)
        rc = memory_map(fd, &m, err);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    const struct file_header *f = (const struct file_header *)(void *)m->base;
    if (f->magic != RECORD_MAGIC || f->checksum != file_sum(f))
        rc = err_set(err, ERR_CORRUPT, "the state record's head has not its checksum");
    else if (!same_name(f->cluster, cluster))
        rc = err_set(err, ERR_CONFLICT, "the state record is of cluster %.63s, this agent of %s", f->cluster, cluster);
    else if (!same_name(f->memory, memory))
        rc = err_set(err, ERR_CONFLICT, "the state record is of memory %.63s, this agent has %s", f->memory, memory);
    if (rc < 0) {
        record_memory_close(m);
        return rc;
    }
    *ret_memory = m;
    return 0;
}

void record_memory_close(struct record_memory *m)
{
    if (!m)
        return;
    agent_record_done(&m->in[0]);
    agent_record_done(&m->in[1]);
    munmap(m->base, FILE_BYTES);
    close(m->fd);
    free(m);
}

int record_memory_fd(const struct record_memory *m)
{
    return m->fd;
}

/* ---- read ---- */

static int copy_check(const struct record_memory *m, int k, struct err *err)
{
    struct copy_header *h = header_of(m, k);
    uint64_t sum = atomic_load(&h->checksum);
    if (sum == 0)
        return ERR_NOTFOUND;
    bool good = sum == header_sum(h);
    for (int i = 0; i < RECORD_PARTS && good; i++)
        good = h->len[i] <= PART_BYTES_MAX && h->digest[i] == digest_bytes(part_of(m, k, i), (size_t)h->len[i], 0);
    return good ? 0 : err_set(err, ERR_CORRUPT, "a copy of the state record has not its checksum");
}

int record_memory_read(struct record_memory *m, struct agent_record *ret_record, struct err *err)
{
    int newest = -1;
    for (int k = 0; k < 2; k++) {
        int rc = copy_check(m, k, err);
        if (rc == ERR_CORRUPT)
            return rc;
        if (rc == 0 && (newest < 0 || header_of(m, k)->seq > header_of(m, newest)->seq))
            newest = k;
    }
    if (newest < 0)
        return err_set(err, ERR_NOTFOUND, "the state record was never written");
    struct record_bytes parts[RECORD_PARTS];
    for (int i = 0; i < RECORD_PARTS; i++)
        parts[i] = (struct record_bytes){part_of(m, newest, i), (size_t)header_of(m, newest)->len[i]};
    int rc = agent_record_decode(parts, ret_record, err);
    if (rc < 0)
        return rc;
    m->newest = newest;
    m->seq = header_of(m, newest)->seq;
    return 0;
}

/* ---- write ---- */

static const void *noun_of(const struct agent_record *r, int part)
{
    switch (part) {
    case RECORD_VIEW: return r->view;
    case RECORD_BEFORE: return r->before;
    case RECORD_MAP: return r->map;
    case RECORD_MODEL: return r->model;
    default: return NULL;
    }
}

static int part_write(struct record_memory *m, int k, const struct agent_record *record, int part, struct err *err)
{
    struct copy_header *h = header_of(m, k);
    uint8_t *data = NULL;
    size_t len = 0;
    int rc = agent_record_encode(record, (enum record_part)part, &data, &len, err);
    if (rc == 0 && len > PART_BYTES_MAX)
        rc = err_set(err, ERR_LIMIT, "a part of the state record has %zu bytes, over the limit of %zu", len,
                     PART_BYTES_MAX);
    if (rc == 0) {
        if (len > 0)
            memcpy(part_of(m, k, part), data, len);
        h->len[part] = len;
        h->digest[part] = digest_bytes(data, len, 0);
    }
    free(data);
    return rc;
}

int record_memory_write(struct record_memory *m, const struct agent_record *record, struct err *err)
{
    if (m->newest >= 0 && memcmp(&m->in[m->newest], record, sizeof *record) == 0)
        return 0;
    int k = m->newest == 0 ? 1 : 0, rc = 0;
    struct copy_header *h = header_of(m, k);
    struct agent_record *in = &m->in[k];
    atomic_store(&h->checksum, 0);
    for (int i = 0; i < RECORD_PARTS && rc == 0; i++)
        if (i == RECORD_FIGURES || !in->incarnation || noun_of(in, i) != noun_of(record, i))
            rc = part_write(m, k, record, i, err);
    if (rc < 0) {
        atomic_store(&header_of(m, 0)->checksum, 0);
        atomic_store(&header_of(m, 1)->checksum, 0);
        agent_record_done(&m->in[0]);
        agent_record_done(&m->in[1]);
        m->newest = -1;
        return rc;
    }
    h->seq = ++m->seq;
    atomic_store(&h->checksum, header_sum(h)); /* in the order of the program: a kill cuts between two instructions */
    agent_record_done(in);
    agent_record_copy(in, record);
    m->newest = k;
    return 0;
}
