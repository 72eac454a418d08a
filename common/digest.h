/* The digest that verifies weights: 64-bit, position-dependent, summable in any order.
 *
 *     digest = sum over 8-byte little-endian words of mix(word, index)      (mod 2^64)
 *     mix(word, index) = fmix64(word ^ ((index + 1) * 0x9e3779b97f4a7c15))
 *
 * with fmix64 the finaliser of murmur3.  Pieces that start at word boundaries may be digested in any order, by any
 * number of threads, and their digests added.  A word of zero counts as well (fmix64 of a non-zero number), so a run
 * of zeros has the digest of its own length and place.
 *
 * Length: a last word of 1 to 7 bytes is padded with zeros, and mix(bytes, ~index) is added for the number of bytes
 * in it, so that "a" and "a\0" differ.  Hence only the last piece of a sum may have a length that is no multiple of 8.
 * No bytes: 0.
 *
 * It detects corruption and mix-ups, not attack.  Pure, any thread. */
#ifndef EEP_COMMON_DIGEST_H
#define EEP_COMMON_DIGEST_H

#include <stddef.h>
#include <stdint.h>

/* Digest of data as words first_word, first_word + 1, ...; no alignment is asked for. */
uint64_t digest_bytes(const void *data, size_t len, uint64_t first_word);

/* Words that `len` bytes count for: where the next part of a digest over several ranges goes on. */
static inline uint64_t digest_words(uint64_t len)
{
    return len / 8 + (len % 8 != 0);
}

#ifdef __CUDACC__ /* agent/digest_kernel.cu is compiled from the same definition */
#define DIGEST_INLINE static __device__ __forceinline__
#else
#define DIGEST_INLINE static inline
#endif

#define DIGEST_KEY 0x9e3779b97f4a7c15ULL /* times (index + 1): the key of a word */

DIGEST_INLINE uint64_t digest_mix_key(uint64_t word, uint64_t key)
{
    uint64_t x = word ^ key;
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    x ^= x >> 33;
    return x;
}

DIGEST_INLINE uint64_t digest_mix(uint64_t word, uint64_t index)
{
    return digest_mix_key(word, (index + 1) * DIGEST_KEY);
}

#endif
