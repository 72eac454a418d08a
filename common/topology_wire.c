/* The nouns of common/topology.h on the wire.  Pure, any thread. */
#include "common/topology_wire.h"

#include <stdlib.h>
#include <string.h>

/* Bounds of shapes: far above any model, low enough that products of them cannot overflow. */
#define LAYERS_MAX 4096u
#define LOGICAL_MAX 65536u
#define SLOTS_MAX 65536u
#define DENSE_MAX (1u << 20)
#define ROUNDS_MAX (1u << 20)
#define CELL_LIVE 0x80000000u
#define CELL_ENTRIES 24 /* from this bit on: entries of a live slot beyond the first */
#define CELL_EXPERT 0x00ffffffu
#define MOVE_WORDS 7
#define RETIRE_WORDS 4

/* ---- helpers ---- */

void *pb_new(const ProtobufCMessageDescriptor *type)
{
    ProtobufCMessage *message = malloc(type->sizeof_message);
    if (message)
        protobuf_c_message_init(type, message);
    return message;
}

void pb_free(void *message)
{
    if (message)
        protobuf_c_message_free_unpacked(message, NULL);
}

int pb_string(const char *from, char *to, size_t size, const char *what, struct err *err)
{
    size_t len = strlen(from);
    if (len >= size)
        return err_set(err, ERR_PROTOCOL, "%s of %zu bytes, over the limit of %zu", what, len, size - 1);
    memcpy(to, from, len + 1);
    return 0;
}

bool name_valid(const char *name)
{
    size_t len = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
    return len > 0 && len < AGENT_ID_MAX && name[len] == '\0';
}

static bool bytes_new(ProtobufCBinaryData *ret_data, size_t len)
{
    uint8_t *data = malloc(len ? len : 1);
    if (!data)
        return false;
    ret_data->data = data;
    ret_data->len = len;
    return true;
}

