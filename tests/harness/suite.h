/* The main() of a test program. */
#ifndef EEP_TESTS_SUITE_H
#define EEP_TESTS_SUITE_H

#include <check.h>
#include <stdlib.h>

/* Runs a suite, as loudly as $CK_VERBOSITY says, and frees it.  The exit status: a failure if any check has failed. */
static inline int suite_run(Suite *suite)
{
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* A suite with one case, named alike. */
static inline int suite_main(const char *name, void (*add)(TCase *), double seconds)
{
    Suite *suite = suite_create(name);
    TCase *tc = tcase_create(name);
    tcase_set_timeout(tc, seconds);
    add(tc);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}

#endif
