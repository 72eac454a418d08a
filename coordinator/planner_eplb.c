/* EPLB: groups to nodes, replicas within a node, replicas to GPUs.  Pure.
 *
 *   1. groups of experts are packed onto nodes: heaviest first, each onto the lightest node that has room
 *   2. within a node, every spare replica goes to the expert with the most load per replica
 *   3. the node's replicas are packed onto its GPUs, as in 1
 *
 * "The lightest" and "the most" are kept by heaps ordered by (value, index), so that a tie goes to the lower index and
 * the work is O(replicas log experts). */
#include "coordinator/planner_eplb.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* A load and an index as one number that orders by both: loads are not negative, so their bits order as they do. */
static uint64_t heap_item(float load, uint32_t index)
{
    uint32_t bits;
    load += 0.0f; /* of -0, too */
    memcpy(&bits, &load, sizeof bits);
    return (uint64_t)bits << 32 | index;
}

/* The same with the largest load first. */
static uint64_t heap_item_descending(float load, uint32_t index)
{
    return heap_item(load, index) ^ UINT64_C(0xffffffff00000000);
}

static uint32_t item_index(uint64_t item)
{
    return (uint32_t)item;
}

static float item_load(uint64_t item)
{
    uint32_t bits = (uint32_t)(item >> 32);
    float load;
    memcpy(&load, &bits, sizeof load);
    return load;
}

/* Scratch for one node of one layer, sized for the largest step. */
struct eplb_work {
    const struct eplb_input *in;
    uint32_t groups, nodes, group_size, groups_per_node, logical_per_node, physical_per_node, gpus_per_node, slots;
    uint64_t *heap, *sorted, *merged;
    uint32_t *pack, *place; /* where an item went: its pack, and its place in it */
    uint32_t *pack_items;
    float *group_load;
    uint32_t *node_expert;     /* [logical]: logical expert at (node, position) */
    float *expert_load;        /* of one node, by position */
    uint32_t *count, *replica; /* replicas of a position; position of a replica */
    float *replica_load;
    int32_t *phy2log; /* of the present layer */
    uint32_t *logcnt;
};

/* The smallest on top. */
static void heap_sink(uint64_t *heap, uint32_t n, uint32_t at)
{
    uint64_t item = heap[at];
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= item)
            break;
        heap[at] = heap[child];
    }
    heap[at] = item;
}

static void heap_build(uint64_t *heap, uint32_t n)
{
    for (uint32_t i = n / 2; i-- > 0;)
        heap_sink(heap, n, i);
}

/* Merge sort, heaviest first; equal loads stay in the order of their index. */
static void sort_descending(struct eplb_work *w, const float *load, uint32_t n)
{
    uint64_t *from = w->sorted, *to = w->merged;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t item = heap_item_descending(load[i], i);
        uint32_t run = i - i % 8, k = i; /* runs of 8 by insertion */
        for (; k > run && from[k - 1] > item; k--)
            from[k] = from[k - 1];
        from[k] = item;
    }
    for (uint32_t run = 8; run < n; run *= 2) {
        for (uint32_t start = 0; start < n; start += 2 * run) {
            uint32_t a = start, middle = start + run < n ? start + run : n;
            uint32_t b = middle, end = middle + run < n ? middle + run : n, k = start;
            while (a < middle && b < end) { /* without a branch on what cannot be guessed */
                bool first = from[a] < from[b];
                to[k++] = first ? from[a] : from[b];
                a += first;
                b += !first;
            }
            memcpy(to + k, from + a, (middle - a) * sizeof *to);
            memcpy(to + k + (middle - a), from + b, (end - b) * sizeof *to);
        }
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    w->sorted = from;
    w->merged = to;
}