static void put_u32(uint8_t *out, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        out[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t get_u32(const uint8_t *in)
{
    return (uint32_t)in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16 | (uint32_t)in[3] << 24;
}

static bool words64_to_bytes(const uint64_t *words, size_t n, ProtobufCBinaryData *ret_data)
{
    if (!bytes_new(ret_data, n * 8))
        return false;
    for (size_t i = 0; i < n; i++) {
        put_u32(ret_data->data + i * 8, (uint32_t)words[i]);
        put_u32(ret_data->data + i * 8 + 4, (uint32_t)(words[i] >> 32));
    }
    return true;
}

static void words64_from_bytes(const ProtobufCBinaryData *data, uint64_t *ret_words)
{
    for (size_t i = 0; i < data->len / 8; i++)
        ret_words[i] = get_u32(data->data + i * 8) | (uint64_t)get_u32(data->data + i * 8 + 4) << 32;
}

/* ---- members ---- */

static Pb__Member *member_to_pb(const struct member *member)
{
    Pb__Member *pb = pb_new(&pb__member__descriptor);
    if (!pb)
        return NULL;
    pb->id = strdup(member->id);
    pb->incarnation = member->incarnation;
    pb->address = strdup(member->address);
    pb->data_address = strdup(member->data_address);
    pb->endpoint = strdup(member->endpoint);
    pb->node = member->node;
    pb->serving = member->serving;
    pb->draining = member->draining;
    if (!pb->id || !pb->address || !pb->data_address || !pb->endpoint) {
        pb_free(pb);
        return NULL;
    }
    return pb;
}

static int member_from_pb(const Pb__Member *pb, struct member *ret_member, struct err *err)
{
    struct member m = {0};
    if (!name_valid(pb->id))
        return err_set(err, ERR_PROTOCOL, "a member's id is none: 1 to %d of letters, digits, '.', '_', '-'",
                       AGENT_ID_MAX - 1);
    if (pb->incarnation == 0)
        return err_set(err, ERR_PROTOCOL, "member %s has incarnation 0", pb->id);
    strcpy(m.id, pb->id);
    int rc;
    if ((rc = pb_string(pb->address, m.address, sizeof m.address, "a member's address", err)) < 0 ||
        (rc = pb_string(pb->data_address, m.data_address, sizeof m.data_address, "a data address", err)) < 0 ||
        (rc = pb_string(pb->endpoint, m.endpoint, sizeof m.endpoint, "an endpoint", err)) < 0)
        return rc;
    m.incarnation = pb->incarnation;
    m.node = pb->node;
    m.serving = pb->serving;
    m.draining = pb->draining;
    *ret_member = m;
    return 0;
}

int members_to_pb(const struct member *members, uint32_t n, Pb__Member ***ret_pb, size_t *ret_n)
{
    Pb__Member **pb = calloc(n ? n : 1, sizeof(Pb__Member *));
    if (!pb)
        return ERR_NOMEM;
    for (uint32_t i = 0; i < n; i++) {
        pb[i] = member_to_pb(&members[i]);
        if (!pb[i]) {
            while (i > 0)
                pb_free(pb[--i]);
            free(pb);
            return ERR_NOMEM;
        }
    }
    *ret_pb = pb;
    *ret_n = n;
    return 0;
}

int members_from_pb(Pb__Member *const *pb, size_t n, struct member **ret_members, struct err *err)
{
    if (n > RANKS_MAX)
        return err_set(err, ERR_PROTOCOL, "%zu members, over the limit of %d", n, RANKS_MAX);
    if (n == 0) {
        *ret_members = NULL;
        return 0;
    }
    struct member *members = calloc(n, sizeof *members);
    if (!members)
        return err_set(err, ERR_NOMEM, "no memory for %zu members", n);
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        rc = member_from_pb(pb[i], &members[i], err);
        for (size_t k = 0; k < i && rc == 0; k++)
            if (strcmp(members[k].id, members[i].id) == 0)
                rc = err_set(err, ERR_PROTOCOL, "member %s is there twice", members[i].id);
    }
    if (rc < 0) {
        free(members);
        return rc;
    }
    *ret_members = members;
    return 0;
}

/* ---- expert maps ---- */

Pb__ExpertMap *expert_map_to_pb(const struct expert_map *map)
{
    Pb__ExpertMap *pb = pb_new(&pb__expert_map__descriptor);
    if (!pb)
        return NULL;
    size_t cells = (size_t)map->layers * map->ranks * map->slots;
    pb->layers = map->layers;
    pb->logical = map->logical;
    pb->ranks = map->ranks;
    pb->slots = map->slots;
    pb->version = map->version;
    if (!bytes_new(&pb->cells, cells * 4)) {
        pb_free(pb);
        return NULL;
    }
    for (size_t i = 0; i < cells; i++)
        put_u32(pb->cells.data + i * 4,
                (uint32_t)(map->held[i] + 1) |
                    (map->live[i] ? CELL_LIVE | (map->live[i] - 1u) << CELL_ENTRIES : 0));
    return pb;
}

int expert_map_from_pb(const Pb__ExpertMap *pb, struct expert_map **ret_map, struct err *err)
{
    if (pb->layers == 0 || pb->layers > LAYERS_MAX || pb->logical == 0 || pb->logical > LOGICAL_MAX ||
        pb->ranks == 0 || pb->ranks > RANKS_MAX || pb->slots == 0 || pb->slots > SLOTS_MAX ||
        pb->cells.len != (uint64_t)pb->layers * pb->ranks * pb->slots * 4)
        return err_set(err, ERR_PROTOCOL,
                       "an expert map of %zu bytes does not fit its shape: %u layers, %u experts, %u ranks, %u slots",
                       pb->cells.len, pb->layers, pb->logical, pb->ranks, pb->slots);
    struct expert_map *map = expert_map_new(pb->layers, pb->logical, pb->ranks, pb->slots);
    if (!map)
        return err_set(err, ERR_NOMEM, "no memory for an expert map of %zu bytes", pb->cells.len);
    map->version = pb->version;
    for (size_t i = 0; i < pb->cells.len / 4; i++) {
        uint32_t cell = get_u32(pb->cells.data + i * 4);
        uint32_t held = cell & CELL_EXPERT, more = (cell & ~CELL_LIVE) >> CELL_ENTRIES; /* expert + 1; entries - 1 */
        bool live = (cell & CELL_LIVE) != 0;
        if (held > pb->logical || (live && held == 0) || more >= ENTRIES_MAX || (more && !live)) {
            expert_map_unref(map);
            return err_set(err, ERR_PROTOCOL, "slot %zu of an expert map holds %#x, of %u experts", i, cell,
                           pb->logical);
        }
        map->held[i] = (int32_t)held - 1;
        map->live[i] = (uint8_t)(live ? 1 + more : 0);
    }
    *ret_map = map;
    return 0;
}

/* ---- views ---- */

Pb__View *view_to_pb(const struct view *view)
{
    Pb__View *pb = pb_new(&pb__view__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = view->epoch;
    pb->manifest_digest = view->manifest_digest;
    pb->kv_bytes = view->kv_bytes;
    if (members_to_pb(view->members, view->n, &pb->members, &pb->n_members) < 0 ||
        (view->map && !(pb->map = expert_map_to_pb(view->map)))) {
        pb_free(pb);
        return NULL;
    }
    return pb;
}

int view_from_pb(const Pb__View *pb, struct view **ret_view, struct err *err)
{
    if (pb->map && pb->map->ranks != pb->n_members)
        return err_set(err, ERR_PROTOCOL, "a view of %zu members with a map of %u ranks", pb->n_members,
                       pb->map->ranks);
    struct member *members;
    int rc = members_from_pb(pb->members, pb->n_members, &members, err);
    if (rc < 0)
        return rc;
    struct view *view = view_new((uint32_t)pb->n_members);
    if (!view) {
        rc = err_set(err, ERR_NOMEM, "no memory for a view");
        goto free_members;
    }
    if (members)
        memcpy(view->members, members, pb->n_members * sizeof *members);
    view->epoch = pb->epoch;
    view->manifest_digest = pb->manifest_digest;
    view->kv_bytes = pb->kv_bytes;
    if (pb->map && (rc = expert_map_from_pb(pb->map, &view->map, err)) < 0) {
        view_unref(view);
        goto free_members;
    }
    *ret_view = view;
free_members:
    free(members);
    return rc;
}

/* ---- models ---- */

Pb__Model *model_to_pb(const struct model *model)
{
    Pb__Model *pb = pb_new(&pb__model__descriptor);
    if (!pb)
        return NULL;
    if (model->manifest) {
        if (!bytes_new(&pb->manifest, model->manifest->len)) {
            pb_free(pb);
            return NULL;
        }
        pb->has_manifest = true;
        memcpy(pb->manifest.data, model->manifest->data, model->manifest->len);
    }
    pb->manifest_digest = model->manifest_digest;
    pb->layers = model->layers;
    pb->logical = model->logical;
    pb->slots = model->slots;
    pb->expert_bytes = model->expert_bytes;
    pb->dense_bytes = model->dense_bytes;
    pb->n_dense = model->n_dense;
    pb->has_sealed = pb->sealed = model->sealed;
    if (!words64_to_bytes(model->dense_digest, model->n_dense, &pb->dense_digest) ||
        !words64_to_bytes(model->expert_digest, (size_t)model->layers * model->logical, &pb->expert_digest)) {
        pb_free(pb);
        return NULL;
    }
    return pb;
}

int model_from_pb(const Pb__Model *pb, struct model **ret_model, struct err *err)
{
    if (pb->layers > LAYERS_MAX || pb->logical > LOGICAL_MAX || pb->slots > SLOTS_MAX || pb->n_dense > DENSE_MAX ||
        pb->dense_digest.len != (uint64_t)pb->n_dense * 8 ||
        pb->expert_digest.len != (uint64_t)pb->layers * pb->logical * 8)
        return err_set(err, ERR_PROTOCOL,
                       "a model's digests (%zu and %zu bytes) do not fit its shape: %u layers, %u experts, %u slots, "
                       "%u dense regions",
                       pb->dense_digest.len, pb->expert_digest.len, pb->layers, pb->logical, pb->slots, pb->n_dense);
    struct model *model = model_new(pb->layers, pb->logical, pb->slots, pb->n_dense);
    if (!model)
        return err_set(err, ERR_NOMEM, "no memory for a model");
    if (pb->has_manifest) {
        model->manifest = blob_new(pb->manifest.data, pb->manifest.len);
        if (!model->manifest) {
            model_unref(model);
            return err_set(err, ERR_NOMEM, "no memory for a manifest of %zu bytes", pb->manifest.len);
        }
    }
    model->manifest_digest = pb->manifest_digest;
    model->expert_bytes = pb->expert_bytes;
    model->dense_bytes = pb->dense_bytes;
    model->sealed = pb->has_sealed && pb->sealed;
    words64_from_bytes(&pb->dense_digest, model->dense_digest);
    words64_from_bytes(&pb->expert_digest, model->expert_digest);
    *ret_model = model;
    return 0;
}

/* ---- plans ---- */

static void retires_put(uint8_t *out, const struct retire *retires, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const struct retire *r = &retires[i];
        const uint32_t words[RETIRE_WORDS] = {r->layer, r->party, r->slot, r->round};
        for (int k = 0; k < RETIRE_WORDS; k++, out += 4)
            put_u32(out, words[k]);
    }
}

Pb__Plan *plan_to_pb(const struct plan *plan)
{
    Pb__Plan *pb = pb_new(&pb__plan__descriptor);
    if (!pb)
        return NULL;
    pb->parties = plan->parties;
    pb->rounds_before = plan->rounds_before;
    pb->rounds_after = plan->rounds_after;
    pb->bound_hard = plan->bound_hard;
    pb->bound_fill = plan->bound_fill;
    pb->arrivals_before = plan->arrivals_before;
    pb->arrivals_after = plan->arrivals_after;
    pb->target = expert_map_to_pb(plan->target);
    if (!pb->target || !bytes_new(&pb->moves, (size_t)plan->n_moves * MOVE_WORDS * 4) ||
        !bytes_new(&pb->retires, (size_t)plan->n_retires * RETIRE_WORDS * 4) ||
        !bytes_new(&pb->wakes, (size_t)plan->n_wakes * RETIRE_WORDS * 4) || !bytes_new(&pb->dormant, plan->n_moves)) {
        pb_free(pb);
        return NULL;
    }
    pb->has_wakes = pb->has_dormant = 1;
    uint8_t *out = pb->moves.data;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        const uint32_t words[MOVE_WORDS] = {m->layer, m->expert, m->src, m->src_slot, m->dst, m->dst_slot, m->round};
        for (int k = 0; k < MOVE_WORDS; k++, out += 4)
            put_u32(out, words[k]);
    }
    retires_put(pb->retires.data, plan->retires, plan->n_retires);
    retires_put(pb->wakes.data, plan->wakes, plan->n_wakes);
    for (uint32_t i = 0; i < plan->n_moves; i++)
        pb->dormant.data[i] = plan->moves[i].dormant != 0;
    return pb;
}

