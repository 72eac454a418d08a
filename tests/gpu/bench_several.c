/* What weights moved between several GPUs cost beside plain operations of the same bytes; figures as lines of JSON,
 * which several.sh collects.
 *
 *     bench_several measure [OPTION...]   rounds (slots) and the broadcast of dense weights, by either transport,
 * beside one plain group of ncclSend and ncclRecv, ncclBroadcast, and plain copies bench_several sweep [OPTION...] the
 * same with other groupings than agents use, one thing changed at a time bench_several comm [OPTION...] communicators:
 * made, warmed, used again, ended bench_several memory                "0, 1234" for each GPU: MiB in use, as nvidia-smi
 * prints it
 *
 *     --ranks N         (2) rank i uses GPU i modulo their number
 *     --senders N       (half of them) the first ones, which have the weights; the others get them: a scale-up
 *     --slots N         (64) that each receiver gets
 *     --slot-bytes N    (9437184)
 *     --dense-bytes N   (1 GiB)
 *     --rounds N        (7) after one that warms up
 *
 * Plain operations and transports take turns; seconds are medians of the longest of all ranks, bytes those that one
 * receiver gets.  After each move every slot is compared with its source.  77 without a GPU or NCCL, with a sentence.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "agent/gpu_share.h"
#include "agent/memory.h"
#include "common/address.h"
#include "common/clock.h"
#include "tests/gpu/bench_several.h"

const char *const transport_names[TRANSPORTS] = {"cuda_peer", "nccl"};

/* ---- figures ---- */

static void print_head(const struct party *p, const char *name, const char *transport)
{
    const char *channels = getenv("NCCL_MAX_NCHANNELS");
    printf("{\"name\": \"%s\", \"transport\": \"%s\", \"ranks\": %u, \"gpus\": %u, \"channels\": %s", name, transport,
           p->o->ranks, p->o->gpus, channels ? channels : "null");
}

static void print_times(const char *key, const struct bench_times *t, uint64_t bytes)
{
    double s = (double)bench_median(t) / 1e9;
    printf(", \"%sseconds\": %.9f, \"%sbest_seconds\": %.9f, \"%sgbps\": %.4f", key, s, key,
           (double)bench_best(t) / 1e9, key, (double)bytes / 1e9 / s);
}

/* A measurement beside its plain operations: seconds, GB/s into a receiver, ratios. */
void bench_sample_print(const struct party *p, const char *name, const struct sample *s, const char *more)
{
    if (p->self != 0)
        return;
    print_head(p, name, s->transport);
    printf(", \"senders\": %u, \"receivers\": %u, \"bytes\": %llu%s", p->o->senders, p->o->ranks - p->o->senders,
           (unsigned long long)s->bytes, more);
    print_times("", &s->ours, s->bytes);
    const double ours = (double)bench_median(&s->ours);
    printf(", \"plain\": \"%s\"", s->plain_name);
    print_times("plain_", &s->plain, s->bytes);
    printf(", \"ratio_plain\": %.4f", (double)bench_median(&s->plain) / ours);
    if (s->copies.n) {
        print_times("copies_", &s->copies, s->bytes);
        printf(", \"ratio_copies\": %.4f", (double)bench_median(&s->copies) / ours);
    }
    puts("}");
    fflush(stdout);
}

/* ---- what moves ---- */

static uint64_t region_bytes(const struct options *o)
{
    uint64_t slots = o->slots * o->slot;
    return slots > o->dense ? slots : o->dense;
}

static uint64_t *sum_of(const struct options *o, uint32_t sender, uint32_t slot)
{
    return &o->sums[(size_t)sender * o->slots + slot];
}

static uint32_t source_of(const struct party *p, uint32_t receiver, uint32_t slot)
{
    return (slot + receiver) % p->o->senders;
}

static uint32_t place_of(const struct party *p, uint32_t slot)
{
    return (uint32_t)(((uint64_t)slot * 7919 + p->turn) % p->o->slots); /* a prime: scattered */
}