/* Packs n items onto packs of equal size: w->pack and w->place of each item. */
static void balanced_packing(struct eplb_work *w, const float *load, uint32_t n, uint32_t packs)
{
    uint32_t per_pack = n / packs, open = packs;
    if (per_pack == 1) {
        for (uint32_t i = 0; i < n; i++) {
            w->pack[i] = i;
            w->place[i] = 0;
        }
        return;
    }
    sort_descending(w, load, n);
    for (uint32_t i = 0; i < packs; i++) {
        w->heap[i] = i; /* no load */
        w->pack_items[i] = 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t item = item_index(w->sorted[i]), pack = item_index(w->heap[0]);
        w->pack[item] = pack;
        w->place[item] = w->pack_items[pack]++;
        w->heap[0] = heap_item(item_load(w->heap[0]) + load[item], pack);
        if (w->pack_items[pack] == per_pack)
            w->heap[0] = w->heap[--open];
        heap_sink(w->heap, open, 0);
    }
}

/* Which positions of a node get the spare replicas.  The heap has the most load per replica on top. */
static void replicate(struct eplb_work *w)
{
    uint32_t n = w->logical_per_node;
    for (uint32_t i = 0; i < n; i++) {
        w->count[i] = 1;
        w->replica[i] = i;
        w->heap[i] = heap_item_descending(w->expert_load[i], i);
    }
    heap_build(w->heap, n);
    for (uint32_t i = n; i < w->physical_per_node; i++) {
        uint32_t hottest = item_index(w->heap[0]);
        w->replica[i] = hottest;
        w->count[hottest]++;
        w->heap[0] = heap_item_descending(w->expert_load[hottest] / (float)w->count[hottest], hottest);
        heap_sink(w->heap, n, 0);
    }
}

static void place_node(struct eplb_work *w, const float *load, uint32_t node)
{
    const uint32_t *expert = w->node_expert + (size_t)node * w->logical_per_node;
    for (uint32_t i = 0; i < w->logical_per_node; i++)
        w->expert_load[i] = load[expert[i]];
    replicate(w);
    for (uint32_t i = 0; i < w->physical_per_node; i++)
        w->replica_load[i] = w->expert_load[w->replica[i]] / (float)w->count[w->replica[i]];
    balanced_packing(w, w->replica_load, w->physical_per_node, w->gpus_per_node);
    int32_t *slots = w->phy2log + (size_t)node * w->physical_per_node;
    for (uint32_t i = 0; i < w->physical_per_node; i++)
        slots[w->pack[i] * w->slots + w->place[i]] = (int32_t)expert[w->replica[i]];
    for (uint32_t i = 0; i < w->logical_per_node; i++)
        w->logcnt[expert[i]] = w->count[i];
}

static void place_layer(struct eplb_work *w, const float *load)
{
    for (uint32_t g = 0; g < w->groups; g++) {
        w->group_load[g] = 0;
        for (uint32_t i = 0; i < w->group_size; i++)
            w->group_load[g] += load[g * w->group_size + i];
    }
    balanced_packing(w, w->group_load, w->groups, w->nodes);
    for (uint32_t g = 0; g < w->groups; g++)
        for (uint32_t i = 0; i < w->group_size; i++)
            w->node_expert[(w->pack[g] * w->groups_per_node + w->place[g]) * w->group_size + i] = g * w->group_size + i;
    for (uint32_t node = 0; node < w->nodes; node++)
        place_node(w, load, node);
}

static int eplb_check(const struct eplb_input *in, struct err *err)
{
    if (!in->layers || !in->logical || !in->physical || !in->groups || !in->nodes || !in->gpus)
        return err_set(err, ERR_INVALID, "layers, experts, slots, groups, nodes and GPUs must all be at least 1");
    if (in->physical < in->logical)
        return err_set(err, ERR_LIMIT, "%u experts do not fit into %u physical slots: give it %u or more", in->logical,
                       in->physical, in->logical);
    if (in->physical % in->gpus)
        return err_set(err, ERR_INVALID, "%u physical slots do not divide by %u GPUs", in->physical, in->gpus);
    bool hierarchical = in->groups % in->nodes == 0;
    if (hierarchical && in->logical % in->groups)
        return err_set(err, ERR_INVALID, "%u experts do not divide by %u groups", in->logical, in->groups);
    if (hierarchical && in->gpus % in->nodes)
        return err_set(err, ERR_INVALID, "%u GPUs do not divide by %u nodes", in->gpus, in->nodes);
    for (size_t i = 0; i < (size_t)in->layers * in->logical; i++)
        if (!isfinite(in->load[i]) || in->load[i] < 0)
            return err_set(err, ERR_INVALID, "load of expert %zu of layer %zu is %g: it must be a number >= 0",
                           i % in->logical, i / in->logical, (double)in->load[i]);
    return 0;
}

