/* One agent for each GPU, or several that all know of it (--shared-gpu).  No CUDA in here; any thread. */
#ifndef EEP_AGENT_GPU_SHARE_H
#define EEP_AGENT_GPU_SHARE_H

#include "agent/gpu.h"

/* Takes the GPU for this process, alone or shared with others that share it; *ret_fd holds it until it is closed, and a
 * process that dies leaves nothing behind.  ERR_CONFLICT when an agent of the other kind, or alone any, has it. */
int gpu_share_lock(const struct gpu *gpu, bool shared, int *ret_fd, struct err *err) MUST_CHECK;

/* NCCL refuses two ranks on one GPU unless they seem to be on different hosts: gives this process a NCCL_HOSTID of its
 * own, unless it has one.  Changes the environment: call it before there are threads, those of the CUDA driver too. */
int gpu_share_host_id(struct err *err) MUST_CHECK;

#endif