static int plan_moves_from_pb(const Pb__Plan *pb, struct plan *plan, struct err *err)
{
    const struct expert_map *t = plan->target;
    const uint32_t rounds = plan->rounds_before + plan->rounds_after;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const uint8_t *in = pb->moves.data + (size_t)i * MOVE_WORDS * 4;
        struct move m = {get_u32(in),      get_u32(in + 4),  get_u32(in + 8), get_u32(in + 12),
                         get_u32(in + 16), get_u32(in + 20), get_u32(in + 24), 0};
        if (m.layer >= t->layers || m.expert >= t->logical || m.src >= plan->parties || m.dst >= plan->parties ||
            m.src_slot >= t->slots || m.dst_slot >= t->slots || m.round >= rounds ||
            (i > 0 && m.round < plan->moves[i - 1].round))
            return err_set(err, ERR_PROTOCOL,
                           "move %u of a plan is outside its shape: layer %u, expert %u, %u/%u -> %u/%u, round %u", i,
                           m.layer, m.expert, m.src, m.src_slot, m.dst, m.dst_slot, m.round);
        plan->moves[i] = m;
    }
    for (uint32_t i = 0; i < plan->n_moves && pb->has_dormant; i++)
        plan->moves[i].dormant = pb->dormant.data[i] != 0;
    return 0;
}