/* Every slot is two parts, as w13 and w2 of an expert are, from all senders by turns. */
static size_t items_make(struct party *p)
{
    const struct options *o = p->o;
    const size_t part = o->slot / 24 * 16;
    size_t n = 0;
    p->turn++;
    for (uint32_t r = 0; r < o->ranks - o->senders; r++)
        for (uint32_t s = 0; s < o->slots; s++) {
            uint64_t from = s * o->slot, to = place_of(p, s) * o->slot;
            p->items[n++] = (struct transfer){
                .src = source_of(p, r, s),
                .dst = o->senders + r,
                .n = 2,
                .from = {{&p->region, from, part}, {&p->region, from + part, o->slot - part}},
                .to = {{&p->region, to, part}, {&p->region, to + part, o->slot - part}},
            };
        }
    return n;
}

static void digests(struct party *p, uint64_t *sums)
{
    struct err err = {0};
    struct memory_range *ranges = calloc(p->o->slots, sizeof *ranges);
    bench_must(ranges ? 0 : err_set(&err, ERR_NOMEM, "out of memory"), "digests", &err);
    for (uint32_t s = 0; s < p->o->slots; s++)
        ranges[s] = (struct memory_range){&p->region, s * p->o->slot, p->o->slot, 0};
    bench_must(p->memory->digests(p->memory, ranges, p->o->slots, sums, &err), "digests", &err);
    free(ranges);
}

/* Senders' slots differ from each other in every byte of theirs. */
static void sources_write(struct party *p)
{
    const struct cuda_driver *cu = &p->plain.device->driver;
    struct err err = {0};
    bench_must(cuda_device_use(p->plain.device, &err), "sources", &err);
    for (uint32_t s = 0; s < p->o->slots && p->self < p->o->senders; s++)
        bench_must(cuda_check(cu,
                              cu->cuMemsetD8Async((CUdeviceptr)(uintptr_t)p->region.base + s * p->o->slot,
                                                  (unsigned char)(1 + (s * 7u + p->self * 31u) % 251u), p->o->slot,
                                                  p->plain.streams[0]),
                              &err, "write a slot"),
                   "sources", &err);
    bench_must(cuda_check(cu, cu->cuStreamSynchronize(p->plain.streams[0]), &err, "write slots"), "sources", &err);
    if (p->self < p->o->senders)
        digests(p, sum_of(p->o, p->self, 0));
    bench_meet(p->stage);
}

static void slots_check(struct party *p, const char *name)
{
    const struct options *o = p->o;
    struct err err = {0};
    if (p->self < o->senders)
        return;
    uint64_t *sums = calloc(o->slots, sizeof *sums);
    bench_must(sums ? 0 : err_set(&err, ERR_NOMEM, "out of memory"), name, &err);
    digests(p, sums);
    for (uint32_t s = 0; s < o->slots; s++)
        if (sums[place_of(p, s)] != *sum_of(o, source_of(p, p->self - o->senders, s), s))
            bench_must(err_set(&err, ERR_CORRUPT, "slot %u of rank %u is not what was sent", s, p->self), name, &err);
    free(sums);
}

static struct transport_call call_now(void)
{
    return (struct transport_call){.deadline_ns = clock_now_ns() + 120000000000u, .cancel_fd = -1};
}

static uint64_t round_run(struct party *p, int which)
{
    struct err err = {0};
    struct transport_call call = call_now();
    uint64_t bytes;
    size_t n = items_make(p);
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    bench_must(p->transports[which]->move(p->groups[which], p->items, n, &call, &bytes, &err), transport_names[which],
               &err);
    uint64_t ns = bench_longest(p->stage, p->self, clock_now_ns() - begin);
    slots_check(p, transport_names[which]);
    return ns;
}

