/* libnccl.so.2, loaded at run time: a struct of function pointers under the names of nccl.h.
 *
 * Only files that the Makefile compiles when it found nccl.h include this (transport_nccl*.c).  Functions that came to
 * NCCL late are NULL when the library is too old for them: look before you call.  The library stays loaded for the life
 * of the process, since its own threads may outlive a communicator. */
#ifndef EEP_AGENT_NCCL_LIBRARY_H
#define EEP_AGENT_NCCL_LIBRARY_H

#include <nccl.h>
#include <stdbool.h>
#include <stddef.h>

#include "common/err.h"

/* There since 2.14, without which non-blocking communicators cannot be had. */
#define NCCL_FUNCTIONS(X)                                                                                              \
    X(ncclGetVersion)                                                                                                  \
    X(ncclGetUniqueId)                                                                                                 \
    X(ncclCommInitRankConfig)                                                                                          \
    X(ncclCommGetAsyncError)                                                                                           \
    X(ncclCommAbort) X(ncclGroupStart) X(ncclGroupEnd) X(ncclSend) X(ncclRecv) X(ncclGetErrorString)                   \
        X(ncclGetLastError)
/* ... and what came later: used where both the headers of the build and the library have it. */
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 3)
#define NCCL_OPTIONAL_FUNCTIONS(X) X(ncclCommShrink)
#define NCCL_HAS_SHRINK(library)   ((library)->ncclCommShrink != NULL)
#else
#define NCCL_OPTIONAL_FUNCTIONS(X)
#define NCCL_HAS_SHRINK(library) ((void)(library), false)
#endif

#define NCCL_LIBRARY_MEMBER(name) __typeof__(name) *name;
struct nccl_library {
    void *handle;
    int version; /* 22809 = 2.28.9 */
    NCCL_FUNCTIONS(NCCL_LIBRARY_MEMBER)
    NCCL_OPTIONAL_FUNCTIONS(NCCL_LIBRARY_MEMBER)
};
#undef NCCL_LIBRARY_MEMBER

/* ERR_UNSUPPORTED when there is no libnccl.so.2, or it is too old; says which of the two. */
int nccl_library_load(struct nccl_library *ret_library, struct err *err) MUST_CHECK;

/* "NCCL 2.28.9 with shrink", for people. */
void nccl_library_describe(const struct nccl_library *library, char *ret_text, size_t size);

/* Turns a ncclResult_t into an error: "cannot <what>: <NCCL's words> (<its last error>)".  0 for ncclSuccess and
 * ncclInProgress.  ERR_UNREACHABLE for a lost peer, ERR_INVALID for a wrong use, else ERR_IO. */
int nccl_check(const struct nccl_library *library, ncclComm_t comm, ncclResult_t result, struct err *err,
               const char *fmt, ...) __attribute__((format(printf, 5, 6))) MUST_CHECK;

#endif
