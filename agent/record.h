/* The state record of an agent: what a restarted process needs to go on as the same incarnation (docs/protocol.md,
 * "Re-adoption"), and its encoded form.  The core fills it in and starts from it (agent_core_save, agent_core_restore);
 * where it is kept is agent/record_memory.c's business.
 *
 * Only a rank, or a leaver that has not been dismissed, is worth it: `held` says so.  Operations in progress are not in
 * it.  Pure data; any thread. */
#ifndef EEP_AGENT_RECORD_H
#define EEP_AGENT_RECORD_H

#include "common/topology.h"

/* Two records of the same state are equal byte by byte: whoever fills one in clears it first. */
struct agent_record {
    uint64_t incarnation;
    char id[AGENT_ID_MAX];
    bool held;           /* there is something to re-adopt; if not, nothing below means anything */
    bool engine;         /* an engine was attached */
    uint32_t lease_ms, heartbeat_ms, indoubt_ms;
    /* epochs: seen >= promised > applied, if there is a promise */
    uint64_t seen_epoch, applied_epoch, flipped_epoch, flipped_hold_ns;
    uint32_t map_rank;
    uint64_t map_step, map_unacked, map_flip;
    struct {
        uint64_t epoch, limit, next, wave; /* epoch 0 = none */
        uint32_t kind, engine;
    } promise;
    struct {
        uint64_t epoch, step, wave, next_step, op; /* epoch 0 = none; next_step 0 = not to be written */
        uint32_t kind;
        bool leaver;
    } flip;
    uint64_t run_to, revoked, attachment;
    uint64_t op;         /* an undecided operation, for which the engine may have prepared; 0 = none */
    uint64_t torn_epoch;
    char why[128];       /* of the torn step */
    /* References; immutable. */
    struct view *view;   /* NULL: a leaver */
    struct view *before; /* in use until the flip; NULL: none */
    struct expert_map *map;
    struct model *model;
};

void agent_record_done(struct agent_record *record); /* drops the references; leaves it zeroed */
/* A copy with references of its own. */
void agent_record_copy(struct agent_record *ret_copy, const struct agent_record *record);

/* ---- encoded: the figures, and the four nouns one by one, because they change seldom ---- */

enum record_part { RECORD_FIGURES, RECORD_VIEW, RECORD_BEFORE, RECORD_MAP, RECORD_MODEL, RECORD_PARTS };

struct record_bytes {
    const uint8_t *data;
    size_t len; /* 0: that noun is not there */
};
/* One part, in malloc'ed memory that the caller frees (NULL and 0 for a noun that is not there). */
int agent_record_encode(const struct agent_record *record, enum record_part part, uint8_t **ret_data, size_t *ret_len,
                        struct err *err) MUST_CHECK;
/* All parts.  Everything is checked: ERR_CORRUPT for what no agent of this version writes. */
int agent_record_decode(const struct record_bytes parts[RECORD_PARTS], struct agent_record *ret_record,
                        struct err *err) MUST_CHECK;

#endif