static void work_done(struct eplb_work *w)
{
    free(w->heap);
    free(w->sorted);
    free(w->merged);
    free(w->pack);
    free(w->place);
    free(w->pack_items);
    free(w->group_load);
    free(w->node_expert);
    free(w->expert_load);
    free(w->count);
    free(w->replica);
    free(w->replica_load);
}

static int work_init(struct eplb_work *w, const struct eplb_input *in, struct err *err)
{
    bool hierarchical = in->groups % in->nodes == 0;
    *w = (struct eplb_work){.in = in, .groups = hierarchical ? in->groups : 1, .nodes = hierarchical ? in->nodes : 1};
    w->group_size = in->logical / w->groups;
    w->groups_per_node = w->groups / w->nodes;
    w->logical_per_node = in->logical / w->nodes;
    w->physical_per_node = in->physical / w->nodes;
    w->gpus_per_node = in->gpus / w->nodes;
    w->slots = in->physical / in->gpus;
    size_t n = in->physical > in->gpus ? in->physical : in->gpus;
    w->heap = calloc(n, sizeof *w->heap);
    w->sorted = calloc(n, sizeof *w->sorted);
    w->merged = calloc(n, sizeof *w->merged);
    w->pack = calloc(n, sizeof *w->pack);
    w->place = calloc(n, sizeof *w->place);
    w->pack_items = calloc(n, sizeof *w->pack_items);
    w->group_load = calloc(w->groups, sizeof *w->group_load);
    w->node_expert = calloc(in->logical, sizeof *w->node_expert);
    w->expert_load = calloc(n, sizeof *w->expert_load);
    w->count = calloc(n, sizeof *w->count);
    w->replica = calloc(n, sizeof *w->replica);
    w->replica_load = calloc(n, sizeof *w->replica_load);
    if (!w->heap || !w->sorted || !w->merged || !w->pack || !w->place || !w->pack_items || !w->group_load ||
        !w->node_expert || !w->expert_load || !w->count || !w->replica || !w->replica_load) {
        work_done(w);
        return err_set(err, ERR_NOMEM, "no memory to place %u slots", in->physical);
    }
    return 0;
}

int eplb_place(const struct eplb_input *in, int32_t *ret_phy2log, uint32_t *ret_logcnt, struct err *err)
{
    struct eplb_work w;
    int rc = eplb_check(in, err);
    if (rc < 0)
        return rc;
    float *even = malloc(in->logical * sizeof *even);
    if (!even)
        return err_set(err, ERR_NOMEM, "no memory to place %u experts", in->logical);
    rc = work_init(&w, in, err);
    if (rc < 0) {
        free(even);
        return rc;
    }
    for (uint32_t e = 0; e < in->logical; e++)
        even[e] = 1;
    for (uint32_t layer = 0; layer < in->layers; layer++) {
        const float *load = in->load + (size_t)layer * in->logical;
        bool idle = true;
        for (uint32_t e = 0; e < in->logical && idle; e++)
            idle = !(load[e] > 0);
        w.phy2log = ret_phy2log + (size_t)layer * in->physical;
        w.logcnt = ret_logcnt + (size_t)layer * in->logical;
        place_layer(&w, idle ? even : load);
    }
    work_done(&w);
    free(even);
    return 0;
}