/* Retires, or wakes. */
static int plan_retires_from_pb(const ProtobufCBinaryData *data, const struct plan *plan, struct retire *ret_retires,
                                struct err *err)
{
    const struct expert_map *t = plan->target;
    const uint32_t rounds = plan->rounds_before + plan->rounds_after;
    for (uint32_t i = 0; i < data->len / (RETIRE_WORDS * 4); i++) {
        const uint8_t *in = data->data + (size_t)i * RETIRE_WORDS * 4;
        struct retire r = {get_u32(in), get_u32(in + 4), get_u32(in + 8), get_u32(in + 12)};
        if (r.layer >= t->layers || r.party >= plan->parties || r.slot >= t->slots || r.round > rounds ||
            (i > 0 && r.round < ret_retires[i - 1].round))
            return err_set(err, ERR_PROTOCOL, "retire %u of a plan is outside its shape: layer %u, %u/%u, round %u", i,
                           r.layer, r.party, r.slot, r.round);
        ret_retires[i] = r;
    }
    return 0;
}

static int plan_wakes_from_pb(const Pb__Plan *pb, struct plan *plan, struct err *err)
{
    plan->n_wakes = (uint32_t)(pb->wakes.len / (RETIRE_WORDS * 4));
    plan->wakes = calloc((size_t)plan->n_wakes + 1, sizeof *plan->wakes);
    if (!plan->wakes)
        return err_set(err, ERR_NOMEM, "no memory for a plan");
    return plan_retires_from_pb(&pb->wakes, plan, plan->wakes, err);
}

