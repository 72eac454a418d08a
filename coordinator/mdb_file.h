/* An LMDB file of ours: one environment in one file, opened with care, growing as it fills.  Any one thread at a time. */
#ifndef EEP_COORDINATOR_MDB_FILE_H
#define EEP_COORDINATOR_MDB_FILE_H

#include <lmdb.h>

#include "common/err.h"

/* Opens dir/name and its unnamed database.  The file is walked in a process of its own first: a page that is damaged
 * can end whoever reads it, LMDB checks nothing.  ERR_CORRUPT, ERR_UNSUPPORTED, ERR_IO, ERR_NOMEM. */
int mdb_file_open(const char *dir, const char *name, unsigned flags, MDB_env **ret_env, MDB_dbi *ret_dbi,
                  struct err *err) MUST_CHECK;
/* After MDB_MAP_FULL, with no transaction open: a larger map.  0, or a code of LMDB. */
int mdb_file_grow(MDB_env *env) MUST_CHECK;
/* Sets the sentence for a code of LMDB: "FILE: what: why". */
int mdb_file_err(struct err *err, int mdb, const char *file, const char *what);

#endif
