/* The digest of weights against a definition written out byte by byte, and what it must tell apart; random numbers. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "common/digest.h"
#include "common/rand.h"
#include "tests/harness/suite.h"

/* digest.h's definition, slowly. */
static uint64_t digest_by_hand(const uint8_t *data, size_t len, uint64_t first_word)
{
    uint64_t sum = 0;
    for (size_t at = 0; at < len; at += 8) {
        uint64_t word = 0, index = first_word + at / 8;
        for (size_t i = 0; i < 8 && at + i < len; i++)
            word |= (uint64_t)data[at + i] << (8 * i);
        uint64_t x = word ^ ((index + 1) * 0x9e3779b97f4a7c15ULL);
        x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
        x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
        sum += x ^ x >> 33;
        if (len - at < 8)
            sum += digest_mix(len - at, ~index);
    }
    return sum;
}

static uint8_t data[4096 + 8];

static void fill(void)
{
    uint64_t x = 1;
    for (size_t i = 0; i < sizeof data; i++) {
        x = x * 6364136223846793005ULL + 1;
        data[i] = (uint8_t)(x >> 56);
    }
}

START_TEST(equals_the_definition)
{
    for (size_t len = 0; len < 300; len++)
        for (size_t align = 0; align < 8; align += 3)
            ck_assert_uint_eq(digest_bytes(data + align, len, len * 7), digest_by_hand(data + align, len, len * 7));
    ck_assert_uint_eq(digest_bytes(NULL, 0, 3), 0);
}
END_TEST

/* A fixed value: the definition is on the wire between versions, and a GPU computes the same. */
START_TEST(known_values)
{
    uint8_t count[64];
    for (size_t i = 0; i < sizeof count; i++)
        count[i] = (uint8_t)i;
    ck_assert_uint_eq(digest_bytes(count, 64, 0), 0x0470145117b6d15dULL);
    ck_assert_uint_eq(digest_bytes(count, 13, 1), 0xa5150d09a679465cULL);
}
END_TEST

START_TEST(sums_in_any_order)
{
    uint64_t whole = digest_bytes(data, 4099, 10), sum = 0;
    static const size_t cut[] = {0, 8, 64, 1000, 1008, 4096, 4099};
    for (size_t i = sizeof cut / sizeof *cut - 1; i > 0; i--)
        sum += digest_bytes(data + cut[i - 1], cut[i] - cut[i - 1], 10 + cut[i - 1] / 8);
    ck_assert_uint_eq(sum, whole);
    ck_assert_uint_eq(digest_words(4099), 513);
    ck_assert_uint_eq(digest_words(4096), 512);
    ck_assert_uint_eq(digest_words(0), 0);
}
END_TEST

START_TEST(tells_apart)
{
    uint64_t whole = digest_bytes(data, 1024, 0);
    for (size_t bit = 0; bit < 1024 * 8; bit++) { /* every single bit counts */
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        ck_assert_uint_ne(digest_bytes(data, 1024, 0), whole);
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    for (size_t a = 0; a < 1024; a += 8) { /* two words in each other's place */
        for (size_t b = a + 8; b < 1024; b += 8) {
            uint8_t t[8];
            memcpy(t, data + a, 8), memcpy(data + a, data + b, 8), memcpy(data + b, t, 8);
            ck_assert_uint_ne(digest_bytes(data, 1024, 0), whole);
            memcpy(t, data + a, 8), memcpy(data + a, data + b, 8), memcpy(data + b, t, 8);
        }
    }
    ck_assert_uint_ne(digest_bytes(data, 1024, 1), whole); /* the same bytes elsewhere */
    static const uint8_t zero[4096];
    uint64_t seen[200];
    for (size_t len = 0; len < 200; len++) { /* zeros count, and so does the length */
        seen[len] = digest_bytes(zero, len, 0);
        for (size_t i = 0; i < len; i++)
            ck_assert_uint_ne(seen[i], seen[len]);
    }
    for (uint64_t i = 0; i < 100; i++)
        for (uint64_t j = 0; j < i; j++)
            ck_assert_uint_ne(digest_bytes(zero, 8, i), digest_bytes(zero, 8, j));
}
END_TEST

START_TEST(random_numbers)
{
    uint64_t seen[64];
    struct err err = {0};
    for (int i = 0; i < 64; i++) {
        ck_assert_msg(rand_u64(&seen[i], &err) == 0, "%s", err.text);
        ck_assert_uint_ne(seen[i], 0);
        for (int j = 0; j < i; j++)
            ck_assert_uint_ne(seen[i], seen[j]);
    }
}
END_TEST

int main(void)
{
    fill();
    Suite *suite = suite_create("digest");
    TCase *tc = tcase_create("digest");
    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, equals_the_definition);
    tcase_add_test(tc, known_values);
    tcase_add_test(tc, sums_in_any_order);
    tcase_add_test(tc, tells_apart);
    tcase_add_test(tc, random_numbers);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
