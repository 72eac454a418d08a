/* The image of digest_kernel.cu: digest_kernel.c carries it, digest_kernel_stub.c does in a build without nvcc.
 * Any thread. */
#ifndef EEP_AGENT_DIGEST_KERNEL_H
#define EEP_AGENT_DIGEST_KERNEL_H

#define DIGEST_KERNEL_NAME    "digest_kernel"
#define DIGEST_KERNEL_THREADS 256u

/* A fatbin for cuModuleLoadData, or NULL: digest on the CPU then. */
const void *digest_kernel_image(void);

#endif