static uint64_t dense_run(struct party *p, int which)
{
    struct err err = {0};
    struct transport_call call = call_now();
    const struct extent extent = {&p->region, 0, p->o->dense};
    uint8_t have[BENCH_PARTIES_MAX];
    uint64_t bytes;
    for (uint32_t i = 0; i < p->o->ranks; i++)
        have[i] = i < p->o->senders ? TRANSPORT_HAS : TRANSPORT_WANTS;
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    bench_must(p->transports[which]->broadcast(p->groups[which], &extent, 1, have, &call, &bytes, &err),
               transport_names[which], &err);
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

/* One kind of measurement of one transport, by turns with its plain operations; the first turn warms up. */
struct sample bench_sample_take(struct party *p, int which, bool dense, bool copies)
{
    const struct options *o = p->o;
    struct sample s = {.transport = transport_names[which], .bytes = dense ? o->dense : o->slots * o->slot};
    const bool by_copies = which == PEER;
    s.plain_name = by_copies ? "copies" : dense ? "ncclBroadcast" : "group of ncclSend and ncclRecv";
    for (int k = 0; k <= o->rounds; k++) {
        uint64_t plain = by_copies ? plain_copies(&p->plain, o->senders, p->region.base, s.bytes)
                         : dense   ? plain_broadcast(&p->plain, p->cast, p->region.base, s.bytes)
                                   : plain_group(&p->plain, p->all, o->senders, p->region.base, s.bytes);
        uint64_t ours = dense ? dense_run(p, which) : round_run(p, which);
        uint64_t copied = copies ? plain_copies(&p->plain, o->senders, p->region.base, s.bytes) : 0;
        if (k == 0)
            continue;
        bench_take(&s.plain, plain);
        bench_take(&s.ours, ours);
        if (copies)
            bench_take(&s.copies, copied);
    }
    return s;
}

/* ---- modes ---- */

static uint64_t group_make(struct party *p, int which)
{
    struct err err = {0};
    struct transport *t = p->transports[which];
    struct blob *mine = NULL;
    if (p->self == 0)
        bench_must(t->group_id(t, &mine, &err), "id", &err);
    struct blob *id = bench_share(p->stage, p->self == 0, mine);
    struct transport_call call = call_now();
    uint64_t begin = clock_now_ns();
    bench_must(t->group_create(t, id, p->o->members, p->o->ranks, p->self, &call, &p->groups[which], &err),
               transport_names[which], &err);
    uint64_t ns = clock_now_ns() - begin;
    blob_unref(mine);
    blob_unref(id);
    return bench_longest(p->stage, p->self, ns);
}

static uint64_t group_end(struct party *p, int which)
{
    uint64_t begin = clock_now_ns();
    p->transports[which]->destroy(p->groups[which]);
    p->groups[which] = NULL;
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

static void measure_begin(struct party *p)
{
    uint32_t ranks[BENCH_PARTIES_MAX] = {0}, n = 1;
    for (uint32_t i = p->o->senders; i < p->o->ranks; i++)
        ranks[n++] = i;
    (void)plain_communicator(&p->plain, ranks, n, &p->cast);
    for (uint32_t i = 0; i < p->o->ranks; i++)
        ranks[i] = i;
    (void)plain_communicator(&p->plain, ranks, p->o->ranks, &p->all);
    plain_windows_open(&p->plain, p->o->senders, region_bytes(p->o), p->o->gpus);
    for (int which = 0; which < TRANSPORTS; which++)
        (void)group_make(p, which);
}

static void measure_end(struct party *p)
{
    for (int which = 0; which < TRANSPORTS; which++)
        (void)group_end(p, which);
    (void)plain_abort(&p->plain, p->cast);
    (void)plain_abort(&p->plain, p->all);
}

static void measure(struct party *p)
{
    measure_begin(p);
    for (int which = 0; which < TRANSPORTS; which++)
        for (int dense = 0; dense < 2; dense++) {
            struct sample s = bench_sample_take(p, which, dense, which == NCCL);
            bench_sample_print(p, dense ? "plain.dense" : "plain.round", &s, "");
        }
    measure_end(p);
}

static void sweep(struct party *p)
{
    measure_begin(p);
    for (int dense = 0; dense < 2; dense++) {
        bench_sweep_peer(p, dense);
        bench_sweep_nccl(p, dense);
    }
    measure_end(p);
}

static void print_comm(const struct party *p, const char *transport, const char *const *keys, const uint64_t *ns,
                       size_t n)
{
    if (p->self != 0)
        return;
    print_head(p, "comm", transport);
    for (size_t i = 0; i < n; i++)
        printf(", \"%s_seconds\": %.9f", keys[i], (double)ns[i] / 1e9);
    puts("}");
    fflush(stdout);
}

static void comm(struct party *p)
{
    const uint32_t ranks[BENCH_PARTIES_MAX] = {0, 1, 2, 3, 4, 5, 6, 7};
    const struct timespec settle = {.tv_nsec = 400000000}; /* what a group leaves is given back in the background */
    uint64_t ns[5];
    for (int which = 0; which < TRANSPORTS; which++) {
        static const char *const keys[] = {"made_and_warmed", "left", "again", "left_again", "closed"};
        ns[0] = group_make(p, which);
        ns[1] = group_end(p, which);
        nanosleep(&settle, NULL);
        ns[2] = group_make(p, which);
        ns[3] = group_end(p, which);
        uint64_t begin = clock_now_ns();
        p->transports[which]->close(p->transports[which]);
        p->transports[which] = NULL;
        ns[4] = bench_longest(p->stage, p->self, clock_now_ns() - begin);
        print_comm(p, transport_names[which], keys, ns, COUNT(keys));
    }
    static const char *const keys[] = {"made", "warmed", "exchanged", "ended"};
    ns[0] = plain_communicator(&p->plain, ranks, p->o->ranks, &p->all);
    ns[1] = plain_exchange(&p->plain, p->all, p->o->ranks, p->region.base);
    ns[2] = plain_exchange(&p->plain, p->all, p->o->ranks, p->region.base);
    ns[3] = plain_abort(&p->plain, p->all);
    print_comm(p, "plain nccl", keys, ns, COUNT(keys));
}

/* ---- parties ---- */

static void party_open(struct party *p)
{
    const struct options *o = p->o;
    struct err err = {0};
    char name[24];
    snprintf(p->gpu, sizeof p->gpu, "%u", p->self % o->gpus);
    snprintf(name, sizeof name, "cuda:%s", p->gpu);
    if (o->ranks > o->gpus)
        bench_must(gpu_share_host_id(&err), "NCCL_HOSTID", &err);
    p->memory = memory_open(name, &err);
    bench_must(p->memory ? 0 : -1, "memory", &err);
    p->transports[PEER] = transport_cuda_peer_open(p->gpu, &err);
    bench_must(p->transports[PEER] ? 0 : -1, "transport", &err);
    p->transports[NCCL] = transport_nccl_open(&(struct transport_nccl_options){.listen_fd = o->listeners[p->self],
                                                                               .gpu = p->gpu,
                                                                               .keep_ms = TRANSPORT_NCCL_KEEP_MS},
                                              &err);
    bench_must(p->transports[NCCL] ? 0 : -1, "transport", &err);
    plain_open(&p->plain, p->stage, p->self, p->gpu);
    bench_must(p->memory->alloc(p->memory, "weights", region_bytes(o), &p->region, &err), "weights", &err);
    p->items = calloc((size_t)(o->ranks - o->senders) * o->slots + 1, sizeof *p->items);
    bench_must(p->items ? 0 : err_set(&err, ERR_NOMEM, "out of memory"), "plan", &err);
    sources_write(p);
}

static void play(struct bench_stage *stage, uint32_t self, void *user)
{
    struct party p = {.o = user, .stage = stage, .self = self};
    party_open(&p);
    if (strcmp(p.o->mode, "comm") == 0)
        comm(&p);
    else if (strcmp(p.o->mode, "sweep") == 0)
        sweep(&p);
    else
        measure(&p);
    for (int which = 0; which < TRANSPORTS; which++)
        if (p.transports[which])
            p.transports[which]->close(p.transports[which]);
    bench_meet(stage); /* nobody maps another one's memory any more */
    plain_close(&p.plain);
    p.memory->release(p.memory, &p.region);
    p.memory->close(p.memory);
    free(p.items);
}

static int memory_print(void)
{
    struct gpu gpus[64];
    struct err err = {0};
    size_t n = 0;
    bench_must(gpu_list(gpus, COUNT(gpus), &n, &err), "GPUs", &err);
    for (size_t i = 0; i < n && i < COUNT(gpus); i++) {
        struct cuda_device *device;
        char index[12];
        snprintf(index, sizeof index, "%zu", i);
        bench_must(cuda_device_open(index, &device, &err), "GPU", &err);
        printf("%zu, %llu\n", i, (unsigned long long)(gpus[i].bytes - bench_free(device)) >> 20);
        cuda_device_close(device);
    }
    return 0;
}

static bool options_read(struct options *o, int argc, char **argv)
{
    o->mode = argc > 1 ? argv[1] : "measure";
    if (strcmp(o->mode, "measure") != 0 && strcmp(o->mode, "sweep") != 0 && strcmp(o->mode, "comm") != 0)
        return false;
    for (int i = 2; i < argc; i += 2) {
        unsigned long long value = i + 1 < argc ? strtoull(argv[i + 1], NULL, 10) : 0;
        if (strcmp(argv[i], "--ranks") == 0 && value <= BENCH_PARTIES_MAX)
            o->ranks = (uint32_t)value;
        else if (strcmp(argv[i], "--senders") == 0)
            o->senders = (uint32_t)value;
        else if (strcmp(argv[i], "--slots") == 0 && value < 100000)
            o->slots = (uint32_t)value;
        else if (strcmp(argv[i], "--slot-bytes") == 0 && value % 24 == 0)
            o->slot = value;
        else if (strcmp(argv[i], "--dense-bytes") == 0)
            o->dense = value / 4096 * 4096;
        else if (strcmp(argv[i], "--rounds") == 0 && value < 60)
            o->rounds = (int)value;
        else
            return false;
    }
    if (o->senders == 0)
        o->senders = (o->ranks + 1) / 2;
    const bool moves = strcmp(o->mode, "comm") != 0;
    return o->ranks > (moves ? o->senders : 0) && o->slots > 0 && o->slots % 7919 != 0 && o->slot > 0 && o->dense > 0 &&
           o->rounds > 0;
}

int main(int argc, char **argv)
{
    struct options o = {.ranks = 2, .slots = 64, .slot = 9437184, .dense = 1 << 30, .rounds = 7};
    struct nccl_library library;
    struct err err = {0};
    if (argc == 2 && strcmp(argv[1], "memory") == 0)
        return memory_print();
    if (!options_read(&o, argc, argv)) {
        fprintf(
            stderr,
            "usage: bench_several measure|sweep|comm [--ranks 1..%u] [--senders N, fewer] [--slots N] [--slot-bytes "
            "N, of 24] [--dense-bytes N] [--rounds N]\n",
            BENCH_PARTIES_MAX);
        return 2;
    }
    o.gpus = (uint32_t)bench_gpus();
    if (o.gpus == 0)
        return BENCH_SKIPPED;
    if (nccl_library_load(&library, &err) < 0) {
        fprintf(stderr, "no figures of NCCL: %s\n", err.text);
        return BENCH_SKIPPED;
    }
    o.sums = mmap(NULL, (size_t)o.senders * o.slots * sizeof *o.sums, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bench_must(o.sums == MAP_FAILED ? err_set(&err, ERR_NOMEM, "out of memory") : 0, "digests", &err);
    for (uint32_t i = 0; i < o.ranks; i++) {
        o.members[i].incarnation = i + 1;
        snprintf(o.members[i].id, sizeof o.members[i].id, "gpu%u", i);
        bench_must(address_listen("127.0.0.1:0", 0, &o.listeners[i], o.members[i].data_address, &err), "listen", &err);
    }
    return bench_run(o.ranks, false, play, &o) != 0;
}
