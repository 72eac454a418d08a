/* Between the records of coordinator/durable.h and the messages of proto/.  Pure, any thread. */
#ifndef EEP_COORDINATOR_DURABLE_WIRE_H
#define EEP_COORDINATOR_DURABLE_WIRE_H

#include "common.pb-c.h"
#include "coordinator/durable.h"
#include "journal.pb-c.h"

/* Free with pb_free of common/topology_wire.h.  NULL when out of memory. */
Pb__OpRecord *op_record_to_pb(const struct op_record *record);
int op_record_from_pb(const Pb__OpRecord *pb, struct op_record *ret_record, struct err *err) MUST_CHECK;
Pb__JournalCommit *commit_record_to_pb(const struct commit_record *record);
int commit_record_from_pb(const Pb__JournalCommit *pb, struct commit_record *ret_record, struct err *err) MUST_CHECK;

#endif
