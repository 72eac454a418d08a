/* The engine's own layout: experts fused and transposed, allocated in the agent's memory, filled from a checkpoint by
 * the engine itself, and sealed.  A rank that joins receives these bytes and needs neither this file nor a checkpoint.
 * Stepping thread. */
#ifndef EEP_TESTS_ENGINE_LAYOUT_H
#define EEP_TESTS_ENGINE_LAYOUT_H

#include "agent/libeep/eep.h"
#include "tests/engine/source.h"

#define LAYOUT_FUSED "eep-engine fused transposed" /* the manifest's producer */

/* Answers EEP_EVENT_LOAD: load_map [layers][slots], -1 = the slot stays empty. */
int layout_seal(struct eep *eep, const struct source *source, const int32_t *load_map, uint32_t layers, uint32_t slots,
                struct err *err) MUST_CHECK;

#endif