int plan_from_pb(const Pb__Plan *pb, struct plan **ret_plan, struct err *err)
{
    const size_t move_bytes = MOVE_WORDS * 4, retire_bytes = RETIRE_WORDS * 4;
    if (pb->target->ranks != pb->parties || pb->moves.len % move_bytes != 0 || pb->retires.len % retire_bytes != 0 ||
        pb->moves.len / move_bytes > UINT32_MAX || pb->retires.len / retire_bytes > UINT32_MAX ||
        (pb->has_wakes && (pb->wakes.len % retire_bytes != 0 || pb->wakes.len / retire_bytes > UINT32_MAX)) ||
        (pb->has_dormant && pb->dormant.len != pb->moves.len / move_bytes) || pb->rounds_before > ROUNDS_MAX ||
        pb->rounds_after > ROUNDS_MAX)
        return err_set(err, ERR_PROTOCOL, "a plan over %u parties (target: %u) with %zu and %zu bytes of moves",
                       pb->parties, pb->target->ranks, pb->moves.len, pb->retires.len);
    struct expert_map *target;
    int rc = expert_map_from_pb(pb->target, &target, err);
    if (rc < 0)
        return rc;
    struct plan *plan = plan_new(pb->parties, (uint32_t)(pb->moves.len / move_bytes),
                                 (uint32_t)(pb->retires.len / retire_bytes));
    if (!plan) {
        expert_map_unref(target);
        return err_set(err, ERR_NOMEM, "no memory for a plan");
    }
    plan->target = target;
    plan->rounds_before = pb->rounds_before;
    plan->rounds_after = pb->rounds_after;
    plan->bound_hard = pb->bound_hard;
    plan->bound_fill = pb->bound_fill;
    plan->arrivals_before = pb->arrivals_before;
    plan->arrivals_after = pb->arrivals_after;
    rc = plan_moves_from_pb(pb, plan, err);
    if (rc == 0)
        rc = plan_retires_from_pb(&pb->retires, plan, plan->retires, err);
    if (rc == 0 && pb->has_wakes)
        rc = plan_wakes_from_pb(pb, plan, err);
    if (rc < 0) {
        plan_unref(plan);
        return rc;
    }
    *ret_plan = plan;
    return 0;
}
