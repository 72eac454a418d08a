/* Loading libnccl.so.2, and its errors in our words.  Any thread; NCCL's last error is the process's. */
#include "agent/nccl_library.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "agent/gpu_errors.h"

#define NCCL_SONAME      "libnccl.so.2"
#define NCCL_VERSION_MIN 21400 /* non-blocking communicators */
#define LAST_ERROR_MAX   200   /* of NCCL's last error, which may be long */

static int library_symbol(void *handle, const char *name, void *ret_function, struct err *err)
{
    void *symbol = dlsym(handle, name);
    if (!symbol)
        return err_set(err, ERR_UNSUPPORTED, "%s has no %s: NCCL 2.14 or newer is needed, best 2.28", NCCL_SONAME,
                       name);
    memcpy(ret_function, &symbol, sizeof symbol); /* C has no cast from an object to a function */
    return 0;
}

int nccl_library_load(struct nccl_library *ret_library, struct err *err)
{
    struct nccl_library l = {0};
    l.handle = dlopen(NCCL_SONAME, RTLD_NOW | RTLD_LOCAL);
    if (!l.handle)
        return err_set(err, ERR_UNSUPPORTED, "cannot load %s: %s; install NCCL, or use --transport cuda_peer or host",
                       NCCL_SONAME, dlerror());
    int rc = 0;
#define LOAD(name)                                                                                                     \
    if (rc == 0)                                                                                                       \
        rc = library_symbol(l.handle, #name, &l.name, err);
    NCCL_FUNCTIONS(LOAD)
#undef LOAD
#define LOAD(name)                                                                                                     \
    if (rc == 0)                                                                                                       \
        (void)library_symbol(l.handle, #name, &l.name, NULL);
    NCCL_OPTIONAL_FUNCTIONS(LOAD)
#undef LOAD
    if (rc == 0 && l.ncclGetVersion(&l.version) != ncclSuccess)
        rc = err_set(err, ERR_UNSUPPORTED, "%s does not tell its version", NCCL_SONAME);
    if (rc == 0 && l.version < NCCL_VERSION_MIN)
        rc = err_set(err, ERR_UNSUPPORTED, "%s is version code %d: NCCL 2.14 or newer is needed, best 2.28",
                     NCCL_SONAME, l.version);
    if (rc < 0) {
        dlclose(l.handle);
        return rc;
    }
    *ret_library = l;
    return 0;
}

void nccl_library_describe(const struct nccl_library *library, char *ret_text, size_t size)
{
    int v = library->version;
    snprintf(ret_text, size, "NCCL %d.%d.%d%s", v / 10000, v / 100 % 100, v % 100,
             NCCL_HAS_SHRINK(library) ? " with shrink" : "");
}

/* The last error without its "file:line NCCL WARN" and on one line. */
static void last_error(const struct nccl_library *library, ncclComm_t comm, char *ret_text, size_t size)
{
    const char *text = library->ncclGetLastError(comm);
    snprintf(ret_text, size, "%s", text ? text : "");
    for (char *c = ret_text; *c; c++)
        if ((unsigned char)*c < ' ')
            *c = ' ';
    size_t len = strlen(ret_text);
    while (len > 0 && (ret_text[len - 1] == ' ' || ret_text[len - 1] == '.'))
        ret_text[--len] = '\0';
}

int nccl_check(const struct nccl_library *library, ncclComm_t comm, ncclResult_t result, struct err *err,
               const char *fmt, ...)
{
    if (result == ncclSuccess || result == ncclInProgress)
        return 0;
    gpu_error_count(GPU_ERROR_NCCL);
    char what[160], last[LAST_ERROR_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    last_error(library, comm, last, sizeof last);
    int code = result == ncclRemoteError                                     ? ERR_UNREACHABLE
               : result == ncclInvalidArgument || result == ncclInvalidUsage ? ERR_INVALID
                                                                             : ERR_IO;
    const char *hint =
        strstr(last, "Duplicate GPU") ? "; agents that share a GPU need --shared-gpu, every one of them" : "";
    return err_set(err, code, "cannot %s: NCCL: %s%s%s%s%s", what, library->ncclGetErrorString(result),
                   last[0] ? " (" : "", last, last[0] ? ")" : "", hint);
}
