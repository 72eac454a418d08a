/* Memory and descriptors of everything that the demo runs, from cycle to cycle. */
#include <stdio.h>

#include "tests/demo/demo.h"
#include "tests/harness/gpu_memory.h"

/* What may come and go without being a leak: the allocator's slack, a context's own caches. */
#define RSS_SLACK ((uint64_t)4 << 20) /* a process */
#define GPU_SLACK ((uint64_t)64 << 20)
#define FDS_SLACK 8

static void add(struct resources *r, pid_t pid)
{
    long rss = pid > 0 ? cluster_rss(pid) : 0;
    int fds = pid > 0 ? cluster_fds(pid) : 0;
    r->rss += rss > 0 ? (uint64_t)rss : 0;
    r->fds += fds > 0 ? fds : 0;
}

void resources_take(struct demo *d, int ranks)
{
    struct resources r = {.ranks = ranks, .gpu = gpu_memory_used(d->cluster.gpus)};
    add(&r, d->cluster.coordinator);
    for (int i = 0; i < d->agents; i++) {
        add(&r, d->cluster.agent[i]);
        add(&r, d->cluster.engine[i]);
    }
    if (d->n_resources < CYCLES_MAX)
        d->resources[d->n_resources++] = r;
}

static void show(const char *when, const struct resources *r)
{
    printf("  %-26s %-10.1f %-12d", when, (double)r->rss / 1e6, r->fds);
    if (r->gpu)
        printf(" %.1f", (double)r->gpu / 1e6);
    printf("\n");
}

bool resources_report(const struct demo *d)
{
    char last_name[32];
    if (d->n_resources < 3)
        return true;
    const struct resources *warm = &d->resources[1], *last = &d->resources[d->n_resources - 1];
    uint64_t processes = 1 + 2 * (uint64_t)d->agents;
    bool good = last->rss <= warm->rss + processes * RSS_SLACK && last->fds <= warm->fds + FDS_SLACK &&
                last->gpu <= warm->gpu + GPU_SLACK;
    printf("\n  all processes, at the end of  host MB    descriptors  GPU MB in use\n");
    snprintf(last_name, sizeof(last_name), "cycle %d", d->n_resources);
    show("cycle 1", &d->resources[0]);
    show("cycle 2", warm);
    show(last_name, last);
    if (!good)
        printf("  NOT GOOD: it grew from cycle 2 on\n");
    return good;
}
