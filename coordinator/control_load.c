/* The control service, the load of the experts: samples as the agents reported them, and the balance of the present
 * map. Loop thread. */
#include "coordinator/server_internal.h"

#include <stdlib.h>

#include "common/clock.h"
#include "common/topology_wire.h"

/* Nodes as `eepctl plan` means them: equally many ranks each, one after the other. */
static uint32_t view_nodes(const struct view *view)
{
    uint32_t nodes = 1;
    for (uint32_t r = 1; r < view->n; r++)
        nodes += view->members[r].node != view->members[r - 1].node;
    if (view->n % nodes)
        return 1;
    for (uint32_t r = 1; r < view->n; r++)
        if ((view->members[r].node != view->members[r - 1].node) != (r % (view->n / nodes) == 0))
            return 1;
    return nodes;
}

static bool sample_point(const struct load_history *load, const struct expert_map *map, uint32_t i, uint64_t now_ns,
                         Pb__LoadSample *pb)
{
    const struct load_sample *s = &load->v[i];
    size_t cells = (size_t)load->layers * load->logical;
    pb__load_sample__init(pb);
    pb->tokens = malloc(cells * sizeof *pb->tokens);
    if (!pb->tokens)
        return false;
    for (size_t k = 0; k < cells; k++)
        pb->tokens[k] = (uint64_t)s->tokens[k];
    pb->n_tokens = cells;
    pb->age_ms = now_ns > s->ended_ns ? (now_ns - s->ended_ns) / 1000000 : 0;
    pb->span_ms = (s->ended_ns - s->begun_ns) / 1000000;
    pb->windows = s->windows;
    pb->total = (uint64_t)s->total;
    pb->balance = load_balance(map, s->tokens);
    return true;
}

void control_load(struct session *session, const struct frame *frame, const ProtobufCMessage *request)
{
    (void)request;
    struct server *s = session->server;
    const struct load_history *load = coordinator_load(s->core);
    struct coordinator_status status;
    Pb__LoadSample *samples = calloc(LOAD_SAMPLES_MAX, sizeof *samples), *pointers[LOAD_SAMPLES_MAX];
    Pb__LoadReply reply = PB__LOAD_REPLY__INIT;
    coordinator_status(s->core, clock_now_ns(), &status);
    const struct expert_map *map = status.view ? status.view->map : NULL;
    reply.horizon_ms = s->config.core.load_horizon_ms;
    reply.window_ms = s->config.core.load_window_ms;
    reply.nodes = status.view ? view_nodes(status.view) : 1;
    reply.expert_bytes = status.model ? status.model->expert_bytes : 0;
    reply.has_uneven = true;
    reply.uneven = !s->config.core.even_split;
    reply.samples = pointers;
    reply.balance = reply.balance_samples = 1;
    reply.map = map ? expert_map_to_pb(map) : NULL;
    uint32_t n = map && load->layers == map->layers && load->logical == map->logical ? load_samples(load) : 0;
    bool ok = samples && (!map || reply.map);
    double *sum = ok && n ? load_sum(load) : NULL, balances = 0;
    for (uint32_t i = 0; ok && i < n; i++) {
        pointers[reply.n_samples++] = &samples[i];
        ok = sample_point(load, map, i, clock_now_ns(), &samples[i]);
        balances += samples[i].balance;
    }
    if (sum) {
        reply.balance = load_balance(map, sum);
        reply.balance_samples = balances / n;
    }
    if (ok)
        frame_reply(session, frame, &reply.base);
    else
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
    for (size_t i = 0; i < reply.n_samples; i++)
        free(samples[i].tokens);
    free(samples);
    free(sum);
    pb_free(reply.map);
}
