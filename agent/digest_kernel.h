/* The image of digest_kernel.cu: digest_kernel.c carries it, digest_kernel_stub.c does in a build without nvcc.
 * Also what the kernel is given, which memory_cuda.c makes: the ranges to be digested, cut into pieces that blocks of
 * threads take in turn.  Any thread. */
#ifndef EEP_AGENT_DIGEST_KERNEL_H
#define EEP_AGENT_DIGEST_KERNEL_H

#define DIGEST_KERNEL_NAME    "digest_kernel"
#define DIGEST_KERNEL_THREADS 256u

/* digest_kernel(const struct digest_piece *pieces, unsigned int n, unsigned long long *sums) adds the digest of every
 * piece to its sum.  Only the last piece of a range may have a length that is no multiple of 8. */
struct digest_piece {
    unsigned long long at, len; /* in GPU memory */
    unsigned long long first_word;
    unsigned long long sum; /* index */
};

/* A fatbin for cuModuleLoadData, or NULL: digest on the CPU then. */
const void *digest_kernel_image(void);

#endif
