/* How often calls of the CUDA driver and of NCCL have failed in this process.  Any thread. */
#ifndef EEP_AGENT_GPU_ERRORS_H
#define EEP_AGENT_GPU_ERRORS_H

#include <stdint.h>

enum gpu_error { GPU_ERROR_CUDA, GPU_ERROR_NCCL, GPU_ERRORS };

void gpu_error_count(enum gpu_error library);
uint64_t gpu_errors(enum gpu_error library);

#endif
