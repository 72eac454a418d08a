/* Inside common/options*.c. */
#ifndef EEP_COMMON_OPTIONS_PARTS_H
#define EEP_COMMON_OPTIONS_PARTS_H

#include "common/options.h"

/* Where the option that is being parsed stands, for options_error: argp_state.hook; NULL in programs without files. */
struct options_place {
    const char *where; /* "/etc/eep/agent.conf:12"; "" = the command line */
    struct err *err;   /* takes the sentence; NULL: the process ends */
};

#endif
