/* Between the nouns of common/topology.h and the messages of proto/common.proto.  Pure, any thread.
 *
 * `*_to_pb` makes a message that owns everything it points to, in malloc'ed memory: free it with pb_free.  NULL when
 * out of memory.  `*_from_pb` checks everything (ERR_PROTOCOL, or ERR_NOMEM). */
#ifndef EEP_COMMON_TOPOLOGY_WIRE_H
#define EEP_COMMON_TOPOLOGY_WIRE_H

#include "common.pb-c.h"
#include "common/topology.h"

/* Agent ids and cluster names: 1 to AGENT_ID_MAX - 1 of [A-Za-z0-9._-]. */
bool name_valid(const char *name);

/* Arrays of n; *ret_members is malloc'ed (NULL for none).  At most RANKS_MAX, no id twice. */
int members_to_pb(const struct member *members, uint32_t n, Pb__Member ***ret_pb, size_t *ret_n) MUST_CHECK;
int members_from_pb(Pb__Member *const *pb, size_t n, struct member **ret_members, struct err *err) MUST_CHECK;

Pb__ExpertMap *expert_map_to_pb(const struct expert_map *map);
int expert_map_from_pb(const Pb__ExpertMap *pb, struct expert_map **ret_map, struct err *err) MUST_CHECK;
Pb__View *view_to_pb(const struct view *view);
int view_from_pb(const Pb__View *pb, struct view **ret_view, struct err *err) MUST_CHECK;
Pb__Model *model_to_pb(const struct model *model);
int model_from_pb(const Pb__Model *pb, struct model **ret_model, struct err *err) MUST_CHECK;
Pb__Plan *plan_to_pb(const struct plan *plan);
int plan_from_pb(const Pb__Plan *pb, struct plan **ret_plan, struct err *err) MUST_CHECK;

/* A message of this type, initialised, in malloc'ed memory; NULL when out of memory. */
void *pb_new(const ProtobufCMessageDescriptor *type);
/* Frees a message of pb_new or of the functions above, with all that it points to; takes NULL. */
void pb_free(void *message);

/* Copies a string that must fit with its NUL; ERR_PROTOCOL naming `what`. */
int pb_string(const char *from, char *to, size_t size, const char *what, struct err *err) MUST_CHECK;

#endif
